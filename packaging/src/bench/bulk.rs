//! `cargo xtask bench bulk`: what it costs the manager to send a large pattern to many agents, and how little of a
//! new version travels.
//!
//! The pattern is a digest list of random digests, which nothing makes smaller. Its new version lacks one entry in a
//! hundred and has as many new ones. CPU is the manager's, user and system; the agents are simulated on the same
//! machine and take their share of it, so that only CPU counts, not time.
//!
//! **Invariant:** an agent that has not got every byte is counted as lost, and a lost one is an error.

use std::{
    fmt::Write as _,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::{Build, Format, machine, status_kib, ticks, ticks_per_second};
use crate::programs::{self, Background};

/// How long a program has to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// Server CPU seconds per gigabyte that must hold, and how many times fewer bytes a delta must have.
const FLOOR_S: f64 = 0.75;
const FLOOR_TIMES: u64 = 50;
/// Bytes of a compiled list per entry: a SHA-256 and its part of the filter.
const PER_ENTRY: f64 = 33.3;

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Bulk {
    /// Simulated agents, all at once.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2000))]
    agents: u32,
    /// Size of the pattern, in megabytes.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=90))]
    megabytes: u32,
    #[command(flatten)]
    build: Build,
    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// What was measured.
#[derive(Debug)]
struct Figures {
    /// Of the pattern.
    whole_bytes: u64,
    /// Of what turns the old version into the new one; `None` if the manager offers nothing.
    delta_bytes: Option<u64>,
    cpu_s_per_gb: f64,
    seconds: f64,
    lost: u64,
    /// The manager's memory before and at its largest.
    resident_kib: (Option<u64>, Option<u64>),
}

/// Imports a pattern, has it fetched by all at once, and then a new version of it by one.
pub(crate) fn bulk(what: &Bulk) -> anyhow::Result<()> {
    let bins = what.build.folder(&["tm-manager", "tmctl", "tm-tests"])?;
    let folder =
        tempfile::Builder::new().prefix("tm-bench-").tempdir().context("cannot make a throwaway folder")?;
    let data = folder.path().join("manager");
    let (agents, admin) = programs::free_ports()?;
    run(Command::new(bins.join("tm-manager"))
        .args(["init", "--public-name", "127.0.0.1", "--agent-listen", &agents.to_string()])
        .args(["--admin-listen", &admin.to_string(), "--data"])
        .arg(&data))?;
    let mut serve = Command::new(bins.join("tm-manager"));
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

    let text = folder.path().join("list.txt");
    let import = |without: u64, more: u64| -> anyhow::Result<()> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few millions")]
        let entries = (f64::from(what.megabytes) * 1e6 / PER_ENTRY) as u64;
        fs::write(&text, list(entries, without, more * entries / 100)).context("cannot write the list")?;
        tmctl(&["pattern", "import", &text.display().to_string()]).map(|_| ())
    };
    import(0, 0)?;
    let old = patterns(&data)?;
    let [(old_digest, whole_bytes)] = old.as_slice() else { bail!("one pattern was imported") };

    let mut fleet = Fleet::start(&bins, &agents.to_string(), &token, what.agents)?;
    ensure!(fleet.line()? == "ready", "the agents are not ready");
    let (cpu, resident) = (cpu_s(manager.pid())?, status_kib(manager.pid(), "VmRSS"));
    let said = fleet.tell(&format!("get /v1/patterns/{old_digest} {whole_bytes}"))?;
    let cpu = cpu_s(manager.pid())? - cpu;
    manager.check()?;
    let numbers: Option<Vec<u64>> =
        said.strip_prefix("got ").and_then(|rest| rest.split(' ').map(|n| n.parse().ok()).collect());
    let Some([bytes, lost, milliseconds]) = numbers.as_deref() else { bail!("the agents say `{said}`") };

    import(100, 1)?;
    let new = patterns(&data)?
        .into_iter()
        .find(|pattern| !old.contains(pattern))
        .context("a new version came in")?;
    let said = fleet.tell(&format!("delta {} {old_digest}", new.0))?;
    let delta = said.strip_prefix("delta ").with_context(|| format!("the agents say `{said}`"))?;
    let figures = Figures {
        whole_bytes: new.1,
        delta_bytes: delta.parse().ok(),
        cpu_s_per_gb: cpu * 1e9 / real(*bytes),
        seconds: real(*milliseconds) / 1e3,
        lost: *lost,
        resident_kib: (resident, status_kib(manager.pid(), "VmHWM")),
    };
    match what.output {
        Format::Table => table(what, &figures)?,
        Format::Json => json(what, &figures)?,
    }
    ensure!(figures.lost == 0, "{} agents have not got the pattern", figures.lost);
    Ok(())
}

/// The text of a list of random digests: so many, each of which in `without` left out if that is not 0, and more.
fn list(entries: u64, without: u64, more: u64) -> String {
    let mut text = String::new();
    let kept = (0..entries).filter(|n| without == 0 || n % without != 7);
    for number in kept.chain(1 << 40..(1 << 40) + more) {
        // SplitMix64, from four places that no two numbers share.
        for word in 0..4 {
            let mut z = (number * 4 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let _ = write!(text, "{:016x}", z ^ (z >> 31));
        }
        text.push('\n');
    }
    text
}

/// The patterns that the manager has: digest and size.
fn patterns(data: &Path) -> anyhow::Result<Vec<(String, u64)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(data.join("patterns")).context("the manager has no patterns")? {
        let entry = entry.context("the manager's patterns cannot be listed")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() == 64 {
            all.push((name, entry.metadata().context("a pattern cannot be looked at")?.len()));
        }
    }
    Ok(all)
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
struct Fleet {
    child: Child,
    lines: io::Lines<BufReader<std::process::ChildStdout>>,
    orders: std::process::ChildStdin,
}

impl Fleet {
    fn start(bins: &Path, manager: &str, token: &Path, agents: u32) -> anyhow::Result<Self> {
        let mut child = Command::new(bins.join("tm-bulk"))
            .arg(manager)
            .arg(token)
            .arg(agents.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the simulated agents")?;
        let out = child.stdout.take().context("their output is a pipe")?;
        let orders = child.stdin.take().context("their input is a pipe")?;
        Ok(Self { child, lines: BufReader::new(out).lines(), orders })
    }

    fn line(&mut self) -> anyhow::Result<String> {
        self.lines.next().context("the simulated agents have ended")?.context("cannot read what they say")
    }

    fn tell(&mut self, order: &str) -> anyhow::Result<String> {
        writeln!(self.orders, "{order}").context("the simulated agents have ended")?;
        self.line()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time that a process has used, user and system, in seconds.
fn cpu_s(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("cannot look at the manager")?;
    ticks(&stat, 14).map(|ticks| ticks / ticks_per_second()).context("/proc/PID/stat is of another form")
}

#[expect(clippy::cast_precision_loss, reason = "below 2^53")]
fn real(n: u64) -> f64 {
    n as f64
}

fn table(what: &Bulk, figures: &Figures) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let holds = |holds: bool| if holds { "holds" } else { "is missed" };
    let mib = |kib: Option<u64>| kib.map_or_else(|| "?".to_owned(), |kib| (kib / 1024).to_string());
    writeln!(out, "{}, {}", machine(), what.build.name())?;
    writeln!(out, "a pattern of {} bytes to {} agents at once\n", figures.whole_bytes, what.agents)?;
    writeln!(
        out,
        "server CPU per GB  {:.3} s; the floor of {FLOOR_S} s {}",
        figures.cpu_s_per_gb,
        holds(figures.cpu_s_per_gb <= FLOOR_S)
    )?;
    writeln!(out, "until the last     {:.1} s; {} lost", figures.seconds, figures.lost)?;
    let (before, most) = figures.resident_kib;
    writeln!(out, "manager memory     {} MiB before, {} MiB at most", mib(before), mib(most))?;
    match figures.delta_bytes {
        Some(delta) => writeln!(
            out,
            "1 % other entries  {delta} bytes, {} times fewer; the floor of {FLOOR_TIMES} {}",
            figures.whole_bytes / delta.max(1),
            holds(delta * FLOOR_TIMES <= figures.whole_bytes)
        )?,
        None => writeln!(out, "1 % other entries  the whole: no delta is offered")?,
    }
    Ok(())
}

fn json(what: &Bulk, figures: &Figures) -> anyhow::Result<()> {
    let object = serde_json::json!({
        "machine": machine(),
        "build": what.build.name(),
        "agents": what.agents,
        "bulk_cpu_s_per_gb": figures.cpu_s_per_gb,
        "seconds": figures.seconds,
        "delta_bytes": figures.delta_bytes,
        "whole_bytes": figures.whole_bytes,
        "lost": figures.lost,
        "resident_kib": figures.resident_kib.0,
        "resident_most_kib": figures.resident_kib.1,
    });
    writeln!(io::stdout(), "{object:#}").context("cannot print")
}
