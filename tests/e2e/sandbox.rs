//! The scan worker's sandbox, as it is told: `tm-agent doctor`, the standalone scan, and a kernel that lacks a
//! part of it (strace refuses the call that asks for it).

use std::{
    fs,
    process::{Command, Stdio},
};

use serde_json::Value;
use tm_tests::{Output, bin, samples, standalone};

/// Runs `tm-agent` with a rule of strace for it and all its workers, or as it is.
fn agent(rule: Option<&str>, args: &[&str]) -> Output {
    let mut command = match rule {
        Some(rule) => {
            let mut strace = Command::new("strace");
            strace
                .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("inject={rule}")])
                .arg(bin("tm-agent"));
            strace
        }
        None => Command::new(bin("tm-agent")),
    };
    command.args(args).stdin(Stdio::null()).output().expect("programs can be run").into()
}

fn states(output: &Output) -> (bool, Vec<(String, String, String)>) {
    let report: Value = serde_json::from_str(&output.out()).expect("it is one JSON object");
    let text = |part: &Value, key: &str| part[key].as_str().expect("every part has it").to_owned();
    let parts = report["parts"].as_array().expect("parts are listed").iter();
    let parts = parts.map(|part| (text(part, "part"), text(part, "state"), text(part, "detail"))).collect();
    (report["ok"].as_bool().expect("it says whether all is well"), parts)
}

/// The call that strace refuses, the parts that are then missing, and what the reason says.
const LACKS: [(&str, &[&str], &str); 4] = [
    ("landlock_create_ruleset:error=ENOSYS", &["landlock-files", "landlock-network"], "not in this kernel"),
    ("landlock_create_ruleset:error=EOPNOTSUPP", &["landlock-files", "landlock-network"], "switched off"),
    ("seccomp:error=EINVAL", &["seccomp"], "not in this kernel"),
    ("setresuid:error=EPERM", &["user"], "Operation not permitted"),
];

#[test]
fn the_doctor_names_every_part_and_what_is_missing() {
    let (ok, parts) = states(&agent(None, &["doctor", "-o", "json"]).expect(0));
    let names: Vec<&str> = parts.iter().map(|(part, _, _)| part.as_str()).collect();
    let all = [
        "worker",
        "memory-pressure",
        "user",
        "capabilities",
        "process",
        "ceilings",
        "landlock-files",
        "landlock-network",
        "seccomp",
        "proxy",
    ];
    assert_eq!(names, all);
    assert!(ok && parts.iter().all(|(_, state, _)| state == "ok" || state == "not-needed"), "{parts:?}");
    for (rule, lacking, why) in LACKS {
        let (ok, parts) = states(&agent(Some(rule), &["doctor", "-o", "json"]).expect(1));
        assert!(!ok, "{rule}");
        for (part, state, detail) in &parts {
            let is_lacking = lacking.contains(&part.as_str());
            assert_eq!(state == "missing", is_lacking, "{rule}: {part} {state}: {detail}");
            assert!(!is_lacking || detail.contains(why), "{rule}: {part} {state}: {detail}");
        }
    }
    let text = agent(Some(LACKS[0].0), &["doctor"]).expect(1);
    assert!(text.out().lines().any(|line| line.starts_with("landlock-files") && line.contains("missing")));
}

#[test]
fn a_worker_that_does_not_start_is_missing() {
    let (ok, parts) = states(&agent(Some("prctl:error=EPERM"), &["doctor", "-o", "json"]).expect(1));
    assert!(!ok);
    let parts: Vec<(&str, &str)> =
        parts.iter().map(|(part, state, _)| (part.as_str(), state.as_str())).collect();
    assert_eq!(parts, [("worker", "missing"), ("proxy", "not-needed")]);
}

#[test]
fn a_scan_says_in_one_line_what_is_missing_and_scans_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let rule = folder.path().join("rule.yar");
    fs::write(&rule, samples::EICAR_RULE).unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("b.tar.gz"), samples::nested()).unwrap();
    let (rule, tree) = (rule.to_str().unwrap(), tree.to_str().unwrap());
    let args = ["scan", "--standalone", "--pattern", rule, "-o", "json", tree];
    let whole = agent(None, &args).expect(1);
    assert_eq!(whole.err(), "", "nothing is missing");
    for (call, lacking, why) in LACKS {
        let output = agent(Some(call), &args).expect(1);
        assert_eq!(standalone::lines(&output, "detection"), standalone::lines(&whole, "detection"));
        let err = output.err();
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(err.starts_with("warning: ") && err.contains(why), "{err}");
        assert!(lacking.iter().all(|part| err.contains(&format!("{part}: "))), "{err}");
    }
}

/// A rule that holds much more memory than its text: thousands of strings, each found a thousand times.
fn greedy() -> String {
    let strings: String = (0..2000).map(|n| format!("$s{n} = \"greed\"\n")).collect();
    format!("rule greedy {{ strings: {strings} condition: all of them and #s1 == 1 and #s2 == 1 }}")
}

#[test]
fn a_pattern_that_ends_worker_after_worker_is_an_error_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("greedy.yar"), greedy()).unwrap();
    fs::write(path("good.yar"), samples::EICAR_RULE).unwrap();
    fs::create_dir(path("tree")).unwrap();
    for n in 0..6 {
        fs::write(path(&format!("tree/{n}")), b"greed".repeat(1100)).unwrap();
    }
    let scan = |mib: u32| -> Output {
        Command::new("/bin/sh")
            .args(["-c", &format!("ulimit -d {} && exec \"$0\" \"$@\"", mib << 10)])
            .arg(bin("tm-agent"))
            .args(["scan", "--standalone", "--threads", "1", "-o", "json"])
            .args(["--pattern", &path("good.yar"), "--pattern", &path("greedy.yar"), &path("tree")])
            .output()
            .expect("programs can be run")
            .into()
    };
    scan(400).expect(0);
    let output = scan(32).expect(2);
    let err = output.err();
    assert!(err.contains("greedy.yar` ends the scan worker on one file after another"), "{err}");
    assert!(!err.contains("good.yar"), "{err}");
}
