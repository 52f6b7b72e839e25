//! `/v1/trust`: the fleet's signed metadata, down to desks and up from them.

use axum::{Extension, Json, extract::State};
use jiff::Timestamp;
use tm_api::{
    error::Code,
    trust::{PublishTrust, TrustFiles, TrustView},
};

use super::{
    Actor, AppState,
    error::{Error, quoted},
    groups,
    input::Body,
    rollouts,
};
use crate::patterns::trust::{self, Change, PublishError};

pub(crate) async fn show(State(state): State<AppState>) -> Result<Json<TrustView>, Error> {
    let row = state.store.trust().await?;
    let bundle = row.map(|row| trust::parse(&row).map_err(PublishError::Damaged)).transpose()?;
    let (snapshot_key, timestamp_key) = state.trust.public();
    let files = bundle.map(|bundle| TrustFiles {
        roots: bundle.roots,
        timestamp: bundle.timestamp,
        snapshot: bundle.snapshot,
        targets: bundle.targets,
        roles: bundle.roles,
    });
    Ok(Json(TrustView { files, snapshot_key, timestamp_key }))
}

/// Publishes what roles list; answers with what is in force then.
pub(crate) async fn publish(
    state: State<AppState>,
    actor: Extension<Actor>,
    Body(request): Body<PublishTrust>,
) -> Result<Json<TrustView>, Error> {
    if request.root.is_some() || request.targets.is_some() {
        return Err(Error::invalid("`root` and `targets` are changed at /v1/trust/root"));
    }
    if let Some(terms) = &request.rollout {
        rollouts::check(&state, terms).await?;
    }
    put_in_force(state, actor, request).await
}

/// Changes who may sign, likewise.
pub(crate) async fn change(
    state: State<AppState>,
    actor: Extension<Actor>,
    Body(request): Body<PublishTrust>,
) -> Result<Json<TrustView>, Error> {
    if request.rollout.is_some() {
        return Err(Error::invalid("a `rollout` begins at /v1/trust"));
    }
    put_in_force(state, actor, request).await
}

async fn put_in_force(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    request: PublishTrust,
) -> Result<Json<TrustView>, Error> {
    let PublishTrust { root, targets, roles, rollout } = request;
    let change = Change { root, targets, roles, rollout };
    trust::publish(&state.store, &state.trust, change, &actor.name, Timestamp::now()).await?;
    show(State(state)).await
}

impl From<PublishError> for Error {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::NoTrust => Self::new(Code::Conflict, "the fleet has no root of trust yet")
                .hint("make one, on the desk that shall keep its keys: tmctl pattern trust init"),
            PublishError::Version { .. } | PublishError::Overtaken => Self::new(
                Code::Conflict,
                format!("somebody else published meanwhile ({error}); nothing was changed"),
            )
            .hint("look at what is there now (tmctl pattern list), and do it again"),
            PublishError::Refused(why) => {
                let refusal = format!("the signed metadata are refused: {why} ({})", why.code());
                Self::new(Code::PatternRefused, refusal)
            }
            PublishError::Missing(sha256) => Self::new(
                Code::PatternRefused,
                format!("the metadata list pattern {sha256}, which was not uploaded"),
            ),
            PublishError::UnderWay(name) => Self::new(
                Code::Conflict,
                format!("a version of {} is still on its way through its waves; nothing was changed", quoted(&name)),
            )
            .hint("see how far it is (tmctl pattern rollout show), then advance it or stop it"),
            PublishError::Stranded(name) => Self::new(
                Code::Conflict,
                format!(
                    "endpoints that the newest version of {} does not reach would be left without one; nothing was \
                     changed",
                    quoted(&name)
                ),
            )
            .hint("advance the rollout to all first, or withdraw every version: tmctl pattern retire NAME"),
            PublishError::NothingNew => Self::new(
                Code::Conflict,
                "this is in force already, and a rollout begins with what is not; nothing was changed",
            )
            .hint("see who has it: tmctl pattern list"),
            PublishError::NoGroup(name) => groups::none(&name),
            PublishError::Store(error) => error.into(),
            damaged @ PublishError::Damaged(_) => Self::new(Code::Internal, damaged.to_string())
                .hint("the manager's log says more")
                .cause(damaged),
        }
    }
}
