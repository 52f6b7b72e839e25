//! `/v1/accounts`.

use axum::{Extension, Json, extract::State, response::NoContent};
use tm_api::{
    account::{AccountView, CreateAccount, NewAccountToken},
    error::Code,
};
use tm_protocol::ids::Sha256;

use super::{
    Actor, AppState,
    error::{Error, quoted},
    input::{self, Body, Named},
    now_ms, rfc3339,
};
use crate::{
    access,
    store::accounts::{AccountRow, Deletion},
};

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(request): Body<CreateAccount>,
) -> Result<Json<NewAccountToken>, Error> {
    input::account_name(&request.name)?;
    let token = access::bearer_token(rand::random());
    let digest = Sha256::of(token.as_bytes());
    let made = state.store.create_account(&request.name, request.role, digest, &actor.name, now_ms()).await?;
    match made {
        Some(row) => Ok(Json(NewAccountToken { account: view(row), token })),
        None => Err(Error::new(
            Code::AlreadyExists,
            format!("there is an account {} already", quoted(&request.name)),
        )),
    }
}

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<AccountView>>, Error> {
    Ok(Json(state.store.accounts().await?.into_iter().map(view).collect()))
}

pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(name): Named,
) -> Result<NoContent, Error> {
    match state.store.delete_account(&name, &actor.name, now_ms()).await? {
        Deletion::Deleted => Ok(NoContent),
        Deletion::Unknown => Err(Error::not_found("account", &name)),
        Deletion::LastAdministrator => Err(Error::new(
            Code::Conflict,
            format!("{} is the last administrator, and nobody could administer the manager", quoted(&name)),
        )
        .hint("make another administrator first")),
    }
}

pub(crate) async fn renew_token(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(name): Named,
) -> Result<Json<NewAccountToken>, Error> {
    let token = access::bearer_token(rand::random());
    let digest = Sha256::of(token.as_bytes());
    match state.store.renew_account_token(&name, digest, &actor.name, now_ms()).await? {
        Some(row) => Ok(Json(NewAccountToken { account: view(row), token })),
        None => Err(Error::not_found("account", &name)),
    }
}

fn view(row: AccountRow) -> AccountView {
    AccountView {
        name: row.name,
        role: row.role,
        created_at: rfc3339(row.created_ms),
        last_used_at: row.last_used_ms.map(rfc3339),
    }
}
