//! The sandbox of the worker, tried: every attempt is shown to work without it.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up must fail")]

use std::{
    fs::File,
    io::Write as _,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::PathBuf,
    process::{Command, Output},
};

use tm_patterns::Pattern;
use tm_protocol::{report::SkipReason, task::ScanLimits};
use tm_scanner::{
    item::{Item, ItemResult},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
    sandbox::{Part, PartState, State},
};

const MARKER: &str = "rule marker { strings: $a = \"needle-47\" condition: $a }";

/// Runs one attempt; `how` is `free`, `landlock` or `sealed`.
fn escape(how: &str, what: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    // Whoever the worker becomes could write here: a refusal is the sandbox's.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tm-scan-escape"));
    command.args([how, what]).env("TMPDIR", folder.path()).output().unwrap()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[track_caller]
fn works(how: &str, what: &str) {
    let output = escape(how, what);
    assert!(output.status.success(), "{how} {what}: {output:?}");
}

#[track_caller]
fn is_refused(how: &str, what: &str) {
    works("free", what);
    let output = escape(how, what);
    assert_eq!(output.status.code(), Some(1), "{how} {what}: {output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("PermissionDenied"), "{how} {what}: {output:?}");
}

#[track_caller]
fn is_killed(what: &str) {
    works("free", what);
    let output = escape("sealed", what);
    // SIGSYS: 31 on the processors that this program is built for.
    assert_eq!(output.status.signal(), Some(31), "{what}: {output:?}");
}

#[test]
fn what_scanning_needs_works() {
    for how in ["free", "landlock", "sealed"] {
        works(how, "nothing");
        works(how, "work");
        // A panic ends a worker by this: it must stay one.
        assert_eq!(escape(how, "abort").status.signal(), Some(6), "{how}");
    }
}

#[test]
fn no_file_is_opened_even_without_seccomp() {
    for what in ["read", "write", "list"] {
        is_refused("landlock", what);
        is_refused("sealed", what);
    }
    is_refused("landlock", "tcp");
}

#[test]
fn every_other_call_ends_the_process() {
    for what in [
        "openat2",
        "remove",
        "tcp",
        "udp",
        "unix",
        "exec",
        "spawn",
        "thread",
        "executable",
        "map-executable",
        "kill",
        "ceiling",
    ] {
        is_killed(what);
    }
    if is_root() {
        is_killed("new-user");
        let output = escape("landlock", "new-user");
        assert_eq!(output.status.code(), Some(1), "nobody does not become root again: {output:?}");
    }
}

#[test]
fn memory_has_a_ceiling() {
    works("free", "memory");
    for how in ["landlock", "sealed"] {
        let output = escape(how, "memory");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
}

fn program(tag: &str) -> WorkerProgram {
    WorkerProgram { path: PathBuf::from(env!("CARGO_BIN_EXE_tm-scan-worker")), args: vec![tag.to_owned()] }
}

fn pattern(name: &str, text: &str) -> Pattern {
    Pattern::new(name, text.as_bytes().to_vec()).unwrap()
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn options(limits: ScanLimits) -> PoolOptions {
    PoolOptions { threads: 2, limits, nice: 3 }
}

/// Results of all items, in order, and the pool, at its end.
fn scan(
    program: &WorkerProgram,
    patterns: &[Pattern],
    limits: ScanLimits,
    files: Vec<File>,
) -> (Vec<ItemResult>, ScanPool) {
    let (pool, results) = ScanPool::start(program, patterns, options(limits)).unwrap();
    let mut all: Vec<ItemResult> = std::thread::scope(|scope| {
        scope.spawn(|| {
            for (id, file) in (0..).zip(files) {
                pool.submit(Item { id, file: file.into() });
            }
            pool.finish();
        });
        results.iter().collect()
    });
    all.sort_by_key(|result| result.id);
    (all, pool)
}

fn is_clean(result: &ItemResult) -> bool {
    result.findings.matches.is_empty() && result.findings.skips.is_empty()
}

fn has_died(result: &ItemResult) -> bool {
    result.findings.skips.iter().map(|skip| skip.reason).eq([SkipReason::WorkerDied])
}

/// The number of this process's worker that was started with `tag`.
fn worker(tag: &str) -> i32 {
    let me = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Ok(pid) = entry.unwrap().file_name().to_str().unwrap_or_default().parse::<i32>() else {
            continue;
        };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if field(&status, "PPid") == me && arguments.split(|b| *b == 0).any(|word| word == tag.as_bytes()) {
            found.push(pid);
        }
    }
    assert_eq!(found.len(), 1, "one worker has the tag");
    found[0]
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

fn missing(parts: &[PartState]) -> Vec<Part> {
    parts.iter().filter(|part| part.missing().is_some()).map(|part| part.part).collect()
}

#[test]
fn a_live_worker_has_no_rights_in_any_thread() {
    let tag = "no-rights";
    let (pool, _results) =
        ScanPool::start(&program(tag), &[pattern("m", MARKER)], options(ScanLimits::default())).unwrap();
    assert_eq!(missing(pool.sandbox()), [], "{:?}", pool.sandbox());
    assert_eq!(pool.sandbox().len(), 8);
    let pid = worker(tag);
    let threads: Vec<_> =
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(threads.len(), 3);
    for thread in threads {
        let status = std::fs::read_to_string(thread.join("status")).unwrap();
        if is_root() {
            assert_eq!(field(&status, "Uid"), "65534 65534 65534 65534");
            assert_eq!(field(&status, "Gid"), "65534 65534 65534 65534");
            assert_eq!(field(&status, "Groups"), "");
            assert_eq!(field(&status, "CapBnd"), "0000000000000000");
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2");
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_ascii_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(limit("Max core file size"), "0 0");
    assert_eq!(limit("Max processes"), "0 0");
    assert_eq!(limit("Max open files"), "448 448");
    assert_eq!(limit("Max file size"), "1073741824 1073741824");
    assert!(!limit("Max data size").contains("unlimited"));
    assert!(!limit("Max address space").contains("unlimited"));
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let niceness = |stat: &str| stat.rsplit_once(") ").unwrap().1.split(' ').nth(16).unwrap().parse::<i32>();
    let own = niceness(&std::fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
    assert_eq!(niceness(&stat).unwrap(), (own + 3).min(19));
    assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "900");
}

#[test]
fn a_worker_of_somebody_who_is_not_root_works() {
    if !is_root() {
        // Then it is this user's.
        somebody(env!("CARGO_BIN_EXE_tm-scan-worker").into());
        return;
    }
    // The program is where this user can reach it.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("worker");
    std::fs::copy(env!("CARGO_BIN_EXE_tm-scan-worker"), &program).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let me = std::env::current_exe().unwrap();
    let test = folder.path().join("test");
    std::fs::copy(me, &test).unwrap();
    let output = Command::new(&test)
        .args(["--exact", "--ignored", "as_somebody", "--nocapture"])
        .env("TM_TEST_WORKER", &program)
        .uid(1234)
        .gid(1234)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
}

#[test]
#[ignore = "run by a_worker_of_somebody_who_is_not_root_works, as another user"]
fn as_somebody() {
    somebody(std::env::var_os("TM_TEST_WORKER").unwrap().into());
}

/// A worker of the user that this test runs as, who is not root.
fn somebody(path: PathBuf) {
    let program = WorkerProgram { path, args: vec![] };
    let patterns = [pattern("m", MARKER)];
    let (results, pool) = scan(&program, &patterns, ScanLimits::default(), vec![file(b"a needle-47")]);
    assert_eq!(results[0].findings.matches.len(), 1);
    assert_eq!(missing(pool.sandbox()), []);
    let identity = pool.sandbox().iter().find(|part| part.part == Part::Identity).unwrap();
    let me = rustix::process::getuid().as_raw();
    assert_ne!(me, 0);
    assert_eq!(identity.state, State::NotNeeded(format!("not root: runs as user {me}")));
}

/// A worker whose memory ends earlier: what it sets itself is never above what it was started with.
fn small(tag: &str, mib: u64) -> WorkerProgram {
    let script = format!("ulimit -d {} && exec \"$0\" \"$@\"", mib << 10);
    WorkerProgram {
        path: PathBuf::from("/bin/sh"),
        args: ["-c", &script, env!("CARGO_BIN_EXE_tm-scan-worker"), tag].map(str::to_owned).into(),
    }
}

/// 100 MiB of zeros as zstd (RFC 8878): a window of 128 MiB, and blocks of one byte repeated. The decoder keeps the
/// window, and has it twice whenever it grows.
fn hungry() -> Vec<u8> {
    const BLOCKS: usize = 800;
    let mut file = b"\x28\xb5\x2f\xfd\x00\x88".to_vec();
    for block in 1..=BLOCKS {
        let header = 128 << 10 << 3 | 1 << 1 | u32::from(block == BLOCKS);
        file.extend(&header.to_le_bytes()[..3]);
        file.push(0);
    }
    file
}

#[test]
fn more_memory_than_allowed_costs_one_item() {
    let limits = ScanLimits { ratio: u32::MAX, ..ScanLimits::default() };
    let big = hungry();
    let files = || vec![file(b"nothing"), file(&big), file(b"a needle-47"), file(b"nothing either")];
    let patterns = [pattern("m", MARKER)];
    let (control, _) = scan(&program("roomy"), &patterns, limits, files());
    assert!(is_clean(&control[1]), "{:?}", control[1]);
    let (results, pool) = scan(&small("small", 80), &patterns, limits, files());
    assert_eq!(results.len(), 4);
    assert!(has_died(&results[1]), "{:?}", results[1]);
    assert!(is_clean(&results[0]) && is_clean(&results[3]), "{results:?}");
    assert_eq!(results[2].findings.matches.len(), 1);
    let ceilings = pool.sandbox().iter().find(|part| part.part == Part::Ceilings).unwrap();
    assert_eq!(ceilings.state, State::InForce("80 MiB of memory".to_owned()));
}

#[test]
fn files_that_end_workers_do_not_keep_the_others_from_being_looked_at() {
    let limits = ScanLimits { ratio: u32::MAX, ..ScanLimits::default() };
    let big = hungry();
    let files = (0..9).map(|n| if n < 5 { file(&big) } else { file(b"a needle-47") }).collect();
    let patterns = [pattern("other", "rule other { condition: false }"), pattern("m", MARKER)];
    let (results, pool) = scan(&small("many", 80), &patterns, limits, files);
    assert_eq!(results.len(), 9);
    assert!(results[..5].iter().all(has_died), "{results:?}");
    assert!(results[5..].iter().all(|result| result.findings.matches.len() == 1), "{results:?}");
    assert_eq!(pool.lethal_pattern(), None, "no pattern is at fault");
}

/// A rule that holds much more memory than its text: thousands of strings, each found a thousand times.
fn greedy() -> String {
    let strings: String = (0..2000).map(|n| format!("$s{n} = \"greed\"\n")).collect();
    let counts = (0..2000).step_by(100).map(|n| format!("#s{n} > 0")).collect::<Vec<_>>().join(" or ");
    format!("rule greedy {{ strings: {strings} condition: ({counts}) and all of them and #s1 == 1 }}")
}

#[test]
fn a_pattern_that_ends_workers_on_one_file_after_another_is_named_and_ends_the_scan() {
    let hungry = || (0..6).map(|_| file(&b"greed".repeat(1100)));
    let files = || [file(b"a needle-47")].into_iter().chain(hungry()).collect::<Vec<_>>();
    let patterns = [
        pattern("m", MARKER),
        pattern("greedy\n.yar", &greedy()),
        pattern("o", "rule o { condition: false }"),
    ];
    let limits = ScanLimits::default();
    let (control, pool) = scan(&program("greed"), &patterns, limits, files());
    assert!(control[1..].iter().all(is_clean), "{:?}", control[1]);
    assert_eq!(pool.lethal_pattern(), None);
    let (results, pool) = scan(&small("greed-small", 32), &patterns, limits, files());
    assert_eq!(results.len(), 7, "every item has a result");
    assert!(results[1..].iter().all(has_died), "{results:?}");
    assert_eq!(pool.lethal_pattern(), Some("greedy\n.yar"));
}

#[test]
fn a_pattern_that_ends_the_worker_that_loads_it_is_refused_by_name() {
    let strings: String = (0..9000).map(|n| format!("$s{n} = \"{n:01000}\"\n")).collect();
    let large = format!("rule large {{ strings: {strings} condition: any of them }}");
    let patterns = [pattern("m", MARKER), pattern("large", &large)];
    let limits = ScanLimits::default();
    ScanPool::start(&program("large"), &patterns, options(limits)).unwrap();
    let error = ScanPool::start(&small("large-small", 16), &patterns, options(limits)).unwrap_err();
    assert!(matches!(&error, StartError::Refused { name, .. } if name == "large"), "{error:?}");
}

#[test]
fn a_worker_that_is_killed_once_while_it_loads_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("was-here");
    // The first one ends before it has said anything; `mkdir` works once.
    let script = format!("mkdir {} && kill -9 $$; exec \"$0\"", mark.display());
    let program = WorkerProgram {
        path: PathBuf::from("/bin/sh"),
        args: ["-c", &script, env!("CARGO_BIN_EXE_tm-scan-worker")].map(str::to_owned).into(),
    };
    let (results, _) =
        scan(&program, &[pattern("m", MARKER)], ScanLimits::default(), vec![file(b"needle-47")]);
    assert!(mark.exists());
    assert_eq!(results[0].findings.matches.len(), 1);
}
