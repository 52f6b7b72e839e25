//! What an administrator sees of work that takes time.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Stdio},
};

use rustix::process::Signal;
use serde_json::Value;
use tm_tests::{Lab, PATIENCE, bin, process::Process, samples, wait_for};

/// A folder with something to find.
fn dirty(lab: &Lab) -> String {
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    folder.to_str().unwrap().to_owned()
}

fn tmctl(lab: &Lab, args: &[&str]) -> Command {
    let mut command = Command::new(bin("tmctl"));
    command.arg("--profile").arg(lab.profile()).args(args);
    command
}

/// Whether a process has a handler for SIGINT; until then Ctrl-C just ends it.
fn handles_interrupts(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0");
    u64::from_str_radix(caught.trim(), 16).is_ok_and(|bits| bits & 0b10 != 0)
}

#[test]
fn who_stops_waiting_is_told_that_the_task_goes_on() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let folder = dirty(&lab);
    agent.stop();
    lab.wait_away(&agent);

    let args = ["scan", "start", &agent.id, "--path", &folder, "--when-connected", "--wait"];
    let mut waiting = Process::start(&mut tmctl(&lab, &args), &lab.path("tmctl.log"));
    wait_for("tmctl to wait", PATIENCE, || handles_interrupts(waiting.pid()).then_some(()));
    waiting.signal(Signal::INT);
    let status = waiting.wait(PATIENCE).expect("tmctl ends");
    assert_eq!(status.code(), Some(130), "{}", waiting.log());

    let task = lab.newest_task(&agent).expect("the order stands");
    let id = task["id"].as_str().unwrap();
    assert!(waiting.log().contains(&format!("tmctl task follow {id}")), "{}", waiting.log());
    assert!(waiting.log().contains(&format!("tmctl task cancel {id}")), "{}", waiting.log());
    assert_eq!(task["state"], "queued");
    agent.run();
    let end = tmctl(&lab, &["task", "follow", id]).output().unwrap();
    assert_eq!(end.status.code(), Some(10), "{}", String::from_utf8_lossy(&end.stderr));
}

#[test]
fn a_followed_task_is_told_in_lines_until_it_ends_or_nobody_reads() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let folder = dirty(&lab);
    agent.stop();
    lab.wait_away(&agent);
    let args = ["scan", "start", &agent.id, "--path", &folder, "--when-connected", "-o", "json"];
    let ordered = lab.tmctl(args).expect(0);
    let id = ordered.json()[0]["id"].as_str().unwrap().to_owned();
    assert!(ordered.err().contains(&format!("tmctl task follow {id}")), "{}", ordered.err());

    let spawn = |format| {
        tmctl(&lab, &["task", "follow", &id, "-o", format])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let (mut read, mut unread) = (spawn("json"), spawn("table"));
    let mut lines = BufReader::new(read.stdout.take().unwrap());
    let mut first = String::new();
    lines.read_line(&mut first).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&first).unwrap()["state"], "queued");
    let mut one = [0];
    unread.stdout.take().unwrap().read_exact(&mut one).unwrap();
    assert!(unread.try_wait().unwrap().is_none(), "it goes on as long as there is nothing new");

    agent.run();
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    let last: Value = serde_json::from_str(rest.lines().last().unwrap()).unwrap();
    assert_eq!((last["state"].as_str(), last["result"]["detections"].as_u64()), (Some("done"), Some(1)));
    assert_eq!(read.wait().unwrap().code(), Some(10));
    wait_for("the one that nobody reads to end", PATIENCE, || unread.try_wait().unwrap());
}

#[test]
fn one_command_waits_for_many_endpoints_and_says_what_comes_next() {
    let lab = Lab::start();
    let agents = [lab.agent(), lab.agent(), lab.agent()];
    let folder = dirty(&lab);
    let args = ["scan", "start", "--group", "default", "--path", &folder, "--wait", "-o", "json"];
    let report = lab.tmctl(args).expect(10);
    let tasks = report.json()["tasks"].as_array().cloned().unwrap();
    assert_eq!(tasks.len(), agents.len());
    assert!(tasks.iter().all(|task| task["state"] == "done" && task["detections"][0]["sha256"].is_string()));
    assert!(report.err().contains("tmctl cleanup run "), "{}", report.err());
    // The control: where nothing is found, nothing is suggested.
    let clean = lab.folder("clean");
    let args = ["scan", "start", &agents[0].id, "--path", clean.to_str().unwrap(), "--wait"];
    let report = lab.tmctl(args).expect(0);
    assert!(!report.err().contains("tmctl cleanup run"), "{}", report.err());
}
