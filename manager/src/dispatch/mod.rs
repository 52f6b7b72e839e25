//! Hands out what is due, calls off what was called off, expires what waited too long, flushes what was heard, and
//! begins the next waves of patterns.
//!
//! One path serves every case: a nudge carries no data, and a pass asks the store what is due for whoever is
//! connected here. After a restart or a failure the next pass does what was left.
//!
//! **Invariant:** a task is marked as sent before it is sent, and a task that was called off is not sent.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tm_protocol::{
    ids::{EndpointId, ManagerId, TaskId},
    message::{Assign, Cancel, ToAgent},
};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    agents::{
        now_ms,
        registry::{Command, Registry},
    },
    store::{
        Store, StoreError,
        due::{DueTask, LiveTask},
    },
};

/// How often a pass runs without a nudge.
const PASS: Duration = Duration::from_secs(5);
/// How long the next pass waits at most after one that took long, whoever nudges.
const LONGEST_REST: Duration = Duration::from_millis(500);
/// How often progress is written down.
const PROGRESS: Duration = Duration::from_secs(1);
/// For how long after a revocation bulk links of the endpoint are looked for: longer than one may take between the look
/// at its certificate and its place in the registry.
const LATELY_MS: i64 = 60_000;
/// Tasks handed to one endpoint in one pass: fewer than a session's outbox takes.
const MOST: usize = 32;
/// Tasks marked as sent in one transaction.
const BATCH: usize = 500;

/// Runs until the manager ends.
pub(crate) async fn run(store: Store, registry: Registry, nudge: Arc<Notify>, ending: CancellationToken) {
    let mut told = Told::default();
    while !ending.is_cancelled() {
        let begin = Instant::now();
        match pass(&store, &registry, &mut told).await {
            // There is more than one pass takes.
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "A dispatch pass failed; the next one does its work."),
        }
        // Each agent of a fleet that comes back nudges. However much a pass takes, others get their share.
        sleep((begin.elapsed() * 2).min(LONGEST_REST)).await;
        tokio::select! {
            () = nudge.notified() => {}
            () = sleep(PASS) => {}
            () = ending.cancelled() => {}
        }
    }
}

/// Ends the sessions of those who were revoked. Whoever revoked them, here or at another manager, wrote it into the
/// store; a session that was being opened meanwhile is found by the next round.
async fn shut_out(store: &Store, registry: &Registry, manager: ManagerId) -> Result<(), StoreError> {
    for endpoint in store.revoked_since(now_ms().saturating_sub(LATELY_MS)).await? {
        registry.cut_bulk(endpoint);
    }
    for endpoint in store.revoked_sessions(manager).await? {
        if registry.shut_out(endpoint) {
            tracing::info!(%endpoint, "A revoked agent is sent away.");
        }
    }
    Ok(())
}

/// Flushes, sends revoked agents away, sees to rollouts and expires until the manager ends.
pub(crate) async fn sweep(store: Store, registry: Registry, manager: ManagerId, ending: CancellationToken) {
    let mut round: u32 = 0;
    while !ending.is_cancelled() {
        tokio::select! {
            () = sleep(PROGRESS) => {}
            () = ending.cancelled() => {}
        }
        round = round.wrapping_add(1);
        let whole = round.is_multiple_of(5) || ending.is_cancelled();
        let seen = if whole { registry.take_seen() } else { Vec::new() };
        let now = now_ms();
        let done = async {
            shut_out(&store, &registry, manager).await?;
            store.flush_seen(&seen, &registry.take_progress(), now).await?;
            store.call_off_stopped(now).await?;
            if whole {
                store.advance_rollouts(now).await?;
                store.expire_tasks(now).await?;
            }
            Ok::<_, StoreError>(())
        };
        if let Err(error) = done.await {
            tracing::warn!(%error, "A sweep failed.");
        }
    }
}

/// When agents were last told that a task is called off. They are told again, at most once a pass, until they
/// say how it ended: also after a reconnect, and a manager that restarts tells everybody anew.
#[derive(Debug, Default)]
struct Told(HashMap<TaskId, Instant>);

impl Told {
    /// Whether it is time to tell (again).
    fn is_due(&self, task: TaskId, now: Instant) -> bool {
        self.0.get(&task).is_none_or(|at| now.duration_since(*at) >= PASS)
    }

    /// Forgets what is no longer called off or has ended.
    fn keep(&mut self, live: &[LiveTask]) {
        let cancelled: HashSet<TaskId> =
            live.iter().filter(|task| task.is_cancelled).map(|task| task.task).collect();
        self.0.retain(|task, _| cancelled.contains(task));
    }
}

/// `true` if there is more to hand out at once.
async fn pass(store: &Store, registry: &Registry, told: &mut Told) -> Result<bool, StoreError> {
    let live = store.live_tasks(now_ms()).await?;
    let connected = registry.connected_among(live.iter().map(|task| task.endpoint));
    told.keep(&live);
    let clock = Instant::now();
    let mut due: Vec<LiveTask> = Vec::new();
    let mut each: HashMap<EndpointId, usize> = HashMap::new();
    let mut has_more = false;
    for live in live.into_iter().filter(|live| connected.contains(&live.endpoint)) {
        if live.is_cancelled {
            if told.is_due(live.task, clock) && call_off(registry, live.endpoint, live.task) {
                told.0.insert(live.task, clock);
            }
        } else if !registry.was_sent(live.endpoint, live.task) {
            let count = each.entry(live.endpoint).or_default();
            if *count < MOST {
                due.push(live);
            } else {
                has_more = true;
            }
            *count += 1;
        }
    }
    let mut has_sent = false;
    for part in due.chunks(BATCH) {
        let now = now_ms();
        let mut kept = Vec::new();
        for due in store.claim(part, now).await? {
            let (endpoint, task, is_fresh) = (due.endpoint, due.task, due.is_fresh);
            if registry.assign(endpoint, task, assign(due, now)) {
                has_sent = true;
            } else if is_fresh {
                kept.push((endpoint, task));
            }
        }
        if !kept.is_empty() {
            store.unclaim(&kept, now).await?;
        }
    }
    Ok(has_more && has_sent)
}

/// Tells an agent that a task is called off. `false` if it must be tried again.
fn call_off(registry: &Registry, endpoint: EndpointId, task: TaskId) -> bool {
    let Some((outbox, _)) = registry.standing(endpoint) else { return false };
    outbox.try_send(Command::Send(Box::new(Cancel { task }.into()))).is_ok()
}

/// The order as it goes over the wire: times become what is left of them.
fn assign(due: DueTask, now_ms: i64) -> ToAgent {
    let left = |until: i64| u64::try_from(until.saturating_sub(now_ms)).unwrap_or(0);
    // A task that its agent had accepted before is begun again whatever it waited meanwhile. One that was sent,
    // not answered and has expired is sent to be answered, and not to be begun.
    let expires_in_ms = if due.is_accepted { left(due.expires_ms).max(1000) } else { left(due.expires_ms) };
    Assign {
        task: due.task,
        endpoint: due.endpoint,
        spec: due.spec,
        expires_in_ms,
        deadline_ms: u64::try_from(due.deadline_ms).unwrap_or(0),
        issuer: due.issuer,
        reason: due.reason,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use tm_protocol::task::{ScanLimits, ScanOptions, ScanSpec, TaskSpec, TaskState};
    use tokio::sync::mpsc;
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        endpoints::tests::put,
        tasks::{Order, Recipient},
        tests::scratch,
    };

    const HOUR_MS: i64 = 3_600_000;

    struct Lab {
        store: Store,
        registry: Registry,
        endpoint: EndpointId,
        told: Told,
        _folder: tempfile::TempDir,
    }

    impl Lab {
        async fn start() -> Self {
            let (store, folder) = scratch().await;
            let endpoint = put(&store, 1, "web-07", &[], true).await;
            let registry = Registry::new(Arc::default());
            Self { store, registry, endpoint, told: Told::default(), _folder: folder }
        }

        /// Orders so many scans that are to be begun until `expires_in_ms` after now.
        async fn order(&self, count: usize, expires_in_ms: i64) -> Vec<TaskId> {
            let limits = ScanLimits::default();
            let spec = TaskSpec::Scan(ScanSpec {
                paths: vec![],
                patterns: vec![],
                limits,
                options: ScanOptions::default(),
            });
            let order =
                Order { spec: &spec, issuer: "root", reason: "", expires_in_ms, deadline_ms: HOUR_MS };
            let tasks: Vec<TaskId> = (0..count).map(|_| TaskId::new(Uuid::now_v7())).collect();
            let recipients = tasks
                .iter()
                .map(|task| Recipient {
                    task: *task,
                    endpoint: self.endpoint,
                    host: "web-07".to_owned(),
                    is_unsupported: false,
                })
                .collect();
            self.store.create_tasks(&order, recipients, now_ms()).await.unwrap();
            tasks
        }

        async fn pass(&mut self) -> bool {
            pass(&self.store, &self.registry, &mut self.told).await.unwrap()
        }
    }

    /// What went out: `+` for an order with the seconds that are left to begin it, `-` for a call to end one.
    fn heard(outbox: &mut mpsc::Receiver<Command>) -> Vec<(char, TaskId, u64)> {
        let mut heard = Vec::new();
        while let Ok(command) = outbox.try_recv() {
            match command {
                Command::Send(message) => {
                    if let ToAgent::Assign(assign) = &*message {
                        heard.push(('+', assign.task, assign.expires_in_ms.div_ceil(1000)));
                    } else if let ToAgent::Cancel(cancel) = &*message {
                        heard.push(('-', cancel.task, 0));
                    } else {
                        panic!("{message:?}");
                    }
                }
                Command::AreYouThere(_) | Command::GiveWay | Command::ShutOut => {}
            }
        }
        heard
    }

    #[tokio::test]
    async fn an_order_goes_out_once_a_session_and_a_cancel_until_it_is_answered() {
        let mut lab = Lab::start().await;
        let task = lab.order(1, HOUR_MS).await[0];
        lab.pass().await;
        let mut outbox = lab.registry.enter(lab.endpoint, 1, 7);
        lab.pass().await;
        lab.pass().await;
        assert_eq!(heard(&mut outbox), [('+', task, 3600)]);
        // A reconnect: it is sent again, whether or not the agent has it.
        let mut outbox = lab.registry.enter(lab.endpoint, 2, 7);
        lab.pass().await;
        assert_eq!(heard(&mut outbox), [('+', task, 3600)]);

        lab.store.cancel_task(task, "root", now_ms()).await.unwrap();
        lab.pass().await;
        lab.pass().await;
        assert_eq!(heard(&mut outbox), [('-', task, 0)], "once a while");
        // Not answered: after a reconnect it is told again, and the order is not.
        let mut outbox = lab.registry.enter(lab.endpoint, 3, 7);
        let earlier = Instant::now().checked_sub(PASS).expect("the machine runs for more than five seconds");
        lab.told.0.insert(task, earlier);
        lab.pass().await;
        assert_eq!(heard(&mut outbox), [('-', task, 0)]);
        assert_eq!(lab.store.task(task).await.unwrap().unwrap().state, TaskState::Queued);
    }

    #[tokio::test]
    async fn who_cannot_be_reached_has_not_been_sent_anything() {
        let mut lab = Lab::start().await;
        // More than one outbox takes. The session reads nothing for a while.
        let tasks = lab.order(100, HOUR_MS).await;
        let mut outbox = lab.registry.enter(lab.endpoint, 1, 7);
        while lab.pass().await {}
        let held = heard(&mut outbox);
        assert!((MOST..100).contains(&held.len()), "{}", held.len());
        let unsent: Vec<TaskId> =
            tasks.iter().filter(|task| !held.iter().any(|(_, sent, _)| sent == *task)).copied().collect();
        lab.registry.leave(lab.endpoint, 1);
        lab.store.cancel_task(unsent[0], "root", now_ms()).await.unwrap();
        let row = lab.store.task(unsent[0]).await.unwrap().unwrap();
        assert_eq!(row.state, TaskState::Cancelled, "it never left");
        lab.store.cancel_task(held[0].1, "root", now_ms()).await.unwrap();
        let row = lab.store.task(held[0].1).await.unwrap().unwrap();
        assert_eq!(row.state, TaskState::Queued, "it may have arrived");

        // A session that reads gets all the others, each once.
        let mut outbox = lab.registry.enter(lab.endpoint, 2, 7);
        let mut all = Vec::new();
        for _ in 0..10 {
            lab.pass().await;
            all.extend(heard(&mut outbox));
        }
        let orders: Vec<TaskId> = all.iter().filter(|(c, ..)| *c == '+').map(|(_, task, _)| *task).collect();
        let distinct: HashSet<TaskId> = orders.iter().copied().collect();
        assert_eq!((orders.len(), distinct.len()), (98, 98));
        assert!(!distinct.contains(&unsent[0]) && !distinct.contains(&held[0].1));
        assert!(all.contains(&('-', held[0].1, 0)));
    }

    #[tokio::test]
    async fn an_order_that_expired_unanswered_is_sent_to_be_answered_and_not_to_be_begun() {
        let mut lab = Lab::start().await;
        let task = lab.order(1, 50).await[0];
        let mut outbox = lab.registry.enter(lab.endpoint, 1, 7);
        lab.pass().await;
        assert_eq!(heard(&mut outbox).len(), 1);
        while lab.store.task(task).await.unwrap().unwrap().expires_ms >= now_ms() {
            tokio::task::yield_now().await;
        }
        let mut outbox = lab.registry.enter(lab.endpoint, 2, 7);
        lab.pass().await;
        assert_eq!(heard(&mut outbox), [('+', task, 0)]);
        // One that was never sent and has expired is not sent any more.
        let unsent = lab.order(1, 1).await[0];
        while lab.store.task(unsent).await.unwrap().unwrap().expires_ms >= now_ms() {
            tokio::task::yield_now().await;
        }
        lab.pass().await;
        assert_eq!(heard(&mut outbox), []);
    }
}
