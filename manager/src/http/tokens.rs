//! `/v1/tokens`: enrollment tokens.

use axum::{Extension, Json, extract::State, response::NoContent};
use tm_api::{
    error::Code,
    token::{CreateToken, NewToken, TokenView},
};
use tm_protocol::{
    ids::{Sha256, TokenId},
    token::EnrollmentToken,
};
use uuid::Uuid;

use super::{
    Actor, AppState,
    error::Error,
    groups,
    input::{Body, Named},
    now_ms, rfc3339,
};
use crate::store::tokens::TokenRow;

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(request): Body<CreateToken>,
) -> Result<Json<NewToken>, Error> {
    groups::known(&state.store, &request.group).await?;
    if !(1..=100_000).contains(&request.uses) {
        return Err(Error::invalid("an enrollment token has 1 to 100,000 uses"));
    }
    let lifetime_ms = match i64::try_from(request.expires_in_s) {
        Ok(seconds @ 60..=31_536_000) => seconds * 1000,
        _ => return Err(Error::invalid("an enrollment token is good for 60 to 31,536,000 seconds")),
    };
    let addresses = state.addresses.get();
    if addresses.is_empty() {
        return Err(Error::new(
            Code::Conflict,
            "the manager does not know an address that agents reach it at",
        )
        .hint("name one in the manager's configuration"));
    }
    let secret: [u8; 32] = rand::random();
    let digest = Sha256::of(&secret);
    let token = EnrollmentToken {
        addresses,
        ca: *state.ca_sha256.borrow(),
        secret: secret.into(),
        // The desk that asked adds it: agents must not learn from a manager whose patterns to trust.
        root: None,
    };
    let created_ms = now_ms();
    let row = TokenRow {
        id: TokenId::new(Uuid::now_v7()),
        group: request.group,
        uses: i64::from(request.uses),
        used: 0,
        created_by: actor.name,
        created_ms,
        expires_ms: created_ms + lifetime_ms,
        revoked_ms: None,
    };
    state.store.create_token(&row, digest).await?;
    Ok(Json(NewToken { view: view(row, created_ms), token: token.to_string() }))
}

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<TokenView>>, Error> {
    let now = now_ms();
    Ok(Json(state.store.tokens().await?.into_iter().map(|row| view(row, now)).collect()))
}

pub(crate) async fn revoke(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Named(id): Named,
) -> Result<NoContent, Error> {
    let unknown = || Error::not_found("enrollment token", &id);
    let parsed: TokenId = id.parse().map_err(|_| unknown())?;
    if state.store.revoke_token(parsed, &actor.name, now_ms()).await? {
        Ok(NoContent)
    } else {
        Err(unknown())
    }
}

fn view(row: TokenRow, now_ms: i64) -> TokenView {
    let count = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
    TokenView {
        state: row.state(now_ms).to_owned(),
        id: row.id.to_string(),
        group: row.group,
        uses: count(row.uses),
        used: count(row.used),
        created_by: row.created_by,
        created_at: rfc3339(row.created_ms),
        expires_at: rfc3339(row.expires_ms),
    }
}
