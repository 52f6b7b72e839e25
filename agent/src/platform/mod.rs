//! Linux facts, and the only room that reads them.

pub(crate) mod attributes;
pub(crate) mod create;
pub(crate) mod critical;
pub(crate) mod facts;
pub(crate) mod fs;
pub(crate) mod idle;
pub(crate) mod mounts;
pub(crate) mod packages;
pub(crate) mod pressure;
