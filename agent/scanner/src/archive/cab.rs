//! Cabinet files (MS-CAB): not read yet, and said so.

use tm_protocol::report::SkipReason;

use super::Walk;

/// Says that there is no reader.
pub(super) fn members(_walk: &mut Walk<'_>, _bytes: &[u8]) -> Result<(), SkipReason> {
    Err(SkipReason::Unsupported)
}
