//! The contract between agents and managers.
//!
//! This crate says what may be said: ids, the names written into certificates, frames, messages, tasks and
//! reports. It performs no I/O, reads no clock and draws no random numbers, so that both sides can test
//! against it with nothing but bytes.
//!
//! **Invariant:** nothing here trusts a peer. Every length is checked before anything is allocated for it,
//! no type is recursive, and no input makes this crate panic.

pub mod address;
pub mod audit;
pub mod frame;
pub mod identity;
pub mod ids;
pub mod log;
pub mod message;
pub mod quote;
pub mod receipt;
pub mod report;
pub mod search;
pub mod task;
pub mod text;
pub mod token;

/// The protocol version that this build speaks. `Hello` carries the range a peer accepts.
pub const VERSION: u8 = 1;

/// ALPN name of the control channel (client certificate required).
pub const ALPN_CONTROL: &[u8] = b"tm/1";
/// ALPN name of the one exchange that has no client certificate.
pub const ALPN_ENROLL: &[u8] = b"tm-enroll/1";
/// ALPN name of the one exchange that a certificate which has ended is still good for, for a while: its renewal.
pub const ALPN_RENEW: &[u8] = b"tm-renew/1";
/// ALPN name of bulk transfers (client certificate required).
pub const ALPN_BULK: &[u8] = b"http/1.1";
