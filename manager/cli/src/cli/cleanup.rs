//! `tmctl cleanup`.

use clap::{Args, Subcommand};

use super::order::{Terms, To};

/// `tmctl cleanup`.
#[derive(Debug, Subcommand)]
pub(crate) enum Cleanup {
    /// Order that detected files are removed into the vault
    #[command(
        long_about = "Order that detected files are removed into the vault, one task for each endpoint.\n\n\
        Without --detection, everything that waits for cleanup there is removed. A removed file lies in its \
        endpoint's vault and can be put back with `tmctl vault restore`. The agent removes only what it \
        detected itself, and only while the file is still what was detected; it never touches what the \
        system needs to run, nor what a package installed unchanged. What it will not touch is named, with \
        the reason.\n\n\
        --dry-run asks the endpoints and says for each file what would happen, and why; nothing is changed \
        there.\n\n\
        When more than ten endpoints are named, or --search, --group or --query choose them, tmctl says how \
        much that concerns and asks. Where nobody can be asked (no terminal), --yes is needed, whatever the \
        choice finds: a script does not work on one endpoint and stop at two.\n\n\
        With --wait: what came of each file, a receipt for each endpoint, and the exit code by the outcome. \
        If all that was not removed was refused, that is 3. A dry run that was carried out exits 0.\n\n\
        Examples:\n  \
        tmctl cleanup run web-07 --dry-run\n  \
        tmctl cleanup run web-07 --wait\n  \
        tmctl cleanup run web-07 --detection 1f0c33aa --reason 'case 12' --wait\n  \
        tmctl cleanup run --query needs-cleanup --when-connected --expires 7d"
    )]
    Run(Box<RunCleanup>),
}

/// `tmctl cleanup run`.
#[derive(Debug, Args)]
pub(crate) struct RunCleanup {
    /// For whom.
    #[command(flatten)]
    pub(crate) to: To,
    /// Only this detection: its key, or the start of it (8 digits or more); may be given again.
    /// `tmctl task detections` has them
    #[arg(long = "detection", value_name = "KEY", value_parser = key)]
    pub(crate) detections: Vec<String>,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// On which terms.
    #[command(flatten)]
    pub(crate) terms: Terms,
}

/// A detection's key or a start of it.
fn key(text: &str) -> Result<String, &'static str> {
    if (8..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("8 to 64 hex digits are expected")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(more: &[&str]) -> Result<RunCleanup, clap::Error> {
        let cli = Cli::try_parse_from(["tmctl", "cleanup", "run"].iter().chain(more))?;
        let Command::Cleanup(Cleanup::Run(args)) = cli.command else { panic!("another command") };
        Ok(*args)
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        let args = parse(&["web", "--detection", "1F0C33AA", "--detection", &"a".repeat(64)]).unwrap();
        assert_eq!(args.detections, ["1f0c33aa".to_owned(), "a".repeat(64)]);
        assert!(!args.terms.waits());
        assert!(parse(&["web", "--dry-run"]).unwrap().terms.waits());
        assert!(parse(&["--query", "needs-cleanup", "-y"]).unwrap().to.is_selection());
        for bad in [
            &[][..],
            &["--yes"],
            &["web", "--detection", "1f0c33a"],
            &["web", "--detection", "1f0c33ag"],
            &["web", "--detection", &"a".repeat(65)],
            &["web", "--detection", "/srv/x"],
            &["web", "--expires", "0s"],
            &["--query", ""],
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn the_default_patience_outlasts_the_order() {
        let terms = parse(&["web", "--wait", "--expires", "2h", "--deadline", "3h"]).unwrap().terms;
        assert_eq!(terms.patience().as_secs(), 5 * 3600 + 60);
        assert_eq!(parse(&["web", "--wait", "--timeout", "5s"]).unwrap().terms.patience().as_secs(), 5);
    }
}
