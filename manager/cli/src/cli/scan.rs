//! `tmctl scan`.

use std::{ffi::OsString, time::Duration};

use clap::{ArgGroup, Args, Subcommand};

use super::{
    limits::{LimitArgs, OptionArgs},
    order::{LAST_WORD, To, absolute_path},
};
use crate::duration;

/// `tmctl scan`.
#[derive(Debug, Subcommand)]
pub(crate) enum Scan {
    /// Order a scan, one task for each endpoint
    #[command(long_about = "Order a scan, one task for each endpoint.\n\n\
        Every TARGET means exactly one endpoint; --search, --group and --query mean every one they find. \
        Without --pattern, all imported patterns are used. Paths are absolute paths on the endpoints. Files that \
        the same patterns have found clean and that have not changed since are not read again without --fresh.\n\n\
        With --wait, tmctl stays until every task has ended, prints what was detected and a receipt for each \
        endpoint, and exits 10 if anything was detected, else 1, 3 or 4 if a task did not end well, else 11 \
        if not everything could be looked at, else 0. With --dry-run nothing is read: each endpoint walks the paths \
        and says how many files and bytes there are, how many of them are known clean, and, where it has scanned \
        before, how much CPU and time the scan is likely to take; `tmctl task show` has that beside the bill of the \
        same order later. Ending tmctl does not end the scan: `tmctl task \
        cancel` does.\n\n\
        Examples:\n  \
        tmctl scan start web-07 --path /srv --path /home --wait\n  \
        tmctl scan start --group servers --path / --when-connected \\\n      --expires 7d --reason 'case 12'\n  \
        tmctl scan start --query needs-cleanup --path / --wait\n  \
        tmctl scan start web-07 --full --dry-run\n  \
        tmctl scan start web-07 --full --background\n  \
        tmctl scan start --group servers --quick --processes --wait\n  \
        tmctl scan start 10.0.0.7 --path /tmp --wait -o json > receipt.json")]
    Start(Box<StartScan>),
}

/// `tmctl scan start`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("waiting").args(["wait", "dry_run"]).multiple(true))]
pub(crate) struct StartScan {
    /// For whom.
    #[command(flatten)]
    pub(crate) to: To,
    /// A file or folder to look at; may be given again
    #[arg(long = "path", value_name = "PATH", required_unless_present_any = ["quick", "full", "processes"],
        value_parser = absolute_path())]
    pub(crate) paths: Vec<OsString>,
    /// A pattern to look with, by name or digest; may be given again
    #[arg(long = "pattern", value_name = "NAME")]
    pub(crate) patterns: Vec<String>,
    /// Keep the order also for endpoints that are not connected now
    #[arg(long)]
    pub(crate) when_connected: bool,
    /// How long it may wait to be begun
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration::parse)]
    pub(crate) expires: Duration,
    /// How long it may run
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration::parse)]
    pub(crate) deadline: Duration,
    /// Why, for the record
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) reason: String,
    /// Stay until every task has ended, and exit by the outcome
    #[arg(long)]
    pub(crate) wait: bool,
    /// Stay no longer than this [default: as long as the tasks may take]
    #[arg(long, value_name = "DURATION", requires = "waiting", value_parser = duration::parse)]
    pub(crate) timeout: Option<Duration>,
    /// Read nothing; say what the scan would look at and what that is likely to cost. Implies --wait
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// How to go about it.
    #[command(flatten)]
    pub(crate) options: OptionArgs,
    /// How far to go with one file.
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

impl StartScan {
    /// Whether the command stays until the tasks have ended.
    pub(crate) const fn waits(&self) -> bool {
        self.wait || self.dry_run
    }

    /// The longest that the command stays.
    pub(crate) fn patience(&self) -> Duration {
        self.timeout.unwrap_or(self.expires + self.deadline + LAST_WORD)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        let start = ["tmctl", "scan", "start"];
        let parse = |more: &[&str]| Cli::try_parse_from(start.iter().chain(more));
        assert!(parse(&["web", "--path", "/srv", "--wait", "--timeout", "5m", "-o", "json"]).is_ok());
        assert!(parse(&["--group", "g", "--path", "/srv"]).is_ok());
        assert!(parse(&["--query", "needs-cleanup", "--path", "/srv"]).is_ok());
        assert!(parse(&["web", "--quick"]).is_ok());
        assert!(parse(&["web", "--quick", "--path", "/srv", "--background"]).is_ok());
        assert!(parse(&["web", "--full", "--fresh"]).is_ok());
        assert!(parse(&["web", "--processes"]).is_ok());
        assert!(parse(&["web", "--full", "--dry-run", "--timeout", "5m"]).is_ok());
        for bad in [
            &["web"][..],
            &["--path", "/srv"],
            &["web", "--path", "srv"],
            &["web", "--path", "/srv", "--timeout", "5m"],
            &["web", "--path", "/srv", "--expires", "5"],
            &["web", "--path", "/srv", "--cpu", "0"],
            &["web", "--path", "/srv", "--cpu", "5%", "--background"],
            &["web", "--full", "--path", "/srv"],
            &["web", "--full", "--quick"],
            &["web", "--fresh"],
            &["web", "--path", "/srv", "--no-archives", "--max-depth", "1"],
            &["web", "--path", "/srv", "--max-file-size", "1GB"],
            &["--query", "needs-holiday", "--path", "/srv"],
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn a_path_keeps_its_exact_bytes() {
        let path = OsString::from_vec(b"/srv/\xff\n".to_vec());
        let args = ["tmctl", "scan", "start", "web", "--path"].map(OsString::from);
        let cli = Cli::try_parse_from(args.into_iter().chain([path.clone()])).unwrap();
        let Command::Scan(Scan::Start(start)) = cli.command else { panic!("another command") };
        assert_eq!(start.paths, [path]);
    }
}
