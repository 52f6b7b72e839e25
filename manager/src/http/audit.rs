//! `/v1/audit`.

use axum::{Json, extract::State};
use tm_api::{AuditPage, PageQuery};

use super::{
    AppState,
    error::Error,
    input::{self, Params},
};

pub(crate) async fn list(
    State(state): State<AppState>,
    Params(query): Params<PageQuery>,
) -> Result<Json<AuditPage>, Error> {
    let (after, limit) = input::page(&query)?;
    let records = state.store.audit_after(after, limit + 1).await?;
    Ok(Json(super::page_of(records, limit, |record| record.sequence)))
}
