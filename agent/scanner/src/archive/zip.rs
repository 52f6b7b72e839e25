//! zip (PKWARE APPNOTE): stored and deflated members.

use std::io::Cursor;

use tm_protocol::report::{PathBytes, SkipReason};
use zip::{CompressionMethod, ZipArchive};

use super::Walk;

/// Whether there is a directory with members at the end of `bytes`, whatever stands in front.
pub(super) fn opens(bytes: &[u8]) -> bool {
    ZipArchive::new(Cursor::new(bytes)).is_ok_and(|archive| !archive.is_empty())
}

pub(super) fn members(
    walk: &mut Walk<'_>,
    within: &mut Vec<PathBytes>,
    bytes: &[u8],
) -> Result<(), SkipReason> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|_| SkipReason::Malformed)?;
    for index in 0..archive.len() {
        let (name, encrypted, method) = match archive.by_index_raw(index) {
            Ok(entry) if entry.is_dir() => continue,
            Ok(entry) => (entry.name_raw().to_vec(), entry.encrypted(), entry.compression()),
            Err(_) => return Err(SkipReason::Malformed),
        };
        if encrypted {
            walk.skip_member(within, &name, SkipReason::Encrypted);
            continue;
        }
        if !matches!(method, CompressionMethod::Stored | CompressionMethod::Deflated) {
            walk.skip_member(within, &name, SkipReason::Unsupported);
            continue;
        }
        match archive.by_index(index) {
            Ok(mut entry) => {
                let packed = entry.compressed_size();
                walk.member(within, &name, packed, &mut entry)?;
            }
            Err(_) => walk.skip_member(within, &name, SkipReason::Malformed),
        }
    }
    // Of entries with the same name the reader keeps one; other unpackers may take another.
    if central_entries(bytes, archive.central_directory_start()) == archive.len() {
        Ok(())
    } else {
        Err(SkipReason::Malformed)
    }
}

/// How many headers the central directory holds (APPNOTE 4.3.12).
fn central_entries(bytes: &[u8], start: u64) -> usize {
    let mut rest = usize::try_from(start).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
    let mut entries = 0;
    while rest.starts_with(b"PK\x01\x02") {
        let Some(lengths) = rest.get(28..34) else { break };
        let variable: usize = lengths
            .chunks_exact(2)
            .map(|length| length.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
            .sum();
        entries += 1;
        rest = rest.get(46 + variable..).unwrap_or_default();
    }
    entries
}
