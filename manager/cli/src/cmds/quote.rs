//! What a scan would look at and what that is likely to cost.

use std::fmt::Write as _;

use serde::Serialize;
use tm_api::task::{QuoteView, TaskView};
use tm_protocol::{
    task::{TaskKind, TaskState},
    text::escape_for_display,
};

use crate::{
    cmds::{receipt::why, task::TASKS},
    failure::{Exit, Failure},
    output::{Format, Output, bytes, plural},
};

/// Whether it is a scan that was asked what it would cost.
pub(super) fn is_one(task: &TaskView) -> bool {
    task.dry_run && task.kind == TaskKind::Scan.word()
}

/// How a command ends that waited for it.
pub(super) fn exit(task: &TaskView) -> Exit {
    match task.state {
        TaskState::Done if task.quote().is_some() => Exit::Done,
        TaskState::Done | TaskState::Failed | TaskState::Cancelled => Exit::Failed,
        TaskState::Refused => Exit::Refused,
        TaskState::Queued | TaskState::Delivered | TaskState::Running | TaskState::Expired => Exit::TimedOut,
    }
}

/// Prints what each endpoint says, and ends as the first task that did not end well.
///
/// # Errors
/// If it cannot be written.
pub(super) fn print(tasks: &[TaskView], out: &Output) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        tasks: &'a [TaskView],
    }
    match out.format() {
        Format::Table => out.text(&tasks.iter().map(text).collect::<String>())?,
        Format::Json => out.json(&Report { tasks })?,
        Format::Csv => out.csv(tasks, &TASKS)?,
    }
    Ok(tasks.iter().map(exit).find(|exit| *exit != Exit::Done).unwrap_or(Exit::Done))
}

/// The quote of one task, for people.
pub(super) fn text(task: &TaskView) -> String {
    let mut text = format!("{} ({}): ", escape_for_display(&task.host), escape_for_display(&task.endpoint));
    match (task.quote(), task.state.is_final()) {
        (Some(quote), _) => {
            let _ = writeln!(text, "would look at {}", sum(quote));
            if quote.known > 0 {
                let known = bytes(quote.known_bytes);
                let _ = writeln!(text, "  {} of them ({known}) known clean and not read again", quote.known);
            }
            if !quote.skipped.is_empty() {
                let reason =
                    |(reason, count): (&String, &u64)| format!("{} {count}", escape_for_display(reason));
                let reasons: Vec<String> = quote.skipped.iter().map(reason).collect();
                let _ = writeln!(text, "  skipped: {}", reasons.join(", "));
            }
            if let Some(estimate) = quote.estimate.filter(|estimate| !estimate.same_patterns) {
                let _ = writeln!(
                    text,
                    "  estimated from {} with other patterns",
                    plural(estimate.runs.into(), "scan")
                );
            }
        }
        (None, true) => {
            let _ = writeln!(text, "{}{}", task.state, why(task));
        }
        (None, false) => {
            let id = escape_for_display(&task.id);
            let _ = writeln!(text, "not ended yet ({}); follow it: tmctl task follow {id}", task.state);
        }
    }
    text
}

/// Files, bytes and cost, in a line.
pub(super) fn sum(quote: &QuoteView) -> String {
    let cost = quote.estimate.map_or_else(
        || "no past scan to estimate from".to_owned(),
        |estimate| format!("about {:.1} s, {:.1} s of CPU", estimate.elapsed_s, estimate.cpu_s),
    );
    format!("{}, {}, {cost}", plural(quote.files, "file"), bytes(quote.bytes))
}

/// The same in a table's cell.
pub(super) fn in_short(quote: &QuoteView) -> String {
    match quote.estimate {
        Some(estimate) => format!("quote: {:.1} s of CPU", estimate.cpu_s),
        None => format!("quote: {}", bytes(quote.bytes)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tm_api::task::{EstimateView, TaskResult};

    use super::*;
    use crate::cmds::samples;

    fn quote(estimate: Option<EstimateView>) -> QuoteView {
        QuoteView {
            files: 30,
            bytes: 4096,
            known: 10,
            known_bytes: 1024,
            skipped: BTreeMap::from([("remote".to_owned(), 1)]),
            estimate,
            elapsed_s: 0.1,
            cpu_s: 0.1,
        }
    }

    fn task(state: TaskState, result: Option<QuoteView>) -> TaskView {
        let mut task = samples::task("scan", state);
        task.dry_run = true;
        task.result = result.map(TaskResult::Quote);
        task
    }

    #[test]
    fn a_quote_says_what_there_is_and_what_it_costs() {
        let estimate = EstimateView { cpu_s: 2.5, elapsed_s: 25.0, runs: 1, same_patterns: false };
        assert_eq!(
            text(&task(TaskState::Done, Some(quote(Some(estimate))))),
            "web (e): would look at 30 files, 4.0 KiB, about 25.0 s, 2.5 s of CPU\n  \
             10 of them (1.0 KiB) known clean and not read again\n  skipped: remote 1\n  \
             estimated from 1 scan with other patterns\n"
        );
        let nothing = text(&task(TaskState::Done, Some(quote(None))));
        assert!(nothing.contains("no past scan to estimate from"), "{nothing}");
        let mut failed = task(TaskState::Failed, None);
        failed.code = Some("path-refused".into());
        assert_eq!(text(&failed), "web (e): failed: path-refused\n");
        assert!(text(&task(TaskState::Queued, None)).contains("not ended yet"));
    }

    #[test]
    fn the_exit_code_is_no_verdict() {
        for (state, result, code) in [
            (TaskState::Done, Some(quote(None)), 0),
            (TaskState::Done, None, 1),
            (TaskState::Failed, None, 1),
            (TaskState::Refused, None, 3),
            (TaskState::Expired, None, 4),
            (TaskState::Running, None, 4),
        ] {
            assert_eq!(exit(&task(state, result)).code(), code, "{state}");
        }
    }

    #[test]
    fn a_quote_keeps_its_kind_in_json() {
        let view = task(TaskState::Done, Some(quote(None)));
        let back: TaskView = serde_json::from_value(serde_json::json!(view)).unwrap();
        assert_eq!(back.quote(), view.quote());
        assert!(back.scan().is_none() && back.treatment().is_none());
    }
}
