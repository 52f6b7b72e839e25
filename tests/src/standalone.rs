//! `tm-agent scan --standalone`: no daemon, no manager.

use std::{fs, path::Path, process::Command};

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
