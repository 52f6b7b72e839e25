//! ar, as `ar(5)` and `deb(5)` describe it: members behind headers of 60 characters.
//!
//! Names longer than 15 characters stand in a member `//` (System V) or in front of the content (BSD).

use tm_protocol::report::SkipReason;

use super::{
    Walk,
    field::{self, index, len, until_zero},
};

/// What the format begins with.
pub(super) const MAGIC: &[u8] = b"!<arch>\n";
/// Length of a member's header, in bytes.
const HEADER: usize = 60;

/// Judges the members of an archive.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let mut rest = bytes.get(MAGIC.len()..).unwrap_or_default();
    let mut long_names: &[u8] = &[];
    while !rest.is_empty() {
        let header = rest.get(..HEADER).ok_or(SkipReason::Malformed)?;
        if header.get(58..) != Some(b"`\n") {
            // The padding of the last member may be missing, and what follows may be anything.
            walk.behind(rest)?;
            return Err(SkipReason::Malformed);
        }
        let name = header.get(..16).unwrap_or_default().trim_ascii_end();
        let size =
            header.get(48..58).and_then(|size| field::digits(size, 10)).ok_or(SkipReason::Malformed)?;
        let (content, whole) = field::part(rest, len(header), size);
        if name == b"//" {
            long_names = content;
        } else if let Some(length) = name.strip_prefix(b"#1/") {
            let length = index(field::digits(length, 10).ok_or(SkipReason::Malformed)?);
            let (name, content) = content.split_at_checked(length).ok_or(SkipReason::Malformed)?;
            walk.member(until_zero(name), content)?;
        } else if !matches!(name, b"/" | b"/SYM64/") {
            walk.member(name_of(name, long_names), content)?;
        }
        if !whole {
            return Err(SkipReason::Malformed);
        }
        let next = HEADER.saturating_add(index(size)).saturating_add(index(size) & 1);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(())
}

fn name_of<'b>(name: &'b [u8], long_names: &'b [u8]) -> &'b [u8] {
    let long = name.strip_prefix(b"/").and_then(|at| field::digits(at, 10));
    if let Some(name) = long.and_then(|at| long_names.get(index(at)..)) {
        let name = name.split(|byte| *byte == b'\n').next().unwrap_or_default();
        return name.strip_suffix(b"/").unwrap_or(name);
    }
    name.strip_suffix(b"/").unwrap_or(name)
}
