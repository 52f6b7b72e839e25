//! `/v1/version`.

use axum::{Extension, Json, extract::State};
use tm_api::VersionView;

use super::{Actor, AppState};

pub(crate) async fn show(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
) -> Json<VersionView> {
    Json(VersionView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        manager: state.manager.to_string(),
        fleet: state.fleet.to_string(),
        account: actor.name,
        role: actor.role,
    })
}
