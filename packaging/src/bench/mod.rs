//! `cargo xtask bench`: what the programs cost, measured on this machine.
//!
//! **Invariant:** figures are of CPU seconds (user and system), and come with the facts of the machine and the
//! build they were measured with.

mod again;
mod bulk;
mod link;
mod measure;
mod processes;
mod rules;
mod scan;

use std::{fs, path::Path, path::PathBuf, thread};

use anyhow::{Context as _, ensure};

pub(crate) use self::{
    again::{Again, again},
    bulk::{Bulk, bulk},
    link::{Link, What, link},
    processes::{Hold, Processes, hold, processes},
    scan::{Scan, scan},
};
use crate::programs;

/// How figures are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Which build is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Build {
    /// Measure the unoptimized build, which is there sooner and several times slower.
    #[arg(long)]
    dev: bool,
    /// Measure the programs in this folder, and build nothing.
    #[arg(long, value_name = "DIR", conflicts_with = "dev")]
    bins: Option<PathBuf>,
}

impl Build {
    /// The folder of the programs, built unless they are there.
    pub(crate) fn folder(&self, packages: &[&str]) -> anyhow::Result<PathBuf> {
        match &self.bins {
            Some(bins) => fs::canonicalize(bins).with_context(|| format!("no folder `{}`", bins.display())),
            None => build(packages, self.dev),
        }
    }

    fn name(&self) -> &'static str {
        if self.bins.is_some() { "given build" } else { build_name(self.dev) }
    }
}

/// Builds what is measured, and returns the folder it is in.
fn build(packages: &[&str], dev: bool) -> anyhow::Result<PathBuf> {
    let mut args = vec!["build", "--locked", "--bins"];
    args.extend(packages.iter().flat_map(|package| ["-p", package]));
    if !dev {
        args.push("--release");
    }
    eprintln!("Building: cargo {}", args.join(" "));
    let status = programs::cargo()?.args(args).status().context("cannot run cargo")?;
    ensure!(status.success(), "the programs could not be built");
    let here = std::env::current_exe().context("cannot tell where this program is")?;
    let target = here.parent().and_then(Path::parent).context("this program lies in a target folder")?;
    Ok(target.join(build_folder(dev)))
}

const fn build_folder(dev: bool) -> &'static str {
    if dev { "debug" } else { "release" }
}

const fn build_name(dev: bool) -> &'static str {
    if dev { "dev build (unoptimized)" } else { "release build" }
}

#[expect(clippy::cast_precision_loss, reason = "a hundred, on every Linux")]
fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

/// Two neighbouring fields of `/proc/PID/stat` (proc(5), counted from 1), added: 14 for the process's own CPU
/// time, 16 for that of children it has waited for. The second field may hold anything between its parentheses.
fn ticks(stat: &str, field: usize) -> Option<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at.checked_sub(3)?)?.parse::<f64>().ok();
    Some(number(field)? + number(field + 1)?)
}

fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{} ({cores} cores), Linux {}", model.map_or("unknown processor", |(_, m)| m), kernel.trim())
}

/// A number of KiB in `/proc/PID/status`, for example `VmRSS`.
fn status_kib(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_read_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 3 4 20 0 8 0 5 0 0";
        assert_eq!(ticks(stat, 14), Some(300.0));
        assert_eq!(ticks(stat, 16), Some(7.0));
        assert_eq!(ticks("7 (x) S 1", 14), None);
        assert!(status_kib(std::process::id(), "VmRSS").unwrap() > 0);
    }
}
