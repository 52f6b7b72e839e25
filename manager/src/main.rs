//! `tm-manager`: decides, queues, stores, shows.

mod access;
mod addresses;
mod agents;
mod backup;
mod cli;
mod config;
mod dispatch;
mod forward;
mod handshake;
mod http;
mod limits;
mod lobby;
mod metrics;
mod mitigation;
mod patterns;
mod server;
mod store;
mod strangers;

fn main() -> std::process::ExitCode {
    cli::run()
}
