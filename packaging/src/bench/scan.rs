//! `cargo xtask bench scan`: the agent's scan beside other scanners, on the same files with the same rules.
//!
//! **Invariant:** programs run in turn, never at once; CPU time is that of the program and of every process it
//! has waited for; findings are pairs of rule and file, and a difference from the agent's is counted, because a
//! scanner that skips is always fast.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::{Format, build, build_folder, build_name, machine, rules, status_kib, ticks, ticks_per_second};
use crate::programs;

/// How often memory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Scan {
    /// The folder to scan.
    #[arg(long, value_name = "DIR")]
    files: PathBuf,
    /// YARA rules: a file, or a folder whose `.yar` and `.yara` files are taken together.
    #[arg(long, value_name = "FILE", conflicts_with = "generate", required_unless_present = "generate")]
    rules: Option<PathBuf>,
    /// Make a set of so many rules instead, of the same mix as public sets.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    generate: Option<u32>,
    /// Other scanners to run in turn; each must be installed (`yr` by `cargo install yara-x-cli`).
    #[arg(long, value_delimiter = ',', value_name = "PROGRAM")]
    against: Vec<Peer>,
    /// Scanning threads, of every program.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Rounds; the figures are of the one with the least CPU time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Look into containers, too (YARA programs do not).
    #[arg(long)]
    archives: bool,
    /// Measure the unoptimized build, which is there sooner and several times slower.
    #[arg(long)]
    dev: bool,
    /// How the figures are printed: a table, or a list with an object for each program.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// A scanner to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// YARA-X.
    Yr,
    /// YARA.
    Yara,
    /// `ClamAV` (reads most YARA rules, counts files rather than rules).
    Clamscan,
}

impl Peer {
    const fn program(self) -> &'static str {
        match self {
            Self::Yr => "yr",
            Self::Yara => "yara",
            Self::Clamscan => "clamscan",
        }
    }

    fn command(self, what: &Scan, rules: &Path) -> Command {
        let threads = what.threads.to_string();
        let mut command = Command::new(self.program());
        match self {
            Self::Yr => {
                command.args(["scan", "--recursive", "--disable-warnings", "--threads", &threads]).arg(rules)
            }
            Self::Yara => command.args(["-r", "-N", "-w", "-p", &threads]).arg(rules),
            Self::Clamscan => {
                if !what.archives {
                    command.arg("--scan-archive=no");
                }
                command.args(["-r", "--infected", "--no-summary", "--database"]).arg(rules)
            }
        };
        command.arg(&what.files);
        command
    }

    /// Reads one line of output.
    fn finding(self, line: &str) -> Option<Finding> {
        match self {
            Self::Yr | Self::Yara => {
                let (rule, path) = line.split_once(' ')?;
                Some((rule.to_owned(), path.to_owned()))
            }
            Self::Clamscan => {
                let (path, name) = line.strip_suffix(" FOUND")?.rsplit_once(": ")?;
                Some((name.to_owned(), path.to_owned()))
            }
        }
    }
}

/// Rule and path.
type Finding = (String, String);

/// What one program did in its best round.
#[derive(Debug, Clone)]
struct Figures {
    program: &'static str,
    cpu_s: f64,
    wall_s: f64,
    peak_kib: u64,
    /// Memory that is not of files.
    anon_kib: u64,
    findings: BTreeSet<Finding>,
}

/// Runs the agent and its peers in turn, and prints what each took and found.
pub(crate) fn scan(what: &Scan) -> anyhow::Result<()> {
    for peer in &what.against {
        ensure!(programs::is_installed(peer.program()), "`{}` is not installed", peer.program());
    }
    let bins = build(&["tm-agent"], what.dev)?;
    ensure!(bins.ends_with(build_folder(what.dev)), "the build went elsewhere");
    let folder =
        tempfile::Builder::new().prefix("tm-bench-").tempdir().context("cannot make a throwaway folder")?;
    let rules = folder.path().join("rules.yar");
    fs::write(&rules, text(what)?).context("cannot write the rules")?;
    let (files, bytes) = count(&what.files)?;
    ensure!(files > 0, "there are no files in `{}`", what.files.display());

    let mut best: Vec<Figures> = Vec::new();
    for round in 1..=what.rounds {
        eprintln!("Round {round} of {}", what.rounds);
        let mut all = vec![agent(what, &bins, &rules)?];
        for peer in &what.against {
            all.push(measure(peer.program(), peer.command(what, &rules), |line| Ok(peer.finding(line)))?);
        }
        for (at, figures) in all.into_iter().enumerate() {
            match best.get_mut(at) {
                Some(known) if known.cpu_s <= figures.cpu_s => {}
                Some(known) => *known = figures,
                None => best.push(figures),
            }
        }
    }
    match what.output {
        Format::Table => table(what, files, bytes, &best),
        Format::Json => json(what, files, bytes, &best),
    }
}

fn agent(what: &Scan, bins: &Path, rules: &Path) -> anyhow::Result<Figures> {
    let mut command = Command::new(bins.join("tm-agent"));
    command.args(["scan", "--standalone", "-o", "json", "--threads", &what.threads.to_string(), "--pattern"]);
    command.arg(rules);
    if !what.archives {
        command.arg("--no-archives");
    }
    command.arg("--").arg(&what.files);
    let summed = Cell::new(false);
    let figures = measure("tm-agent", command, |line| {
        let line: Value = serde_json::from_str(line).context("the agent prints something else than JSON")?;
        let text = |key: &str| line[key].as_str().map(str::to_owned);
        let member = line["member"].as_array().is_some_and(|names| !names.is_empty());
        let found = line["type"] == "detection" && !member;
        summed.set(summed.get() || line["type"] == "summary");
        Ok(if found { text("rule").zip(text("path")) } else { None })
    })?;
    // It says 2 for an error as well.
    ensure!(summed.get(), "the agent did not scan; try `tm-agent pattern check` with these rules");
    Ok(figures)
}

/// Runs a program to its end.
fn measure(
    program: &'static str,
    mut command: Command,
    finding: impl Fn(&str) -> anyhow::Result<Option<Finding>>,
) -> anyhow::Result<Figures> {
    let (cpu, begin) = (children_cpu()?, Instant::now());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let out = child.stdout.take().context("its output is a pipe")?;
    let ended = AtomicBool::new(false);
    let (findings, (peak_kib, anon_kib)) = thread::scope(|scope| {
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
    Ok(Figures { program, cpu_s: cpu_s.max(0.01), wall_s, peak_kib, anon_kib, findings })
}

/// CPU time of every process that was started here and has been waited for, in seconds.
fn children_cpu() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("cannot look at ourselves")?;
    ticks(&stat, 16).map(|ticks| ticks / ticks_per_second()).context("/proc/self/stat is of another form")
}

/// The most memory that a process and its children had, and the most of it that is not of files, in KiB.
fn watch(pid: u32, ended: &AtomicBool) -> (u64, u64) {
    let mut most = (0, 0);
    while !ended.load(Ordering::Acquire) {
        let mut now = (0, 0);
        for pid in family(pid) {
            now.0 += status_kib(pid, "VmRSS").unwrap_or(0);
            now.1 += status_kib(pid, "RssAnon").unwrap_or(0);
        }
        most = (most.0.max(now.0), most.1.max(now.1));
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

/// The rules' text.
fn text(what: &Scan) -> anyhow::Result<String> {
    let Some(path) = &what.rules else {
        return Ok(rules::generate(what.generate.unwrap_or(1), 1));
    };
    if path.is_file() {
        return fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()));
    }
    let mut files: Vec<PathBuf> = fs::read_dir(path)
        .with_context(|| format!("cannot read `{}`", path.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "yar" || end == "yara"))
        .collect();
    files.sort_unstable();
    let mut text = String::new();
    for file in &files {
        text.push_str(
            &fs::read_to_string(file).with_context(|| format!("cannot read `{}`", file.display()))?,
        );
        text.push('\n');
    }
    ensure!(!text.is_empty(), "no rules in `{}`", path.display());
    Ok(text)
}

/// Regular files below a folder, and their bytes. Links are not followed.
fn count(folder: &Path) -> anyhow::Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read `{}`", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read `{}`", folder.display()))?;
            let facts =
                entry.metadata().with_context(|| format!("cannot read `{}`", entry.path().display()))?;
            if facts.is_dir() {
                folders.push(entry.path());
            } else if facts.is_file() {
                files += 1;
                bytes += facts.len();
            }
        }
    }
    Ok((files, bytes))
}

#[expect(clippy::cast_precision_loss, reason = "sizes of what is on a disk")]
fn per_second(amount: u64, figures: &Figures) -> f64 {
    amount as f64 / figures.cpu_s
}

/// Findings of the agent that the other does not have, and the other way round.
fn differences(all: &[Figures], other: &Figures) -> (usize, usize) {
    all.first().map_or((0, 0), |own| {
        (own.findings.difference(&other.findings).count(), other.findings.difference(&own.findings).count())
    })
}

fn table(what: &Scan, files: u64, bytes: u64, all: &[Figures]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}, {} build of the agent", machine(), build_name(what.dev))?;
    writeln!(out, "{files} files, {} MB, {} threads\n", bytes / 1_000_000, what.threads)?;
    writeln!(
        out,
        "{:<9} {:>7} {:>7} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "program", "CPU s", "wall s", "MB/CPU s", "files/CPU s", "peak MiB", "anon MiB", "findings"
    )?;
    for figures in all {
        writeln!(
            out,
            "{:<9} {:>7.2} {:>7.2} {:>8.1} {:>11.0} {:>8} {:>9} {:>9}",
            figures.program,
            figures.cpu_s,
            figures.wall_s,
            per_second(bytes, figures) / 1e6,
            per_second(files, figures),
            figures.peak_kib / 1024,
            figures.anon_kib / 1024,
            figures.findings.len(),
        )?;
    }
    for other in all.iter().skip(1) {
        let (ours, theirs) = differences(all, other);
        let own = all.first().map_or(1.0, |own| own.cpu_s);
        writeln!(
            out,
            "\nthe agent is {:.2} times as fast as {}; only the agent found {ours}, only {} found {theirs}",
            other.cpu_s / own,
            other.program,
            other.program
        )?;
    }
    Ok(())
}

fn json(what: &Scan, files: u64, bytes: u64, all: &[Figures]) -> anyhow::Result<()> {
    let rows: Vec<Value> = all
        .iter()
        .map(|figures| {
            let (missing, more) = differences(all, figures);
            serde_json::json!({
                "program": figures.program,
                "machine": machine(),
                "build": build_name(what.dev),
                "threads": what.threads,
                "files": files,
                "bytes": bytes,
                "cpu_s": figures.cpu_s,
                "wall_s": figures.wall_s,
                "mb_per_cpu_s": per_second(bytes, figures) / 1e6,
                "files_per_cpu_s": per_second(files, figures),
                "peak_mib": figures.peak_kib / 1024,
                "anon_mib": figures.anon_kib / 1024,
                "findings": figures.findings.len(),
                "findings_of_the_agent_missing": missing,
                "findings_more": more,
            })
        })
        .collect();
    writeln!(io::stdout(), "{:#}", Value::Array(rows)).context("cannot print")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_of_each_program_are_read() {
        let pair = |rule: &str, path: &str| Some((rule.to_owned(), path.to_owned()));
        assert_eq!(Peer::Yara.finding("marker /a/b c"), pair("marker", "/a/b c"));
        assert_eq!(Peer::Yr.finding("marker /a"), pair("marker", "/a"));
        assert_eq!(
            Peer::Clamscan.finding("/a: b: YARA.marker.UNOFFICIAL FOUND"),
            pair("YARA.marker.UNOFFICIAL", "/a: b")
        );
        assert_eq!(Peer::Clamscan.finding("/a: OK"), None);
    }

    #[test]
    fn a_program_is_measured_with_its_children() {
        let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo r /x";
        let mut command = Command::new("sh");
        command.args(["-c", &format!("(sh -c '{script}'); true")]);
        let figures = measure("sh", command, |line| Ok(Peer::Yara.finding(line))).unwrap();
        assert_eq!(figures.findings.len(), 1);
        assert!(figures.wall_s > 0.0 && figures.cpu_s > 0.0);
        let mut failing = Command::new("sh");
        failing.args(["-c", "exit 7"]);
        assert!(measure("sh", failing, |_| Ok(None)).is_err());
    }
}
