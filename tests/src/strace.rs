//! Faults at single system calls, injected from outside with strace: no hook in the program under test.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::Output;

/// Every call by which a program changes files, or finds out how.
pub const CHANGING: &str = "openat,openat2,write,pwrite64,writev,copy_file_range,fsync,fdatasync,link,linkat,\
                            rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,fchown,fchmod,\
                            fsetxattr,utimensat,ftruncate,fallocate,ioctl,flock,sendfile";

/// One system call of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// The how manieth of this name since the program began, from 1.
    pub nth: u32,
    /// How strace shows it.
    pub line: String,
}

/// What happens at a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process is killed on its way into the call, which does not take place.
    Kill,
    /// The call does not take place and returns this error.
    Error(&'static str),
}

/// A program and its arguments, in a form that can be run several times.
#[derive(Debug, Clone)]
pub struct Line {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<std::ffi::OsString>,
    /// Injections that go with every run under strace, in its own words (`openat:error=EIO:when=3`). The
    /// calls that they name cannot be given another fault.
    pub rules: Vec<String>,
}

impl Line {
    /// Runs it as it is.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn run(&self) -> Output {
        Command::new(&self.program).args(&self.args).output().expect("programs can be run").into()
    }

    /// Runs it with `fault` at one call. A killed program gives exit code -1.
    ///
    /// # Panics
    /// If strace cannot be run.
    pub fn run_with(&self, call: &Call, fault: Fault) -> Output {
        let what = match fault {
            Fault::Kill => "signal=SIGKILL".to_owned(),
            Fault::Error(name) => format!("error={name}"),
        };
        self.inject(&[format!("{}:{what}:when={}", call.name, call.nth)])
    }

    /// Runs it with injections in strace's own words.
    ///
    /// # Panics
    /// If strace cannot be run.
    pub fn inject(&self, rules: &[String]) -> Output {
        let rules = || self.rules.iter().chain(rules);
        let names: Vec<&str> = rules().filter_map(|rule| rule.split(':').next()).collect();
        let mut command = Command::new("strace");
        // Not `--seccomp-bpf`: signals are not injected with it (6.1).
        command.args(["-f", "-qqq", "-o", "/dev/null", "-e"]);
        command.arg(format!("trace={}", names.join(",")));
        for rule in rules() {
            command.args(["-e", &format!("inject={rule}")]);
        }
        command.arg(&self.program).args(&self.args).output().expect("strace is installed").into()
    }

    /// Runs it and lists the calls that it makes once it has come to `marker`, a text in a call.
    ///
    /// # Panics
    /// If strace cannot be run, or there is no such call.
    pub fn trace(&self, marker: &str) -> (Vec<Call>, Output) {
        let folder = tempfile::tempdir().expect("temporary folders work");
        let log = folder.path().join("log");
        let mut command = Command::new("strace");
        command.args(["-f", "--seccomp-bpf", "-qqq", "-s", "200", "-o"]).arg(&log);
        command.args(["-e", &format!("trace={CHANGING}")]);
        for rule in &self.rules {
            command.args(["-e", &format!("inject={rule}")]);
        }
        command.arg(&self.program).args(&self.args);
        let output: Output = command.output().expect("strace is installed").into();
        let calls = calls(&log, marker);
        assert!(!calls.is_empty(), "strace saw no call with `{marker}`\n{}", output.both());
        (calls, output)
    }
}

fn calls(log: &Path, marker: &str) -> Vec<Call> {
    let text = String::from_utf8_lossy(&fs::read(log).expect("strace wrote its log")).into_owned();
    let mut counts = BTreeMap::new();
    let mut calls = Vec::new();
    let mut begun = false;
    for line in text.lines() {
        // `1234  openat(3, …) = 4`
        let Some((name, _)) = line.split_once('(') else { continue };
        let Some(name) = name.split_whitespace().last().map(str::to_owned) else { continue };
        let nth = counts.entry(name.clone()).or_insert(0_u32);
        *nth += 1;
        begun = begun || line.contains(marker);
        if begun {
            calls.push(Call { name, nth: *nth, line: line.to_owned() });
        }
    }
    calls
}
