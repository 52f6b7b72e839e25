//! Gathers detections into pieces that fit a frame.
//!
//! **Invariant:** a piece holds at most [`MAX_COUNT`] detections and, counted roughly from above, at most
//! [`MAX_BYTES`]; a single detection is cut to fit.

use tm_protocol::report::Detection;

use crate::platform::fs::Object;

/// Most detections in one piece.
pub(crate) const MAX_COUNT: usize = 64;
/// Most bytes in one piece: half of the largest frame.
pub(crate) const MAX_BYTES: usize = 128 << 10;
/// What remains of a member's name if the detection would not fit otherwise.
const CUT_NAME: usize = 2048;
/// More than the fields of fixed size and the length marks take.
const FIXED: usize = 128;

/// Detections that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    waiting: Vec<(Detection, Object)>,
    bytes: usize,
}

impl Batch {
    /// Adds one; what waited comes out if it and the new one do not fit together.
    pub(crate) fn push(
        &mut self,
        mut detection: Detection,
        object: Object,
    ) -> Option<Vec<(Detection, Object)>> {
        if size(&detection) > MAX_BYTES {
            cut(&mut detection);
        }
        let size = size(&detection);
        let full = self.waiting.len() >= MAX_COUNT || self.bytes.saturating_add(size) > MAX_BYTES;
        let out = full.then(|| self.take()).flatten();
        self.bytes = self.bytes.saturating_add(size);
        self.waiting.push((detection, object));
        out
    }

    /// Takes what waits; `None` if nothing does.
    pub(crate) fn take(&mut self) -> Option<Vec<(Detection, Object)>> {
        self.bytes = 0;
        let waiting = std::mem::take(&mut self.waiting);
        (!waiting.is_empty()).then_some(waiting)
    }
}

fn size(detection: &Detection) -> usize {
    let members: usize = detection.member.iter().map(|name| name.0.len().saturating_add(16)).sum();
    detection.path.0.len().saturating_add(members).saturating_add(detection.rule.len()).saturating_add(FIXED)
}

/// The file's own path is kept whole as long as possible (a walk makes at most 64 KiB of it). Member names
/// come from inside a hostile file and may be of any length and number.
fn cut(detection: &mut Detection) {
    detection.member.truncate(16);
    for name in &mut detection.member {
        name.0.truncate(CUT_NAME);
    }
    if size(detection) > MAX_BYTES {
        detection.path.0.truncate(MAX_BYTES / 2);
    }
    if size(detection) > MAX_BYTES {
        let end = (0..=CUT_NAME).rev().find(|i| detection.rule.is_char_boundary(*i)).unwrap_or(0);
        detection.rule.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use tm_protocol::{ids::Sha256, report::PathBytes};

    use super::*;

    const OBJECT: Object = Object { device: 1, inode: 2 };

    fn detection(path: usize, members: &[usize], rule: usize) -> Detection {
        Detection {
            path: PathBytes(vec![b'p'; path]),
            member: members.iter().map(|len| PathBytes(vec![b'm'; *len])).collect(),
            pattern: Sha256::of(b""),
            rule: "ä".repeat(rule),
            sha256: Sha256::of(b""),
            size: 1,
        }
    }

    #[test]
    fn pieces_fit_and_nothing_is_lost() {
        let (few, many) = (10, 300);
        for (count, one) in [
            (few, detection(20, &[], 5)),
            (many, detection(20, &[9], 5)),
            (many, detection(60_000, &[], 5)),
            (few, detection(60_000, &[65_535; 8], 5)),
            (few, detection(200_000, &[10; 20_000], 100_000)),
        ] {
            let mut batch = Batch::default();
            let mut pieces: Vec<Vec<(Detection, Object)>> =
                (0..count).filter_map(|_| batch.push(one.clone(), OBJECT)).collect();
            pieces.extend(batch.take());
            assert_eq!(pieces.iter().map(Vec::len).sum::<usize>(), count);
            for piece in &pieces {
                assert!(piece.len() <= MAX_COUNT);
                assert!(piece.iter().map(|(detection, _)| size(detection)).sum::<usize>() <= MAX_BYTES);
            }
            assert_eq!(batch.take(), None);
        }
    }

    #[test]
    fn what_fits_is_not_cut() {
        let one = detection(60_000, &[3000, 3000], 100);
        let mut batch = Batch::default();
        assert_eq!(batch.push(one.clone(), OBJECT), None);
        assert_eq!(batch.take(), Some(vec![(one, OBJECT)]));
    }
}
