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
