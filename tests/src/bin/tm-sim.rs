//! `tm-sim`: many simulated agents in one process, for `cargo xtask simulate` and the benches.
//!
//! `tm-sim ADDRESS PERSONAS FIRST AGENTS [TOKEN-FILE]` takes the agents FIRST to FIRST + AGENTS - 1 from the file
//! PERSONAS, enrolling those that it does not hold, and waits. It hears lines: `connect` lets all connect (64
//! handshakes at a time), `cut` ends every link at once without a word (they come back as agents do, all at once),
//! `end` or the end of the input ends it, as SIGINT and SIGTERM do. It says lines of JSON: `enrolled` with a count while
//! it enrolls, one object with `ready` once it has everybody, then five times a second the sums
//! ([`tm_tests::fleet::Sums`]), and once more at its end.
//!
//! Every task is taken and done at once. Nothing of a host is behind the agents, and they keep no journal on disk.

use std::{
    env, fs,
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tm_tests::{
    fleet::{Fleet, Pace},
    personas,
    sim_agent::{self, SimAgent},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

/// Handshakes on their way at a time, when all connect on purpose.
const AT_A_TIME: usize = 64;
/// Descriptors beside the agents'.
const SPARE: u64 = 128;
/// How often the sums are said.
const EVERY: Duration = Duration::from_millis(200);

struct Args {
    at: SocketAddr,
    personas: PathBuf,
    first: u64,
    agents: u64,
    token: Option<String>,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.context("cannot start threads").and_then(|runtime| runtime.block_on(run()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn args() -> anyhow::Result<Args> {
    let args: Vec<String> = env::args().skip(1).collect();
    let ([at, personas, first, agents], token) = match args.as_slice() {
        [at, personas, first, agents] => ([at, personas, first, agents], None),
        [at, personas, first, agents, token] => ([at, personas, first, agents], Some(token)),
        _ => anyhow::bail!("usage: tm-sim ADDRESS PERSONAS FIRST AGENTS [TOKEN-FILE]"),
    };
    let token = token.map(|path| {
        let text = fs::read_to_string(path).context("cannot read the token's file")?;
        anyhow::Ok(text.trim().to_owned())
    });
    Ok(Args {
        at: at.parse().context("the first argument is no address with a port")?,
        personas: personas.into(),
        first: first.parse().context("the third argument is no number")?,
        agents: agents.parse().context("the fourth argument is no number")?,
        token: token.transpose()?,
    })
}

async fn run() -> anyhow::Result<()> {
    let args = args()?;
    ensure!(args.agents > 0, "there is nothing to do");
    room(args.agents)?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut known = tokio::select! {
        known = everybody(&args) => known?,
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    };
    say(&serde_json::json!({ "ready": args.agents }))?;

    let script = sim_agent::done_at_once();
    let gentle = Fleet::new(Pace::Agent).opening(AT_A_TIME);
    let mut fleet: Vec<SimAgent> = Vec::new();
    let mut lines = input();
    let mut clock = interval(EVERY);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            line = lines.recv() => match line.as_deref() {
                Some("connect") => {
                    let numbers = args.first..args.first + args.agents;
                    let personas = numbers.filter_map(|number| known.remove(&number));
                    fleet.extend(personas.map(|persona| {
                        SimAgent::start_in(&gentle, persona, vec![args.at], script.clone())
                    }));
                }
                Some("cut") => {
                    gentle.open_all();
                    gentle.cut();
                }
                Some("end") | None => break,
                Some(other) => anyhow::bail!("the input says `{other}`"),
            },
            _ = clock.tick() => say(&gentle.totals.sums())?,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    say(&gentle.totals.sums())
}

/// The lines of the input, until it ends. The thread that reads them ends with the process.
fn input() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(8);
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// The agents of the file, and those that it did not hold.
async fn everybody(args: &Args) -> anyhow::Result<std::collections::BTreeMap<u64, tm_tests::wire::Persona>> {
    let mut known = personas::load(&args.personas)
        .with_context(|| format!("cannot use `{}`", args.personas.display()))?;
    let missing: Vec<u64> =
        (args.first..args.first + args.agents).filter(|number| !known.contains_key(number)).collect();
    if missing.is_empty() {
        return Ok(known);
    }
    let token = args.token.as_deref().with_context(|| {
        format!("{} agents are not enrolled, and there is no token to enroll them with", missing.len())
    })?;
    let mut count = 0_u64;
    let mut enrolled = |_| {
        count += 1;
        if count.is_multiple_of(100) {
            // What cannot be said here cannot be said later either, and that is an error.
            let _ = say(&serde_json::json!({ "enrolled": count }));
        }
    };
    known.extend(
        personas::enroll(&args.personas, args.at, token, missing, &mut enrolled)
            .await
            .context("an agent could not be enrolled")?,
    );
    say(&serde_json::json!({ "enrolled": count }))?;
    Ok(known)
}

/// Makes room for one descriptor for each agent.
fn room(agents: u64) -> anyhow::Result<()> {
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).context("cannot raise the limit")?;
    let needed = agents + SPARE;
    ensure!(
        most.is_none_or(|most| most >= needed),
        "{agents} agents need {needed} descriptors, and this process may have {} (ulimit -Hn)",
        most.unwrap_or_default()
    );
    Ok(())
}

fn say(line: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(line).context("cannot print")?;
    text.push('\n');
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot print")
}
