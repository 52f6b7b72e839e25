//! The command line: every noun and verb, and what their help teaches.
//!
//! The nouns that stand for work on endpoints have files of their own.

mod cleanup;
mod coverage;
mod endpoint;
mod event;
mod limits;
mod order;
mod pattern;
mod rollout;
mod scan;
mod task;
mod vault;

use std::{path::PathBuf, time::Duration};

use clap::{
    Parser, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use clap_complete::Shell;
use tm_api::account::Role;

pub(crate) use self::{
    cleanup::{Cleanup, RunCleanup},
    coverage::Coverage,
    endpoint::Endpoint,
    event::{Event, EventFilter, ListEvents},
    order::{Terms, To},
    pattern::{ImportPattern, Pattern, Trust},
    rollout::Rollout,
    scan::{Scan, StartScan},
    task::Task,
    vault::{RunRestore, Vault},
};
use crate::{duration, output::Format};

/// Above what every command takes.
const GLOBAL: &str = "Options of every command";

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
        tmctl status\n  \
        tmctl endpoint list\n  \
        tmctl pattern trust init\n  \
        tmctl pattern import rules.yar\n  \
        tmctl scan start web-07 --path /srv --wait\n  \
        tmctl cleanup run web-07 --dry-run\n  \
        tmctl cleanup run web-07 --wait",
    after_long_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 timed out, 130 ended with \
        Ctrl-C while waiting. Of several tasks, a failed one counts first, then a refused one, then one that \
        took too long; cancelled counts as failed, expired as timed out. What was refused only in part (some \
        files and not others) counts as refused.\n\
        `scan start --wait`: 10 if anything was detected, else 1, 3 or 4 if a task did not end well, else 11 \
        if not everything could be looked at, else 0 (clean)."
)]
pub(crate) struct Cli {
    /// The file that says where the manager is and who asks
    /// [default: ~/.config/tmctl/profile.toml]
    #[arg(
        long,
        global = true,
        env = "TMCTL_PROFILE",
        value_name = "FILE",
        hide_env_values = true,
        help_heading = GLOBAL
    )]
    pub(crate) profile: Option<PathBuf>,
    /// The folder with the keys that sign patterns
    /// [default: ~/.config/tmctl/trust/ and the start of the authority's digest]
    #[arg(
        long,
        global = true,
        env = "TMCTL_TRUST",
        value_name = "DIR",
        hide_env_values = true,
        help_heading = GLOBAL
    )]
    pub(crate) trust: Option<PathBuf>,
    /// A file whose first line is the passphrase that these keys are sealed with
    #[arg(
        long,
        global = true,
        env = "TMCTL_PASSPHRASE_FILE",
        value_name = "FILE",
        hide_env_values = true,
        help_heading = GLOBAL
    )]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// How data are printed
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t = Format::Table,
        value_name = "FORMAT",
        help_heading = GLOBAL
    )]
    pub(crate) output: Format,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(hide = true)]
    ScanWorker,
    /// Show what waits for somebody, and the command for it
    #[command(
        long_about = "Show the overview: how many endpoints need what, and the next command for each.\n\n\
        The counts are of work that waits for a person. What is ordered already, and waits or runs, stands \
        beside it as `queued automatically`. `tmctl endpoint list --query NAME` lists what a line counts.\n\n\
        Examples:\n  \
        tmctl status\n  \
        tmctl status -o json"
    )]
    Status,
    /// Show why an endpoint is as it is, and what to do next
    #[command(
        long_about = "Show why an endpoint is as it is: whether it can be reached, its incidents, tasks \
        and newest events, and what to do next.\n\n\
        Example:\n  tmctl why web-07"
    )]
    Why {
        /// Endpoint id, host name or address
        #[arg(value_name = "ENDPOINT")]
        target: String,
    },
    /// The machines that agents run on
    #[command(subcommand)]
    Endpoint(Endpoint),
    /// Groups of endpoints; each endpoint is in exactly one
    #[command(subcommand)]
    Group(Group),
    /// Look at files on endpoints
    #[command(subcommand)]
    Scan(Scan),
    /// Show what nobody has looked at for how long
    #[command(
        long_about = "Show which endpoints nobody has looked at: those where no scan has gone through the \
        whole of a path within so many days, without a gap.\n\n\
        covered: looked at within the days (--all lists these too). stale: longer ago. incomplete: the newest \
        scan left gaps, or did not go through; they are named. never: no scan of the path has ended. A scan of a \
        folder covers all below it. What was scanned without --all-local has gaps where other file systems are \
        mounted (other-filesystem).\n\n\
        Examples:\n  \
        tmctl coverage\n  \
        tmctl coverage --days 30 --path /home --group servers\n  \
        tmctl coverage web-07 --all -o json"
    )]
    Coverage(Box<Coverage>),
    /// Remove what was detected
    #[command(subcommand)]
    Cleanup(Cleanup),
    /// Removed files, which can be put back
    #[command(subcommand)]
    Vault(Vault),
    /// The Threat Event Log: what happened
    #[command(subcommand)]
    Event(Event),
    /// Threat events on their way to other systems
    #[command(subcommand)]
    Export(Export),
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

/// `tmctl group`.
#[derive(Debug, Subcommand)]
pub(crate) enum Group {
    /// Make a group
    #[command(long_about = "Make a group. An endpoint comes into it with an enrollment token (tmctl token \
        create --group) or by hand (tmctl endpoint set-group).\n\n\
        Example:\n  tmctl group create servers")]
    Create {
        /// Its name: 1 to 64 letters, digits, `.`, `-`, `_`
        name: String,
    },
    /// List groups
    List,
}

/// `tmctl token`.
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make an enrollment token; it is shown only now
    #[command(
        long_about = "Make an enrollment token and print it, and nothing else, on standard output. It is \
        a secret, and it is shown only now. It carries the digest of the root of trust in this desk's trust \
        folder (see `tmctl pattern trust init`): agents load only patterns that follow from it.\n\n\
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
        /// Make it although this desk has no root of trust; agents it lets in load no pattern
        #[arg(long)]
        without_trust: bool,
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

/// `tmctl export`.
#[derive(Debug, Subcommand)]
pub(crate) enum Export {
    /// List exporters: what their receivers have, and what waits
    #[command(
        long_about = "List exporters: the last event that each one's receiver took, how many events wait \
        and for how long, and why it does not go on. Exporters stand in the managers' configuration, as \
        [[export]].\n\n\
        Examples:\n  \
        tmctl export list\n  \
        tmctl export list -o json"
    )]
    List,
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

fn role() -> impl TypedValueParser<Value = Role> {
    PossibleValuesParser::new(Role::ALL.map(Role::word))
        .map(|word| Role::from_word(&word).expect("the parser takes only roles' words"))
}

#[cfg(test)]
mod tests {
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
}
