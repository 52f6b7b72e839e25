//! How far tasks are, on one line that is written over.
//!
//! **Invariant:** nothing in the line comes from an endpoint but numbers.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use tm_api::task::{ProgressView, TaskView};
use tm_protocol::task::{TaskKind, TaskState};
use tokio::time::Instant;

use crate::{
    cmds::receipt,
    output::{self, bytes, plural, say},
};

/// The shortest time between two lines.
const PACE: Duration = Duration::from_millis(500);

/// One line on a terminal; nothing anywhere else.
pub(super) struct Progress {
    is_on: bool,
    shown: Option<Instant>,
}

impl Progress {
    pub(super) fn start() -> Self {
        Self { is_on: io::stderr().is_terminal(), shown: None }
    }

    pub(super) fn show(&mut self, tasks: &[TaskView], now: Instant) {
        if !self.is_on || self.shown.is_some_and(|shown| now < shown + PACE) {
            return;
        }
        self.shown = Some(now);
        // The last column stays free: some terminals go on to the next line when it is filled.
        let width = usize::from(output::width(&io::stderr()).unwrap_or(80)).saturating_sub(1);
        let line: String = line(tasks).chars().take(width).collect();
        say(&format!("\r\u{1b}[K{line}"));
    }

    fn clear(&mut self) {
        if self.shown.take().is_some() {
            say("\r\u{1b}[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The line for tasks of one order.
pub(super) fn line(tasks: &[TaskView]) -> String {
    let count = |is: fn(TaskState) -> bool| tasks.iter().filter(|task| is(task.state)).count();
    let mut parts = match tasks {
        [task] => vec![state(task).to_owned()],
        _ => {
            let ended = count(TaskState::is_final);
            let mut parts = vec![format!("{ended} of {} ended", tasks.len())];
            for (number, what) in [
                (count(|state| state == TaskState::Running), "running"),
                (count(|state| state == TaskState::Delivered), "delivered"),
                (count(|state| state == TaskState::Queued), "waiting for the endpoint"),
            ] {
                if number > 0 {
                    parts.push(format!("{number} {what}"));
                }
            }
            parts
        }
    };
    parts.extend(work(tasks));
    parts.join(", ")
}

/// A state in the words of a person who waits.
fn state(task: &TaskView) -> &'static str {
    match task.state {
        _ if task.cancelling && !task.state.is_final() => "being called off",
        TaskState::Queued => "waiting for the endpoint",
        state @ (TaskState::Delivered
        | TaskState::Running
        | TaskState::Done
        | TaskState::Failed
        | TaskState::Cancelled
        | TaskState::Expired
        | TaskState::Refused) => state.word(),
    }
}

/// What was done so far, if anything is known.
fn work(tasks: &[TaskView]) -> Option<String> {
    let mut sum: Option<ProgressView> = None;
    for task in tasks {
        let (files, size) = match (task.scan(), task.treatment(), &task.progress) {
            (Some(scan), _, _) => (scan.files, scan.bytes),
            (None, Some(tally), _) => (u64::from(tally.done), tally.bytes),
            (None, None, Some(progress)) => (progress.files, progress.bytes),
            (None, None, None) => continue,
        };
        let sum = sum.get_or_insert_default();
        sum.files = sum.files.saturating_add(files);
        sum.bytes = sum.bytes.saturating_add(size);
        sum.detections = sum.detections.saturating_add(receipt::detections_of(task).unwrap_or(0));
    }
    let sum = sum?;
    let work = format!("{}, {}", plural(sum.files, "file"), bytes(sum.bytes));
    let is_scan = tasks.iter().any(|task| task.kind == TaskKind::Scan.word());
    Some(if is_scan { format!("{work}, {}", plural(sum.detections, "detection")) } else { work })
}

#[cfg(test)]
mod tests {
    use tm_api::task::TaskResult;
    use tm_protocol::report::Tally;

    use super::*;
    use crate::cmds::samples::task;

    #[test]
    fn the_line_says_how_far_it_is_and_fits_80_columns() {
        let with = |kind: &str, state, progress: Option<(u64, u64, u64)>| {
            let mut task = task(kind, state);
            task.progress = progress.map(|(files, bytes, detections)| ProgressView {
                files,
                bytes,
                detections,
                skipped: 0,
            });
            task
        };
        let mut cancelling = with("cleanup", TaskState::Running, Some((1, 10, 0)));
        cancelling.cancelling = true;
        let mut done = with("cleanup", TaskState::Done, None);
        done.result = Some(TaskResult::Treatment(Tally { done: 2, bytes: 2048, ..Tally::default() }));
        for (tasks, text) in [
            (vec![with("scan", TaskState::Queued, None)], "waiting for the endpoint"),
            (
                vec![with("scan", TaskState::Running, Some((1234, 5 << 30, 1)))],
                "running, 1234 files, 5.0 GiB, 1 detection",
            ),
            (vec![cancelling], "being called off, 1 file, 10 B"),
            (
                vec![
                    done,
                    with("cleanup", TaskState::Running, Some((1, 0, 0))),
                    task("cleanup", TaskState::Queued),
                ],
                "1 of 3 ended, 1 running, 1 waiting for the endpoint, 3 files, 2.0 KiB",
            ),
        ] {
            assert_eq!(line(&tasks), text);
            assert!(text.len() < 80, "{text}");
        }
    }
}
