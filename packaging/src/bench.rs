//! `cargo xtask bench`: what the manager costs, measured on this machine with simulated agents.
//!
//! **Invariant:** figures are of CPU seconds of the manager's process (user and system, `/proc/PID/stat`), and
//! come with the facts of the machine and the build they were measured with.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::programs::{self, Background};

/// How long a program has to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// Server CPU per task and agent, durable and acknowledged, that must hold.
const FLOOR_US: f64 = 500.0;
const RULE: &str = include_str!("../demo/eicar.yar");

/// What is measured.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Push {
    /// Simulated agents.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    agents: u32,
    /// Tasks for each, one after the other.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Measure the unoptimized build, which is there sooner and several times slower.
    #[arg(long)]
    dev: bool,
}

/// Orders one scan for every agent at a time, and measures until the last end of a task is acknowledged.
pub(crate) fn push(what: Push) -> anyhow::Result<()> {
    let bins = build(what.dev)?;
    let folder =
        tempfile::Builder::new().prefix("tm-bench-").tempdir().context("cannot make a throwaway folder")?;
    let data = folder.path().join("manager");
    let (agents, admin) = programs::free_ports()?;
    run(Command::new(bins.join("tm-manager"))
        .args(["init", "--public-name", "127.0.0.1", "--agent-listen", &agents.to_string()])
        .args(["--admin-listen", &admin.to_string(), "--data"])
        .arg(&data))?;
    let mut serve = Command::new(bins.join("tm-manager"));
    // One line for each session would be measured, too.
    serve.args(["serve", "--data"]).arg(&data).env("TM_LOG", "warn");
    let mut manager = Background::start("tm-manager", serve, folder.path().join("manager.log"))?;
    let end = Instant::now() + PATIENCE;
    while TcpStream::connect(admin).is_err() || TcpStream::connect(agents).is_err() {
        manager.check()?;
        ensure!(Instant::now() < end, "the manager does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    let profile = data.join("admin.toml");
    let tmctl =
        |args: &[&str]| run(Command::new(bins.join("tmctl")).arg("--profile").arg(&profile).args(args));
    let made = tmctl(&["token", "create", "--uses", &what.agents.to_string(), "-o", "json"])?;
    let made: Value = serde_json::from_str(&made).context("no token was shown")?;
    let token = folder.path().join("token");
    fs::write(&token, made["token"].as_str().context("no token was shown")?)
        .context("cannot write the token to a file")?;
    let rule = folder.path().join("eicar.yar");
    fs::write(&rule, RULE).context("cannot write the rule to a file")?;
    tmctl(&["pattern", "import", &rule.display().to_string()])?;

    let mut simulator = Simulator::start(&bins, &agents.to_string(), &token, what)?;
    ensure!(
        simulator.line()? == "connected",
        "the simulator says something else than that all are connected"
    );
    let mut figures = Vec::new();
    for round in 1..=what.rounds {
        let (cpu, begin) = (cpu_us(manager.pid())?, now_ms()?);
        tmctl(&["scan", "start", "--group", "default", "--path", "/nowhere"])?;
        let line = simulator.line()?;
        let cpu = cpu_us(manager.pid())? - cpu;
        let last: u128 = line
            .strip_prefix(&format!("round {round} "))
            .and_then(|ms| ms.parse().ok())
            .with_context(|| format!("the simulator says `{line}`"))?;
        figures.push((cpu / f64::from(what.agents), last.saturating_sub(begin)));
    }
    manager.check()?;
    table(what, &figures, manager.pid())
}

fn build(dev: bool) -> anyhow::Result<PathBuf> {
    let mut args = vec!["build", "--locked", "--bins", "-p", "tm-manager", "-p", "tmctl", "-p", "tm-tests"];
    if !dev {
        args.push("--release");
    }
    eprintln!("Building: cargo {}", args.join(" "));
    let status = programs::cargo()?.args(args).status().context("cannot run cargo")?;
    ensure!(status.success(), "the programs could not be built");
    let here = std::env::current_exe().context("cannot tell where this program is")?;
    let target = here.parent().and_then(Path::parent).context("this program lies in a target folder")?;
    Ok(target.join(if dev { "debug" } else { "release" }))
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The simulated agents. Dropped, they end.
#[derive(Debug)]
struct Simulator {
    child: Child,
    lines: io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Simulator {
    fn start(bins: &Path, manager: &str, token: &Path, what: Push) -> anyhow::Result<Self> {
        let mut child = Command::new(bins.join("tm-sim"))
            .arg(manager)
            .arg(token)
            .args([what.agents.to_string(), what.rounds.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the simulator")?;
        let out = child.stdout.take().context("its output is a pipe")?;
        Ok(Self { child, lines: BufReader::new(out).lines() })
    }

    /// Its next line; it ends by itself when nothing happens any more.
    fn line(&mut self) -> anyhow::Result<String> {
        self.lines.next().context("the simulator has ended")?.context("cannot read from the simulator")
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time that a process has used, user and system, in microseconds.
fn cpu_us(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("cannot look at the manager")?;
    ticks(&stat).map(|ticks| ticks * 1e6 / ticks_per_second()).context("/proc/PID/stat is of another form")
}

/// Fields 14 and 15; the second field may hold anything between its parentheses.
fn ticks(stat: &str) -> Option<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(number(11)? + number(12)?)
}

#[expect(clippy::cast_precision_loss, reason = "a hundred, on every Linux")]
fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

fn now_ms() -> anyhow::Result<u128> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is set")?.as_millis())
}

fn table(what: Push, figures: &[(f64, u128)], manager: u32) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let build = if what.dev { "dev (unoptimized)" } else { "release" };
    writeln!(out, "{}, {build} build", machine())?;
    writeln!(
        out,
        "one scan for each of {} agents by REST, accepted, started and finished at once\n",
        what.agents
    )?;
    writeln!(out, "{:>5}  {:>28}  {:>17}", "round", "server CPU per task and agent", "last ack")?;
    for (round, (cpu, latency)) in (1..).zip(figures) {
        writeln!(out, "{round:>5}  {cpu:>26.0} µs  {latency:>14} ms")?;
    }
    let mut all: Vec<f64> = figures.iter().map(|(cpu, _)| *cpu).collect();
    all.sort_unstable_by(f64::total_cmp);
    let median = all.get(all.len() / 2).copied().unwrap_or_default();
    let verdict = if median <= FLOOR_US { "holds" } else { "is missed" };
    writeln!(out, "\nmedian {median:.0} µs; the floor of {FLOOR_US:.0} µs {verdict}")?;
    if let Some(resident) = resident_kib(manager) {
        writeln!(out, "manager memory at the end: {} MiB", resident / 1024)?;
    }
    Ok(())
}

fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{} ({cores} cores), Linux {}", model.map_or("unknown processor", |(_, m)| m), kernel.trim())
}

fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_read_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 8 0 5 0 0";
        assert_eq!(ticks(stat), Some(300.0));
        assert_eq!(ticks("7 (x) S 1"), None);
        assert!(cpu_us(std::process::id()).unwrap() >= 0.0);
        assert!(resident_kib(std::process::id()).unwrap() > 0);
    }
}
