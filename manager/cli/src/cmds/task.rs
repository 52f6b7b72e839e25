//! `tmctl task`, and how a task and a detection look as rows.

use std::io;

use serde::Serialize;
use tm_api::task::{DetectionView, ItemView, TaskQuery, TaskView};
use tm_protocol::{
    report::{Tally, Verdict},
    task::{ScanOptions, TaskKind},
};

use crate::{
    cli::Task,
    client::Client,
    cmds::{cancel, follow, quote, receipt, treatment},
    failure::{Exit, Failure},
    output::{Column, Format, Output, card, say, table, width},
};

/// How a task looks.
pub(crate) const TASKS: [Column<TaskView>; 21] = [
    Column::id("id", |t| t.id.clone()),
    Column::narrow("kind", |t| t.kind.clone()),
    Column::narrow("host", |t| t.host.clone()),
    Column::wide("endpoint", |t| t.endpoint.clone()),
    Column::narrow("state", |t| t.state.to_string()),
    Column::narrow("result", result),
    Column::time("created_at", |t| t.created_at.clone()),
    Column::wide("verdict", |t| receipt::verdict(t).map(|v| v.to_string()).unwrap_or_default()),
    Column::wide("detections", |t| receipt::detections_of(t).map(|n| n.to_string()).unwrap_or_default()),
    Column::wide("files", |t| t.scan().map(|r| r.files.to_string()).unwrap_or_default()),
    Column::wide("receipt", |t| {
        t.scan().and_then(|r| r.receipt.as_deref()).map(receipt::signed).unwrap_or_default()
    }),
    Column::wide("issuer", |t| t.issuer.clone()),
    Column::wide_time("started_at", |t| t.started_at.clone().unwrap_or_default()),
    Column::wide_time("finished_at", |t| t.finished_at.clone().unwrap_or_default()),
    Column::wide_time("expires_at", |t| t.expires_at.clone()),
    Column::wide("code", |t| t.code.clone().unwrap_or_default()),
    Column::wide("message", |t| t.message.clone().unwrap_or_default()),
    Column::wide("reason", |t| t.reason.clone()),
    Column::wide("terms", terms),
    Column::wide("paths", |t| t.paths.join("\n")),
    Column::wide("options", |t| t.options.as_ref().map(options).unwrap_or_default()),
];

const DETECTIONS: [Column<DetectionView>; 13] = [
    Column::narrow("key", |d| d.key.chars().take(KEY).collect()),
    Column::narrow("path", |d| d.path.clone()),
    Column::narrow("member", |d| receipt::member(&d.member)),
    Column::narrow("rule", |d| d.rule.clone()),
    Column::narrow("pattern", |d| d.pattern.clone()),
    Column::wide("sha256", |d| d.sha256.clone()),
    Column::narrow("size", |d| d.size.to_string()),
    Column::time("found_at", |d| d.found_at.clone()),
    Column::wide("incident", |d| d.incident.clone().unwrap_or_default()),
    Column::wide("endpoint", |d| d.endpoint.clone()),
    Column::wide("task", |d| d.task.clone()),
    Column::wide("path_b64", |d| d.path_b64.clone()),
    Column::wide("pattern_sha256", |d| d.pattern_sha256.clone()),
];

/// Digits of a detection's key that tell it from others; an order takes a start of it.
const KEY: usize = 12;

pub(crate) async fn run(command: Task, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Task::List { endpoint, state, limit } => {
            let query = TaskQuery { endpoint, state, limit: Some(limit) };
            let tasks: Vec<TaskView> = client.get(&["tasks"], &query).await?;
            out.list(&tasks, &TASKS, "no tasks")?;
            if u32::try_from(tasks.len()).is_ok_and(|count| count >= limit) {
                say(&format!("these are the newest {limit}; --limit shows more, up to 1000\n"));
            }
        }
        Task::Show { task } => show(&task, client, out).await?,
        Task::Follow { task, timeout } => return follow::run(&task, timeout, client, out).await,
        Task::Cancel { tasks, wait, timeout } => {
            return cancel::run(&tasks, wait.then_some(timeout), client, out).await;
        }
        Task::Detections { task } => {
            let found = detections(client, &task).await?;
            out.list(&found, &DETECTIONS, "no detections")?;
        }
        Task::Items { task } => {
            let found = treatment::items(client, &task).await?;
            out.list(&found, &treatment::ITEMS, "no items")?;
        }
    }
    Ok(Exit::Done)
}

async fn show(id: &str, client: &Client, out: &Output) -> Result<(), Failure> {
    /// A cleanup or restore has its items beside it, as `--wait` prints them.
    #[derive(Serialize)]
    struct Shown<'a> {
        #[serde(flatten)]
        task: &'a TaskView,
        #[serde(skip_serializing_if = "Option::is_none")]
        items: Option<&'a [ItemView]>,
    }
    let task: TaskView = client.get(&["tasks", id], &()).await?;
    let items = if is_treatment(&task) { Some(treatment::items(client, id).await?) } else { None };
    match out.format() {
        Format::Table => out.text(&text(&task, items.as_deref(), width(&io::stdout()))),
        Format::Json => out.json(&Shown { task: &task, items: items.as_deref() }),
        Format::Csv => out.one(&task, &TASKS),
    }
}

/// Everything about one task, for people.
fn text(task: &TaskView, items: Option<&[ItemView]>, width: Option<u16>) -> String {
    let card = card(task, &TASKS, width);
    match items {
        None => format!("{card}\n{}", receipt::text(task)),
        Some([]) => format!("{card}\n{}", treatment::text(task, &[])),
        Some(items) => {
            let items_table = table(items, &treatment::ITEMS, width);
            format!("{card}\n{items_table}\n{}", treatment::text(task, items))
        }
    }
}

/// Whether it has items instead of detections.
pub(super) fn is_treatment(task: &TaskView) -> bool {
    task.kind == TaskKind::Cleanup.word() || task.kind == TaskKind::Restore.word()
}

/// What came of it, in a word or two.
fn result(task: &TaskView) -> String {
    let dry = if task.dry_run { " (dry run)" } else { "" };
    if let Some(quote) = task.quote() {
        return quote::in_short(quote);
    }
    match (receipt::verdict(task), task.treatment()) {
        (Some(Verdict::Detected), _) => {
            format!("{} {}", Verdict::Detected, receipt::detections_of(task).unwrap_or(0))
        }
        (Some(verdict @ (Verdict::Clean | Verdict::Incomplete)), _) => verdict.to_string(),
        (None, Some(tally)) => format!("{}{dry}", tally_in_short(tally)),
        (None, None) => task.code.clone().unwrap_or_default(),
    }
}

/// `3 done, 1 refused`.
fn tally_in_short(tally: &Tally) -> String {
    let parts = [
        (tally.done, "done"),
        (tally.gone, "gone"),
        (tally.refused, "refused"),
        (tally.failed, "failed"),
        (tally.left, "left"),
    ];
    let parts: Vec<String> = parts
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    if parts.is_empty() { "nothing to do".to_owned() } else { parts.join(", ") }
}

/// What sets the order apart from others of its kind.
fn terms(task: &TaskView) -> String {
    let words = [(task.dry_run, "dry-run"), (task.cancelling, "being-called-off")];
    words.into_iter().filter(|(is, _)| *is).map(|(_, word)| word).collect::<Vec<_>>().join(" ")
}

/// What a scan looks at besides paths, and how it goes about it.
fn options(options: &ScanOptions) -> String {
    let ScanOptions { all_local, cpu_percent, quick, full, processes, fresh, dry_run: _ } = options;
    let words = [
        (*quick, "quick: what runs, what starts by itself, where things are dropped"),
        (*full, "full: every local file system"),
        (*all_local && !*full, "other local file systems, too"),
        (*processes, "the memory of processes, too"),
        (*fresh, "also what is known clean"),
    ];
    let share = cpu_percent.map(|percent| format!("at most {percent} % of one core"));
    let words = words.into_iter().filter(|(is, _)| *is).map(|(_, word)| word.to_owned());
    words.chain(share).collect::<Vec<_>>().join("; ")
}

/// Every detection of a task.
///
/// # Errors
/// If the manager refuses or cannot be asked.
pub(crate) async fn detections(client: &Client, task: &str) -> Result<Vec<DetectionView>, Failure> {
    let mut found = Vec::new();
    client.pages(&["tasks", task, "detections"], "detections", 0, |page| found.extend(page)).await?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use tm_api::task::TaskResult;
    use tm_protocol::{report::ItemVerdict, task::TaskState};

    use super::*;
    use crate::cmds::samples::{self, item};

    #[test]
    fn a_result_is_told_in_a_few_words() {
        let with = |tally| {
            let mut task = samples::task("cleanup", TaskState::Done);
            task.result = Some(TaskResult::Treatment(tally));
            task
        };
        let mut dry = with(Tally { done: 1, gone: 2, ..Tally::default() });
        dry.dry_run = true;
        let mut refused = samples::task("cleanup", TaskState::Refused);
        refused.code = Some("unsupported".into());
        for (task, text) in [
            (
                with(Tally { done: 3, refused: 1, failed: 2, left: 4, ..Tally::default() }),
                "3 done, 1 refused, 2 failed, 4 left",
            ),
            (with(Tally::default()), "nothing to do"),
            (dry, "1 done, 2 gone (dry run)"),
            (refused, "unsupported"),
            (samples::task("scan", TaskState::Queued), ""),
        ] {
            assert_eq!(result(&task), text);
        }
    }

    #[test]
    fn the_options_of_a_scan_are_told_in_words() {
        let mut all = ScanOptions { quick: true, processes: true, fresh: true, ..ScanOptions::default() };
        (all.all_local, all.cpu_percent) = (true, Some(10));
        for (given, text) in [
            (ScanOptions::default(), ""),
            (
                ScanOptions { full: true, all_local: true, ..ScanOptions::default() },
                "full: every local file system",
            ),
            (
                all,
                "quick: what runs, what starts by itself, where things are dropped; other local file systems, too; \
                 the memory of processes, too; also what is known clean; at most 10 % of one core",
            ),
        ] {
            assert_eq!(options(&given), text);
        }
        let mut task = samples::task("scan", TaskState::Done);
        (task.paths, task.options) = (vec!["/srv".into(), "/home".into()], Some(all));
        let text = text(&task, None, None);
        assert!(
            text.contains("/srv") && text.contains("/home") && text.contains("10 % of one core"),
            "{text}"
        );
    }

    #[test]
    fn a_treatment_is_shown_with_its_items() {
        let mut task = samples::task("cleanup", TaskState::Running);
        task.cancelling = true;
        let text = text(&task, Some(&[item("/srv/x", ItemVerdict::Vaulted, None)]), None);
        for part in
            ["state       running", "terms       being-called-off", "/srv/x", "vaulted", "not ended yet"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("created at  2026-01-02 03:04:05Z"), "{text}");
    }
}
