//! What a scan came to: the verdict over all its tasks, what was detected, and a receipt for each endpoint.

use std::fmt::Write as _;

use serde::Serialize;
use tm_api::task::{DetectionView, ReceiptView, ScanResult, TaskView};
use tm_protocol::{report::Verdict, task::TaskState, text::escape_for_display};

use crate::{
    cmds::quote,
    failure::{Exit, Failure},
    output::{Column, Format, Output, bytes, plural, say, table, target_word},
};

/// A task with what it detected.
#[derive(Debug, Serialize)]
pub(super) struct Scanned {
    #[serde(flatten)]
    pub(super) task: TaskView,
    pub(super) detections: Vec<DetectionView>,
}

/// The verdict over all tasks. What comes first in this list wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// Something was detected, whatever else happened.
    Detected,
    /// A task failed or was cancelled.
    Failed,
    /// An agent or the manager would not do it.
    Refused,
    /// A task expired, or was not waited for any longer.
    TimedOut,
    /// Not everything could be looked at.
    Incomplete,
    /// Everything was looked at and nothing matched.
    Clean,
}

impl Outcome {
    pub(super) const fn exit(self) -> Exit {
        match self {
            Self::Detected => Exit::Detected,
            Self::Failed => Exit::Failed,
            Self::Refused => Exit::Refused,
            Self::TimedOut => Exit::TimedOut,
            Self::Incomplete => Exit::Incomplete,
            Self::Clean => Exit::Done,
        }
    }
}

/// What one task came to, as far as it alone tells.
pub(super) fn outcome_of(task: &TaskView) -> Outcome {
    one(task, detections_of(task).unwrap_or(0))
}

/// What the tasks came to, together. No task at all is nothing that was looked at.
pub(super) fn outcome(scanned: &[Scanned]) -> Outcome {
    let found = |scanned: &Scanned| {
        u64::try_from(scanned.detections.len())
            .unwrap_or(u64::MAX)
            .max(detections_of(&scanned.task).unwrap_or(0))
    };
    scanned.iter().map(|scanned| one(&scanned.task, found(scanned))).min().unwrap_or(Outcome::Failed)
}

fn one(task: &TaskView, detections: u64) -> Outcome {
    if detections > 0 {
        return Outcome::Detected;
    }
    match task.state {
        TaskState::Queued | TaskState::Delivered | TaskState::Running | TaskState::Expired => {
            Outcome::TimedOut
        }
        TaskState::Failed | TaskState::Cancelled => Outcome::Failed,
        TaskState::Refused => Outcome::Refused,
        TaskState::Done => match task.scan().map(|result| result.verdict) {
            Some(Verdict::Clean) => Outcome::Clean,
            Some(Verdict::Incomplete) => Outcome::Incomplete,
            Some(Verdict::Detected) => Outcome::Detected,
            // Without a receipt nothing says that anything was looked at.
            None => Outcome::Failed,
        },
    }
}

/// What a scan may say of what it looked at: one that was called off or did not succeed says `clean` of nothing,
/// whatever it had seen by then.
pub(super) fn verdict(task: &TaskView) -> Option<Verdict> {
    let verdict = task.scan()?.verdict;
    let is_whole = task.state == TaskState::Done || verdict != Verdict::Clean;
    Some(if is_whole { verdict } else { Verdict::Incomplete })
}

/// How much a task has detected, as far as is known.
pub(super) fn detections_of(task: &TaskView) -> Option<u64> {
    match (task.scan(), &task.progress) {
        (Some(result), _) => Some(result.detections),
        (None, Some(progress)) => Some(progress.detections),
        (None, None) => None,
    }
}

/// Names from the outermost container inwards, for people; JSON has them apart.
pub(super) fn member(names: &[String]) -> String {
    names.join(" → ")
}

struct Row<'a> {
    task: &'a TaskView,
    detection: &'a DetectionView,
}

fn columns<'a>() -> [Column<Row<'a>>; 11] {
    [
        Column::narrow("host", |r| r.task.host.clone()),
        Column::narrow("path", |r| r.detection.path.clone()),
        Column::narrow("member", |r| member(&r.detection.member)),
        Column::narrow("rule", |r| r.detection.rule.clone()),
        Column::narrow("pattern", |r| r.detection.pattern.clone()),
        Column::wide("sha256", |r| r.detection.sha256.clone()),
        Column::wide("size", |r| r.detection.size.to_string()),
        Column::wide_time("found_at", |r| r.detection.found_at.clone()),
        Column::wide("endpoint", |r| r.task.endpoint.clone()),
        Column::wide("task", |r| r.task.id.clone()),
        Column::wide("path_b64", |r| r.detection.path_b64.clone()),
    ]
}

/// Prints detections and receipts. CSV holds one kind of row, the detections; there the receipts are talk.
///
/// # Errors
/// If they cannot be written.
pub(super) fn print(scanned: &[Scanned], out: &Output) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        verdict: Outcome,
        tasks: &'a [Scanned],
    }
    let rows: Vec<Row<'_>> = scanned
        .iter()
        .flat_map(|Scanned { task, detections }| {
            detections.iter().map(move |detection| Row { task, detection })
        })
        .collect();
    let receipts: String = scanned.iter().map(|scanned| text(&scanned.task)).collect();
    match out.format() {
        Format::Table if rows.is_empty() => out.text(&receipts)?,
        Format::Table => {
            let width = crate::output::width(&std::io::stdout());
            out.text(&(table(&rows, &columns(), width) + "\n" + &receipts))?;
        }
        Format::Json => out.json(&Report { verdict: outcome(scanned), tasks: scanned })?,
        Format::Csv => {
            out.csv(&rows, &columns())?;
            say(&receipts);
        }
    }
    let detected: Vec<&TaskView> =
        scanned.iter().filter(|one| !one.detections.is_empty()).map(|one| &one.task).collect();
    if !detected.is_empty() {
        say(&format!("hint: to remove what was detected: {}\n", cleanup_command(&detected)));
    }
    Ok(())
}

/// The command that removes what these scans detected.
pub(super) fn cleanup_command(tasks: &[&TaskView]) -> String {
    /// More targets than fit a line are chosen instead.
    const NAMED: usize = 5;
    if tasks.len() > NAMED {
        return "tmctl cleanup run --query needs-cleanup".to_owned();
    }
    let mut targets: Vec<String> = Vec::new();
    for task in tasks {
        let target = target_word(&task.host, &task.endpoint);
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    format!("tmctl cleanup run {}", targets.join(" "))
}

/// The receipt of one task: a line, and one for each gap that is known by name.
pub(super) fn text(task: &TaskView) -> String {
    if quote::is_one(task) {
        return quote::text(task);
    }
    let mut text = format!("{} ({}): ", escape_for_display(&task.host), escape_for_display(&task.endpoint));
    match (task.scan(), task.state) {
        (Some(result), state) => {
            if state != TaskState::Done {
                let _ = write!(text, "{state}{}; ", why(task));
            }
            receipt(&mut text, result, verdict(task).unwrap_or(result.verdict));
            if let Some(quoted) = &task.quoted {
                let _ = writeln!(text, "  quoted before: {}", quote::sum(&quoted.quote));
            }
        }
        (None, TaskState::Queued | TaskState::Delivered | TaskState::Running) => {
            let _ = writeln!(
                text,
                "not ended yet ({}); follow it: tmctl task follow {}",
                task.state,
                escape_for_display(&task.id)
            );
        }
        (None, state) => {
            let _ = writeln!(text, "{state}{}", why(task));
        }
    }
    text
}

/// Why a task did not succeed.
pub(super) fn why(task: &TaskView) -> String {
    [&task.code, &task.message]
        .into_iter()
        .flatten()
        .map(|part| format!(": {}", escape_for_display(part)))
        .collect()
}

/// What is known of a receipt's signature.
pub(super) fn signed(receipt: &ReceiptView) -> String {
    match (receipt.verified, &receipt.problem) {
        (true, _) => "signed by the endpoint's key, verified".to_owned(),
        (false, None) => "not verified".to_owned(),
        (false, Some(problem)) => format!("not verified: {problem}"),
    }
}

fn receipt(text: &mut String, result: &ScanResult, verdict: Verdict) {
    let _ = writeln!(
        text,
        "{verdict}: {}, {}, {}, {:.1} s, {:.1} s of CPU",
        plural(result.detections, "detection"),
        plural(result.files, "file"),
        bytes(result.bytes),
        result.elapsed_s,
        result.cpu_s,
    );
    if result.known > 0 {
        let _ = writeln!(text, "  {} of them known clean, unchanged since they were read", result.known);
    }
    if let Some(receipt) = result.receipt.as_deref().filter(|receipt| !receipt.verified) {
        let _ = writeln!(text, "  receipt: {}", escape_for_display(&signed(receipt)));
    }
    if !result.skipped.is_empty() {
        let reasons: Vec<String> = result
            .skipped
            .iter()
            .map(|(reason, count)| format!("{} {count}", escape_for_display(reason)))
            .collect();
        let _ = writeln!(text, "  skipped: {}", reasons.join(", "));
    }
    for skipped in &result.skipped_paths {
        let inside = if skipped.member.is_empty() {
            String::new()
        } else {
            format!(" → {}", escape_for_display(&member(&skipped.member)))
        };
        let (reason, path) = (escape_for_display(&skipped.reason), escape_for_display(&skipped.path));
        let _ = writeln!(text, "    {reason}: {path}{inside}");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tm_api::task::{ProgressView, SkippedView};

    use super::*;

    fn task(state: TaskState, verdict: Option<Verdict>) -> Scanned {
        let result = verdict.map(|verdict| ScanResult {
            verdict,
            files: 3,
            known: 0,
            bytes: 2048,
            detections: u64::from(verdict == Verdict::Detected),
            skipped: BTreeMap::new(),
            skipped_paths: Vec::new(),
            elapsed_s: 0.25,
            cpu_s: 0.5,
            receipt: None,
        });
        let mut task = crate::cmds::samples::task("scan", state);
        task.result = result.map(tm_api::task::TaskResult::Scan);
        Scanned { task, detections: Vec::new() }
    }

    #[test]
    fn the_exit_code_is_the_worst_news_in_a_fixed_order() {
        use TaskState as S;
        let clean = || task(S::Done, Some(Verdict::Clean));
        let incomplete = || task(S::Done, Some(Verdict::Incomplete));
        let detected = || task(S::Done, Some(Verdict::Detected));
        let mut failed_late = task(S::Failed, None);
        failed_late.task.progress = Some(ProgressView { detections: 1, ..ProgressView::default() });
        for (scanned, code) in [
            (vec![], 1),
            (vec![clean()], 0),
            (vec![clean(), incomplete()], 11),
            (vec![incomplete(), task(S::Expired, None)], 4),
            (vec![incomplete(), task(S::Running, None)], 4),
            (vec![task(S::Expired, None), task(S::Refused, None)], 3),
            (vec![task(S::Refused, None), task(S::Cancelled, None)], 1),
            (vec![task(S::Failed, None), clean()], 1),
            (vec![task(S::Done, None)], 1),
            (vec![task(S::Failed, None), incomplete(), detected(), clean()], 10),
            (vec![failed_late, clean()], 10),
        ] {
            let states: Vec<_> = scanned.iter().map(|s| s.task.state).collect();
            assert_eq!(outcome(&scanned).exit().code(), code, "{states:?}");
        }
    }

    #[test]
    fn a_receipt_names_what_was_not_seen_and_is_harmless() {
        let mut scanned = task(TaskState::Done, Some(Verdict::Incomplete));
        scanned.task.host = "we\u{1b}b".into();
        let Some(tm_api::task::TaskResult::Scan(result)) = &mut scanned.task.result else { panic!("a scan") };
        result.skipped = BTreeMap::from([("encrypted".to_owned(), 1), ("symlink".to_owned(), 2)]);
        result.skipped_paths = vec![SkippedView {
            path: "/srv/a.zip".into(),
            path_b64: String::new(),
            member: vec!["b.zip".into(), "c\u{202e}".into()],
            reason: "encrypted".into(),
        }];
        assert_eq!(
            text(&scanned.task),
            "we\\u{1b}b (e): incomplete: 0 detections, 3 files, 2.0 KiB, 0.2 s, 0.5 s of CPU\n  \
             skipped: encrypted 1, symlink 2\n    encrypted: /srv/a.zip → b.zip → c\\u{202e}\n"
        );
        let mut refused = task(TaskState::Refused, None);
        refused.task.code = Some("busy".into());
        refused.task.message = Some("too much to do".into());
        assert_eq!(text(&refused.task), "web (e): refused: busy: too much to do\n");
    }

    #[test]
    fn a_scan_that_was_called_off_is_not_clean() {
        let cancelled = task(TaskState::Cancelled, Some(Verdict::Clean)).task;
        assert_eq!(verdict(&cancelled), Some(Verdict::Incomplete));
        assert_eq!(
            text(&cancelled),
            "web (e): cancelled; incomplete: 0 detections, 3 files, 2.0 KiB, 0.2 s, 0.5 s of CPU\n"
        );
        let detected = task(TaskState::Failed, Some(Verdict::Detected)).task;
        assert_eq!(verdict(&detected), Some(Verdict::Detected));
        assert_eq!(verdict(&task(TaskState::Done, Some(Verdict::Clean)).task), Some(Verdict::Clean));
    }

    #[test]
    fn the_hint_names_whom_to_clean_up_and_is_safe_to_paste() {
        let mut hostile = task(TaskState::Done, None).task;
        hostile.host = "a;reboot".into();
        let plain = task(TaskState::Done, None).task;
        assert_eq!(cleanup_command(&[&plain, &hostile, &plain]), "tmctl cleanup run web e");
        assert_eq!(cleanup_command(&[&plain; 6]), "tmctl cleanup run --query needs-cleanup");
    }

    #[test]
    fn json_holds_the_task_and_its_detections_side_by_side() {
        let value = serde_json::to_value(task(TaskState::Done, Some(Verdict::Clean))).unwrap();
        assert_eq!(value["state"], "done");
        assert_eq!(value["result"]["verdict"], "clean");
        assert_eq!(value["detections"], serde_json::json!([]));
    }
}
