//! The command line: every noun and verb, and what their help teaches.

use std::{ffi::OsString, os::unix::ffi::OsStrExt as _, path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand,
    builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser},
};
use clap_complete::Shell;
use tm_api::account::Role;
use tm_protocol::task::TaskState;

use crate::{duration, output::Format};

/// The administrator's command line for Threat Management.
#[derive(Debug, Parser)]
#[command(
    name = "tmctl",
    version,
    max_term_width = 80,
    disable_help_subcommand = true,
    long_about = "The administrator's command line for Threat Management.\n\n\
        It asks one manager, the one that the profile names. Data go to standard output (choose how with \
        -o), talk to standard error.\n\n\
        First steps:\n  \
        tmctl endpoint list\n  \
        tmctl pattern import rules.yar\n  \
        tmctl scan start web-07 --path /srv --wait",
    after_long_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 timed out.\n\
        `scan start --wait`: 10 if anything was detected, else 1, 3 or 4 if a task did not end well, else 11 \
        if not everything could be looked at, else 0 (clean)."
)]
pub(crate) struct Cli {
    /// The file that says where the manager is and who asks
    /// [default: ~/.config/tmctl/profile.toml]
    #[arg(long, global = true, env = "TMCTL_PROFILE", value_name = "FILE", hide_env_values = true)]
    pub(crate) profile: Option<PathBuf>,
    /// How data are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) output: Format,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The machines that agents run on
    #[command(subcommand)]
    Endpoint(Endpoint),
    /// Look at files on endpoints
    #[command(subcommand)]
    Scan(Scan),
    /// Orders, and how far they have come
    #[command(subcommand)]
    Task(Task),
    /// What scans look for
    #[command(subcommand)]
    Pattern(Pattern),
    /// Enrollment tokens, which let agents in
    #[command(subcommand)]
    Token(Token),
    /// Who may use the manager
    #[command(subcommand)]
    Account(Account),
    /// Who ordered what
    #[command(subcommand)]
    Audit(Audit),
    /// Show the versions of tmctl and the manager, and who is asking
    Version,
    /// Print a script that completes tmctl's commands in a shell
    #[command(long_about = "Print a script that completes tmctl's commands in a shell.\n\n\
        Example:\n  tmctl completions bash > ~/.bash_completion.d/tmctl")]
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// Write the manual pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// `tmctl endpoint`.
#[derive(Debug, Subcommand)]
pub(crate) enum Endpoint {
    /// List endpoints
    #[command(long_about = "List endpoints.\n\nExamples:\n  \
        tmctl endpoint list --disconnected\n  \
        tmctl endpoint list --search 192.168.0,web -o csv")]
    List {
        /// Only those that this finds: addresses, prefixes (192.168.0), CIDR, starts of host names;
        /// separated by commas
        #[arg(long)]
        search: Option<String>,
        /// Only those of this group
        #[arg(long)]
        group: Option<String>,
        /// Only those whose agent has a session
        #[arg(long, conflicts_with = "disconnected")]
        connected: bool,
        /// Only those whose agent is away
        #[arg(long)]
        disconnected: bool,
    },
    /// Show what is known about one endpoint
    Show {
        /// Endpoint id, host name or address
        target: String,
    },
    /// Put an endpoint into another group
    SetGroup {
        /// Endpoint id, host name or address
        target: String,
        /// Its new group; an endpoint is in exactly one
        group: String,
    },
}

/// `tmctl scan`.
#[derive(Debug, Subcommand)]
pub(crate) enum Scan {
    /// Order a scan, one task for each endpoint
    #[command(long_about = "Order a scan, one task for each endpoint.\n\n\
        Every TARGET means exactly one endpoint; --search and --group mean every one they find. Without \
        --pattern, all imported patterns are used. Paths are absolute paths on the endpoints.\n\n\
        With --wait, tmctl stays until every task has ended, prints what was detected and a receipt for each \
        endpoint, and exits 10 if anything was detected, else 1, 3 or 4 if a task did not end well, else 11 \
        if not everything could be looked at, else 0. Ending tmctl does not end the scan.\n\n\
        Examples:\n  \
        tmctl scan start web-07 --path /srv --path /home --wait\n  \
        tmctl scan start --group servers --path / --when-connected \\\n      --expires 7d --reason 'case 12'\n  \
        tmctl scan start 10.0.0.7 --path /tmp --wait -o json > receipt.json")]
    Start(Box<StartScan>),
}

/// `tmctl scan start`.
#[derive(Debug, Args)]
pub(crate) struct StartScan {
    /// Endpoint id, host name or address
    #[arg(value_name = "TARGET", required_unless_present_any = ["search", "group"])]
    pub(crate) targets: Vec<String>,
    /// Also every endpoint that this finds (as in `endpoint list`)
    #[arg(long)]
    pub(crate) search: Option<String>,
    /// Also every endpoint of this group
    #[arg(long)]
    pub(crate) group: Option<String>,
    /// A file or folder to look at; may be given again
    #[arg(long = "path", value_name = "PATH", required = true, value_parser = absolute_path())]
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
    /// How many containers deep to look; 0 reads archives raw only
    #[arg(long, value_name = "N")]
    pub(crate) max_depth: Option<u32>,
    /// Longest time for one file
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) file_timeout: Option<Duration>,
    /// Stay until every task has ended, and exit by the outcome
    #[arg(long)]
    pub(crate) wait: bool,
    /// Stay no longer than this [default: as long as the tasks may take]
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = duration::parse)]
    pub(crate) timeout: Option<Duration>,
}

/// `tmctl task`.
#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// List tasks, newest first
    List {
        /// Only those of this endpoint (id, host name or address)
        #[arg(long, value_name = "TARGET")]
        endpoint: Option<String>,
        /// Only those in this state
        #[arg(long, value_parser = state())]
        state: Option<TaskState>,
        /// Most rows
        #[arg(
            long,
            value_name = "N",
            default_value_t = 100,
            value_parser = clap::value_parser!(u32).range(1..=1000)
        )]
        limit: u32,
    },
    /// Show one task: state, progress, receipt
    Show {
        /// Its id
        task: String,
    },
    /// List what one task detected
    Detections {
        /// Its id
        task: String,
    },
}

/// `tmctl pattern`.
#[derive(Debug, Subcommand)]
pub(crate) enum Pattern {
    /// Import a pattern (YARA rules or a list of digests)
    #[command(long_about = "Import a pattern: YARA rules or a list of digests, told apart by content.\n\n\
        The manager compiles it first; mistakes are shown as FILE:LINE:COL and nothing is imported. A newer \
        import under the same name is the one that the name means from then on.\n\n\
        Example:\n  tmctl pattern import rules.yar --name fleet-rules")]
    Import {
        /// The file
        file: PathBuf,
        /// What people will call it [default: the file's name]
        #[arg(long)]
        name: Option<String>,
    },
    /// List patterns
    List,
    /// Show one pattern
    Show {
        /// Its name, digest, or the start of the digest (8 digits or more)
        pattern: String,
    },
}

/// `tmctl token`.
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make an enrollment token; it is shown only now
    #[command(
        long_about = "Make an enrollment token and print it, and nothing else, on standard output. It is \
        a secret, and it is shown only now.\n\n\
        Example:\n  tmctl token create --uses 10 --group servers > token\n\n\
        On each endpoint:\n  tm-agent enroll --data /var/lib/tm-agent --token-file token"
    )]
    Create {
        /// How many agents it lets in
        #[arg(long, value_name = "N", default_value_t = 1)]
        uses: u32,
        /// How long it is good for
        #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration::parse)]
        expires: Duration,
        /// The group its endpoints start in
        #[arg(long, default_value = "default")]
        group: String,
    },
    /// List enrollment tokens (without their secrets)
    List,
    /// End an enrollment token; agents that it let in stay
    Revoke {
        /// Its id
        id: String,
    },
}

/// `tmctl account`.
#[derive(Debug, Subcommand)]
pub(crate) enum Account {
    /// Make an account and print its token; it is shown only now
    Create {
        /// Its name
        name: String,
        /// What it may do
        #[arg(long, value_parser = role())]
        role: Role,
    },
    /// List accounts
    List,
    /// Delete an account; its token ends
    Delete {
        /// Its name
        name: String,
    },
    /// Make a new token for an account and print it; the old one ends
    Token {
        /// Its name
        name: String,
    },
}

/// `tmctl audit`.
#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// List who ordered what, oldest first
    List {
        /// Only records after this number
        #[arg(long, value_name = "N", default_value_t = 0)]
        after: i64,
    },
    /// Check that no record was changed, removed or put in
    #[command(
        long_about = "Check that no record was changed, removed or put in: recompute the hash chain of \
        the whole log on this machine.\n\n\
        Prints the newest record's number and hash. Note them elsewhere: a log that was cut off at its end is \
        whole as far as it goes, and only the note shows that more was there."
    )]
    Verify,
}

fn absolute_path() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|path| {
        if path.as_bytes().starts_with(b"/") { Ok(path) } else { Err("an absolute path is expected") }
    })
}

fn state() -> impl TypedValueParser<Value = TaskState> {
    PossibleValuesParser::new(TaskState::ALL.map(TaskState::word))
        .map(|word| TaskState::from_word(&word).expect("the parser takes only states' words"))
}

fn role() -> impl TypedValueParser<Value = Role> {
    PossibleValuesParser::new(Role::ALL.map(Role::word))
        .map(|word| Role::from_word(&word).expect("the parser takes only roles' words"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_fits_80_columns() {
        fn check(command: &mut clap::Command) {
            let help = command.clone().term_width(80).render_long_help().to_string();
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "{}: {line}", command.get_name());
            }
            command.get_subcommands_mut().for_each(check);
        }
        let mut command = Cli::command();
        command.clone().debug_assert();
        command.build();
        check(&mut command);
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        let start = ["tmctl", "scan", "start"];
        let parse = |more: &[&str]| Cli::try_parse_from(start.iter().chain(more));
        assert!(parse(&["web", "--path", "/srv", "--wait", "--timeout", "5m", "-o", "json"]).is_ok());
        assert!(parse(&["--group", "g", "--path", "/srv"]).is_ok());
        for bad in [
            &["web"][..],
            &["--path", "/srv"],
            &["web", "--path", "srv"],
            &["web", "--path", "/srv", "--timeout", "5m"],
            &["web", "--path", "/srv", "--expires", "5"],
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
