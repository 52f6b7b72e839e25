//! `cargo xtask bench connect|push|storm|idle|link`: what agents' links cost the manager, with simulated agents.
//!
//! Each size has a freshly started manager on loopback, in a throwaway folder; agents are enrolled once. CPU is the
//! manager's, user and system, of `/proc/PID/stat`; memory is the difference of its RssAnon before and after. The
//! simulator runs on the same machine and takes its share of the cores: wall times are those of both.
//!
//! **Invariant:** what is ordered is looked for in the manager's event log afterwards; a task without an end, or with
//! two, is an error.

mod push;
mod rows;
mod site;
mod storm;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use self::{
    rows::{Figures, print},
    site::Site,
};
use super::{Build, Format};
use crate::simulators::Simulators;

/// How long nothing at all may happen.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a manager may take to come to rest.
const REST: Duration = Duration::from_secs(60);

/// Which parts are measured. Bulk transfer has its place here once there is a bench of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct What {
    push: bool,
    storm: bool,
    idle: bool,
}

impl What {
    const NOTHING: Self = Self { push: false, storm: false, idle: false };
    /// Handshakes and memory, which every part begins with.
    pub(crate) const CONNECT: Self = Self::NOTHING;
    pub(crate) const PUSH: Self = Self { push: true, ..Self::NOTHING };
    pub(crate) const STORM: Self = Self { storm: true, ..Self::NOTHING };
    pub(crate) const IDLE: Self = Self { idle: true, ..Self::NOTHING };
    pub(crate) const ALL: Self = Self { push: true, storm: true, idle: true };
}

/// How it is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Link {
    /// Simulated agents; several sizes are measured one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 5000, 10_000], value_parser = clap::value_parser!(u32).range(1..=10_000))]
    agents: Vec<u32>,
    /// Pushes to everybody, one after the other; the middle one counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long idle agents are left alone, in seconds; shorter than two heartbeats (25 s) says little.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    #[command(flatten)]
    build: Build,
    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Measures and prints.
pub(crate) fn link(what: What, how: &Link) -> anyhow::Result<()> {
    let bins = how.build.folder(&["tm-manager", "tmctl", "tm-tests"])?;
    let mut site = Site::prepare(&bins)?;
    let mut sizes = how.agents.clone();
    sizes.sort_unstable();
    sizes.dedup();
    let largest = *sizes.last().context("there is at least one size")?;
    eprintln!("Enrolling {largest} agents.");
    let enrolled = enroll(&mut site, largest)?;
    let mut all = Vec::new();
    for agents in sizes {
        eprintln!("Measuring with {agents} agents.");
        let mut figures = Figures { agents, ..Figures::default() };
        if agents == largest {
            figures.enroll_per_s = Some(enrolled.0);
            figures.enroll_cpu_us = Some(enrolled.1);
        }
        size(&mut site, what, how, &mut figures)?;
        all.push(figures);
    }
    print(&all, how.build.name(), how.output)?;
    let lost: u64 = all.iter().map(|figures| figures.lost).sum();
    ensure!(lost == 0, "{lost} tasks or agents were lost");
    Ok(())
}

/// Enrollments per second, and the manager's CPU for one, in microseconds.
fn enroll(site: &mut Site, agents: u32) -> anyhow::Result<(f64, f64)> {
    site.serve()?;
    let token = site.token(agents)?;
    site.rule()?;
    let (cpu, begin) = (site.cpu_us()?, Instant::now());
    let mut fleet =
        Simulators::start(&site.simulator(), site.agents, &site.personas(), agents, Some(&token))?;
    fleet.wait_ready(PATIENCE)?;
    let (took, cpu) = (begin.elapsed().as_secs_f64(), site.cpu_us()? - cpu);
    fleet.end()?;
    Ok((f64::from(agents) / took, cpu / f64::from(agents)))
}

fn size(site: &mut Site, what: What, how: &Link, figures: &mut Figures) -> anyhow::Result<()> {
    let agents = figures.agents;
    site.serve()?;
    let mut fleet = Simulators::start(&site.simulator(), site.agents, &site.personas(), agents, None)?;
    fleet.wait_ready(PATIENCE)?;
    rest(site)?;
    let (cpu, memory, begin) = (site.cpu_us()?, site.anonymous_kib()?, Instant::now());
    fleet.tell("connect")?;
    let all = u64::from(agents);
    fleet.wait("all to be connected", PATIENCE, |sums| sums.connected == all)?;
    figures.connect_s = begin.elapsed().as_secs_f64();
    rest(site)?;
    figures.handshake_cpu_us = (site.cpu_us()? - cpu) / f64::from(agents);
    let sums = fleet.sums();
    ensure!(sums.sessions == all, "{} sessions of {all} agents: {sums:?}", sums.sessions);
    if what.idle {
        let (cpu, begin) = (site.cpu_us()?, Instant::now());
        thread::sleep(Duration::from_secs(u64::from(how.seconds)));
        let took = begin.elapsed().as_secs_f64();
        figures.idle_core_percent = Some((site.cpu_us()? - cpu) / 1e4 / took);
        let sums = fleet.sums();
        ensure!(sums.sessions == all && sums.connected == all, "idle links broke: {sums:?}");
    }
    let grown = site.anonymous_kib()?.saturating_sub(memory);
    figures.idle_kib_per_agent = u32::try_from(grown).map_or(f64::NAN, f64::from) / f64::from(agents);
    if what.push {
        push::measure(site, &mut fleet, how.rounds, figures)?;
    }
    if what.storm {
        storm::measure(site, &mut fleet, figures)?;
    }
    site.check()?;
    fleet.end()?;
    Ok(())
}

/// Waits until the manager has nothing left to do but heartbeats.
fn rest(site: &mut Site) -> anyhow::Result<()> {
    let end = Instant::now() + REST;
    loop {
        let before = site.cpu_us()?;
        thread::sleep(Duration::from_secs(1));
        // Ten thousand agents' heartbeats must not take 3 % of a core; unoptimized they may take some more.
        if site.cpu_us()? - before <= 60_000.0 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the manager does not come to rest");
    }
}
