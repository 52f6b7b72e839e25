//! `/v1/exports`: how far threat events have come on their way to other systems.

use axum::{Json, extract::State};
use tm_api::export::ExportView;

use super::{AppState, error::Error, now_ms, rfc3339};

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<ExportView>>, Error> {
    let now = now_ms();
    let rows = state.store.exporters().await?;
    let view = |row: crate::store::exporters::ExporterRow| ExportView {
        name: row.name,
        kind: row.kind,
        receiver: row.receiver,
        manager: row.holder,
        last_event: row.sent_event,
        last_sent_at: row.sent_ms.map(rfc3339),
        done: row.done,
        lag_events: u64::try_from(row.lag_events).unwrap_or(0),
        lag_ms: row.waiting_since_ms.map_or(0, |at| u64::try_from(now.saturating_sub(at)).unwrap_or(0)),
        failing_since: row.failing_ms.map(rfc3339),
        error: row.error,
    };
    Ok(Json(rows.into_iter().map(view).collect()))
}
