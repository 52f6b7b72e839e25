//! 7z: folders of packed streams, each unpacked by a chain of coders to one run of bytes that is cut into files.
//! All that is known about them stands in a header at the end, which is mostly packed itself.
//!
//! Each file is judged as its bytes pass; nothing is unpacked twice. Streams and headers that share bytes, bytes
//! that belong to nothing, and sums that are wrong make an archive malformed, and all the same it is read as far
//! as it goes.
//!
//! **Invariant:** what a header tells is allocated for only as far as its own length bears it out; a packed
//! header's output is counted like a member's.

mod chain;
mod cursor;
mod header;

use std::io::{self, Read};

use tm_protocol::report::SkipReason;

use self::header::{Contents, Files, Folder, Header, Piece, Streams};
use super::{
    UNNAMED, Walk, codec,
    cover::Cover,
    field::{self, len},
};

/// Length of the fixed part at the start, in bytes. Places in the archive count from its end.
const START: u64 = 32;
/// Headers within headers; there is mostly one.
const DEPTH: u32 = 4;
/// Longest header, in bytes, and what its lists take for each of them.
const LONGEST_HEADER: u64 = 32 << 20;
const LISTS: u64 = 6;

/// An archive that is read.
struct Archive<'b> {
    bytes: &'b [u8],
    /// What headers and packed streams cover.
    cover: Cover,
    sound: bool,
}

/// Judges the files of an archive.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let number = |at, width| field::le(bytes, at, width).ok_or(SkipReason::Malformed);
    let fields = field::piece(bytes, 12, 20).ok_or(SkipReason::Malformed)?;
    let (told, offset, size, crc) = (number(8, 4)?, number(12, 8)?, number(20, 8)?, number(28, 4)?);
    let at = offset.saturating_add(START);
    let mut archive = Archive { bytes, cover: Cover::default(), sound: told == sum(fields) };
    archive.cover.add(0, START);
    let header = field::piece(bytes, at, size).ok_or(SkipReason::Malformed)?;
    archive.sound &= crc == sum(header);
    archive.cover.add(at, at + size);
    // An archive without files has no header either.
    let read = if size == 0 { Ok(()) } else { archive.read(walk, header, DEPTH) };
    // A limit leaves nothing to look behind the archive with.
    if matches!(read, Err(SkipReason::Limit | SkipReason::Timeout)) {
        return read;
    }
    let sound = archive.cover.close(walk, bytes)? && archive.sound;
    read?;
    if sound { Ok(()) } else { Err(SkipReason::Malformed) }
}

fn sum(bytes: &[u8]) -> u64 {
    crc32fast::hash(bytes).into()
}

impl<'b> Archive<'b> {
    fn read(&mut self, walk: &mut Walk<'_>, header: &[u8], depth: u32) -> Result<(), SkipReason> {
        let lists = len(header).saturating_mul(LISTS);
        if len(header) > LONGEST_HEADER || !walk.budget.has_workspace(lists) {
            return Err(SkipReason::Limit);
        }
        walk.budget.hold(lists);
        let read = match header::parse(header) {
            Ok(Header::Plain(contents)) => self.contents(walk, contents),
            Ok(Header::Encoded(streams)) if depth > 0 => self.encoded(walk, &streams, depth - 1),
            Ok(Header::Encoded(_)) => Err(SkipReason::Limit),
            Err(reason) => Err(reason),
        };
        walk.budget.release(lists);
        read
    }

    /// Unpacks a header and reads that.
    fn encoded(&mut self, walk: &mut Walk<'_>, streams: &Streams<'_>, depth: u32) -> Result<(), SkipReason> {
        let packed = self.packed(streams);
        let [folder] = streams.folders.as_slice() else { return Err(SkipReason::Malformed) };
        let own = packed.get(..folder.packed).ok_or(SkipReason::Malformed)?;
        let mut decoder = Unpacked::open(folder, own, &streams.sizes)?;
        let size = folder.size(&streams.sizes).ok_or(SkipReason::Malformed)?;
        if size > LONGEST_HEADER || !walk.budget.has_workspace(decoder.workspace) {
            return Err(SkipReason::Limit);
        }
        walk.budget.hold(decoder.workspace);
        let mut header = Vec::new();
        let whole = walk.fill(&mut header, decoder.packed, &mut decoder.reader);
        let workspace = decoder.workspace;
        drop(decoder);
        walk.budget.release(workspace);
        let read = match whole {
            Ok(()) => self.read(walk, &header, depth),
            Err(reason) => Err(reason),
        };
        walk.budget.release(len(&header));
        read
    }

    /// The packed streams, as far as they are there.
    fn packed(&mut self, streams: &Streams<'_>) -> Vec<&'b [u8]> {
        let begin = streams.packed_at.saturating_add(START);
        let mut at = begin;
        let mut packed = Vec::with_capacity(streams.packed.len());
        for length in &streams.packed {
            let (stream, whole) = field::part(self.bytes, at, *length);
            self.sound &= whole;
            packed.push(stream);
            at = at.saturating_add(*length);
        }
        self.cover.add(begin, at);
        packed
    }

    fn contents(&mut self, walk: &mut Walk<'_>, mut contents: Contents<'_>) -> Result<(), SkipReason> {
        self.sound &= contents.whole;
        let mut no_names = Files::default();
        let last = contents.streams.len().saturating_sub(1);
        for (at, streams) in contents.streams.iter().enumerate() {
            let files = if at == last { &mut contents.files } else { &mut no_names };
            self.sound &= files.with_content() == u64::try_from(streams.pieces.len()).unwrap_or(u64::MAX);
            let packed = self.packed(streams);
            let (mut packed, mut sizes) = (packed.as_slice(), streams.sizes.as_slice());
            let mut pieces = streams.pieces.as_slice();
            for folder in &streams.folders {
                let own = (
                    first(&mut packed, folder.packed),
                    first(&mut sizes, folder.outputs),
                    first(&mut pieces, folder.pieces),
                );
                let (Some(own_packed), Some(own_sizes), Some(own_pieces)) = own else {
                    return Err(SkipReason::Malformed);
                };
                self.sound &= judge(walk, folder, own_packed, own_sizes, own_pieces, files)?;
            }
            self.sound &= packed.is_empty();
        }
        Ok(())
    }
}

/// The first `count` of `list`, which loses them.
fn first<'l, T>(list: &mut &'l [T], count: usize) -> Option<&'l [T]> {
    let (first, rest) = list.split_at_checked(count)?;
    *list = rest;
    Some(first)
}

/// Judges the files of one folder. Says whether it is as it should be.
fn judge(
    walk: &mut Walk<'_>,
    folder: &Folder<'_>,
    packed: &[&[u8]],
    sizes: &[u64],
    pieces: &[Piece],
    files: &mut Files<'_>,
) -> Result<bool, SkipReason> {
    let opened = Unpacked::open(folder, packed, sizes).and_then(|unpacked| {
        if walk.budget.has_workspace(unpacked.workspace) { Ok(unpacked) } else { Err(SkipReason::Limit) }
    });
    let mut unpacked = match opened {
        Ok(unpacked) => unpacked,
        Err(reason) => {
            for _ in pieces {
                let name = files.next_name();
                walk.unread(name.as_deref().unwrap_or(UNNAMED), reason)?;
            }
            return Ok(!pieces.is_empty());
        }
    };
    let workspace = unpacked.workspace;
    walk.budget.hold(workspace);
    let judged = judge_pieces(walk, &mut unpacked, pieces, files);
    drop(unpacked);
    walk.budget.release(workspace);
    judged
}

fn judge_pieces(
    walk: &mut Walk<'_>,
    unpacked: &mut Unpacked<'_>,
    pieces: &[Piece],
    files: &mut Files<'_>,
) -> Result<bool, SkipReason> {
    // What belongs to no file is not unseen either.
    let nobody = [Piece { size: unpacked.size, crc: None }];
    for piece in if pieces.is_empty() { &nobody } else { pieces } {
        let name = if pieces.is_empty() { None } else { files.next_name() };
        let name = name.as_deref().unwrap_or(UNNAMED);
        if let Some(reason) = unpacked.failed {
            walk.unread(name, reason)?;
            continue;
        }
        let (packed, end) = (unpacked.packed, unpacked.at.saturating_add(piece.size));
        let mut reader = codec::checked(unpacked.by_ref().take(piece.size), piece.crc, Some(piece.size));
        let taken = walk.take_out(name, packed, 0, &mut reader)?;
        drop(reader);
        walk.judge_taken(name, taken);
        // A member above a limit must not hide those behind it.
        let left = end.saturating_sub(unpacked.at);
        walk.pass(unpacked, left)?;
    }
    // The end of a stream, and its sum.
    let at_end = unpacked.failed.is_some() || matches!(unpacked.read(&mut [0]), Ok(0));
    Ok(at_end && !pieces.is_empty())
}

/// What a folder unpacks to.
struct Unpacked<'b> {
    reader: Box<dyn Read + 'b>,
    workspace: u64,
    size: u64,
    /// Bytes of its packed streams.
    packed: u64,
    /// How much has been read.
    at: u64,
    /// Why nothing more can be.
    failed: Option<SkipReason>,
}

impl<'b> Unpacked<'b> {
    fn open(folder: &Folder<'_>, packed: &[&'b [u8]], sizes: &[u64]) -> Result<Self, SkipReason> {
        let chain = folder.chain().ok_or(SkipReason::Malformed)?;
        let size = folder.size(sizes).ok_or(SkipReason::Malformed)?;
        let decoder = chain::open(&chain, packed, sizes)?;
        Ok(Self {
            workspace: decoder.workspace,
            reader: Box::new(codec::checked(decoder.reader, folder.crc, Some(size))),
            size,
            packed: packed.iter().map(|stream| len(stream)).sum(),
            at: 0,
            failed: None,
        })
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Some(reason) = self.failed {
            return Err(codec::because(reason));
        }
        match self.reader.read(out) {
            Ok(got) => {
                self.at = self.at.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
                Ok(got)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.failed = Some(codec::reason(&error));
                Err(error)
            }
        }
    }
}
