//! Asks before much is removed.
//!
//! Whether a person is asked follows from the command line alone, not from what the search finds at the
//! moment, so that a script either always or never needs `--yes`.

use std::{
    collections::BTreeSet,
    io::{self, BufRead, IsTerminal as _},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tm_api::{
    endpoint::{EndpointQuery, EndpointView},
    event::{IncidentQuery, IncidentState, IncidentView},
};

use crate::{
    cli::{RunCleanup, To},
    client::Client,
    cmds::wait::PARALLEL,
    failure::Failure,
    output::{plural, say},
};

/// So many endpoints can be named one by one without a question.
const NAMED: usize = 10;
/// Most incidents that a manager lists.
const ROWS: u32 = 1000;

/// Where answers come from, if both sides of a talk are a terminal.
pub(super) fn person() -> Option<impl BufRead> {
    (io::stdin().is_terminal() && io::stderr().is_terminal()).then(|| io::stdin().lock())
}

/// Lets an order pass, after a question to `person` where it concerns much.
///
/// # Errors
/// If the person does not say yes, or cannot be asked and `--yes` is missing, or there is nothing to remove.
pub(super) async fn ask(
    args: &RunCleanup,
    client: &Client,
    person: Option<impl BufRead>,
) -> Result<(), Failure> {
    if args.yes || args.terms.dry_run || !concerns_much(&args.to) {
        return Ok(());
    }
    let Some(mut person) = person else {
        return Err(Failure::Usage(
            "nobody can be asked whether to remove so much; add --yes (or --dry-run to see what it would be)"
                .to_owned(),
        ));
    };
    let extent = extent(args, client).await?;
    if extent.detections == Some(0) && !extent.is_least {
        let on = match extent.endpoints {
            0 => "no endpoint is found".to_owned(),
            count => format!("nothing waits for cleanup on the {} found", plural(count, "endpoint")),
        };
        return Err(Failure::NothingToDo(on));
    }
    say(&format!("{} [y/N] ", extent.question()));
    let mut answer = String::new();
    // Nothing else goes on in this program meanwhile, and Ctrl-C ends it: nothing is ordered yet.
    match person.read_line(&mut answer) {
        Ok(_) if is_yes(&answer) => Ok(()),
        Ok(_) | Err(_) => Err(Failure::NotConfirmed),
    }
}

const fn concerns_much(to: &To) -> bool {
    to.is_selection() || to.targets.len() > NAMED
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// How much an order concerns.
#[derive(Debug, PartialEq, Eq)]
struct Extent {
    /// Detections that wait; `None` if some are named instead.
    detections: Option<u64>,
    /// Endpoints on which they are; those chosen if there are none.
    endpoints: u64,
    /// There are more than were counted.
    is_least: bool,
}

impl Extent {
    fn question(&self) -> String {
        let on = plural(self.endpoints, "endpoint");
        let least = if self.is_least { "at least " } else { "" };
        match self.detections {
            Some(count) => format!("Remove {least}{} on {least}{on}?", plural(count, "detection")),
            None => format!("Remove the detections named on {on}?"),
        }
    }
}

async fn extent(args: &RunCleanup, client: &Client) -> Result<Extent, Failure> {
    let chosen = chosen(&args.to, client).await?;
    let all = u64::try_from(chosen.len()).unwrap_or(u64::MAX);
    if !args.detections.is_empty() {
        return Ok(Extent { detections: None, endpoints: all, is_least: false });
    }
    let mut waiting = Vec::new();
    let mut is_least = false;
    for state in [IncidentState::AwaitingCleanup, IncidentState::Unresolved] {
        let query = IncidentQuery { endpoint: None, state: Some(state), limit: Some(ROWS) };
        let found: Vec<IncidentView> = client.get(&["incidents"], &query).await?;
        is_least |= u32::try_from(found.len()).is_ok_and(|count| count >= ROWS);
        waiting.extend(found);
    }
    Ok(count(&chosen, &waiting, is_least))
}

/// The ids of every endpoint that is meant.
async fn chosen(to: &To, client: &Client) -> Result<BTreeSet<String>, Failure> {
    let mut chosen: BTreeSet<String> = stream::iter(&to.targets)
        .map(|target| async move {
            let endpoint: EndpointView = client.get(&["endpoints", target], &()).await?;
            Ok::<_, Failure>(endpoint.id)
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    let queries = [
        to.search.clone().map(|search| EndpointQuery { search: Some(search), ..EndpointQuery::default() }),
        to.group.clone().map(|group| EndpointQuery { group: Some(group), ..EndpointQuery::default() }),
        to.query.map(|query| EndpointQuery { query: Some(query), ..EndpointQuery::default() }),
    ];
    for query in queries.into_iter().flatten() {
        let found: Vec<EndpointView> = client.get(&["endpoints"], &query).await?;
        chosen.extend(found.into_iter().map(|endpoint| endpoint.id));
    }
    Ok(chosen)
}

fn count(chosen: &BTreeSet<String>, waiting: &[IncidentView], is_least: bool) -> Extent {
    let mut on: BTreeSet<&str> = BTreeSet::new();
    let mut detections = 0_u64;
    for one in waiting.iter().filter(|one| one.open_detections > 0 && chosen.contains(&one.endpoint)) {
        on.insert(&one.endpoint);
        detections = detections.saturating_add(one.open_detections);
    }
    let concerned = if detections == 0 { chosen.len() } else { on.len() };
    Extent { detections: Some(detections), endpoints: u64::try_from(concerned).unwrap_or(u64::MAX), is_least }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::{
        cli::{Cleanup, Cli, Command},
        cmds::samples,
        testing::Scripted,
    };

    fn args(more: &[&str]) -> RunCleanup {
        let args = ["tmctl", "cleanup", "run"].into_iter().chain(more.iter().copied());
        let Command::Cleanup(Cleanup::Run(args)) = Cli::try_parse_from(args).unwrap().command else {
            panic!("another command")
        };
        *args
    }

    #[test]
    fn the_command_line_alone_decides_whether_a_question_is_asked() {
        let eleven = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"];
        for (more, much) in [
            (&["web"][..], false),
            (&eleven[..10], false),
            (&eleven, true),
            (&["--search", "web"], true),
            (&["--group", "g"], true),
            (&["web", "--query", "needs-cleanup"], true),
        ] {
            assert_eq!(concerns_much(&args(more).to), much, "{more:?}");
        }
        for (answer, yes) in
            [("y\n", true), ("Yes\n", true), ("", false), ("\n", false), ("n\n", false), ("yy", false)]
        {
            assert_eq!(is_yes(answer), yes, "{answer:?}");
        }
    }

    #[test]
    fn the_question_names_what_is_really_concerned() {
        let incident = |endpoint: &str, open_detections| IncidentView {
            endpoint: endpoint.into(),
            open_detections,
            ..samples::incident()
        };
        let chosen: BTreeSet<String> = ["a", "b", "c"].map(str::to_owned).into();
        let waiting =
            [incident("a", 2), incident("a", 3), incident("b", 1), incident("z", 7), incident("c", 0)];
        let question = |waiting: &[IncidentView], is_least| count(&chosen, waiting, is_least).question();
        assert_eq!(question(&waiting, false), "Remove 6 detections on 2 endpoints?");
        assert_eq!(question(&waiting[2..3], false), "Remove 1 detection on 1 endpoint?");
        assert_eq!(question(&waiting, true), "Remove at least 6 detections on at least 2 endpoints?");
        let none = count(&chosen, &waiting[3..], false);
        assert_eq!(none, Extent { detections: Some(0), endpoints: 3, is_least: false });
        let named = Extent { detections: None, endpoints: 11, is_least: false };
        assert_eq!(named.question(), "Remove the detections named on 11 endpoints?");
    }

    #[tokio::test]
    async fn only_a_yes_lets_much_pass_and_nobody_is_no_yes() {
        let manager = Scripted::start(|asked| {
            Some(match asked.line.as_str() {
                "GET /v1/endpoints?search=web" => (200, json!([samples::endpoint()])),
                "GET /v1/incidents?state=awaiting-cleanup&limit=1000" => (200, json!([samples::incident()])),
                "GET /v1/incidents?state=unresolved&limit=1000" => (200, json!([])),
                other => (500, json!({"code": "internal", "message": other})),
            })
        })
        .await;
        let ask = async |more: &[&str], answer: Option<&'static str>| {
            ask(&args(more), &manager.client, answer.map(str::as_bytes)).await
        };
        assert!(matches!(ask(&["--search", "web"], None).await, Err(Failure::Usage(_))));
        assert!(ask(&["--search", "web", "--dry-run"], None).await.is_ok());
        assert!(ask(&["--search", "web", "--yes"], None).await.is_ok());
        assert!(ask(&["web"], None).await.is_ok());
        assert!(manager.lines().is_empty(), "nothing had to be looked up");

        assert!(ask(&["--search", "web"], Some("y\n")).await.is_ok());
        assert_eq!(manager.lines().len(), 3);
        for no in ["n\n", "", "\n"] {
            assert!(matches!(ask(&["--search", "web"], Some(no)).await, Err(Failure::NotConfirmed)));
        }
    }

    #[tokio::test]
    async fn where_nothing_waits_nobody_is_asked() {
        let manager = Scripted::start(|asked| {
            let body =
                if asked.line.contains("endpoints") { json!([samples::endpoint()]) } else { json!([]) };
            Some((200, body))
        })
        .await;
        let failure =
            ask(&args(&["--group", "g"]), &manager.client, Some("y\n".as_bytes())).await.unwrap_err();
        assert_eq!(failure.exit().code(), 3);
        assert!(failure.report().contains("nothing waits for cleanup on the 1 endpoint found"));
    }
}
