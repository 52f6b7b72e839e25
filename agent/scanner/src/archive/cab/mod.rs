//! Cabinet files (MS-CAB): folders of blocks, and files that are ranges of what a folder's blocks unpack to.
//!
//! Quantum has no reader here; files in such folders are said to be unsupported, each by its name. A file that
//! begins in another cabinet cannot be unpacked without it, and one that ends in another is judged as far as it
//! is here; both are malformed.
//!
//! **Invariant:** a folder is read once from its start to its end; only files that share bytes, which no good
//! cabinet has, make it be read again, and what is then read in vain is counted.

mod blocks;
mod lzx;

use std::io::Read as _;

use tm_protocol::report::SkipReason;

use self::blocks::Blocks;
use super::{
    Walk, codec,
    cover::Cover,
    field::{self, index, len, until_zero},
};

/// Length of the fixed part of the header, in bytes.
const HEADER: u64 = 36;
/// Length of a folder's header and of a file's, without what is added to them, in bytes.
const FOLDER: u64 = 8;
const FILE: u64 = 16;
/// Bits of the flags: there is a cabinet before this one, one after it, and room that is reserved.
const HAS_PREVIOUS: u64 = 1;
const HAS_NEXT: u64 = 1 << 1;
const HAS_RESERVE: u64 = 1 << 2;
/// Folder numbers of files that continue from the cabinet before, into the next, or both.
const FROM_PREVIOUS: u64 = 0xfffd;
const INTO_NEXT: u64 = 0xfffe;
const THROUGH: u64 = 0xffff;
/// The label of what a folder holds and no file names.
const GAP: &[u8] = b"gap";

/// A file as its header has it, in the order of reading.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct File<'b> {
    folder: u64,
    offset: u64,
    size: u64,
    name: &'b [u8],
}

/// Where things stand in a cabinet.
struct Header {
    length: u64,
    files_at: u64,
    files: u64,
    folders_at: u64,
    folders: u64,
    folder_reserve: u64,
    block_reserve: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let number = |at, width| field::le(bytes, at, width);
        let flags = number(30, 2)?;
        let (mut at, mut folder_reserve, mut block_reserve) = (HEADER, 0, 0);
        if flags & HAS_RESERVE != 0 {
            (folder_reserve, block_reserve) = (number(38, 1)?, number(39, 1)?);
            at += 4 + number(36, 2)?;
        }
        // The names of the cabinet and of its disk, each.
        for flag in [HAS_PREVIOUS, HAS_PREVIOUS, HAS_NEXT, HAS_NEXT] {
            if flags & flag != 0 {
                at += len(until_zero(bytes.get(index(at)..)?)) + 1;
            }
        }
        Some(Self {
            length: number(8, 4)?,
            files_at: number(16, 4)?,
            files: number(28, 2)?,
            folders_at: at,
            folders: number(26, 2)?,
            folder_reserve,
            block_reserve,
        })
    }

    fn open<'b>(&self, bytes: &'b [u8], folder: u64) -> Result<Blocks<'b>, SkipReason> {
        if folder >= self.folders {
            return Err(SkipReason::Malformed);
        }
        let at = self.folders_at + folder * (FOLDER + self.folder_reserve);
        Blocks::open(bytes, index(at), self.block_reserve)
    }
}

/// A cabinet that is read.
struct Cabinet<'b> {
    bytes: &'b [u8],
    header: Header,
    /// What headers and blocks cover.
    cover: Cover,
    sound: bool,
    /// Every folder could be read, so what they cover is known.
    complete: bool,
}

/// Judges the files of a cabinet.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let header = Header::parse(bytes).ok_or(SkipReason::Malformed)?;
    let mut cabinet = Cabinet { bytes, header, cover: Cover::default(), sound: true, complete: true };
    let mut files = cabinet.files();
    files.sort_unstable();
    let told = files.len();
    files.dedup();
    cabinet.sound &= files.len() == told;
    let mut rest = files.as_slice();
    while let Some(first) = rest.first() {
        let count = rest.partition_point(|file| file.folder == first.folder);
        let (folder, others) = rest.split_at(count);
        cabinet.folder(walk, first.folder, folder)?;
        rest = others;
    }
    for number in (0..cabinet.header.folders).filter(|number| is_unnamed(&files, *number)) {
        // What no file names nobody unpacks, but it is not unseen either.
        cabinet.folder(walk, number, &[])?;
    }
    let length = cabinet.header.length;
    walk.behind(bytes.get(index(length)..).ok_or(SkipReason::Malformed)?)?;
    // Nobody makes an empty cabinet; one that says so holds something all the same.
    let mut sound = cabinet.sound && cabinet.header.folders > 0 && cabinet.header.files > 0;
    if cabinet.complete {
        sound &= cabinet.cover.close(walk, field::part(bytes, 0, length).0)?;
    }
    if sound { Ok(()) } else { Err(SkipReason::Malformed) }
}

fn is_unnamed(files: &[File<'_>], folder: u64) -> bool {
    files.binary_search_by_key(&folder, |file| file.folder).is_err()
}

impl<'b> Cabinet<'b> {
    /// The files that are there.
    fn files(&mut self) -> Vec<File<'b>> {
        let (bytes, header) = (self.bytes, &self.header);
        self.cover.add(0, header.folders_at + header.folders * (FOLDER + header.folder_reserve));
        let mut files = Vec::new();
        let mut at = header.files_at;
        for _ in 0..header.files {
            let Some(fields) = field::piece(bytes, at, FILE) else {
                self.sound = false;
                break;
            };
            let number = |at, width| field::le(fields, at, width).unwrap_or_default();
            let told = number(8, 2);
            self.sound &= told < FROM_PREVIOUS;
            let folder = match told {
                FROM_PREVIOUS | THROUGH => 0,
                INTO_NEXT => header.folders.saturating_sub(1),
                folder => folder,
            };
            let name = until_zero(bytes.get(index(at + FILE)..).unwrap_or_default());
            files.push(File { folder, offset: number(4, 4), size: number(0, 4), name });
            at += FILE + 1 + len(name);
        }
        self.cover.add(header.files_at, at);
        files
    }

    /// Judges the files of one folder, and what none of them names.
    fn folder(&mut self, walk: &mut Walk<'_>, folder: u64, files: &[File<'_>]) -> Result<(), SkipReason> {
        let mut blocks = match self.header.open(self.bytes, folder) {
            Ok(blocks) => blocks,
            Err(reason) => {
                self.complete = false;
                self.sound &= !files.is_empty();
                return files.iter().try_for_each(|file| walk.unread(file.name, reason));
            }
        };
        for file in files {
            if blocks.at() > file.offset {
                // Files that share bytes: from the start again.
                self.sound = false;
                blocks = self.header.open(self.bytes, folder)?;
                walk.pass(&mut blocks, file.offset)?;
            } else if blocks.at() < file.offset && blocks.failed().is_none() {
                self.sound = false;
                let gap = file.offset - blocks.at();
                take(walk, GAP, &mut blocks, gap)?;
            }
            match blocks.failed() {
                Some(reason) => walk.unread(file.name, reason)?,
                None => take(walk, file.name, &mut blocks, file.size)?,
            }
        }
        if blocks.failed().is_none() && !blocks.is_at_end() {
            self.sound = false;
            take(walk, GAP, &mut blocks, u64::MAX)?;
        }
        self.sound &= blocks.sums_are_right();
        self.complete &= blocks.failed().is_none();
        let (start, end) = blocks.covered(self.bytes);
        self.cover.add(start, end);
        Ok(())
    }
}

/// Judges the next `size` bytes of a folder as a member; fewer, if `size` is more than can be there.
fn take(walk: &mut Walk<'_>, name: &[u8], blocks: &mut Blocks<'_>, size: u64) -> Result<(), SkipReason> {
    let (end, packed, known) = (blocks.at().saturating_add(size), blocks.packed(), size != u64::MAX);
    let mut reader = codec::checked(blocks.by_ref().take(size), None, known.then_some(size));
    let taken = walk.take_out(name, packed, blocks::WORKSPACE, &mut reader)?;
    drop(reader);
    walk.judge_taken(name, taken);
    if !known || blocks.failed().is_some() {
        return Ok(());
    }
    // A member above a limit must not hide those behind it.
    let left = end.saturating_sub(blocks.at());
    walk.pass(blocks, left)
}
