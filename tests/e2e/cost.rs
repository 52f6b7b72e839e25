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
    let dropped = tempfile::Builder::new().prefix("cost-").tempdir_in("/var/tmp").unwrap();
    fs::write(dropped.path().join("dropped"), MARK).unwrap();
    // Nothing runs from there, starts from there, or is a home.
    let quiet = tempfile::Builder::new().prefix("cost-").tempdir_in("/usr/share").unwrap();
    fs::write(quiet.path().join("kept"), MARK).unwrap();

    let output = order(&lab, &agent, &["--quick", "--no-archives", "--max-file-size", "64KiB"]).expect(10);
    let paths = found_paths(&output);
    assert!(paths.contains(&dropped.path().join("dropped").display().to_string()), "{paths:?}");
    assert!(!paths.contains(&quiet.path().join("kept").display().to_string()), "{paths:?}");
    let text = in_a_line(&shown(&lab, &agent));
    assert!(text.contains("quick: what runs"), "{text}");
    let beside = quiet.path().to_str().unwrap();
    let more = ["--quick", "--no-archives", "--max-file-size", "64KiB", "--path", beside];
    let paths = found_paths(&order(&lab, &agent, &more).expect(10));
    assert!(paths.contains(&quiet.path().join("kept").display().to_string()), "a path beside it: {paths:?}");
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
    let mut scan = Running::start(&rule, &file, &["--cpu", "1%"]);
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
