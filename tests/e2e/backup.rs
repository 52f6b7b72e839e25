//! `tm-manager backup` and `restore`: a copy of a manager at work, and what happens when it takes its place.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tm_tests::{Agent, Lab, Output, PATIENCE, bin, postgres::Postgres, samples, wait_for};

fn backup(lab: &Lab, name: &str) -> PathBuf {
    let file = lab.path(name);
    manager(&["backup".as_ref(), file.as_ref(), "--data".as_ref(), lab.manager_data().as_ref()]).expect(0);
    file
}

fn manager(args: &[&std::ffi::OsStr]) -> Output {
    Command::new(bin("tm-manager")).args(args).output().expect("programs can be run").into()
}

fn restore(file: &Path, data: &Path, database: &str) -> Output {
    manager(&[
        "restore".as_ref(),
        file.as_ref(),
        "--data".as_ref(),
        data.as_ref(),
        "--database".as_ref(),
        database.as_ref(),
    ])
}

fn task(lab: &Lab, id: &str) -> Value {
    lab.rest(&format!("/v1/tasks/{id}"))
}

/// Orders a scan that waits for its agent; its id.
fn order(lab: &Lab, agent: &Agent, folder: &Path) -> String {
    let path = folder.to_str().expect("a plain name");
    let args = ["scan", "start", &agent.id, "--when-connected", "--path", path, "-o", "json"];
    lab.tmctl(args).expect(0);
    let task = lab.newest_task(agent).expect("it was ordered");
    task["id"].as_str().expect("a task has an id").to_owned()
}

/// Puts what was restored in the place of the lab's manager and starts it.
fn replace(lab: &mut Lab, data: &Path) {
    lab.kill9_manager_for_good();
    fs::rename(lab.manager_data(), lab.path("lost")).expect("folders can be renamed");
    fs::rename(data, lab.manager_data()).expect("folders can be renamed");
    lab.start_manager();
}

#[test]
fn a_manager_restored_from_an_older_copy_learns_what_was_done_since_and_repeats_nothing() {
    let mut lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    // Done before the copy.
    lab.scan(&agent, &folder).expect(10);
    let first = lab.newest_task(&agent).unwrap()["id"].as_str().unwrap().to_owned();
    // Ordered before the copy, done after it.
    agent.stop();
    lab.wait_away(&agent);
    let second = order(&lab, &agent, &folder);
    let file = backup(&lab, "copy");
    agent.run();
    wait_for("the order to be carried out", PATIENCE, || {
        (task(&lab, &second)["state"] == "done").then_some(())
    });
    let done = task(&lab, &second);
    // Ordered and done after it.
    lab.scan(&agent, &folder).expect(10);
    let third = lab.newest_task(&agent).unwrap()["id"].as_str().unwrap().to_owned();
    // Whoever looked again would find nothing now.
    fs::remove_file(folder.join("a.com")).unwrap();

    let data = lab.path("restored");
    let output = manager(&["restore".as_ref(), file.as_ref(), "--data".as_ref(), data.as_ref()]).expect(0);
    assert!(output.out().contains("is a manager as it was at"), "{}", output.both());
    replace(&mut lab, &data);
    assert_eq!(task(&lab, &first)["state"], "done", "what the copy knows is there");
    // The agent comes back, and tells how the task ended that the copy still holds for open.
    wait_for("the outcome to be learnt again", PATIENCE, || {
        (task(&lab, &second)["state"] == "done").then_some(())
    });
    let again = task(&lab, &second);
    assert_eq!(again["result"], done["result"], "the same, down to the signature of its receipt");
    assert!(done["result"]["detections"] == 1 && done["result"]["receipt"]["verified"] == true, "{done}");
    let tasks = lab.rest(&format!("/v1/tasks?endpoint={}&limit=100", agent.id)).to_string();
    assert!(!tasks.contains(&third), "the copy cannot know of it");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    // Work goes on, with the pattern from the copy and a fresh one.
    lab.scan(&agent, &folder).expect(10);
    lab.import("fresh.yar", "rule fresh { strings: $a = \"EICAR-STANDARD\" condition: $a }").expect(0);
    lab.scan(&agent, &folder).expect(10);
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn a_copy_is_whole_and_private_or_refused() {
    let lab = Lab::start();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let file = backup(&lab, "copy");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let args = ["backup".as_ref(), file.as_os_str(), "--data".as_ref(), lab.manager_data().as_os_str()]
        .map(ToOwned::to_owned);
    let output = manager(&args.each_ref().map(AsRef::as_ref));
    assert!(output.expect(1).err().contains("there already"), "nothing is written over");

    let whole = fs::read(&file).unwrap();
    let database = |name: &str| format!("sqlite:{}", lab.path(name).display());
    let refused = |name: &str, bytes: &[u8]| {
        let damaged = lab.path("damaged");
        fs::write(&damaged, bytes).unwrap();
        let data = lab.path(name);
        let output = restore(&damaged, &data, &database(&format!("{name}.db"))).expect(1);
        assert!(output.err().contains("no whole copy"), "{name}: {}", output.both());
        assert!(!data.exists() && !lab.path(&format!("{name}.db")).exists(), "{name}: nothing is made");
    };
    refused("empty", b"");
    refused("other", b"{\"hello\":1}\n");
    for part in 1..20 {
        refused("cut", &whole[..whole.len() * part / 20]);
        let mut changed = whole.clone();
        changed[whole.len() * part / 20] ^= 1;
        refused("changed", &changed);
    }
    refused("longer", &[&whole[..], b"[]\n"].concat());

    // The control; and what is there already is not touched.
    let data = lab.path("restored");
    restore(&file, &data, &database("restored.db")).expect(0);
    assert!(restore(&file, &data, &database("another.db")).expect(1).err().contains("holds a manager"));
    let output = restore(&file, &lab.path("again"), &database("restored.db")).expect(1);
    assert!(output.err().contains("not empty"), "{}", output.both());
    assert!(!lab.path("again/manager.toml").exists());
    for name in ["manager.toml", "admin.toml", "ca/key.der"] {
        let mode = fs::metadata(data.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
        let same = fs::read(data.join(name)).unwrap() == fs::read(lab.manager_data().join(name)).unwrap();
        assert!(same || name == "manager.toml", "{name}");
    }
}

#[test]
fn a_copy_moves_a_manager_from_one_engine_to_the_other() {
    let mut lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    lab.scan(&agent, &folder).expect(10);
    let before = (lab.detections(&agent), lab.rest("/v1/events"));
    let postgres = Postgres::start();
    lab.stop_manager();
    let file = backup(&lab, "copy");
    let data = lab.path("restored");
    restore(&file, &data, &postgres.database("moved")).expect(0);
    replace(&mut lab, &data);
    lab.wait_connected(&agent);
    assert_eq!((lab.detections(&agent), lab.rest("/v1/events")), before);
    lab.scan(&agent, &folder).expect(10);
    lab.tmctl(["audit", "verify"]).expect(0);

    // A copy of PostgreSQL at work, too.
    let file = backup(&lab, "second");
    let data = lab.path("back");
    restore(&file, &data, &format!("sqlite:{}", lab.path("back.db").display())).expect(0);
    replace_again(&mut lab, &data);
    lab.wait_connected(&agent);
    lab.scan(&agent, &folder).expect(10);
    lab.tmctl(["audit", "verify"]).expect(0);
}

fn replace_again(lab: &mut Lab, data: &Path) {
    fs::remove_dir_all(lab.path("lost")).expect("it is there");
    replace(lab, data);
}
