//! `tmctl scan`: orders it, and with `--wait` stays until every task has ended.

use std::{ffi::OsString, os::unix::ffi::OsStrExt as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tm_api::task::{self, TaskView};
use tm_protocol::task::ScanOptions;
use tokio::time::Instant;

use crate::{
    cli::{Scan, StartScan},
    client::Client,
    cmds::{
        ordered::{self, READING},
        quote,
        receipt::{self, Scanned},
        task::detections,
        wait::{self, PARALLEL, Patience},
    },
    failure::{Exit, Failure},
    output::Output,
};

pub(crate) async fn run(command: Scan, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Scan::Start(args) => start(*args, client, out).await,
    }
}

async fn start(args: StartScan, client: &Client, out: &Output) -> Result<Exit, Failure> {
    let patience = Patience::new(Instant::now() + args.patience());
    let (wait, dry_run) = (args.waits(), args.dry_run);
    let tasks = ordered::send(client, &["scans"], &order(args)).await?;
    if !wait {
        return ordered::print(&tasks, out);
    }
    let begun = tasks.clone();
    if dry_run {
        let ended = wait::until_ended(client, tasks, &patience);
        let ended = wait::unless_interrupted(ended, || wait::goes_on(&begun)).await?;
        return quote::print(&ended, out);
    }
    let scanned = wait::unless_interrupted(
        async {
            let ended = wait::until_ended(client, tasks, &patience).await?;
            patience.extend(READING);
            with_detections(client, ended, &patience).await
        },
        || wait::goes_on(&begun),
    )
    .await?;
    receipt::print(&scanned, out)?;
    Ok(receipt::outcome(&scanned).exit())
}

async fn with_detections(
    client: &Client,
    tasks: Vec<TaskView>,
    patience: &Patience,
) -> Result<Vec<Scanned>, Failure> {
    stream::iter(tasks)
        .map(|task| async move {
            let found = patience.ask(async || detections(client, &task.id).await).await?;
            Ok(Scanned { task, detections: found })
        })
        .buffered(PARALLEL)
        .try_collect()
        .await
}

fn order(args: StartScan) -> task::StartScan {
    task::StartScan {
        to: args.to.into_targets(),
        paths_b64: args.paths.iter().map(encoded).collect(),
        patterns: args.patterns,
        limits: args.limits.limits(),
        options: ScanOptions { dry_run: args.dry_run, ..args.options.options() },
        expires_in_s: Some(args.expires.as_secs()),
        deadline_s: Some(args.deadline.as_secs()),
        when_connected: args.when_connected,
        reason: args.reason,
    }
}

fn encoded(path: &OsString) -> String {
    STANDARD.encode(path.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use clap::Parser as _;

    use tm_protocol::task::ScanLimits;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn the_order_says_exactly_what_was_typed() {
        let args = [
            "tmctl",
            "scan",
            "start",
            "web",
            "--max-depth",
            "0",
            "--file-timeout",
            "2m",
            "--cpu",
            "10%",
            "--all-local",
            "--path",
        ];
        let args = args.map(OsString::from).into_iter().chain([OsString::from_vec(b"/\xff".to_vec())]);
        let Command::Scan(Scan::Start(args)) = Cli::try_parse_from(args).unwrap().command else {
            panic!("another command")
        };
        let order = order(*args);
        assert_eq!(order.paths_b64, ["L/8="]);
        assert_eq!((order.limits.depth, order.limits.file_ms), (0, 120_000));
        let expected = ScanOptions { all_local: true, cpu_percent: Some(10), ..ScanOptions::default() };
        assert_eq!(order.options, expected);
        assert_eq!(order.limits.ratio, ScanLimits::default().ratio);
        assert_eq!((order.expires_in_s, order.deadline_s), (Some(3600), Some(86_400)));
        assert_eq!(order.to.targets, ["web"]);
        assert!(!order.when_connected);
    }
}
