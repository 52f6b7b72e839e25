//! `tmctl pattern`.

use std::path::PathBuf;

use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use tm_patterns::trust::Delegate;
use tm_protocol::ids::EndpointId;

use super::rollout::{Rollout, RolloutArgs};
use crate::desk::Seat;

/// `tmctl pattern`.
#[derive(Debug, Subcommand)]
pub(crate) enum Pattern {
    /// Import, sign and publish a pattern (YARA rules or a list of digests)
    #[command(
        long_about = "Import a pattern: YARA rules or a list of digests, told apart by content. It is sent to \
        the manager as a draft, signed on this desk, and published; agents load nothing else.\n\n\
        The manager compiles it first; mistakes are shown as FILE:LINE:COL and nothing is imported. A newer \
        import under the same name takes the place of the older one. Rules that cost much more than \
        others are named with the reason, and a pattern with one that can hold up a scan is refused unless \
        --force is given. A list has one digest (MD5, SHA-1 or SHA-256) a line, alone or with a name, as CSV, as \
        MISP exports it, or as ClamAV writes .hdb and .hsb; lines without one are named. If somebody else published \
        at the same moment, nothing is published, and it is said.\n\n\
        With --wave only a share of the endpoints gets the new version, and the others keep the one before, until \
        `tmctl pattern rollout advance`. A version that hits a file of a package, or finds something on more \
        endpoints than --brake-share allows, stops by itself: nobody is sent it any more.\n\n\
        Examples:\n  tmctl pattern import rules.yar --name fleet-rules\n  \
        tmctl pattern import rules.yar --name fleet-rules \\\n      --wave 1%,10%,100% --every 1d"
    )]
    Import(ImportPattern),
    /// Send a pattern to the manager and write what is to be signed into a file
    #[command(
        long_about = "Send a pattern to the manager, which tries it and keeps it as a draft, and write what is to \
        be signed into a file. Each desk that must sign does so with `tmctl pattern sign`; `tmctl pattern publish` \
        puts it in force. How it reaches the fleet (--wave and so on) is a part of the draft.\n\n\
        Example:\n  tmctl pattern draft rules.yar --out rules.draft"
    )]
    Draft {
        /// What is sent.
        #[command(flatten)]
        import: ImportPattern,
        /// Where to write the draft
        #[arg(long, value_name = "DRAFT")]
        out: PathBuf,
    },
    /// Sign a draft with the keys that are on this desk
    Sign {
        /// The draft
        #[arg(value_name = "DRAFT")]
        draft: PathBuf,
    },
    /// Put a signed draft in force
    Publish {
        /// The draft
        #[arg(value_name = "DRAFT")]
        draft: PathBuf,
        /// In the place of what the draft says.
        #[command(flatten)]
        rollout: RolloutArgs,
    },
    /// Versions on their way to endpoints, in waves
    #[command(subcommand)]
    Rollout(Rollout),
    /// Withdraw a pattern: no agent loads it any more
    Retire {
        /// Its name or digest
        pattern: String,
        /// The role that lists it
        #[arg(long, default_value = "detect", value_parser = role())]
        role: Delegate,
    },
    /// Who may sign patterns
    #[command(subcommand)]
    Trust(Trust),
    /// List patterns
    List,
    /// Show one pattern
    Show {
        /// Its name, digest, or the start of the digest (8 digits or more)
        pattern: String,
    },
}

/// What is imported, and as what.
#[derive(Debug, Args)]
pub(crate) struct ImportPattern {
    /// The file
    pub(crate) file: PathBuf,
    /// What people will call it [default: the file's name]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Take rules that can hold up a scan all the same; they are named, and the audit log says so
    #[arg(long)]
    pub(crate) force: bool,
    /// The role that signs it
    #[arg(long, default_value = "detect", value_parser = role())]
    pub(crate) role: Delegate,
    /// An endpoint that it is for (may be given several times) [default: all]
    #[arg(long, value_name = "ID")]
    pub(crate) endpoint: Vec<EndpointId>,
    /// How it reaches the fleet.
    #[command(flatten)]
    pub(crate) rollout: RolloutArgs,
}

/// `tmctl pattern trust`.
#[derive(Debug, Subcommand)]
pub(crate) enum Trust {
    /// Make the fleet's root of trust, with its keys on this desk
    #[command(
        long_about = "Make the fleet's root of trust for patterns, with all keys in the trust folder of this \
        desk (--trust; keep a copy in a safe place), and give the manager the public part. Do it once, before the \
        first enrollment token: tokens carry the root's digest, and an agent loads only what follows from it.\n\n\
        Example:\n  tmctl pattern trust init"
    )]
    Init,
    /// Show the roles: versions, keys, which keys are here, and when what they signed ends
    Status,
    /// Replace this desk's keys of a role by a new one
    Rotate {
        /// The role
        #[arg(long, value_parser = seat())]
        role: Seat,
    },
    /// Add a key to a role: a new one in this folder, or somebody else's
    AddKey {
        /// The role
        #[arg(long, value_parser = seat())]
        role: Seat,
        /// The public half of somebody else's key (64 hexadecimal digits)
        #[arg(long, value_name = "HEX")]
        public: Option<String>,
    },
    /// Say how many signatures a role needs
    Threshold {
        /// The role
        #[arg(long, value_parser = seat())]
        role: Seat,
        /// How many
        #[arg(value_name = "N")]
        count: u64,
    },
    /// Give a manager that was restored from an old copy what this desk has published since
    Repair,
}

fn role() -> impl TypedValueParser<Value = Delegate> {
    PossibleValuesParser::new(Delegate::ALL.map(Delegate::word))
        .map(|word| Delegate::from_word(&word).expect("the parser takes only roles' words"))
}

fn seat() -> impl TypedValueParser<Value = Seat> {
    PossibleValuesParser::new(Seat::ALL.map(Seat::word))
        .map(|word| Seat::from_word(&word).expect("the parser takes only roles' words"))
}
