//! One task for everybody, several times.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{PATIENCE, rest, rows::Figures, site::Site};
use crate::simulators::Simulators;

/// One push.
#[derive(Debug, Clone, Copy)]
struct Round {
    cpu_us: f64,
    received_ms: u64,
    done_ms: u64,
}

/// Orders one scan for every agent at a time. Time runs from before the order is typed until the last agent has
/// it, and until the last end of a task is acknowledged.
pub(super) fn measure(
    site: &mut Site,
    fleet: &mut Simulators,
    rounds: u32,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let agents = u64::from(figures.agents);
    let before = fleet.sums();
    let (mut all, mut ordered) = (Vec::new(), BTreeSet::new());
    for round in 1..=u64::from(rounds) {
        let (cpu, begin) = (site.cpu_us()?, now_ms()?);
        let made =
            site.tmctl(&["scan", "start", "--query", "connected", "--path", "/nowhere", "-o", "json"])?;
        let sums = fleet.wait("every task's end to be acknowledged", PATIENCE, |sums| {
            sums.done >= before.done + round * agents
        })?;
        rest(site)?;
        ordered.extend(texts(&made, "id")?);
        all.push(Round {
            cpu_us: (site.cpu_us()? - cpu) / f64::from(figures.agents),
            received_ms: sums.last_task_ms.saturating_sub(begin),
            done_ms: sums.last_done_ms.saturating_sub(begin),
        });
    }
    let sums = fleet.sums();
    ensure!(
        sums.tasks == before.tasks + agents * u64::from(rounds),
        "{} tasks came to {agents} agents in {rounds} rounds",
        sums.tasks - before.tasks
    );
    figures.lost += lost(site, &ordered)?;
    let median = |key: fn(&Round) -> f64| {
        let mut values: Vec<f64> = all.iter().map(key).collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    figures.push_cpu_us_per_task = median(|round| round.cpu_us);
    figures.push_received_ms = median(|round| ms(round.received_ms));
    figures.push_last_ms = median(|round| ms(round.done_ms));
    Ok(())
}

fn ms(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64() * 1000.0
}

/// How many of the ordered tasks have no end in the log. An error if one has two.
fn lost(site: &Site, ordered: &BTreeSet<String>) -> anyhow::Result<u64> {
    let log = site.tmctl(&[
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
    Ok(u64::try_from(ordered.iter().filter(|task| !distinct.contains(task)).count())?)
}

/// A text of every row of a JSON list.
fn texts(rows: &str, key: &str) -> anyhow::Result<Vec<String>> {
    let rows: Vec<Value> = serde_json::from_str(rows).context("not a list")?;
    rows.iter()
        .map(|row| row[key].as_str().map(str::to_owned).with_context(|| format!("a row has no `{key}`")))
        .collect()
}

pub(super) fn now_ms() -> anyhow::Result<u64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is set")?;
    Ok(u64::try_from(now.as_millis())?)
}
