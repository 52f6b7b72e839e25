//! `/v1/conflicts`: agents that came with another's identity, and what is decided about them.

use axum::{Extension, Json, extract::State};
use tm_api::{
    conflict::{Approve, ConflictState, ConflictView},
    endpoint::EndpointView,
    error::Code,
};
use uuid::Uuid;

use super::{
    Actor, AppState,
    endpoints::{one, view},
    error::{Error, quoted},
    input::{Body, Named},
    now_ms, rfc3339,
};
use crate::store::conflicts::{Approval, ConflictRow, PRESENT_MS};

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<ConflictView>>, Error> {
    let now = now_ms();
    Ok(Json(state.store.conflicts().await?.into_iter().map(|row| shown(row, now)).collect()))
}

pub(crate) async fn approve(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(target): Named,
    Body(Approve { conflict }): Body<Approve>,
) -> Result<Json<EndpointView>, Error> {
    let named = conflict.as_deref().map(|text| {
        text.parse::<Uuid>().map_err(|_| Error::invalid(format!("{} is no id of a conflict", quoted(text))))
    });
    let row = one(&state.store, &target).await?;
    if row.revoked_ms.is_some() {
        return Err(Error::new(Code::Conflict, format!("the identity of {} was revoked", quoted(&row.host))));
    }
    match state.store.approve(&row, named.transpose()?, &actor.name, now_ms()).await? {
        Approval::Approved(new, _) => {
            let gone = || Error::not_found("endpoint", &new.to_string());
            Ok(Json(view(state.store.endpoint(new).await?.ok_or_else(gone)?)))
        }
        Approval::Nobody => Err(Error::new(
            Code::Conflict,
            format!("no other agent with the identity of {} is held", quoted(&row.host)),
        )
        .hint("tmctl endpoint conflicts")),
        Approval::Several(held) => {
            let each = held.iter().map(|row| format!("{} ({})", row.id, quoted(&row.host)));
            let message = format!("several agents are held: {}", each.collect::<Vec<_>>().join(", "));
            Err(Error::new(Code::Conflict, message).hint("name one: tmctl endpoint approve --conflict ID"))
        }
    }
}

fn shown(row: ConflictRow, now_ms: i64) -> ConflictView {
    let state = match (row.approved_ms, row.renewed_ms) {
        (Some(_), Some(_)) => ConflictState::Settled,
        (Some(_), None) => ConflictState::Approved,
        (None, _) if row.seen_ms >= now_ms.saturating_sub(PRESENT_MS) => ConflictState::Held,
        (None, _) => ConflictState::Away,
    };
    ConflictView {
        id: row.id.to_string(),
        state,
        endpoint: row.endpoint.to_string(),
        endpoint_host: row.of_host,
        host: row.host,
        addresses: row.addresses,
        boot_id: row.boot_id,
        agent_version: row.agent_version,
        first_seen_at: rfc3339(row.first_ms),
        last_seen_at: rfc3339(row.seen_ms),
        approved_as: row.approved_as.map(|id| id.to_string()),
    }
}
