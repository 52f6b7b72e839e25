//! `/v1/status` and `/v1/endpoints/{target}/why`: what waits, and why.

use axum::{Json, extract::State};
use tm_api::{
    status::{Query, QueryCount, StatusView, WhyView},
    task::TaskView,
};

use super::{AppState, certificates, endpoints, error::Error, events, input::Named, tasks};
use crate::{
    mitigation::advice::{self, Standing},
    store::{events::EventFilter, incidents::IncidentFilter, tasks::TaskFilter},
};

/// Rows of each part of an explanation.
const INCIDENTS: u32 = 100;
const TASKS: u32 = 20;
const EVENTS: u32 = 10;

pub(crate) async fn show(State(state): State<AppState>) -> Result<Json<StatusView>, Error> {
    let overview = state.store.overview().await?;
    let certificates = certificates::summary(&state).await?;
    let count = |wanted: Query| {
        overview.queries.iter().find(|(query, ..)| *query == wanted).map_or(0, |(_, count, _)| *count)
    };
    Ok(Json(StatusView {
        connected: count(Query::Connected),
        disconnected: count(Query::Disconnected),
        // An endpoint exists by its enrollment so far, and enrolls with an agent.
        agentless: count(Query::Agentless),
        endpoints: overview.endpoints,
        tasks_queued: overview.tasks_queued,
        tasks_running: overview.tasks_running,
        incidents_open: overview.incidents_open,
        certificates,
        queries: overview
            .queries
            .into_iter()
            .map(|(name, count, queued_automatically)| QueryCount { name, count, queued_automatically })
            .collect(),
    }))
}

pub(crate) async fn why(State(state): State<AppState>, Named(target): Named) -> Result<Json<WhyView>, Error> {
    let row = endpoints::one(&state.store, &target).await?;
    let (id, connected) = (row.id, row.connected);
    let queries = state.store.queries_of(id).await?;
    let filter = IncidentFilter { endpoint: Some(id), state: None, open_first: true };
    let incidents = state.store.incidents(&filter, INCIDENTS).await?;
    let filter = TaskFilter { endpoint: Some(id), live_first: true, ..TaskFilter::default() };
    let rows = state.store.tasks(&filter, TASKS).await?;
    let tasks: Vec<TaskView> = rows.into_iter().map(tasks::view).collect::<Result<_, _>>()?;
    let filter = EventFilter { endpoint: Some(id), ..EventFilter::default() };
    let newest = state.store.events(&filter, true, EVENTS).await?;
    let standing: Vec<_> = incidents.iter().map(|row| (row.state, row.detail.clone())).collect();
    let live: Vec<TaskView> = tasks.iter().filter(|task| !task.state.is_final()).cloned().collect();
    let endpoint = endpoints::view(row);
    // A name that several share would make the advised command fail.
    let is_unique = endpoints::one(&state.store, &endpoint.host).await.is_ok_and(|row| row.id == id);
    let advice = advice::of_endpoint(&Standing {
        endpoint: &endpoint.id,
        host: if is_unique { &endpoint.host } else { "" },
        connected,
        incidents: &standing,
        tasks: &live,
    });
    Ok(Json(WhyView {
        queries,
        incidents: incidents.into_iter().map(events::incident_view).collect(),
        tasks,
        events: newest.into_iter().map(events::event_view).collect(),
        advice,
        endpoint,
    }))
}
