//! What was looked at when: for every path of a scan that ended, whether it went through it without a gap.
//!
//! Paths are told apart lexically; the agent refuses to scan through a link, so that the name of a folder that was
//! scanned is no other folder's.
//!
//! **Invariant:** a scan covers a path only if it was ordered for that path or one above it, went through, and
//! nothing that leaves a gap was skipped.
//! **Invariant:** counts and list are of one statement's rows.

use std::collections::BTreeMap;

use sqlx::{Row as _, any::AnyRow};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    report::{Coverage, PathBytes, Verdict},
    task::{ScanSpec, TaskSpec, TaskState},
};

use super::{
    PARTS, Store, StoreError, Tx,
    endpoints::{Condition, Filter},
    outcomes::Head,
    parts,
    receipts::ReceiptRow,
    rows, specs,
    tasks::{ScanRow, json},
};

/// How an endpoint stands towards a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CoverageRow {
    pub(crate) endpoint: String,
    pub(crate) host: String,
    /// The newest scan that looked at the whole of the path.
    pub(crate) whole: Option<LookRow>,
    /// The newest scan of the path, however it ended.
    pub(crate) last: Option<LookRow>,
}

/// One scan of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LookRow {
    pub(crate) task: String,
    /// When it began, in milliseconds since 1970.
    pub(crate) looked_ms: i64,
    /// `None` if it failed.
    pub(crate) verdict: Option<Verdict>,
    /// What its patterns are called.
    pub(crate) patterns: Vec<String>,
    /// What was skipped, by reason.
    pub(crate) skipped: BTreeMap<String, u64>,
    /// Why it did not go through, where it did not.
    pub(crate) code: Option<String>,
    pub(crate) state: TaskState,
    /// Whether its receipt is signed by the endpoint's key.
    pub(crate) verified: bool,
}

/// Notes what a scan that `began` then and ended in `state` has covered. `seen` is what came of it, `None` if it failed.
///
/// Written when the transaction ends.
pub(super) fn record(
    tx: &mut Tx,
    head: &Head,
    state: TaskState,
    spec: &ScanSpec,
    began: Option<i64>,
    seen: Option<(&Coverage, &ReceiptRow)>,
    now_ms: i64,
) {
    let is_whole = state == TaskState::Done
        && seen
            .is_some_and(|(coverage, _)| coverage.skipped.iter().all(|(r, n)| !r.leaves_a_gap() || *n == 0));
    // What was not begun and failed looked at nothing.
    if began.is_none() && seen.is_none() {
        return;
    }
    // A report may come days late; the earliest time that anybody vouches for is the one that promises least.
    let said = seen.filter(|(_, receipt)| receipt.verified).and_then(|(_, receipt)| receipt.started_ms);
    let looked_ms = [began, said].into_iter().flatten().fold(now_ms, i64::min);
    let root = [PathBytes(b"/".to_vec())];
    let paths = if spec.options.full { &root[..] } else { &spec.paths };
    tx.covered.extend(paths.iter().filter_map(normal).map(|path| Covered {
        task: head.id,
        endpoint: head.endpoint,
        path,
        is_whole,
        looked_ms,
    }));
}

/// A path that a scan covered, written when its transaction ends.
#[derive(Debug)]
pub(super) struct Covered {
    task: TaskId,
    endpoint: EndpointId,
    path: Vec<u8>,
    is_whole: bool,
    looked_ms: i64,
}

/// Writes what was recorded in a transaction that is about to be committed.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(super) async fn write(tx: &mut Tx) -> Result<(), StoreError> {
    let covered = std::mem::take(&mut tx.covered);
    for part in parts(&covered, PARTS[0]) {
        let sql = format!(
            "INSERT INTO covered (task_id, endpoint_id, path, is_whole, looked_ms) VALUES {}
             ON CONFLICT (task_id, path) DO NOTHING",
            rows(part.len(), 5)
        );
        let mut query = sqlx::query(tx.engine.listed(sql));
        for covered in part {
            query = query
                .bind(covered.task.to_string())
                .bind(covered.endpoint.to_string())
                .bind(hex::encode(&covered.path))
                .bind(i64::from(covered.is_whole))
                .bind(covered.looked_ms);
        }
        query.execute(&mut **tx).await.map_err(StoreError::query("note what scans covered"))?;
    }
    Ok(())
}

/// The path without superfluous slashes and dots; `None` if it is relative or leads upwards.
pub(crate) fn normal(path: &PathBytes) -> Option<Vec<u8>> {
    let rest = path.0.strip_prefix(b"/")?;
    let mut out = Vec::with_capacity(path.0.len());
    for part in rest.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return None,
            part => {
                out.push(b'/');
                out.extend_from_slice(part);
            }
        }
    }
    if out.is_empty() {
        out.push(b'/');
    }
    Some(out)
}

/// A normal path and all above it.
fn and_above(path: &[u8]) -> Vec<Vec<u8>> {
    let mut all = vec![b"/".to_vec()];
    let ends = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    all.extend(
        ends.chain([path.len()])
            .filter_map(|end| path.get(..end))
            .filter(|p| p.len() > 1)
            .map(<[u8]>::to_vec),
    );
    all
}

impl Store {
    /// How the endpoints that fit stand towards `path`, which is [`normal`], by host name.
    ///
    /// # Errors
    /// If the database cannot be read or holds what this version cannot read.
    pub(crate) async fn coverage(
        &self,
        filter: &Filter,
        only: Option<&[EndpointId]>,
        path: &[u8],
    ) -> Result<Vec<CoverageRow>, StoreError> {
        let mut condition = Condition::of(filter);
        if let Some(only) = only {
            let places: Vec<String> = only.iter().map(|id| condition.value(id.to_string())).collect();
            condition.sql = format!("{} AND id IN ({})", condition.sql, places.join(", "));
        }
        let places: Vec<String> =
            and_above(path).into_iter().map(|path| condition.value(hex::encode(path))).collect();
        let newest = |more: &str| {
            format!(
                "(SELECT covered.task_id FROM covered WHERE covered.endpoint_id = endpoint.id
                    AND covered.path IN ({}) {more} ORDER BY covered.looked_ms DESC, covered.task_id DESC LIMIT 1)",
                places.join(", ")
            )
        };
        let look = |name: &str| {
            format!(
                "{name}.id, {name}.spec, {name}.state, {name}.code, {name}.result,
                 (SELECT MIN(covered.looked_ms) FROM covered WHERE covered.task_id = {name}.id)"
            )
        };
        let sql = format!(
            "SELECT found.id, found.host, {}, {} FROM
                (SELECT id, host, host_key, {} AS whole_task, {} AS last_task FROM endpoint WHERE {}) found
             LEFT JOIN task whole_look ON whole_look.id = found.whole_task
             LEFT JOIN task last_look ON last_look.id = found.last_task
             ORDER BY found.host_key, found.id",
            look("whole_look"),
            look("last_look"),
            newest("AND covered.is_whole = 1"),
            newest(""),
            condition.sql
        );
        let rows = condition.fetch(self, sql).await.map_err(StoreError::query("list what was looked at"))?;
        rows.iter()
            .map(|row| {
                Ok(CoverageRow {
                    endpoint: row.get(0),
                    host: row.get(1),
                    whole: look_row(row, 2)?,
                    last: look_row(row, 8)?,
                })
            })
            .collect()
    }
}

fn look_row(row: &AnyRow, at: usize) -> Result<Option<LookRow>, StoreError> {
    let Some(task) = row.get::<Option<String>, _>(at) else { return Ok(None) };
    let (text, state): (String, String) = (row.get(at + 1), row.get(at + 2));
    let state = TaskState::from_word(&state).ok_or_else(|| StoreError::content("task state", state))?;
    let TaskSpec::Scan(spec) = specs::from_json(&text)? else {
        return Err(StoreError::content("scan", text));
    };
    let scan = match row.get::<Option<String>, _>(at + 4) {
        Some(text) => Some(json::<ScanRow>("result", &text)?),
        None => None,
    };
    let is_done = state == TaskState::Done;
    let verdict = scan.as_ref().map(|scan| match scan.verdict {
        Verdict::Clean if !is_done => Verdict::Incomplete,
        verdict @ (Verdict::Clean | Verdict::Detected | Verdict::Incomplete) => verdict,
    });
    Ok(Some(LookRow {
        task,
        looked_ms: row.get(at + 5),
        verdict,
        patterns: spec.patterns.into_iter().map(|pattern| pattern.name).collect(),
        verified: scan.as_ref().and_then(|scan| scan.receipt.as_ref()).is_some_and(|r| r.verified),
        skipped: scan.map(|scan| scan.skipped).unwrap_or_default(),
        code: row.get(at + 3),
        state,
    }))
}
