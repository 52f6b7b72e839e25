//! rpm: a lead, two headers, and a payload, which is a compressed cpio archive (RPM format, version 3).

use tm_protocol::report::SkipReason;

use super::{
    Walk,
    field::{self, index},
};

/// Length of the lead, in bytes.
const LEAD: u64 = 96;
/// What a header begins with.
const HEADER: &[u8] = b"\x8e\xad\xe8\x01";
/// The label of the payload, which has no name.
const PAYLOAD: &[u8] = b"payload";
/// The header's tag that names the payload's compression.
const TAG_COMPRESSOR: u64 = 1125;

/// Judges the payload of a package.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let (signature, _) = header_end(bytes, LEAD).ok_or(SkipReason::Malformed)?;
    let at = signature.checked_next_multiple_of(8).ok_or(SkipReason::Malformed)?;
    let (payload, compressor) = header_end(bytes, at).ok_or(SkipReason::Malformed)?;
    let payload = bytes.get(index(payload)..).ok_or(SkipReason::Malformed)?;
    if payload.is_empty() {
        // A package may hold nothing (its files are ghosts); its compressor writes an end even then.
        return Err(SkipReason::Malformed);
    }
    if super::kind::containers(payload).is_empty() {
        // Nothing tells what it is, or LZMA, which tells it hardly.
        return match compressor {
            Some(b"lzma") => walk.unpack(PAYLOAD, field::len(payload), super::streams::lzma_alone(payload)),
            _ => Err(SkipReason::Unsupported),
        };
    }
    walk.member(PAYLOAD, payload).map(drop)
}

/// Where a header that begins at `at` ends, and which compressor it names.
fn header_end(bytes: &[u8], at: u64) -> Option<(u64, Option<&[u8]>)> {
    let header = bytes.get(index(at)..)?;
    if !header.starts_with(HEADER) {
        return None;
    }
    let entries = field::be(header, 8, 4)?;
    let store_length = field::be(header, 12, 4)?;
    let store_at = 16 + entries * 16;
    let index_bytes = field::piece(header, 16, entries * 16)?;
    let store = field::piece(header, store_at, store_length)?;
    let compressor = index_bytes.chunks_exact(16).find_map(|entry| {
        let text = store.get(index(field::be(entry, 8, 4)?)..)?;
        (field::be(entry, 0, 4)? == TAG_COMPRESSOR).then(|| field::until_zero(text))
    });
    Some((at.checked_add(store_at)?.checked_add(store_length)?, compressor))
}
