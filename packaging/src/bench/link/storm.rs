//! Everybody gone at once, and back.

use super::{PATIENCE, push::now_ms, rest, rows::Figures, site::Site};
use crate::simulators::Simulators;

/// Cuts every link at once; then kills the manager under its agents. Agents return as real ones do, the first
/// attempt after one to two seconds.
pub(super) fn measure(site: &mut Site, fleet: &mut Simulators, figures: &mut Figures) -> anyhow::Result<()> {
    let agents = u64::from(figures.agents);
    let before = fleet.sums();
    let (cpu, begin) = (site.cpu_us()?, now_ms()?);
    fleet.tell("cut")?;
    let sums = fleet.wait("all to be back", PATIENCE, |sums| {
        sums.connected == agents && sums.sessions >= before.sessions + agents
    })?;
    figures.storm_all_back_s = Some(seconds(begin, sums.last_connected_ms));
    rest(site)?;
    figures.storm_cpu_us = Some((site.cpu_us()? - cpu) / f64::from(figures.agents));

    let before = fleet.sums();
    let begin = now_ms()?;
    site.kill_and_serve()?;
    let sums = fleet.wait("all to be back after the manager's death", PATIENCE, |sums| {
        sums.connected == agents && sums.sessions >= before.sessions + agents
    })?;
    figures.restart_all_back_s = Some(seconds(begin, sums.last_connected_ms));
    rest(site)?;
    figures.lost += agents.saturating_sub(fleet.sums().connected);
    Ok(())
}

fn seconds(from_ms: u64, to_ms: u64) -> f64 {
    std::time::Duration::from_millis(to_ms.saturating_sub(from_ms)).as_secs_f64()
}
