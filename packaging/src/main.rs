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
    /// Measure what the manager costs, with simulated agents.
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
    Push(bench::Push),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo { once } => demo::run(once),
        Command::Test { long } => return test::run(long),
        Command::Bench { what: Bench::Push(what) } => bench::push(what),
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
