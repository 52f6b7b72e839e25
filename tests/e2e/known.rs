//! Files that are known clean are not read again, and never taken for clean once they have changed.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use serde_json::Value;
use tm_tests::{Lab, standalone};

const ONE: &str = "rule one { strings: $a = \"never-to-be-found-4711\" condition: $a }";

/// The summary of a scan with [`ONE`] and other patterns.
fn scan(cache: &Path, others: &[&Path], tree: &Path) -> Value {
    let mut more = vec!["--cache", cache.to_str().expect("a plain path")];
    for pattern in others {
        more.extend(["--pattern", pattern.to_str().expect("a plain path")]);
    }
    let output = standalone::scan(ONE, tree, &more);
    standalone::lines(&output, "summary").pop().unwrap_or_else(|| panic!("no summary: {}", output.out()))
}

#[test]
fn a_second_scan_reads_what_changed_and_a_new_pattern_alone_reads_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let cache = folder.path().join("seen");
    let two = folder.path().join("two.yar");
    fs::write(&two, "rule two { strings: $a = \"never-to-be-found-4712\" condition: $a }").unwrap();
    // Its files were changed long enough ago.
    let tree = Path::new("/usr/share/perl5");
    let first = scan(&cache, &[], tree);
    assert_eq!((&first["verdict"], &first["known"]), (&"clean".into(), &0.into()), "{first}");
    let files = first["files"].as_u64();
    assert!(files > Some(10));
    let second = scan(&cache, &[], tree);
    assert_eq!((second["files"].as_u64(), &second["bytes"]), (files, &first["bytes"]));
    if second["known"] == 0 {
        let kind = Command::new("stat").args(["-f", "-c", "%T"]).arg(tree).output().unwrap().stdout;
        let kind = String::from_utf8_lossy(&kind).trim().to_owned();
        let trusted = ["ext2/ext3", "xfs", "btrfs", "f2fs"];
        assert!(!trusted.contains(&kind.as_str()), "only times that are not to be trusted excuse it: {kind}");
        return;
    }
    assert_eq!(second["known"].as_u64(), files);
    let third = scan(&cache, &[&two], tree);
    assert_eq!((third["known"].as_u64(), third["files"].as_u64()), (Some(0), files));
    let fourth = scan(&cache, &[&two], tree);
    assert_eq!(fourth["known"].as_u64(), files);

    let finds = folder.path().join("finds.yar");
    fs::write(&finds, "rule finds { condition: filesize > 0 }").unwrap();
    let fifth = scan(&cache, &[&two, &finds], tree);
    assert_eq!(fifth["verdict"], "detected", "a new pattern is run over what is known");
    let sixth = scan(&cache, &[&two, &finds], tree);
    assert_eq!(sixth["detections"], fifth["detections"], "what was detected is never known clean");
}

#[test]
fn a_cache_that_others_could_write_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let cache = folder.path().join("seen");
    let output = standalone::scan(ONE, folder.path(), &["--cache", cache.to_str().unwrap()]);
    let output = output.expect(2);
    assert!(output.err().contains("others may write"), "{}", output.err());
    assert!(!cache.exists());
}

#[test]
fn an_ordered_scan_says_how_much_it_did_not_read_again() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("one.yar", ONE).expect(0);
    // Its files were changed long enough ago.
    let tree = Path::new("/usr/share/perl5");
    lab.scan(&agent, tree).expect(0);
    let first = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(first["known"], 0, "{first}");
    let printed = lab.scan(&agent, tree).expect(0);
    let second = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(second["files"], first["files"], "{}", printed.both());
    assert!(second["known"] == second["files"] || second["known"] == 0, "{second}");
    assert_eq!(second["receipt"]["verified"], true, "what was not read is in the signed statement: {second}");
}
