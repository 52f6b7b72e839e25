//! Files that were looked at and found clean, so that they need not be read again.
//!
//! A file is known by what the file system says of it: device, inode, size, and the times of its last change of
//! content and of attributes. The last cannot be set by anybody, so putting back the modification time hides
//! nothing. Entered is only a file that was looked at whole (no match, no skip) and had last been changed a while
//! before ([`SETTLED_S`]): a page that is written through a mapping moves the times no more until it is clean. Only
//! file systems whose times can be trusted take part ([`Mounts::keeps_times`]).
//!
//! On disk: a line that names form and program version, 16 bytes of key, the sets of patterns that entries speak
//! of, the entries sorted, and a SHA-256 over all before it. An entry is 16 bytes of a keyed digest and two of the
//! number of its set. It is written whole, beside and into its place; deleting it costs time and nothing else.
//!
//! **Invariant:** whatever is wrong with the file, it counts as empty.
//! **Invariant:** at most [`MOST`] entries; those that the last scan did not meet make room first.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use tm_patterns::Pattern;
use tm_protocol::ids::Sha256;

use crate::{
    paths::replace,
    platform::{fs::Facts, mounts::Mounts},
};

/// Most files remembered; 18 bytes each on disk, some 40 in memory while a scan runs.
const MOST: usize = 1 << 20;
/// Most sets of patterns that entries may speak of.
const MOST_SETS: usize = 64;
/// Most patterns in a set.
const MOST_PATTERNS: usize = 4096;
/// How long ago a file must have been changed last to be remembered, in seconds.
const SETTLED_S: i64 = 120;
const FORM: &str = concat!("tm-seen 1 ", env!("CARGO_PKG_VERSION"), "\n");
/// Longest file that is read, in bytes.
const LONGEST: u64 = 32 << 20;

/// What has seen a file so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Every pattern of this scan: there is nothing to do.
    ByAll,
    /// All but [`Seen::rest`].
    ButTheRest,
    /// Not enough of them.
    No,
}

/// The files known clean, as one scan uses them.
#[derive(Debug)]
pub(super) struct Seen {
    path: PathBuf,
    key: [u8; 16],
    sets: Vec<BTreeSet<Sha256>>,
    entries: HashMap<u128, Entry>,
    /// The patterns of this scan.
    wanted: BTreeSet<Sha256>,
    /// What most entries lack of them, if they have some.
    rest: BTreeSet<Sha256>,
    /// Every file is to be looked at again.
    fresh: bool,
    /// Files in the worker's hands: what to remember if they turn out clean, and the set then.
    in_hand: HashMap<u64, (u128, u16)>,
    mounts: Mounts,
    now_s: i64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    set: u16,
    is_met: bool,
}

impl Seen {
    /// Reads what earlier scans left at `path`; with `fresh` it answers nothing, and what this
    /// scan finds takes its place file by file. `None` if these patterns give other results at another time, so that nothing can be remembered.
    pub(super) fn open(path: &Path, patterns: &[Pattern], fresh: bool) -> Option<Self> {
        if patterns.iter().any(depends_on_time) || patterns.len() > MOST_PATTERNS {
            return None;
        }
        let wanted: BTreeSet<Sha256> = patterns.iter().map(Pattern::sha256).collect();
        let (key, sets, entries) = load(path).unwrap_or_else(|| (rand::random(), Vec::new(), HashMap::new()));
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let mut seen = Self {
            path: path.to_owned(),
            key,
            sets,
            entries,
            wanted,
            rest: BTreeSet::new(),
            fresh,
            in_hand: HashMap::new(),
            mounts: Mounts::new(),
            now_s: i64::try_from(now_s).unwrap_or(0),
        };
        if !fresh {
            seen.rest = seen.most_missed();
        }
        Some(seen)
    }

    /// The patterns that most known files have yet to meet; empty if there are none such.
    pub(super) fn rest(&self) -> &BTreeSet<Sha256> {
        &self.rest
    }

    /// Whether any file may be known by all patterns.
    pub(super) fn may_know(&self) -> bool {
        !self.fresh && self.sets.iter().any(|set| set.is_superset(&self.wanted))
    }

    /// Whether the file is known clean. It is given to the worker under `id` if not by all.
    pub(super) fn meet(&mut self, facts: &Facts, id: u64) -> Known {
        if !facts.mount.is_some_and(|mount| self.mounts.keeps_times(mount)) {
            return Known::No;
        }
        self.meet_settled(facts, id)
    }

    /// The same, where times can be trusted.
    fn meet_settled(&mut self, facts: &Facts, id: u64) -> Known {
        let (size, modified, changed) = facts.stamp.parts();
        let object = facts.object();
        let mut text = Vec::with_capacity(80);
        text.extend_from_slice(&self.key);
        for part in [object.device, object.inode, size] {
            text.extend_from_slice(&part.to_be_bytes());
        }
        for (seconds, nanoseconds) in [modified, changed] {
            text.extend_from_slice(&seconds.to_be_bytes());
            text.extend_from_slice(&nanoseconds.to_be_bytes());
        }
        let digest = Sha256::of(&text);
        let print = digest.as_bytes().iter().take(16).fold(0u128, |n, byte| n << 8 | u128::from(*byte));

        let known = self.entries.get_mut(&print).map(|entry| {
            entry.is_met = true;
            entry.set
        });
        let set = known.filter(|_| !self.fresh).and_then(|set| self.sets.get(usize::from(set)));
        let (answer, then) = match set {
            Some(set) if set.is_superset(&self.wanted) => return Known::ByAll,
            Some(set) => {
                let then: BTreeSet<Sha256> = set.union(&self.wanted).copied().collect();
                let missing = self.wanted.difference(set).copied();
                let is_rest = !self.rest.is_empty() && missing.eq(self.rest.iter().copied());
                (if is_rest { Known::ButTheRest } else { Known::No }, then)
            }
            None => (Known::No, self.wanted.clone()),
        };
        let settled = [modified.0, changed.0].iter().all(|at| at.saturating_add(SETTLED_S) < self.now_s);
        if settled && let Some(set) = self.number_of(then) {
            self.in_hand.insert(id, (print, set));
        }
        answer
    }

    /// What came of a file that was met.
    pub(super) fn answer(&mut self, id: u64, is_clean: bool) {
        let Some((print, set)) = self.in_hand.remove(&id) else { return };
        if !is_clean {
            self.entries.remove(&print);
        } else if self.entries.len() < MOST || self.entries.contains_key(&print) {
            self.entries.insert(print, Entry { set, is_met: true });
        } else {
            // Full: what this scan did not meet gives way, at once and together.
            self.entries.retain(|_, entry| entry.is_met);
            if self.entries.len() < MOST {
                self.entries.insert(print, Entry { set, is_met: true });
            }
        }
    }

    /// Writes it for the next scan.
    ///
    /// # Errors
    /// If the disk refuses; the old one stays.
    pub(super) fn save(&self) -> io::Result<()> {
        let used: BTreeSet<u16> = self.entries.values().map(|entry| entry.set).collect();
        let used: Vec<u16> = used.into_iter().collect();
        let mut text = FORM.as_bytes().to_vec();
        text.extend_from_slice(&self.key);
        number(&mut text, used.len());
        for set in &used {
            let set = self.sets.get(usize::from(*set)).ok_or(io::ErrorKind::InvalidData)?;
            number(&mut text, set.len());
            set.iter().for_each(|sha256| text.extend_from_slice(sha256.as_bytes()));
        }
        number(&mut text, self.entries.len());
        let mut entries: Vec<_> = self.entries.iter().map(|(print, entry)| (*print, entry.set)).collect();
        entries.sort_unstable();
        for (print, set) in entries {
            text.extend_from_slice(&print.to_be_bytes());
            let at = used.binary_search(&set).map_err(|_| io::ErrorKind::InvalidData)?;
            text.extend_from_slice(&u16::try_from(at).map_err(io::Error::other)?.to_be_bytes());
        }
        let digest = Sha256::of(&text);
        text.extend_from_slice(digest.as_bytes());
        replace(&self.path, &text)
    }

    /// The number under which entries speak of a set. `None` if there are too many.
    fn number_of(&mut self, set: BTreeSet<Sha256>) -> Option<u16> {
        let at = match self.sets.iter().position(|known| *known == set) {
            Some(at) => at,
            None if self.sets.len() < MOST_SETS && set.len() <= MOST_PATTERNS => {
                self.sets.push(set);
                self.sets.len() - 1
            }
            None => return None,
        };
        u16::try_from(at).ok()
    }

    fn most_missed(&self) -> BTreeSet<Sha256> {
        let mut counts: HashMap<u16, usize> = HashMap::new();
        self.entries.values().for_each(|entry| *counts.entry(entry.set).or_default() += 1);
        let partly =
            |set: &&BTreeSet<Sha256>| !set.is_superset(&self.wanted) && !set.is_disjoint(&self.wanted);
        let most = counts
            .iter()
            .filter_map(|(set, count)| Some((*count, self.sets.get(usize::from(*set)).filter(partly)?)))
            .max_by_key(|(count, _)| *count);
        most.map(|(_, set)| self.wanted.difference(set).copied().collect()).unwrap_or_default()
    }
}

/// Whether a rule in it may ask what time it is.
fn depends_on_time(pattern: &Pattern) -> bool {
    let words = pattern.text().split(|c: char| c.is_whitespace() || c == ';');
    let mut previous = "";
    for word in words.filter(|word| !word.is_empty()) {
        if previous.ends_with("import") && word.starts_with("\"time\"") || word.contains("import\"time\"") {
            return true;
        }
        previous = word;
    }
    false
}

type Loaded = ([u8; 16], Vec<BTreeSet<Sha256>>, HashMap<u128, Entry>);

/// `None` if it is not there, not ours alone, or not whole.
fn load(path: &Path) -> Option<Loaded> {
    let file = File::open(path).ok()?;
    let facts = file.metadata().ok()?;
    let is_ours = facts.is_file()
        && facts.uid() == rustix::process::geteuid().as_raw()
        && facts.mode() & 0o022 == 0
        && facts.len() <= LONGEST;
    if !is_ours {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).ok()?;
    let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Sha256::of(body).as_bytes() != digest {
        return None;
    }
    let mut rest = body.strip_prefix(FORM.as_bytes())?;
    let key = take::<16>(&mut rest)?;
    let mut sets = Vec::new();
    for _ in 0..count(&mut rest, MOST_SETS)? {
        let mut set = BTreeSet::new();
        for _ in 0..count(&mut rest, MOST_PATTERNS)? {
            set.insert(Sha256::new(take::<32>(&mut rest)?));
        }
        sets.push(set);
    }
    let entries = count(&mut rest, MOST)?;
    let mut known = HashMap::with_capacity(entries);
    for _ in 0..entries {
        let print = u128::from_be_bytes(take(&mut rest)?);
        let set = u16::from_be_bytes(take(&mut rest)?);
        known.insert(print, Entry { set, is_met: false });
    }
    rest.is_empty().then_some((key, sets, known))
}

fn number(text: &mut Vec<u8>, number: usize) {
    text.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes());
}

fn count(rest: &mut &[u8], most: usize) -> Option<usize> {
    let count = usize::try_from(u32::from_be_bytes(take(rest)?)).ok()?;
    (count <= most).then_some(count)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk::<N>()?;
    *rest = left;
    Some(*taken)
}

/// Whether a file could be kept at `path`: somebody else must not be able to put one there.
///
/// # Errors
/// If the folder is not there or others may write in it.
pub(super) fn check_place(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let facts = fs::metadata(folder)?;
    if facts.mode() & 0o022 != 0 || facts.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("others may write in that folder"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt as _,
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::platform::fs::facts_of;

    fn pattern(name: &str) -> Pattern {
        Pattern::new(name, format!("rule {name} {{ condition: false }}").into_bytes()).unwrap()
    }

    /// A file as it is after [`SETTLED_S`], for a scan that runs then.
    struct Later {
        folder: tempfile::TempDir,
        file: PathBuf,
    }

    impl Later {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("f");
            fs::write(&file, b"x").unwrap();
            Self { folder, file }
        }

        fn facts(&self) -> Facts {
            facts_of(File::open(&self.file).unwrap()).unwrap()
        }

        fn cache(&self) -> PathBuf {
            self.folder.path().join("seen")
        }

        fn open(&self, patterns: &[Pattern]) -> Seen {
            let mut seen = Seen::open(&self.cache(), patterns, false).unwrap();
            seen.now_s += SETTLED_S + 10;
            seen
        }

        /// One scan that finds the file clean, or not.
        fn scan(&self, patterns: &[Pattern], is_clean: bool) -> Known {
            let mut seen = self.open(patterns);
            let known = seen.meet_settled(&self.facts(), 1);
            if known != Known::ByAll {
                seen.answer(1, is_clean);
            }
            seen.save().unwrap();
            known
        }
    }

    #[test]
    fn a_clean_file_is_known_until_it_or_the_patterns_change() {
        let later = Later::new();
        let (a, b, c) = (pattern("a"), pattern("b"), pattern("c"));
        let ab = [a.clone(), b.clone()];
        assert_eq!(later.scan(&ab, true), Known::No);
        assert_eq!(later.scan(&ab, true), Known::ByAll);
        assert_eq!(later.scan(&ab[..1], true), Known::ByAll, "fewer patterns than have seen it");
        let abc = [a.clone(), b.clone(), c.clone()];
        assert_eq!(later.open(&abc).rest(), &BTreeSet::from([c.sha256()]));
        assert_eq!(later.scan(&abc, true), Known::ButTheRest);
        assert_eq!(later.scan(&abc, true), Known::ByAll);
        assert_eq!(later.scan(&[pattern("d")], true), Known::No, "none of these has seen it");

        let modified = fs::metadata(&later.file).unwrap().modified().unwrap();
        fs::write(&later.file, b"y").unwrap();
        File::options().write(true).open(&later.file).unwrap().set_modified(modified).unwrap();
        assert_eq!(fs::metadata(&later.file).unwrap().modified().unwrap(), modified);
        assert_eq!(later.scan(&ab, false), Known::No, "a modification time that was put back hides nothing");
        assert_eq!(later.scan(&ab, false), Known::No, "what is not clean is not remembered");
    }

    #[test]
    fn a_fresh_scan_reads_what_is_known_and_forgets_nothing_else() {
        let later = Later::new();
        let (a, b) = ([pattern("a")], [pattern("a"), pattern("b")]);
        assert_eq!(later.scan(&a, true), Known::No);
        let other = later.folder.path().join("g");
        fs::write(&other, b"y").unwrap();
        let facts = facts_of(File::open(&other).unwrap()).unwrap();
        let mut seen = later.open(&a);
        assert_eq!(seen.meet_settled(&facts, 1), Known::No);
        seen.answer(1, true);
        seen.save().unwrap();

        let mut seen = Seen::open(&later.cache(), &b, true).unwrap();
        seen.now_s += SETTLED_S + 10;
        assert!(!seen.may_know() && seen.rest().is_empty());
        assert_eq!(seen.meet_settled(&later.facts(), 1), Known::No);
        seen.answer(1, false);
        seen.save().unwrap();
        assert_eq!(later.open(&a).meet_settled(&later.facts(), 1), Known::No, "it is not clean any more");
        assert_eq!(later.open(&a).meet_settled(&facts, 1), Known::ByAll, "what was not met stays known");
    }

    #[test]
    fn a_file_that_was_just_changed_is_not_remembered() {
        let later = Later::new();
        let patterns = [pattern("a")];
        let mut seen = Seen::open(&later.cache(), &patterns, false).unwrap();
        assert_eq!(seen.meet_settled(&later.facts(), 1), Known::No);
        seen.answer(1, true);
        assert!(seen.entries.is_empty());
        let old = SystemTime::now() - Duration::from_secs(1000);
        File::options().write(true).open(&later.file).unwrap().set_modified(old).unwrap();
        assert_eq!(seen.meet_settled(&later.facts(), 2), Known::No);
        seen.answer(2, true);
        assert!(seen.entries.is_empty(), "nor one that only looks old");
    }

    #[test]
    fn whatever_is_wrong_with_the_file_it_counts_as_empty() {
        let later = Later::new();
        let patterns = [pattern("a")];
        later.scan(&patterns, true);
        let whole = fs::read(later.cache()).unwrap();
        assert!(load(&later.cache()).is_some());
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(later.cache(), &bytes).unwrap();
            assert!(load(&later.cache()).is_none(), "byte {at}");
            fs::write(later.cache(), &whole[..at]).unwrap();
            assert!(load(&later.cache()).is_none(), "cut at {at}");
        }
        fs::write(later.cache(), &whole).unwrap();
        fs::set_permissions(later.cache(), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(load(&later.cache()).is_none(), "others may write to it");
        fs::remove_file(later.cache()).unwrap();
        assert_eq!(later.scan(&patterns, true), Known::No, "it is safe to delete");
        assert_eq!(later.scan(&patterns, true), Known::ByAll);
    }

    #[test]
    fn rules_that_ask_for_the_time_are_not_remembered_for() {
        let later = Later::new();
        for (text, is_remembered) in [
            ("import \"time\"\nrule a { condition: time.now() > 5 }", false),
            ("import\"time\" rule a { condition: time.now() > 5 }", false),
            ("import // a\n \"math\" rule a { condition: true }", true),
            ("rule a { strings: $a = \"time\" condition: $a }", true),
        ] {
            let pattern = Pattern::new("p", text.as_bytes().to_vec()).unwrap();
            assert_eq!(Seen::open(&later.cache(), &[pattern], false).is_some(), is_remembered, "{text}");
        }
    }
}
