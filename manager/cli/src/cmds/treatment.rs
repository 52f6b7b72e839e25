//! What a cleanup or a restore came to: the outcome over all its tasks, what came of each file, and a receipt
//! for each endpoint.

use std::{collections::BTreeMap, fmt::Write as _, io};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;
use tm_api::task::{ItemView, TaskView};
use tm_protocol::{
    report::{ItemVerdict, Tally},
    task::{TaskKind, TaskState},
    text::escape_for_display,
};

use crate::{
    client::Client,
    cmds::{
        receipt::why,
        wait::{PARALLEL, Patience},
    },
    failure::{Exit, Failure},
    output::{Column, Format, Output, bytes, say, table, width},
};

/// A task with what came of each of its files.
#[derive(Debug, Serialize)]
pub(super) struct Treated {
    #[serde(flatten)]
    pub(super) task: TaskView,
    pub(super) items: Vec<ItemView>,
}

/// The outcome over all tasks. What comes first in this list wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// A task failed or was cancelled.
    Failed,
    /// An agent or the manager would not do it, or not all of it.
    Refused,
    /// A task expired, or was not waited for any longer.
    TimedOut,
    /// Everything asked for was done or needed no doing.
    Done,
}

impl Outcome {
    pub(super) const fn exit(self) -> Exit {
        match self {
            Self::Failed => Exit::Failed,
            Self::Refused => Exit::Refused,
            Self::TimedOut => Exit::TimedOut,
            Self::Done => Exit::Done,
        }
    }
}

/// What the tasks came to, together. No task at all is nothing that was done.
pub(super) fn outcome<'a>(tasks: impl IntoIterator<Item = &'a TaskView>) -> Outcome {
    tasks.into_iter().map(one).min().unwrap_or(Outcome::Failed)
}

fn one(task: &TaskView) -> Outcome {
    match task.state {
        TaskState::Queued | TaskState::Delivered | TaskState::Running | TaskState::Expired => {
            Outcome::TimedOut
        }
        TaskState::Cancelled => Outcome::Failed,
        TaskState::Failed => match task.treatment() {
            Some(tally) if tally.refused > 0 && tally.failed == 0 && tally.left == 0 => Outcome::Refused,
            Some(_) | None => Outcome::Failed,
        },
        TaskState::Refused => Outcome::Refused,
        TaskState::Done => Outcome::Done,
    }
}

/// Reads what came of each file of every task.
///
/// # Errors
/// If the manager refuses, or is out of reach when patience ends.
pub(super) async fn with_items(
    client: &Client,
    tasks: Vec<TaskView>,
    patience: &Patience,
) -> Result<Vec<Treated>, Failure> {
    stream::iter(tasks)
        .map(|task| async move {
            let found = match task.state {
                // Its agent has not begun: nothing came of any file.
                TaskState::Queued | TaskState::Expired => Vec::new(),
                TaskState::Delivered
                | TaskState::Running
                | TaskState::Done
                | TaskState::Failed
                | TaskState::Cancelled
                | TaskState::Refused => patience.ask(async || items(client, &task.id).await).await?,
            };
            Ok(Treated { task, items: found })
        })
        .buffered(PARALLEL)
        .try_collect()
        .await
}

/// Every item of a task.
///
/// # Errors
/// If the manager refuses or cannot be asked.
pub(super) async fn items(client: &Client, task: &str) -> Result<Vec<ItemView>, Failure> {
    let mut found = Vec::new();
    client.pages(&["tasks", task, "items"], "items", 0, |page| found.extend(page)).await?;
    Ok(found)
}

/// How the items of one task look.
pub(super) const ITEMS: [Column<ItemView>; 13] = [
    Column::narrow("path", |i| i.path.clone()),
    Column::narrow("verdict", |i| i.verdict.to_string()),
    Column::id("vault", |i| i.vault.clone().unwrap_or_default()),
    Column::narrow("note", codes),
    Column::wide("code", |i| i.failure.as_ref().map(|f| f.code.clone()).unwrap_or_default()),
    Column::wide("message", |i| i.failure.as_ref().map(|f| f.message.clone()).unwrap_or_default()),
    Column::wide("notes", |i| i.notes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
    Column::wide("size", |i| i.size.to_string()),
    Column::wide("sha256", |i| i.sha256.clone().unwrap_or_default()),
    Column::wide("endpoint", |i| i.endpoint.clone()),
    Column::wide("task", |i| i.task.clone()),
    Column::wide("detections", |i| i.detections.join(" ")),
    Column::wide("path_b64", |i| i.path_b64.clone()),
];

/// Why an item was not done, and what to know besides: the stable words.
fn codes(item: &ItemView) -> String {
    item.failure.iter().chain(&item.notes).map(|one| one.code.as_str()).collect::<Vec<_>>().join(" ")
}

struct Row<'a> {
    task: &'a TaskView,
    item: &'a ItemView,
}

fn columns<'a>() -> [Column<Row<'a>>; 14] {
    [
        Column::narrow("host", |r| r.task.host.clone()),
        Column::narrow("path", |r| r.item.path.clone()),
        Column::narrow("verdict", |r| r.item.verdict.to_string()),
        Column::id("vault", |r| r.item.vault.clone().unwrap_or_default()),
        Column::narrow("note", |r| codes(r.item)),
        Column::wide("code", |r| r.item.failure.as_ref().map(|f| f.code.clone()).unwrap_or_default()),
        Column::wide("message", |r| r.item.failure.as_ref().map(|f| f.message.clone()).unwrap_or_default()),
        Column::wide("notes", |r| {
            r.item.notes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        }),
        Column::wide("size", |r| r.item.size.to_string()),
        Column::wide("sha256", |r| r.item.sha256.clone().unwrap_or_default()),
        Column::wide("endpoint", |r| r.task.endpoint.clone()),
        Column::wide("task", |r| r.task.id.clone()),
        Column::wide("detections", |r| r.item.detections.join(" ")),
        Column::wide("path_b64", |r| r.item.path_b64.clone()),
    ]
}

/// Prints what came of each file, and receipts. CSV holds one kind of row, the files; there the receipts are
/// talk.
///
/// # Errors
/// If they cannot be written.
pub(super) fn print(treated: &[Treated], out: &Output) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        outcome: Outcome,
        tasks: &'a [Treated],
    }
    let rows: Vec<Row<'_>> = treated
        .iter()
        .flat_map(|Treated { task, items }| items.iter().map(move |item| Row { task, item }))
        .collect();
    let receipts: String = treated.iter().map(|one| text(&one.task, &one.items)).collect();
    match out.format() {
        Format::Table if rows.is_empty() => out.text(&receipts),
        Format::Table => out.text(&(table(&rows, &columns(), width(&io::stdout())) + "\n" + &receipts)),
        Format::Json => {
            out.json(&Report { outcome: outcome(treated.iter().map(|one| &one.task)), tasks: treated })
        }
        Format::Csv => {
            out.csv(&rows, &columns())?;
            say(&receipts);
            Ok(())
        }
    }
}

/// The receipt of one task: a line, and one for each thing that a person should know of a file.
pub(super) fn text(task: &TaskView, items: &[ItemView]) -> String {
    let mut text = format!("{} ({}): ", escape_for_display(&task.host), escape_for_display(&task.endpoint));
    match (task.treatment(), task.state) {
        (Some(tally), state) => {
            text.push_str(&ending(task, state));
            text.push_str(&sum(task, tally, items));
            text.push('\n');
        }
        (None, TaskState::Queued | TaskState::Delivered | TaskState::Running) => {
            let _ = writeln!(
                text,
                "not ended yet ({}); follow it: tmctl task follow {}",
                task.state,
                escape_for_display(&task.id)
            );
        }
        (None, TaskState::Done) => text.push_str("done\n"),
        (
            None,
            state @ (TaskState::Failed | TaskState::Cancelled | TaskState::Expired | TaskState::Refused),
        ) => {
            let _ = writeln!(text, "{state}{}", why(task));
        }
    }
    text.push_str(&details(task, items));
    text
}

/// What has to be said before the numbers.
fn ending(task: &TaskView, state: TaskState) -> String {
    match state {
        TaskState::Done => String::new(),
        TaskState::Failed if task.code.as_deref() == Some(INCOMPLETE) => String::new(),
        TaskState::Failed
        | TaskState::Cancelled
        | TaskState::Expired
        | TaskState::Refused
        | TaskState::Queued
        | TaskState::Delivered
        | TaskState::Running => format!("{state}{}; ", why(task)),
    }
}

/// The code of a task that left something undone; its numbers say the same.
const INCOMPLETE: &str = "incomplete";

fn sum(task: &TaskView, tally: &Tally, items: &[ItemView]) -> String {
    let is_restore = task.kind == TaskKind::Restore.word();
    let (done, would) = if is_restore { ("restored", "be restored") } else { ("vaulted", "be vaulted") };
    let dry = |would: &str, word: &str| {
        if tally.dry_run { format!("would {would}") } else { word.to_owned() }
    };
    let mut parts = vec![format!("{} {}", tally.done, dry(would, done))];
    let codes_of = |verdict| {
        let mut codes: BTreeMap<&str, u64> = BTreeMap::new();
        for item in items.iter().filter(|item| item.verdict == verdict) {
            if let Some(failure) = &item.failure {
                *codes.entry(&failure.code).or_default() += 1;
            }
        }
        let many = codes.len() > 1;
        let words: Vec<String> = codes
            .into_iter()
            .map(|(code, count)| {
                let code = escape_for_display(code);
                if many { format!("{code} {count}") } else { code }
            })
            .collect();
        if words.is_empty() { String::new() } else { format!(" ({})", words.join(", ")) }
    };
    if tally.gone > 0 {
        parts.push(format!("{} already gone", tally.gone));
    }
    if tally.refused > 0 {
        let (word, codes) = (dry("be refused", "refused"), codes_of(ItemVerdict::Refused));
        parts.push(format!("{} {word}{codes}", tally.refused));
    }
    if tally.failed > 0 {
        let (word, codes) = (dry("fail", "failed"), codes_of(ItemVerdict::Failed));
        parts.push(format!("{} {word}{codes}", tally.failed));
    }
    if tally.left > 0 {
        parts.push(format!("{} not reached", tally.left));
    }
    if tally.done > 0 {
        parts.push(bytes(tally.bytes));
    }
    let parts = parts.join(", ");
    if tally.dry_run { format!("dry run: {parts}; nothing was changed") } else { parts }
}

/// A line for each refusal, failure and note, up to what a person reads.
fn details(task: &TaskView, items: &[ItemView]) -> String {
    /// More lines help nobody; the command shows all.
    const SHOWN: usize = 20;
    let mut lines = Vec::new();
    for item in items {
        let path = escape_for_display(&item.path);
        if let Some(failure) = &item.failure {
            let why = escape_for_display(&failure.to_string());
            lines.push(format!("  {}: {path}: {why}\n", item.verdict));
        }
        for note in &item.notes {
            lines.push(format!("  note: {path}: {}\n", escape_for_display(&note.to_string())));
        }
    }
    let more = lines.len().saturating_sub(SHOWN);
    lines.truncate(SHOWN);
    if more > 0 {
        lines.push(format!("  and {more} more: tmctl task items {}\n", escape_for_display(&task.id)));
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use tm_api::task::TaskResult;

    use super::*;
    use crate::cmds::samples::{failure_of, item, task};

    fn with(state: TaskState, tally: Option<Tally>) -> TaskView {
        let mut task = task("cleanup", state);
        task.result = tally.map(TaskResult::Treatment);
        task
    }

    #[test]
    fn the_exit_code_is_the_worst_news_in_a_fixed_order() {
        use TaskState as S;
        let tally =
            |done, refused, failed, left| Some(Tally { done, refused, failed, left, ..Tally::default() });
        let done = || with(S::Done, tally(3, 0, 0, 0));
        for (tasks, code) in [
            (vec![], 1),
            (vec![done()], 0),
            (vec![with(S::Done, Some(Tally { dry_run: true, refused: 1, ..Tally::default() }))], 0),
            (vec![with(S::Failed, tally(3, 1, 0, 0))], 3),
            (vec![with(S::Failed, tally(0, 2, 0, 0)), done()], 3),
            (vec![with(S::Failed, tally(0, 2, 1, 0))], 1),
            (vec![with(S::Failed, tally(0, 2, 0, 1))], 1),
            (vec![with(S::Failed, None)], 1),
            (vec![with(S::Cancelled, tally(1, 0, 0, 2)), done()], 1),
            (vec![with(S::Expired, None), done()], 4),
            (vec![with(S::Running, None)], 4),
            (vec![with(S::Refused, None), with(S::Expired, None)], 3),
            (vec![with(S::Refused, None), with(S::Failed, None), done()], 1),
        ] {
            let states: Vec<_> = tasks.iter().map(|task| (task.state, task.treatment().copied())).collect();
            assert_eq!(outcome(&tasks).exit().code(), code, "{states:?}");
        }
    }

    #[test]
    fn a_receipt_says_what_was_done_and_what_was_not_and_is_harmless() {
        let mut refused =
            item("/bin/sh", ItemVerdict::Refused, Some("critical-file: dash \u{1b}[2J is needed"));
        refused.notes.push(failure_of("other-links: /bin/dash is the same file"));
        let tally = Tally { done: 3, refused: 1, bytes: 2048, ..Tally::default() };
        let mut incomplete = with(TaskState::Failed, Some(tally));
        incomplete.code = Some(INCOMPLETE.into());
        incomplete.message = Some("1 of 4 items was refused or failed".into());
        assert_eq!(
            text(&incomplete, &[item("/x", ItemVerdict::Vaulted, None), refused]),
            "web (e): 3 vaulted, 1 refused (critical-file), 2.0 KiB\n  \
             refused: /bin/sh: dash \\u{1b}[2J is needed (critical-file)\n  \
             note: /bin/sh: /bin/dash is the same file (other-links)\n"
        );
    }

    #[test]
    fn every_ending_has_its_words() {
        use TaskState as S;
        let mut deadline = with(S::Failed, Some(Tally { done: 1, left: 2, bytes: 5, ..Tally::default() }));
        deadline.code = Some("deadline".into());
        deadline.message = Some("it took longer than allowed".into());
        let mut unsupported = with(S::Refused, None);
        unsupported.code = Some("unsupported".into());
        unsupported.message = Some("the agent is too old".into());
        let mut restore = with(S::Done, Some(Tally { done: 1, ..Tally::default() }));
        restore.kind = "restore".into();
        let mut dry = restore.clone();
        dry.result = Some(TaskResult::Treatment(Tally {
            dry_run: true,
            done: 2,
            refused: 2,
            failed: 1,
            ..Tally::default()
        }));
        for (task, words) in [
            (with(S::Done, Some(Tally::default())), "0 vaulted"),
            (with(S::Done, Some(Tally { gone: 2, ..Tally::default() })), "0 vaulted, 2 already gone"),
            (
                with(S::Cancelled, Some(Tally { done: 2, left: 3, bytes: 9, ..Tally::default() })),
                "cancelled; 2 vaulted, 3 not reached, 9 B",
            ),
            (deadline, "failed: deadline: it took longer than allowed; 1 vaulted, 2 not reached, 5 B"),
            (unsupported, "refused: unsupported: the agent is too old"),
            (with(S::Expired, None), "expired"),
            (with(S::Running, None), "not ended yet (running); follow it: tmctl task follow t"),
            (restore, "1 restored, 0 B"),
            (
                dry,
                "dry run: 2 would be restored, 2 would be refused (exists 1, no-parent 1), 1 would fail, 0 B; \
                 nothing was changed",
            ),
        ] {
            let items = [
                item("/a", ItemVerdict::Refused, Some("exists: x")),
                item("/b", ItemVerdict::Refused, Some("no-parent: x")),
            ];
            assert_eq!(text(&task, &items).lines().next().unwrap(), format!("web (e): {words}"));
        }
    }

    #[test]
    fn a_long_story_is_cut_and_the_rest_is_named() {
        let items: Vec<ItemView> =
            (0..25).map(|_| item("/a", ItemVerdict::Failed, Some("io: disk full"))).collect();
        let text = text(&with(TaskState::Failed, None), &items);
        assert_eq!(text.lines().count(), 22);
        assert!(text.ends_with("  and 5 more: tmctl task items t\n"), "{text}");
    }

    #[test]
    fn the_table_fits_80_columns_and_keeps_ids_whole() {
        const ID: &str = "018f3c1e-6b5a-7000-8000-0123456789ab";
        let mut vaulted = item("/srv/data/www/uploads/invoice.exe", ItemVerdict::Vaulted, None);
        vaulted.vault = Some(ID.into());
        let refused = item("/usr/bin/ls\u{202e}", ItemVerdict::Refused, Some("likely-false-positive: x"));
        let task = with(TaskState::Done, None);
        let rows = [Row { task: &task, item: &vaulted }, Row { task: &task, item: &refused }];
        let text = table(&rows, &columns(), Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains(ID) && !text.contains('\u{202e}'), "{text}");
    }

    #[test]
    fn json_holds_the_task_and_its_items_side_by_side() {
        let task = with(TaskState::Done, Some(Tally { done: 1, ..Tally::default() }));
        let value = serde_json::to_value(Treated { task, items: vec![item("/a", ItemVerdict::Gone, None)] });
        let value = value.unwrap();
        assert_eq!(value["state"], "done");
        assert_eq!(value["result"]["done"], 1);
        assert_eq!(value["items"][0]["verdict"], "gone");
    }
}
