//! `tmctl coverage`.

use std::ffi::OsString;

use clap::Args;
use tm_api::{coverage::CoverageQuery, status::Query};

use super::order::{absolute_path, query};

/// `tmctl coverage`.
#[derive(Debug, Args)]
pub(crate) struct Coverage {
    /// Endpoint id, host name or address [default: all endpoints]
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Only those that this finds (as in `endpoint list`)
    #[arg(long)]
    pub(crate) search: Option<String>,
    /// Only those of this group
    #[arg(long)]
    pub(crate) group: Option<String>,
    /// Only those that this line of `tmctl status` counts
    #[arg(long, value_parser = query())]
    pub(crate) query: Option<Query>,
    /// How old a look may be
    #[arg(
        long,
        value_name = "N",
        default_value_t = CoverageQuery::DAYS,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(CoverageQuery::MAX_DAYS))
    )]
    pub(crate) days: u32,
    /// What has to be looked at as a whole
    #[arg(long, value_name = "PATH", default_value = "/", value_parser = absolute_path())]
    pub(crate) path: OsString,
    /// Print also the endpoints that are covered
    #[arg(long)]
    pub(crate) all: bool,
}
