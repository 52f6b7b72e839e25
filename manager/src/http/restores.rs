//! `/v1/restores`: orders to put vaulted files back; `/v1/vault`: what can be put back.

use axum::{Extension, Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::{
    error::Code,
    task::{RunRestore, TaskView, VaultItemView, VaultQuery},
};
use tm_protocol::{ids::VaultId, text::escape};

use super::{
    Actor, AppState, endpoints,
    error::{Error, quoted},
    input::{self, Body, Params},
    now_ms, orders, rfc3339,
};
use crate::store::{
    restores::{RestoreRefusal, RestoreWish},
    vault::{VaultFilter, VaultRow},
};

/// Most items in one order.
const MAX_ITEMS: usize = 10_000;
/// Rows of a list if the client does not say.
const DEFAULT_ROWS: u32 = 1000;

pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(request): Body<RunRestore>,
) -> Result<Json<Vec<TaskView>>, Error> {
    let times = orders::terms(&request.terms)?;
    if !(1..=MAX_ITEMS).contains(&request.items.len()) {
        return Err(Error::invalid(format!("a restore names 1 to {MAX_ITEMS} items of a vault")));
    }
    let mut items = request.items.iter().map(|id| item(id)).collect::<Result<Vec<_>, _>>()?;
    items.sort_unstable();
    items.dedup();
    let to = match &request.to_b64 {
        None => None,
        Some(_) if items.len() > 1 => {
            return Err(Error::invalid("another place can be named for one item only"));
        }
        Some(text) => Some(orders::absolute(text, STANDARD.decode(text).ok())?),
    };
    let wish = RestoreWish {
        items: &items,
        to: to.as_ref(),
        set_id: request.set_id,
        dry_run: request.terms.dry_run,
        when_connected: request.terms.when_connected,
        issuer: &actor.name,
        reason: &request.terms.reason,
        expires_in_ms: times.expires_in_ms,
        deadline_ms: times.deadline_ms,
    };
    let rows = state.store.order_restore(&wish, now_ms()).await?.map_err(refused)?;
    Ok(Json(orders::ordered(&state, rows)?))
}

fn item(text: &str) -> Result<VaultId, Error> {
    text.parse().map_err(|_| Error::not_found("vault item", text).hint("`tmctl vault list` shows their ids"))
}

fn refused(refusal: RestoreRefusal) -> Error {
    match refusal {
        RestoreRefusal::Unknown(id) => Error::not_found("vault item", &id.to_string())
            .hint("`tmctl vault list` shows what the vaults hold"),
        RestoreRefusal::UnderWay { item, task } => Error::new(
            Code::Conflict,
            format!("a restore of {} is under way: task {task}", quoted(&item.to_string())),
        )
        .hint(format!(
            "watch it with `tmctl task follow {task}`, or call it off with `tmctl task cancel {task}`"
        )),
        RestoreRefusal::Away(rows) => orders::not_connected(&rows),
    }
}

/// `GET /v1/vault`.
pub(crate) async fn list(
    State(state): State<AppState>,
    Params(query): Params<VaultQuery>,
) -> Result<Json<Vec<VaultItemView>>, Error> {
    let limit = input::rows(query.limit, DEFAULT_ROWS)?;
    let endpoint = match &query.endpoint {
        Some(target) => Some(endpoints::one(&state.store, target).await?.id),
        None => None,
    };
    let before = query.before.as_deref().map(item).transpose()?;
    let rows = state.store.vault(VaultFilter { endpoint, before }, limit).await?;
    Ok(Json(rows.into_iter().map(view).collect()))
}

fn view(row: VaultRow) -> VaultItemView {
    VaultItemView {
        id: row.id,
        endpoint: row.endpoint,
        host: row.host,
        path: escape(&row.path),
        path_b64: STANDARD.encode(&row.path),
        sha256: row.sha256,
        size: row.size,
        vaulted_at: rfc3339(row.vaulted_ms),
    }
}
