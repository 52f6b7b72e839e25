//! `tmctl event`.

use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use tm_api::event::{EventKind, EventStatus};

use crate::when::When;

/// `tmctl event`.
#[derive(Debug, Subcommand)]
pub(crate) enum Event {
    /// List what happened, oldest first
    #[command(long_about = "List threat events: the newest that the filters let through, oldest first.\n\n\
        A time is RFC 3339 (2026-01-31T08:00:00Z), a date, `today`, `yesterday`, or how long ago (2h, 7d). \
        Dates begin at midnight where tmctl runs.\n\n\
        Examples:\n  \
        tmctl event list --since 2h\n  \
        tmctl event list --endpoint web-07 --kind cleanup --status unsuccessful\n  \
        tmctl event list --since 2026-01-01 --until 2026-02-01 --all -o csv")]
    List(Box<ListEvents>),
    /// Print what happens, as it happens
    #[command(
        long_about = "Print the newest events, then each further one once, as it happens, until Ctrl-C \
        (exit code 0). A manager that restarts is waited for.\n\n\
        With -o json, one JSON object a line.\n\n\
        Examples:\n  \
        tmctl event follow\n  \
        tmctl event follow --status unsuccessful -o json"
    )]
    Follow {
        /// Which.
        #[command(flatten)]
        filter: EventFilter,
        /// Begin with the events since this time
        #[arg(long, value_name = "TIME", conflicts_with = "limit")]
        since: Option<When>,
        /// Begin with this many of the newest events; 0 for none
        #[arg(
            long,
            value_name = "N",
            default_value_t = 10,
            value_parser = clap::value_parser!(u32).range(0..=1000)
        )]
        limit: u32,
    },
}

/// Which events.
#[derive(Debug, Default, Args)]
pub(crate) struct EventFilter {
    /// Only those of this endpoint (id, host name or address)
    #[arg(long, value_name = "TARGET")]
    pub(crate) endpoint: Option<String>,
    /// Only those of endpoints that this finds (as in `endpoint list`)
    #[arg(long, conflicts_with = "endpoint")]
    pub(crate) search: Option<String>,
    /// Only this kind
    #[arg(long, value_parser = kind())]
    pub(crate) kind: Option<EventKind>,
    /// Only this status
    #[arg(long, value_parser = status())]
    pub(crate) status: Option<EventStatus>,
}

/// `tmctl event list`.
#[derive(Debug, Args)]
pub(crate) struct ListEvents {
    /// Which.
    #[command(flatten)]
    pub(crate) filter: EventFilter,
    /// Only those at or after this time
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<When>,
    /// Only those before this time
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<When>,
    /// Most events, the newest ones
    #[arg(
        long,
        value_name = "N",
        default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=1000)
    )]
    pub(crate) limit: u32,
    /// All of them, however many
    #[arg(long, conflicts_with = "limit")]
    pub(crate) all: bool,
}

fn kind() -> impl TypedValueParser<Value = EventKind> {
    PossibleValuesParser::new(EventKind::ALL.iter().map(|kind| kind.word()))
        .map(|word| EventKind::from_word(&word).expect("the parser takes only kinds' words"))
}

fn status() -> impl TypedValueParser<Value = EventStatus> {
    PossibleValuesParser::new(EventStatus::ALL.iter().map(|status| status.word()))
        .map(|word| EventStatus::from_word(&word).expect("the parser takes only statuses' words"))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::cli::Cli;

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        let parse = |more: &[&str]| Cli::try_parse_from(["tmctl", "event"].iter().chain(more));
        assert!(parse(&["list", "--since", "2h", "--until", "today", "--kind", "cleanup"]).is_ok());
        assert!(parse(&["list", "--all", "--status", "rolled-back", "-o", "csv"]).is_ok());
        assert!(parse(&["follow", "--limit", "0"]).is_ok());
        for bad in [
            &["list", "--since", "soon"][..],
            &["list", "--kind", "party"],
            &["list", "--status", ""],
            &["list", "--limit", "0"],
            &["list", "--limit", "1001"],
            &["list", "--limit", "5", "--all"],
            &["list", "--endpoint", "web", "--search", "web"],
            &["follow", "--since", "2h", "--limit", "5"],
            &["follow", "--until", "today"],
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
