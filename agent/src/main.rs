//! `tm-agent`: the program on every endpoint.

mod cleanup;
mod cli;
mod clock;
mod config;
mod connection;
mod daemon;
mod doctor;
mod enroll;
mod local;
mod paths;
mod platform;
mod records;
mod renewal;
mod scan;
mod tasks;
mod tls;
mod vault;

fn main() -> std::process::ExitCode {
    cli::run()
}
