//! The receipt while it is made: what the worker has, and what came of everything else.
//!
//! **Invariant:** every file that was handed over ends in the receipt once, and under each of its names.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tm_protocol::{
    ids::Sha256,
    report::{Coverage, Detection, PathBytes, SkipReason, Skipped},
    task::ScanLimits,
};
use tm_scanner::item::{Findings, Skip};

use super::{
    Event, Observer,
    links::{Links, Met},
};
use crate::platform::fs::{Facts, Object};

/// Most names of one file that wait for the same answer; under the next one it is read again.
const MOST_NAMES: usize = 10_000;

/// What is in the worker's hands and what came of the rest. Walk and results share it.
pub(super) struct Ledger<'a>(Mutex<Books<'a>>);

pub(super) struct Books<'a> {
    limits: ScanLimits,
    observe: Observer<'a>,
    coverage: Coverage,
    /// Bytes of the files that are known clean.
    known_bytes: u64,
    next_id: u64,
    /// The files that the worker has. As many as its queue holds.
    in_hand: HashMap<u64, Held>,
    links: Links,
    /// What was told of processes: a rule that matches all over one is told once.
    told: HashSet<(PathBytes, Sha256, String)>,
}

/// A file that the worker has.
struct Held {
    /// Where it was met; at least once.
    names: Vec<PathBytes>,
    object: Object,
    /// For a piece of a process's memory, what stands before a member's name.
    memory: Option<Vec<PathBytes>>,
}

impl<'a> Ledger<'a> {
    /// An empty one; `observe` hears of everything that is entered.
    pub(super) fn new(limits: ScanLimits, observe: Observer<'a>) -> Self {
        let coverage = Coverage::default();
        let (in_hand, links, told) = (HashMap::new(), Links::default(), HashSet::new());
        let known_bytes = 0;
        Self(Mutex::new(Books { limits, observe, coverage, known_bytes, next_id: 0, in_hand, links, told }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Books<'a>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receipt. A file without an answer was not looked at; after a cancel it counts as not reached.
    pub(super) fn close(self, is_cancelled: bool) -> Coverage {
        let mut books = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !is_cancelled {
            for held in std::mem::take(&mut books.in_hand).into_values() {
                let member = held.memory.unwrap_or_default();
                for path in held.names {
                    let member = member.clone();
                    books.skip(Skipped { path, member, reason: SkipReason::WorkerDied });
                }
            }
        }
        books.coverage
    }
}

impl Books<'_> {
    /// Notes a file and gives it the number under which it goes to the worker. `None` if it does not need to: it
    /// was met under another name, and what came or comes of that is entered for this name too.
    pub(super) fn hand_over(&mut self, path: PathBytes, facts: &Facts) -> Option<u64> {
        match self.links.meet(facts) {
            Met::Known(findings) => {
                self.report(&path, &[], facts.object(), &findings);
                return None;
            }
            Met::InHand(id) => {
                if let Some(held) = self.in_hand.get_mut(&id).filter(|held| held.names.len() < MOST_NAMES) {
                    held.names.push(path);
                    return None;
                }
            }
            Met::First => {}
        }
        let id = self.next_id;
        self.next_id += 1;
        self.links.hand_over(facts, id);
        self.in_hand.insert(id, Held { names: vec![path], object: facts.object(), memory: None });
        Some(id)
    }

    /// Notes a piece of a process's memory and gives it the number under which it goes to the worker.
    pub(super) fn hand_over_memory(&mut self, path: PathBytes, member: Vec<PathBytes>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        // No file has these numbers: nothing can be done to it by its place.
        let object = Object { device: 0, inode: 0 };
        self.in_hand.insert(id, Held { names: vec![path], object, memory: Some(member) });
        id
    }

    /// So many bytes of a process were handed over, all that is looked at of it.
    pub(super) fn process(&mut self, bytes: u64) {
        self.coverage.files += 1;
        self.coverage.bytes = self.coverage.bytes.saturating_add(bytes);
    }

    /// Enters what the worker says of a file. An answer to no question is dropped: a worker that has been
    /// taken over by a file must not be able to invent results for others.
    ///
    /// Whether it was a piece of memory.
    pub(super) fn take(&mut self, id: u64, findings: &Findings) -> bool {
        let Some(held) = self.in_hand.remove(&id) else { return false };
        if let Some(within) = held.memory {
            for path in held.names {
                self.report(&path, &within, held.object, findings);
            }
            return true;
        }
        self.links.answer(held.object, id, findings);
        if was_read(findings, &self.limits) {
            self.coverage.files += 1;
            self.coverage.bytes = self.coverage.bytes.saturating_add(findings.size);
        }
        for path in held.names {
            self.report(&path, &[], held.object, findings);
        }
        false
    }

    /// Enters a file that is known clean and is not read again; `size` in bytes.
    pub(super) fn known(&mut self, id: u64, size: u64) {
        self.coverage.known += 1;
        self.known_bytes = self.known_bytes.saturating_add(size);
        let _ = self.take(id, &Findings { size, ..Findings::default() });
    }

    /// Bytes of the files that are known clean.
    pub(super) const fn known_bytes(&self) -> u64 {
        self.known_bytes
    }

    /// Enters a file that would be read, if this were not to say only what would be; `size` in bytes.
    pub(super) fn would_read(&mut self, id: u64, size: u64) {
        let mut findings = Findings { size, ..Findings::default() };
        if size > self.limits.file_bytes {
            findings.skips.push(Skip { member: Vec::new(), reason: SkipReason::Limit });
        }
        let _ = self.take(id, &findings);
    }

    /// Enters findings for one name of a file, or for a piece `within` a process.
    fn report(&mut self, path: &PathBytes, within: &[PathBytes], object: Object, findings: &Findings) {
        let member = |member: &[PathBytes]| [within, member].concat();
        for skip in &findings.skips {
            self.skip(Skipped { path: path.clone(), member: member(&skip.member), reason: skip.reason });
        }
        if findings.matches.is_empty() {
            return;
        }
        // A match without a digest is an answer that no sound worker gives.
        let Some(sha256) = findings.sha256 else {
            let (path, member) = (path.clone(), member(&[]));
            return self.skip(Skipped { path, member, reason: SkipReason::WorkerDied });
        };
        for found in &findings.matches {
            let is_new =
                within.is_empty() || self.told.insert((path.clone(), found.pattern, found.rule.clone()));
            if !is_new {
                continue;
            }
            self.coverage.detections += 1;
            let detection = Detection {
                path: path.clone(),
                member: member(&found.member),
                pattern: found.pattern,
                rule: found.rule.clone(),
                sha256,
                size: findings.size,
            };
            (self.observe)(Event::Detection(&detection, object));
        }
    }

    /// Enters what was not looked at.
    pub(super) fn skip(&mut self, skipped: Skipped) {
        (self.observe)(Event::Skipped(&skipped));
        self.coverage.skip(skipped);
    }

    /// A while has passed.
    pub(super) fn tick(&mut self) {
        // Files are answered for roughly in order, so the oldest is looked at by now.
        let oldest = self.in_hand.iter().min_by_key(|(id, _)| **id).and_then(|(_, held)| held.names.first());
        if let Some(path) = oldest {
            (self.observe)(Event::Now(path));
        }
        (self.observe)(Event::Tick(&self.coverage));
    }
}

/// Whether the file on disk itself was looked at, whatever became of its members.
fn was_read(findings: &Findings, limits: &ScanLimits) -> bool {
    let is_lost = |reason| {
        use SkipReason::{Pseudo, Remote, Special, Unreadable, WorkerDied};
        matches!(reason, Unreadable | WorkerDied | Special | Pseudo | Remote)
    };
    // Of a file that is too large for rules digests may have been computed; that is not all that was asked.
    let is_too_large = |reason| reason == SkipReason::Limit && findings.size > limits.file_bytes;
    let lost = |skip: &Skip| skip.member.is_empty() && (is_lost(skip.reason) || is_too_large(skip.reason));
    !findings.skips.iter().any(lost)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tm_scanner::item::Match;

    use super::*;
    use crate::platform::fs::facts_of;

    /// A file of `names` names.
    fn a_file(names: usize) -> (tempfile::TempDir, Facts) {
        let folder = tempfile::tempdir().unwrap();
        let first = folder.path().join("0");
        fs::write(&first, b"x").unwrap();
        (1..names).for_each(|n| fs::hard_link(&first, folder.path().join(n.to_string())).unwrap());
        let facts = facts_of(fs::File::open(&first).unwrap()).unwrap();
        (folder, facts)
    }

    fn skip(member: &[&str], reason: SkipReason) -> Skip {
        Skip { member: member.iter().map(|name| PathBytes::from(name.as_bytes())).collect(), reason }
    }

    fn matched(member: &[&str]) -> Match {
        let member = member.iter().map(|name| PathBytes::from(name.as_bytes())).collect();
        Match { member, pattern: Sha256::of(b"p"), rule: "r".to_owned() }
    }

    #[test]
    fn every_answer_ends_in_the_receipt() {
        let (_folder, facts) = a_file(1);
        let limits = ScanLimits { file_bytes: 100, ..ScanLimits::default() };
        let sha256 = Some(Sha256::of(b"x"));
        for (findings, files, bytes, detections, skipped) in [
            (Findings { size: 7, ..Findings::default() }, 1, 7, 0, vec![]),
            (
                Findings { size: 7, matches: vec![matched(&[]), matched(&["m"])], sha256, skips: vec![] },
                1,
                7,
                2,
                vec![],
            ),
            (
                Findings { size: 7, matches: vec![matched(&[])], ..Findings::default() },
                1,
                7,
                0,
                vec![SkipReason::WorkerDied],
            ),
            (
                Findings {
                    size: 7,
                    skips: vec![skip(&["m"], SkipReason::Unreadable)],
                    ..Findings::default()
                },
                1,
                7,
                0,
                vec![SkipReason::Unreadable],
            ),
            (
                Findings { size: 7, skips: vec![skip(&[], SkipReason::Unreadable)], ..Findings::default() },
                0,
                0,
                0,
                vec![SkipReason::Unreadable],
            ),
            (
                Findings { size: 7, skips: vec![skip(&[], SkipReason::Limit)], ..Findings::default() },
                1,
                7,
                0,
                vec![SkipReason::Limit],
            ),
            (
                Findings { size: 101, skips: vec![skip(&[], SkipReason::Limit)], ..Findings::default() },
                0,
                0,
                0,
                vec![SkipReason::Limit],
            ),
        ] {
            let mut seen = 0;
            let mut observe = |event: Event<'_>| match event {
                Event::Detection(..) => seen += 1,
                Event::Skipped(_) | Event::Now(_) | Event::Tick(_) => {}
            };
            let ledger = Ledger::new(limits, &mut observe);
            let id = ledger.lock().hand_over(PathBytes::from(&b"/f"[..]), &facts).unwrap();
            ledger.lock().take(id, &findings);
            ledger.lock().take(id, &findings);
            ledger.lock().take(99, &findings);
            let coverage = ledger.close(false);
            assert_eq!(
                (coverage.files, coverage.bytes, coverage.detections),
                (files, bytes, detections),
                "{findings:?}"
            );
            assert_eq!(coverage.skipped.into_keys().collect::<Vec<_>>(), skipped, "{findings:?}");
            assert_eq!(seen, detections);
        }
    }

    #[test]
    fn a_file_without_an_answer_is_a_gap_unless_the_scan_was_called_off() {
        let (_folder, facts) = a_file(1);
        for (is_cancelled, expected) in [(false, 1), (true, 0)] {
            let mut observe = |_: Event<'_>| {};
            let ledger = Ledger::new(ScanLimits::default(), &mut observe);
            ledger.lock().hand_over(PathBytes::from(&b"/f"[..]), &facts);
            let coverage = ledger.close(is_cancelled);
            assert_eq!(coverage.skipped.get(&SkipReason::WorkerDied).copied().unwrap_or(0), expected);
        }
    }

    #[test]
    fn every_name_of_a_file_is_reported_and_the_file_is_read_once() {
        let (_folder, facts) = a_file(4);
        let mut seen = Vec::new();
        let mut observe = |event: Event<'_>| match event {
            Event::Detection(detection, object) => {
                assert_eq!(object, facts.object());
                seen.push(detection.path.0.clone());
            }
            Event::Skipped(_) | Event::Now(_) | Event::Tick(_) => {}
        };
        let ledger = Ledger::new(ScanLimits::default(), &mut observe);
        let path = |name: &str| PathBytes::from(name.as_bytes());
        let id = ledger.lock().hand_over(path("/a"), &facts).expect("it is to be read");
        assert_eq!(ledger.lock().hand_over(path("/b"), &facts), None);
        let findings = Findings {
            matches: vec![matched(&["m"])],
            skips: vec![skip(&["n"], SkipReason::Encrypted)],
            sha256: Some(Sha256::of(b"x")),
            size: 1,
        };
        ledger.lock().take(id, &findings);
        for name in ["/c", "/d"] {
            assert_eq!(ledger.lock().hand_over(path(name), &facts), None);
        }
        let coverage = ledger.close(false);
        assert_eq!((coverage.files, coverage.bytes, coverage.detections), (1, 1, 4));
        assert_eq!(coverage.skipped[&SkipReason::Encrypted], 4);
        assert_eq!(seen, [b"/a", b"/b", b"/c", b"/d"]);
    }

    #[test]
    fn names_beyond_those_that_wait_are_read_again() {
        let (_folder, mut facts) = a_file(2);
        facts.links = 1 << 30;
        let mut observe = |_: Event<'_>| {};
        let ledger = Ledger::new(ScanLimits::default(), &mut observe);
        let name = || PathBytes::from(&b"/f"[..]);
        let handed = (0..2 * MOST_NAMES + 1).filter_map(|_| ledger.lock().hand_over(name(), &facts));
        let ids: Vec<u64> = handed.collect();
        assert_eq!(ids, [0, 1, 2]);
        let skipped = skip(&[], SkipReason::Timeout);
        for id in ids {
            ledger.lock().take(id, &Findings { skips: vec![skipped.clone()], ..Findings::default() });
        }
        let names = u64::try_from(2 * MOST_NAMES + 1).unwrap();
        assert_eq!(ledger.close(false).skipped[&SkipReason::Timeout], names);
    }
}
