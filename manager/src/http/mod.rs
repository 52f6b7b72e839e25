//! The administrators' REST interface: the route table, and what happens to every request before its handler.
//!
//! **Invariant:** a route exists only as a line of [`ROUTES`], and with it the permission it needs; the
//! router is built from the table. Only what [`probes`] answers to everybody stands beside it.
//! **Invariant:** nothing of a request's body is read before its token and permission are found good.

mod accounts;
mod audit;
mod certificates;
mod cleanups;
mod conflicts;
mod coverage;
mod endpoints;
mod error;
mod events;
mod exports;
mod groups;
mod input;
mod orders;
mod patterns;
pub(crate) mod port;
pub(crate) mod probes;
mod restores;
mod rollouts;
mod scans;
mod status;
mod tasks;
mod tokens;
mod trust;
mod version;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, HeaderValue, Method, Uri, header},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::{MethodFilter, MethodRouter, on},
};
use tm_api::{Page, account::Role, error::Code};
use tm_protocol::ids::{FleetId, ManagerId, Sha256};
use tm_scanner::pool::WorkerProgram;
use tokio::sync::watch;
use tower_http::{catch_panic::CatchPanicLayer, set_header::SetResponseHeaderLayer};

use self::{
    error::{Error, quoted},
    probes::Probes,
};
use crate::{
    access::{self, Permission},
    addresses::Addresses,
    patterns::{Blobs, trust::OnlineKeys},
    store::Store,
    strangers::Place,
};

const MIB: usize = 1 << 20;
/// The longest that a request may take, its body included.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where a large body comes in and a worker may take a minute over it.
const IMPORT_PATIENCE: Duration = Duration::from_secs(180);

/// What handlers work with.
#[derive(Debug, Clone)]
pub(crate) struct AppState {
    pub(crate) store: Store,
    pub(crate) blobs: Blobs,
    /// Wakes the dispatcher; carries no data.
    pub(crate) nudge: Arc<tokio::sync::Notify>,
    /// The managers' addresses, as enrollment tokens name them.
    pub(crate) addresses: Addresses,
    /// The digest of the CA certificate, as enrollment tokens name it.
    pub(crate) ca_sha256: watch::Receiver<Sha256>,
    pub(crate) manager: ManagerId,
    pub(crate) fleet: FleetId,
    /// What this manager signs with.
    pub(crate) trust: Arc<OnlineKeys>,
    /// Tries patterns.
    pub(crate) worker: WorkerProgram,
    /// Tells how this manager is.
    pub(crate) probes: Arc<Probes>,
}

/// Who asks: what a good token gives.
#[derive(Debug, Clone)]
pub(crate) struct Actor {
    pub(crate) name: String,
    pub(crate) role: Role,
}

/// One line of the table.
pub(crate) struct Route {
    pub(crate) method: Method,
    pub(crate) path: &'static str,
    pub(crate) permission: Permission,
    /// Largest body, in bytes.
    body: usize,
    patience: Duration,
    handler: fn(MethodFilter) -> MethodRouter<AppState>,
}

const fn route(
    method: Method,
    path: &'static str,
    permission: Permission,
    handler: fn(MethodFilter) -> MethodRouter<AppState>,
) -> Route {
    Route { method, path, permission, body: MIB, patience: PATIENCE, handler }
}

/// More than is read of any pattern: who reads it says that it is too large.
const MAX_PATTERN: usize = (512 << 20) + MIB;

/// A set of metadata within a request.
const MAX_TRUST: usize = tm_patterns::trust::MAX_BUNDLE + MIB;

/// Everything that can be asked.
pub(crate) static ROUTES: &[Route] = &[
    route(Method::GET, "/v1/version", Permission::ReadVersion, |m| on(m, version::show)),
    route(Method::GET, "/v1/endpoints", Permission::ReadEndpoints, |m| on(m, endpoints::list)),
    route(Method::GET, "/v1/endpoints/{target}", Permission::ReadEndpoints, |m| on(m, endpoints::show)),
    route(Method::PUT, "/v1/endpoints/{target}/group", Permission::ChangeEndpoints, |m| {
        on(m, endpoints::set_group)
    }),
    route(Method::POST, "/v1/endpoints/{target}/revoke", Permission::RevokeEndpoints, |m| {
        on(m, endpoints::revoke)
    }),
    route(Method::POST, "/v1/endpoints/{target}/approve", Permission::ApproveEndpoints, |m| {
        on(m, conflicts::approve)
    }),
    route(Method::GET, "/v1/conflicts", Permission::ReadEndpoints, |m| on(m, conflicts::list)),
    route(Method::DELETE, "/v1/endpoints/{target}", Permission::ForgetEndpoints, |m| {
        on(m, endpoints::forget)
    }),
    route(Method::GET, "/v1/endpoints/{target}/why", Permission::ReadStatus, |m| on(m, status::why)),
    route(Method::POST, "/v1/groups", Permission::ChangeEndpoints, |m| on(m, groups::create)),
    route(Method::GET, "/v1/groups", Permission::ReadEndpoints, |m| on(m, groups::list)),
    route(Method::GET, "/v1/certificates", Permission::ReadEndpoints, |m| on(m, certificates::list)),
    route(Method::GET, "/v1/coverage", Permission::ReadCoverage, |m| on(m, coverage::show)),
    route(Method::GET, "/v1/status", Permission::ReadStatus, |m| on(m, status::show)),
    route(Method::GET, "/v1/events", Permission::ReadEvents, |m| on(m, events::list)),
    route(Method::GET, "/v1/exports", Permission::ReadEvents, |m| on(m, exports::list)),
    route(Method::GET, "/v1/incidents", Permission::ReadIncidents, |m| on(m, events::incidents)),
    route(Method::GET, "/v1/vault", Permission::ReadVaults, |m| on(m, restores::list)),
    route(Method::POST, "/v1/cleanups", Permission::OrderCleanup, |m| on(m, cleanups::run)),
    route(Method::POST, "/v1/restores", Permission::OrderRestore, |m| on(m, restores::run)),
    route(Method::POST, "/v1/scans", Permission::OrderTasks, |m| on(m, scans::start)),
    route(Method::GET, "/v1/tasks", Permission::ReadTasks, |m| on(m, tasks::list)),
    route(Method::GET, "/v1/tasks/{id}", Permission::ReadTasks, |m| on(m, tasks::show)),
    route(Method::POST, "/v1/tasks/{id}/cancel", Permission::CancelTasks, |m| on(m, tasks::cancel)),
    route(Method::GET, "/v1/tasks/{id}/items", Permission::ReadTasks, |m| on(m, tasks::items)),
    route(Method::GET, "/v1/tasks/{id}/detections", Permission::ReadTasks, |m| on(m, tasks::detections)),
    Route {
        method: Method::POST,
        path: "/v1/patterns",
        permission: Permission::ImportPatterns,
        body: MAX_PATTERN,
        patience: IMPORT_PATIENCE,
        handler: |m| on(m, patterns::import),
    },
    route(Method::GET, "/v1/patterns", Permission::ReadPatterns, |m| on(m, patterns::list)),
    route(Method::GET, "/v1/patterns/{pattern}", Permission::ReadPatterns, |m| on(m, patterns::show)),
    route(Method::GET, "/v1/rollouts", Permission::ReadPatterns, |m| on(m, rollouts::list)),
    route(Method::GET, "/v1/rollouts/{rollout}", Permission::ReadPatterns, |m| on(m, rollouts::show)),
    route(Method::POST, "/v1/rollouts/{rollout}/advance", Permission::ImportPatterns, |m| {
        on(m, rollouts::advance)
    }),
    route(Method::POST, "/v1/rollouts/{rollout}/stop", Permission::ImportPatterns, |m| on(m, rollouts::stop)),
    route(Method::POST, "/v1/rollouts/{rollout}/resume", Permission::ImportPatterns, |m| {
        on(m, rollouts::resume)
    }),
    route(Method::GET, "/v1/trust", Permission::ReadPatterns, |m| on(m, trust::show)),
    Route {
        method: Method::POST,
        path: "/v1/trust",
        permission: Permission::ImportPatterns,
        body: MAX_TRUST,
        patience: PATIENCE,
        handler: |m| on(m, trust::publish),
    },
    Route {
        method: Method::POST,
        path: "/v1/trust/root",
        permission: Permission::ChangeTrust,
        body: MAX_TRUST,
        patience: PATIENCE,
        handler: |m| on(m, trust::change),
    },
    route(Method::POST, "/v1/tokens", Permission::ChangeTokens, |m| on(m, tokens::create)),
    route(Method::GET, "/v1/tokens", Permission::ReadTokens, |m| on(m, tokens::list)),
    route(Method::DELETE, "/v1/tokens/{id}", Permission::ChangeTokens, |m| on(m, tokens::revoke)),
    route(Method::POST, "/v1/accounts", Permission::ChangeAccounts, |m| on(m, accounts::create)),
    route(Method::GET, "/v1/accounts", Permission::ReadAccounts, |m| on(m, accounts::list)),
    route(Method::DELETE, "/v1/accounts/{name}", Permission::ChangeAccounts, |m| on(m, accounts::delete)),
    route(Method::POST, "/v1/accounts/{name}/token", Permission::ChangeAccounts, |m| {
        on(m, accounts::renew_token)
    }),
    route(Method::GET, "/metrics", Permission::ReadStatus, |m| on(m, probes::metrics)),
    route(Method::GET, "/v1/audit", Permission::ReadAudit, |m| on(m, audit::list)),
];

/// Builds the router from [`ROUTES`].
pub(crate) fn router(state: AppState) -> Router {
    let header = |name, value| SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value));
    ROUTES
        .iter()
        .fold(Router::new(), |router, route| {
            let filter =
                MethodFilter::try_from(route.method.clone()).expect("the table has standard methods");
            let handler = (route.handler)(filter)
                .route_layer(DefaultBodyLimit::max(route.body))
                .route_layer(from_fn_with_state((state.clone(), route), guard));
            router.route(route.path, handler)
        })
        .merge(probes::open(Arc::clone(&state.probes)))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_route)
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(from_fn(probes::counted))
        .layer(header(header::CACHE_CONTROL, "no-store"))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .with_state(state)
}

async fn no_such_route(method: Method, uri: Uri) -> Error {
    Error::new(Code::NotFound, format!("there is nothing at {}", quoted(&format!("{method} {}", uri.path()))))
}

/// Lets a request through to its handler, with an [`Actor`], if its token's role may do it.
async fn guard(
    State((state, route)): State<(AppState, &'static Route)>,
    mut request: Request,
    next: Next,
) -> Response {
    let digest = bearer(request.headers());
    let served = async {
        match authorize(&state, route.permission, digest).await {
            Ok(actor) => {
                if let Some(place) = request.extensions().get::<Arc<Place>>() {
                    place.is_known();
                }
                request.extensions_mut().insert(actor);
                next.run(request).await
            }
            Err(error) => error.into_response(),
        }
    };
    match tokio::time::timeout(route.patience, served).await {
        Ok(response) => response,
        Err(_) => Error::new(
            Code::Unavailable,
            format!("the request took longer than {} seconds and was given up", route.patience.as_secs()),
        )
        .into_response(),
    }
}

/// The digest of the token that a request brings, if it brings something that can be one.
fn bearer(headers: &HeaderMap) -> Option<Sha256> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") { access::token_digest(token.trim()) } else { None }
}

/// A bad token costs at most one look-up by an indexed digest, which is less than a good one costs.
async fn authorize(state: &AppState, permission: Permission, digest: Option<Sha256>) -> Result<Actor, Error> {
    let refused = || {
        Error::new(Code::NotAuthenticated, "the request has no valid token")
            .hint("send `Authorization: Bearer` and an account's token")
    };
    let digest = digest.ok_or_else(refused)?;
    let account = state.store.account_by_token(digest).await?.ok_or_else(refused)?;
    // When a token was last used is worth knowing, and not worth failing for.
    if let Err(error) = state.store.account_used(&account, now_ms()).await {
        tracing::warn!(account = account.name, %error, "Cannot note that an account was used.");
    }
    if access::allows(account.role, permission) {
        Ok(Actor { name: account.name, role: account.role })
    } else {
        Err(Error::new(
            Code::NotAllowed,
            format!("the account `{}` is {} and may not do this", account.name, account.role),
        ))
    }
}

/// Makes a page of at most `limit` rows out of up to one more, which only says that there is more.
fn page_of<T>(mut items: Vec<T>, limit: u32, position: impl Fn(&T) -> i64) -> Page<T> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let next = if items.len() > limit {
        items.truncate(limit);
        items.last().map(position)
    } else {
        None
    };
    Page { items, next }
}

/// The one clock of this room.
fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// RFC 3339 in UTC. A time that an endpoint's broken clock made impossible becomes the nearest possible one.
fn rfc3339(ms: i64) -> String {
    let nearest = if ms < 0 { jiff::Timestamp::MIN } else { jiff::Timestamp::MAX };
    jiff::Timestamp::from_millisecond(ms).unwrap_or(nearest).to_string()
}

#[cfg(test)]
mod tests;
