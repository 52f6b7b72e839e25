//! zip (PKWARE APPNOTE): stored and deflated members.

use std::io::Cursor;

use tm_protocol::report::{PathBytes, SkipReason};
use zip::{CompressionMethod, ZipArchive};

use super::Walk;

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
    Ok(())
}
