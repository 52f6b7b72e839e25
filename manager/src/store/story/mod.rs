//! Tests of the way from a find to its end: reports come in as an agent sends them, orders as an administrator
//! gives them, and what is stored is read as it is shown.

mod chance;
mod fleet;
mod incidents;
mod looks;
mod tasks;
mod waves;

use sqlx::{AssertSqlSafe, Row as _};
use tm_api::{
    event::{EventKind, EventStatus, IncidentState},
    status::Query,
};
use tm_protocol::{
    ids::{EndpointId, Sha256, TaskId, VaultId},
    message::{Outcome, Report, ReportBody},
    quote::Quote,
    report::{Coverage, Detection, Failure, ItemReport, ItemVerdict, PathBytes, Tally, VaultEntry},
    task::{TaskKind, TaskSpec, TaskState},
};
use uuid::Uuid;

use super::{
    Store,
    cancels::Cancelled,
    cleanups::{CleanupRefusal, CleanupWish},
    due::LiveTask,
    endpoints::{EndpointRow, Filter, tests::put},
    events::{EventFilter, EventRow},
    incidents::{IncidentFilter, IncidentRow},
    restores::{RestoreRefusal, RestoreWish},
    specs::tests::scan as scan_spec,
    tasks::{Order, Recipient, ResultRow, TaskRow},
    tests::scratch,
    vault::VaultFilter,
};

const HOUR_MS: i64 = 3_600_000;

/// A store with one endpoint, and its agent.
struct Lab {
    store: Store,
    endpoint: EndpointId,
    sequence: std::cell::Cell<u64>,
    _folder: tempfile::TempDir,
}

fn find(path: &str, rule: &str) -> Detection {
    Detection {
        path: path.as_bytes().into(),
        member: Vec::new(),
        pattern: Sha256::of(b"pattern"),
        rule: rule.to_owned(),
        sha256: Sha256::of(path.as_bytes()),
        size: 10,
    }
}

fn item(find: &Detection, verdict: ItemVerdict, vault: Option<u128>, code: Option<&str>) -> ItemReport {
    ItemReport {
        detections: vec![find.key()],
        vault: vault.map(|n| VaultId::new(Uuid::from_u128(n))),
        path: find.path.clone(),
        sha256: Some(find.sha256),
        size: find.size,
        verdict,
        failure: code.map(|code| Failure::new(code, "a reason")),
        notes: Vec::new(),
    }
}

fn tally(items: &[ItemReport], left: u32) -> Tally {
    let mut tally = Tally { left, ..Tally::default() };
    for item in items {
        tally.count(item);
    }
    tally
}

fn vault_id(n: u128) -> VaultId {
    VaultId::new(Uuid::from_u128(n))
}

impl Lab {
    async fn start() -> Self {
        let (store, folder) = scratch().await;
        let endpoint = put(&store, 1, "web-07", &[], true).await;
        Self { store, endpoint, sequence: std::cell::Cell::new(0), _folder: folder }
    }

    async fn say_as(&self, endpoint: EndpointId, sequence: u64, body: ReportBody, now_ms: i64) {
        let report = Report { sequence, at_ms: now_ms, body };
        self.store.record_reports(&[(endpoint, report)], now_ms).await.unwrap();
    }

    async fn say(&self, body: ReportBody, now_ms: i64) {
        self.sequence.set(self.sequence.get() + 1);
        self.say_as(self.endpoint, self.sequence.get(), body, now_ms).await;
    }

    async fn order_scan(&self, now_ms: i64) -> TaskId {
        self.order_to_scan(&scan_spec(), now_ms).await
    }

    async fn order_to_scan(&self, spec: &TaskSpec, now_ms: i64) -> TaskId {
        let order = Order { spec, issuer: "root", reason: "", expires_in_ms: HOUR_MS, deadline_ms: HOUR_MS };
        let task = TaskId::new(Uuid::now_v7());
        let recipient =
            Recipient { task, endpoint: self.endpoint, host: "web-07".to_owned(), is_unsupported: false };
        self.store.create_tasks(&order, vec![recipient], now_ms).await.unwrap();
        task
    }

    async fn begin(&self, task: TaskId, now_ms: i64) {
        self.say(ReportBody::Accepted { task }, now_ms).await;
        self.say(ReportBody::Started { task }, now_ms).await;
    }

    async fn end(&self, task: TaskId, outcome: Outcome, now_ms: i64) {
        self.say(ReportBody::Finished { task, outcome }, now_ms).await;
    }

    /// A whole scan that finds this.
    async fn scan(&self, found: &[Detection], now_ms: i64) -> TaskId {
        let task = self.order_scan(now_ms).await;
        self.begin(task, now_ms).await;
        for part in found.chunks(500) {
            self.say(ReportBody::Detections { task, detections: part.to_vec() }, now_ms).await;
        }
        let coverage = Coverage { files: 9, detections: found.len() as u64, ..Coverage::default() };
        self.end(task, Outcome::Scanned(coverage), now_ms).await;
        task
    }

    async fn me(&self) -> EndpointRow {
        self.store.endpoint(self.endpoint).await.unwrap().unwrap()
    }

    async fn cleanup(&self, keys: &[String], dry_run: bool) -> Result<Vec<TaskRow>, CleanupRefusal> {
        let endpoints = [(self.me().await, true)];
        self.cleanup_of(&endpoints, keys, dry_run, 1000).await
    }

    async fn cleanup_of(
        &self,
        endpoints: &[(EndpointRow, bool)],
        keys: &[String],
        dry_run: bool,
        now_ms: i64,
    ) -> Result<Vec<TaskRow>, CleanupRefusal> {
        let wish = CleanupWish {
            endpoints,
            keys,
            dry_run,
            when_connected: false,
            issuer: "root",
            reason: "",
            expires_in_ms: HOUR_MS,
            deadline_ms: HOUR_MS,
        };
        self.store.order_cleanup(&wish, now_ms).await.unwrap()
    }

    /// A cleanup of all that waits, carried out so.
    async fn clean(&self, items: Vec<ItemReport>, outcome: impl Fn(Tally) -> Outcome) -> TaskId {
        let task = self.cleanup(&[], false).await.unwrap()[0].id;
        self.begin(task, 1001).await;
        let sum = tally(&items, 0);
        self.say(ReportBody::Items { task, items }, 1002).await;
        self.end(task, outcome(sum), 1003).await;
        task
    }

    async fn restore(&self, items: &[u128], to: Option<&str>) -> Result<Vec<TaskRow>, RestoreRefusal> {
        let to = to.map(|to| PathBytes(to.as_bytes().to_vec()));
        let items: Vec<VaultId> = items.iter().map(|n| vault_id(*n)).collect();
        let wish = RestoreWish {
            items: &items,
            to: to.as_ref(),
            set_id: false,
            dry_run: false,
            when_connected: false,
            issuer: "root",
            reason: "",
            expires_in_ms: HOUR_MS,
            deadline_ms: HOUR_MS,
        };
        self.store.order_restore(&wish, 2000).await.unwrap()
    }

    async fn incidents(&self) -> Vec<IncidentRow> {
        self.store.incidents(&IncidentFilter::default(), 100).await.unwrap()
    }

    /// State, detections and open detections of each incident, newest first.
    async fn standing(&self) -> Vec<(IncidentState, u64, u64)> {
        self.incidents().await.iter().map(|row| (row.state, row.detections, row.open)).collect()
    }

    async fn events(&self) -> Vec<EventRow> {
        self.store.events(&EventFilter::default(), false, 1000).await.unwrap()
    }

    /// The newest event's kind, status and detail.
    async fn last_event(&self) -> (EventKind, EventStatus, String) {
        let event = self.store.events(&EventFilter::default(), true, 1).await.unwrap().pop().unwrap();
        (event.kind, event.status, event.detail)
    }

    async fn task(&self, id: TaskId) -> TaskRow {
        self.store.task(id).await.unwrap().unwrap()
    }

    async fn live(&self, now_ms: i64) -> Vec<LiveTask> {
        self.store.live_tasks(now_ms).await.unwrap()
    }

    async fn count(&self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(sql.to_owned());
        sqlx::query(sql).fetch_one(self.store.reader()).await.unwrap().get(0)
    }
}
