//! `/v1/endpoints`, and what a target means.

use axum::{Extension, Json, extract::State, response::NoContent};
use tm_api::{
    endpoint::{Connectivity, EndpointQuery, EndpointView, FailureView, InventoryView, Revoke, SetGroup},
    error::{Candidate, Code},
};
use tm_protocol::search;

use super::{
    Actor, AppState,
    error::{Error, quoted},
    groups,
    input::{Body, Named, Params},
    now_ms, rfc3339,
};
use crate::store::{
    Store,
    certificates::Forgotten,
    endpoints::{EndpointRow, Filter, Meaning},
};

pub(crate) async fn list(
    State(state): State<AppState>,
    Params(query): Params<EndpointQuery>,
) -> Result<Json<Vec<EndpointView>>, Error> {
    let filter = Filter {
        terms: query.search.as_deref().map(terms).transpose()?.unwrap_or_default(),
        group: query.group,
        connected: query.connectivity.map(|connectivity| match connectivity {
            Connectivity::Connected => true,
            Connectivity::Disconnected => false,
        }),
        query: query.query,
    };
    Ok(Json(state.store.endpoints(&filter).await?.into_iter().map(view).collect()))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    Named(target): Named,
) -> Result<Json<EndpointView>, Error> {
    one(&state.store, &target).await.map(|row| Json(view(row)))
}

pub(crate) async fn set_group(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(target): Named,
    Body(SetGroup { group }): Body<SetGroup>,
) -> Result<Json<EndpointView>, Error> {
    groups::known(&state.store, &group).await?;
    let mut row = one(&state.store, &target).await?;
    if row.group != group {
        state.store.set_group(&row, &group, &actor.name, now_ms()).await?;
        row.group = group;
    }
    Ok(Json(view(row)))
}

/// Once it is answered, the agent's certificates are good for no new link; a session ends within two seconds.
pub(crate) async fn revoke(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(target): Named,
    Body(Revoke { reason }): Body<Revoke>,
) -> Result<Json<EndpointView>, Error> {
    if reason.len() > MAX_REASON {
        return Err(Error::invalid(format!("the reason is longer than {MAX_REASON} bytes")));
    }
    let row = one(&state.store, &target).await?;
    state.store.revoke(&row, &actor.name, &reason, now_ms()).await?;
    let gone = || Error::not_found("endpoint", &target);
    Ok(Json(view(state.store.endpoint(row.id).await?.ok_or_else(gone)?)))
}

pub(crate) async fn forget(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(target): Named,
) -> Result<NoContent, Error> {
    let row = one(&state.store, &target).await?;
    if row.connected {
        return Err(still_in(&row));
    }
    match state.store.forget(&row, &actor.name, now_ms()).await? {
        Forgotten::Done => Ok(NoContent),
        Forgotten::NotRevoked => Err(still_in(&row)),
    }
}

fn still_in(row: &EndpointRow) -> Error {
    Error::new(Code::Conflict, format!("the agent of {} may still connect", quoted(&row.host)))
        .hint("revoke it first: tmctl endpoint revoke")
}

/// Reads a search.
pub(crate) fn terms(search: &str) -> Result<Vec<search::Term>, Error> {
    search::parse(search).map_err(|error| Error::invalid(error.to_string()))
}

/// Longest reason, in bytes.
pub(crate) const MAX_REASON: usize = 1024;

/// The one endpoint that a target means.
pub(crate) async fn one(store: &Store, target: &str) -> Result<EndpointRow, Error> {
    match store.endpoint_meant(target).await? {
        Meaning::One(row) => Ok(*row),
        Meaning::Unknown(near) => Err(Error::new(
            Code::TargetUnknown,
            format!("no endpoint has the id, host name or address {}", quoted(target)),
        )
        .candidates(candidates(&near))),
        Meaning::Ambiguous(several) => Err(Error::new(
            Code::TargetAmbiguous,
            format!("several endpoints have the host name or address {}", quoted(target)),
        )
        .hint("name the one that is meant by its id")
        .candidates(candidates(&several))),
    }
}

/// Rows as candidates.
pub(crate) fn candidates(rows: &[EndpointRow]) -> Vec<Candidate> {
    rows.iter()
        .map(|row| Candidate {
            id: row.id.to_string(),
            host: row.host.clone(),
            addresses: row.addresses.clone(),
        })
        .collect()
}

/// A row as clients see it.
pub(crate) fn view(row: EndpointRow) -> EndpointView {
    EndpointView {
        id: row.id.to_string(),
        host: row.host,
        addresses: row.addresses,
        group: row.group,
        connectivity: if row.connected { Connectivity::Connected } else { Connectivity::Disconnected },
        quarantine: "free".to_owned(),
        restart_reasons: Vec::new(),
        agent_version: row.agent_version,
        patterns: Vec::new(),
        enrolled_at: rfc3339(row.enrolled_ms),
        revoked_at: row.revoked_ms.map(rfc3339),
        last_seen_at: row.last_seen_ms.map(rfc3339),
        last_failure: row.failure.map(|failure| FailureView {
            code: failure.code,
            message: failure.message,
            at: rfc3339(failure.at_ms),
        }),
        inventory: row.inventory.map(|facts| InventoryView {
            os: facts.os,
            kernel: facts.kernel,
            arch: facts.arch,
            cpu: facts.cpu,
            cpus: facts.cpus,
            memory: facts.memory,
            disks: facts.disks,
            boot_id: facts.boot_id,
        }),
    }
}
