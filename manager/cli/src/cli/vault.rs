//! `tmctl vault`.

use std::{ffi::OsString, time::Duration};

use clap::{Args, Subcommand};
use tm_protocol::ids::VaultId;

use super::order::{Terms, absolute_path};

/// `tmctl vault`.
#[derive(Debug, Subcommand)]
pub(crate) enum Vault {
    /// List removed files, newest first
    #[command(long_about = "List removed files, newest first, as their endpoints last reported.\n\n\
        Examples:\n  \
        tmctl vault list --endpoint web-07\n  \
        tmctl vault list --limit 50000 -o csv > vault.csv")]
    List {
        /// Only those of this endpoint (id, host name or address)
        #[arg(long, value_name = "TARGET")]
        endpoint: Option<String>,
        /// Most rows
        #[arg(
            long,
            value_name = "N",
            default_value_t = 1000,
            value_parser = clap::value_parser!(u32).range(1..=1_000_000)
        )]
        limit: u32,
    },
    /// Order that removed files are put back
    #[command(
        long_about = "Order that removed files are put back where they were, with their owner, mode and \
        times, one task for each endpoint.\n\n\
        Nothing is ever overwritten: where a file of that name stands, the restore is refused. Set-user-id \
        and set-group-id bits and file capabilities are restored only with --set-id.\n\n\
        Examples:\n  \
        tmctl vault list --endpoint web-07\n  \
        tmctl vault restore ITEM --dry-run\n  \
        tmctl vault restore ITEM --wait\n  \
        tmctl vault restore ITEM --to /root/sample.bin --wait"
    )]
    Restore(Box<RunRestore>),
}

/// `tmctl vault restore`.
#[derive(Debug, Args)]
pub(crate) struct RunRestore {
    /// Id of a removed file; `tmctl vault list` has them
    #[arg(value_name = "ITEM", required = true)]
    pub(crate) items: Vec<VaultId>,
    /// Put the one file there instead
    #[arg(long, value_name = "PATH", value_parser = absolute_path())]
    pub(crate) to: Option<OsString>,
    /// Restore set-user-id and set-group-id bits and file capabilities too
    #[arg(long)]
    pub(crate) set_id: bool,
    /// On which terms.
    #[command(flatten)]
    pub(crate) terms: Terms,
}

impl RunRestore {
    /// The longest that the command stays.
    pub(crate) fn patience(&self) -> Duration {
        self.terms.patience()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::cli::Cli;

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        const ID: &str = "018f3c1e-6b5a-7000-8000-0123456789ab";
        let parse = |more: &[&str]| Cli::try_parse_from(["tmctl", "vault"].iter().chain(more));
        assert!(parse(&["restore", ID, ID, "--set-id", "--wait"]).is_ok());
        assert!(parse(&["restore", ID, "--to", "/root/x", "--dry-run"]).is_ok());
        assert!(parse(&["list", "--endpoint", "web", "--limit", "5"]).is_ok());
        for bad in [
            &["restore"][..],
            &["restore", "/srv/x"],
            &["restore", &ID[..8]],
            &["restore", ID, "--to", "x"],
            &["list", "--limit", "0"],
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
