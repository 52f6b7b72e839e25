//! Runs a command beside a throwaway PostgreSQL server, whose address it finds in `TM_TEST_POSTGRES`:
//! `target/debug/tm-postgres cargo nextest run -p tm-manager` runs the store's tests there.
//!
//! **Invariant:** it succeeds only if the command did and made at least one database: tests that never asked the
//! server do not pass as tests on it.

use std::{
    env,
    process::{Command, ExitCode},
};

use tm_tests::postgres::Postgres;

fn main() -> ExitCode {
    let mut args = env::args_os().skip(1);
    let Some(program) = args.next() else {
        eprintln!("usage: tm-postgres COMMAND [ARGUMENT]…");
        return ExitCode::from(2);
    };
    let server = Postgres::start();
    let status = match Command::new(&program).args(args).env("TM_TEST_POSTGRES", server.server()).status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: cannot run `{}`: {error}", program.display());
            return ExitCode::FAILURE;
        }
    };
    let count = server.sql("postgres", "SELECT count(*) FROM pg_database WHERE datname ~ '^t[0-9a-f]{32}$'");
    eprintln!("tm-postgres: {count} databases were made");
    if status.success() && count != "0" { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
