//! What a process has mapped, and which of its pages hold content of its own.
//!
//! **Invariant:** a page that was never touched, was swapped out, or is a clean page of a file that still stands
//! on disk is not read: reading it would make the process grow, or read a file twice.

use std::{
    fs::File,
    io::{self, Read as _},
    ops::Range,
    os::unix::fs::FileExt as _,
};

use tm_protocol::report::PathBytes;

/// Longest list of mappings that is read, in bytes.
const LONGEST: u64 = 64 << 20;
/// Pages that are asked for at a time.
const PAGES: usize = 4096;

/// Bits of an entry of `/proc/PID/pagemap` (kernel documentation, admin-guide/mm/pagemap).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page belongs to a file or is shared memory.
const OF_FILE: u64 = 1 << 61;

/// One mapping that may be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Its addresses.
    pub(super) range: Range<u64>,
    /// The file, or the kernel's word for it (`[heap]`); empty if it has no name.
    pub(super) name: PathBytes,
    /// Its clean pages are those of a file that a scan of files reads.
    is_on_disk: bool,
}

/// Reads the list of mappings.
///
/// # Errors
/// If the process is gone or may not be looked at.
pub(super) fn read(pid: u32) -> io::Result<Vec<Mapping>> {
    let mut text = Vec::new();
    File::open(format!("/proc/{pid}/maps"))?.take(LONGEST).read_to_end(&mut text)?;
    Ok(parse(&text))
}

/// `/proc/PID/maps` (proc(5)): addresses, rights, offset, device, inode, name.
fn parse(text: &[u8]) -> Vec<Mapping> {
    text.split(|byte| *byte == b'\n').filter_map(mapping).collect()
}

fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut next = || fields.next();
    let (addresses, rights, _, _, inode) = (next()?, next()?, next()?, next()?, next()?);
    let name = next().unwrap_or_default().trim_ascii_start();
    let (start, end) = std::str::from_utf8(addresses).ok()?.split_once('-')?;
    let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
    // The kernel's own pages, the same in every process, and memory of devices, which reading may upset.
    let is_kernels = [&b"[vvar"[..], b"[vdso", b"[vsyscall"].iter().any(|word| name.starts_with(word))
        || name.starts_with(b"/dev/") && !name.starts_with(b"/dev/shm/") && !name.starts_with(b"/dev/zero");
    if rights.first() != Some(&b'r') || is_kernels || range.is_empty() {
        return None;
    }
    let is_on_disk = inode != b"0" && name.starts_with(b"/") && !is_gone(name);
    Some(Mapping { range, name: PathBytes::from(name), is_on_disk })
}

/// Whether a file's name says that it stands nowhere on disk.
pub(super) fn is_gone(name: &[u8]) -> bool {
    name.ends_with(b" (deleted)") || name.starts_with(b"/memfd:")
}

/// What of a mapping is worth reading.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// Stretches of pages with content of their own, by address, ascending and apart from each other.
    pub(super) runs: Vec<Range<u64>>,
    /// Bytes that were swapped out.
    pub(super) swapped: u64,
}

/// Asks the kernel which pages of the mapping are there.
///
/// # Errors
/// If the process is gone or may not be looked at.
pub(super) fn content(pagemap: &File, mapping: &Mapping, page: u64) -> io::Result<Content> {
    let mut content = Content::default();
    let mut entries = vec![0; PAGES * 8];
    let mut at = mapping.range.start;
    while at < mapping.range.end {
        let wanted = ((mapping.range.end - at) / page).min(PAGES as u64);
        let bytes = usize::try_from(wanted * 8).map_err(io::Error::other)?;
        let buffer = entries.get_mut(..bytes).ok_or(io::ErrorKind::InvalidData)?;
        let got = pagemap.read_at(buffer, at / page * 8)?;
        if got < 8 {
            // The mapping is gone, and with it what it held.
            break;
        }
        for entry in buffer.get(..got).unwrap_or_default().as_chunks::<8>().0 {
            content.page(at, page, u64::from_ne_bytes(*entry), mapping.is_on_disk);
            at += page;
        }
    }
    Ok(content)
}

impl Content {
    fn page(&mut self, at: u64, page: u64, entry: u64, is_on_disk: bool) {
        if entry & SWAPPED != 0 {
            self.swapped += page;
        } else if entry & PRESENT != 0 && !(is_on_disk && entry & OF_FILE != 0) {
            match self.runs.last_mut() {
                Some(run) if run.end == at => run.end += page,
                Some(_) | None => self.runs.push(at..at + page),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_and_the_kernels_own_are_left_out() {
        let text = b"1000-3000 r-xp 00000000 fe:00 77   /usr/bin/a b\n\
            3000-4000 rw-p 00000000 fe:00 77   /tmp/x (deleted)\n\
            4000-5000 ---p 00000000 00:00 0 \n\
            5000-6000 rw-p 00000000 00:00 0    [heap]\n\
            6000-7000 r--p 00000000 00:00 0    [vvar]\n\
            7000-8000 rw-s 00000000 00:06 9    /dev/dri/card0\n\
            8000-9000 rw-s 00000000 00:01 9    /memfd:x (deleted)\n\
            nonsense\nzz-1 r\n\xff\n";
        let found: Vec<_> =
            parse(text).into_iter().map(|m| (m.range.start, m.name.to_string(), m.is_on_disk)).collect();
        assert_eq!(
            found,
            [
                (0x1000, "/usr/bin/a b".to_owned(), true),
                (0x3000, "/tmp/x (deleted)".to_owned(), false),
                (0x5000, "[heap]".to_owned(), false),
                (0x8000, "/memfd:x (deleted)".to_owned(), false),
            ]
        );
    }

    #[test]
    fn only_pages_with_content_of_their_own_are_read() {
        let mut content = Content::default();
        for (at, entry, is_on_disk) in [
            (0, PRESENT, false),
            (4096, PRESENT | OF_FILE, false),
            (8192, 0, false),
            (12288, SWAPPED, false),
            (16384, PRESENT | OF_FILE, true),
            (20480, PRESENT, true),
        ] {
            content.page(at, 4096, entry, is_on_disk);
        }
        assert_eq!(content, Content { runs: vec![0..8192, 20480..24576], swapped: 4096 });
    }
}
