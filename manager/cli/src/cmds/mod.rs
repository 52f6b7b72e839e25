//! One file for each noun of the command line, and what a waited-for scan needs besides.

pub(crate) mod account;
pub(crate) mod audit;
pub(crate) mod completions;
pub(crate) mod endpoint;
pub(crate) mod pattern;
mod receipt;
pub(crate) mod scan;
pub(crate) mod task;
pub(crate) mod token;
pub(crate) mod version;
mod wait;
