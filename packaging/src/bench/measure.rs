//! Runs one program to its end, and says what it took.
//!
//! **Invariant:** CPU time is that of the program and of every process it has waited for.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use super::{status_kib, ticks, ticks_per_second};

/// How often memory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Rule and path.
pub(super) type Finding = (String, String);

/// What one run took, and what it found.
#[derive(Debug, Clone)]
pub(super) struct Run {
    /// User and system, in seconds.
    pub(super) cpu_s: f64,
    /// From start to end, in seconds.
    pub(super) wall_s: f64,
    /// The most memory, in KiB.
    pub(super) memory: Memory,
    /// Files that the agent knew clean and did not read.
    pub(super) known: u64,
    /// Every pair once.
    pub(super) findings: BTreeSet<Finding>,
}

/// Memory in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Memory {
    /// Of the program and its children together, files they have mapped included.
    pub(super) resident: u64,
    /// The same without files.
    pub(super) anon: u64,
    /// Without files, of the largest one of these processes: of the agent, that is the scan worker.
    pub(super) largest_anon: u64,
}

/// Runs a program to its end.
pub(super) fn measure(
    program: &str,
    mut command: Command,
    finding: impl Fn(&str) -> anyhow::Result<Option<Finding>>,
) -> anyhow::Result<Run> {
    let (cpu, begin) = (children_cpu()?, Instant::now());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let out = child.stdout.take().context("its output is a pipe")?;
    let ended = AtomicBool::new(false);
    let (findings, memory) = thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(child.id(), &ended));
        let mut findings = BTreeSet::new();
        let read = || -> anyhow::Result<()> {
            for line in BufReader::new(out).split(b'\n') {
                let line = line.context("cannot read its output")?;
                findings.extend(finding(&String::from_utf8_lossy(&line))?);
            }
            Ok(())
        };
        let read = read();
        ended.store(true, Ordering::Release);
        let memory = watcher.join().unwrap_or_default();
        read.map(|()| (findings, memory))
    })?;
    let status = child.wait().context("cannot wait for it")?;
    // Scanners say 1 when they found something; the agent says 2 when it left something out.
    if status.code().is_none_or(|code| code > 2) {
        bail!("{program} has ended with {status}");
    }
    let cpu_s = children_cpu()? - cpu;
    let wall_s = begin.elapsed().as_secs_f64();
    Ok(Run { cpu_s: cpu_s.max(0.01), wall_s, memory, known: 0, findings })
}

/// CPU time of every process that was started here and has been waited for, in seconds.
fn children_cpu() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("cannot look at ourselves")?;
    ticks(&stat, 16).map(|ticks| ticks / ticks_per_second()).context("/proc/self/stat is of another form")
}

fn watch(pid: u32, ended: &AtomicBool) -> Memory {
    let mut most = Memory::default();
    while !ended.load(Ordering::Acquire) {
        let mut now = Memory::default();
        for pid in family(pid) {
            let anon = status_kib(pid, "RssAnon").unwrap_or(0);
            now.resident += status_kib(pid, "VmRSS").unwrap_or(0);
            now.anon += anon;
            now.largest_anon = now.largest_anon.max(anon);
        }
        most = Memory {
            resident: most.resident.max(now.resident),
            anon: most.anon.max(now.anon),
            largest_anon: most.largest_anon.max(now.largest_anon),
        };
        thread::sleep(LOOK_EVERY);
    }
    most
}

/// A process and the children of its threads.
fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return family };
    for thread in threads.flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        family.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
    }
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_measured_with_its_children() {
        let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo r /x";
        let mut command = Command::new("sh");
        command.args(["-c", &format!("(sh -c '{script}'); true")]);
        let pair = |line: &str| line.split_once(' ').map(|(rule, path)| (rule.to_owned(), path.to_owned()));
        let run = measure("sh", command, |line| Ok(pair(line))).unwrap();
        assert_eq!(run.findings.len(), 1);
        assert!(run.wall_s > 0.0 && run.cpu_s > 0.0);
        assert!(run.memory.largest_anon > 0 && run.memory.largest_anon <= run.memory.anon);
        let mut failing = Command::new("sh");
        failing.args(["-c", "exit 7"]);
        assert!(measure("sh", failing, |_| Ok(None)).is_err());
    }
}
