//! `/v1/scans`: orders to look at files.

use std::collections::BTreeMap;

use axum::{Extension, Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::{
    error::Code,
    task::{StartScan, Targets, TaskView},
};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    message::{Assign, ToAgent},
    report::PathBytes,
    task::{PatternRef, ScanSpec, TaskSpec},
};
use uuid::Uuid;

use super::{
    Actor, AppState, endpoints,
    error::{Error, quoted},
    input::{self, Body},
    now_ms, patterns, tasks,
};
use crate::store::{
    Store,
    endpoints::{EndpointRow, Filter},
    tasks::{Order, Recipient},
};

/// Most endpoints in one order.
const MAX_ENDPOINTS: usize = 10_000;
/// Most endpoints named in one refusal.
const MAX_NAMED: usize = 10;
const MAX_REASON: usize = 1024;
const HOUR_S: u64 = 3600;
const MAX_S: u64 = 30 * 24 * HOUR_S;

pub(crate) async fn start(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(request): Body<StartScan>,
) -> Result<Json<Vec<TaskView>>, Error> {
    let expires_in_ms = milliseconds("expires_in_s", request.expires_in_s.unwrap_or(HOUR_S))?;
    let deadline_ms = milliseconds("deadline_s", request.deadline_s.unwrap_or(24 * HOUR_S))?;
    if request.reason.len() > MAX_REASON {
        return Err(Error::invalid(format!("the reason is longer than {MAX_REASON} bytes")));
    }
    if request.limits.file_ms == 0 || request.limits.depth > 64 {
        return Err(Error::invalid("the limits allow no time for a file, or more than 64 containers' depth"));
    }
    let spec = TaskSpec::Scan(ScanSpec {
        paths: paths(&request.paths_b64)?,
        patterns: chosen_patterns(&state.store, &request.patterns).await?,
        limits: request.limits,
    });
    let found = addressed(&state.store, &request.to).await?;
    if !request.when_connected {
        all_connected(&found)?;
    }
    let order =
        Order { spec: &spec, issuer: &actor.name, reason: &request.reason, expires_in_ms, deadline_ms };
    fits_a_frame(&order)?;
    let recipients = found
        .into_iter()
        .map(|row| Recipient { task: TaskId::new(Uuid::now_v7()), endpoint: row.id, host: row.host })
        .collect();
    let rows = state.store.create_tasks(&order, recipients, now_ms()).await?;
    state.nudge.notify_one();
    Ok(Json(rows.into_iter().map(tasks::view).collect::<Result<_, _>>()?))
}

fn milliseconds(what: &str, seconds: u64) -> Result<i64, Error> {
    match i64::try_from(seconds) {
        Ok(s) if (1..=MAX_S).contains(&seconds) => Ok(s * 1000),
        _ => Err(Error::invalid(format!("`{what}` is not within 1 to {MAX_S} seconds"))),
    }
}

fn paths(texts: &[String]) -> Result<Vec<PathBytes>, Error> {
    if !(1..=ScanSpec::MAX_PATHS).contains(&texts.len()) {
        return Err(Error::invalid(format!("a scan looks at 1 to {} paths", ScanSpec::MAX_PATHS)));
    }
    texts
        .iter()
        .map(|text| {
            let path = STANDARD
                .decode(text)
                .map_err(|_| Error::invalid(format!("{} is not base64 of a path", quoted(text))))?;
            let fits = path.first() == Some(&b'/') && !path.contains(&0) && path.len() <= ScanSpec::MAX_PATH;
            if fits {
                Ok(PathBytes(path))
            } else {
                let shown = PathBytes(path).to_string();
                Err(Error::invalid(format!("{} is not an absolute path", quoted(&shown))))
            }
        })
        .collect()
}

async fn chosen_patterns(store: &Store, names: &[String]) -> Result<Vec<PatternRef>, Error> {
    let mut chosen: Vec<PatternRef> = Vec::new();
    if names.is_empty() {
        chosen.extend(store.newest_patterns().await?.into_iter().map(|row| row.reference));
    }
    // Before the look-ups, one for each.
    let too_many = || Error::invalid(format!("a scan uses at most {} patterns", ScanSpec::MAX_PATTERNS));
    if names.len() > ScanSpec::MAX_PATTERNS || chosen.len() > ScanSpec::MAX_PATTERNS {
        return Err(too_many());
    }
    for name in names {
        let reference = patterns::one(store, name).await?.reference;
        if !chosen.iter().any(|known| known.sha256 == reference.sha256) {
            chosen.push(reference);
        }
    }
    if chosen.is_empty() {
        return Err(Error::new(Code::Conflict, "there is no pattern to scan with")
            .hint("import one (tmctl pattern import)"));
    }
    Ok(chosen)
}

/// Every endpoint that an order is for, once.
async fn addressed(store: &Store, to: &Targets) -> Result<Vec<EndpointRow>, Error> {
    if to.targets.is_empty() && to.search.is_none() && to.group.is_none() {
        return Err(Error::invalid("the order names no target, search or group"));
    }
    let too_many = || Error::invalid(format!("an order is for at most {MAX_ENDPOINTS} endpoints"));
    if to.targets.len() > MAX_ENDPOINTS {
        return Err(too_many());
    }
    let mut found: BTreeMap<EndpointId, EndpointRow> = BTreeMap::new();
    for target in &to.targets {
        let row = endpoints::one(store, target).await?;
        found.insert(row.id, row);
    }
    if let Some(search) = &to.search {
        let filter = Filter { terms: endpoints::terms(search)?, ..Filter::default() };
        found.extend(store.endpoints(&filter).await?.into_iter().map(|row| (row.id, row)));
    }
    if let Some(group) = &to.group {
        input::group(group)?;
        let filter = Filter { group: Some(group.clone()), ..Filter::default() };
        found.extend(store.endpoints(&filter).await?.into_iter().map(|row| (row.id, row)));
    }
    match found.len() {
        0 => Err(Error::new(Code::TargetUnknown, "the search or group finds no endpoint")),
        1..=MAX_ENDPOINTS => Ok(found.into_values().collect()),
        _ => Err(too_many()),
    }
}

fn all_connected(rows: &[EndpointRow]) -> Result<(), Error> {
    let away: Vec<&EndpointRow> = rows.iter().filter(|row| !row.connected).collect();
    if away.is_empty() {
        return Ok(());
    }
    let mut names: Vec<String> = away.iter().take(MAX_NAMED).map(|row| quoted(&row.host)).collect();
    if away.len() > MAX_NAMED {
        names.push(format!("{} more", away.len() - MAX_NAMED));
    }
    let named: Vec<EndpointRow> = away.into_iter().take(MAX_NAMED).cloned().collect();
    Err(Error::new(Code::NotConnected, format!("not connected: {}", names.join(", ")))
        .hint("ask for `when_connected` (--when-connected) to keep the order until they connect")
        .candidates(endpoints::candidates(&named)))
}

/// An order that no frame can carry would wait for ever.
fn fits_a_frame(order: &Order<'_>) -> Result<(), Error> {
    let assign = Assign {
        task: TaskId::new(Uuid::nil()),
        endpoint: EndpointId::new(Uuid::nil()),
        spec: order.spec.clone(),
        expires_in_ms: order.expires_in_ms.unsigned_abs(),
        deadline_ms: order.deadline_ms.unsigned_abs(),
        issuer: order.issuer.to_owned(),
        reason: order.reason.to_owned(),
    };
    ToAgent::from(assign).encode(&mut bytes::BytesMut::new()).map_err(|_| {
        Error::new(Code::TooLarge, "the order's paths and patterns are too long for one message to an agent")
    })
}
