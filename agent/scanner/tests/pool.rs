//! The pool and real worker processes: what a file or a rule does to a worker stays there.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up must fail")]

use std::{fs::File, io::Write as _, path::PathBuf, time::Duration};

use tm_patterns::Pattern;
use tm_protocol::{report::SkipReason, task::ScanLimits};
use tm_scanner::{
    check::{self, CheckError},
    item::{Item, ItemResult},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
};

const MARKER: &str = "rule marker { strings: $a = \"needle-47\" condition: $a }";
/// Hashes the whole file once for every byte of it: the engine does not look at its clock meanwhile.
const ENDLESS: &str = "import \"hash\" rule endless { strings: $m = \"wake-the-loop\" condition: $m and \
     for all i in (0..filesize) : ( hash.sha256(0, filesize) != \"x\" ) }";

fn program() -> WorkerProgram {
    WorkerProgram { path: PathBuf::from(env!("CARGO_BIN_EXE_tm-scan-worker")), args: vec![] }
}

fn pattern(text: &str) -> Pattern {
    Pattern::new("test.yar", text.as_bytes().to_vec()).unwrap()
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    // It stays positioned at its end: a worker reads from the start wherever the descriptor stands.
    file.write_all(content).unwrap();
    file
}

fn scan(rules: &str, limits: ScanLimits, files: Vec<File>, meanwhile: impl FnOnce()) -> Vec<ItemResult> {
    let (pool, results) =
        ScanPool::start(&program(), &[pattern(rules)], PoolOptions { threads: 2, limits, nice: 0 }).unwrap();
    let count = files.len();
    let mut all: Vec<ItemResult> = std::thread::scope(|scope| {
        scope.spawn(|| {
            for (id, file) in (0..).zip(files) {
                pool.submit(Item { id, file: file.into() });
            }
            pool.finish();
        });
        meanwhile();
        results.iter().collect()
    });
    all.sort_by_key(|result| result.id);
    let ids: Vec<u64> = all.iter().map(|result| result.id).collect();
    assert_eq!(ids, (0..count as u64).collect::<Vec<_>>(), "every item has exactly one result");
    all
}

fn skips(result: &ItemResult) -> Vec<SkipReason> {
    result.findings.skips.iter().map(|skip| skip.reason).collect()
}

fn workers() -> Vec<i32> {
    let me = std::process::id().to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(name, rest)| {
                name.contains("tm-scan-worker")
                    && rest.split(' ').nth(1) == Some(&me)
                    && !rest.starts_with('Z')
            })
        })
        .collect()
}

fn kill_workers() -> usize {
    let pids = workers();
    for pid in &pids {
        let pid = rustix::process::Pid::from_raw(*pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    pids.len()
}

#[test]
fn markers_are_found_in_small_and_mapped_files_and_nothing_else_is() {
    let mut large = vec![b'.'; 3 << 20];
    large.extend_from_slice(b"needle-47");
    let files = vec![file(b"hay"), file(b"hay needle-47"), file(&large), file(b"")];
    let results = scan(MARKER, ScanLimits::default(), files, || {});
    let rules: Vec<usize> = results.iter().map(|r| r.findings.matches.len()).collect();
    assert_eq!(rules, [0, 1, 1, 0]);
    assert_eq!(results[2].findings.sha256, Some(tm_protocol::ids::Sha256::of(&large)));
    assert!(results.iter().all(|r| r.findings.skips.is_empty()));
}

#[test]
fn a_rule_that_never_ends_costs_one_item() {
    let mut slow = b"wake-the-loop".to_vec();
    slow.resize(8 << 20, b'x');
    let limits = ScanLimits { file_ms: 1000, ..ScanLimits::default() };
    let mut files: Vec<File> = (0..100).map(|_| file(b"needle-47")).collect();
    files.insert(50, file(&slow));
    let results = scan(&format!("{ENDLESS}\n{MARKER}"), limits, files, || {});
    assert_eq!(skips(&results[50]), [SkipReason::Timeout]);
    for (index, result) in results.iter().enumerate().filter(|(index, _)| *index != 50) {
        assert_eq!((result.findings.matches.len(), skips(result)), (1, vec![]), "{index}");
    }
}

#[test]
fn a_worker_that_is_killed_is_replaced_and_no_item_is_lost() {
    let mut busy = b"needle-47 ".repeat(20_000);
    busy.resize(900_000, b'.');
    let files = (0..400).map(|_| file(&busy)).collect();
    let mut killed = 0;
    let results = scan(MARKER, ScanLimits::default(), files, || {
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(150));
            killed += kill_workers();
        }
    });
    assert!(killed > 0, "the test did kill a worker");
    for result in &results {
        let gone = skips(result) == [SkipReason::WorkerDied];
        assert!(result.findings.matches.len() == 1 || gone, "{result:?}");
    }
    assert!(results.iter().filter(|r| r.findings.matches.len() == 1).count() >= 396);
}

#[test]
fn a_file_that_is_cut_while_it_is_mapped_costs_at_most_itself() {
    let cut: Vec<File> = (0..4).map(|_| file(&vec![b'.'; 64 << 20])).collect();
    let handles: Vec<File> = cut.iter().map(|f| f.try_clone().unwrap()).collect();
    let mut files = cut;
    files.extend((0..20).map(|_| file(b"needle-47")));
    let results = scan(MARKER, ScanLimits::default(), files, || {
        for handle in handles {
            std::thread::sleep(Duration::from_millis(15));
            handle.set_len(0).unwrap();
        }
    });
    assert!(results[4..].iter().all(|r| r.findings.matches.len() == 1 && r.findings.skips.is_empty()));
}

#[test]
fn wrong_rules_are_refused_with_their_place_and_good_ones_counted() {
    assert_eq!(check::check(&program(), &pattern(MARKER)).unwrap().rules, 1);
    let Err(CheckError::Refused(problems)) = check::check(&program(), &pattern("rule a {\n condition: $b }"))
    else {
        panic!("a rule with an unknown string compiles");
    };
    assert_eq!((problems[0].line, problems[0].column), (2, 13));
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    let refused =
        ScanPool::start(&program(), &[pattern(MARKER), pattern("include \"/etc/passwd\"")], options);
    assert!(matches!(refused, Err(StartError::Refused { .. })));
}

#[test]
fn a_worker_that_never_starts_is_an_error_and_not_a_wait() {
    let program = WorkerProgram { path: PathBuf::from("/bin/false"), args: vec![] };
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    assert!(ScanPool::start(&program, &[pattern(MARKER)], options).is_err());
}

#[test]
fn a_cancelled_pool_ends_at_once() {
    let mut slow = b"wake-the-loop".to_vec();
    slow.resize(8 << 20, b'x');
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    let (pool, results) = ScanPool::start(&program(), &[pattern(ENDLESS)], options).unwrap();
    pool.submit(Item { id: 0, file: file(&slow).into() });
    std::thread::sleep(Duration::from_millis(200));
    let begun = std::time::Instant::now();
    pool.cancel();
    assert_eq!(results.iter().count(), 0);
    assert!(begun.elapsed() < Duration::from_secs(2));
}
