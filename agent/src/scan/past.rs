//! What past scans of this endpoint have cost, and what the next one is likely to.
//!
//! A scan costs a fixed part (patterns are loaded), something for each file and something for each byte. How much for
//! a file and for a byte is worked out from the past scans with the same patterns, or, if there are none, with any,
//! by least squares; the fewer and the more alike they are, the more the relation between the two is taken from what
//! was measured on one machine ([`FILE_S`], [`MIB_S`]) and only the scale from them.
//!
//! On disk: one JSON object, at most [`MOST`] runs and [`MOST_QUOTES`] quotes, oldest first, written whole. Deleting
//! it costs the estimates and nothing else.
//!
//! **Invariant:** whatever is wrong with the file, it counts as empty.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tm_protocol::{ids::Sha256, quote::Estimate};

use crate::paths::replace;

/// Most runs remembered.
const MOST: usize = 64;
/// Most quotes remembered.
const MOST_QUOTES: usize = 16;
/// Longest file that is read, in bytes.
const LONGEST: u64 = 256 << 10;
const FORM: u32 = 1;

/// CPU time of a file, whatever is in it, in seconds.
const FILE_S: f64 = 20e-6;
/// CPU time of a mebibyte, in seconds.
const MIB_S: f64 = 4e-3;
/// CPU time of a file that is known clean, in seconds.
const KNOWN_S: f64 = 8e-6;
/// How much the measured relation between files and bytes weighs beside one run.
const PRIOR_WEIGHT: f64 = 0.01;
const MIB: f64 = 1_048_576.0;

/// Held while a file is read and written anew: an agent may end several scans at once.
static WRITING: Mutex<()> = Mutex::new(());

/// One scan of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Run {
    /// Names the set of its patterns ([`set_of`]).
    pub(super) patterns: Sha256,
    /// Files that it read.
    pub(super) files: u64,
    /// Bytes of those.
    pub(super) bytes: u64,
    /// Files that were known clean.
    pub(super) known: u64,
    /// CPU time until the patterns were loaded, in milliseconds.
    pub(super) load_ms: u64,
    /// CPU time, in milliseconds.
    pub(super) cpu_ms: u64,
    /// Wall time, in milliseconds.
    pub(super) elapsed_ms: u64,
    /// The share of a core it was held to, in percent.
    pub(super) percent: Option<u8>,
}

/// What a quote said of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quoted {
    /// Names the order.
    pub(super) order: Sha256,
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) cpu_ms: Option<u64>,
    pub(super) elapsed_ms: Option<u64>,
}

/// What there is to look at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    pub(super) patterns: Sha256,
    /// Files to read.
    pub(super) files: u64,
    /// Bytes of those.
    pub(super) bytes: u64,
    /// Files that are known clean.
    pub(super) known: u64,
    pub(super) percent: Option<u8>,
}

/// The past, as one file holds it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Past {
    form: u32,
    runs: Vec<Run>,
    quotes: Vec<Quoted>,
}

impl Past {
    /// Reads it; empty if it is not there, not ours alone, or not whole.
    pub(super) fn read(path: &Path) -> Self {
        load(path).unwrap_or_default()
    }

    /// Adds a run.
    ///
    /// # Errors
    /// If the disk refuses; the old file stays.
    pub(super) fn add_run(path: &Path, run: Run) -> io::Result<()> {
        let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut past = Self::read(path);
        past.runs.push(run);
        past.write(path)
    }

    /// Adds a quote; an older one of the same order goes.
    ///
    /// # Errors
    /// If the disk refuses; the old file stays.
    pub(super) fn add_quote(path: &Path, quoted: Quoted) -> io::Result<()> {
        let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut past = Self::read(path);
        past.quotes.retain(|old| old.order != quoted.order);
        past.quotes.push(quoted);
        past.write(path)
    }

    /// What was last quoted for an order.
    pub(super) fn quoted(&self, order: Sha256) -> Option<Quoted> {
        self.quotes.iter().rfind(|quoted| quoted.order == order).copied()
    }

    /// What `work` is likely to cost; `None` without a past.
    pub(super) fn estimate(&self, work: &Work) -> Option<Estimate> {
        let same: Vec<&Run> = self.runs.iter().filter(|run| run.patterns == work.patterns).collect();
        let same_patterns = !same.is_empty();
        let runs = if same_patterns { same } else { self.runs.iter().collect() };
        let model = Model::of(&runs)?;
        let cpu_s = model.cpu_s(work);
        let cores = cores_used(&runs, work.percent);
        Some(Estimate {
            cpu_ms: millis(cpu_s),
            elapsed_ms: millis(cpu_s / cores),
            runs: u32::try_from(runs.len()).unwrap_or(u32::MAX),
            same_patterns,
        })
    }

    fn write(mut self, path: &Path) -> io::Result<()> {
        self.form = FORM;
        self.runs.drain(..self.runs.len().saturating_sub(MOST));
        self.quotes.drain(..self.quotes.len().saturating_sub(MOST_QUOTES));
        replace(path, &serde_json::to_vec(&self).map_err(io::Error::other)?)
    }
}

/// Names a set of patterns.
pub(super) fn set_of(patterns: impl Iterator<Item = Sha256>) -> Sha256 {
    let all: BTreeSet<Sha256> = patterns.collect();
    Sha256::of(&all.iter().flat_map(|sha256| *sha256.as_bytes()).collect::<Vec<u8>>())
}

/// Where a scan whose cache is at `cache` keeps its past.
pub(super) fn beside(cache: &Path) -> PathBuf {
    let mut name = cache.as_os_str().to_owned();
    name.push("-costs");
    name.into()
}

/// What a scan costs, in seconds of CPU.
#[derive(Debug, Clone, Copy)]
struct Model {
    load: f64,
    file: f64,
    mib: f64,
}

impl Model {
    /// `None` without runs.
    fn of(runs: &[&Run]) -> Option<Self> {
        let mut loads: Vec<f64> = runs.iter().map(|run| seconds(run.load_ms)).collect();
        let load = median(&mut loads)?;
        // Each run as what it would have cost by the measured constants, and what it did cost, known files apart.
        let rows: Vec<(f64, f64, f64)> = runs
            .iter()
            .map(|run| {
                let rest = seconds(run.cpu_ms) - seconds(run.load_ms) - number(run.known) * KNOWN_S;
                // A hundredth of a second is the least that is told apart.
                (number(run.files) * FILE_S, number(run.bytes) / MIB * MIB_S, rest.max(0.01))
            })
            .filter(|(files, mib, _)| files + mib > 0.0)
            .collect();
        let mut scales: Vec<f64> = rows.iter().map(|(files, mib, cost)| cost / (files + mib)).collect();
        let Some(scale) = median(&mut scales) else { return Some(Self { load, file: FILE_S, mib: MIB_S }) };
        // Least squares of relative errors, drawn towards the same scale for both.
        let [mut ff, mut fm, mut mm, mut f1, mut m1] = [0.0; 5];
        for (files, mib, cost) in &rows {
            let (files, mib) = (files * scale / cost, mib * scale / cost);
            ff += files * files;
            fm += files * mib;
            mm += mib * mib;
            f1 += files;
            m1 += mib;
        }
        let (ff, mm, f1, m1) = (ff + PRIOR_WEIGHT, mm + PRIOR_WEIGHT, f1 + PRIOR_WEIGHT, m1 + PRIOR_WEIGHT);
        // It is never 0: the weight makes it grow by its square at least.
        let determinant = ff * mm - fm * fm;
        let (file, mib) = ((f1 * mm - m1 * fm) / determinant, (m1 * ff - f1 * fm) / determinant);
        // Nothing gives time back. Where one would, the other explains it all.
        let (file, mib) = if file < 0.0 {
            (0.0, m1 / mm)
        } else if mib < 0.0 {
            (f1 / ff, 0.0)
        } else {
            (file, mib)
        };
        Some(Self { load, file: file * scale * FILE_S, mib: mib * scale * MIB_S })
    }

    fn cpu_s(&self, work: &Work) -> f64 {
        let read = number(work.files) * self.file + number(work.bytes) / MIB * self.mib;
        // Where there is nothing to read no worker is started.
        let load = if work.files > 0 { self.load } else { 0.0 };
        load + read + number(work.known) * KNOWN_S
    }
}

/// How many cores a scan that is held to `percent` keeps busy on average.
fn cores_used(runs: &[&Run], percent: Option<u8>) -> f64 {
    let alike = runs.iter().filter(|run| run.percent == percent && run.elapsed_ms > 0);
    let mut shares: Vec<f64> =
        alike.map(|run| seconds(run.cpu_ms) / seconds(run.elapsed_ms)).filter(|share| *share > 0.0).collect();
    let most = percent.map_or(f64::MAX, |percent| f64::from(percent) / 100.0);
    median(&mut shares).unwrap_or(1.0).min(most).max(0.001)
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[expect(clippy::cast_precision_loss, reason = "an estimate needs no more than 52 bits")]
fn number(count: u64) -> f64 {
    count as f64
}

fn seconds(ms: u64) -> f64 {
    number(ms) / 1000.0
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is neither negative nor that large"
)]
fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0).ceil().clamp(0.0, 1e15) as u64
}

fn load(path: &Path) -> Option<Past> {
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
    let past: Past = serde_json::from_slice(&bytes).ok()?;
    (past.form == FORM && past.runs.len() <= MOST && past.quotes.len() <= MOST_QUOTES).then_some(past)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn run(patterns: &[u8], files: u64, mib: u64, cpu_ms: u64) -> Run {
        Run {
            patterns: Sha256::of(patterns),
            files,
            bytes: mib << 20,
            known: 0,
            load_ms: 100,
            cpu_ms,
            elapsed_ms: cpu_ms / 2,
            percent: None,
        }
    }

    fn work(patterns: &[u8], files: u64, mib: u64) -> Work {
        Work { patterns: Sha256::of(patterns), files, bytes: mib << 20, known: 0, percent: None }
    }

    fn past(runs: &[Run]) -> Past {
        Past { form: FORM, runs: runs.to_vec(), quotes: vec![] }
    }

    #[track_caller]
    fn near(estimate: Estimate, cpu_ms: u64, percent: u64) {
        let off = estimate.cpu_ms.abs_diff(cpu_ms);
        assert!(off * 100 <= cpu_ms * percent, "{estimate:?} is not {cpu_ms} ms within {percent} %");
    }

    #[test]
    fn without_a_past_nothing_is_estimated() {
        assert_eq!(past(&[]).estimate(&work(b"a", 1000, 1000)), None);
    }

    #[test]
    fn the_same_work_costs_the_same_again() {
        let one = past(&[run(b"a", 1000, 500, 5100)]);
        near(one.estimate(&work(b"a", 1000, 500)).unwrap(), 5100, 1);
        let twice = one.estimate(&work(b"a", 2000, 1000)).unwrap();
        near(twice, 10_100, 1);
        assert_eq!((twice.runs, twice.same_patterns), (1, true));
        assert_eq!(twice.elapsed_ms, twice.cpu_ms.div_ceil(2), "it kept two cores busy");
        near(one.estimate(&work(b"a", 0, 0)).unwrap(), 0, 0);
    }

    #[test]
    fn what_a_file_and_what_a_byte_costs_is_told_apart() {
        // 1 ms a file and 20 ms a mebibyte: both far from what was measured elsewhere.
        let cost = |files: u64, mib: u64| 100 + files + mib * 20;
        let shapes = [(10_000, 10), (100, 1000), (5000, 200), (50, 300)];
        let runs: Vec<Run> =
            shapes.iter().map(|(files, mib)| run(b"a", *files, *mib, cost(*files, *mib))).collect();
        let past = past(&runs);
        for (files, mib) in [(100_000, 10), (10, 20_000), (20_000, 2000)] {
            near(past.estimate(&work(b"a", files, mib)).unwrap(), cost(files, mib), 30);
        }
    }

    #[test]
    fn scans_with_the_same_patterns_tell_more_than_others() {
        let past =
            past(&[run(b"a", 1000, 100, 1100), run(b"b", 1000, 100, 9100), run(b"b", 1000, 100, 9100)]);
        near(past.estimate(&work(b"a", 1000, 100)).unwrap(), 1100, 1);
        let other = past.estimate(&work(b"c", 1000, 100)).unwrap();
        assert!(!other.same_patterns && other.runs == 3 && other.cpu_ms > 1100, "{other:?}");
    }

    #[test]
    fn known_files_cost_next_to_nothing_and_a_share_takes_its_time() {
        let past = past(&[run(b"a", 1000, 100, 2100)]);
        let known = Work { known: 1000, ..work(b"a", 0, 0) };
        assert_eq!(past.estimate(&known).unwrap().cpu_ms, 8);
        let held = Work { percent: Some(10), ..work(b"a", 1000, 100) };
        let estimate = past.estimate(&held).unwrap();
        assert!(estimate.elapsed_ms + 10 >= estimate.cpu_ms * 10, "{estimate:?}");
    }

    #[test]
    fn a_run_that_read_nothing_does_no_harm() {
        let mut nothing = run(b"a", 0, 0, 0);
        nothing.load_ms = 0;
        let estimate = past(&[nothing]).estimate(&work(b"a", 1000, 100)).unwrap();
        assert!(estimate.cpu_ms > 0 && estimate.cpu_ms < 10_000, "{estimate:?}");
        let huge = past(&[run(b"a", u64::MAX, 1 << 40, u64::MAX)]);
        assert!(huge.estimate(&work(b"a", u64::MAX, 1)).is_some());
    }

    #[test]
    fn the_past_is_kept_bounded_and_a_damaged_one_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = beside(&folder.path().join("seen"));
        assert!(path.ends_with("seen-costs"));
        for n in 0..100 {
            Past::add_run(&path, run(b"a", n, 1, 1)).unwrap();
            let order = Sha256::of(&[u8::try_from(n % 20).unwrap()]);
            Past::add_quote(&path, Quoted { order, files: n, bytes: 0, cpu_ms: None, elapsed_ms: None })
                .unwrap();
        }
        let past = Past::read(&path);
        assert_eq!((past.runs.len(), past.quotes.len()), (MOST, MOST_QUOTES));
        assert_eq!((past.runs[0].files, past.runs[63].files), (36, 99));
        assert_eq!(past.quoted(Sha256::of(&[19])).unwrap().files, 99);
        assert_eq!(past.quoted(Sha256::of(&[0])), None, "older ones made room");
        let whole = fs::read(&path).unwrap();
        for bytes in [&b""[..], b"{}", &whole[..whole.len() - 1], b"[1", &[b' '; 300 << 10]] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(Past::read(&path), Past::default());
        }
        fs::write(&path, &whole).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        assert_eq!(Past::read(&path), Past::default(), "others may write to it");
    }

    #[test]
    fn a_set_of_patterns_has_one_name() {
        let (a, b) = (Sha256::of(b"a"), Sha256::of(b"b"));
        assert_eq!(set_of([a, b].into_iter()), set_of([b, a, b].into_iter()));
        assert_ne!(set_of([a].into_iter()), set_of([b].into_iter()));
    }
}
