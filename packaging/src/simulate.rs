//! `cargo xtask simulate`: a fleet that is not there, for a real manager.
//!
//! **Invariant:** what is said at the end is what the simulators counted; nothing is assumed.

use std::{
    io::{self, IsTerminal as _, Write as _},
    net::{SocketAddr, ToSocketAddrs as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{
    bench::{Build, Format},
    interrupt::Interrupt,
    simulators::{EACH, Simulators, Sums},
};

/// What it is, said wherever it is used.
const WHAT: &str = "Simulated agents: the real wire with real certificates. No host is behind them, nothing is \
                    scanned (every task is taken and done at once), nothing is written to a disk (no fsync), and \
                    the manager's certificate is not checked.";

/// A fleet of simulated agents.
#[derive(Debug, clap::Args)]
pub(crate) struct Simulate {
    /// How many; beyond 15,000 there are several processes, because each agent takes a descriptor.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    agents: u32,
    /// The manager's address for agents, HOST:PORT.
    #[arg(long, value_name = "ADDR")]
    manager: String,
    /// The folder that the agents' certificates and keys are kept in; a fleet that is there comes back as itself.
    #[arg(long, value_name = "DIR")]
    personas: PathBuf,
    /// A file with an enrollment token, for agents that the folder does not hold.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// End after so many seconds; otherwise Ctrl-C ends it.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    #[command(flatten)]
    build: Build,
    /// How the sums are printed at the end.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Runs the fleet until Ctrl-C.
pub(crate) fn simulate(what: &Simulate) -> anyhow::Result<()> {
    let bins = what.build.folder(&["tm-tests"])?;
    let at = address(&what.manager)?;
    let interrupt = Interrupt::listen()?;
    let mut fleet =
        Simulators::start(&bins.join("tm-sim"), at, &what.personas, what.agents, what.token_file.as_deref())?;
    eprintln!("{WHAT}");
    eprintln!("{} agents in {}, manager {at}.", what.agents, processes(fleet.processes()));
    let begin = Instant::now();
    let end = what.seconds.map(|seconds| begin + Duration::from_secs(seconds));
    let mut progress = Progress::new();
    let mut begun = false;
    let mut most = 0;
    loop {
        if !begun && fleet.are_ready()? {
            fleet.tell("connect")?;
            begun = true;
        }
        // Ends with an error where a process has ended.
        fleet.are_ready()?;
        let sums = fleet.sums();
        most = most.max(sums.connected);
        progress.show(begun, what.agents, &sums);
        if interrupt.within(Duration::from_millis(200)) || end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
    }
    let count = fleet.processes();
    let sums = fleet.end()?;
    let mut out = io::stdout().lock();
    match what.output {
        Format::Table => write!(out, "{}", table(what.agents, &sums, begin.elapsed())),
        Format::Json => writeln!(out, "{:#}", json(what.agents, count, most, &sums, begin.elapsed())),
    }
    .context("cannot print")
}

fn address(text: &str) -> anyhow::Result<SocketAddr> {
    let mut all =
        text.to_socket_addrs().with_context(|| format!("`{text}` is no HOST:PORT that can be found"))?;
    all.next().with_context(|| format!("`{text}` has no address"))
}

fn processes(count: usize) -> String {
    if count == 1 { "one process".to_owned() } else { format!("{count} processes of at most {EACH}") }
}

/// One line that changes on a terminal, or a new one every few seconds elsewhere.
struct Progress {
    last: String,
    at: Instant,
    is_terminal: bool,
}

impl Progress {
    fn new() -> Self {
        Self { last: String::new(), at: Instant::now(), is_terminal: io::stderr().is_terminal() }
    }

    fn show(&mut self, begun: bool, agents: u32, sums: &Sums) {
        let line = if begun {
            let why = if sums.last_end.is_empty() { "" } else { "; last end: " };
            let last_end = escaped(&sums.last_end);
            format!(
                "connected {} of {agents}, sessions broken {}, attempts refused {}, tasks {}, done {}{why}{last_end}",
                sums.connected, sums.broken, sums.refused, sums.tasks, sums.done
            )
        } else {
            format!("enrolled {}", sums.enrolled)
        };
        let every = if self.is_terminal { Duration::from_millis(500) } else { Duration::from_secs(5) };
        if line == self.last || (self.at.elapsed() < every && !self.last.is_empty()) {
            return;
        }
        let mut err = io::stderr().lock();
        let _ = if self.is_terminal { write!(err, "\r\x1b[K{line}") } else { writeln!(err, "{line}") };
        let _ = err.flush();
        (self.last, self.at) = (line, Instant::now());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal {
            eprintln!();
        }
    }
}

/// A text of the manager's, safe for a terminal.
fn escaped(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(200).collect()
}

fn table(agents: u32, sums: &Sums, took: Duration) -> String {
    let away = u64::from(agents).saturating_sub(sums.connected);
    let mut text = format!(
        "agents {agents}, after {} s\n\
         connected at the end  {}\n\
         away at the end       {away}\n\
         sessions              {}\n\
         sessions broken       {}\n\
         attempts refused      {}\n\
         tasks received        {}\n\
         received again        {}\n\
         tasks done            {}\n\
         not acknowledged      {}\n",
        took.as_secs(),
        sums.connected,
        sums.sessions,
        sums.broken,
        sums.refused,
        sums.tasks,
        sums.repeated,
        sums.done,
        sums.tasks.saturating_sub(sums.done),
    );
    if !sums.last_end.is_empty() {
        text.push_str(&format!("last end              {}\n", escaped(&sums.last_end)));
    }
    text
}

fn json(agents: u32, processes: usize, most: u64, sums: &Sums, took: Duration) -> serde_json::Value {
    serde_json::json!({
        "what": WHAT,
        "agents": agents,
        "processes": processes,
        "seconds": took.as_secs_f64(),
        "enrolled": sums.enrolled,
        "connected": sums.connected,
        "connected_most": most,
        "lost": u64::from(agents).saturating_sub(sums.connected),
        "sessions": sums.sessions,
        "sessions_broken": sums.broken,
        "attempts_refused": sums.refused,
        "tasks": sums.tasks,
        "tasks_again": sums.repeated,
        "tasks_done": sums.done,
        "last_end": sums.last_end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_told_as_they_are() {
        let sums = Sums { connected: 8, tasks: 7, done: 5, last_end: "a\x1b[31mb".into(), ..Sums::default() };
        let text = table(10, &sums, Duration::from_secs(3));
        assert!(text.contains("away at the end       2\n"), "{text}");
        assert!(text.contains("not acknowledged      2\n") && !text.contains('\x1b'), "{text}");
        let object = json(10, 1, 9, &sums, Duration::from_secs(3));
        assert_eq!((object["lost"].as_u64(), object["tasks_done"].as_u64()), (Some(2), Some(5)));
        assert!(address("nowhere").is_err() && address("127.0.0.1:1").is_ok());
    }
}
