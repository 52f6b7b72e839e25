//! A quick scan finds what runs and what lies where things are dropped, and says the same of it as a whole one.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use tm_tests::standalone::{lines, scan};

const RULE: &str = "rule dropped { strings: $a = \"dropped-quickly-5521\" condition: $a }";

#[test]
fn what_was_dropped_and_what_runs_is_found() {
    let folder = tempfile::Builder::new().prefix("quick-").tempdir_in("/var/tmp").unwrap();
    let dropped = folder.path().join("dropped");
    fs::write(&dropped, "dropped-quickly-5521").unwrap();
    let program = folder.path().join("runs");
    let mut text = fs::read(fs::canonicalize("/bin/sleep").unwrap()).unwrap();
    text.extend_from_slice(b"dropped-quickly-5521");
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut child = Command::new(&program).arg("1000").spawn().unwrap();
    let link = format!("/proc/{}/exe", child.id());
    while fs::read_link(&link).unwrap() != program {
        std::thread::yield_now();
    }
    fs::remove_file(&program).unwrap();
    // Of large files, which it may meet many of here, only the names are of interest.
    let more = ["--quick", "--no-archives", "--max-file-size", "64KiB", "--"];
    let output = scan(RULE, Path::new("/etc/hostname"), &more);
    let _ = child.kill();
    let _ = child.wait();
    let paths: Vec<String> =
        lines(&output, "detection").iter().map(|line| line["path"].as_str().unwrap().to_owned()).collect();
    assert!(paths.contains(&dropped.display().to_string()), "{}", output.out());
    assert!(paths.contains(&link), "a program that is gone from disk and runs: {}", output.out());
}
