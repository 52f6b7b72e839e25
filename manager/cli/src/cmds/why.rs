//! `tmctl why`: everything that bears on one endpoint, on one screen.

use std::fmt::Write as _;

use tm_api::{
    endpoint::{Connectivity, EndpointView},
    event::IncidentView,
    status::WhyView,
    task::TaskView,
};
use tm_protocol::text::escape_for_display;

use crate::{
    client::Client,
    cmds::{event, progress},
    failure::{Exit, Failure},
    output::{Column, Format, Output, plural, time_for_people},
};

/// One line of the answer as CSV: everything in one kind of row.
struct Row {
    section: &'static str,
    id: String,
    at: String,
    state: String,
    text: String,
}

const COLUMNS: [Column<Row>; 5] = [
    Column::narrow("section", |r| r.section.to_owned()),
    Column::narrow("id", |r| r.id.clone()),
    Column::narrow("at", |r| r.at.clone()),
    Column::narrow("state", |r| r.state.clone()),
    Column::narrow("text", |r| r.text.clone()),
];

pub(crate) async fn run(target: &str, client: &Client, out: &Output) -> Result<Exit, Failure> {
    let why: WhyView = client.get(&["endpoints", target, "why"], &()).await?;
    match out.format() {
        Format::Table => out.text(&text(&why))?,
        Format::Json => out.json(&why)?,
        Format::Csv => out.csv(&rows(&why), &COLUMNS)?,
    }
    Ok(Exit::Done)
}

fn text(why: &WhyView) -> String {
    let mut text = head(&why.endpoint);
    let counted: Vec<&str> = why.queries.iter().map(|query| query.word()).collect();
    if !counted.is_empty() {
        let _ = writeln!(text, "counted in `tmctl status` as {}", counted.join(", "));
    }
    section(&mut text, "what to do next", &advice(&why.advice));
    section(&mut text, "incidents", &why.incidents.iter().map(incident).collect::<String>());
    section(&mut text, "tasks", &why.tasks.iter().map(task).collect::<String>());
    section(&mut text, "newest events", &indented(&event::text(&why.events)));
    text
}

fn section(text: &mut String, title: &str, lines: &str) {
    if !lines.is_empty() {
        let _ = write!(text, "\n{title}\n{lines}");
    }
}

/// Who it is and whether it can be reached.
fn head(endpoint: &EndpointView) -> String {
    let addresses = if endpoint.addresses.is_empty() {
        "no address known".to_owned()
    } else {
        endpoint.addresses.join(" ")
    };
    let mut text = format!(
        "{} ({}), {}, group {}\n",
        escape_for_display(&endpoint.host),
        escape_for_display(&endpoint.id),
        escape_for_display(&addresses),
        escape_for_display(&endpoint.group),
    );
    let seen = endpoint.last_seen_at.as_deref().map(time_for_people);
    match (endpoint.connectivity, seen) {
        (Connectivity::Connected, _) => text.push_str("connected"),
        (Connectivity::Disconnected, Some(seen)) => {
            let _ = write!(text, "disconnected; last heard of at {}", escape_for_display(&seen));
        }
        (Connectivity::Disconnected, None) => text.push_str("disconnected; never heard of since it enrolled"),
    }
    let _ = writeln!(text, ", agent {}", escape_for_display(&endpoint.agent_version));
    if let Some(failure) = &endpoint.last_failure {
        let at = time_for_people(&failure.at);
        let line = format!("its agent failed to connect at {at}: {} ({})", failure.message, failure.code);
        let _ = writeln!(text, "{}", escape_for_display(&line));
    }
    if endpoint.quarantine != "free" {
        let _ = writeln!(text, "network: {}", escape_for_display(&endpoint.quarantine));
    }
    if !endpoint.restart_reasons.is_empty() {
        let reasons = endpoint.restart_reasons.join(", ");
        let _ = writeln!(text, "waits for a restart: {}", escape_for_display(&reasons));
    }
    text
}

/// The manager's sentences, most urgent first.
fn advice(advice: &[String]) -> String {
    if advice.is_empty() {
        return "  nothing waits for you here\n".to_owned();
    }
    advice
        .iter()
        .enumerate()
        .map(|(number, sentence)| format!("  {}. {}\n", number + 1, escape_for_display(sentence)))
        .collect()
}

fn incident(incident: &IncidentView) -> String {
    let count = if incident.open_detections == incident.detections {
        plural(incident.detections, "detection")
    } else {
        format!("{} of {} open", incident.open_detections, plural(incident.detections, "detection"))
    };
    format!(
        "  {:16}  {}  rule {} (pattern {}), {count}\n      {}\n",
        incident.state.word(),
        escape_for_display(&time_for_people(&incident.changed_at)),
        escape_for_display(&incident.rule),
        escape_for_display(&incident.pattern),
        escape_for_display(&incident.path),
    )
}

fn task(task: &TaskView) -> String {
    let mut text = format!(
        "  {}  {:7}  {}",
        escape_for_display(&task.id),
        escape_for_display(&task.kind),
        progress::line(std::slice::from_ref(task)),
    );
    if task.dry_run {
        text.push_str(" (dry run)");
    }
    if let Some(code) = &task.code {
        let _ = write!(text, " ({})", escape_for_display(code));
    }
    text + "\n"
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn rows(why: &WhyView) -> Vec<Row> {
    let row = |section, id: &str, at: &str, state: &str, text: String| Row {
        section,
        id: id.to_owned(),
        at: at.to_owned(),
        state: state.to_owned(),
        text,
    };
    let endpoint = &why.endpoint;
    let mut rows = vec![row(
        "endpoint",
        &endpoint.id,
        endpoint.last_seen_at.as_deref().unwrap_or_default(),
        &endpoint.connectivity.to_string(),
        endpoint.host.clone(),
    )];
    rows.extend(why.queries.iter().map(|query| row("query", query.word(), "", "", String::new())));
    rows.extend(why.advice.iter().map(|sentence| row("advice", "", "", "", sentence.clone())));
    rows.extend(why.incidents.iter().map(|one| {
        row("incident", &one.id, &one.changed_at, one.state.word(), format!("{}: {}", one.rule, one.path))
    }));
    rows.extend(why.tasks.iter().map(|one| {
        let text = one.message.as_ref().map_or_else(|| one.kind.clone(), |m| format!("{}: {m}", one.kind));
        row("task", &one.id, &one.created_at, one.state.word(), text)
    }));
    rows.extend(why.events.iter().map(|one| {
        row(
            "event",
            &one.id.to_string(),
            &one.at,
            one.status.word(),
            format!("{}: {}", one.kind, one.message),
        )
    }));
    rows
}

#[cfg(test)]
mod tests {
    use tm_api::{endpoint::FailureView, status::Query};
    use tm_protocol::task::TaskState;

    use super::*;
    use crate::cmds::samples;

    fn why() -> WhyView {
        let text = |text: &str| text.to_owned();
        WhyView {
            endpoint: EndpointView {
                host: text("web\u{1b}[2J"),
                connectivity: Connectivity::Disconnected,
                last_failure: Some(FailureView {
                    code: text("dns"),
                    message: text("no such host"),
                    at: text("2026-01-02T03:04:06Z"),
                }),
                ..samples::endpoint()
            },
            queries: vec![Query::NeedsCleanup, Query::Disconnected],
            incidents: vec![IncidentView {
                rule: text("Bad\u{202e}Rule"),
                path: text("/srv/x\n"),
                ..samples::incident()
            }],
            tasks: vec![samples::task("cleanup", TaskState::Queued)],
            events: vec![samples::event(7, "ordered")],
            advice: vec![text("Clean up: `tmctl cleanup run e`")],
        }
    }

    #[test]
    fn everything_is_on_one_harmless_screen() {
        assert_eq!(
            text(&why()),
            "web\\u{1b}[2J (e), 10.0.0.7 ::1, group default\n\
             disconnected; last heard of at 2026-01-02 03:04:05Z, agent 0.1.0\n\
             its agent failed to connect at 2026-01-02 03:04:06Z: no such host (dns)\n\
             counted in `tmctl status` as needs-cleanup, disconnected\n\
             \nwhat to do next\n  1. Clean up: `tmctl cleanup run e`\n\
             \nincidents\n  awaiting-cleanup  2026-01-02 00:00:00Z  rule Bad\\u{202e}Rule (pattern p.yar), \
             2 of 3 detections open\n      /srv/x\\u{a}\n\
             \ntasks\n  t  cleanup  waiting for the endpoint\n\
             \nnewest events\n  2026-01-02 03:04:05Z  web   cleanup  in-progress  ordered\n"
        );
    }

    #[test]
    fn nothing_to_do_is_said() {
        let mut why = why();
        (why.advice, why.incidents, why.tasks, why.events) = (vec![], vec![], vec![], vec![]);
        why.endpoint.connectivity = Connectivity::Connected;
        why.endpoint.last_failure = None;
        let text = text(&why);
        assert!(text.contains("\nconnected, agent 0.1.0\n"), "{text}");
        assert!(text.ends_with("\nwhat to do next\n  nothing waits for you here\n"), "{text}");
    }

    #[test]
    fn csv_has_all_of_it_in_one_kind_of_row() {
        let sections: Vec<&str> = rows(&why()).iter().map(|row| row.section).collect();
        assert_eq!(sections, ["endpoint", "query", "query", "advice", "incident", "task", "event"]);
    }
}
