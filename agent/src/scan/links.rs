//! Files with several names: each is read once, and what came of it holds for every name.
//!
//! **Invariant:** a file that changed between two of its names is read again, and so is one that was not
//! remembered: the table and what it holds are bounded ([`MOST_FILES`], [`MOST_BYTES`]).

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
    sync::Arc,
};

use tm_protocol::report::{PathBytes, SkipReason};
use tm_scanner::item::Findings;

use crate::platform::fs::{Facts, Object};

/// Files that are remembered while names of theirs are missing; some 60 bytes each.
const MOST_FILES: usize = 1 << 20;
/// Bytes of findings that are remembered, roughly.
const MOST_BYTES: usize = 64 << 20;
/// Bytes of the findings of one file, roughly. What is longer is found again.
const MOST_BYTES_EACH: usize = 64 << 10;

/// Files that were met under one name and have others.
#[derive(Debug, Default)]
pub(super) struct Links {
    files: HashMap<Object, Link>,
    bytes: usize,
    hasher: RandomState,
}

#[derive(Debug)]
struct Link {
    /// Digest of what the file was when it was first met.
    stamp: u64,
    /// Names that were not met yet.
    left: u64,
    known: Known,
}

#[derive(Debug)]
enum Known {
    InHand(u64),
    Clean,
    Found(Arc<Findings>),
}

/// What a name means for the scan.
#[derive(Debug)]
pub(super) enum Met {
    /// The file is to be read.
    First,
    /// The worker has it, under this number.
    InHand(u64),
    /// It was read, and this came of it.
    Known(Arc<Findings>),
}

impl Links {
    /// Meets a file under one of its names.
    pub(super) fn meet(&mut self, facts: &Facts) -> Met {
        if facts.links < 2 {
            return Met::First;
        }
        let object = facts.object();
        let stamp = self.hasher.hash_one(facts.stamp);
        let Some(link) = self.files.get_mut(&object).filter(|link| link.stamp == stamp) else {
            return Met::First;
        };
        link.left = link.left.saturating_sub(1);
        let met = match &link.known {
            Known::InHand(id) => return Met::InHand(*id),
            Known::Clean => Met::Known(Arc::default()),
            Known::Found(findings) => Met::Known(Arc::clone(findings)),
        };
        if link.left == 0 {
            self.forget(object);
        }
        met
    }

    /// The file is given to the worker under `id`; later names wait for its answer.
    pub(super) fn hand_over(&mut self, facts: &Facts, id: u64) {
        if facts.links < 2 {
            return;
        }
        self.forget(facts.object());
        if self.files.len() < MOST_FILES {
            let stamp = self.hasher.hash_one(facts.stamp);
            let link = Link { stamp, left: facts.links - 1, known: Known::InHand(id) };
            self.files.insert(facts.object(), link);
        }
    }

    /// The worker's answer for `id`.
    pub(super) fn answer(&mut self, object: Object, id: u64, findings: &Findings) {
        let Some(link) = self.files.get_mut(&object) else { return };
        if !matches!(link.known, Known::InHand(waiting) if waiting == id) {
            return;
        }
        let changed = findings.skips.iter().any(|skip| skip.reason == SkipReason::Changed);
        let size = size(findings);
        if link.left == 0 || changed {
            self.files.remove(&object);
        } else if size == 0 {
            link.known = Known::Clean;
        } else if size <= MOST_BYTES_EACH && self.bytes + size <= MOST_BYTES {
            self.bytes += size;
            link.known = Known::Found(Arc::new(findings.clone()));
        } else {
            self.files.remove(&object);
        }
    }

    fn forget(&mut self, object: Object) {
        if let Some(Link { known: Known::Found(findings), .. }) = self.files.remove(&object) {
            self.bytes -= size(&findings);
        }
    }
}

/// Roughly, in bytes; nothing if nothing was found and nothing left out.
fn size(findings: &Findings) -> usize {
    let names = |member: &[PathBytes]| -> usize { member.iter().map(|name| name.0.len() + 32).sum() };
    let matches: usize = findings.matches.iter().map(|m| names(&m.member) + m.rule.len() + 128).sum();
    let skips: usize = findings.skips.iter().map(|skip| names(&skip.member) + 64).sum();
    matches + skips
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tm_protocol::ids::Sha256;
    use tm_scanner::item::{Match, Skip};

    use super::*;
    use crate::platform::fs::{Place, facts_of};

    /// A file of `names` names, as it is now.
    fn facts(names: usize) -> (tempfile::TempDir, Facts) {
        let folder = tempfile::tempdir().unwrap();
        let first = folder.path().join("0");
        fs::write(&first, b"x").unwrap();
        (1..names).for_each(|n| fs::hard_link(&first, folder.path().join(n.to_string())).unwrap());
        let facts = facts_of(fs::File::open(&first).unwrap()).unwrap();
        (folder, facts)
    }

    fn found(rule: usize) -> Findings {
        let found = Match { member: vec![], pattern: Sha256::of(b"p"), rule: "r".repeat(rule) };
        Findings { matches: vec![found], sha256: Some(Sha256::of(b"x")), size: 1, skips: vec![] }
    }

    fn skipped(reason: SkipReason) -> Findings {
        Findings { skips: vec![Skip { member: vec![], reason }], ..Findings::default() }
    }

    #[test]
    fn an_answer_holds_for_every_name_and_is_then_forgotten() {
        let (_folder, facts) = facts(4);
        for findings in [found(1), skipped(SkipReason::Timeout), Findings::default()] {
            let mut links = Links::default();
            assert!(matches!(links.meet(&facts), Met::First));
            links.hand_over(&facts, 7);
            assert!(matches!(links.meet(&facts), Met::InHand(7)));
            links.answer(facts.object(), 6, &findings);
            assert!(matches!(links.meet(&facts), Met::InHand(7)), "an answer to another question");
            links.answer(facts.object(), 7, &findings);
            match links.meet(&facts) {
                Met::Known(known) => {
                    assert_eq!((&known.matches, &known.skips), (&findings.matches, &findings.skips));
                }
                other @ (Met::First | Met::InHand(_)) => panic!("{other:?}"),
            }
            assert!(links.files.is_empty(), "all four names were met");
            assert_eq!(links.bytes, 0);
        }
    }

    #[test]
    fn what_changed_or_is_too_much_to_remember_is_read_again() {
        let (folder, before) = facts(3);
        for (findings, kept) in [
            (found(MOST_BYTES_EACH), false),
            (skipped(SkipReason::Changed), false),
            (found(MOST_BYTES_EACH / 2), true),
        ] {
            let mut links = Links::default();
            links.hand_over(&before, 1);
            links.answer(before.object(), 1, &findings);
            assert_eq!(matches!(links.meet(&before), Met::Known(_)), kept);
        }
        let mut links = Links::default();
        links.hand_over(&before, 1);
        links.answer(before.object(), 1, &found(1));
        fs::write(folder.path().join("1"), b"other").unwrap();
        let after =
            Place::find(folder.path().join("0").to_str().unwrap().as_bytes()).unwrap().facts().unwrap();
        assert_eq!(after.object(), before.object(), "the same file");
        assert!(matches!(links.meet(&after), Met::First));
        links.hand_over(&after, 2);
        assert!(matches!(links.meet(&after), Met::InHand(2)));
        assert_eq!(links.bytes, 0);
    }

    #[test]
    fn a_file_with_one_name_is_not_remembered() {
        let (_folder, facts) = facts(1);
        let mut links = Links::default();
        links.hand_over(&facts, 1);
        assert!(links.files.is_empty());
        assert!(matches!(links.meet(&facts), Met::First));
    }
}
