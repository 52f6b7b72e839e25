//! The Threat Event Log: append and read.
//!
//! **Invariant:** an event is written in the transaction of what it tells of.
//! **Invariant:** numbers grow in the order of commits, so that whoever reads on from the last number he saw
//! misses none. Whoever appends holds the counter's row until he commits; an appender that waits for another
//! lock while he holds it may be chosen as a deadlock's victim on PostgreSQL, which is passing.

use sqlx::Row as _;
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::ids::{EndpointId, IncidentId, TaskId};

use super::{StoreError, Tx};

/// Longest detail and message that is kept, in bytes; the rest is cut off.
const MAX_DETAIL: usize = 64;
const MAX_MESSAGE: usize = 2048;

/// One line to be written.
#[derive(Debug, Clone)]
pub(crate) struct NewEvent<'a> {
    pub(crate) endpoint: EndpointId,
    pub(crate) kind: EventKind,
    pub(crate) status: EventStatus,
    /// A failure's code or a stable word; may be empty.
    pub(crate) detail: &'a str,
    /// What happened, for people; no full stop.
    pub(crate) message: &'a str,
    pub(crate) task: Option<TaskId>,
    pub(crate) incident: Option<IncidentId>,
    /// Now by the manager's clock, in milliseconds since 1970.
    pub(crate) at_ms: i64,
}

/// Appends one event, inside the transaction of what it tells of. An endpoint that is not known has no events.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(crate) async fn append(tx: &mut Tx, event: NewEvent<'_>) -> Result<(), StoreError> {
    let host: Option<String> = sqlx::query("SELECT host FROM endpoint WHERE id = $1")
        .bind(event.endpoint.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look an event's endpoint up"))?
        .map(|row| row.get(0));
    let Some(host) = host else { return Ok(()) };
    let number: i64 =
        sqlx::query("UPDATE counter SET value = value + 1 WHERE name = 'event' RETURNING value")
            .fetch_one(&mut **tx)
            .await
            .map_err(StoreError::query("number an event"))?
            .get(0);
    sqlx::query(
        "INSERT INTO event (id, at_ms, endpoint_id, host, kind, status, detail, message, task_id, incident_id)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(number)
    .bind(event.at_ms)
    .bind(event.endpoint.to_string())
    .bind(host)
    .bind(event.kind.word())
    .bind(event.status.word())
    .bind(cut(event.detail, MAX_DETAIL).to_owned())
    .bind(cut(event.message, MAX_MESSAGE).to_owned())
    .bind(event.task.map(|task| task.to_string()))
    .bind(event.incident.map(|incident| incident.to_string()))
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("append an event"))?;
    Ok(())
}

/// The beginning of `text` that has at most `most` bytes.
fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}
