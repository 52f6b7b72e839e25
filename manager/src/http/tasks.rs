//! `/v1/tasks`: how far orders have come.

use axum::{Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::{
    Page, PageQuery,
    task::{DetectionView, ProgressView, ScanResult, SkippedView, TaskQuery, TaskResult, TaskView},
};
use tm_protocol::{ids::TaskId, text::escape};

use super::{
    AppState, endpoints,
    error::Error,
    input::{self, Named, Params},
    rfc3339,
};
use crate::store::{
    Store, StoreError,
    tasks::{DetectionRow, ResultRow, TaskFilter, TaskRow},
};

/// Rows of a list if the client does not say.
const DEFAULT_ROWS: u32 = 100;

pub(crate) async fn list(
    State(state): State<AppState>,
    Params(query): Params<TaskQuery>,
) -> Result<Json<Vec<TaskView>>, Error> {
    let limit = input::rows(query.limit, DEFAULT_ROWS)?;
    let endpoint = match &query.endpoint {
        Some(target) => Some(endpoints::one(&state.store, target).await?.id),
        None => None,
    };
    let filter = TaskFilter { id: None, endpoint, state: query.state };
    let rows = state.store.tasks(&filter, limit).await?;
    Ok(Json(rows.into_iter().map(view).collect::<Result<_, _>>()?))
}

pub(crate) async fn show(State(state): State<AppState>, Named(id): Named) -> Result<Json<TaskView>, Error> {
    Ok(Json(view(one(&state.store, &id).await?)?))
}

pub(crate) async fn detections(
    State(state): State<AppState>,
    Named(id): Named,
    Params(query): Params<PageQuery>,
) -> Result<Json<Page<DetectionView>>, Error> {
    let (after, limit) = input::page(&query)?;
    let task = one(&state.store, &id).await?.id;
    let rows = state.store.detections(task, after, limit + 1).await?;
    let views = rows.into_iter().map(|row| detection_view(task, row)).collect();
    Ok(Json(super::page_of(views, limit, |view| view.id)))
}

async fn one(store: &Store, id: &str) -> Result<TaskRow, Error> {
    let unknown = || Error::not_found("task", id);
    let parsed: TaskId = id.parse().map_err(|_| unknown())?;
    store.task(parsed).await?.ok_or_else(unknown)
}

/// A row as clients see it.
///
/// # Errors
/// If its result holds a path that is not one.
pub(crate) fn view(row: TaskRow) -> Result<TaskView, StoreError> {
    Ok(TaskView {
        id: row.id.to_string(),
        kind: row.kind,
        endpoint: row.endpoint.to_string(),
        host: row.host,
        state: row.state,
        code: row.code,
        message: row.message,
        progress: row.progress.map(|progress| ProgressView {
            files: progress.files,
            bytes: progress.bytes,
            detections: progress.detections,
            skipped: progress.skipped,
        }),
        result: row.result.map(result_view).transpose()?.map(TaskResult::Scan),
        dry_run: false,
        cancelling: false,
        issuer: row.issuer,
        reason: row.reason,
        created_at: rfc3339(row.created_ms),
        started_at: row.started_ms.map(rfc3339),
        finished_at: row.finished_ms.map(rfc3339),
        expires_at: rfc3339(row.expires_ms),
    })
}

fn result_view(row: ResultRow) -> Result<ScanResult, StoreError> {
    let mut skipped_paths = Vec::with_capacity(row.samples.len());
    for sample in row.samples {
        let (path, member) = sample.place()?;
        skipped_paths.push(SkippedView {
            path: escape(&path),
            path_b64: STANDARD.encode(&path),
            member: member.iter().map(|name| escape(name)).collect(),
            reason: sample.reason,
        });
    }
    Ok(ScanResult {
        verdict: row.verdict,
        files: row.files,
        bytes: row.bytes,
        detections: row.detections,
        skipped: row.skipped,
        skipped_paths,
        elapsed_s: seconds(row.elapsed_ms),
        cpu_s: seconds(row.cpu_ms),
    })
}

fn detection_view(task: TaskId, row: DetectionRow) -> DetectionView {
    DetectionView {
        id: row.ordinal,
        key: String::new(),
        incident: None,
        task: task.to_string(),
        endpoint: row.endpoint,
        path: escape(&row.path),
        path_b64: STANDARD.encode(&row.path),
        member: row.member.iter().map(|name| escape(name)).collect(),
        pattern: row.pattern.unwrap_or_default(),
        pattern_sha256: row.pattern_sha256,
        rule: row.rule,
        sha256: row.sha256,
        size: row.size,
        found_at: rfc3339(row.found_ms),
    }
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}
