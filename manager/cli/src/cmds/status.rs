//! `tmctl status`: the overview.

use std::fmt::Write as _;

use tm_api::status::{Query, QueryCount, StatusView};

use crate::{
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Format, Output, plural},
};

const COLUMNS: [Column<QueryCount>; 3] = [
    Column::narrow("name", |q| q.name.to_string()),
    Column::narrow("count", |q| q.count.to_string()),
    Column::narrow("queued_automatically", |q| q.queued_automatically.to_string()),
];

pub(crate) async fn run(client: &Client, out: &Output) -> Result<Exit, Failure> {
    let status: StatusView = client.get(&["status"], &()).await?;
    match out.format() {
        Format::Table => out.text(&text(&status))?,
        Format::Json => out.json(&status)?,
        Format::Csv => out.csv(&status.queries, &COLUMNS)?,
    }
    Ok(Exit::Done)
}

/// The overview for people. Nothing in it comes from an endpoint.
fn text(status: &StatusView) -> String {
    let mut text = format!(
        "{}: {} connected, {} disconnected, {} without an agent\n",
        plural(status.endpoints, "endpoint"),
        status.connected,
        status.disconnected,
        status.agentless,
    );
    let _ = writeln!(
        text,
        "{} open, {} waiting for the endpoint, {} under way\n",
        plural(status.incidents_open, "incident"),
        plural(status.tasks_queued, "task"),
        plural(status.tasks_running, "task"),
    );
    for warning in &status.certificates.warnings {
        let _ = writeln!(text, "! {warning}");
    }
    if !status.certificates.warnings.is_empty() {
        text.push('\n');
    }
    for query in &status.queries {
        let _ = write!(text, "{:15}  {:>6}", query.name.word(), query.count);
        if query.queued_automatically > 0 {
            let _ = write!(text, "  and {} queued automatically", query.queued_automatically);
        }
        text.push('\n');
        if query.count > 0 {
            for command in commands(query.name) {
                let _ = writeln!(text, "                   {command}");
            }
        }
    }
    text
}

/// What to type next where a line counts something.
const fn commands(query: Query) -> &'static [&'static str] {
    match query {
        Query::NeedsCleanup => &[
            "see who:   tmctl endpoint list --query needs-cleanup",
            "look:      tmctl cleanup run --query needs-cleanup --dry-run",
            "clean up:  tmctl cleanup run --query needs-cleanup --wait",
        ],
        Query::Unresolved => &[
            "see who:   tmctl endpoint list --query unresolved",
            "see why:   tmctl event list --kind cleanup --status unsuccessful",
        ],
        Query::Disconnected => &["see who:   tmctl endpoint list --query disconnected"],
        Query::AgentInstalled => &["see who:   tmctl endpoint list --query agent-installed"],
        Query::Agentless => &["see who:   tmctl endpoint list --query agentless"],
        // Nothing has to be done about those.
        Query::Connected => &[],
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use tm_api::certificate::CertificateSummary;

    use super::*;
    use crate::cli::Cli;

    fn status(counts: [u64; 6], queued_automatically: u64) -> StatusView {
        let queries = Query::ALL.into_iter().zip(counts);
        StatusView {
            queries: queries.map(|(name, count)| QueryCount { name, count, queued_automatically }).collect(),
            connected: 2,
            disconnected: 1,
            agentless: 0,
            endpoints: 3,
            tasks_queued: 1,
            tasks_running: 0,
            incidents_open: 4,
            certificates: CertificateSummary::default(),
        }
    }

    #[test]
    fn what_waits_has_its_command_and_what_does_not_is_still_shown() {
        assert_eq!(
            text(&status([0; 6], 0)),
            "3 endpoints: 2 connected, 1 disconnected, 0 without an agent\n\
             4 incidents open, 1 task waiting for the endpoint, 0 tasks under way\n\n\
             needs-cleanup         0\nunresolved            0\nconnected             0\n\
             disconnected          0\nagent-installed       0\nagentless             0\n"
        );
        let text = text(&status([1, 0, 2, 1, 1, 0], 3));
        assert!(text.contains("needs-cleanup         1  and 3 queued automatically\n"), "{text}");
        assert!(text.contains("tmctl cleanup run --query needs-cleanup --dry-run\n"), "{text}");
        assert!(!text.contains("--query unresolved"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn every_command_that_is_suggested_exists() {
        for command in Query::ALL.into_iter().flat_map(commands) {
            let words = command.split_once("tmctl").unwrap().1.split_whitespace();
            let parsed = Cli::try_parse_from(["tmctl"].into_iter().chain(words));
            assert!(parsed.is_ok(), "{command}: {}", parsed.unwrap_err());
        }
    }
}
