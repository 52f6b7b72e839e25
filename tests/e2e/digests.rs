//! Digest lists: files and members found by what they hash to, standalone and through the manager.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tm_protocol::ids::Sha256;
use tm_tests::{Lab, Output, bin, samples, standalone};

use crate::path_and_member;

/// Digests of [`samples::eicar`].
const MD5: &str = "44d88612fea8a8f36de82e1278abb02f";
const SHA1: &str = "3395856ce81f2b7382dee72602f798b642f14140";

fn sha256() -> String {
    Sha256::of(&samples::eicar()).to_string()
}

/// What MISP exports, with a line that was broken on its way.
fn misp() -> String {
    let zeros = "0".repeat(32);
    format!(
        "uuid,event_id,category,type,value,comment,to_ids,date\r\n\
         \"5e6a2f10-7c1c-4f2a-9d5e-4a3c950d2101\",12,\"Payload delivery\",\"md5\",\"{zeros}\",\"\",1,20240101\r\n\
         \"5e6a2f10-7c1c-4f2a-9d5e-4a3c950d2102\",12,\"Payload delivery\",\"sha256\",\"275a021b\",\"cut off\",1,20240101\r\n\
         \"5e6a2f10-7c1c-4f2a-9d5e-4a3c950d2103\",12,\"Payload delivery\",\"filename|sha256\",\"dropper.exe|{}\",\"\",1,20240101\r\n",
        sha256()
    )
}

/// A folder with a bad file, a good one, and a zip that holds the bad one.
fn tree() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folders work");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    fs::write(folder.path().join("bad.com"), samples::eicar()).expect("it is writable");
    fs::write(folder.path().join("good.txt"), "harmless").expect("it is writable");
    let zip = samples::zip("inner.com", &samples::eicar());
    fs::write(folder.path().join("packed.zip"), zip).expect("it is writable");
    folder
}

/// Name of the file, member and rule of each detection, in order.
fn found(detections: &[Value]) -> Vec<(String, Vec<String>, String)> {
    let mut found: Vec<_> = detections
        .iter()
        .map(|detection| {
            let (path, member) = path_and_member(detection);
            let path = String::from_utf8_lossy(&path).into_owned();
            let name = path.rsplit('/').next().unwrap_or_default().to_owned();
            (name, member, detection["rule"].as_str().unwrap_or_default().to_owned())
        })
        .collect();
    found.sort();
    found
}

fn both(rule: &str) -> Vec<(String, Vec<String>, String)> {
    vec![
        ("bad.com".to_owned(), vec![], rule.to_owned()),
        ("packed.zip".to_owned(), vec!["inner.com".to_owned()], rule.to_owned()),
    ]
}

fn agent(args: &[&OsStr]) -> Output {
    Command::new(bin("tm-agent")).args(args).output().expect("programs can be run").into()
}

fn check(file: &Path) -> Output {
    agent(&["pattern".as_ref(), "check".as_ref(), file.as_os_str()])
}

fn import(lab: &Lab, name: &str, bytes: &[u8]) -> Output {
    let file = lab.path(name);
    fs::write(&file, bytes).expect("the lab's folder is writable");
    lab.tmctl([OsStr::new("pattern"), OsStr::new("import"), file.as_os_str()])
}

#[test]
fn a_person_at_the_endpoint_scans_with_whatever_list_there_is() {
    let tree = tree();
    for (list, rule) in [
        (sha256(), format!("sha256:{}", sha256())),
        (format!("# bad files\n{}\n", SHA1.to_uppercase()), format!("sha1:{SHA1}")),
        (format!("{MD5} *eicar.com\n"), "eicar.com".to_owned()),
        (format!("name;family,sha1\n\"Test, harmless\",{SHA1}\n"), "Test, harmless".to_owned()),
        (misp(), "dropper.exe".to_owned()),
        (format!("{MD5}:68:Eicar.Test-1\n"), "Eicar.Test-1".to_owned()),
        (format!("{}:*:Eicar.Test-2:73\n", sha256()), "Eicar.Test-2".to_owned()),
    ] {
        let output = standalone::scan(&list, tree.path(), &[]).expect(1);
        assert_eq!(found(&standalone::lines(&output, "detection")), both(&rule), "{list}");
        let summary = standalone::lines(&output, "summary").pop().expect("there is one");
        assert_eq!((&summary["files"], &summary["verdict"]), (&3.into(), &"detected".into()), "{list}");
        let detection = &standalone::lines(&output, "detection")[0];
        assert_eq!(detection["sha256"].as_str().map(str::len), Some(64));
    }
    // What is in no list is clean, and looked at: a size that differs, another digest.
    for list in [format!("{MD5}:69:Eicar\n"), format!("{}\n", "0a".repeat(20))] {
        let output = standalone::scan(&list, tree.path(), &[]).expect(0);
        let summary = standalone::lines(&output, "summary").pop().expect("there is one");
        assert_eq!((&summary["files"], &summary["verdict"]), (&3.into(), &"clean".into()), "{list}");
    }
    // The digest of nothing is that of every empty file and of no other one.
    fs::write(tree.path().join("empty"), b"").expect("it is writable");
    let empty = Sha256::of(b"").to_string();
    let output = standalone::scan(&empty, tree.path(), &[]).expect(1);
    let hits = found(&standalone::lines(&output, "detection"));
    assert_eq!(hits, [("empty".to_owned(), vec![], format!("sha256:{empty}"))]);
}

#[test]
fn lists_and_rules_are_used_together() {
    let tree = tree();
    let list = tree.path().join("list.hsb");
    fs::write(&list, format!("{}:68:By.Digest\n", sha256())).expect("it is writable");
    let more = ["--pattern", list.to_str().expect("a plain path")];
    let output = standalone::scan(samples::EICAR_RULE, tree.path(), &more).expect(1);
    let hits = found(&standalone::lines(&output, "detection"));
    assert_eq!(hits.len(), 4, "both files by both: {hits:?}");
    assert_eq!(hits.iter().filter(|(_, _, rule)| rule == "By.Digest").count(), 2, "{hits:?}");
}

#[test]
fn a_list_is_checked_and_its_junk_named_by_line() {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let file = folder.path().join("list.csv");
    fs::write(&file, misp()).expect("it is writable");
    let said = check(&file).expect(0).out();
    assert!(said.contains("list.csv:3: warning: there is no digest in this line"), "{said}");
    assert!(said.ends_with("list.csv: digest list, 1 SHA-256, 1 MD5\n"), "{said}");

    let lines = format!("{}{}", "junk\n".repeat(15), format!("{MD5}\n").repeat(20));
    fs::write(&file, &lines).expect("it is writable");
    let said = check(&file).expect(0).out();
    assert_eq!(said.lines().filter(|line| line.contains("no digest in this line")).count(), 10, "{said}");
    assert!(said.contains("list.csv:10: ") && !said.contains("list.csv:11: "), "{said}");
    assert!(
        said.contains("list.csv: warning: there is none in 5 more lines") && said.contains("1 MD5\n"),
        "{said}"
    );
    let scanned = standalone::scan(&lines, folder.path(), &[]).expect(0);
    assert!(scanned.err().contains(":1: there is no digest in this line"), "{}", scanned.err());

    fs::write(&file, format!("{}{MD5}\n", "junk\n".repeat(15))).expect("it is writable");
    let said = check(&file).expect(1).both();
    assert!(said.contains("15 lines hold no digest and only 1 do"), "{said}");
}

#[test]
fn digests_of_large_files_are_computed_and_rules_are_not_run_on_them() {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let content = b"large and bad ".repeat(200_000);
    fs::write(folder.path().join("large"), &content).expect("it is writable");
    let limit = ["--max-file-size", "1MiB"];
    let list = format!("{} Large.Bad\n", Sha256::of(&content));
    let output = standalone::scan(&list, folder.path(), &limit).expect(1);
    let hits = found(&standalone::lines(&output, "detection"));
    assert_eq!(hits, [("large".to_owned(), vec![], "Large.Bad".to_owned())]);
    assert_eq!(standalone::lines(&output, "skipped").len(), 0, "{}", output.out());

    let other = format!("{}\n", "0b".repeat(32));
    let output = standalone::scan(&other, folder.path(), &limit).expect(0);
    let summary = standalone::lines(&output, "summary").pop().expect("there is one");
    assert_eq!((&summary["files"], &summary["bytes"]), (&1.into(), &content.len().into()));
    // With rules it is a gap, by whatever else it was looked at.
    let list = folder.path().join("list");
    fs::write(&list, other).expect("it is writable");
    let more = ["--pattern", list.to_str().expect("a plain path"), limit[0], limit[1]];
    let output = standalone::scan(samples::EICAR_RULE, &folder.path().join("large"), &more).expect(2);
    assert_eq!(standalone::lines(&output, "skipped")[0]["reason"], "limit");
    // So are the members of an archive that is too large, by a list alone.
    let zip = samples::zip("inner", &content);
    fs::write(folder.path().join("large.zip"), &zip).expect("it is writable");
    let limit = ["--max-file-size", "1000"];
    let output = standalone::scan(&"0b".repeat(32), &folder.path().join("large.zip"), &limit).expect(2);
    assert_eq!(standalone::lines(&output, "skipped")[0]["reason"], "limit");
}

#[test]
fn a_list_is_imported_once_and_scanned_with_through_the_manager() {
    let lab = Lab::start();
    let agent = lab.agent();
    let imported = import(&lab, "misp.csv", misp().as_bytes()).expect(0);
    assert!(imported.err().contains("misp.csv:3: there is no digest in this line"), "{}", imported.err());
    assert!(imported.out().contains("1 SHA-256, 1 MD5"), "{}", imported.out());

    let patterns = lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json();
    let pattern = patterns[0].clone();
    assert_eq!((&pattern["kind"], &pattern["rules"]), (&"detection".into(), &0.into()), "{pattern}");
    assert_eq!(pattern["digests"], serde_json::json!({ "md5": 1, "sha1": 0, "sha256": 1 }));
    let listed = lab.tmctl(["pattern", "list"]).expect(0).out();
    assert!(listed.contains("1 SHA-256, 1 MD5"), "{listed}");

    // The same entries otherwise written are the same pattern.
    let again = format!("{} dropper.exe\n{}\n", sha256(), "0".repeat(32));
    import(&lab, "misp.csv", again.as_bytes()).expect(0);
    let refused = import(&lab, "other.txt", again.as_bytes()).expect(3);
    assert!(refused.err().contains("misp.csv"), "{}", refused.err());
    let patterns = lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json();
    assert_eq!(patterns.as_array().map(Vec::len), Some(1), "{patterns}");
    assert_eq!(patterns[0]["sha256"], pattern["sha256"]);

    let tree = tree();
    lab.scan_with(&agent, tree.path(), &["--pattern", "misp.csv", "-o", "json"]).expect(10);
    assert_eq!(found(&lab.detections(&agent)), both("dropper.exe"));
    let task = lab.newest_task(&agent).expect("there is one");
    assert_eq!(task["result"]["files"], 3, "{task}");
    assert_eq!(lab.detections(&agent)[0]["pattern"], "misp.csv");

    // With another list beside, by size; the first is not fetched again.
    import(&lab, "av.hdb", format!("{MD5}:68:Eicar.Test\n").as_bytes()).expect(0);
    lab.scan(&agent, tree.path()).expect(10);
    let mut expected = [both("dropper.exe"), both("Eicar.Test")].concat();
    expected.sort();
    assert_eq!(found(&lab.detections(&agent)), expected);
}

/// The compiled bytes of the one pattern that the manager has.
fn compiled(lab: &Lab) -> Vec<u8> {
    let patterns = lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json();
    let sha256 = patterns[0]["sha256"].as_str().expect("it has a digest").to_owned();
    let path: PathBuf = lab.manager_data().join("patterns").join(sha256);
    fs::read(path).expect("the manager keeps it")
}

#[test]
fn hostile_compiled_lists_are_refused_and_harm_nobody() {
    let lab = Lab::start();
    import(&lab, "list.txt", format!("{}\n{MD5}:68:x\n{SHA1}\n", sha256()).as_bytes()).expect(0);
    let good = compiled(&lab);
    import(&lab, "list.txt", &good).expect(0);
    let patterns = lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json();
    assert_eq!(patterns.as_array().map(Vec::len), Some(1), "what was compiled is the same: {patterns}");

    let sealed = |mut bytes: Vec<u8>| {
        let body = bytes.len() - 32;
        let digest = Sha256::of(&bytes[..body]);
        bytes[body..].copy_from_slice(digest.as_bytes());
        bytes
    };
    let forged = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at..at + 8].fill(value);
        sealed(bytes)
    };
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let hostile = [
        good[..good.len() - 1].to_vec(),
        good[..40].to_vec(),
        good[..16].to_vec(),
        [good.clone(), vec![0]].concat(),
        flipped,
        // Length, names, their text, entries, flags, sizes, the filter's segments and its length.
        forged(16, 0xff),
        forged(24, 0xff),
        forged(32, 0x7f),
        forged(40, 0xff),
        forged(40, 0x7f),
        forged(48, 0xff),
        forged(56, 0x0f),
        forged(80, 0xff),
        forged(88, 0xff),
        b"\x89tm-digests\r\n\0\x02\0and so on".to_vec(),
    ];
    for (number, bytes) in hostile.iter().enumerate() {
        let file = lab.path("hostile");
        fs::write(&file, bytes).expect("the lab's folder is writable");
        let said = check(&file).expect(1).err();
        assert!(said.contains("digest list"), "{number}: {said}");
        let refused = import(&lab, "hostile", bytes).expect(3).err();
        assert!(refused.contains("digest list"), "{number}: {refused}");
        let args = ["scan", "--standalone", "--pattern"].map(OsStr::new);
        let scanned = agent(&[&args[..], &[file.as_os_str(), OsStr::new("/etc/hostname")]].concat());
        assert_eq!(scanned.code(), 2, "{number}: {}", scanned.both());
    }
    import(&lab, "after.txt", "0c".repeat(16).as_bytes()).expect(0);
}

#[test]
fn a_file_that_is_known_clean_is_looked_up_in_a_new_list() {
    let folder = tempfile::tempdir().expect("temporary folders work");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).expect("it is ours");
    let cache = folder.path().join("seen");
    let cached = ["--cache", cache.to_str().expect("a plain path")];
    // Its files were changed long enough ago.
    let tree = Path::new("/usr/share/perl5");
    let first = "0d".repeat(32);
    let scan = |list: &str, more: &[&str], code| {
        let more = [&cached[..], more].concat();
        let output = standalone::scan(list, tree, &more).expect(code);
        let summary = standalone::lines(&output, "summary").pop().expect("there is one");
        (summary, found(&standalone::lines(&output, "detection")))
    };
    let (summary, _) = scan(&first, &[], 0);
    assert_eq!(summary["known"], 0);
    let (again, _) = scan(&first, &[], 0);
    assert_eq!(again["files"], summary["files"]);
    let file = walk(tree).expect("there is a file in it");
    let bad = Sha256::of(&fs::read(&file).expect("it is readable")).to_string();
    let new = folder.path().join("new");
    fs::write(&new, format!("{bad} Now.Bad\n")).expect("it is writable");
    let (_, hits) = scan(&first, &["--pattern", new.to_str().expect("a plain path")], 1);
    assert!(hits.iter().any(|(_, _, rule)| rule == "Now.Bad"), "{hits:?}");
}

/// Some plain file with content below a folder.
fn walk(folder: &Path) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).ok()?.filter_map(Result::ok).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    entries.into_iter().find_map(|entry| {
        let kind = entry.file_type().ok()?;
        if kind.is_dir() {
            walk(&entry.path())
        } else {
            (kind.is_file() && entry.metadata().ok()?.len() > 0).then(|| entry.path())
        }
    })
}
