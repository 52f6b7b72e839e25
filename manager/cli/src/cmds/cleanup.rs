//! `tmctl cleanup`: orders it, and with `--wait` stays until every task has ended.

use tm_api::task;
use tokio::time::Instant;

use crate::{
    cli::{Cleanup, RunCleanup},
    client::Client,
    cmds::{confirm, ordered},
    failure::{Exit, Failure},
    output::Output,
};

pub(crate) async fn run(command: Cleanup, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Cleanup::Run(args) => order(*args, client, out).await,
    }
}

async fn order(args: RunCleanup, client: &Client, out: &Output) -> Result<Exit, Failure> {
    ordered::check(&args.terms)?;
    confirm::ask(&args, client, confirm::person()).await?;
    let until = Instant::now() + args.terms.patience();
    let waits = args.terms.waits();
    let tasks = ordered::send(client, &["cleanups"], &body(args)).await?;
    ordered::finish(tasks, waits.then_some(until), client, out).await
}

fn body(args: RunCleanup) -> task::RunCleanup {
    task::RunCleanup {
        to: args.to.into_targets(),
        detections: args.detections,
        terms: args.terms.into_terms(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use clap::Parser as _;
    use serde_json::json;
    use tm_api::{
        status::Query,
        task::{TaskResult, TaskView},
    };
    use tm_protocol::{
        report::{ItemVerdict, Tally},
        task::TaskState,
    };

    use super::*;
    use crate::{
        cli::{Cli, Command},
        cmds::samples,
        output::Format,
        testing::Scripted,
    };

    #[test]
    fn the_order_says_exactly_what_was_typed() {
        let args = ["tmctl", "cleanup", "run", "web", "--group", "g", "--query", "unresolved", "--dry-run"];
        let args =
            args.into_iter().chain(["--detection", "ABCDEF01", "--expires", "2h", "--reason", "case 1"]);
        let Command::Cleanup(Cleanup::Run(args)) = Cli::try_parse_from(args).unwrap().command else {
            panic!("another command")
        };
        let order = body(*args);
        assert_eq!(order.to.targets, ["web"]);
        assert_eq!(order.to.group.as_deref(), Some("g"));
        assert_eq!(order.to.query, Some(Query::Unresolved));
        assert_eq!(order.detections, ["abcdef01"]);
        assert_eq!((order.terms.expires_in_s, order.terms.deadline_s), (Some(7200), Some(3600)));
        assert!(order.terms.dry_run && !order.terms.when_connected);
        assert_eq!(order.terms.reason, "case 1");
    }

    fn parse(more: &[&str]) -> Cleanup {
        let args = ["tmctl", "cleanup", "run"].into_iter().chain(more.iter().copied());
        let Command::Cleanup(command) = Cli::try_parse_from(args).unwrap().command else {
            panic!("another command")
        };
        command
    }

    fn ended(state: TaskState, tally: Tally) -> TaskView {
        let mut task = samples::task("cleanup", state);
        task.result = Some(TaskResult::Treatment(tally));
        task.code = (state == TaskState::Failed).then(|| "incomplete".to_owned());
        task
    }

    /// A manager that carries a cleanup of one file out in two rounds of questions, away for one of them.
    async fn manager(end: TaskView, verdict: ItemVerdict) -> Scripted {
        let rounds = AtomicUsize::new(0);
        Scripted::start(move |asked| {
            Some(match asked.line.as_str() {
                "POST /v1/cleanups" => (200, json!([samples::task("cleanup", TaskState::Queued)])),
                "GET /v1/tasks/t" => match rounds.fetch_add(1, Ordering::Relaxed) {
                    0 => (200, json!(samples::task("cleanup", TaskState::Running))),
                    1 => return None,
                    _ => (200, json!(end)),
                },
                "GET /v1/tasks/t/items?after=0" => {
                    let failure = (verdict == ItemVerdict::Refused).then_some("critical-file: it is needed");
                    (200, json!({"items": [samples::item("/srv/x", verdict, failure)]}))
                }
                other => (500, json!({"code": "internal", "message": other})),
            })
        })
        .await
    }

    #[tokio::test]
    async fn a_cleanup_is_ordered_once_and_its_exit_code_is_its_outcome() {
        let tally = |done, refused| Tally { done, refused, bytes: 1024, ..Tally::default() };
        for (end, verdict, code, receipt) in [
            (ended(TaskState::Done, tally(1, 0)), ItemVerdict::Vaulted, 0, "web (e): 1 vaulted, 1.0 KiB\n"),
            (
                ended(TaskState::Failed, tally(0, 1)),
                ItemVerdict::Refused,
                3,
                "web (e): 0 vaulted, 1 refused (critical-file)\n  \
                 refused: /srv/x: it is needed (critical-file)\n",
            ),
            (
                ended(TaskState::Cancelled, tally(1, 0)),
                ItemVerdict::Vaulted,
                1,
                "web (e): cancelled; 1 vaulted, 1.0 KiB\n",
            ),
        ] {
            let manager = manager(end, verdict).await;
            let out = Output::kept(Format::Table);
            let exit = run(parse(&["web", "--wait"]), &manager.client, &out).await.unwrap();
            assert_eq!(exit.code(), code);
            let text = out.text_kept();
            assert!(text.ends_with(&format!("\n\n{receipt}")), "{text}");
            let orders = manager.lines().iter().filter(|line| line.starts_with("POST")).count();
            assert_eq!(orders, 1, "{:?}", manager.lines());
        }
    }

    #[tokio::test]
    async fn a_dry_run_waits_and_says_so_in_the_order() {
        let manager = manager(
            ended(TaskState::Done, Tally { dry_run: true, done: 1, ..Tally::default() }),
            ItemVerdict::WouldVault,
        )
        .await;
        let out = Output::kept(Format::Json);
        let exit = run(parse(&["--group", "g", "--dry-run"]), &manager.client, &out).await.unwrap();
        assert_eq!(exit, Exit::Done);
        assert_eq!(manager.asked()[0].body["terms"]["dry_run"], true);
        let report: serde_json::Value = serde_json::from_str(&out.text_kept()).unwrap();
        assert_eq!(report["outcome"], "done");
        assert_eq!(report["tasks"][0]["items"][0]["verdict"], "would-vault");
    }

    #[tokio::test]
    async fn what_needs_a_yes_or_contradicts_itself_is_not_ordered() {
        let manager = manager(ended(TaskState::Done, Tally::default()), ItemVerdict::Gone).await;
        let out = Output::kept(Format::Table);
        let failure = run(parse(&["web", "--timeout", "5s"]), &manager.client, &out).await.unwrap_err();
        assert_eq!(failure.exit().code(), 2);
        assert!(manager.lines().is_empty());
    }

    #[tokio::test]
    async fn without_wait_the_tasks_are_printed_at_once() {
        let manager = manager(ended(TaskState::Done, Tally::default()), ItemVerdict::Gone).await;
        let out = Output::kept(Format::Csv);
        assert_eq!(run(parse(&["web"]), &manager.client, &out).await.unwrap(), Exit::Done);
        assert_eq!(manager.lines(), ["POST /v1/cleanups"]);
        assert!(out.text_kept().contains("\nt,cleanup,web,e,queued,"), "{}", out.text_kept());
    }
}
