//! Carries out one task: one match over the kinds, each handed to its room.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::AtomicBool},
};

use futures_util::FutureExt as _;
use rustls::ClientConfig;
use tm_protocol::{
    address::Address,
    ids::TaskId,
    message::{Outcome, Progress},
    report::{Detection, Failure},
    task::{ScanSpec, TaskSpec},
};
use tokio::sync::mpsc::Sender;

use crate::{connection::fetch, paths::Paths, scan};

/// What a running task tells.
#[derive(Debug)]
pub(crate) enum Told {
    Detections(TaskId, Vec<Detection>),
    Progress(Progress),
    Finished(TaskId, Outcome),
}

/// What a task needs of the agent.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) paths: Paths,
    /// The manager that patterns are fetched from.
    pub(crate) manager: Address,
    pub(crate) bulk: Arc<ClientConfig>,
    /// Bounded: a task that is ahead of the link waits.
    pub(crate) tell: Sender<Told>,
}

/// Carries the task out and tells its end, whatever happens in it.
pub(crate) async fn run(task: TaskId, spec: TaskSpec, context: Context, cancel: Arc<AtomicBool>) {
    let tell = context.tell.clone();
    let work = async {
        match spec {
            TaskSpec::Scan(spec) => scan(task, spec, context, cancel).await,
            TaskSpec::Cleanup(_) | TaskSpec::Restore(_) => {
                Outcome::Failed(Failure::new("unsupported", "this agent cannot do that"))
            }
        }
    };
    // A fault in a task ends the task, never the agent, and is told like any other end.
    let outcome = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
        Outcome::Failed(Failure::new("internal", "the task stopped on a fault of the agent"))
    });
    // It fails only when the agent is ending; the manager then hands the task out again.
    let _ = tell.send(Told::Finished(task, outcome)).await;
}

async fn scan(task: TaskId, spec: ScanSpec, context: Context, cancel: Arc<AtomicBool>) -> Outcome {
    let mut patterns = Vec::new();
    for wanted in &spec.patterns {
        match fetch::pattern(&context.paths, &context.manager, &context.bulk, wanted).await {
            Ok(pattern) => patterns.push(pattern),
            Err(failure) => return Outcome::Failed(failure),
        }
    }
    let order = scan::Order::new(spec.paths, patterns, spec.limits);
    let tell = context.tell;
    let work = move || {
        let sink = |update| {
            let told = match update {
                scan::Update::Detections(detections) => Told::Detections(task, detections),
                scan::Update::Progress { files, bytes, detections, skipped } => {
                    Told::Progress(Progress { task, files, bytes, detections, skipped })
                }
            };
            let _ = tell.blocking_send(told);
        };
        catch_unwind(AssertUnwindSafe(|| scan::run(order, sink, &cancel)))
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(Ok(coverage))) => Outcome::Scanned(coverage),
        Ok(Ok(Err(failure))) => Outcome::Failed(failure),
        Ok(Err(_)) | Err(_) => {
            Outcome::Failed(Failure::new("internal", "the scan stopped on a fault of the agent"))
        }
    }
}
