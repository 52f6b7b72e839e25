//! `tmctl cleanup`: orders it, and with `--wait` stays until every task has ended.

use tm_api::task::{self, TaskView};
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
    confirm::ask(&args, client).await?;
    let until = Instant::now() + args.terms.patience();
    let waits = args.terms.waits();
    let tasks: Vec<TaskView> = client.post(&["cleanups"], &body(args)).await?;
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
    use clap::Parser as _;
    use tm_api::status::Query;

    use super::*;
    use crate::cli::{Cli, Command};

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
}
