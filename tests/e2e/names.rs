//! File names that nobody would type: shown as harmless text, and byte for byte in JSON.

use std::{collections::BTreeSet, ffi::OsStr, fs, os::unix::ffi::OsStrExt as _};

use tm_protocol::text::unescape;
use tm_tests::{Lab, output::objects, samples, standalone};

use crate::paths;

const NAMES: [&[u8]; 9] = [
    b"new\nline",
    b"escape\x1b[2J\x1b]0;title\x07",
    b"not utf-8 \xff\xfe",
    b"carriage\rreturn",
    b"back\\slash\\n",
    b"=HYPERLINK(\"x\")",
    b"\"quote\", comma;semicolon",
    "right to left \u{202e}cod.exe".as_bytes(),
    "c1 \u{9b}31m".as_bytes(),
];

/// Makes a folder of files that are detected, one for each name; their paths.
fn fill(folder: &std::path::Path) -> BTreeSet<Vec<u8>> {
    NAMES
        .iter()
        .map(|name| {
            let path = folder.join(OsStr::from_bytes(name));
            fs::write(&path, samples::eicar()).expect("the folder is writable");
            path.as_os_str().as_bytes().to_vec()
        })
        .collect()
}

/// No control characters but line ends, nothing that reorders text, nothing but UTF-8.
#[track_caller]
fn is_harmless(what: &str, bytes: &[u8]) {
    let text = std::str::from_utf8(bytes).unwrap_or_else(|error| panic!("{what} is not UTF-8: {error}"));
    for (number, line) in text.split('\n').enumerate() {
        let bad = line.chars().find(|c| c.is_control() || ('\u{202a}'..='\u{202e}').contains(c));
        assert_eq!(bad, None, "{what}, line {}: {line:?}", number + 1);
    }
}

#[test]
fn hostile_names_are_text_for_people_and_exact_for_programs() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("names");
    let expected = fill(&folder);

    let json = lab.scan(&agent, &folder).expect(10);
    let found = lab.detections(&agent);
    assert_eq!(found.len(), NAMES.len());
    assert_eq!(paths(&found), expected, "the manager's store");
    let printed = objects(&json.json(), &["rule", "path_b64"]);
    assert_eq!(paths(&printed), expected, "what --wait printed");
    for detection in &found {
        let shown = detection["path"].as_str().unwrap();
        let exact = unescape(shown).expect("shown paths can be read back");
        assert!(expected.contains(&exact), "{shown}");
    }
    is_harmless("json", &json.stdout);

    for more in [&["-o", "table"][..], &["-o", "csv"], &[]] {
        let output = lab.scan_with(&agent, &folder, more).expect(10);
        is_harmless(&format!("stdout {more:?}"), &output.stdout);
        is_harmless(&format!("stderr {more:?}"), &without_returns(&output.stderr));
    }
    let csv = lab.scan_with(&agent, &folder, &["-o", "csv"]).expect(10).out();
    assert!(csv.lines().count() > NAMES.len(), "one record a line, after the heading: {csv}");
    is_harmless("the manager's log", lab.manager().log().as_bytes());
    is_harmless("the agent's log", agent.process().log().as_bytes());
}

/// A progress line that is written over itself is ours: its carriage returns are no names'.
fn without_returns(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| if *byte == b'\r' { b'\n' } else { *byte }).collect()
}

#[test]
fn members_of_archives_are_no_better_than_files() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("members");
    fs::write(folder.join("a.zip"), samples::zip("up/../../\u{1b}[31m\nroot", &samples::eicar())).unwrap();
    lab.scan(&agent, &folder).expect(10);
    let found = lab.detections(&agent);
    assert_eq!(found.len(), 1, "{found:?}");
    let member = found[0]["member"][0].as_str().unwrap();
    assert_eq!(unescape(member).as_deref(), Some("up/../../\u{1b}[31m\nroot".as_bytes()), "{member}");
    assert!(!member.contains(['\n', '\u{1b}']), "{member:?}");
    is_harmless("table", &lab.scan_with(&agent, &folder, &[]).expect(10).stdout);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing was unpacked");
}

#[test]
fn a_scan_without_a_manager_is_as_careful() {
    let folder = tempfile::tempdir().unwrap();
    let expected = fill(folder.path());
    let output = standalone::scan(samples::EICAR_RULE, folder.path(), &[]).expect(1);
    is_harmless("stdout", &output.stdout);
    is_harmless("stderr", &output.stderr);
    let found = standalone::lines(&output, "detection");
    assert_eq!((found.len(), paths(&found)), (NAMES.len(), expected));
    let text = standalone::scan_as("text", samples::EICAR_RULE, folder.path(), &[]).expect(1);
    is_harmless("text", &text.stdout);
}
