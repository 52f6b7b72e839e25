//! What is ordered happens once, or it is known why not: through kills, full disks, damage and wrong clocks.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use tm_tests::{
    Agent, Lab, PATIENCE, fault_proxy::Way, is_long, output::rows, samples, tmpfs::Tmpfs, wait_for,
};

/// Longer than any single step: machines are busy and agents back off.
const LONG: Duration = Duration::from_secs(240);

/// A folder with `infected` files in which something is detected and as many in which nothing is.
fn folder(lab: &Lab, name: &str, infected: usize) -> PathBuf {
    let folder = lab.folder(name);
    for number in 0..infected {
        fs::write(folder.join(format!("bad-{number}")), samples::eicar()).expect("the lab is writable");
        fs::write(folder.join(format!("good-{number}")), format!("{number}")).expect("the lab is writable");
    }
    folder
}

/// Orders a scan that may wait; its task.
fn order(lab: &Lab, agent: &Agent, path: &Path, more: &[&str]) -> String {
    let mut args = vec!["scan", "start", &agent.id, "--when-connected", "-o", "json", "--path"];
    args.push(path.to_str().expect("the lab's paths are text"));
    args.extend(more);
    let made = lab.tmctl(args).expect(0).json();
    rows(&made)[0]["id"].as_str().expect("a task has an id").to_owned()
}

fn task(lab: &Lab, id: &str) -> Value {
    lab.rest(&format!("/v1/tasks/{id}"))
}

fn is_over(task: &Value) -> bool {
    !matches!(task["state"].as_str(), Some("queued" | "delivered" | "running"))
}

fn wait_over(lab: &Lab, id: &str) -> Value {
    wait_for("a task to end", LONG, || Some(task(lab, id)).filter(is_over))
}

fn detections(lab: &Lab, id: &str) -> Vec<String> {
    let found = rows(&lab.rest(&format!("/v1/tasks/{id}/detections")));
    found.iter().map(|row| row["path"].as_str().expect("a detection has a path").to_owned()).collect()
}

#[test]
fn orders_survive_an_agent_and_a_manager_that_are_killed_again_and_again() {
    let mut lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folders: Vec<PathBuf> = (0..5).map(|n| folder(&lab, &format!("dirty-{n}"), 20 * n)).collect();
    let (rounds, each) = if is_long() { (100, 4) } else { (12, 2) };
    let mut ordered: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..rounds {
        for n in 0..each {
            let which = (round + n) % folders.len();
            ordered.insert(order(&lab, &agent, &folders[which], &["--expires", "1h"]), 20 * which);
        }
        // At another point of the work each time.
        thread::sleep(Duration::from_millis(u64::try_from(round * 37 % 400).unwrap()));
        if round % 2 == 0 {
            agent.kill9();
            agent.run();
        } else {
            lab.kill9_manager();
        }
    }
    for (id, expected) in &ordered {
        let task = wait_over(&lab, id);
        assert_eq!(task["state"], "done", "{task}\n{}", agent.process().log());
        let mut found = detections(&lab, id);
        assert_eq!(found.len(), *expected, "task {id}");
        found.sort();
        found.dedup();
        assert_eq!(found.len(), *expected, "none is stored twice");
        assert_eq!(task["result"]["detections"], *expected);
    }
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn an_order_that_nobody_took_expires_and_is_not_carried_out_later() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 1);
    agent.stop();
    lab.wait_away(&agent);
    let id = order(&lab, &agent, &dirty, &["--expires", "2s"]);
    let over = wait_over(&lab, &id);
    assert_eq!((over["state"].as_str(), over["code"].as_str()), (Some("expired"), Some("expired")));
    agent.run();
    lab.wait_connected(&agent);
    lab.scan(&agent, &dirty).expect(10);
    assert_eq!(task(&lab, &id)["state"], "expired");
    assert!(detections(&lab, &id).is_empty());
}

#[test]
fn a_task_that_takes_too_long_ends_at_its_deadline() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("slow.yar", samples::EICAR_RULE).expect(0);
    let id = order(&lab, &agent, Path::new("/usr"), &["--deadline", "1s"]);
    let over = wait_over(&lab, &id);
    assert_eq!((over["state"].as_str(), over["code"].as_str()), (Some("failed"), Some("deadline")), "{over}");
    // What it did look at is told and signed, and not taken for the whole.
    let result = &over["result"];
    assert_eq!(result["receipt"]["verified"], true, "{over}");
    let signed = STANDARD.decode(result["receipt"]["signed_bytes_b64"].as_str().unwrap()).unwrap();
    let signed = String::from_utf8(signed).unwrap();
    assert!(signed.lines().any(|line| line == "whole false"), "{signed}");
    assert!(signed.lines().any(|line| line == format!("files {}", result["files"])), "{signed}");
    let coverage = lab.tmctl(["coverage", "--path", "/usr", "-o", "json"]).expect(0).json();
    assert_eq!(coverage["counts"]["covered"], 0, "{coverage}");
    // Its totals are on the screen that says why.
    let why = lab.tmctl(["why", &agent.id]).expect(0).out();
    let totals = format!("{} file", result["files"]);
    assert!(why.lines().any(|line| line.contains(&id) && line.contains(&totals)), "{totals}: {why}");
}

#[test]
fn a_full_disk_loses_nothing_and_work_goes_on_when_there_is_room_again() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 200);
    lab.scan(&agent, &dirty).expect(10);
    for free in [0, 4, 64, 512] {
        agent.stop();
        let disk = Tmpfs::over(&agent.data, 6 * 1024, 1000);
        agent.run();
        lab.wait_connected(&agent);
        let ballast = disk.fill(free);
        let ordered: Vec<String> = (0..12).map(|_| order(&lab, &agent, &dirty, &[])).collect();
        // Whatever becomes of the orders, the agent stays and answers.
        thread::sleep(Duration::from_secs(4));
        assert!(
            agent.is_running() && lab.is_connected(&agent),
            "{free} KiB free:\n{}",
            agent.process().log()
        );
        fs::remove_file(ballast).unwrap();
        for id in &ordered {
            let over = wait_over(&lab, id);
            assert_eq!(over["state"], "done", "{free} KiB free: {over}\n{}", agent.process().log());
            assert_eq!(detections(&lab, id).len(), 200, "{free} KiB free");
        }
        // The next round starts from what this one left.
        agent.stop();
        let kept = agent.data.with_extension("kept");
        let copied = Command::new("cp").arg("-a").arg(&agent.data).arg(&kept).status().unwrap();
        assert!(copied.success());
        drop(disk);
        fs::remove_dir_all(&agent.data).unwrap();
        fs::rename(&kept, &agent.data).unwrap();
        agent.run();
        lab.wait_connected(&agent);
    }
}

#[test]
fn no_inodes_left_loses_nothing() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 10);
    lab.scan(&agent, &dirty).expect(10);
    agent.stop();
    let disk = Tmpfs::over(&agent.data, 6 * 1024, 200);
    agent.run();
    lab.wait_connected(&agent);
    let mut fillers = Vec::new();
    loop {
        let path = disk.path().join(format!("filler-{}", fillers.len()));
        if fs::write(&path, b"").is_err() {
            break;
        }
        fillers.push(path);
    }
    let id = order(&lab, &agent, &dirty, &[]);
    let over = wait_over(&lab, &id);
    assert_eq!(over["state"], "done", "a scan needs no new file: {over}\n{}", agent.process().log());
    fillers.iter().for_each(|path| fs::remove_file(path).unwrap());
    lab.scan(&agent, &dirty).expect(10);
}

#[test]
fn a_damaged_journal_starts_and_is_reported() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 3);
    lab.scan(&agent, &dirty).expect(10);
    agent.stop();
    let journal = agent.data.join("journal");
    let segment = fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let whole = fs::read(&segment).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    let rounds = if is_long() { 200 } else { 12 };
    for round in 0..rounds {
        let mut bytes = whole.clone();
        let at = used * round / rounds;
        if round % 4 == 3 {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << (round % 8);
        }
        fs::write(&segment, bytes).unwrap();
        agent.run();
        let id = order(&lab, &agent, &dirty, &[]);
        let over = wait_over(&lab, &id);
        assert_eq!(over["state"], "done", "round {round}, byte {at}: {over}\n{}", agent.process().log());
        assert_eq!(detections(&lab, &id).len(), 3, "round {round}, byte {at}");
        agent.stop();
    }
    let events = rows(&lab.tmctl(["endpoint", "events", &agent.id, "-o", "json"]).expect(0).json());
    let told = events.iter().filter(|event| event["detail"] == "journal-damaged").count();
    assert!(told > 0, "damage is reported: {events:?}");
}

#[test]
fn settings_that_are_not_right_stop_no_agent_and_are_reported() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 1);
    agent.stop();
    fs::write(agent.data.join("agent.toml"), "[vault]\nretention = \"soon\"\n").unwrap();
    agent.run();
    lab.wait_connected(&agent);
    lab.scan(&agent, &dirty).expect(10);
    wait_for("the manager to know", PATIENCE, || {
        let events = rows(&lab.tmctl(["event", "list", "-o", "json"]).expect(0).json());
        events.iter().any(|event| event.to_string().contains("vault.retention")).then_some(())
    });
}

#[test]
fn a_clock_that_jumps_neither_loses_a_task_nor_ends_it_early() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 5);
    let control = lab.path("clock");
    fs::write(&control, "+0").unwrap();
    agent.stop();
    agent.run_with_clock(&control);
    lab.wait_connected(&agent);
    for jump in ["+1d", "+365d", "-1d", "-365d"] {
        // Ordered before the jump, and begun or still waiting when it comes.
        let ordered: Vec<String> =
            (0..4).map(|_| order(&lab, &agent, &dirty, &["--expires", "1h", "--deadline", "10m"])).collect();
        fs::write(&control, jump).unwrap();
        for id in &ordered {
            let over = wait_over(&lab, id);
            assert_eq!(over["state"], "done", "{jump}: {over}");
        }
        wait_for("the agent to have noticed", PATIENCE, || {
            agent.process().log().contains("clock jumped").then_some(())
        });
        fs::write(&control, "+0").unwrap();
    }
    assert!(lab.is_connected(&agent));
}

#[test]
fn findings_arrive_once_each_over_a_link_that_breaks_all_the_time() {
    let (mut lab, proxy) = Lab::start_behind_proxy();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let files = if is_long() { 100_000 } else { 4_000 };
    let kills = if is_long() { 50 } else { 6 };
    let dirty = lab.folder("dirty");
    for number in 0..files {
        let folder = dirty.join(format!("{}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir(&folder).unwrap();
        }
        fs::write(folder.join(format!("bad-{number}")), samples::eicar()).unwrap();
    }
    proxy.cut_every(Way::Up, Some(50_000));
    let id = order(&lab, &agent, &dirty, &[]);
    for kill in 0..kills {
        let before = stored(&lab, &id);
        wait_for("more findings to arrive", LONG, || {
            (stored(&lab, &id) > before || is_over(&task(&lab, &id))).then_some(())
        });
        if kill % 2 == 0 {
            agent.kill9();
            agent.run();
        } else {
            lab.kill9_manager();
        }
    }
    let over = wait_over(&lab, &id);
    assert_eq!(over["state"], "done", "{over}");
    assert!(proxy.cuts() > 3, "control: the link broke {} times", proxy.cuts());
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let page = rows(&lab.rest(&format!("/v1/tasks/{id}/detections?after={after}")));
        let Some(last) = page.last() else { break };
        after = last["id"].as_i64().unwrap();
        found.extend(page.iter().map(|row| row["path"].as_str().unwrap().to_owned()));
    }
    assert_eq!(found.len(), files, "none is missing and none is stored twice");
    found.sort();
    found.dedup();
    assert_eq!(found.len(), files);
    proxy.cut_every(Way::Up, None);
}

/// How many findings of a task are stored.
fn stored(lab: &Lab, id: &str) -> i64 {
    // Numbers are given without a gap; probing upwards is cheaper than reading all.
    let mut low = 0;
    loop {
        let page = rows(&lab.rest(&format!("/v1/tasks/{id}/detections?after={low}")));
        let Some(last) = page.last() else { return low };
        low = last["id"].as_i64().expect("a detection has a number");
    }
}

#[test]
fn a_scan_that_is_called_off_says_so_within_seconds_and_what_it_saw() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    // Begun.
    let running = order(&lab, &agent, Path::new("/usr"), &[]);
    wait_for("the scan to begin", PATIENCE, || (task(&lab, &running)["state"] == "running").then_some(()));
    // Two run at once; this one waits.
    let second = order(&lab, &agent, Path::new("/usr"), &[]);
    let waiting = order(&lab, &agent, Path::new("/usr"), &[]);
    for id in [&waiting, &running, &second] {
        let begun = std::time::Instant::now();
        lab.tmctl(["task", "cancel", id, "--wait"]);
        let took = begun.elapsed();
        let over = task(&lab, id);
        assert_eq!(over["state"], "cancelled", "{over}");
        // Two seconds by promise; the rest is the machine that runs many tests at once.
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    assert!(task(&lab, &running)["result"]["files"].as_u64().is_some(), "it says what it had looked at");
    // Called off again, or after its end.
    lab.tmctl(["task", "cancel", &running]).expect(0);
    let dirty = folder(&lab, "dirty", 1);
    lab.scan(&agent, &dirty).expect(10);
    let done = lab.newest_task(&agent).unwrap()["id"].as_str().unwrap().to_owned();
    let late = lab.tmctl(["task", "cancel", &done]).expect(3);
    assert!(late.both().contains("done"), "{}", late.both());
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn an_order_for_an_agent_that_is_away_is_called_off_at_once() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = folder(&lab, "dirty", 1);
    agent.stop();
    lab.wait_away(&agent);
    let id = order(&lab, &agent, &dirty, &[]);
    lab.tmctl(["task", "cancel", &id]);
    assert_eq!(task(&lab, &id)["state"], "cancelled");
    agent.run();
    lab.wait_connected(&agent);
    lab.scan(&agent, &dirty).expect(10);
    assert!(detections(&lab, &id).is_empty(), "it was never begun");
}

#[test]
fn a_clock_that_is_months_ahead_does_not_empty_the_vault() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let bad = lab.path("bad");
    fs::write(&bad, samples::eicar()).unwrap();
    agent.stop();
    let put = agent.command(&["vault", "put", bad.to_str().unwrap()]).expect(0);
    assert!(!put.out().is_empty());
    let held = || rows(&lab.tmctl(["vault", "list", "-o", "json"]).expect(0).json()).len();
    let control = lab.path("clock");
    fs::write(&control, "+60d").unwrap();
    fs::write(agent.data.join("agent.toml"), "[vault]\nretention = \"30d\"").unwrap();
    agent.run_with_clock(&control);
    lab.wait_connected(&agent);
    wait_for("the manager to hear of the vault", PATIENCE, || (held() == 1).then_some(()));
    agent.stop();
    let list = agent.command(&["vault", "list", "-o", "json"]).expect(0).json();
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    // The control: with a clock that agrees with the manager's, what is too old goes.
    fs::write(agent.data.join("agent.toml"), "[vault]\nretention = \"1s\"").unwrap();
    agent.run();
    lab.wait_connected(&agent);
    wait_for("the vault to be emptied", Duration::from_secs(120), || (held() == 0).then_some(()));
}
