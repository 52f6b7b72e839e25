//! `tmctl pattern rollout`, and how an import begins one.

use std::time::Duration;

use clap::{Args, Subcommand};
use tm_api::rollout::{Share, StartRollout, Waves};

use crate::duration;

/// Above what makes an import a rollout.
const HEADING: &str = "Rollout (without any of these, all endpoints get it at once)";

/// How what is imported reaches the fleet.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RolloutArgs {
    /// Only for the endpoints of this group; others keep the version before
    #[arg(long, help_heading = HEADING)]
    pub(crate) group: Option<String>,
    /// In which waves: shares that grow to 100%, as in 1%,10%,100%
    #[arg(long, value_name = "SHARES", help_heading = HEADING)]
    pub(crate) wave: Option<Waves>,
    /// Stop it by itself when more than this share of the endpoints that have looked with it (and three of
    /// them) found something [default: 2%]
    #[arg(long, value_name = "SHARE", help_heading = HEADING)]
    pub(crate) brake_share: Option<Share>,
    /// Begin the next wave after so long, while the brake is quiet [default: when you say `rollout advance`]
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, help_heading = HEADING)]
    pub(crate) every: Option<Duration>,
}

impl RolloutArgs {
    /// The same in the manager's words; `None` if nothing was said.
    pub(crate) fn terms(self) -> Option<StartRollout> {
        let Self { group, wave, brake_share, every } = self;
        if group.is_none() && wave.is_none() && brake_share.is_none() && every.is_none() {
            return None;
        }
        Some(StartRollout {
            group,
            waves: wave.unwrap_or_else(Waves::all),
            brake_share: brake_share.unwrap_or(Share::BRAKE),
            every_s: every.map(|every| every.as_secs()),
        })
    }
}

/// `tmctl pattern rollout`.
#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// List rollouts, newest first
    List,
    /// Show how far one is, and why it was stopped
    Show {
        /// The pattern's name (its newest rollout), or the rollout's id
        rollout: String,
    },
    /// Go on to the next wave; from the last one to the end
    #[command(
        long_about = "Go on to the next wave. After the last wave the brake still watches; advancing once more \
        ends the rollout, and nothing watches any more. Endpoints use the version from their next scan on.\n\n\
        Example:\n  tmctl pattern rollout advance fleet-rules"
    )]
    Advance {
        /// The pattern's name (its newest rollout), or the rollout's id
        rollout: String,
    },
    /// Take the version from everybody
    #[command(
        long_about = "Take the version from everybody: no endpoint is sent it any more, those that had it go \
        back to the version before with their next scan, and cleanups ordered from what it found that have not begun \
        are called off.\n\n\
        Example:\n  tmctl pattern rollout stop fleet-rules --reason 'hits our own tool'"
    )]
    Stop {
        /// The pattern's name (its newest rollout), or the rollout's id
        rollout: String,
        /// Why, for the record
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Go on with a stopped one, at the wave that it had come to
    Resume {
        /// The pattern's name (its newest rollout), or the rollout's id
        rollout: String,
        /// Also one that its brake stopped: what it hit was right. Its brake is off from then on, and the
        /// audit log says so
        #[arg(long)]
        force: bool,
    },
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::cli::{Cli, Command, Pattern};

    fn terms(more: &[&str]) -> Result<Option<String>, clap::error::ErrorKind> {
        let cli = Cli::try_parse_from(["tmctl", "pattern", "import", "f"].iter().chain(more));
        let cli = cli.map_err(|error| error.kind())?;
        let Command::Pattern(Pattern::Import(import)) = cli.command else { panic!("another command") };
        let terms = import.rollout.terms();
        Ok(terms.map(|terms| {
            format!("{:?} {} {} {:?}", terms.group, terms.waves, terms.brake_share, terms.every_s)
        }))
    }

    #[test]
    fn an_import_becomes_a_rollout_when_anything_of_one_is_said() {
        let some = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(terms(&[]), Ok(None));
        assert_eq!(terms(&["--wave", "1%,10%,100%"]), some("None 1%,10%,100% 2% None"));
        assert_eq!(terms(&["--group", "g"]), some(r#"Some("g") 100% 2% None"#));
        assert_eq!(terms(&["--brake-share", "0.5%", "--every", "1h"]), some("None 100% 0.5% Some(3600)"));
        for bad in [
            ["--wave", "0%"],
            ["--wave", "100%,1%"],
            ["--wave", "abc"],
            ["--wave", "101%"],
            ["--wave", "1%"],
            ["--wave", ""],
            ["--brake-share", "0%"],
            ["--brake-share", "2"],
            ["--every", "soon"],
        ] {
            assert_eq!(terms(&bad), Err(clap::error::ErrorKind::ValueValidation), "{bad:?}");
        }
    }
}
