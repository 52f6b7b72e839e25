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
    fs::write(folder.join("a.com"), samples::eicar()).expect("the lab's folder is writable");
    folder.to_str().expect("the lab's folder has a plain name").to_owned()
}

fn tmctl(lab: &Lab, args: &[&str]) -> Command {
    let mut command = Command::new(bin("tmctl"));
    command.arg("--profile").arg(lab.profile()).args(args).env("TMCTL_TRUST", lab.trust());
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

    let args = ["scan", "start", &agent.id, "--path", &folder, "--when-connected", "-o", "json"];
    let ordered = lab.tmctl(args).expect(0).json();
    let id = ordered[0]["id"].as_str().unwrap();
    let mut waiting = Process::start(&mut tmctl(&lab, &["task", "follow", id]), &lab.path("tmctl.log"));
    wait_for("tmctl to wait", PATIENCE, || {
        (handles_interrupts(waiting.pid()) && waiting.log().contains("waiting for the endpoint"))
            .then_some(())
    });
    waiting.signal(Signal::INT);
    let status = waiting.wait(PATIENCE).expect("tmctl ends");
    assert_eq!(status.code(), Some(130), "{}", waiting.log());
    assert!(waiting.log().contains(&format!("tmctl task follow {id}")), "{}", waiting.log());
    assert!(waiting.log().contains(&format!("tmctl task cancel {id}")), "{}", waiting.log());
    assert_eq!(lab.newest_task(&agent).unwrap()["state"], "queued");
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

#[test]
fn what_is_found_is_removed_on_request_and_can_be_put_back() {
    let lab = Lab::start();
    let agent = lab.agent();
    let folder = dirty(&lab);
    let file = std::path::Path::new(&folder).join("a.com");
    lab.scan(&agent, folder.as_ref()).expect(10);
    let needs = |count: u64| {
        let status = lab.tmctl(["status", "-o", "json"]).expect(0).json();
        let queries = status["queries"].as_array().unwrap();
        let query = queries.iter().find(|query| query["name"] == "needs-cleanup").unwrap();
        assert_eq!(query["count"], count);
        let listed = lab.tmctl(["endpoint", "list", "--query", "needs-cleanup", "-o", "json"]).expect(0);
        assert_eq!(listed.json().as_array().unwrap().len() as u64, count, "count and list are one query");
    };
    needs(1);

    let dry = lab.tmctl(["cleanup", "run", &agent.id, "--dry-run", "-o", "json"]).expect(0).json();
    assert_eq!(dry["tasks"][0]["items"][0]["verdict"], "would-vault");
    assert!(file.exists());
    // Nobody can be asked here, and nobody said yes.
    lab.tmctl(["cleanup", "run", "--query", "needs-cleanup", "--wait"]).expect(2);
    assert!(file.exists());
    needs(1);

    let args = ["cleanup", "run", "--query", "needs-cleanup", "--yes", "--wait", "-o", "json"];
    let cleaned = lab.tmctl(args).expect(0).json();
    assert!(!file.exists());
    let item = &cleaned["tasks"][0]["items"][0];
    assert_eq!((item["verdict"].as_str(), cleaned["outcome"].as_str()), (Some("vaulted"), Some("done")));
    let vault = item["vault"].as_str().unwrap();
    needs(0);
    lab.tmctl(["cleanup", "run", &agent.id, "--wait"]).expect(3);

    let held = lab.tmctl(["vault", "list", "--endpoint", &agent.id, "-o", "json"]).expect(0).json();
    assert_eq!(held[0]["id"], vault);
    fs::write(&file, "newer").unwrap();
    let refused = lab.tmctl(["vault", "restore", vault, "--wait"]);
    assert_ne!(refused.code(), 0, "{}", refused.both());
    assert_eq!(fs::read(&file).unwrap(), b"newer", "nothing is ever overwritten");
    fs::remove_file(&file).unwrap();
    lab.tmctl(["vault", "restore", vault, "--wait"]).expect(0);
    assert_eq!(fs::read(&file).unwrap(), samples::eicar());
}

#[test]
fn what_is_called_off_is_not_called_clean() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("many");
    for number in 0..20_000 {
        fs::write(folder.join(number.to_string()), number.to_string()).unwrap();
    }
    let folder = folder.to_str().unwrap();
    let ordered = lab.tmctl(["scan", "start", &agent.id, "--path", folder, "-o", "json"]).expect(0);
    let id = ordered.json()[0]["id"].as_str().unwrap().to_owned();
    wait_for("the scan to run", PATIENCE, || {
        lab.newest_task(&agent).filter(|task| task["state"] == "running")
    });
    let cancelled = lab.tmctl(["task", "cancel", &id, "--wait"]).expect(0);
    assert!(cancelled.out().contains(": cancelled; incomplete: 0 detections, "), "{}", cancelled.both());
    let shown = lab.tmctl(["task", "show", &id, "-o", "json"]).expect(0).json();
    assert_eq!(
        (shown["state"].as_str(), shown["result"]["verdict"].as_str()),
        (Some("cancelled"), Some("incomplete"))
    );
    lab.tmctl(["task", "follow", &id]).expect(1);
}

#[test]
fn events_are_followed_across_a_restart_of_the_manager_and_end_with_ctrl_c() {
    let mut lab = Lab::start();
    let agent = lab.agent();
    let folder = dirty(&lab);
    let log = lab.path("follow.log");
    let mut follow = Process::start(&mut tmctl(&lab, &["event", "follow", "-o", "json"]), &log);
    let told = |what: &str| {
        let log = fs::read_to_string(&log).unwrap_or_default();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let events: Vec<Value> = lines.filter(|event| event["task"].is_string()).collect();
        events.iter().filter(|event| event["kind"] == what).count()
    };
    lab.scan(&agent, folder.as_ref()).expect(10);
    wait_for("the first event", PATIENCE, || (told("scan-administrator") == 1).then_some(()));
    lab.stop_manager();
    wait_for("tmctl to miss the manager", PATIENCE, || follow.log().contains("trying again").then_some(()));
    lab.restart_manager();
    lab.wait_connected(&agent);
    lab.scan(&agent, folder.as_ref()).expect(10);
    wait_for("the second event", PATIENCE, || (told("scan-administrator") == 2).then_some(()));
    follow.signal(Signal::INT);
    assert_eq!(follow.wait(PATIENCE).expect("it ends").code(), Some(0), "{}", follow.log());
    assert!(follow.log().contains("the manager answers again"), "{}", follow.log());
}

/// Every command of ours that events and `why` advise.
fn advised(lab: &Lab, endpoint: &str) -> Vec<String> {
    let events = lab.tmctl(["event", "list", "-o", "json"]).expect(0).json();
    let why = lab.tmctl(["why", endpoint, "-o", "json"]).expect(0).json();
    let of_events = events.as_array().into_iter().flatten().map(|event| &event["advice"]);
    let of_why = why["advice"].as_array().into_iter().flatten();
    let texts = of_events.chain(of_why).filter_map(Value::as_str);
    let quoted = texts.flat_map(|text| text.split('`').skip(1).step_by(2));
    // What does not stand alone is an option to add.
    quoted.filter_map(|text| text.strip_prefix("tmctl ")).map(str::to_owned).collect()
}

#[test]
fn every_command_that_is_advised_exists() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let folder = dirty(&lab);
    let file = std::path::Path::new(&folder).join("a.com");
    let id = agent.id.clone();

    lab.scan(&agent, folder.as_ref()).expect(10);
    let mut commands = advised(&lab, &id);
    let cleaned = lab.tmctl(["cleanup", "run", &id, "--wait", "-o", "json"]).expect(0).json();
    let vault = cleaned["tasks"][0]["items"][0]["vault"].as_str().unwrap().to_owned();
    fs::write(&file, "newer").unwrap();
    assert_ne!(lab.tmctl(["vault", "restore", &vault, "--wait"]).code(), 0);
    fs::remove_file(&file).unwrap();
    lab.tmctl(["vault", "restore", &vault, "--wait"]).expect(0);
    agent.stop();
    lab.wait_away(&agent);
    let args = ["scan", "start", &id, "--path", &folder, "--when-connected", "-o", "json"];
    let ordered = lab.tmctl(args).expect(0).json();
    commands.extend(advised(&lab, &id));
    lab.tmctl(["task", "cancel", ordered[0]["id"].as_str().unwrap()]).expect(0);
    commands.extend(advised(&lab, &id));

    assert!(commands.len() > 5, "{commands:?}");
    for command in commands {
        lab.tmctl(command.split_whitespace().chain(["--help"])).expect(0);
    }
    // The control: a command that does not exist is noticed.
    lab.tmctl(["scan", "start", &id, "--quickly", "--help"]).expect(2);
}
