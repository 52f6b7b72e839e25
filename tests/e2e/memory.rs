//! The memory of processes is looked at, and they do not notice.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use tm_tests::standalone::{lines, scan};

const RULE: &str = "rule in_memory { strings: $a = \"kept-in-memory-8812\" condition: $a }";

/// A shell that has put the rule's text together and waits.
struct Holder(Child);

impl Holder {
    fn start() -> Self {
        let script = "a=kept-in; b=memory-8812; c=$a-$b; echo ready; read line";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is a shell");
        let mut line = String::new();
        let out = child.stdout.as_mut().expect("it is a pipe");
        BufReader::new(out).read_line(&mut line).expect("a pipe can be read");
        assert_eq!(line, "ready\n");
        Self(child)
    }

    fn status(&self, name: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with(name)).expect("there is such a line");
        line.to_owned()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_a_process_holds_is_found_and_the_process_neither_stops_nor_grows() {
    let holder = Holder::start();
    let before = (holder.status("VmRSS"), holder.status("VmSwap"));
    let folder = tempfile::tempdir().unwrap();
    let files_alone = scan(RULE, folder.path(), &[]).expect(0);
    assert!(lines(&files_alone, "detection").is_empty());

    let output = scan(RULE, folder.path(), &["--processes"]);
    let path = format!("/proc/{}/mem", holder.0.id());
    let found = lines(&output, "detection");
    let own: Vec<_> = found.iter().filter(|line| line["path"] == path.as_str()).collect();
    assert_eq!(own.len(), 1, "told once: {}", output.out());
    let shell = fs::canonicalize("/bin/sh").unwrap();
    assert_eq!(own[0]["member"][0], shell.to_str().unwrap(), "{}", own[0]);
    let addresses = own[0]["member"][1].as_str().unwrap();
    assert!(addresses.split('-').all(|end| u64::from_str_radix(end, 16).is_ok()), "{addresses}");

    assert_eq!((holder.status("VmRSS"), holder.status("VmSwap")), before, "it has not grown");
    assert!(holder.status("State").contains("sleeping"));
    assert!(holder.status("TracerPid").ends_with("\t0"));
    let summary = lines(&output, "summary").pop().unwrap();
    assert!(summary["files"].as_u64() >= Some(1) && summary["bytes"].as_u64() > Some(4096), "{summary}");
}

#[test]
fn a_program_that_is_gone_from_disk_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("sleeper");
    fs::copy(fs::canonicalize("/bin/sleep").unwrap(), &program).unwrap();
    let mut child = Command::new(&program).arg("1000").spawn().unwrap();
    // It has become the program once its link says so.
    let link = format!("/proc/{}/exe", child.id());
    while fs::read_link(&link).unwrap() != program {
        std::thread::yield_now();
    }
    fs::remove_file(&program).unwrap();
    let rule = "rule gone { condition: uint32(0) == 0x464C457F }";
    let output = scan(rule, folder.path(), &["--processes"]);
    let found = lines(&output, "detection");
    let _ = child.kill();
    let _ = child.wait();
    let gone = format!("{} (deleted)", program.display());
    assert!(found.iter().any(|line| line["member"][0] == gone.as_str()), "{}", output.out());
    // Whole programs that still stand on disk are read there, not in memory.
    let shell = fs::canonicalize("/bin/sh").unwrap();
    assert!(!found.iter().any(|line| line["member"][0] == shell.to_str().unwrap()), "{}", output.out());
}
