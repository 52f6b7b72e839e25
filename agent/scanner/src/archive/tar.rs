//! tar: the `tar` crate reads ustar, GNU and pax; names may repeat and may be anything.

use tar::EntryType;
use tm_protocol::report::{PathBytes, SkipReason};

use super::Walk;

pub(super) fn members(
    walk: &mut Walk<'_>,
    within: &mut Vec<PathBytes>,
    bytes: &[u8],
) -> Result<(), SkipReason> {
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().map_err(|_| SkipReason::Malformed)? {
        let mut entry = entry.map_err(|_| SkipReason::Malformed)?;
        let kind = entry.header().entry_type();
        if !(kind.is_file() || kind == EntryType::Continuous || kind.is_gnu_sparse()) {
            continue;
        }
        let name = entry.path_bytes().into_owned();
        let size = entry.size();
        walk.member(within, &name, size, &mut entry)?;
    }
    Ok(())
}
