//! Developer commands: `cargo xtask demo`, `cargo xtask test`, `cargo xtask bench`, `cargo xtask man DIR`.
//!
//! **Invariant:** nothing is changed outside the target folder and a throwaway folder of its own, except by
//! `test`, which may install missing tools and says so first.

mod bench;
mod demo;
mod manual;
mod programs;
mod samples;
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
    /// Write the programs' manual pages.
    Man {
        /// The folder to write them to.
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Order one task for every agent and wait for the last acknowledgement.
    ///
    /// Simulated agents ask for it; the figure is the manager's CPU time.
    Push(bench::Push),
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
        Command::Bench { what: Bench::Push(what) } => bench::push(what),
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
