//! `cargo xtask bench scan`: the agent's scan beside other scanners, on the same files with the same rules.
//!
//! **Invariant:** programs run in turn, never at once; findings are pairs of rule and file, and a difference from
//! the agent's is counted, because a scanner that skips is always fast.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    Build, Format, machine,
    measure::{Finding, Run, measure},
    rules::{Numbers, Rules},
};
use crate::programs;

/// Bytes of each file that `--small` makes: between these.
const SMALL: (u64, u64) = (200, 6000);
/// Files in one folder of those.
const IN_A_FOLDER: u32 = 250;

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Scan {
    /// The folder to scan.
    #[arg(long, value_name = "DIR", required_unless_present = "small")]
    files: Option<PathBuf>,
    /// Make so many small text files instead, and scan them.
    #[arg(long, value_name = "N", conflicts_with = "files", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    small: Option<u32>,
    #[command(flatten)]
    rules: Rules,
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
    #[command(flatten)]
    build: Build,
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

    fn command(self, what: &Scan, files: &Path, rules: &Path) -> Command {
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
        command.arg(files);
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

/// What one program did.
#[derive(Debug, Clone)]
struct Figures {
    program: &'static str,
    /// On a folder of one small file: starting and loading the rules.
    load: Run,
    /// On all files: the round with the least CPU time.
    scan: Run,
}

impl Figures {
    /// CPU time of looking at files alone, in seconds.
    fn looking_s(&self) -> f64 {
        (self.scan.cpu_s - self.load.cpu_s).max(0.01)
    }
}

/// Runs the agent and its peers in turn, and prints what each took and found.
pub(crate) fn scan(what: &Scan) -> anyhow::Result<()> {
    for peer in &what.against {
        ensure!(programs::is_installed(peer.program()), "`{}` is not installed", peer.program());
    }
    let bins = what.build.folder(&["tm-agent"])?;
    let folder =
        tempfile::Builder::new().prefix("tm-bench-").tempdir().context("cannot make a throwaway folder")?;
    let rules = folder.path().join("rules.yar");
    fs::write(&rules, what.rules.text()?).context("cannot write the rules")?;
    let files = match (&what.files, what.small) {
        (Some(files), _) => files.clone(),
        (None, count) => make_small(&folder.path().join("files"), count.unwrap_or(1))?,
    };
    let (count, bytes) = count(&files)?;
    ensure!(count > 0, "there are no files in `{}`", files.display());
    let one = make_small(&folder.path().join("one"), 1)?;

    let run_all = |files: &Path, rounds: u32| -> anyhow::Result<Vec<Run>> {
        let mut best: Vec<Run> = Vec::new();
        for round in 1..=rounds {
            eprintln!("Round {round} of {rounds}");
            let mut all = vec![agent(&bins, what.threads, what.archives, &[&rules], files, None)?];
            for peer in &what.against {
                let command = peer.command(what, files, &rules);
                all.push(measure(peer.program(), command, |line| Ok(peer.finding(line)))?);
            }
            for (at, run) in all.into_iter().enumerate() {
                match best.get_mut(at) {
                    Some(known) if known.cpu_s <= run.cpu_s => {}
                    Some(known) => *known = run,
                    None => best.push(run),
                }
            }
        }
        Ok(best)
    };
    eprintln!("Loading alone");
    let loads = run_all(&one, what.rounds)?;
    eprintln!("All files");
    let scans = run_all(&files, what.rounds)?;
    let programs = ["tm-agent"].into_iter().chain(what.against.iter().map(|peer| peer.program()));
    let all: Vec<Figures> = programs
        .zip(loads)
        .zip(scans)
        .map(|((program, load), scan)| Figures { program, load, scan })
        .collect();
    match what.output {
        Format::Table => table(what, count, bytes, &all),
        Format::Json => json(what, count, bytes, &all),
    }
}

/// The agent's scan of `files` with `rules`; with `cache`, it remembers there what is clean.
pub(super) fn agent(
    bins: &Path,
    threads: u16,
    archives: bool,
    rules: &[&Path],
    files: &Path,
    cache: Option<&Path>,
) -> anyhow::Result<Run> {
    let mut command = Command::new(bins.join("tm-agent"));
    command.args(["scan", "--standalone", "-o", "json", "--threads", &threads.to_string()]);
    for rules in rules {
        command.arg("--pattern").arg(rules);
    }
    if let Some(cache) = cache {
        command.arg("--cache").arg(cache);
    }
    if !archives {
        command.arg("--no-archives");
    }
    command.arg("--").arg(files);
    let (summed, known) = (Cell::new(false), Cell::new(0));
    let run = measure("tm-agent", command, |line| {
        let line: Value = serde_json::from_str(line).context("the agent prints something else than JSON")?;
        let text = |key: &str| line[key].as_str().map(str::to_owned);
        let member = line["member"].as_array().is_some_and(|names| !names.is_empty());
        let found = line["type"] == "detection" && !member;
        if line["type"] == "summary" {
            summed.set(true);
            known.set(line["known"].as_u64().unwrap_or(0));
        }
        Ok(if found { text("rule").zip(text("path")) } else { None })
    })?;
    // It says 2 for an error as well.
    ensure!(summed.get(), "the agent did not scan; try `tm-agent pattern check` with these rules");
    Ok(Run { known: known.get(), ..run })
}

/// Makes `count` small text files below `folder`, the same each time.
fn make_small(folder: &Path, count: u32) -> anyhow::Result<PathBuf> {
    let mut numbers = Numbers::new(7);
    for number in 0..count {
        let sub = folder.join(format!("{:04}", number / IN_A_FOLDER));
        if number % IN_A_FOLDER == 0 {
            fs::create_dir_all(&sub).with_context(|| format!("cannot make `{}`", sub.display()))?;
        }
        let size = usize::try_from(SMALL.0 + numbers.below(SMALL.1 - SMALL.0)).unwrap_or(0);
        let mut text = String::with_capacity(size + 16);
        while text.len() < size {
            text.push_str(numbers.plain_word());
            text.push(if numbers.below(9) == 0 { '\n' } else { ' ' });
        }
        let file = sub.join(format!("{number}.txt"));
        fs::write(&file, text).with_context(|| format!("cannot write `{}`", file.display()))?;
    }
    Ok(folder.to_owned())
}

/// Regular files below a folder, and their bytes. Links are not followed.
pub(super) fn count(folder: &Path) -> anyhow::Result<(u64, u64)> {
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
fn per_second(amount: u64, seconds: f64) -> f64 {
    amount as f64 / seconds
}

/// Findings of the agent that the other does not have, and the other way round.
fn differences(all: &[Figures], other: &Figures) -> (usize, usize) {
    let only = |one: &BTreeSet<Finding>, other: &BTreeSet<Finding>| one.difference(other).count();
    all.first().map_or((0, 0), |own| {
        let (own, other) = (&own.scan.findings, &other.scan.findings);
        (only(own, other), only(other, own))
    })
}

fn table(what: &Scan, files: u64, bytes: u64, all: &[Figures]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}, {} of the agent", machine(), what.build.name())?;
    writeln!(
        out,
        "{files} files, {} MB, {}, {} threads; rates are without loading\n",
        bytes / 1_000_000,
        what.rules,
        what.threads
    )?;
    writeln!(
        out,
        "{:<9} {:>8} {:>8} {:>8} {:>8} {:>9} {:>11} {:>8} {:>8} {:>8}",
        "program",
        "CPU s",
        "wall s",
        "load s",
        "load MiB",
        "MB/CPU s",
        "files/CPU s",
        "peak MiB",
        "anon MiB",
        "findings"
    )?;
    for figures in all {
        writeln!(
            out,
            "{:<9} {:>8.2} {:>8.2} {:>8.2} {:>8} {:>9.1} {:>11.0} {:>8} {:>8} {:>8}",
            figures.program,
            figures.scan.cpu_s,
            figures.scan.wall_s,
            figures.load.cpu_s,
            figures.load.memory.largest_anon / 1024,
            per_second(bytes, figures.looking_s()) / 1e6,
            per_second(files, figures.looking_s()),
            figures.scan.memory.resident / 1024,
            figures.scan.memory.largest_anon / 1024,
            figures.scan.findings.len(),
        )?;
    }
    for other in all.iter().skip(1) {
        let (ours, theirs) = differences(all, other);
        let (whole, looking) = all.first().map_or((1.0, 1.0), |own| (own.scan.cpu_s, own.looking_s()));
        writeln!(
            out,
            "\nthe agent is {:.2} times as fast as {}, {:.2} times with loading; only the agent found {ours}, \
             only {} found {theirs}",
            other.looking_s() / looking,
            other.program,
            other.scan.cpu_s / whole,
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
                "build": what.build.name(),
                "rules": what.rules.to_string(),
                "threads": what.threads,
                "files": files,
                "bytes": bytes,
                "cpu_s": figures.scan.cpu_s,
                "wall_s": figures.scan.wall_s,
                "load_cpu_s": figures.load.cpu_s,
                "load_wall_s": figures.load.wall_s,
                "load_anon_mib": figures.load.memory.largest_anon / 1024,
                "mb_per_cpu_s": per_second(bytes, figures.looking_s()) / 1e6,
                "files_per_cpu_s": per_second(files, figures.looking_s()),
                "peak_mib": figures.scan.memory.resident / 1024,
                "anon_mib": figures.scan.memory.anon / 1024,
                "largest_anon_mib": figures.scan.memory.largest_anon / 1024,
                "findings": figures.scan.findings.len(),
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
    fn small_files_are_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("1"), folder.path().join("2"));
        let made = |folder: &Path| count(&make_small(folder, 300).unwrap()).unwrap();
        assert_eq!(made(&one), made(&two));
        assert_eq!(made(&one).0, 300);
        let read = |folder: &Path| fs::read(folder.join("0001/299.txt")).unwrap();
        assert_eq!(read(&one), read(&two));
    }
}
