//! `tmctl`: the administrator's command line. It speaks only the manager's REST API.
//!
//! Data go to standard output, talk to standard error, and the exit code says how it went.
//!
//! **Invariant:** text from endpoints or the manager reaches a terminal or a CSV file only through
//! [`output`] or [`failure`], which make it harmless.

mod cli;
mod client;
mod cmds;
mod desk;
mod duration;
mod failure;
mod output;
mod profile;
#[cfg(test)]
mod testing;
mod tls;
mod when;

use std::process::ExitCode;

use clap::Parser as _;

use crate::{
    cli::{Cli, Command},
    client::Client,
    desk::{Desk, DeskError},
    failure::{Exit, Failure},
    output::Output,
    profile::Profile,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::ScanWorker = cli.command {
        return tm_scanner::worker::main();
    }
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::Runtime)
        .and_then(|runtime| runtime.block_on(run(cli)));
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => {
            output::say(&failure.report());
            failure.exit().into()
        }
    }
}

async fn run(cli: Cli) -> Result<Exit, Failure> {
    let out = Output::new(cli.output);
    let client = || -> Result<Client, Failure> { Ok(Client::new(Profile::load(cli.profile.as_deref())?)?) };
    let desk = || -> Result<Desk, Failure> {
        let folder = match &cli.trust {
            Some(folder) => folder.clone(),
            None => Profile::load(cli.profile.as_deref())?.trust_folder().ok_or(DeskError::Nowhere)?,
        };
        Ok(Desk::open(folder, cli.passphrase_file.as_deref())?)
    };
    match cli.command {
        // `main` does that without a runtime.
        Command::ScanWorker => Ok(Exit::Done),
        Command::Status => cmds::status::run(&client()?, &out).await,
        Command::Why { target } => cmds::why::run(&target, &client()?, &out).await,
        Command::Endpoint(command) => cmds::endpoint::run(command, &client()?, &out).await,
        Command::Group(command) => cmds::group::run(command, &client()?, &out).await,
        Command::Scan(command) => cmds::scan::run(command, &client()?, &out).await,
        Command::Coverage(args) => cmds::coverage::run(*args, &client()?, &out).await,
        Command::Cleanup(command) => cmds::cleanup::run(command, &client()?, &out).await,
        Command::Vault(command) => cmds::vault::run(command, &client()?, &out).await,
        Command::Event(command) => cmds::event::run(command, &client()?, &out).await,
        Command::Export(command) => cmds::export::run(command, &client()?, &out).await,
        Command::Task(command) => cmds::task::run(command, &client()?, &out).await,
        Command::Pattern(command) => cmds::pattern::run(command, &client()?, &desk()?, &out).await,
        Command::Token(command) => cmds::token::run(command, &client()?, &desk()?, &out).await,
        Command::Account(command) => cmds::account::run(command, &client()?, &out).await,
        Command::Audit(command) => cmds::audit::run(command, &client()?, &out).await,
        Command::Version => cmds::version::run(&client()?, &out).await,
        Command::Completions { shell } => cmds::completions::shell(shell, &out),
        Command::Man { folder } => cmds::completions::manual(&folder),
    }
}
