//! `/v1/events` and `/v1/incidents`: what happened, and what is to be done about it.

use axum::{Json, extract::State};
use tm_api::{
    Page,
    event::{EventQuery, EventView, IncidentQuery, IncidentView},
};
use tm_protocol::text::escape;

use super::{
    AppState, endpoints,
    error::Error,
    input::{self, Params},
    rfc3339,
};
use crate::{
    mitigation::advice::{self, Subject},
    store::{
        endpoints::Filter,
        events::{EventFilter, EventRow},
        incidents::{IncidentFilter, IncidentRow},
    },
};

/// Rows of each list if the client does not say.
const DEFAULT_EVENTS: u32 = 1000;
const DEFAULT_INCIDENTS: u32 = 100;

/// `GET /v1/events`.
pub(crate) async fn list(
    State(state): State<AppState>,
    Params(query): Params<EventQuery>,
) -> Result<Json<Page<EventView>>, Error> {
    let limit = input::rows(query.limit, DEFAULT_EVENTS)?;
    if let (Some(since), Some(until)) = (query.since_ms, query.until_ms)
        && since > until
    {
        return Err(Error::invalid("the period ends before it begins"));
    }
    let endpoint = match &query.endpoint {
        Some(_) if query.search.is_some() => {
            return Err(Error::invalid("name an endpoint or a search, not both"));
        }
        Some(target) => Some(endpoints::one(&state.store, target).await?.id),
        None => None,
    };
    let found = match &query.search {
        Some(search) => Some(Filter { terms: endpoints::terms(search)?, ..Filter::default() }),
        None => None,
    };
    let filter = EventFilter {
        endpoint,
        found,
        kind: query.kind,
        status: query.status,
        since_ms: query.since_ms,
        until_ms: query.until_ms,
        after: query.after,
    };
    // The newest have nothing after them; of the oldest one more is read, which only says that there is more.
    let wanted = if query.newest { limit } else { limit + 1 };
    let rows = state.store.events(&filter, query.newest, wanted).await?;
    let views = rows.into_iter().map(event_view).collect();
    Ok(Json(super::page_of(views, limit, |view| view.id)))
}

/// An event as clients see it.
pub(crate) fn event_view(row: EventRow) -> EventView {
    let advice = advice::of_event(&Subject {
        kind: row.kind,
        status: row.status,
        detail: &row.detail,
        endpoint: &row.endpoint,
        host: &row.host,
        task: row.task.as_deref(),
    });
    EventView {
        id: row.id,
        at: rfc3339(row.at_ms),
        endpoint: row.endpoint,
        host: row.host,
        kind: row.kind,
        status: row.status,
        detail: row.detail,
        message: row.message,
        advice,
        task: row.task,
        incident: row.incident,
    }
}

/// `GET /v1/incidents`.
pub(crate) async fn incidents(
    State(state): State<AppState>,
    Params(query): Params<IncidentQuery>,
) -> Result<Json<Vec<IncidentView>>, Error> {
    let limit = input::rows(query.limit, DEFAULT_INCIDENTS)?;
    let endpoint = match &query.endpoint {
        Some(target) => Some(endpoints::one(&state.store, target).await?.id),
        None => None,
    };
    let filter = IncidentFilter { endpoint, state: query.state, open_first: false };
    let rows = state.store.incidents(&filter, limit).await?;
    Ok(Json(rows.into_iter().map(incident_view).collect()))
}

/// An incident as clients see it.
pub(crate) fn incident_view(row: IncidentRow) -> IncidentView {
    IncidentView {
        id: row.id.to_string(),
        endpoint: row.endpoint.to_string(),
        host: row.host,
        pattern: row.pattern,
        rule: row.rule,
        state: row.state,
        detections: row.detections,
        open_detections: row.open,
        path: escape(&row.path),
        opened_at: rfc3339(row.opened_ms),
        changed_at: rfc3339(row.changed_ms),
        task: row.task,
    }
}
