//! gzip (RFC 1952), also several members in a row.

use flate2::bufread::MultiGzDecoder;
use tm_protocol::report::{PathBytes, SkipReason};

use super::{Walk, len};

/// The name of content whose gzip header does not give one.
const UNNAMED: &[u8] = b"content";

pub(super) fn members(
    walk: &mut Walk<'_>,
    within: &mut Vec<PathBytes>,
    bytes: &[u8],
) -> Result<(), SkipReason> {
    let mut decoder = MultiGzDecoder::new(bytes);
    let name = decoder.header().and_then(|header| header.filename()).unwrap_or(UNNAMED).to_vec();
    walk.member(within, &name, len(bytes), &mut decoder)
}
