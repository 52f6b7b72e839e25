//! From a detection to a removed file and back: what an administrator orders, and what may happen meanwhile.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use tm_tests::{Agent, Lab, Output, PATIENCE, is_long, output::rows, samples, wait_for};

fn lab_with_rule() -> (Lab, Agent) {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    (lab, agent)
}

/// A folder with `count` files in which something is detected.
fn dirty(lab: &Lab, name: &str, count: usize) -> PathBuf {
    let folder = lab.folder(name);
    for number in 0..count {
        fs::write(folder.join(format!("bad-{number:04}")), samples::eicar()).expect("the lab is writable");
    }
    folder
}

fn clean(lab: &Lab, agent: &Agent, more: &[&str]) -> Output {
    let mut args = vec!["cleanup", "run", agent.id.as_str(), "--wait", "-o", "json"];
    args.extend(more);
    lab.tmctl(args)
}

/// The items of a cleanup or restore that was waited for.
fn items(output: &Output) -> Vec<Value> {
    let report = output.json();
    let tasks = report["tasks"].as_array().expect("a report has tasks").clone();
    tasks.iter().flat_map(|task| rows(&task["items"])).collect()
}

/// The one item; its verdict, and the code of its failure.
fn only(output: &Output) -> (String, Option<String>) {
    let items = items(output);
    assert_eq!(items.len(), 1, "{}", output.both());
    let text = |value: &Value| value.as_str().map(str::to_owned);
    (text(&items[0]["verdict"]).expect("an item has a verdict"), text(&items[0]["failure"]["code"]))
}

fn vault(lab: &Lab) -> Vec<Value> {
    rows(&lab.tmctl(["vault", "list", "-o", "json"]).expect(0).json())
}

fn count_of(lab: &Lab, query: &str) -> u64 {
    let status = lab.tmctl(["status", "-o", "json"]).expect(0).json();
    let queries = status["queries"].as_array().expect("the overview has queries");
    let one = queries.iter().find(|one| one["name"] == query).expect("the query exists");
    one["count"].as_u64().expect("a count is a number")
}

fn statuses(lab: &Lab, agent: &Agent, kind: &str) -> Vec<String> {
    let events = rows(&lab.tmctl(["endpoint", "events", &agent.id, "-o", "json"]).expect(0).json());
    let of_kind = events.iter().filter(|event| event["kind"] == kind);
    of_kind.map(|event| event["status"].as_str().expect("an event has a status").to_owned()).collect()
}

#[test]
fn what_is_detected_is_removed_and_brought_back() {
    let (lab, agent) = lab_with_rule();
    let folder = dirty(&lab, "dirty", 3);
    fs::write(folder.join("good"), "good").unwrap();
    lab.scan(&agent, &folder).expect(10);
    assert_eq!(count_of(&lab, "needs-cleanup"), 1);
    let listed = lab.tmctl(["endpoint", "list", "--query", "needs-cleanup", "-o", "json"]).expect(0).json();
    assert_eq!(rows(&listed)[0]["id"], agent.id.as_str());

    let planned = clean(&lab, &agent, &["--dry-run"]).expect(0);
    assert!(items(&planned).iter().all(|item| item["verdict"] == "would-vault"), "{}", planned.both());
    assert_eq!((fs::read_dir(&folder).unwrap().count(), vault(&lab).len()), (4, 0), "nothing was changed");
    assert_eq!(count_of(&lab, "needs-cleanup"), 1);

    let done = clean(&lab, &agent, &[]).expect(0);
    assert_eq!(items(&done).len(), 3);
    let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["good"]);
    lab.scan(&agent, &folder).expect(0);
    assert_eq!((count_of(&lab, "needs-cleanup"), count_of(&lab, "unresolved")), (0, 0));
    assert_eq!(statuses(&lab, &agent, "cleanup").last().unwrap(), "resolved");

    let held = vault(&lab);
    assert_eq!(held.len(), 3);
    let ids: Vec<&str> = held.iter().map(|item| item["id"].as_str().unwrap()).collect();
    lab.tmctl([&["vault", "restore", "--wait"], &ids[..]].concat()).expect(0);
    for number in 0..3 {
        assert_eq!(fs::read(folder.join(format!("bad-{number:04}"))).unwrap(), samples::eicar());
    }
    assert!(vault(&lab).is_empty());
    assert_eq!(statuses(&lab, &agent, "restore").last().unwrap(), "rolled-back");
    // What is back is found again.
    lab.scan(&agent, &folder).expect(10);
    assert_eq!(count_of(&lab, "needs-cleanup"), 1);
    lab.tmctl(["why", &agent.id]).expect(0);
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn a_container_is_taken_whole_and_says_so() {
    let (lab, agent) = lab_with_rule();
    let folder = lab.folder("dirty");
    let archive = samples::zip("inner.com", &samples::eicar());
    fs::write(folder.join("mail.zip"), &archive).unwrap();
    lab.scan(&agent, &folder).expect(10);
    let done = clean(&lab, &agent, &[]).expect(0);
    let items = items(&done);
    assert_eq!(items.len(), 1);
    let notes = items[0]["notes"].as_array().unwrap();
    let note = notes.iter().find(|note| note["code"] == "container").expect("it says so");
    assert!(note["message"].as_str().unwrap().contains("inner.com"), "{note}");
    let id = vault(&lab)[0]["id"].as_str().unwrap().to_owned();
    let copy = lab.path("copy.zip");
    lab.tmctl(["vault", "restore", &id, "--to", copy.to_str().unwrap(), "--wait"]).expect(0);
    assert_eq!(fs::read(copy).unwrap(), archive);
}

#[test]
fn what_changed_since_it_was_detected_is_left_alone() {
    let (lab, agent) = lab_with_rule();
    let protected = lab.folder("protected");
    fs::write(protected.join("bad-0000"), "somebody else's").unwrap();
    let other = lab.path("other");
    fs::write(&other, "innocent").unwrap();
    type Change = fn(&Path, &Path, &Path);
    type Expected = (&'static str, Option<&'static str>);
    let changes: [(&str, Change, Expected); 8] = [
        ("gone", |bad, _, _| fs::remove_file(bad).unwrap(), ("gone", None)),
        ("rewritten", |bad, _, _| fs::write(bad, "innocent now").unwrap(), ("refused", Some("changed"))),
        ("truncated", |bad, _, _| fs::write(bad, "").unwrap(), ("refused", Some("changed"))),
        (
            "replaced",
            |bad, other, _| {
                fs::remove_file(bad).unwrap();
                fs::copy(other, bad).unwrap();
            },
            ("refused", Some("changed")),
        ),
        (
            "linked",
            |bad, other, _| {
                fs::remove_file(bad).unwrap();
                symlink(other, bad).unwrap();
            },
            ("refused", Some("changed")),
        ),
        (
            "hard-linked",
            |bad, other, _| {
                fs::remove_file(bad).unwrap();
                fs::hard_link(other, bad).unwrap();
            },
            ("refused", Some("changed")),
        ),
        (
            "a folder",
            |bad, _, _| {
                fs::remove_file(bad).unwrap();
                fs::create_dir(bad).unwrap();
            },
            ("refused", Some("changed")),
        ),
        (
            "its folder a link",
            |bad, _, protected| {
                let folder = bad.parent().unwrap();
                fs::rename(folder, folder.with_extension("moved")).unwrap();
                symlink(protected, folder).unwrap();
            },
            ("refused", Some("changed")),
        ),
    ];
    for (at, (name, change, expected)) in changes.into_iter().enumerate() {
        let folder = dirty(&lab, &format!("dirty-{at}"), 1);
        let bad = folder.join("bad-0000");
        lab.scan(&agent, &folder).expect(10);
        let key = lab.detections(&agent)[0]["key"].as_str().unwrap().to_owned();
        change(&bad, &other, &protected);
        let done = clean(&lab, &agent, &["--detection", &key]);
        let (verdict, code) = only(&done);
        assert_eq!(verdict, expected.0, "{name}: {}", done.both());
        if let Some(expected) = expected.1 {
            // Refused for what it is now: changed, or no file, or not to be reached without a link.
            let code = code.expect("a refusal has a code");
            let fits = code == expected
                || ["symlink", "not-regular", "no-parent", "link-on-the-way"].contains(&code.as_str());
            assert!(fits, "{name}: {code}: {}", done.both());
            assert_eq!(done.code(), 3, "{name}: {}", done.both());
        }
        assert_eq!(fs::read(protected.join("bad-0000")).unwrap(), b"somebody else's", "{name}");
        assert_eq!(fs::read(&other).unwrap(), b"innocent", "{name}");
    }
    assert!(vault(&lab).is_empty(), "nothing was taken");
}

#[test]
fn other_names_of_a_file_and_an_immutable_one() {
    let (lab, agent) = lab_with_rule();
    let folder = dirty(&lab, "dirty", 2);
    let second = lab.path("second name");
    fs::hard_link(folder.join("bad-0000"), &second).unwrap();
    lab.scan(&agent, &folder).expect(10);
    let immutable = folder.join("bad-0001");
    let set = Command::new("chattr").arg("+i").arg(&immutable).status();
    let is_set = set.is_ok_and(|status| status.success());
    let done = clean(&lab, &agent, &[]);
    let _ = Command::new("chattr").arg("-i").arg(&immutable).status();
    let done = done.expect(0);
    let items = items(&done);
    let first = items.iter().find(|item| item["path"].as_str().unwrap().ends_with("bad-0000")).unwrap();
    let codes: Vec<&str> =
        first["notes"].as_array().unwrap().iter().map(|note| note["code"].as_str().unwrap()).collect();
    assert!(codes.contains(&"other-links"), "{first}");
    assert!(second.exists(), "the other name is not touched");
    assert!(!immutable.exists(), "an immutable file is taken (the flag was set: {is_set})");
}

/// Rules that match programs of this system by their digests.
fn rule_for(paths: &[&str]) -> String {
    let mut conditions = Vec::new();
    for path in paths {
        let bytes = fs::read(path).expect("every system has it");
        let digest = tm_protocol::ids::Sha256::of(&bytes);
        conditions.push(format!("hash.sha256(0, filesize) == \"{digest}\""));
    }
    format!("import \"hash\"\nrule false_positive {{ condition: {} }}", conditions.join(" or "))
}

#[test]
fn the_systems_own_programs_stay_whatever_a_pattern_says() {
    let (lab, agent) = lab_with_rule();
    let before: Vec<Vec<u8>> = ["/bin/sh", "/usr/bin/env"].map(|path| fs::read(path).unwrap()).into();
    lab.import("bad.yar", &rule_for(&["/bin/sh", "/usr/bin/env"])).expect(0);
    let shell = fs::canonicalize("/bin/sh").unwrap();
    for path in [shell.as_path(), Path::new("/usr/bin/env")] {
        lab.scan_with(&agent, path, &["-o", "json", "--pattern", "bad.yar"]).expect(10);
    }
    let done = clean(&lab, &agent, &[]).expect(3);
    let items = items(&done);
    assert_eq!(items.len(), 2, "{}", done.both());
    for item in &items {
        assert_eq!(item["verdict"], "refused");
        let is_shell = item["path"].as_str().unwrap() == shell.to_str().unwrap();
        let code = item["failure"]["code"].as_str().unwrap();
        assert_eq!(code, if is_shell { "critical-file" } else { "likely-false-positive" }, "{item}");
    }
    for (path, bytes) in ["/bin/sh", "/usr/bin/env"].iter().zip(before) {
        assert_eq!(fs::read(path).unwrap(), bytes);
    }
    assert_eq!(count_of(&lab, "unresolved"), 1);
}

#[test]
fn an_agent_removes_only_what_it_noted_itself() {
    let (lab, mut agent) = lab_with_rule();
    let folder = dirty(&lab, "dirty", 1);
    lab.scan(&agent, &folder).expect(10);
    // A detection that never was is refused by the manager …
    let never = "ab".repeat(32);
    let args = ["cleanup", "run", &agent.id, "--detection", &never, "--wait"];
    assert_ne!(lab.tmctl(args).code(), 0);
    // … and what only the manager speaks of, by the agent.
    agent.stop();
    fs::remove_dir_all(agent.data.join("journal")).unwrap();
    agent.run();
    lab.wait_connected(&agent);
    let done = clean(&lab, &agent, &[]).expect(3);
    assert_eq!(only(&done), ("refused".to_owned(), Some("not-detected-here".to_owned())));
    assert!(folder.join("bad-0000").exists());
}

#[test]
fn something_that_puts_the_file_back_is_noticed() {
    let (lab, agent) = lab_with_rule();
    let folder = dirty(&lab, "dirty", 1);
    let bad = folder.join("bad-0000");
    lab.scan(&agent, &folder).expect(10);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                if !bad.exists() {
                    let _ = fs::write(&bad, samples::eicar());
                }
            }
        });
        let done = clean(&lab, &agent, &[]);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        done
    });
    let (verdict, code) = only(&done);
    // The watcher may be slower than the agent's look; then the removal was true when it was told.
    if verdict == "failed" {
        assert_eq!(code.as_deref(), Some("came-back"), "{}", done.both());
        assert_eq!(count_of(&lab, "unresolved"), 1);
    } else {
        assert_eq!(verdict, "vaulted", "{}", done.both());
    }
    assert_eq!(vault(&lab).len(), 1, "what was taken is in the vault either way");
}

#[test]
fn a_cleanup_survives_an_agent_that_is_killed_in_the_middle() {
    let (mut lab, mut agent) = lab_with_rule();
    let (files, kills) = if is_long() { (900, 40) } else { (300, 6) };
    let folder = dirty(&lab, "dirty", files);
    lab.scan(&agent, &folder).expect(10);
    let args = ["cleanup", "run", &agent.id, "-o", "json"];
    let made = lab.tmctl(args).expect(0).json();
    let id = rows(&made)[0]["id"].as_str().unwrap().to_owned();
    for kill in 0..kills {
        let before = fs::read_dir(&folder).unwrap().count();
        if before > 0 {
            // In the midst of it: some more files are gone than before.
            wait_for("the cleanup to go on", PATIENCE, || {
                (fs::read_dir(&folder).unwrap().count() < before || is_over(&lab, &id)).then_some(())
            });
        }
        if kill % 3 == 2 {
            lab.kill9_manager();
        } else {
            agent.kill9();
            agent.run();
        }
    }
    wait_for("the cleanup to end", Duration::from_secs(240), || is_over(&lab, &id).then_some(()));
    let task = lab.rest(&format!("/v1/tasks/{id}"));
    // Begun too often, it says so and what is left is still there; a new order ends it.
    if task["state"] != "done" {
        assert_eq!(task["code"], "interrupted", "{task}");
        lab.wait_connected(&agent);
        clean(&lab, &agent, &[]).expect(0);
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "{task}");
    wait_for("the list of the vault", PATIENCE, || (vault(&lab).len() == files).then_some(()));
    let paths: BTreeSet<String> =
        vault(&lab).iter().map(|item| item["path"].as_str().unwrap().to_owned()).collect();
    assert_eq!(paths.len(), files, "each is there once");
    let here = agent.command(&["vault", "list", "-o", "json"]).expect(0).json();
    assert_eq!(here.as_array().unwrap().len(), files);
    // Each of them can be brought back.
    let ids: Vec<String> = vault(&lab).iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect();
    lab.wait_connected(&agent);
    let mut args = vec!["vault", "restore", "--wait"];
    args.extend(ids.iter().map(String::as_str));
    lab.tmctl(args).expect(0);
    for entry in fs::read_dir(&folder).unwrap() {
        assert_eq!(fs::read(entry.unwrap().path()).unwrap(), samples::eicar());
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), files);
}

fn is_over(lab: &Lab, id: &str) -> bool {
    let task = lab.rest(&format!("/v1/tasks/{id}"));
    !matches!(task["state"].as_str(), Some("queued" | "delivered" | "running"))
}

#[test]
fn a_cleanup_that_is_called_off_keeps_what_it_took() {
    let (lab, agent) = lab_with_rule();
    let files = 1000;
    let folder = dirty(&lab, "dirty", files);
    lab.scan(&agent, &folder).expect(10);
    let made = lab.tmctl(["cleanup", "run", &agent.id, "-o", "json"]).expect(0).json();
    let id = rows(&made)[0]["id"].as_str().unwrap().to_owned();
    wait_for("the first files to be taken", PATIENCE, || {
        (fs::read_dir(&folder).unwrap().count() < files).then_some(())
    });
    let before = std::time::Instant::now();
    lab.tmctl(["task", "cancel", &id, "--wait"]);
    let took = before.elapsed();
    let task = lab.rest(&format!("/v1/tasks/{id}"));
    let left = fs::read_dir(&folder).unwrap().count();
    assert_eq!(task["state"], "cancelled", "{task}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(task["result"]["done"].as_u64().unwrap(), u64::try_from(files - left).unwrap(), "{task}");
    assert_eq!(task["result"]["left"].as_u64().unwrap(), u64::try_from(left).unwrap(), "{task}");
    assert!(left > 0, "control: it was called off in the middle");
    wait_for("the vault's list", PATIENCE, || (vault(&lab).len() == files - left).then_some(()));
    lab.wait_connected(&agent);
    // The rest waits for a person again, and is removed by the next order.
    assert_eq!(count_of(&lab, "needs-cleanup") + count_of(&lab, "unresolved"), 1);
    clean(&lab, &agent, &[]).expect(0);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn names_are_exact_bytes_all_the_way() {
    let (lab, agent) = lab_with_rule();
    let folder = lab.folder("dirty");
    let name = std::ffi::OsStr::from_bytes(b"bad \xff\n\x1b[31m.com");
    fs::write(folder.join(name), samples::eicar()).unwrap();
    lab.scan(&agent, &folder).expect(10);
    let table = lab.tmctl(["cleanup", "run", &agent.id, "--wait"]).expect(0);
    assert!(!table.out().contains('\u{1b}') && !table.err().contains('\u{1b}'), "{}", table.both());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    let held = vault(&lab);
    lab.tmctl(["vault", "restore", held[0]["id"].as_str().unwrap(), "--wait"]).expect(0);
    assert_eq!(fs::read(folder.join(name)).unwrap(), samples::eicar());
}
