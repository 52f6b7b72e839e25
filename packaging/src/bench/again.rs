//! `cargo xtask bench again`: what a second scan costs that remembers which files are clean, and what a new
//! pattern costs over files that the old ones have seen.
//!
//! Files count as known only where their file system keeps times that nobody can set and they were last changed
//! minutes ago, so a folder made for the bench would show nothing.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    Build, Format, machine,
    measure::Run,
    rules::{self, Rules},
    scan::{agent, count},
};

/// Rules of the new pattern.
const NEW: u32 = 5;

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Again {
    /// The folder to scan, on a disk of this machine.
    #[arg(long, value_name = "DIR")]
    files: PathBuf,
    #[command(flatten)]
    rules: Rules,
    /// Scanning threads.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Rounds; the figures are of the one with the least CPU time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    #[command(flatten)]
    build: Build,
    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Scans, scans again, and adds a pattern.
pub(crate) fn again(what: &Again) -> anyhow::Result<()> {
    let bins = what.build.folder(&["tm-agent"])?;
    let folder =
        tempfile::Builder::new().prefix("tm-bench-").tempdir().context("cannot make a throwaway folder")?;
    let (old, new) = (folder.path().join("old.yar"), folder.path().join("new.yar"));
    fs::write(&old, what.rules.text()?).context("cannot write the rules")?;
    fs::write(&new, rules::generate(NEW, 2)).context("cannot write the rules")?;
    let (cache, kept) = (folder.path().join("cache"), folder.path().join("kept"));
    let (files, bytes) = count(&what.files)?;
    ensure!(files > 0, "there are no files in `{}`", what.files.display());

    let best = |rules: &[&Path], prepare: &dyn Fn() -> io::Result<()>, is_cached: bool| {
        let mut best: Option<Run> = None;
        for _ in 0..what.rounds {
            prepare().context("cannot prepare the cache")?;
            let cache = is_cached.then_some(cache.as_path());
            let run = agent(&bins, what.threads, false, rules, &what.files, cache)?;
            if best.as_ref().is_none_or(|best| run.cpu_s < best.cpu_s) {
                best = Some(run);
            }
        }
        best.context("there is a round")
    };
    let forget = || if cache.exists() { fs::remove_file(&cache) } else { Ok(()) };
    let first = best(&[&old], &forget, true)?;
    fs::copy(&cache, &kept).context("the scan has remembered nothing")?;
    let restore = || fs::copy(&kept, &cache).map(drop);
    let rows = [
        ("first scan", first),
        ("the same again", best(&[&old], &restore, true)?),
        ("with a new pattern", best(&[&old, &new], &restore, true)?),
        ("the new pattern alone, nothing known", best(&[&new], &|| Ok(()), false)?),
    ];
    match what.output {
        Format::Table => table(what, files, bytes, &rows),
        Format::Json => json(what, files, bytes, &rows),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count of files")]
fn us_per_file(run: &Run, files: u64) -> f64 {
    run.cpu_s * 1e6 / files as f64
}

/// How many times as fast as the first.
fn ratio(rows: &[(&str, Run)], run: &Run) -> f64 {
    rows.first().map_or(1.0, |(_, first)| first.cpu_s / run.cpu_s)
}

fn table(what: &Again, files: u64, bytes: u64, rows: &[(&str, Run)]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}, {} of the agent", machine(), what.build.name())?;
    writeln!(
        out,
        "{files} files, {} MB, {}, {} threads; the new pattern has {NEW} rules\n",
        bytes / 1_000_000,
        what.rules,
        what.threads
    )?;
    writeln!(
        out,
        "{:<37} {:>8} {:>8} {:>11} {:>8} {:>9} {:>8} {:>8}",
        "scan", "CPU s", "wall s", "µs per file", "known", "anon MiB", "findings", "times"
    )?;
    for (name, run) in rows {
        writeln!(
            out,
            "{name:<37} {:>8.2} {:>8.2} {:>11.1} {:>8} {:>9} {:>8} {:>8.1}",
            run.cpu_s,
            run.wall_s,
            us_per_file(run, files),
            run.known,
            run.memory.largest_anon / 1024,
            run.findings.len(),
            ratio(rows, run),
        )?;
    }
    Ok(())
}

fn json(what: &Again, files: u64, bytes: u64, rows: &[(&str, Run)]) -> anyhow::Result<()> {
    let rows: Vec<Value> = rows
        .iter()
        .map(|(name, run)| {
            serde_json::json!({
                "scan": name,
                "machine": machine(),
                "build": what.build.name(),
                "rules": what.rules.to_string(),
                "threads": what.threads,
                "files": files,
                "bytes": bytes,
                "known": run.known,
                "cpu_s": run.cpu_s,
                "wall_s": run.wall_s,
                "us_per_file": us_per_file(run, files),
                "largest_anon_mib": run.memory.largest_anon / 1024,
                "findings": run.findings.len(),
                "times_as_fast_as_the_first": ratio(rows, run),
            })
        })
        .collect();
    writeln!(io::stdout(), "{:#}", Value::Array(rows)).context("cannot print")
}
