//! `tm-sim`: many simulated agents in one process, for benches.
//!
//! `tm-sim ADDRESS TOKEN-FILE AGENTS ROUNDS` enrolls so many agents, connects them all, takes every order and
//! is done with it at once. It prints `connected` when all have their session, then for each round, when every
//! agent has had one more task acknowledged to its end, `round N MS`: the milliseconds since 1970 at the last
//! acknowledgement. It ends after the last round, or with an error if nothing happens for two minutes.

use std::{
    env, fs,
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tm_tests::{
    sim_agent::{self, SimAgent},
    wire::Persona,
};

/// Enrollments on their way at a time.
const AT_A_TIME: usize = 16;
/// Reports that one task is answered with.
const REPORTS: u64 = 3;
/// Longest time without anything new.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.context("cannot start threads").and_then(|runtime| runtime.block_on(run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [at, token, agents, rounds] = args.as_slice() else {
        anyhow::bail!("usage: tm-sim ADDRESS TOKEN-FILE AGENTS ROUNDS");
    };
    let at: SocketAddr = at.parse().context("the first argument is no address with a port")?;
    let token: Arc<str> =
        fs::read_to_string(token).context("cannot read the token's file")?.trim().to_owned().into();
    let agents: usize = agents.parse().context("the third argument is no number")?;
    let rounds: u64 = rounds.parse().context("the fourth argument is no number")?;
    ensure!(agents > 0 && rounds > 0, "there is nothing to do");

    let script = sim_agent::done_at_once();
    let fleet: Vec<SimAgent> = stream::iter(0..agents)
        .map(|number| {
            let (token, script) = (Arc::clone(&token), script.clone());
            async move {
                let persona = Persona::enroll(at, &token, &format!("sim-{number:05}")).await?;
                Ok::<_, io::Error>(SimAgent::start(persona, at, script))
            }
        })
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await
        .context("an agent could not be enrolled")?;
    until(&fleet, |agent| u64::from(agent.snapshot().connected), 1).await.context("not all are connected")?;
    say("connected")?;
    for round in 1..=rounds {
        until(&fleet, |agent| agent.snapshot().reports_stored, round * REPORTS)
            .await
            .with_context(|| format!("not everything of round {round} is stored"))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        say(&format!("round {round} {}", now.as_millis()))?;
    }
    Ok(())
}

/// Waits until `count` of every agent is at least `most`.
async fn until(fleet: &[SimAgent], count: impl Fn(&SimAgent) -> u64, most: u64) -> anyhow::Result<()> {
    let (mut reached, mut since) = (0, Instant::now());
    loop {
        let sum: u64 = fleet.iter().map(|agent| count(agent).min(most)).sum();
        if sum == most * u64::try_from(fleet.len())? {
            return Ok(());
        }
        if sum > reached {
            (reached, since) = (sum, Instant::now());
        }
        ensure!(since.elapsed() < PATIENCE, "{sum} of {} after waiting in vain", most * fleet.len() as u64);
        // Often enough to date the last acknowledgement, seldom enough not to be what is measured.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot print")
}
