//! Scans for the people at the endpoint, by the running agent.
//!
//! Every user may run `tm-agent scan PATH`. That client has nobody's rights but the user's: it walks and opens the
//! files itself, and hands descriptors over a socket, to a process that the agent starts for it. That has a scan worker of
//! its own look at what is behind them, with the patterns that the agent holds, and answers to that client alone.
//! Nothing is kept or told to a manager.
//!
//! The socket is `/run/tm-agent/scan.sock` for the agent that uses the usual data folder. That folder itself is closed to
//! everybody but root, so the socket cannot lie in it; `/run` is empty after a start of the system and only root makes
//! folders there. An agent with another data folder puts its socket there, where only its own user reaches it, unless
//! `--socket` names a place. Both sides ask the kernel who the other is: the agent counts by user, the client gives
//! files to root or its own user only.
//!
//! **Invariant:** the agent opens no path for a user, and looks only at what [`admit`] lets in.
//! **Invariant:** a scan worker never holds files of two users.
//! **Invariant:** sessions, descriptors and bytes are bounded for each user and in all ([`serve::Limits`]); one client
//! waits for no other, and the agent for none.

mod admit;
mod client;
mod serve;
mod session;
mod socket;
mod wire;

use std::path::{Path, PathBuf};

pub(crate) use self::{
    client::scan,
    serve::{Limits, Server},
    session::{Held, serve},
};

use crate::scan::standalone::SOCKET;

/// The usual data folder.
pub(crate) const DATA: &str = "/var/lib/tm-agent";

/// Most bytes of patterns for one user's scan: what a scan worker takes at once, and some less.
pub(crate) const MOST_PATTERN_BYTES: usize = 96 << 20;

/// Where an agent with this data folder is spoken to, unless told otherwise.
pub(crate) fn socket_of(data: &Path) -> PathBuf {
    if data == Path::new(DATA) { PathBuf::from(SOCKET) } else { data.join("scan.sock") }
}
