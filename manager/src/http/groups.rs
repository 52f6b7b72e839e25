//! `/v1/groups`.

use axum::{Extension, Json, extract::State};
use tm_api::{
    error::Code,
    group::{CreateGroup, GroupView},
};

use super::{
    Actor, AppState,
    error::{Error, quoted},
    input::{self, Body},
    now_ms, rfc3339,
};
use crate::store::{Store, groups::GroupRow};

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(CreateGroup { name }): Body<CreateGroup>,
) -> Result<Json<GroupView>, Error> {
    input::group(&name)?;
    match state.store.create_group(&name, &actor.name, now_ms()).await? {
        Some(row) => Ok(Json(view(row))),
        None => Err(Error::new(Code::AlreadyExists, format!("there is a group {} already", quoted(&name)))),
    }
}

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<GroupView>>, Error> {
    Ok(Json(state.store.groups().await?.into_iter().map(view).collect()))
}

/// Checks that there is a group of this name.
pub(crate) async fn known(store: &Store, name: &str) -> Result<(), Error> {
    input::group(name)?;
    if store.has_group(name).await? { Ok(()) } else { Err(none(name)) }
}

/// The refusal where there is none.
pub(crate) fn none(name: &str) -> Error {
    Error::not_found("group", name).hint("make it: tmctl group create NAME; see them all: tmctl group list")
}

fn view(row: GroupRow) -> GroupView {
    let (created_by, created_at) = row.created.map(|(who, at)| (who, rfc3339(at))).unzip();
    GroupView { name: row.name, endpoints: row.endpoints, created_by, created_at }
}
