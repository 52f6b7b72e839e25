//! Carries out one task: one match over the kinds, each handed to its room.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::FutureExt as _;
use jiff::Timestamp;
use tm_patterns::Pattern;
use tm_protocol::{
    address::Address,
    ids::{EndpointId, Sha256, TaskId},
    message::{Outcome, Progress},
    report::{Failure, ItemReport, OwnedFile, VaultEntry},
    task::{PatternRef, RestoreSpec, ScanSpec},
};
use tokio::{
    sync::mpsc::{Sender, error::TrySendError},
    time::sleep,
};

use super::{
    care::Shown,
    journal::record::{Boot, Found},
    owned::Owned,
    sign::Signer,
    treat,
};
use crate::{
    connection::{Dialler, fetch, trust},
    paths::Paths,
    scan, vault,
};

/// How soon a wait notices that it is called off.
const NOTICE: Duration = Duration::from_millis(50);
/// How soon it is tried again to tell something, while what was told before is not heard.
const FULL: Duration = Duration::from_millis(10);

/// What a running task tells.
#[derive(Debug)]
pub(crate) enum Told {
    Detected {
        task: TaskId,
        found: Vec<Found>,
        /// Of their files, those that belong to packages.
        owned: Vec<OwnedFile>,
    },
    Treated(TaskId, Vec<ItemReport>),
    Progress(Progress),
    Finished(TaskId, Outcome),
    /// A part of what the vault holds.
    Vault {
        first: bool,
        items: Vec<VaultEntry>,
    },
    /// Something that the manager should know.
    Notice {
        code: &'static str,
        message: String,
        count: u64,
    },
}

/// What there is to do.
#[derive(Debug)]
pub(crate) enum Work {
    Scan(ScanSpec),
    /// Detections by key, each as this agent noted it; `None` if it never did.
    Cleanup {
        noted: Result<Vec<(Sha256, Option<Found>)>, Failure>,
        dry_run: bool,
    },
    Restore {
        spec: RestoreSpec,
        resumed: bool,
    },
}

/// What a task needs of the agent.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) paths: Paths,
    /// Who this is: a pattern may be meant for others.
    pub(crate) endpoint: EndpointId,
    /// The manager that patterns are fetched from.
    pub(crate) manager: Option<Address>,
    pub(crate) bulk: Dialler,
    /// Bounded: a task that is ahead of the link waits.
    pub(crate) tell: Sender<Told>,
    pub(crate) boot: Boot,
    pub(crate) vault: vault::Limits,
    /// The vault as the manager was last told of it.
    pub(crate) shown: Shown,
    /// Signs receipts; `None` if the endpoint's key cannot.
    pub(crate) signer: Option<Signer>,
    /// What the wall clock says.
    pub(crate) clock: fn() -> SystemTime,
}

/// Carries the task out and tells its end, whatever happens in it.
pub(crate) async fn run(task: TaskId, work: Work, context: Context, cancel: Arc<AtomicBool>) {
    let tell = context.tell.clone();
    let work = async {
        match work {
            Work::Scan(spec) => scan(task, spec, context, cancel).await,
            Work::Cleanup { noted, dry_run } => match noted {
                Ok(noted) => blocking(move || treat::cleanup(task, noted, dry_run, &context, &cancel))
                    .await
                    .unwrap_or_else(Outcome::Failed),
                Err(failure) => Outcome::Failed(failure),
            },
            Work::Restore { spec, resumed } => {
                blocking(move || treat::restore(task, &spec, resumed, &context, &cancel))
                    .await
                    .unwrap_or_else(Outcome::Failed)
            }
        }
    };
    // A fault in a task ends the task, never the agent, and is told like any other end.
    let outcome = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| Outcome::Failed(fault()));
    // It fails only when the agent is ending; the task then goes on after the next start.
    let _ = tell.send(Told::Finished(task, outcome)).await;
}

fn fault() -> Failure {
    Failure::new("internal", "the task stopped on a fault of the agent")
}

async fn scan(task: TaskId, spec: ScanSpec, context: Context, cancel: Arc<AtomicBool>) -> Outcome {
    let patterns = match patterns(&spec.patterns, &context, &cancel).await {
        Ok(patterns) => patterns,
        Err(failure) => return Outcome::Failed(failure),
    };
    let mut order = scan::Order::new(spec.paths.clone(), patterns, spec.limits);
    order.options = spec.options;
    order.seen = Some(context.paths.seen());
    order.past = Some(context.paths.costs());
    let (tell, boot, signer) = (context.tell, context.boot, context.signer);
    let started = (context.clock)();
    let work = move || {
        let mut packages = Owned::default();
        let sink = |update| {
            let told = match update {
                scan::Update::Detections(detections) => {
                    let named: Vec<_> = detections.iter().map(|(detection, _)| detection).collect();
                    let owned = packages.among(&named).unwrap_or_else(|error| {
                        let message = format!("it is not known which finds belong to packages: {error}");
                        say(&tell, Told::Notice { code: "package-unknown", message, count: 0 }, &cancel);
                        Vec::new()
                    });
                    let found = |(detection, object)| Found::new(detection, object, boot);
                    let found = detections.into_iter().map(found).collect();
                    Told::Detected { task, found, owned }
                }
                scan::Update::Progress { files, bytes, detections, skipped } => {
                    Told::Progress(Progress { task, files, bytes, detections, skipped })
                }
            };
            say(&tell, told, &cancel);
        };
        if spec.options.dry_run {
            return scan::quote(order, sink, &cancel).map(Outcome::Quoted);
        }
        let mut coverage = scan::run(order, sink, &cancel)?;
        if let Some(signer) = signer {
            let whole = !cancel.load(Ordering::Acquire);
            signer.sign(task, &spec, &mut coverage, started, whole);
        }
        Ok(Outcome::Scanned(coverage))
    };
    match blocking(work).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(failure)) | Err(failure) => Outcome::Failed(failure),
    }
}

/// Tells something of a scan as soon as it is heard. Of a scan that was called off nothing more is wanted, and it
/// must not wait for a manager that is away to come to its end.
fn say(tell: &Sender<Told>, mut told: Told, cancel: &AtomicBool) {
    loop {
        told = match tell.try_send(told) {
            Ok(()) | Err(TrySendError::Closed(_)) => return,
            Err(TrySendError::Full(back)) => back,
        };
        if cancel.load(Ordering::Acquire) {
            return;
        }
        std::thread::sleep(FULL);
    }
}

/// Patterns by digest, from the folder or from the manager.
async fn patterns(
    wanted: &[PatternRef],
    context: &Context,
    cancel: &AtomicBool,
) -> Result<Vec<Pattern>, Failure> {
    let mut patterns = Vec::new();
    let now = Timestamp::try_from((context.clock)()).unwrap_or(Timestamp::MIN);
    let judged = trust::current(&context.paths, context.manager.as_ref(), &context.bulk, now);
    let judged = tokio::select! {
        judged = judged => judged,
        () = called_off(cancel) => return Err(Failure::new("cancelled", "the task was called off")),
    };
    for (code, message) in judged.remarks {
        // It fails only when the agent is ending.
        let _ = context.tell.send(Told::Notice { code, message, count: 0 }).await;
    }
    let set = judged.set?;
    for wanted in wanted {
        trust::admit(&set, wanted, context.endpoint)?;
        let fetched = fetch::pattern(&context.paths, context.manager.as_ref(), &context.bulk, wanted);
        patterns.push(tokio::select! {
            fetched = fetched => fetched?,
            () = called_off(cancel) => return Err(Failure::new("cancelled", "the task was called off")),
        });
    }
    Ok(patterns)
}

async fn called_off(cancel: &AtomicBool) {
    while !cancel.load(Ordering::Acquire) {
        sleep(NOTICE).await;
    }
}

/// Runs what blocks, and turns a panic in it into a failure.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    let work = move || catch_unwind(AssertUnwindSafe(work));
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(_)) | Err(_) => Err(fault()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use rustls::{ClientConfig, RootCertStore};
    use tokio::sync::mpsc;
    use uuid::Uuid;

    use super::*;

    /// An agent without a manager.
    pub(in super::super) fn context(folder: &Path, tell: Sender<Told>) -> Context {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let bulk = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        Context {
            paths: Paths::new(folder.to_path_buf()),
            endpoint: EndpointId::new(Uuid::from_u128(7)),
            manager: None,
            bulk: Dialler::new(bulk, None),
            tell,
            boot: Boot(1),
            vault: vault::Limits::default(),
            shown: Shown::default(),
            signer: None,
            clock: || SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_scan_that_was_called_off_does_not_wait_to_be_heard() {
        let (tell, mut told) = mpsc::channel(1);
        let task = TaskId::new(Uuid::from_u128(1));
        let cancel = AtomicBool::new(false);
        say(&tell, Told::Detected { task, found: vec![], owned: vec![] }, &cancel);
        std::thread::scope(|scope| {
            let waiting =
                scope.spawn(|| say(&tell, Told::Detected { task, found: vec![], owned: vec![] }, &cancel));
            std::thread::sleep(FULL * 5);
            assert!(!waiting.is_finished(), "the control: it waits for room");
            cancel.store(true, Ordering::Release);
            waiting.join().unwrap();
        });
        assert!(told.try_recv().is_ok() && told.try_recv().is_err());
    }
}
