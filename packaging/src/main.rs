//! Developer commands: `cargo xtask demo`, `test`, `bench`, `simulate`, `man DIR`.
//!
//! **Invariant:** nothing is changed outside the target folder and a throwaway folder of its own, except by
//! `test`, which may install missing tools and says so first, and `simulate`, which keeps its agents where it is told.

mod bench;
mod demo;
mod interrupt;
mod manual;
mod programs;
mod samples;
mod simulate;
mod simulators;
mod test;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Developer commands of Threat Management")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a manager and two agents on this machine and find, remove and bring back a test virus with them.
    Demo {
        /// End after the last step; exit 0 only if every step was verified.
        #[arg(long)]
        once: bool,
    },
    /// Build the programs and run every test.
    Test {
        /// Also run what takes minutes.
        #[arg(long)]
        long: bool,
    },
    /// Measure what the programs cost on this machine.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Connect a fleet of simulated agents to a manager: the real wire, no host, nothing written to a disk.
    Simulate(simulate::Simulate),
    /// Write the programs' manual pages.
    Man {
        /// The folder to write them to.
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Connect simulated agents to a manager: its CPU for each handshake and login, and its memory for each agent.
    Connect(bench::Link),
    /// Order one task for every simulated agent and wait for the last acknowledgement of an end.
    Push(bench::Link),
    /// Cut all simulated agents at once, then kill the manager, and wait until all are back.
    Storm(bench::Link),
    /// Leave connected simulated agents alone: the manager's CPU for their heartbeats, and its memory.
    Idle(bench::Link),
    /// All four on one fleet.
    Link(bench::Link),
    /// Send a large pattern to many agents at once, and a new version of it to one.
    Bulk(bench::Bulk),
    /// Scan a folder with the agent and with other scanners, in turn.
    Scan(bench::Scan),
    /// Scan a folder twice with the agent, which remembers what is clean, and then with a new pattern.
    Again(bench::Again),
    /// Look at the memory of a process with the agent and with `yara`.
    Processes(bench::Processes),
    /// Hold memory until the input ends: the process that the bench of processes looks at.
    #[command(hide = true)]
    Hold(bench::Hold),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo { once } => demo::run(once),
        Command::Test { long } => return test::run(long),
        Command::Simulate(what) => simulate::simulate(&what),
        Command::Bench { what: Bench::Connect(how) } => bench::link(bench::What::CONNECT, &how),
        Command::Bench { what: Bench::Push(how) } => bench::link(bench::What::PUSH, &how),
        Command::Bench { what: Bench::Storm(how) } => bench::link(bench::What::STORM, &how),
        Command::Bench { what: Bench::Idle(how) } => bench::link(bench::What::IDLE, &how),
        Command::Bench { what: Bench::Link(how) } => bench::link(bench::What::ALL, &how),
        Command::Bench { what: Bench::Bulk(what) } => bench::bulk(&what),
        Command::Bench { what: Bench::Scan(what) } => bench::scan(&what),
        Command::Bench { what: Bench::Again(what) } => bench::again(&what),
        Command::Bench { what: Bench::Processes(what) } => bench::processes(&what),
        Command::Bench { what: Bench::Hold(what) } => bench::hold(&what),
        Command::Man { dir } => manual::write(&dir),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
