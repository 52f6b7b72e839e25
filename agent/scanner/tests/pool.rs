//! The pool and real worker processes: what a file or a rule does to a worker stays there.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up must fail")]

use std::{
    fs::File,
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use tm_patterns::{Pattern, Problem};
use tm_protocol::{
    ids::Sha256,
    report::{PathBytes, SkipReason},
    task::ScanLimits,
};
use tm_scanner::{
    check::{self, CheckError},
    item::{Item, ItemResult, Match, Skip},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
};

const MARKER: &str = "rule marker { strings: $a = \"needle-47\" condition: $a }";
/// Hashes the whole file once for every byte of it: the engine does not look at its clock meanwhile.
const ENDLESS: &str = "import \"hash\" rule endless { strings: $m = \"wake-the-loop\" condition: $m and \
     for all i in (0..filesize) : ( hash.sha256(0, filesize) != \"x\" ) }";

fn program() -> WorkerProgram {
    tagged("untagged")
}

/// A worker takes no notice of its arguments; this one tells a test's own worker from those of the tests
/// that run beside it.
fn tagged(tag: &str) -> WorkerProgram {
    WorkerProgram { path: PathBuf::from(env!("CARGO_BIN_EXE_tm-scan-worker")), args: vec![tag.to_owned()] }
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

/// Something that the endless rule wakes up for.
fn endless_file() -> File {
    let mut content = b"wake-the-loop".to_vec();
    content.resize(8 << 20, b'x');
    file(&content)
}

fn scan(rules: &str, limits: ScanLimits, files: Vec<File>, meanwhile: impl FnOnce()) -> Vec<ItemResult> {
    scan_with(&program(), rules, limits, files, meanwhile)
}

fn scan_with(
    program: &WorkerProgram,
    rules: &str,
    limits: ScanLimits,
    files: Vec<File>,
    meanwhile: impl FnOnce(),
) -> Vec<ItemResult> {
    let (pool, results) =
        ScanPool::start(program, &[pattern(rules)], PoolOptions { threads: 2, limits, nice: 0 }).unwrap();
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

fn look(limits: ScanLimits, content: &[u8]) -> ItemResult {
    scan(MARKER, limits, vec![file(content)], || {}).remove(0)
}

fn skips(result: &ItemResult) -> Vec<SkipReason> {
    result.findings.skips.iter().map(|skip| skip.reason).collect()
}

fn names(names: &[&str]) -> Vec<PathBytes> {
    names.iter().map(|name| PathBytes(name.as_bytes().to_vec())).collect()
}

/// Workers of this process that were started with `tag`, and the CPU time that each has taken, in ticks.
fn workers(tag: &str) -> Vec<(i32, u64)> {
    let me = std::process::id().to_string();
    let mut workers = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Ok(pid) = entry.unwrap().file_name().to_str().unwrap_or_default().parse() else { continue };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let fields: Vec<&str> = rest.split(' ').collect();
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if fields[1] == me && arguments.split(|byte| *byte == 0).any(|argument| argument == tag.as_bytes()) {
            workers.push((pid, fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()));
        }
    }
    workers
}

/// Waits until a worker with this tag, other than `not`, has worked for `ticks`, and kills it.
fn kill_worker(tag: &str, not: Option<i32>, ticks: u64) -> i32 {
    let begun = Instant::now();
    loop {
        if let Some((pid, _)) =
            workers(tag).into_iter().find(|(pid, used)| Some(*pid) != not && *used >= ticks)
        {
            let victim = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();
            return pid;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "no worker `{tag}` at work");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn zipped(name: &str, content: &[u8]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
    writer.write_all(content).unwrap();
    writer.finish().unwrap().into_inner()
}

/// The same, said to be encrypted: bit 0 of the flags in both headers (APPNOTE 4.4.4).
fn encrypted(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = zipped(name, content);
    let central = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    bytes[6] |= 1;
    bytes[central + 8] |= 1;
    bytes
}

fn tarred(name: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

fn gzipped(name: &str, content: &[u8]) -> Vec<u8> {
    let mut encoder =
        flate2::GzBuilder::new().filename(name).write(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn markers_are_found_in_small_and_mapped_files_and_nothing_else_is() {
    let mut large = vec![b'.'; 3 << 20];
    large.extend_from_slice(b"needle-47");
    let files = vec![file(b"hay needle-46"), file(b"hay needle-47"), file(&large), file(b"")];
    let results = scan(MARKER, ScanLimits::default(), files, || {});
    let rules: Vec<usize> = results.iter().map(|r| r.findings.matches.len()).collect();
    assert_eq!(rules, [0, 1, 1, 0]);
    assert_eq!(results[0].findings.sha256, None);
    assert_eq!(results[2].findings.sha256, Some(Sha256::of(&large)));
    assert_eq!(results[2].findings.size, large.len() as u64);
    assert!(results.iter().all(|r| r.findings.skips.is_empty()));
}

#[test]
fn a_member_is_named_from_the_outermost_container_inward() {
    for (word, found) in [("needle-47", true), ("needle-46", false)] {
        let outer =
            gzipped("all.tar", &tarred("dir/inner.zip", &zipped("deep.txt", &word.repeat(50).into_bytes())));
        let result = look(ScanLimits::default(), &outer);
        let member = names(&["all.tar", "dir/inner.zip", "deep.txt"]);
        let expected = Match { member, pattern: pattern(MARKER).sha256(), rule: "marker".to_owned() };
        assert_eq!(result.findings.matches, if found { vec![expected] } else { vec![] }, "{word}");
        assert_eq!(result.findings.sha256, found.then(|| Sha256::of(&outer)), "{word}");
        assert_eq!((result.findings.skips, result.findings.size), (vec![], outer.len() as u64), "{word}");
    }
}

#[test]
fn what_was_not_looked_at_is_said_with_its_place() {
    let limits = ScanLimits::default();
    let nested = gzipped("all.tar", &tarred("inner.zip", &zipped("deep.txt", b"needle-47")));
    let mut cut = gzipped("cut.txt", &b"some text that is long enough to be cut ".repeat(100));
    cut.truncate(cut.len() - 12);
    for (what, limits, bytes, member, reason) in [
        (
            "encrypted",
            limits,
            encrypted("secret.txt", b"needle-47"),
            names(&["secret.txt"]),
            SkipReason::Encrypted,
        ),
        ("truncated", limits, cut, names(&["cut.txt"]), SkipReason::Malformed),
        ("bomb", limits, gzipped("bomb", &vec![0; 200 << 20]), names(&["bomb"]), SkipReason::Limit),
        (
            "depth",
            ScanLimits { depth: 2, ..limits },
            nested,
            names(&["all.tar", "inner.zip"]),
            SkipReason::Limit,
        ),
        ("kind", limits, b"Rar!\x1a\x07\x01\x00 needle".to_vec(), vec![], SkipReason::Unsupported),
        ("broken", limits, b"7z\xbc\xaf\x27\x1c needle".to_vec(), vec![], SkipReason::Malformed),
        ("size", ScanLimits { file_bytes: 5, ..limits }, b"needle-47".to_vec(), vec![], SkipReason::Limit),
    ] {
        let begun = Instant::now();
        let result = look(limits, &bytes);
        assert_eq!(result.findings.skips, [Skip { member, reason }], "{what}");
        assert_eq!(result.findings.matches, [], "{what}");
        assert_eq!(result.findings.size, bytes.len() as u64, "{what}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
    }
}

#[test]
fn a_rule_that_never_ends_costs_one_item() {
    let limits = ScanLimits { file_ms: 1000, ..ScanLimits::default() };
    let mut files: Vec<File> = (0..100).map(|_| file(b"needle-47")).collect();
    files.insert(50, endless_file());
    let results = scan(&format!("{ENDLESS}\n{MARKER}"), limits, files, || {});
    assert_eq!(skips(&results[50]), [SkipReason::Timeout]);
    for (index, result) in results.iter().enumerate().filter(|(index, _)| *index != 50) {
        assert_eq!((result.findings.matches.len(), skips(result)), (1, vec![]), "{index}");
    }
}

#[test]
fn a_worker_that_is_killed_is_replaced_and_every_result_is_right() {
    // Twice as long as a tick and more than the pool has in flight, so that the kill falls in the middle.
    let mut busy = b"needle-47 ".repeat(20_000);
    busy.resize(900_000, b'.');
    let files = (0..400).map(|_| file(&busy)).collect();
    let results = scan_with(&tagged("killed-once"), MARKER, ScanLimits::default(), files, || {
        kill_worker("killed-once", None, 5);
    });
    for result in &results {
        assert_eq!((result.findings.matches.len(), skips(result)), (1, vec![]), "{}", result.id);
    }
    assert_eq!(workers("killed-once"), [], "a worker is gone when the results end");
}

#[test]
fn a_worker_that_has_answered_everything_and_does_not_end_holds_nothing_up() {
    let program = tagged("does-not-end");
    let options = PoolOptions { threads: 2, limits: ScanLimits::default(), nice: 0 };
    let (pool, results) = ScanPool::start(&program, &[pattern(MARKER)], options).unwrap();
    pool.submit(Item { id: 1, file: file(b"needle-47").into() });
    assert_eq!(results.recv().unwrap().findings.matches.len(), 1, "the control: it works");
    let [(pid, _)] = workers("does-not-end")[..] else { panic!("one worker") };
    let worker = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(worker, rustix::process::Signal::STOP).unwrap();
    pool.finish();
    let ended = results.recv_timeout(Duration::from_secs(20));
    assert!(matches!(ended, Err(crossbeam_channel::RecvTimeoutError::Disconnected)), "{ended:?}");
    assert_eq!(workers("does-not-end"), [], "it is gone");
}

#[test]
fn an_item_that_ends_two_workers_is_blamed_and_no_other() {
    let mut files: Vec<File> = (0..20).map(|_| file(b"needle-47")).collect();
    files.insert(7, endless_file());
    let rules = format!("{ENDLESS}\n{MARKER}");
    let results = scan_with(&tagged("killed-twice"), &rules, ScanLimits::default(), files, || {
        let first = kill_worker("killed-twice", None, 30);
        kill_worker("killed-twice", Some(first), 30);
    });
    for result in &results {
        let expected = if result.id == 7 { (0, vec![SkipReason::WorkerDied]) } else { (1, vec![]) };
        assert_eq!((result.findings.matches.len(), skips(result)), expected, "{}", result.id);
    }
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
fn files_that_are_cut_again_and_again_have_changed_and_no_pattern_is_blamed() {
    let files: Vec<File> = (0..8).map(|_| file(&vec![b'.'; 32 << 20])).collect();
    let handles: Vec<File> = files.iter().map(|f| f.try_clone().unwrap()).collect();
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    let (pool, results) = ScanPool::start(&program(), &[pattern(MARKER)], options).unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let all: Vec<ItemResult> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(std::sync::atomic::Ordering::Acquire) {
                handles.iter().for_each(|handle| handle.set_len(32 << 20).unwrap());
                std::thread::sleep(Duration::from_millis(1));
                handles.iter().for_each(|handle| handle.set_len(4096).unwrap());
            }
        });
        for (id, file) in (0..).zip(files) {
            pool.submit(Item { id, file: file.into() });
        }
        pool.finish();
        let all = results.iter().collect();
        is_over.store(true, std::sync::atomic::Ordering::Release);
        all
    });
    assert_eq!(all.len(), 8, "every item has a result");
    assert_eq!(pool.lethal_pattern(), None);
    let reasons: Vec<SkipReason> = all.iter().flat_map(skips).collect();
    assert!(reasons.contains(&SkipReason::Changed), "the control: they end workers; {reasons:?}");
    assert!(!reasons.contains(&SkipReason::WorkerDied), "{reasons:?}");
}

#[test]
fn rules_that_can_hold_up_a_scan_are_refused_unless_forced() {
    let text =
        "import \"hash\"\nrule a {\n condition: for any i in (0..filesize) : (hash.md5(i, 9) == \"x\") }";
    let Err(CheckError::TooSlow(problems)) = check::check(&program(), &pattern(text)) else {
        panic!("it is accepted");
    };
    assert_eq!((problems.len(), problems[0].line), (1, 3), "{problems:?}");
    assert!(
        problems[0].message.starts_with("very slow rule `a`: `hash` is called in a loop"),
        "{problems:?}"
    );
    let forced = check::check_with(&program(), &pattern(text), true).unwrap();
    let same = |warning: &Problem| {
        let Problem { line, column, message } = &problems[0];
        let (what, _) = message.split_once(" (").expect("the cost stands in parentheses");
        (warning.line, warning.column) == (*line, *column) && warning.message.starts_with(what)
    };
    assert!(forced.warnings.iter().any(same), "{:?}", forced.warnings);
    assert!(problems[0].message.contains(" ms per MB"), "{problems:?}");
    // A slow rule is only remarked on.
    let slow = check::check(&program(), &pattern("rule a { strings: $a = \"ab\" condition: $a }")).unwrap();
    assert_eq!(slow.warnings.iter().filter(|w| w.message.starts_with("slow rule `a`: ")).count(), 1);
}

#[test]
fn wrong_rules_are_refused_with_their_place_and_good_ones_counted() {
    assert_eq!(check::check(&program(), &pattern(MARKER)).unwrap().rules, 1);
    for (text, line, column, part) in [
        ("rule a {\n condition: $b }", 2, 13, "$b"),
        ("rule a {\n  condition:\n    true or\n}\n", 4, 1, ""),
        ("\n  include \"/etc/passwd\"", 2, 3, "include"),
        ("import \"macho\"\nrule a { condition: true }", 1, 1, "macho"),
        ("import \"nonesuch\"\nrule a { condition: true }", 1, 1, "nonesuch"),
    ] {
        let Err(CheckError::Refused(problems)) = check::check(&program(), &pattern(text)) else {
            panic!("it compiles: {text}");
        };
        let problem = &problems[0];
        assert_eq!((problem.line, problem.column), (line, column), "{text}: {problem:?}");
        assert!(problem.message.contains(part), "{text}: {problem:?}");
    }
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    let refused =
        ScanPool::start(&program(), &[pattern(MARKER), pattern("include \"/etc/passwd\"")], options);
    assert!(matches!(refused, Err(StartError::Refused { .. })));
}

#[test]
fn a_worker_that_never_starts_is_an_error_and_not_a_wait() {
    for path in ["/bin/false", "/nonexistent/worker"] {
        let program = WorkerProgram { path: PathBuf::from(path), args: vec![] };
        let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
        assert!(ScanPool::start(&program, &[pattern(MARKER)], options).is_err(), "{path}");
        assert!(check::check(&program, &pattern(MARKER)).is_err(), "{path}");
    }
}

#[test]
fn a_worker_that_ends_before_it_is_told_anything_is_replaced_once() {
    let folder = tempfile::tempdir().unwrap();
    let real = tagged("replaced");
    let script = format!(
        "/bin/mkdir {}/once 2>/dev/null && exit 1; exec {} {}",
        folder.path().display(),
        real.path.display(),
        real.args.join(" ")
    );
    let program = WorkerProgram { path: "/bin/sh".into(), args: vec!["-c".to_owned(), script] };
    for _ in 0..20 {
        let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
        let (pool, results) = ScanPool::start(&program, &[pattern(MARKER)], options).unwrap();
        pool.finish();
        assert_eq!(results.iter().count(), 0);
        std::fs::remove_dir(folder.path().join("once")).unwrap();
    }
}

#[test]
fn a_cancelled_pool_ends_at_once() {
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    let (pool, results) = ScanPool::start(&tagged("cancelled"), &[pattern(ENDLESS)], options).unwrap();
    pool.submit(Item { id: 0, file: endless_file().into() });
    let begun = Instant::now();
    while workers("cancelled").iter().all(|(_, used)| *used < 20) {
        assert!(begun.elapsed() < Duration::from_secs(20), "the worker is not at work");
        std::thread::sleep(Duration::from_millis(5));
    }
    let begun = Instant::now();
    pool.cancel();
    assert_eq!(results.iter().count(), 0);
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(workers("cancelled"), []);
    assert!(pool.cpu_ms() >= 100, "{} ms", pool.cpu_ms());
}

fn list(text: &str) -> Pattern {
    let list = Pattern::new("hashes.txt", text.as_bytes().to_vec()).unwrap();
    assert!(list.digests().is_some(), "{text}");
    list
}

/// Scans files with patterns; what came of each, in the order of the files.
fn look_with(patterns: &[Pattern], limits: ScanLimits, files: Vec<File>) -> Vec<ItemResult> {
    let options = PoolOptions { threads: 2, limits, nice: 0 };
    let (pool, results) = ScanPool::start(&program(), patterns, options).unwrap();
    for (id, file) in (0..).zip(files) {
        pool.submit(Item { id, file: file.into() });
    }
    pool.finish();
    let mut results: Vec<ItemResult> = results.iter().collect();
    results.sort_by_key(|result| result.id);
    results
}

fn rules(result: &ItemResult) -> Vec<&str> {
    result.findings.matches.iter().map(|found| found.rule.as_str()).collect()
}

fn reasons(result: &ItemResult) -> Vec<SkipReason> {
    result.findings.skips.iter().map(|skip| skip.reason).collect()
}

#[test]
fn files_and_members_are_found_by_their_digests() {
    let bad = Sha256::of(b"bad");
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("inner", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"bad").unwrap();
    let zip = zip.finish().unwrap().into_inner();
    let files = || vec![file(b"bad"), file(b"good"), file(&zip), file(b"has needle-47"), file(b"")];
    let by_digest = list(&format!("{bad}  Bad.Thing"));

    let results = look_with(std::slice::from_ref(&by_digest), ScanLimits::default(), files());
    assert_eq!(
        results.iter().map(rules).collect::<Vec<_>>(),
        [vec!["Bad.Thing"], vec![], vec!["Bad.Thing"], vec![], vec![]]
    );
    let member = &results[2].findings;
    assert_eq!(member.matches[0].member, [PathBytes::from(&b"inner"[..])]);
    assert_eq!(member.matches[0].pattern, by_digest.sha256());
    assert_eq!((member.sha256, member.size), (Some(Sha256::of(&zip)), zip.len() as u64));

    // Beside rules and other lists, more than fit one message.
    let mut patterns: Vec<Pattern> = (0..70).map(|n| list(&format!("{n:064x}"))).collect();
    patterns.push(pattern(MARKER));
    patterns.push(by_digest);
    let results = look_with(&patterns, ScanLimits::default(), files());
    assert_eq!(
        results.iter().map(rules).collect::<Vec<_>>(),
        [vec!["Bad.Thing"], vec![], vec!["Bad.Thing"], vec!["marker"], vec![]]
    );
    assert!(results.iter().all(|result| result.findings.skips.is_empty()));
}

#[test]
fn digests_have_no_limit_of_size_and_rules_do() {
    let limits = ScanLimits { file_bytes: 1000, ..ScanLimits::default() };
    let (bad, good) = (vec![b'b'; 300_000], vec![b'g'; 300_000]);
    let archive = [b"PK\x03\x04".to_vec(), good.clone()].concat();
    let files = || vec![file(&bad), file(&good), file(&archive)];
    let digest = Sha256::of(&bad);
    let by_digest = list(&digest.to_string());

    let only = look_with(std::slice::from_ref(&by_digest), limits, files());
    assert_eq!(rules(&only[0]), [format!("sha256:{digest}")]);
    assert_eq!((only[0].findings.sha256, only[0].findings.size), (Some(digest), 300_000));
    assert_eq!(only.iter().map(reasons).collect::<Vec<_>>(), [vec![], vec![], vec![SkipReason::Limit]]);
    let both = look_with(&[by_digest, pattern(MARKER)], limits, files());
    assert_eq!(rules(&both[0]), [format!("sha256:{digest}")]);
    assert!(both.iter().all(|result| reasons(result) == [SkipReason::Limit]), "rules have not seen them");
    // A list that could not have it does not read it, and says so truthfully: it is not in the list.
    let sized = look_with(&[list(&format!("{}:5:x", "0".repeat(64)))], limits, files());
    assert_eq!(sized.iter().map(reasons).collect::<Vec<_>>(), [vec![], vec![], vec![SkipReason::Limit]]);
}

#[test]
fn a_list_is_tried_as_rules_are_and_a_forged_one_harms_nobody() {
    let good = list(&format!("{}\n{}:5:x", "0a".repeat(32), "0b".repeat(16)));
    assert_eq!(check::check(&program(), &good).unwrap().rules, 0);
    let bytes = good.to_bytes().unwrap();
    let body = bytes.len() - 32;
    let mut loaded = 0;
    for at in (0..body).step_by(5) {
        let mut forged = bytes.clone();
        forged[at] = 0xff;
        let digest = Sha256::of(&forged[..body]);
        forged[body..].copy_from_slice(digest.as_bytes());
        let Ok(forged) = Pattern::new("forged", forged) else { continue };
        if forged.digests().is_none() || loaded >= 16 {
            continue;
        }
        loaded += 1;
        let results = look_with(&[forged], ScanLimits::default(), vec![file(b"x"), file(b"")]);
        assert!(results.iter().all(|result| reasons(result).is_empty()), "{at}: {results:?}");
    }
    assert!(loaded > 0);
}
