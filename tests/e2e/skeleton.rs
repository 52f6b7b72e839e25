//! The whole chain, from a token to a verdict.

use std::{fs, os::unix::ffi::OsStrExt as _};

use tm_tests::{Lab, output::objects, samples};

use crate::path_and_member;

#[test]
fn an_administrator_enrolls_a_machine_and_finds_what_is_on_it() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    fs::write(folder.join("b.tar.gz"), samples::nested()).unwrap();
    fs::write(folder.join("c.txt"), samples::look_alike()).unwrap();

    let scan = lab.scan(&agent, &folder).expect(10);

    let found = lab.detections(&agent);
    let mut seen: Vec<_> = found.iter().map(path_and_member).collect();
    seen.sort();
    assert_eq!(seen.len(), 2, "{found:#?}");
    assert_eq!(seen[0], (folder.join("a.com").as_os_str().as_bytes().to_vec(), vec![]));
    assert_eq!(seen[1].0, folder.join("b.tar.gz").as_os_str().as_bytes());
    assert!(seen[1].1.ends_with(&["inner.zip".to_owned(), "eicar.com".to_owned()]), "{:?}", seen[1].1);
    for detection in &found {
        assert_eq!(detection["rule"], samples::EICAR_RULE_NAME);
        assert_eq!(detection["pattern"], "eicar.yar");
        assert_eq!(detection["endpoint"], agent.id.as_str());
    }
    let task = lab.newest_task(&agent).unwrap();
    assert_eq!(task["state"], "done");
    assert_eq!(task["result"]["verdict"], "detected");
    assert_eq!(task["result"]["files"], 3);
    assert_eq!(task["result"]["detections"], 2);
    // What --wait prints says the same as the manager's store.
    assert_eq!(objects(&scan.json(), &["rule", "path_b64", "member"]).len(), 2, "{}", scan.both());
}

#[test]
fn a_clean_folder_is_clean_and_a_locked_archive_is_not_called_clean() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let clean = lab.folder("clean");
    fs::write(clean.join("c.txt"), samples::look_alike()).unwrap();
    lab.scan(&agent, &clean).expect(0);
    assert_eq!(lab.newest_task(&agent).unwrap()["result"]["verdict"], "clean");
    assert_eq!(lab.newest_task(&agent).unwrap()["result"]["files"], 1, "it was looked at");

    let locked = lab.folder("locked");
    fs::write(locked.join("secret.zip"), samples::encrypted_zip()).unwrap();
    lab.scan(&agent, &locked).expect(11);
    let result = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(result["verdict"], "incomplete");
    assert_eq!(result["skipped"]["encrypted"], 1);
    assert_eq!(result["skipped_paths"][0]["reason"], "encrypted");
    assert!(result["skipped_paths"][0]["path"].as_str().unwrap().ends_with("/secret.zip"), "{result}");

    // A detection wins over a gap, and the gap stays counted.
    fs::write(locked.join("a.com"), samples::eicar()).unwrap();
    lab.scan(&agent, &locked).expect(10);
    let result = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!((&result["verdict"], &result["skipped"]["encrypted"]), (&"detected".into(), &1.into()));
}

#[test]
fn two_machines_of_one_name_are_told_apart_by_id_and_not_by_luck() {
    let lab = Lab::start();
    let (one, two) = (lab.agent(), lab.agent());
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    let hosts: Vec<_> = lab.endpoints().iter().map(|row| row["host"].as_str().unwrap().to_owned()).collect();
    assert_eq!(hosts[0], hosts[1], "both run on this machine");

    let refused = lab.tmctl(["scan", "start", &hosts[0], "--path", folder.to_str().unwrap(), "--wait"]);
    assert!(![0, 10, 11].contains(&refused.code()), "{}", refused.both());
    for id in [&one.id, &two.id] {
        assert!(refused.err().contains(id.as_str()), "the candidates are listed: {}", refused.both());
    }
    assert!(lab.newest_task(&one).is_none() && lab.newest_task(&two).is_none(), "nothing was ordered");

    lab.scan(&two, &folder).expect(10);
    assert!(lab.newest_task(&one).is_none(), "only the one that was meant");
}

#[test]
fn what_was_ordered_is_on_record_and_a_changed_record_is_noticed() {
    let mut lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    lab.scan(&agent, &lab.folder("empty")).expect(0);
    lab.tmctl(["audit", "verify"]).expect(0);
    let list = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json();
    let records = objects(&list, &["sequence", "actor", "action"]);
    assert!(records.len() >= 3, "token, pattern and scan are on record: {list:#}");

    lab.stop_manager();
    let databases: Vec<_> = fs::read_dir(lab.manager_data())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"SQLite format 3\0")))
        .collect();
    assert_eq!(databases.len(), 1, "{databases:?}");
    let sqlite = std::process::Command::new("sqlite3")
        .arg(&databases[0])
        .arg("UPDATE audit SET actor = 'somebody-else' WHERE sequence = (SELECT MAX(sequence) - 1 FROM audit); \
              SELECT changes();")
        .output()
        .expect("sqlite3 is needed; `cargo xtask test` installs it");
    assert_eq!(String::from_utf8_lossy(&sqlite.stdout).trim(), "1", "{sqlite:?}");
    lab.restart_manager();
    let verify = lab.tmctl(["audit", "verify"]);
    assert_eq!(verify.code(), 1, "{}", verify.both());
}
