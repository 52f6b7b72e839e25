//! `cargo xtask bench push`: what the manager costs, measured with simulated agents.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::{Format, build, build_name, machine, status_kib, ticks, ticks_per_second};
use crate::programs::{self, Background};

/// How long a program has to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// Server CPU per task and agent, durable and acknowledged, that must hold.
const FLOOR_US: f64 = 500.0;
const RULE: &str = include_str!("../../demo/eicar.yar");

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
    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// What was measured.
#[derive(Debug)]
struct Figures {
    rounds: Vec<Round>,
    /// Tasks whose end the manager does not have in its log.
    lost: u64,
    /// Resident memory of the manager at the end.
    resident_kib: Option<u64>,
}

/// One task for every agent.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// CPU of the manager per task and agent, in microseconds.
    cpu_us: f64,
    /// From the order to the last acknowledgement of an end.
    last_ms: u64,
}

/// Orders one scan for every agent at a time, and measures until the last end of a task is acknowledged.
pub(crate) fn push(what: Push) -> anyhow::Result<()> {
    let bins = build(&["tm-manager", "tmctl", "tm-tests"], what.dev)?;
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
    let tmctl = |args: &[&str]| {
        let mut command = Command::new(bins.join("tmctl"));
        command.env("TMCTL_TRUST", folder.path().join("trust"));
        run(command.arg("--profile").arg(&profile).args(args))
    };
    tmctl(&["pattern", "trust", "init"])?;
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
    let mut rounds = Vec::new();
    let mut ordered = BTreeSet::new();
    for round in 1..=what.rounds {
        let (cpu, begin) = (cpu_us(manager.pid())?, now_ms()?);
        let made = tmctl(&["scan", "start", "--group", "default", "--path", "/nowhere", "-o", "json"])?;
        let line = simulator.line()?;
        let cpu = cpu_us(manager.pid())? - cpu;
        let last: u64 = line
            .strip_prefix(&format!("round {round} "))
            .and_then(|ms| ms.parse().ok())
            .with_context(|| format!("the simulator says `{line}`"))?;
        ordered.append(&mut texts(&made, "id")?.into_iter().collect());
        rounds.push(Round { cpu_us: cpu / f64::from(what.agents), last_ms: last.saturating_sub(begin) });
    }
    manager.check()?;
    let resident_kib = status_kib(manager.pid(), "VmRSS");
    ensure!(
        ordered.len() == usize::try_from(what.agents * what.rounds)?,
        "{} tasks were ordered for {} agents in {} rounds",
        ordered.len(),
        what.agents,
        what.rounds
    );
    let log = tmctl(&[
        "event",
        "list",
        "--all",
        "--kind",
        "scan-administrator",
        "--status",
        "scanned",
        "-o",
        "json",
    ])?;
    let ended = texts(&log, "task")?;
    let distinct: BTreeSet<&String> = ended.iter().collect();
    ensure!(distinct.len() == ended.len(), "{} tasks ended twice", ended.len() - distinct.len());
    let lost = u64::try_from(ordered.iter().filter(|task| !distinct.contains(task)).count())?;
    let figures = Figures { rounds, lost, resident_kib };
    match what.output {
        Format::Table => table(what, &figures)?,
        Format::Json => json(what, &figures)?,
    }
    ensure!(lost == 0, "{lost} tasks have no end");
    Ok(())
}

/// A text of every row of a JSON list.
fn texts(rows: &str, key: &str) -> anyhow::Result<Vec<String>> {
    let rows: Vec<Value> = serde_json::from_str(rows).context("not a list")?;
    rows.iter()
        .map(|row| row[key].as_str().map(str::to_owned).with_context(|| format!("a row has no `{key}`")))
        .collect()
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
    ticks(&stat, 14)
        .map(|ticks| ticks * 1e6 / ticks_per_second())
        .context("/proc/PID/stat is of another form")
}

fn now_ms() -> anyhow::Result<u64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is set")?;
    Ok(u64::try_from(now.as_millis())?)
}

fn table(what: Push, figures: &Figures) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}, {}", machine(), build_name(what.dev))?;
    writeln!(
        out,
        "one scan for each of {} agents by REST, accepted, started and finished at once\n",
        what.agents
    )?;
    writeln!(out, "{:>5}  {:>28}  {:>17}", "round", "server CPU per task and agent", "last ack")?;
    for (number, round) in (1..).zip(&figures.rounds) {
        writeln!(out, "{number:>5}  {:>26.0} µs  {:>14} ms", round.cpu_us, round.last_ms)?;
    }
    let median = figures.cpu_us();
    let verdict = if median <= FLOOR_US { "holds" } else { "is missed" };
    writeln!(out, "\nmedian {median:.0} µs and {} ms; {} lost", figures.last_ms(), figures.lost)?;
    writeln!(out, "the floor of {FLOOR_US:.0} µs {verdict}")?;
    if let Some(resident) = figures.resident_kib {
        writeln!(out, "manager memory at the end: {} MiB", resident / 1024)?;
    }
    Ok(())
}

fn json(what: Push, figures: &Figures) -> anyhow::Result<()> {
    let rounds: Vec<Value> = figures
        .rounds
        .iter()
        .map(|round| serde_json::json!({ "cpu_us_per_task": round.cpu_us, "last_ms": round.last_ms }))
        .collect();
    let object = serde_json::json!({
        "machine": machine(),
        "build": build_name(what.dev),
        "agents": what.agents,
        "push_last_ms": figures.last_ms(),
        "push_cpu_us_per_task": figures.cpu_us(),
        "lost": figures.lost,
        "rounds": rounds,
        "resident_kib": figures.resident_kib,
    });
    writeln!(io::stdout(), "{object:#}").context("cannot print")
}

impl Figures {
    /// The median over the rounds.
    fn cpu_us(&self) -> f64 {
        let mut all: Vec<f64> = self.rounds.iter().map(|round| round.cpu_us).collect();
        all.sort_unstable_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or_default()
    }

    /// The median over the rounds.
    fn last_ms(&self) -> u64 {
        let mut all: Vec<u64> = self.rounds.iter().map(|round| round.last_ms).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_the_round_in_the_middle() {
        let round = |cpu_us, last_ms| Round { cpu_us, last_ms };
        let rounds = vec![round(9.0, 1), round(1.0, 3), round(2.0, 2)];
        let figures = Figures { rounds, lost: 0, resident_kib: None };
        assert_eq!((figures.cpu_us(), figures.last_ms()), (2.0, 2));
    }
}
