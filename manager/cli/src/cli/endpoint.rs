//! `tmctl endpoint`.

use clap::{
    Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use tm_api::{event::IncidentState, status::Query};

use super::order::query;

/// `tmctl endpoint`.
#[derive(Debug, Subcommand)]
pub(crate) enum Endpoint {
    /// List endpoints
    #[command(long_about = "List endpoints.\n\nExamples:\n  \
        tmctl endpoint list --disconnected\n  \
        tmctl endpoint list --query needs-cleanup\n  \
        tmctl endpoint list --search 192.168.0,web -o csv")]
    List {
        /// Only those that this finds: addresses, prefixes (192.168.0), CIDR, starts of host names;
        /// separated by commas
        #[arg(long)]
        search: Option<String>,
        /// Only those of this group
        #[arg(long)]
        group: Option<String>,
        /// Only those that this line of `tmctl status` counts
        #[arg(long, value_parser = query())]
        query: Option<Query>,
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
    /// List the newest threat events of one endpoint, oldest first
    #[command(long_about = "List the newest threat events of one endpoint, oldest first. \
        `tmctl event list --endpoint` does the same with more filters.\n\n\
        Example:\n  tmctl endpoint events web-07")]
    Events {
        /// Endpoint id, host name or address
        target: String,
        /// Most events
        #[arg(
            long,
            value_name = "N",
            default_value_t = 100,
            value_parser = clap::value_parser!(u32).range(1..=1000)
        )]
        limit: u32,
    },
    /// List the incidents of one endpoint, newest first
    #[command(long_about = "List the incidents of one endpoint, newest first. An incident is the work that \
        detections of one rule make; cleanup is ordered for those that await it.\n\n\
        Example:\n  tmctl endpoint incidents web-07 --state awaiting-cleanup")]
    Incidents {
        /// Endpoint id, host name or address
        target: String,
        /// Only those in this state
        #[arg(long, value_parser = incident_state())]
        state: Option<IncidentState>,
        /// Most incidents
        #[arg(
            long,
            value_name = "N",
            default_value_t = 100,
            value_parser = clap::value_parser!(u32).range(1..=1000)
        )]
        limit: u32,
    },
    /// List agents' certificates, the first to end first
    #[command(
        long_about = "List agents' certificates, the first to end first. Agents renew theirs by themselves \
        after two thirds of its life; what is `away`, `late`, `ended` or `needs-enrollment` is for a person.\n\n\
        Examples:\n  tmctl endpoint certificates --expiring 30\n  \
        tmctl endpoint certificates -o csv"
    )]
    Certificates {
        /// Only those that end within so many days or have ended
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(0..=36_500))]
        expiring: Option<u32>,
    },
    /// List agents that came with the identity of another one, the newest first
    #[command(
        long_about = "List agents that came with the identity of another one, the newest first: a machine or an \
        agent's folder was copied. Such an agent is held: it gets no order until it is approved \
        (`tmctl endpoint approve`) or the identity is revoked.\n\n\
        Example:\n  tmctl endpoint conflicts"
    )]
    Conflicts,
    /// Make the agent that is held with an endpoint's identity an endpoint of its own
    #[command(
        long_about = "Make the agent that is held with an endpoint's identity an endpoint of its own, in the same \
        group. It gets a new key and id, and sets aside what it has of the first one's tasks and vault; the first \
        one gets a new key, too, so that the copied one is good for nothing.\n\n\
        Examples:\n  tmctl endpoint approve web-07\n  \
        tmctl endpoint approve web-07 --conflict 01890c5e-9f4b-7cc0-98ab-0123456789ab"
    )]
    Approve {
        /// Endpoint id, host name or address of the endpoint whose identity was copied
        target: String,
        /// Which agent, if several are held (the id in `tmctl endpoint conflicts`)
        #[arg(long, value_name = "ID")]
        conflict: Option<String>,
    },
    /// Shut an endpoint's agent out for ever
    #[command(
        long_about = "Shut an endpoint's agent out for ever: its certificates are refused from now on, and \
        its session ends within two seconds. The agent goes on to run where it is, and gets no more orders. To \
        let the machine in again, enroll it anew (as another endpoint).\n\n\
        Examples:\n  tmctl endpoint revoke web-07 --reason 'disk sold'\n  \
        tmctl endpoint revoke 01890c5e-9f4b-7cc0-98ab-0123456789ab"
    )]
    Revoke {
        /// Endpoint id, host name or address
        target: String,
        /// Why, for the audit log
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Remove what is known about a revoked endpoint
    #[command(
        long_about = "Remove what is known about a revoked endpoint: its tasks, detections, incidents and \
        facts. Threat events and audit records stay.\n\n\
        Example:\n  tmctl endpoint forget web-07"
    )]
    Forget {
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

fn incident_state() -> impl TypedValueParser<Value = IncidentState> {
    PossibleValuesParser::new(IncidentState::ALL.iter().map(|state| state.word()))
        .map(|word| IncidentState::from_word(&word).expect("the parser takes only states' words"))
}
