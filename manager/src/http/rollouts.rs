//! `/v1/rollouts`: versions of patterns on their way to endpoints.

use axum::{Extension, Json, extract::State};
use tm_api::{
    error::Code,
    rollout::{ResumeRollout, RolloutState, RolloutView, StartRollout, StopRollout},
};

use super::{
    Actor, AppState, endpoints,
    error::{Error, quoted},
    groups,
    input::{Body, Named},
    now_ms, rfc3339,
};
use crate::store::{
    endpoints::{EndpointRow, Filter},
    rollouts::{Move, Moved, RolloutRow},
};

/// Most rows in a list.
const MOST: u32 = 200;
const MIN_EVERY_S: u64 = 10;
const MAX_EVERY_S: u64 = 366 * 24 * 3600;

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<RolloutView>>, Error> {
    let endpoints = state.store.endpoints(&Filter::default()).await?;
    let mut views = Vec::new();
    for row in state.store.rollouts(MOST).await? {
        views.push(view(&state, row, &endpoints).await?);
    }
    Ok(Json(views))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    Named(text): Named,
) -> Result<Json<RolloutView>, Error> {
    let row = one(&state, &text).await?;
    alone(&state, row).await
}

pub(crate) async fn advance(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(text): Named,
) -> Result<Json<RolloutView>, Error> {
    carry_out(&state, &actor, &text, Move::Advance).await
}

pub(crate) async fn stop(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(text): Named,
    Body(StopRollout { reason }): Body<StopRollout>,
) -> Result<Json<RolloutView>, Error> {
    if reason.len() > endpoints::MAX_REASON {
        return Err(Error::invalid(format!("the reason is longer than {} bytes", endpoints::MAX_REASON)));
    }
    carry_out(&state, &actor, &text, Move::Stop { reason: &reason }).await
}

pub(crate) async fn resume(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(text): Named,
    Body(ResumeRollout { force }): Body<ResumeRollout>,
) -> Result<Json<RolloutView>, Error> {
    carry_out(&state, &actor, &text, Move::Resume { force }).await
}

/// Checks how a version is to reach the fleet.
pub(crate) async fn check(state: &AppState, terms: &StartRollout) -> Result<(), Error> {
    if let Some(group) = &terms.group {
        groups::known(&state.store, group).await?;
    }
    match terms.every_s {
        Some(seconds) if !(MIN_EVERY_S..=MAX_EVERY_S).contains(&seconds) => {
            Err(Error::invalid(format!("a wave takes {MIN_EVERY_S} to {MAX_EVERY_S} seconds")))
        }
        Some(_) | None => Ok(()),
    }
}

async fn carry_out(
    state: &AppState,
    actor: &Actor,
    text: &str,
    wish: Move<'_>,
) -> Result<Json<RolloutView>, Error> {
    let row = one(state, text).await?;
    let conflict = |message: String| Error::new(Code::Conflict, message);
    let name = quoted(&row.name);
    match state.store.move_rollout(row.id, wish, &actor.name, now_ms()).await? {
        Moved::Done(row) => alone(state, *row).await,
        Moved::Unknown => Err(Error::not_found("rollout", text)),
        Moved::Not(RolloutState::Stopped) => Err(conflict(format!("the rollout of {name} is stopped"))
            .hint("let it go on: tmctl pattern rollout resume")),
        Moved::Not(state) => Err(conflict(format!("the rollout of {name} is {state}"))),
        Moved::Braked(reason) => {
            Err(conflict(format!("the brake stopped the rollout of {name}: {reason}")).hint(
                "correct the pattern and publish it anew; if it was right, resume with --force, which takes the \
                 brake off",
            ))
        }
    }
}

async fn one(state: &AppState, text: &str) -> Result<RolloutRow, Error> {
    state.store.rollout(text).await?.ok_or_else(|| {
        Error::not_found("rollout", text)
            .hint("name it by the pattern or by its id: tmctl pattern rollout list")
    })
}

async fn alone(state: &AppState, row: RolloutRow) -> Result<Json<RolloutView>, Error> {
    let filter = Filter { group: row.group.clone(), ..Filter::default() };
    let endpoints = state.store.endpoints(&filter).await?;
    Ok(Json(view(state, row, &endpoints).await?))
}

/// A row as clients see it; `known` are all endpoints that it may reach.
async fn view(state: &AppState, row: RolloutRow, known: &[EndpointRow]) -> Result<RolloutView, Error> {
    let counts = state.store.rollout_counts(row.id).await?;
    let reached = known
        .iter()
        .filter(|endpoint| endpoint.revoked_ms.is_none() && row.reaches(endpoint.id, &endpoint.group));
    let endpoints = u64::try_from(reached.count()).unwrap_or(u64::MAX);
    Ok(RolloutView {
        id: row.id.to_string(),
        reach: row.reach(),
        brake: row.is_watched(),
        endpoints,
        looked: counts.looked,
        hits: counts.hits,
        name: row.name,
        sha256: row.sha256.to_string(),
        previous: row.previous,
        group: row.group,
        state: row.state,
        waves: row.waves,
        wave: row.wave,
        brake_share: row.brake_share,
        every_s: row.every_ms.and_then(|ms| u64::try_from(ms / 1000).ok()),
        next_at: row.next_ms.map(rfc3339),
        code: row.stopped_code,
        reason: row.stopped_reason,
        started_by: row.started_by,
        started_at: rfc3339(row.started_ms),
        changed_at: rfc3339(row.changed_ms),
    })
}
