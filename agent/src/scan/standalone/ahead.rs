//! How much there is to look at, counted ahead of the scan while a person watches it.
//!
//! It begins late, so that a short scan pays nothing for it, and walks the same way as the scan.
//!
//! **Invariant:** a total is told only when everything was counted.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tm_protocol::report::PathBytes;

use crate::scan::{
    millis, thread_cpu,
    walk::{self, Found},
};

/// How long a scan takes before it is worth counting.
const DELAY: Duration = Duration::from_secs(1);
/// How often it is noticed that nobody wants to know any more.
const NOTICE: Duration = Duration::from_millis(50);
/// Files of several names that are told apart; beyond it each name counts.
const MOST_LINKED: usize = 1 << 20;

/// A total.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Total {
    /// Files that the scan will look at.
    pub(super) files: u64,
    /// Their bytes.
    pub(super) bytes: u64,
}

/// A count under way. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Ahead(Arc<Count>);

#[derive(Debug, Default)]
struct Count {
    files: AtomicU64,
    bytes: AtomicU64,
    is_whole: AtomicBool,
    cpu_ms: AtomicU64,
    stopped: AtomicBool,
}

impl Ahead {
    /// Counts what a scan of `paths` looks at, in a thread of its own; files above `most` bytes are not.
    pub(super) fn start(paths: Vec<PathBytes>, options: walk::Options, most: u64) -> Self {
        let count = Arc::new(Count::default());
        let counting = Arc::clone(&count);
        // Without a thread there is no total, and no harm.
        let _ = thread::Builder::new()
            .name("scan-ahead".to_owned())
            .spawn(move || counting.count(&paths, options, most, DELAY));
        Self(count)
    }

    /// The total, once it is known.
    pub(super) fn total(&self) -> Option<Total> {
        let load = |number: &AtomicU64| number.load(Ordering::Acquire);
        let is_whole = self.0.is_whole.load(Ordering::Acquire);
        is_whole.then(|| Total { files: load(&self.0.files), bytes: load(&self.0.bytes) })
    }

    /// CPU time of the count so far, in milliseconds, once it has ended; the scan's bill has it too.
    pub(super) fn cpu_ms(&self) -> u64 {
        self.0.cpu_ms.load(Ordering::Acquire)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Release);
    }
}

impl Count {
    fn count(&self, paths: &[PathBytes], options: walk::Options, most: u64, delay: Duration) {
        let stopped = || self.stopped.load(Ordering::Acquire);
        let started = Instant::now();
        while started.elapsed() < delay {
            if stopped() {
                return;
            }
            thread::sleep(NOTICE.min(delay));
        }
        let mut linked = HashSet::new();
        let mut cpu = Duration::ZERO;
        for path in paths {
            cpu += walk::walk(path, options, &stopped, &mut |found| match found {
                Found::File { facts, .. } => {
                    let is_known =
                        facts.links > 1 && linked.len() < MOST_LINKED && !linked.insert(facts.object());
                    let size = facts.stamp.parts().0;
                    if !is_known && size <= most {
                        self.files.fetch_add(1, Ordering::AcqRel);
                        self.bytes.fetch_add(size, Ordering::AcqRel);
                    }
                }
                Found::Skipped(_) => {}
            });
            self.cpu_ms.store(millis(cpu + thread_cpu()), Ordering::Release);
        }
        self.is_whole.store(!stopped(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::scan::standalone::bytes;

    const OPTIONS: walk::Options = walk::Options { all_local: false, patience: Duration::from_secs(60) };

    #[test]
    fn what_the_scan_looks_at_is_counted_once() {
        let folder = tempfile::tempdir().unwrap();
        for (name, size) in [("a", 10), ("b", 20), ("large", 1000)] {
            fs::write(folder.path().join(name), vec![0; size]).unwrap();
        }
        fs::hard_link(folder.path().join("a"), folder.path().join("c")).unwrap();
        std::os::unix::fs::symlink("a", folder.path().join("d")).unwrap();
        let paths = [bytes(folder.path())];
        let ahead = Ahead(Arc::default());
        ahead.0.count(&paths, OPTIONS, 100, Duration::ZERO);
        assert_eq!(ahead.total(), Some(Total { files: 2, bytes: 30 }));
    }

    #[test]
    fn a_count_that_was_stopped_tells_no_total() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), b"x").unwrap();
        let ahead = Ahead(Arc::default());
        ahead.0.stopped.store(true, Ordering::Release);
        ahead.0.count(&[bytes(folder.path())], OPTIONS, 100, Duration::ZERO);
        assert_eq!(ahead.total(), None);
    }
}
