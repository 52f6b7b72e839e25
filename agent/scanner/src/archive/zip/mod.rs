//! zip (PKWARE APPNOTE 6.3): every entry that any reader would find, once in each reading.
//!
//! Readers differ: most follow the directory at the end, which may exist twice; some walk the local headers
//! from the start; and what a local header says may differ from the directory. So entries of every directory
//! are read as it says and, where the local header says something else, also as that says; and local headers
//! that no directory knows are looked for in all bytes that no known entry covers.

mod directory;
mod local;

use std::collections::HashSet;

use tm_protocol::report::SkipReason;

use self::{directory::Entry, local::Local};
use super::{
    Walk,
    codec::{self, Decoder},
    field::{self, index, len},
};

/// What a local header begins with.
const LOCAL: &[u8] = b"PK\x03\x04";
/// Bits of the flags: encrypted, end marker of LZMA, sizes told behind the data.
const ENCRYPTED: u64 = 1;
const LZMA_END: u64 = 1 << 1;
const SIZES_BEHIND: u64 = 1 << 3;

/// One reading of an entry.
struct View<'b> {
    name: &'b [u8],
    flags: u64,
    method: u64,
    crc: Option<u32>,
    size: Option<u64>,
    data: &'b [u8],
    /// All of the data is there.
    whole: bool,
}

/// Whether there is a directory with entries at the end of `bytes`, whatever stands in front.
pub(super) fn opens(bytes: &[u8]) -> bool {
    !directory::find(bytes).entries.is_empty()
}

/// Judges every entry.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let found = directory::find(bytes);
    let mut sound = found.sound && has_one_name_each(&found.entries);
    let mut covered = found.covered.clone();
    for entry in &found.entries {
        let Some(local) = Local::parse(bytes, entry.local_at) else {
            walk.skip_member(entry.name, SkipReason::Malformed);
            continue;
        };
        let (data, whole) = field::part(bytes, local.data_at, entry.packed);
        covered.push((entry.local_at, local.data_at.saturating_add(entry.packed)));
        let view = View {
            name: entry.name,
            flags: entry.flags,
            method: entry.method,
            crc: Some(entry.crc),
            size: Some(entry.size),
            data,
            whole,
        };
        sound &= local.name == entry.name && local.agrees(entry);
        let other = local.differs(entry).then(|| as_local(&local, bytes, len(bytes)));
        if entry.is_folder() && other.is_none() {
            continue;
        }
        read(walk, &view)?;
        if let Some(other) = other {
            read(walk, &other)?;
        }
    }
    covered.sort_unstable();
    sound &= hidden(walk, bytes, &covered)? && are_apart(&covered);
    if found.truncated {
        return Err(SkipReason::Limit);
    }
    if sound && found.count > 0 { Ok(()) } else { Err(SkipReason::Malformed) }
}

fn has_one_name_each(entries: &[Entry<'_>]) -> bool {
    let mut names = HashSet::with_capacity(entries.len());
    entries.iter().all(|entry| names.insert(entry.name))
}

fn are_apart(covered: &[(u64, u64)]) -> bool {
    covered.iter().zip(covered.iter().skip(1)).all(|((_, end), (start, _))| end <= start)
}

/// Reads local headers that no directory knows. Says that there were none.
fn hidden(walk: &mut Walk<'_>, bytes: &[u8], covered: &[(u64, u64)]) -> Result<bool, SkipReason> {
    let finder = memchr::memmem::Finder::new(LOCAL);
    let mut none = true;
    let mut at = 0;
    for (start, end) in covered.iter().copied().chain([(len(bytes), len(bytes))]) {
        while at < start {
            let gap = bytes.get(index(at)..index(start)).unwrap_or_default();
            let Some(next) = finder.find(gap).and_then(|next| u64::try_from(next).ok()) else { break };
            at += next;
            let Some(local) = Local::parse(bytes, at).filter(|local| local.is_plausible(start)) else {
                at += 4;
                continue;
            };
            none = false;
            let view = as_local(&local, bytes, start);
            // Where the sizes are told behind the data, it is not known where that ends.
            let known = local.flags & SIZES_BEHIND == 0 || local.packed != 0;
            if !local.is_folder() {
                read(walk, &view)?;
            }
            at = if known && view.whole { local.data_at + local.packed } else { local.data_at };
        }
        at = at.max(end);
    }
    Ok(none)
}

/// An entry as its local header has it. Data whose size is not told there reaches to `until` at most.
fn as_local<'b>(local: &Local<'b>, bytes: &'b [u8], until: u64) -> View<'b> {
    let behind = local.flags & SIZES_BEHIND != 0 && local.packed == 0;
    let packed = if behind { until.saturating_sub(local.data_at) } else { local.packed };
    let (mut data, whole) = field::part(bytes, local.data_at, packed);
    if behind && local.method == 0 {
        let end = memchr::memmem::find(data, b"PK\x07\x08").unwrap_or(data.len());
        data = data.get(..end).unwrap_or_default();
    }
    View {
        name: local.name,
        flags: local.flags,
        method: local.method,
        crc: (!behind).then_some(local.crc),
        size: (!behind).then_some(local.size),
        data,
        whole,
    }
}

fn read(walk: &mut Walk<'_>, view: &View<'_>) -> Result<(), SkipReason> {
    if view.flags & ENCRYPTED != 0 {
        walk.count_member()?;
        walk.skip_member(view.name, SkipReason::Encrypted);
        return Ok(());
    }
    if view.method == 0 {
        let judged = walk.member(view.name, view.data)?;
        let right = view.size.is_none_or(|size| size == len(view.data))
            && view.crc.is_none_or(|crc| !judged || crc == crc32fast::hash(view.data));
        if !right || !view.whole {
            walk.skip_member(view.name, SkipReason::Malformed);
        }
        return Ok(());
    }
    let mut input = view.data;
    let decoder = decoder(view, &mut input).map(|decoder| decoder.checked(view.crc, view.size));
    walk.unpack(view.name, len(view.data), decoder)?;
    walk.charge(len(view.data) - len(input))
}

/// The decoder of a method (APPNOTE 4.4.5).
fn decoder<'i, 'v: 'i>(view: &View<'v>, input: &'i mut &'v [u8]) -> Result<Decoder<'i>, SkipReason> {
    let data = view.data;
    Ok(match view.method {
        8 => codec::deflate(input),
        9 => codec::deflate64(input),
        12 => codec::bzip2(input),
        14 => {
            let length = index(field::le(data, 2, 2).ok_or(SkipReason::Malformed)?);
            let (properties, _) = field::part(data, 4, field::le(data, 2, 2).unwrap_or(0));
            let size = view.size.filter(|_| view.flags & LZMA_END == 0);
            *input = data.get(4 + length..).unwrap_or_default();
            codec::lzma(input, properties, size)?
        }
        20 | 93 => codec::zstd(std::mem::take(input))?,
        95 => super::streams::xz_decoder(std::mem::take(input)),
        98 => codec::ppmd8(input)?,
        _ => return Err(SkipReason::Unsupported),
    })
}
