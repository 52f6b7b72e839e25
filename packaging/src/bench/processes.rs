//! `cargo xtask bench processes`: what it costs to look at the memory of a process, and what the process notices.
//!
//! The process is one of ours that holds text ([`hold`]). Everything runs in a process namespace of its own, so
//! that the agent, which looks at all processes, meets only that one and this program.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    Build, Format, machine,
    measure::{Run, measure},
    rules::{Numbers, Rules},
    status_kib,
};
use crate::programs;

/// How often the process is asked how it is.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// Text that is made; the rest repeats it with a number on each page.
const TEXT: usize = 8 << 20;
const PAGE: usize = 4096;

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Processes {
    /// Memory that the process holds, in MiB.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    mib: u32,
    #[command(flatten)]
    rules: Rules,
    /// Run `yara` in turn; it must be installed.
    #[arg(long)]
    against_yara: bool,
    /// Rounds; the figures are of the one with the least CPU time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    #[command(flatten)]
    build: Build,
    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// The programs, once this runs in a namespace of its own.
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
}

/// What is held.
#[derive(Debug, clap::Args)]
pub(crate) struct Hold {
    /// How much, in MiB.
    #[arg(long)]
    mib: u32,
}

/// How the process was during a scan.
#[derive(Debug, Default)]
struct Noticed {
    /// Looks at it.
    looks: u64,
    /// How many of them found it stopped or traced.
    stopped: u64,
}

#[derive(Debug)]
struct Figures {
    program: &'static str,
    run: Run,
    noticed: Noticed,
    /// By how much the process was larger at the end, in KiB.
    grown: u64,
}

/// Fills memory, says so, and holds it until its input ends.
pub(crate) fn hold(what: &Hold) -> anyhow::Result<()> {
    let mut numbers = Numbers::new(11);
    let mut text = String::with_capacity(TEXT + 64);
    while text.len() < TEXT {
        text.push_str(numbers.plain_word());
        text.push(' ');
    }
    let size = usize::try_from(u64::from(what.mib) << 20).context("too much for this machine")?;
    let mut held = Vec::with_capacity(size);
    while held.len() < size {
        let wanted = text.len().min(TEXT).min(size - held.len());
        held.extend_from_slice(text.as_bytes().get(..wanted).unwrap_or_default());
    }
    for (number, page) in held.chunks_exact_mut(PAGE).enumerate() {
        if let Some(start) = page.first_chunk_mut::<8>() {
            *start = number.to_be_bytes();
        }
    }
    drop(text);
    let mut out = io::stdout();
    out.write_all(b"ready\n").and_then(|()| out.flush()).context("nobody listens")?;
    io::stdin().read_to_end(&mut Vec::new()).context("cannot wait")?;
    ensure!(held.len() == size, "memory is as it was");
    Ok(())
}

/// Looks at a process with the agent and its peer.
pub(crate) fn processes(what: &Processes) -> anyhow::Result<()> {
    let Some(bins) = &what.inside else { return outside(what) };
    let folder =
        tempfile::Builder::new().prefix("tm-bench-").tempdir().context("cannot make a throwaway folder")?;
    let rules = folder.path().join("rules.yar");
    fs::write(&rules, what.rules.text()?).context("cannot write the rules")?;

    let mut all: Vec<Figures> = Vec::new();
    for round in 1..=what.rounds {
        eprintln!("Round {round} of {}", what.rounds);
        let mut now = vec![once(what, "tm-agent", |_| {
            let mut command = Command::new(bins.join("tm-agent"));
            command.args([
                "scan",
                "--standalone",
                "--processes",
                "-o",
                "json",
                "--threads",
                "1",
                "--pattern",
            ]);
            command.arg(&rules);
            command
        })?];
        if what.against_yara {
            now.push(once(what, "yara", |pid| {
                let mut command = Command::new("yara");
                command.args(["-w", "-p", "1"]).arg(&rules).arg(pid.to_string());
                command
            })?);
        }
        for (at, figures) in now.into_iter().enumerate() {
            match all.get_mut(at) {
                Some(known) if known.run.cpu_s <= figures.run.cpu_s => {}
                Some(known) => *known = figures,
                None => all.push(figures),
            }
        }
    }
    match what.output {
        Format::Table => table(what, &all),
        Format::Json => json(what, &all),
    }
}

/// Starts this again where there are no other processes.
fn outside(what: &Processes) -> anyhow::Result<()> {
    ensure!(programs::is_installed("unshare"), "`unshare` (package util-linux) is not installed");
    ensure!(!what.against_yara || programs::is_installed("yara"), "`yara` is not installed");
    let bins = what.build.folder(&["tm-agent"])?;
    let here = std::env::current_exe().context("cannot tell where this program is")?;
    let status = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(here)
        .args(std::env::args_os().skip(1))
        .arg("--inside")
        .arg(&bins)
        .status()
        .context("cannot run unshare")?;
    ensure!(status.success(), "it did not work in a namespace of its own (this needs root)");
    Ok(())
}

/// One scan of a fresh process.
fn once(
    what: &Processes,
    program: &'static str,
    command: impl Fn(u32) -> Command,
) -> anyhow::Result<Figures> {
    let mut held = Held::start(what.mib)?;
    let pid = held.0.id();
    let before = status_kib(pid, "VmRSS").context("the process has gone")?;
    let ended = AtomicBool::new(false);
    let (run, noticed) = thread::scope(|scope| {
        let asking = scope.spawn(|| ask(pid, &ended));
        // What is found does not matter here.
        let run = measure(program, command(pid), |_| Ok(None));
        ended.store(true, Ordering::Release);
        run.map(|run| (run, asking.join().unwrap_or_default()))
    })?;
    let after = status_kib(pid, "VmRSS").context("the process has gone")?;
    held.0.stdin = None;
    ensure!(held.0.wait().context("cannot wait for it")?.success(), "the process did not survive it");
    Ok(Figures { program, run, noticed, grown: after.saturating_sub(before) })
}

/// The process, ended with the bench.
#[derive(Debug)]
struct Held(Child);

impl Held {
    fn start(mib: u32) -> anyhow::Result<Self> {
        let here = std::env::current_exe().context("cannot tell where this program is")?;
        let mut child = Command::new(here)
            .args(["bench", "hold", "--mib", &mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process to look at")?;
        let out = child.stdout.take().context("its output is a pipe")?;
        let held = Self(child);
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).context("cannot listen to it")?;
        ensure!(line == "ready\n", "the process to look at did not start");
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(pid: u32, ended: &AtomicBool) -> Noticed {
    let mut noticed = Noticed::default();
    while !ended.load(Ordering::Acquire) {
        let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
        let status = status.unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let is_stopped = field("State:").is_some_and(|state| state.starts_with(['T', 't']));
        let is_traced = field("TracerPid:").is_some_and(|tracer| tracer != "0");
        noticed.looks += 1;
        noticed.stopped += u64::from(is_stopped || is_traced);
        thread::sleep(ASK_EVERY);
    }
    noticed
}

fn table(what: &Processes, all: &[Figures]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}, {} of the agent", machine(), what.build.name())?;
    writeln!(out, "a process of {} MiB, {}, 1 thread\n", what.mib, what.rules)?;
    writeln!(
        out,
        "{:<9} {:>8} {:>8} {:>9} {:>9} {:>17} {:>10}",
        "program", "CPU s", "wall s", "peak MiB", "anon MiB", "stopped or traced", "grown KiB"
    )?;
    for Figures { program, run, noticed, grown } in all {
        writeln!(
            out,
            "{program:<9} {:>8.2} {:>8.2} {:>9} {:>9} {:>17} {grown:>10}",
            run.cpu_s,
            run.wall_s,
            run.memory.resident / 1024,
            run.memory.largest_anon / 1024,
            format!("{} of {}", noticed.stopped, noticed.looks),
        )?;
    }
    Ok(())
}

fn json(what: &Processes, all: &[Figures]) -> anyhow::Result<()> {
    let rows: Vec<Value> = all
        .iter()
        .map(|Figures { program, run, noticed, grown }| {
            serde_json::json!({
                "program": program,
                "machine": machine(),
                "build": what.build.name(),
                "rules": what.rules.to_string(),
                "process_mib": what.mib,
                "cpu_s": run.cpu_s,
                "wall_s": run.wall_s,
                "peak_mib": run.memory.resident / 1024,
                "largest_anon_mib": run.memory.largest_anon / 1024,
                "looks": noticed.looks,
                "stopped_or_traced": noticed.stopped,
                "grown_kib": grown,
            })
        })
        .collect();
    writeln!(io::stdout(), "{:#}", Value::Array(rows)).context("cannot print")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_stopped_is_noticed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let ended = AtomicBool::new(false);
        let noticed = thread::scope(|scope| {
            let asking = scope.spawn(|| ask(child.id(), &ended));
            let stat = format!("/proc/{}/stat", child.id());
            while !fs::read_to_string(&stat).unwrap().contains(") T ") {
                thread::yield_now();
            }
            thread::sleep(ASK_EVERY * 5);
            ended.store(true, Ordering::Release);
            asking.join().unwrap()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(noticed.stopped > 0 && noticed.stopped <= noticed.looks, "{noticed:?}");
    }
}
