//! `/v1/tasks`: how far orders have come.

use axum::{Extension, Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::{
    Page, PageQuery,
    error::Code,
    task::{
        DetectionView, EstimateView, ItemView, ProgressView, QuoteView, QuotedView, ReceiptView, ScanResult,
        SkippedView, TaskQuery, TaskResult, TaskView,
    },
};
use tm_protocol::{
    ids::TaskId,
    quote::Quote,
    report::Verdict,
    task::{TaskSpec, TaskState},
    text::{escape, escape_for_display},
};

use super::{
    Actor, AppState, endpoints,
    error::Error,
    input::{self, Named, Params},
    now_ms, rfc3339,
};
use crate::store::{
    Store, StoreError,
    cancels::Cancelled,
    items::ItemRow,
    receipts::ReceiptRow,
    tasks::{DetectionRow, ResultRow, ScanRow, TaskFilter, TaskRow},
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
    let filter = TaskFilter { endpoint, state: query.state, ..TaskFilter::default() };
    let rows = state.store.tasks(&filter, limit).await?;
    Ok(Json(rows.into_iter().map(view).collect::<Result<_, _>>()?))
}

pub(crate) async fn show(State(state): State<AppState>, Named(id): Named) -> Result<Json<TaskView>, Error> {
    let row = one(&state.store, &id).await?;
    let order = state.store.order_of(row.id).await?;
    let quoted = match &order {
        Some(TaskSpec::Scan(scan)) => state.store.quote_before(&row, scan).await?,
        Some(TaskSpec::Cleanup(_) | TaskSpec::Restore(_)) | None => None,
    };
    let mut view = view(row)?;
    view.quoted = quoted.and_then(quoted_view).map(Box::new);
    if let Some(TaskSpec::Scan(scan)) = order {
        view.paths = scan.paths.iter().map(|path| escape(&path.0)).collect();
        view.options = Some(scan.options);
    }
    Ok(Json(view))
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

pub(crate) async fn items(
    State(state): State<AppState>,
    Named(id): Named,
    Params(query): Params<PageQuery>,
) -> Result<Json<Page<ItemView>>, Error> {
    let (after, limit) = input::page(&query)?;
    let task = one(&state.store, &id).await?.id;
    let rows = state.store.items(task, after, limit + 1).await?;
    let views = rows.into_iter().map(|row| item_view(task, row)).collect();
    Ok(Json(super::page_of(views, limit, |view| view.id)))
}

pub(crate) async fn cancel(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(id): Named,
) -> Result<Json<TaskView>, Error> {
    let unknown = || Error::not_found("task", &id);
    let parsed: TaskId = id.parse().map_err(|_| unknown())?;
    match state.store.cancel_task(parsed, &actor.name, now_ms()).await? {
        Cancelled::Unknown => Err(unknown()),
        Cancelled::Ended(row) => {
            let why = row.code.map(|code| format!(" ({})", escape_for_display(&code))).unwrap_or_default();
            Err(Error::new(Code::Conflict, format!("task {} has ended already: {}{why}", row.id, row.state))
                .hint(format!("see what it did with `tmctl task show {}`", row.id)))
        }
        Cancelled::Yes(row) => {
            state.nudge.notify_one();
            Ok(Json(view(*row)?))
        }
    }
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
        result: row.result.map(|result| result_view(result, row.state)).transpose()?,
        dry_run: row.dry_run,
        cancelling: row.cancel_ms.is_some() && !row.state.is_final(),
        issuer: row.issuer,
        reason: row.reason,
        created_at: rfc3339(row.created_ms),
        started_at: row.started_ms.map(rfc3339),
        finished_at: row.finished_ms.map(rfc3339),
        expires_at: rfc3339(row.expires_ms),
        paths: Vec::new(),
        options: None,
        quoted: None,
    })
}

fn result_view(row: ResultRow, state: TaskState) -> Result<TaskResult, StoreError> {
    match row {
        ResultRow::Scan(row) => {
            let mut view = scan_view(*row)?;
            // What a scan did not come to is not clean.
            if state != TaskState::Done && view.verdict == Verdict::Clean {
                view.verdict = Verdict::Incomplete;
            }
            Ok(TaskResult::Scan(view))
        }
        ResultRow::Treatment(tally) => Ok(TaskResult::Treatment(tally)),
        ResultRow::Quote(quote) => Ok(TaskResult::Quote(quote_view(*quote))),
    }
}

fn quoted_view(row: TaskRow) -> Option<QuotedView> {
    match row.result? {
        ResultRow::Quote(quote) => Some(QuotedView {
            task: row.id.to_string(),
            created_at: rfc3339(row.created_ms),
            quote: quote_view(*quote),
        }),
        ResultRow::Scan(_) | ResultRow::Treatment(_) => None,
    }
}

fn quote_view(quote: Quote) -> QuoteView {
    QuoteView {
        files: quote.files,
        bytes: quote.bytes,
        known: quote.known,
        known_bytes: quote.known_bytes,
        skipped: quote.skipped.iter().map(|(reason, count)| (reason.word().to_owned(), *count)).collect(),
        estimate: quote.estimate.map(|estimate| EstimateView {
            cpu_s: seconds(estimate.cpu_ms),
            elapsed_s: seconds(estimate.elapsed_ms),
            runs: estimate.runs,
            same_patterns: estimate.same_patterns,
        }),
        elapsed_s: seconds(quote.elapsed_ms),
        cpu_s: seconds(quote.cpu_ms),
    }
}

fn scan_view(row: ScanRow) -> Result<ScanResult, StoreError> {
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
        known: row.known,
        bytes: row.bytes,
        detections: row.detections,
        skipped: row.skipped,
        skipped_paths,
        elapsed_s: seconds(row.elapsed_ms),
        cpu_s: seconds(row.cpu_ms),
        receipt: row.receipt.map(|row| Box::new(receipt_view(row))),
    })
}

fn receipt_view(row: ReceiptRow) -> ReceiptView {
    ReceiptView {
        verified: row.verified,
        problem: row.problem,
        started_at: row.started_ms.map(rfc3339),
        ended_at: row.ended_ms.map(rfc3339),
        signature: row.signature_b64,
        key: row.key_b64,
        signed_bytes_b64: row.signed_b64,
    }
}

fn detection_view(task: TaskId, row: DetectionRow) -> DetectionView {
    DetectionView {
        id: row.ordinal,
        key: row.key,
        incident: row.incident,
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

fn item_view(task: TaskId, row: ItemRow) -> ItemView {
    ItemView {
        id: row.ordinal,
        task: task.to_string(),
        endpoint: row.endpoint,
        path: escape(&row.path),
        path_b64: STANDARD.encode(&row.path),
        vault: row.vault,
        sha256: row.sha256,
        size: row.size,
        verdict: row.verdict,
        failure: row.failure,
        notes: row.notes,
        detections: row.detections,
    }
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}
