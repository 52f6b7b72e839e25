//! What scans are asked to look at and what they may cost: the options of `tmctl scan start`, the share of a core,
//! the quote before and the bill after.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use tm_tests::{Agent, Lab, Output};

const RULE: &str = "rule marked { strings: $a = \"marked-for-cost-7731\" condition: $a }";
const MARK: &str = "marked-for-cost-7731";

/// `tmctl scan start … --wait -o json` without a path.
fn order(lab: &Lab, agent: &Agent, more: &[&str]) -> Output {
    let start = ["scan", "start", agent.id.as_str(), "--wait", "-o", "json"];
    lab.tmctl(start.iter().chain(more).copied())
}

/// `tmctl task show` of the newest task of an agent, as people see it.
fn shown(lab: &Lab, agent: &Agent) -> String {
    let task = lab.newest_task(agent).expect("a task was ordered");
    lab.tmctl(["task", "show", task["id"].as_str().expect("a task has an id")]).expect(0).out()
}

/// What `tmctl task show` says, in one line: tables break long cells.
fn in_a_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A shell that has put a text together and waits.
struct Holder(Child);

impl Holder {
    fn start() -> Self {
        let script = "a=kept-in; b=memory-7732; c=$a-$b; echo ready; read line";
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().expect("there is a shell");
        let mut line = String::new();
        let out = child.stdout.as_mut().expect("it is a pipe");
        BufReader::new(out).read_line(&mut line).expect("a pipe can be read");
        assert_eq!(line, "ready\n");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn found_paths(output: &Output) -> Vec<String> {
    let report = output.json();
    let found = |task: &Value| task["detections"].as_array().cloned().unwrap_or_default();
    let tasks = report["tasks"].as_array().cloned().unwrap_or_default();
    tasks.iter().flat_map(found).map(|found| found["path"].as_str().expect("a path").to_owned()).collect()
}

#[test]
fn a_quick_scan_needs_no_path_and_looks_where_things_are_dropped() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("marked.yar", RULE).expect(0);
    // It is looked at early, so that not all of this machine has to be.
    let dropped = tempfile::Builder::new().prefix("cost-").tempdir_in("/dev/shm").unwrap();
    fs::write(dropped.path().join("dropped"), MARK).unwrap();
    // Nothing runs from there, starts from there, or is a home.
    let quiet = tempfile::Builder::new().prefix("cost-").tempdir_in("/usr/share").unwrap();
    fs::write(quiet.path().join("kept"), MARK).unwrap();
    order(&lab, &agent, &["--path", quiet.path().to_str().unwrap()]).expect(10);

    let start = ["scan", "start", agent.id.as_str(), "--quick", "--no-archives", "--max-file-size", "4KiB"];
    lab.tmctl(start).expect(0);
    let expected = dropped.path().join("dropped").display().to_string();
    let found = tm_tests::wait_for("the dropped file to be found", tm_tests::PATIENCE, || {
        let found = lab.detections(&agent);
        found.iter().any(|found| found["path"] == expected.as_str()).then_some(found)
    });
    let kept = quiet.path().join("kept").display().to_string();
    assert!(
        !found.iter().any(|found| found["path"] == kept.as_str()),
        "only where things are dropped: {found:?}"
    );
    let text = in_a_line(&shown(&lab, &agent));
    assert!(text.contains("quick: what runs"), "{text}");
    let id = lab.newest_task(&agent).unwrap()["id"].as_str().unwrap().to_owned();
    lab.tmctl(["task", "cancel", &id, "--wait"]);
}

#[test]
fn the_memory_of_processes_is_looked_at_when_it_is_asked_for() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("held.yar", "rule held { strings: $a = \"kept-in-memory-7732\" condition: $a }").expect(0);
    let holder = Holder::start();
    let mem = format!("/proc/{}/mem", holder.0.id());
    let output = order(&lab, &agent, &["--processes"]).expect(10);
    assert!(found_paths(&output).contains(&mem), "{}", output.out());
    assert!(in_a_line(&shown(&lab, &agent)).contains("the memory of processes"));
    let alone = order(&lab, &agent, &["--path", lab.folder("empty").to_str().unwrap()]).expect(0);
    assert!(found_paths(&alone).is_empty(), "the control");
}

#[test]
fn a_fresh_scan_reads_everything_again() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("marked.yar", RULE).expect(0);
    // Its files were changed long enough ago.
    let tree = "/usr/share/perl5";
    let result = |more: &[&str]| {
        order(&lab, &agent, &[&["--path", tree], more].concat()).expect(0);
        lab.newest_task(&agent).unwrap()["result"].clone()
    };
    let first = result(&[]);
    let again = result(&[]);
    // File systems whose times are not trusted know nothing; `known` says more of that.
    assert!(again["known"] == again["files"] || again["known"] == 0, "{again}");
    let fresh = result(&["--fresh"]);
    assert_eq!((&fresh["known"], &fresh["files"]), (&0.into(), &first["files"]), "{fresh}");
    assert_eq!(fresh["receipt"]["verified"], true, "{fresh}");
    let text = in_a_line(&shown(&lab, &agent));
    assert!(text.contains(tree) && text.contains("also what is known clean"), "{text}");
}

#[test]
fn orders_that_contradict_themselves_are_refused() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("marked.yar", RULE).expect(0);
    for (more, said) in [
        (&["--full", "--path", "/srv"][..], "--path"),
        (&["--full", "--quick"], "--quick"),
        (&["--fresh"], "--path"),
        (&["--path", "/srv", "--background", "--cpu", "20%"], "--cpu"),
    ] {
        let refused = order(&lab, &agent, more).expect(2);
        assert!(refused.err().contains(said), "{more:?}: {}", refused.err());
    }
    assert!(lab.newest_task(&agent).is_none(), "nothing was ordered");
    // The agent's own command refuses the same.
    let full = tm_tests::standalone::scan(RULE, Path::new("/etc/hostname"), &["--full", "--"]).expect(64);
    assert!(full.err().contains("no path"), "{}", full.err());
}

/// One file that costs seconds of CPU, and the rule that makes it so.
const LONG: &str = "rule long { condition: for all i in (0..4000000) : (uint8(i % 512) == 97) }";

/// User and system time of a process and, if it has such, of the children it has waited for, in seconds; and its
/// state. `None` if it has ended.
fn cpu_and_state(pid: u32) -> Option<(f64, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks: f64 = (11..15).map(|at| fields[at].parse::<f64>().expect("a number")).sum();
    Some((ticks / 100.0, fields[0].chars().next()?))
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split(' ').filter_map(|pid| pid.trim().parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// A scan on this machine while it runs.
struct Running(Child);

impl Running {
    fn start(rule: &Path, tree: &Path, more: &[&str]) -> Self {
        let mut scan = Command::new(tm_tests::bin("tm-agent"));
        scan.args(["scan", "--standalone", "--pattern"])
            .arg(rule)
            .args(["-o", "json"])
            .args(more)
            .arg("--")
            .arg(tree);
        Self(scan.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("programs can be run"))
    }

    /// What it and its worker have used of the CPU, in seconds, and whether the worker stands still.
    fn look(&self) -> Option<(f64, bool)> {
        let (own, _) = cpu_and_state(self.0.id())?;
        let workers: Vec<_> = children(self.0.id()).into_iter().filter_map(cpu_and_state).collect();
        let cpu = own + workers.iter().map(|(cpu, _)| cpu).sum::<f64>();
        Some((cpu, workers.iter().any(|(_, state)| *state == 'T')))
    }

    fn worker(&self) -> u32 {
        tm_tests::wait_for("a worker", tm_tests::PATIENCE, || children(self.0.id()).first().copied())
    }

    fn end(self) -> Output {
        let mut this = self;
        let child = std::mem::replace(&mut this.0, Command::new("true").spawn().expect("there is `true`"));
        child.wait_with_output().expect("it can be waited for").into()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_long_file_is_held_to_the_share_and_is_still_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let (rule, file) = (folder.path().join("long.yar"), folder.path().join("file"));
    fs::write(&rule, LONG).unwrap();
    fs::write(&file, vec![b'a'; 1024]).unwrap();
    let run = |more: &[&str]| {
        let began = std::time::Instant::now();
        let scan = Running::start(&rule, &file, more);
        let mut looks = Vec::new();
        while scan.look().is_some_and(|look| {
            looks.push((began.elapsed().as_secs_f64(), look.0, look.1));
            // A process that has ended and is not waited for is still there.
            !matches!(cpu_and_state(scan.0.id()), Some((_, 'Z')))
        }) {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let output = scan.end();
        let summary = tm_tests::standalone::lines(&output, "summary").pop().expect("a summary");
        (summary, looks)
    };
    let (free, looks) = run(&[]);
    let (cpu, elapsed) = (free["cpu_s"].as_f64().unwrap(), free["elapsed_s"].as_f64().unwrap());
    assert_eq!(free["verdict"], "detected", "{free}");
    assert!(cpu > 0.2, "there is something to hold: {free}");
    assert!(cpu / elapsed > 0.1, "the control: unheld it takes what it gets: {free}");
    assert!(looks.iter().all(|(_, _, stopped)| !stopped));

    // What it may take unheld is not enough for it held.
    let limit = format!("{}ms", (cpu * 4000.0).ceil());
    let (held, looks) = run(&["--cpu", "5%", "--file-timeout", &limit]);
    assert_eq!((&held["verdict"], &held["files"]), (&"detected".into(), &1.into()), "{held}");
    assert!(looks.iter().any(|(_, _, stopped)| *stopped), "its worker was stopped in the middle of the file");
    // Whatever it used up loading is paid before the file; after that every stretch of 4 s keeps to the share.
    let from = looks.iter().position(|(_, _, stopped)| *stopped).unwrap();
    let (mut stretches, looks) = (0, &looks[from..]);
    for (at, cpu, _) in looks {
        let Some((later, more, _)) = looks.iter().find(|(later, ..)| *later >= at + 4.0) else { break };
        let share = (more - cpu) / (later - at);
        assert!(share <= 0.08, "{share} of a core from {at} s to {later} s");
        stretches += 1;
    }
    assert!(stretches > 10, "it took long enough to see: {held}");
}

#[test]
fn a_held_scan_reads_when_nobody_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let (rule, file) = (folder.path().join("long.yar"), folder.path().join("file"));
    fs::write(&rule, LONG).unwrap();
    fs::write(&file, vec![b'a'; 1024]).unwrap();
    let idle = |id: &str| {
        let said = Command::new("ionice").args(["-p", id]).output().expect("there is ionice").stdout;
        String::from_utf8_lossy(&said).trim() == "idle"
    };
    let class = |more: &[&str]| {
        let scan = Running::start(&rule, &file, more);
        let worker = idle(&scan.worker().to_string());
        let threads = fs::read_dir(format!("/proc/{}/task", scan.0.id())).unwrap().flatten();
        (worker, threads.filter(|thread| idle(thread.file_name().to_str().unwrap())).count())
    };
    let (background, walking) = class(&["--background"]);
    assert!(background && walking > 0, "the worker and the threads that open files: {background}, {walking}");
    let (free, walking) = class(&[]);
    assert!(!free && walking == 0, "the control: {free}, {walking}");
}

#[test]
fn a_held_scan_that_is_killed_leaves_no_worker_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (rule, file) = (folder.path().join("long.yar"), folder.path().join("file"));
    fs::write(&rule, LONG).unwrap();
    fs::write(&file, vec![b'a'; 1024]).unwrap();
    let mut scan = Running::start(&rule, &file, &["--cpu", "10%"]);
    let worker = scan.worker();
    tm_tests::wait_for("the worker to be stopped", tm_tests::PATIENCE, || {
        scan.look().filter(|(_, stopped)| *stopped)
    });
    scan.0.kill().unwrap();
    scan.0.wait().unwrap();
    tm_tests::wait_for("the worker to end", tm_tests::PATIENCE, || {
        cpu_and_state(worker).is_none_or(|(_, state)| state == 'Z').then_some(())
    });
}

/// A folder whose files cost what they cost every time.
fn tree(lab: &Lab, name: &str, files: usize) -> std::path::PathBuf {
    let folder = lab.folder(name);
    for n in 0..files {
        fs::write(folder.join(format!("{n:04}")), vec![b'a'; 64 << 10])
            .expect("the lab's folder is writable");
    }
    folder
}

#[test]
fn a_quote_is_made_without_reading_and_stands_beside_the_bill() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("marked.yar", RULE).expect(0);
    lab.import("work.yar", "rule work { condition: for any i in (0..20000) : (uint8(i) == 256) }").expect(0);
    let folder = tree(&lab, "quoted", 200);
    fs::write(folder.join("marked"), MARK).unwrap();
    fs::write(folder.join("large"), vec![b'b'; 2 << 20]).unwrap();
    let path = folder.to_str().unwrap();
    let ask = ["--path", path, "--max-file-size", "1MiB", "--dry-run"];

    let first = order(&lab, &agent, &ask).expect(0).json();
    let quote = &first["tasks"][0]["result"];
    assert_eq!((&quote["files"], &quote["known"]), (&201.into(), &0.into()), "{first}");
    assert_eq!(quote["bytes"].as_u64(), Some(200 * (64 << 10) + 20), "{first}");
    assert_eq!(quote["skipped"]["limit"], 1, "{first}");
    assert!(quote["estimate"].is_null(), "there is no past scan: {first}");
    assert!(in_a_line(&shown(&lab, &agent)).contains("no past scan to estimate from"));
    let task = lab.newest_task(&agent).unwrap();
    assert_eq!((&task["dry_run"], &task["state"]), (&true.into(), &"done".into()));
    assert!(lab.detections(&agent).is_empty(), "nothing was read");
    let covered = lab.tmctl(["coverage", &agent.id, "--path", path, "-o", "json"]).expect(0).both();
    assert!(!covered.contains(task["id"].as_str().unwrap()), "it looked at nothing: {covered}");
    let incidents = lab.tmctl(["endpoint", "incidents", &agent.id, "-o", "json"]).expect(0).json();
    assert_eq!(incidents.as_array().map(Vec::len), Some(0), "{incidents}");

    // A first scan of something else to estimate from.
    let other = tree(&lab, "other", 100);
    order(&lab, &agent, &["--path", other.to_str().unwrap()]).expect(0);
    let second = order(&lab, &agent, &ask).expect(0).json();
    let estimate = &second["tasks"][0]["result"]["estimate"];
    assert_eq!((&estimate["runs"], &estimate["same_patterns"]), (&1.into(), &true.into()), "{second}");
    let quoted = estimate["cpu_s"].as_f64().unwrap();

    order(&lab, &agent, &["--path", path, "--max-file-size", "1MiB"]).expect(10);
    let id = lab.newest_task(&agent).unwrap()["id"].as_str().unwrap().to_owned();
    let task = lab.tmctl(["task", "show", &id, "-o", "json"]).expect(0).json();
    let bill = &task["result"];
    assert_eq!((&bill["files"], &bill["bytes"]), (&quote["files"], &quote["bytes"]), "{task}");
    assert_eq!(task["quoted"]["task"], second["tasks"][0]["id"], "the newest quote: {task}");
    let cpu = bill["cpu_s"].as_f64().unwrap();
    assert!(quoted / cpu < 4.0 && cpu / quoted < 4.0, "quoted {quoted} s of CPU, used {cpu} s");
    let text = in_a_line(&shown(&lab, &agent));
    assert!(text.contains("quoted before: 201 files") && text.contains("s of CPU"), "{text}");
    // Another order has no quote, and what was scanned is covered.
    order(&lab, &agent, &["--path", path, "--max-file-size", "1MiB", "--fresh"]).expect(10);
    assert!(!shown(&lab, &agent).contains("quoted before"));
    let covered = lab.tmctl(["coverage", &agent.id, "--path", path, "-o", "json"]).expect(0).both();
    assert!(covered.contains("limit"), "the control: {covered}");
}

#[test]
fn a_quote_that_cannot_be_made_is_not_one() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("marked.yar", RULE).expect(0);
    let missing = order(&lab, &agent, &["--path", "/is/not/there", "--dry-run"]).expect(1);
    assert!(missing.out().contains("path-refused"), "{}", missing.both());
    let covered =
        lab.tmctl(["coverage", &agent.id, "--path", "/is/not/there", "-o", "json"]).expect(0).both();
    assert!(!covered.contains("path-refused"), "a quote that failed is no scan that failed: {covered}");
}

#[test]
fn the_agents_own_command_quotes_and_bills() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for n in 0..50 {
        fs::write(tree.join(n.to_string()), vec![b'a'; 64 << 10]).unwrap();
    }
    fs::write(tree.join("marked"), MARK).unwrap();
    let cache = folder.path().join("seen");
    let cache = cache.to_str().unwrap();
    let quote = |more: &[&str]| {
        let output =
            tm_tests::standalone::scan(RULE, &tree, &[&["--dry-run", "--cache", cache][..], more].concat());
        let output = output.expect(0);
        assert!(tm_tests::standalone::lines(&output, "detection").is_empty(), "nothing is read");
        tm_tests::standalone::lines(&output, "quote").pop().unwrap_or_else(|| panic!("{}", output.both()))
    };
    let before = quote(&[]);
    assert_eq!((&before["files"], &before["estimate"]), (&51.into(), &Value::Null), "{before}");
    let scan = || tm_tests::standalone::scan(RULE, &tree, &["--cache", cache]).expect(1);
    let summary = |output: &Output| tm_tests::standalone::lines(output, "summary").pop().expect("a summary");
    let bill = summary(&scan());
    assert_eq!((&bill["quoted"]["files"], &bill["quoted"]["cpu_s"]), (&51.into(), &Value::Null), "{bill}");
    assert!(
        quote(&["--max-depth", "1"])["estimate"]["cpu_s"].as_f64() > Some(0.0),
        "other limits, the same past"
    );
    let after = quote(&[]);
    assert_eq!(after["estimate"]["runs"], 1, "{after}");
    let bill = summary(&scan());
    assert_eq!(bill["quoted"]["cpu_s"], after["estimate"]["cpu_s"], "{bill}");
    let text = tm_tests::standalone::scan_as("text", RULE, &tree, &["--cache", cache]).expect(1).out();
    assert!(text.contains("quoted before: 51 files"), "{text}");
    fs::write(format!("{cache}-costs"), "{broken").unwrap();
    assert_eq!(quote(&[])["estimate"], Value::Null, "a damaged past is none");
}
