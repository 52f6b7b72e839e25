//! What all orders have in common: for whom, and on which terms.

use std::{ffi::OsString, os::unix::ffi::OsStrExt as _, time::Duration};

use clap::{
    Args,
    builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser},
};
use tm_api::{
    status::Query,
    task::{self, Targets},
};

use crate::duration;

/// For whom.
#[derive(Debug, Args)]
pub(crate) struct To {
    /// Endpoint id, host name or address
    #[arg(value_name = "TARGET", required_unless_present_any = ["search", "group", "query"])]
    pub(crate) targets: Vec<String>,
    /// Also every endpoint that this finds (as in `endpoint list`)
    #[arg(long)]
    pub(crate) search: Option<String>,
    /// Also every endpoint of this group
    #[arg(long)]
    pub(crate) group: Option<String>,
    /// Also every endpoint that this line of `tmctl status` counts
    #[arg(long, value_parser = query())]
    pub(crate) query: Option<Query>,
}

impl To {
    /// Whether endpoints are not all named one by one.
    pub(crate) const fn is_selection(&self) -> bool {
        self.search.is_some() || self.group.is_some() || self.query.is_some()
    }

    /// The same in the manager's words.
    pub(crate) fn into_targets(self) -> Targets {
        Targets { targets: self.targets, search: self.search, group: self.group, query: self.query }
    }
}

/// On which terms.
#[derive(Debug, Args)]
pub(crate) struct Terms {
    /// Keep the order also for endpoints that are not connected now
    #[arg(long)]
    pub(crate) when_connected: bool,
    /// How long it may wait to be begun
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration::parse)]
    pub(crate) expires: Duration,
    /// How long it may run
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration::parse)]
    pub(crate) deadline: Duration,
    /// Why, for the record
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) reason: String,
    /// Only say what would be done, file by file; implies --wait
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Stay until every task has ended, and exit by the outcome
    #[arg(long)]
    pub(crate) wait: bool,
    /// Stay no longer than this [default: as long as the tasks may take]
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) timeout: Option<Duration>,
}

impl Terms {
    /// Whether the command stays until the tasks have ended.
    pub(crate) const fn waits(&self) -> bool {
        self.wait || self.dry_run
    }

    /// The longest that it stays.
    pub(crate) fn patience(&self) -> Duration {
        self.timeout.unwrap_or(self.expires + self.deadline + LAST_WORD)
    }

    /// The same in the manager's words.
    pub(crate) fn into_terms(self) -> task::Terms {
        task::Terms {
            expires_in_s: Some(self.expires.as_secs()),
            deadline_s: Some(self.deadline.as_secs()),
            when_connected: self.when_connected,
            reason: self.reason,
            dry_run: self.dry_run,
        }
    }
}

/// An agent's last word may be on its way when a deadline ends.
pub(crate) const LAST_WORD: Duration = Duration::from_secs(60);

/// A query by its name.
pub(crate) fn query() -> impl TypedValueParser<Value = Query> {
    PossibleValuesParser::new(Query::ALL.map(Query::word))
        .map(|word| Query::from_word(&word).expect("the parser takes only queries' words"))
}

/// A path on an endpoint, byte for byte.
pub(crate) fn absolute_path() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|path| {
        if path.as_bytes().starts_with(b"/") { Ok(path) } else { Err("an absolute path is expected") }
    })
}
