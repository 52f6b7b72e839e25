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
    let spec = TaskSpec::Scan(ScanSpec {
        paths: paths(&request.paths_b64)?,
        patterns: chosen_patterns(&state.store, &request.patterns).await?,
        limits: request.limits,
        options: request.options,
    });
    let found = orders::addressed(&state.store, &request.to).await?;
    if !request.when_connected {
        orders::all_connected(found.iter().map(|(row, _)| row))?;
    }
    let order = Order {
        spec: &spec,
        issuer: &actor.name,
        reason: &request.reason,
        expires_in_ms: times.expires_in_ms,
        deadline_ms: times.deadline_ms,
    };
    orders::fits_a_frame(&order)?;
    let recipients = found
        .into_iter()
        .map(|(row, _)| Recipient {
            task: TaskId::new(Uuid::now_v7()),
            endpoint: row.id,
            is_unsupported: !row.knows(TaskKind::Scan),
            host: row.host,
        })
        .collect();
    let rows = state.store.create_tasks(&order, recipients, now_ms()).await?;
    Ok(Json(orders::ordered(&state, rows)?))
}

fn paths(texts: &[String]) -> Result<Vec<PathBytes>, Error> {
    if texts.len() > ScanSpec::MAX_PATHS {
        return Err(Error::invalid(format!("a scan looks at {} paths at most", ScanSpec::MAX_PATHS)));
    }
    texts.iter().map(|text| orders::absolute(text, STANDARD.decode(text).ok())).collect()
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
        let row = patterns::one(store, name).await?;
        if row.published_ms.is_none() {
            return Err(Error::new(
                Code::Conflict,
                format!("pattern {} is a draft that nobody has signed; no agent would load it", quoted(name)),
            )
            .hint("sign and publish it: tmctl pattern import FILE"));
        }
        let reference = row.reference;
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
