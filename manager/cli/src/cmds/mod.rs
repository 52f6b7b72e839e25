//! One file for each noun of the command line, and what waiting for work needs besides.

pub(crate) mod account;
pub(crate) mod audit;
mod cancel;
pub(crate) mod cleanup;
pub(crate) mod completions;
mod confirm;
pub(crate) mod coverage;
pub(crate) mod endpoint;
pub(crate) mod event;
pub(crate) mod export;
mod follow;
pub(crate) mod group;
mod ordered;
pub(crate) mod pattern;
mod progress;
mod publish;
mod quote;
mod receipt;
mod rollout;
#[cfg(test)]
mod samples;
pub(crate) mod scan;
pub(crate) mod status;
pub(crate) mod task;
pub(crate) mod token;
mod treatment;
mod trial;
mod trust;
pub(crate) mod vault;
pub(crate) mod version;
mod wait;
pub(crate) mod why;
