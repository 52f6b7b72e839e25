//! Tasks as administrators order and see them. What is due is `due`, what comes of it `reports`.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    quote::Quote,
    report::{Tally, Verdict},
    task::{ScanSpec, TaskKind, TaskSpec, TaskState},
};

use super::{
    PARTS, Store, StoreError, Tx,
    audit::{self, Entry},
    outcomes, parts, places,
    receipts::ReceiptRow,
    specs,
};

const SELECT: &str = "SELECT task.id, task.endpoint_id, endpoint.host, task.kind, task.state, task.code,
        task.message, task.progress, task.result, task.issuer, task.reason, task.created_ms, task.expires_ms,
        task.started_ms, task.finished_ms, task.dry_run, task.cancel_ms
    FROM task JOIN endpoint ON endpoint.id = task.endpoint_id";

/// A task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TaskRow {
    pub(crate) id: TaskId,
    pub(crate) endpoint: EndpointId,
    pub(crate) host: String,
    pub(crate) kind: String,
    pub(crate) state: TaskState,
    pub(crate) code: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) progress: Option<ProgressRow>,
    pub(crate) result: Option<ResultRow>,
    /// It changes nothing on the endpoint.
    pub(crate) dry_run: bool,
    /// When somebody called it off.
    pub(crate) cancel_ms: Option<i64>,
    pub(crate) issuer: String,
    pub(crate) reason: String,
    pub(crate) created_ms: i64,
    pub(crate) expires_ms: i64,
    pub(crate) started_ms: Option<i64>,
    pub(crate) finished_ms: Option<i64>,
}

/// How far a running scan is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ProgressRow {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) detections: u64,
    pub(crate) skipped: u64,
}

/// What a task came to, by its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ResultRow {
    Scan(Box<ScanRow>),
    /// Of a scan that was asked what it would cost.
    Quote(Box<Quote>),
    /// Of a cleanup or a restore.
    Treatment(Tally),
}

/// What a scan came to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ScanRow {
    pub(crate) verdict: Verdict,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    #[serde(default)]
    pub(crate) known: u64,
    pub(crate) detections: u64,
    pub(crate) skipped: BTreeMap<String, u64>,
    pub(crate) samples: Vec<SampleRow>,
    pub(crate) elapsed_ms: u64,
    pub(crate) cpu_ms: u64,
    /// `None` of before there were receipts.
    #[serde(default)]
    pub(crate) receipt: Option<ReceiptRow>,
}

/// One thing that was not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct SampleRow {
    path_b64: String,
    member_b64: Vec<String>,
    pub(crate) reason: String,
}

impl SampleRow {
    /// The path and the names of the member in it.
    ///
    /// # Errors
    /// If what is stored is not base64.
    pub(crate) fn place(&self) -> Result<(Vec<u8>, Vec<Vec<u8>>), StoreError> {
        Ok((bytes(&self.path_b64)?, self.member_b64.iter().map(|m| bytes(m)).collect::<Result<_, _>>()?))
    }
}

/// One detection of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetectionRow {
    pub(crate) ordinal: i64,
    pub(crate) endpoint: String,
    pub(crate) path: Vec<u8>,
    pub(crate) member: Vec<Vec<u8>>,
    /// The pattern's name; `None` if the pattern is no longer known.
    pub(crate) pattern: Option<String>,
    pub(crate) pattern_sha256: String,
    pub(crate) rule: String,
    pub(crate) sha256: String,
    pub(crate) size: u64,
    pub(crate) found_ms: i64,
    /// Names what was found where.
    pub(crate) key: String,
    pub(crate) incident: Option<String>,
}

/// One order, for any number of endpoints.
#[derive(Debug, Clone)]
pub(crate) struct Order<'a> {
    pub(crate) spec: &'a TaskSpec,
    pub(crate) issuer: &'a str,
    pub(crate) reason: &'a str,
    pub(crate) expires_in_ms: i64,
    pub(crate) deadline_ms: i64,
}

/// For whom, under which id.
#[derive(Debug, Clone)]
pub(crate) struct Recipient {
    pub(crate) task: TaskId,
    pub(crate) endpoint: EndpointId,
    pub(crate) host: String,
    /// Its agent does not know this kind of task: the task is refused as it is made.
    pub(crate) is_unsupported: bool,
}

/// Which tasks; all by default.
#[derive(Debug, Clone, Default)]
pub(crate) struct TaskFilter {
    pub(crate) id: Option<TaskId>,
    pub(crate) endpoint: Option<EndpointId>,
    pub(crate) state: Option<TaskState>,
    /// Those that have not ended before the others.
    pub(crate) live_first: bool,
}

impl Store {
    /// Stores one task for each recipient of each order and a record for each in the audit log, all or none.
    ///
    /// # Errors
    /// If the database refuses; there is then no task.
    pub(crate) async fn create_tasks_of(
        &self,
        orders: Vec<(Order<'_>, Vec<Recipient>)>,
        now_ms: i64,
    ) -> Result<Vec<TaskRow>, StoreError> {
        let mut tx = self.begin_audited().await?;
        let mut rows = Vec::new();
        for (order, recipients) in orders {
            let spec = specs::to_json(order.spec);
            rows.extend(insert_all(&mut tx, &order, &spec, recipients, now_ms).await?);
        }
        Self::commit(tx).await?;
        Ok(rows)
    }

    /// The same with one order.
    #[cfg(test)]
    pub(crate) async fn create_tasks(
        &self,
        order: &Order<'_>,
        recipients: Vec<Recipient>,
        now_ms: i64,
    ) -> Result<Vec<TaskRow>, StoreError> {
        self.create_tasks_of(vec![(order.clone(), recipients)], now_ms).await
    }

    /// The tasks that fit, newest first, at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be read or holds a task that is not one.
    pub(crate) async fn tasks(&self, filter: &TaskFilter, limit: u32) -> Result<Vec<TaskRow>, StoreError> {
        let wanted = [
            ("task.id", filter.id.map(|id| id.to_string())),
            ("task.endpoint_id", filter.endpoint.map(|id| id.to_string())),
            ("task.state", filter.state.map(|state| state.word().to_owned())),
        ];
        let mut sql = format!("{SELECT} WHERE 1 = 1");
        let mut values = Vec::new();
        for (column, value) in wanted {
            if let Some(value) = value {
                values.push(value);
                sql.push_str(&format!(" AND {column} = ${}", values.len()));
            }
        }
        let first = if filter.live_first {
            "CASE WHEN task.state IN ('queued', 'delivered', 'running') THEN 0 ELSE 1 END,"
        } else {
            ""
        };
        sql.push_str(&format!(" ORDER BY {first} task.created_ms DESC, task.id DESC LIMIT {limit}"));
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in values {
            query = query.bind(value);
        }
        query
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list the tasks"))?
            .iter()
            .map(task)
            .collect()
    }

    /// One task.
    ///
    /// # Errors
    /// As [`Store::tasks`].
    pub(crate) async fn task(&self, id: TaskId) -> Result<Option<TaskRow>, StoreError> {
        Ok(self.tasks(&TaskFilter { id: Some(id), ..TaskFilter::default() }, 1).await?.pop())
    }

    /// What a task was ordered to do.
    ///
    /// # Errors
    /// As [`Store::tasks`].
    pub(crate) async fn order_of(&self, id: TaskId) -> Result<Option<TaskSpec>, StoreError> {
        let row = sqlx::query("SELECT spec FROM task WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("read an order"))?;
        row.map(|row| specs::from_json(&row.get::<String, _>(0))).transpose()
    }

    /// The newest quote that was made for the same order as this scan's, for the same endpoint and before it. A quote
    /// itself has none.
    ///
    /// # Errors
    /// As [`Store::tasks`].
    pub(crate) async fn quote_before(
        &self,
        task: &TaskRow,
        order: &ScanSpec,
    ) -> Result<Option<TaskRow>, StoreError> {
        if order.options.dry_run {
            return Ok(None);
        }
        let mut asked = order.clone();
        asked.options.dry_run = true;
        // The same order is the same text: one function writes both.
        let sql = format!(
            "{SELECT} WHERE task.endpoint_id = $1 AND task.kind = 'scan' AND task.dry_run = 1
             AND task.state = 'done' AND task.spec = $2 AND task.created_ms <= $3
             ORDER BY task.created_ms DESC, task.id DESC LIMIT 1"
        );
        let row = sqlx::query(AssertSqlSafe(sql))
            .bind(task.endpoint.to_string())
            .bind(specs::to_json(&TaskSpec::Scan(asked)))
            .bind(task.created_ms)
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("look for a quote"))?;
        row.as_ref().map(self::task).transpose()
    }

    /// Detections of a task after the `after`th, by number, at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be read or holds a detection that is not one.
    pub(crate) async fn detections(
        &self,
        task: TaskId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<DetectionRow>, StoreError> {
        sqlx::query(
            "SELECT detection.ordinal, detection.endpoint_id, detection.path, detection.member, pattern.name,
                    detection.pattern_sha256, detection.rule, detection.sha256, detection.size,
                    detection.found_ms, detection.identity, detection.incident_id
             FROM detection LEFT JOIN pattern ON pattern.sha256 = detection.pattern_sha256
             WHERE detection.task_id = $1 AND detection.ordinal > $2 ORDER BY detection.ordinal LIMIT $3",
        )
        .bind(task.to_string())
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("list a task's detections"))?
        .iter()
        .map(detection)
        .collect()
    }
}

/// Stores one task and its record in the audit log. `spec` is the order's, as [`specs::to_json`] writes it.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(super) async fn insert(
    tx: &mut Tx,
    order: &Order<'_>,
    spec: &str,
    recipient: Recipient,
    now_ms: i64,
) -> Result<TaskRow, StoreError> {
    let mut rows = insert_all(tx, order, spec, vec![recipient], now_ms).await?;
    Ok(rows.pop().expect("one recipient makes one task"))
}

/// Stores a task for each recipient, and their records in the audit log.
///
/// # Errors
/// As [`insert`].
async fn insert_all(
    tx: &mut Tx,
    order: &Order<'_>,
    spec: &str,
    recipients: Vec<Recipient>,
    now_ms: i64,
) -> Result<Vec<TaskRow>, StoreError> {
    let kind = order.spec.kind();
    let dry_run = is_dry_run(order.spec);
    let expires_ms = now_ms.saturating_add(order.expires_in_ms);
    for part in parts(&recipients, PARTS[0]) {
        let whom: Vec<String> = (0..part.len()).map(|row| places(10 + 2 * row, 2)).collect();
        let sql = format!(
            "WITH what (kind, spec, state, issuer, reason, created_ms, expires_ms, deadline_ms, dry_run)
                AS (VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)),
             whom (id, endpoint_id) AS (VALUES {})
             INSERT INTO task (id, endpoint_id, kind, spec, state, issuer, reason, created_ms, expires_ms,
                deadline_ms, dry_run)
             SELECT id, endpoint_id, kind, spec, state, issuer, reason, created_ms, expires_ms, deadline_ms, dry_run
             FROM whom CROSS JOIN what",
            whom.join(", ")
        );
        let mut query = sqlx::query(tx.engine.listed(sql))
            .bind(kind.word())
            .bind(spec.to_owned())
            .bind(TaskState::Queued.word())
            .bind(order.issuer.to_owned())
            .bind(order.reason.to_owned())
            .bind(now_ms)
            .bind(expires_ms)
            .bind(order.deadline_ms)
            .bind(i64::from(dry_run));
        for recipient in part {
            query = query.bind(recipient.task.to_string()).bind(recipient.endpoint.to_string());
        }
        query.execute(&mut **tx).await.map_err(StoreError::query("create tasks"))?;
    }
    let what = specs::what(order.spec);
    let ids: Vec<String> = recipients.iter().map(|recipient| recipient.task.to_string()).collect();
    let entries: Vec<Entry> = recipients
        .iter()
        .zip(&ids)
        .map(|(recipient, id)| Entry {
            actor: order.issuer,
            action: match kind {
                TaskKind::Scan => "scan.start",
                TaskKind::Cleanup => "cleanup.run",
                TaskKind::Restore => "vault.restore",
            },
            subject: id,
            detail: json!({
                "endpoint": recipient.endpoint.to_string(),
                "host": recipient.host,
                "what": what,
                "reason": order.reason,
                "expires_ms": expires_ms,
                "deadline_ms": order.deadline_ms,
            }),
            at_ms: now_ms,
        })
        .collect();
    audit::append_all(tx, &entries).await?;
    drop(entries);
    let mut rows = Vec::with_capacity(recipients.len());
    for Recipient { task, endpoint, host, is_unsupported } in recipients {
        let mut row = TaskRow {
            id: task,
            endpoint,
            host,
            kind: kind.word().to_owned(),
            state: TaskState::Queued,
            code: None,
            message: None,
            progress: None,
            result: None,
            dry_run,
            cancel_ms: None,
            issuer: order.issuer.to_owned(),
            reason: order.reason.to_owned(),
            created_ms: now_ms,
            expires_ms,
            started_ms: None,
            finished_ms: None,
        };
        if is_unsupported {
            let failure = outcomes::unsupported(kind);
            let state = TaskState::Queued;
            let head =
                outcomes::Head { id: task, endpoint, kind, dry_run, state, stored: state, order: None };
            outcomes::conclude(tx, &head, outcomes::End::refused(failure.clone()), now_ms).await?;
            row.state = TaskState::Refused;
            (row.code, row.message) = (Some(failure.code), Some(failure.message));
            row.finished_ms = Some(now_ms);
        }
        rows.push(row);
    }
    Ok(rows)
}

const fn is_dry_run(spec: &TaskSpec) -> bool {
    match spec {
        TaskSpec::Scan(scan) => scan.options.dry_run,
        TaskSpec::Cleanup(cleanup) => cleanup.dry_run,
        TaskSpec::Restore(restore) => restore.dry_run,
    }
}

fn task(row: &AnyRow) -> Result<TaskRow, StoreError> {
    let (id, endpoint, state): (String, String, String) = (row.get(0), row.get(1), row.get(4));
    let kind: String = row.get(3);
    let progress: Option<String> = row.get(7);
    let dry_run = row.get::<i64, _>(15) != 0;
    let result = |text: String| {
        if kind == TaskKind::Scan.word() && dry_run {
            json("result", &text).map(ResultRow::Quote)
        } else if kind == TaskKind::Scan.word() {
            json("result", &text).map(ResultRow::Scan)
        } else {
            json("result", &text).map(ResultRow::Treatment)
        }
    };
    Ok(TaskRow {
        id: id.parse().map_err(|_| StoreError::content("task id", id))?,
        endpoint: endpoint.parse().map_err(|_| StoreError::content("endpoint id", endpoint))?,
        host: row.get(2),
        state: TaskState::from_word(&state).ok_or_else(|| StoreError::content("task state", state))?,
        code: row.get(5),
        message: row.get(6),
        progress: progress.map(|text| json("progress", &text)).transpose()?,
        result: row.get::<Option<String>, _>(8).map(result).transpose()?,
        kind: row.get(3),
        issuer: row.get(9),
        reason: row.get(10),
        created_ms: row.get(11),
        expires_ms: row.get(12),
        started_ms: row.get(13),
        finished_ms: row.get(14),
        dry_run,
        cancel_ms: row.get(16),
    })
}

fn detection(row: &AnyRow) -> Result<DetectionRow, StoreError> {
    let member: String = row.get(3);
    let size: i64 = row.get(8);
    Ok(DetectionRow {
        ordinal: row.get(0),
        endpoint: row.get(1),
        path: row.get(2),
        member: json::<Vec<String>>("member", &member)?.iter().map(|m| bytes(m)).collect::<Result<_, _>>()?,
        pattern: row.get(4),
        pattern_sha256: row.get(5),
        rule: row.get(6),
        sha256: row.get(7),
        size: u64::try_from(size).map_err(|_| StoreError::content("size", size.to_string()))?,
        found_ms: row.get(9),
        key: row.get(10),
        incident: row.get(11),
    })
}

pub(super) fn json<T: DeserializeOwned>(what: &'static str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| StoreError::content(what, text))
}

pub(super) fn bytes(text: &str) -> Result<Vec<u8>, StoreError> {
    STANDARD.decode(text).map_err(|_| StoreError::content("base64 text", text))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::{endpoints::tests::put, specs::tests::scan as spec, tests::scratch};

    #[tokio::test]
    async fn an_order_is_stored_whole_or_not_at_all() {
        let (store, _folder) = scratch().await;
        let endpoint = put(&store, 1, "a", &[], true).await;
        let recipient = |task, endpoint| Recipient {
            task: TaskId::new(Uuid::from_u128(task)),
            endpoint,
            host: "a".to_owned(),
            is_unsupported: false,
        };
        let order =
            Order { spec: &spec(), issuer: "root", reason: "why", expires_in_ms: 10, deadline_ms: 20 };
        let nowhere = EndpointId::new(Uuid::from_u128(99));
        let half = vec![recipient(1, endpoint), recipient(2, nowhere)];
        store.create_tasks(&order, half, 100).await.unwrap_err();
        assert_eq!(store.tasks(&TaskFilter::default(), 9).await.unwrap(), []);
        assert_eq!(store.audit_after(0, 9).await.unwrap(), []);

        let made = store.create_tasks(&order, vec![recipient(1, endpoint)], 100).await.unwrap();
        assert_eq!(made, store.tasks(&TaskFilter::default(), 9).await.unwrap());
        assert_eq!((made[0].state, made[0].expires_ms), (TaskState::Queued, 110));
        let later = store.create_tasks(&order, vec![recipient(0, endpoint)], 101).await.unwrap();
        let here = TaskFilter { endpoint: Some(endpoint), ..TaskFilter::default() };
        assert_eq!(store.tasks(&here, 1).await.unwrap(), later);
        let done = TaskFilter { state: Some(TaskState::Done), ..TaskFilter::default() };
        assert_eq!(store.tasks(&done, 9).await.unwrap(), []);
        let log = store.audit_after(0, 9).await.unwrap();
        assert_eq!(log.iter().map(|r| r.action.as_str()).collect::<Vec<_>>(), ["scan.start", "scan.start"]);
        assert!(log[0].detail.contains(r"/srv/\\xff\\n"), "{}", log[0].detail);
    }

    #[tokio::test]
    async fn a_result_and_its_detections_are_read_back() {
        let (store, _folder) = scratch().await;
        let endpoint = put(&store, 1, "a", &[], true).await;
        let id = TaskId::new(Uuid::from_u128(5));
        let order = Order { spec: &spec(), issuer: "root", reason: "", expires_in_ms: 1, deadline_ms: 1 };
        let recipient = Recipient { task: id, endpoint, host: "a".to_owned(), is_unsupported: false };
        store.create_tasks(&order, vec![recipient], 1).await.unwrap();
        let result = json!({
            "verdict": "detected", "files": 3, "bytes": 4, "detections": 2, "skipped": { "encrypted": 1 },
            "samples": [{ "path_b64": "L2E=", "member_b64": ["/w=="], "reason": "encrypted" }],
            "elapsed_ms": 1500, "cpu_ms": 10,
        });
        let mut tx = store.begin().await.unwrap();
        sqlx::query("UPDATE task SET state = 'done', result = $1, progress = $2, finished_ms = 9")
            .bind(result.to_string())
            .bind(json!({ "files": 1, "bytes": 2, "detections": 0, "skipped": 0 }).to_string())
            .execute(&mut *tx)
            .await
            .unwrap();
        for ordinal in 1..=2_i64 {
            sqlx::query(
                "INSERT INTO detection (task_id, ordinal, endpoint_id, path, member, pattern_sha256, rule,
                    sha256, size, found_ms, identity)
                 VALUES ($1, $2, $3, $4, $5, 'p', 'r', 's', 12, 13, CAST($2 AS TEXT))",
            )
            .bind(id.to_string())
            .bind(ordinal)
            .bind(endpoint.to_string())
            .bind(b"/a\xff".to_vec())
            .bind(r#"["/w=="]"#)
            .execute(&mut *tx)
            .await
            .unwrap();
        }
        Store::commit(tx).await.unwrap();

        let row = store.task(id).await.unwrap().unwrap();
        let Some(ResultRow::Scan(result)) = row.result else { panic!("a scan's result") };
        assert_eq!(
            (row.state, row.finished_ms, result.verdict),
            (TaskState::Done, Some(9), Verdict::Detected)
        );
        assert_eq!(result.samples[0].place().unwrap(), (b"/a".to_vec(), vec![vec![0xff]]));
        assert_eq!(row.progress.unwrap().bytes, 2);
        let page = store.detections(id, 1, 5).await.unwrap();
        assert_eq!(page.len(), 1);
        assert_eq!((page[0].ordinal, page[0].path.as_slice(), page[0].size), (2, &b"/a\xff"[..], 12));
        assert_eq!((page[0].member.clone(), page[0].pattern.clone()), (vec![vec![0xff]], None));
        assert_eq!(store.detections(id, 0, 1).await.unwrap()[0].ordinal, 1);
        assert_eq!(store.task(TaskId::new(Uuid::from_u128(6))).await.unwrap(), None);
    }
}
