//! Scans ordered by the manager, when rules, files or workers misbehave.

use std::{
    fs,
    io::Write as _,
    os::unix::{ffi::OsStrExt as _, fs::symlink, net::UnixListener},
    path::Path,
    time::Duration,
};

use tm_tests::{Lab, PATIENCE, samples, wait_for};

use crate::paths;

#[test]
fn a_rule_that_does_not_compile_is_refused_with_its_place() {
    let lab = Lab::start();
    let refused = lab.import("broken.yar", samples::BROKEN_RULE).expect(3);
    let said = refused.err();
    assert!(said.contains("3:9"), "line and column of the mistake: {said}");
    let patterns = lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json();
    assert_eq!(patterns.as_array().map(Vec::len), Some(0), "{patterns}");
    lab.import("good.yar", samples::EICAR_RULE).expect(0);
}

#[test]
fn a_rule_cannot_read_the_managers_files() {
    let lab = Lab::start();
    let secret = lab.path("secret.yar");
    fs::write(&secret, "SECRET_OF_THE_MANAGER").unwrap();
    let rule = format!("include \"{}\"\nrule r {{ condition: true }}\n", secret.display());
    let refused = lab.import("include.yar", &rule).expect(3);
    assert!(!refused.both().contains("SECRET_OF_THE_MANAGER"), "{}", refused.both());
    lab.import("control.yar", "rule r { condition: true }").expect(0);
}

#[test]
fn a_rule_that_never_ends_costs_its_file_and_no_other() {
    let lab = Lab::start();
    let agent = lab.agent();
    let rule = "rule slow { condition: uint8(0) == 0x21 and for all i in (0..100000000000) : \
                (for all j in (0..100000000000) : (i + j >= 0)) }";
    lab.import("slow.yar", rule).expect(0);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("slow");
    fs::write(folder.join("endless.bin"), "! this one takes for ever").unwrap();
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    fs::write(folder.join("b.tar.gz"), samples::nested()).unwrap();

    lab.scan_with(&agent, &folder, &["--file-timeout", "1s", "-o", "json"]).expect(10);

    let result = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(result["skipped"]["timeout"], 1, "{result}");
    let skipped = &result["skipped_paths"][0];
    assert_eq!(skipped["reason"], "timeout");
    assert!(skipped["path"].as_str().unwrap().ends_with("/endless.bin"), "{skipped}");
    let expected = ["a.com", "b.tar.gz"].map(|name| folder.join(name).as_os_str().as_bytes().to_vec());
    assert_eq!(paths(&lab.detections(&agent)), expected.into());
}

#[test]
fn a_worker_that_dies_loses_no_file() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    // Costs some work for each file, so that there is a middle of the scan to be unpleasant in.
    lab.import("work.yar", "rule work { condition: for any i in (0..20000) : (uint8(i % 512) == 256) }")
        .expect(0);
    let folder = lab.folder("many");
    let files = 3_000;
    let mut expected = std::collections::BTreeSet::new();
    for n in 0..files {
        let path = folder.join(format!("{n:05}"));
        if n % 100 == 50 {
            fs::write(&path, samples::eicar()).unwrap();
            expected.insert(path.as_os_str().as_bytes().to_vec());
        } else {
            fs::write(&path, vec![b'a'; 1024]).unwrap();
        }
    }
    let scan = lab.scan_in_background(&agent, &folder);
    wait_for("the scan to run", PATIENCE, || {
        lab.newest_task(&agent).filter(|task| task["state"] == "running")
    });
    let killed = wait_for("a worker to be killed", PATIENCE, || {
        let worker = *agent.process().children().first()?;
        agent.process().kill9_child(worker).then_some(worker)
    });
    assert_eq!(lab.newest_task(&agent).unwrap()["state"], "running", "worker {killed} died in mid-scan");

    scan.join().unwrap().expect(10);

    let result = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(result["files"], files, "{result}");
    assert_eq!(result["skipped"].as_object().map_or(0, serde_json::Map::len), 0, "{result}");
    let found = lab.detections(&agent);
    assert_eq!((found.len(), paths(&found)), (expected.len(), expected), "each once");
    assert!(lab.is_connected(&agent), "the agent itself went on");
}

#[test]
fn fifos_sockets_and_links_are_counted_and_hold_nothing_up() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("odd");
    let elsewhere = lab.folder("elsewhere");
    fs::write(elsewhere.join("eicar.com"), samples::eicar()).unwrap();
    fs::write(folder.join("plain"), "harmless").unwrap();
    fifo(&folder.join("fifo"));
    let _socket = UnixListener::bind(folder.join("socket")).unwrap();
    symlink("nowhere", folder.join("dangling")).unwrap();
    symlink("loop", folder.join("loop")).unwrap();
    symlink(".", folder.join("itself")).unwrap();
    symlink(&elsewhere, folder.join("elsewhere")).unwrap();
    symlink(elsewhere.join("eicar.com"), folder.join("eicar.com")).unwrap();

    lab.scan(&agent, &folder).expect(0);
    let result = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(result["verdict"], "clean", "what has no content leaves no gap: {result}");
    assert_eq!(result["files"], 1, "{result}");
    assert_eq!(result["skipped"]["special"], 2, "{result}");
    assert_eq!(result["skipped"]["symlink"], 5, "{result}");

    lab.scan(&agent, &elsewhere).expect(10);
}

fn fifo(path: &Path) {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o644.into(), 0)
        .expect("a fifo can be made");
}

#[test]
fn a_path_that_is_not_there_is_not_called_clean() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let missing = lab.scan(&agent, &lab.path("is-not-there"));
    assert!(![0, 10].contains(&missing.code()), "{}", missing.both());
    let relative = lab.scan(&agent, Path::new("etc/passwd"));
    assert!([2, 3].contains(&relative.code()), "{}", relative.both());
}

#[test]
fn a_file_that_grows_while_it_is_read_does_no_harm() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("busy");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    let path = folder.join("log");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let stop = std::sync::Arc::clone(&stop);
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let mut file = fs::File::create(&path).unwrap();
                for _ in 0..64 {
                    file.write_all(&[b'x'; 4096]).unwrap();
                }
                file.set_len(0).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    for _ in 0..3 {
        lab.scan(&agent, &folder).expect(10);
        assert_eq!(lab.detections(&agent).len(), 1);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
    assert!(lab.is_connected(&agent));
}
