//! `tm-manager`: decides, queues, stores, shows.

mod access;
mod addresses;
mod agents;
mod backup;
mod cli;
mod config;
mod dispatch;
mod forward;
mod http;
mod limits;
mod metrics;
mod mitigation;
mod patterns;
mod server;
mod store;

fn main() -> std::process::ExitCode {
    cli::run()
}
