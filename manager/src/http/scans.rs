//! `/v1/scans`: orders to look at files.

use axum::{Extension, Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::{
    error::Code,
    task::{StartScan, TaskView},
};
use tm_protocol::{
    ids::TaskId,
    report::PathBytes,
    task::{PatternRef, ScanSpec, TaskKind, TaskSpec},
};
use uuid::Uuid;

use super::{
    Actor, AppState,
    error::{Error, quoted},
    input::Body,
    now_ms, orders, patterns,
};
use crate::store::{
    Store,
    endpoints::EndpointRow,
    rollouts::Versions,
    tasks::{Order, Recipient},
};

pub(crate) async fn start(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(request): Body<StartScan>,
) -> Result<Json<Vec<TaskView>>, Error> {
    let times =
        orders::times(request.expires_in_s, request.deadline_s, 24 * orders::HOUR_S, &request.reason)?;
    if request.limits.file_ms == 0 || request.limits.depth > 64 {
        return Err(Error::invalid("the limits allow no time for a file, or more than 64 containers' depth"));
    }
    if let Some(why) = request.options.contradiction(request.paths_b64.len()) {
        return Err(Error::invalid(why));
    }
    let found = orders::addressed(&state.store, &request.to).await?;
    if !request.when_connected {
        orders::all_connected(found.iter().map(|(row, _)| row))?;
    }
    let wished = wished(&state.store, &request.patterns).await?;
    let paths = paths(&request.paths_b64)?;
    let endpoints: Vec<EndpointRow> = found.into_iter().map(|(row, _)| row).collect();
    // Those who get the same versions get the same order.
    let orders: Vec<(TaskSpec, Vec<EndpointRow>)> = chosen(&state.store, &wished, endpoints)
        .await?
        .into_iter()
        .map(|(patterns, endpoints)| {
            let (paths, limits, options) = (paths.clone(), request.limits, request.options);
            (TaskSpec::Scan(ScanSpec { paths, patterns, limits, options }), endpoints)
        })
        .collect();
    let mut all = Vec::with_capacity(orders.len());
    for (spec, endpoints) in &orders {
        let order = Order {
            spec,
            issuer: &actor.name,
            reason: &request.reason,
            expires_in_ms: times.expires_in_ms,
            deadline_ms: times.deadline_ms,
        };
        orders::fits_a_frame(&order)?;
        let recipients = endpoints.iter().map(|row| Recipient {
            task: TaskId::new(Uuid::now_v7()),
            endpoint: row.id,
            is_unsupported: !row.knows(TaskKind::Scan),
            host: row.host.clone(),
        });
        all.push((order, recipients.collect()));
    }
    let mut rows = state.store.create_tasks_of(all, now_ms()).await?;
    rows.sort_by_key(|row| row.endpoint);
    Ok(Json(orders::ordered(&state, rows)?))
}

fn paths(texts: &[String]) -> Result<Vec<PathBytes>, Error> {
    if texts.len() > ScanSpec::MAX_PATHS {
        return Err(Error::invalid(format!("a scan looks at {} paths at most", ScanSpec::MAX_PATHS)));
    }
    texts.iter().map(|text| orders::absolute(text, STANDARD.decode(text).ok())).collect()
}

/// One pattern that a person named.
enum Wish {
    /// Whatever version of it an endpoint gets.
    Name(String),
    /// This version.
    Version(PatternRef),
}

/// What a person named; nothing means all.
async fn wished(store: &Store, names: &[String]) -> Result<Vec<Wish>, Error> {
    // Before the look-ups, one for each.
    if names.len() > ScanSpec::MAX_PATTERNS {
        return Err(too_many());
    }
    let mut wished = Vec::with_capacity(names.len());
    for name in names {
        let row = patterns::one(store, name).await?;
        if row.published_ms.is_none() {
            return Err(Error::new(
                Code::Conflict,
                format!("pattern {} is a draft that nobody has signed; no agent would load it", quoted(name)),
            )
            .hint("sign and publish it: tmctl pattern import FILE"));
        }
        let is_name = *name == row.reference.name && *name != row.reference.sha256.to_string();
        wished.push(if is_name { Wish::Name(name.clone()) } else { Wish::Version(row.reference) });
    }
    Ok(wished)
}

fn too_many() -> Error {
    Error::invalid(format!("a scan uses at most {} patterns", ScanSpec::MAX_PATTERNS))
}

/// With which versions each endpoint looks, of those that reach it.
async fn chosen(
    store: &Store,
    wished: &[Wish],
    endpoints: Vec<EndpointRow>,
) -> Result<Vec<(Vec<PatternRef>, Vec<EndpointRow>)>, Error> {
    let versions = store.versions().await?;
    let mut orders: Vec<(Vec<PatternRef>, Vec<EndpointRow>)> = Vec::new();
    for endpoint in endpoints {
        // Most fleets have nothing on its way most of the time.
        if let (true, Some((_, same))) = (versions.are_for_all(), orders.first_mut()) {
            same.push(endpoint);
            continue;
        }
        let patterns = of_one(&versions, wished, &endpoint)?;
        match orders.iter_mut().find(|(known, _)| *known == patterns) {
            Some((_, same)) => same.push(endpoint),
            None => orders.push((patterns, vec![endpoint])),
        }
    }
    Ok(orders)
}

fn of_one(versions: &Versions, wished: &[Wish], endpoint: &EndpointRow) -> Result<Vec<PatternRef>, Error> {
    let (id, group) = (endpoint.id, endpoint.group.as_str());
    let host = quoted(&endpoint.host);
    let mut chosen: Vec<PatternRef> = Vec::new();
    if wished.is_empty() {
        chosen.extend(versions.of(id, group).into_iter().map(|row| row.reference.clone()));
    }
    for wish in wished {
        let (reference, what) = match wish {
            Wish::Name(name) => {
                (versions.named(name, id, group).map(|row| row.reference.clone()), quoted(name))
            }
            Wish::Version(version) => {
                (versions.has(version.sha256, id, group).then(|| version.clone()), version.sha256.to_string())
            }
        };
        let reference = reference.ok_or_else(|| {
            Error::new(Code::Conflict, format!("pattern {what} does not reach {host} (yet)"))
                .hint("see how far it is: tmctl pattern rollout list")
        })?;
        if !chosen.iter().any(|known| known.sha256 == reference.sha256) {
            chosen.push(reference);
        }
    }
    if chosen.len() > ScanSpec::MAX_PATTERNS {
        return Err(too_many());
    }
    if chosen.is_empty() {
        return Err(Error::new(Code::Conflict, format!("there is no pattern to scan {host} with"))
            .hint("import one (tmctl pattern import), or see whom it reaches (tmctl pattern list)"));
    }
    Ok(chosen)
}
