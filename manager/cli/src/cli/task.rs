//! `tmctl task`.

use std::time::Duration;

use clap::{
    Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use tm_protocol::task::TaskState;

use crate::duration;

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
    /// Show one task: state, progress, and what came of it
    #[command(long_about = "Show one task: state, progress, and what came of it.\n\n\
        A scan's receipt is signed by the key of the endpoint's certificate. To check it without the manager's \
        word (-o json holds the signature, the key and the signed text, each in base64; ECDSA over SHA-256):\n  \
        tmctl task show T -o json > t.json\n  \
        jq -r .result.receipt.signature t.json | base64 -d > t.sig\n  \
        jq -r .result.receipt.signed_bytes_b64 t.json | base64 -d > t.txt\n  \
        jq -r .result.receipt.key t.json | base64 -d \\\n      | openssl pkey -pubin -inform DER -out t.pem\n  \
        openssl dgst -sha256 -verify t.pem -signature t.sig t.txt")]
    Show {
        /// Its id
        task: String,
    },
    /// Stay with one task until it ends, and exit by its outcome
    #[command(
        long_about = "Stay with one task until it ends, and exit by its outcome, as `--wait` does.\n\n\
        On a terminal one line shows how far it is; elsewhere each change is a line. With -o json, one JSON \
        object a line, the last one with the result. Ending tmctl does not end the task: `tmctl task \
        cancel` does."
    )]
    Follow {
        /// Its id
        task: String,
        /// Stay no longer than this [default: until it ends]
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        timeout: Option<Duration>,
    },
    /// Call tasks off
    #[command(long_about = "Call tasks off.\n\n\
        A task that its agent does not have yet is cancelled at once. An agent at work is told to stop, and \
        says within moments what it had done by then; what it removed stays in the vault. An agent that is \
        away is told when it is back.\n\n\
        With --wait, tmctl stays for that last word and shows what was kept. The exit code is 0 if the tasks \
        are called off, 3 if one had ended by itself, 4 if an agent has not answered in time.\n\n\
        Example:\n  tmctl task cancel 018f3c1e-6b5a-7000-8000-0123456789ab --wait")]
    Cancel {
        /// Its id; may be several
        #[arg(value_name = "TASK", required = true)]
        tasks: Vec<String>,
        /// Stay until the agents have said what was kept
        #[arg(long)]
        wait: bool,
        /// Stay no longer than this
        #[arg(
            long,
            value_name = "DURATION",
            requires = "wait",
            default_value = "1m",
            value_parser = duration::parse
        )]
        timeout: Duration,
    },
    /// List what one scan detected
    Detections {
        /// Its id
        task: String,
    },
    /// List the files of one cleanup or restore, and what came of each
    Items {
        /// Its id
        task: String,
    },
}

fn state() -> impl TypedValueParser<Value = TaskState> {
    PossibleValuesParser::new(TaskState::ALL.map(TaskState::word))
        .map(|word| TaskState::from_word(&word).expect("the parser takes only states' words"))
}
