//! `tm-agent scan --standalone`: no daemon, no manager.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{Output, bin};

/// Scans `path` with `rule`, in JSON lines.
///
/// # Panics
/// If the program cannot be run.
pub fn scan(rule: &str, path: &Path, more: &[&str]) -> Output {
    scan_as("json", rule, path, more)
}

/// The same in another format.
///
/// # Panics
/// If the program cannot be run.
pub fn scan_as(format: &str, rule: &str, path: &Path, more: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let file = folder.path().join("rule.yar");
    fs::write(&file, rule).expect("a temporary folder is writable");
    let output = Command::new(bin("tm-agent"))
        .args(["scan", "--standalone", "--pattern"])
        .arg(&file)
        .args(["-o", format])
        .args(more)
        .arg(path)
        .output();
    output.expect("programs can be run").into()
}

/// The same in JSON lines, up to the summary: a program that waits for a file system may then be unable to end.
/// What it is, and its exit code, is not waited for.
///
/// # Panics
/// If the program cannot be run or ends without a summary.
pub fn scan_until_summary(rule: &str, path: &Path, more: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let file = folder.path().join("rule.yar");
    fs::write(&file, rule).expect("a temporary folder is writable");
    let mut child = Command::new(bin("tm-agent"))
        .args(["scan", "--standalone", "--pattern"])
        .arg(&file)
        .args(["-o", "json"])
        .args(more)
        .arg(path)
        .stdout(Stdio::piped())
        .spawn()
        .expect("programs can be run");
    let mut out = Vec::new();
    let mut lines = BufReader::new(child.stdout.take().expect("it is a pipe"));
    while !out.ends_with(b"}\n") || !String::from_utf8_lossy(&out).contains("\"summary\"") {
        let length = lines.read_until(b'\n', &mut out).expect("a pipe can be read");
        assert!(length > 0, "no summary: {}", String::from_utf8_lossy(&out));
    }
    // Nobody is left behind when the file system lets go of it.
    std::thread::spawn(move || child.wait());
    let status = std::os::unix::process::ExitStatusExt::from_raw(0);
    std::process::Output { status, stdout: out, stderr: Vec::new() }.into()
}

/// The lines of one type (`detection`, `skipped`, `summary`).
///
/// # Panics
/// If a line is not JSON.
#[track_caller]
pub fn lines(output: &Output, kind: &str) -> Vec<Value> {
    let text = output.out();
    let parse =
        |line: &str| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    text.lines().map(parse).filter(|line| line["type"] == kind).collect()
}
