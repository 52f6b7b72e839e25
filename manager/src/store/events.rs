//! The Threat Event Log: append and read.
//!
//! **Invariant:** an event is written in the transaction of what it tells of.
//! **Invariant:** numbers grow in the order of commits, so that whoever reads on from the last number he saw
//! misses none. Whoever appends holds the counter's row until he commits; an appender that waits for another
//! lock while he holds it may be chosen as a deadlock's victim on PostgreSQL, which is passing.

use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::ids::{EndpointId, IncidentId, TaskId};

use super::{Store, StoreError, Tx, agent_text};

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
    .bind(agent_text(event.detail, MAX_DETAIL))
    .bind(agent_text(event.message, MAX_MESSAGE))
    .bind(event.task.map(|task| task.to_string()))
    .bind(event.incident.map(|incident| incident.to_string()))
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("append an event"))?;
    Ok(())
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventRow {
    pub(crate) id: i64,
    pub(crate) at_ms: i64,
    pub(crate) endpoint: String,
    pub(crate) host: String,
    pub(crate) kind: EventKind,
    pub(crate) status: EventStatus,
    pub(crate) detail: String,
    pub(crate) message: String,
    pub(crate) task: Option<String>,
    pub(crate) incident: Option<String>,
}

/// Which events; all by default.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventFilter {
    /// Of any of these; `None` means of all.
    pub(crate) endpoints: Option<Vec<EndpointId>>,
    pub(crate) kind: Option<EventKind>,
    pub(crate) status: Option<EventStatus>,
    /// At or after this time.
    pub(crate) since_ms: Option<i64>,
    /// Before this time.
    pub(crate) until_ms: Option<i64>,
    /// With a greater number.
    pub(crate) after: Option<i64>,
}

/// A part of a statement, and what its placeholders stand for.
#[derive(Debug, Default)]
struct Statement {
    sql: String,
    values: Vec<Value>,
}

#[derive(Debug)]
enum Value {
    Text(String),
    Number(i64),
}

impl Statement {
    fn add(&mut self, condition: &str, value: Value) {
        self.values.push(value);
        self.sql.push_str(&format!(" AND {condition} ${}", self.values.len()));
    }

    async fn fetch(self, store: &Store) -> Result<Vec<AnyRow>, sqlx::Error> {
        let mut query = sqlx::query(AssertSqlSafe(self.sql));
        for value in self.values {
            query = match value {
                Value::Text(text) => query.bind(text),
                Value::Number(number) => query.bind(number),
            };
        }
        query.fetch_all(store.reader()).await
    }
}

/// Endpoints up to which their events are looked up one index entry after the other; beyond, the log is read in
/// order and each event's endpoint compared.
const FEW: usize = 1000;

impl Store {
    /// The events that fit, oldest first, at most `limit`: the oldest of them, or the `newest`.
    ///
    /// # Errors
    /// If the database cannot be read or holds an event that is not one.
    pub(crate) async fn events(
        &self,
        filter: &EventFilter,
        newest: bool,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let mut filter = filter.clone();
        let Some(bounds) = self.numbers_between(&filter).await? else { return Ok(Vec::new()) };
        filter.after = filter.after.max(bounds.0);
        let rows = statement(&filter, bounds.1, newest, limit).fetch(self).await;
        let rows = rows.map_err(StoreError::query("read the events"))?;
        let mut events = rows.iter().map(event).collect::<Result<Vec<_>, _>>()?;
        if newest {
            events.reverse();
        }
        Ok(events)
    }

    /// The numbers before the first and of the last event within a period, so that the log need not be read from
    /// its beginning to find them; `None` if there is none. Clocks jump: numbers and times need not have the same
    /// order, but whatever lies within the period lies within these numbers.
    async fn numbers_between(
        &self,
        filter: &EventFilter,
    ) -> Result<Option<(Option<i64>, Option<i64>)>, StoreError> {
        if filter.since_ms.is_none() && filter.until_ms.is_none() {
            return Ok(Some((None, None)));
        }
        let mut statement = Statement {
            sql: "SELECT MIN(id), MAX(id) FROM event WHERE 1 = 1".to_owned(),
            values: Vec::new(),
        };
        if let Some(since) = filter.since_ms {
            statement.add("at_ms >=", Value::Number(since));
        }
        if let Some(until) = filter.until_ms {
            statement.add("at_ms <", Value::Number(until));
        }
        let rows = statement.fetch(self).await.map_err(StoreError::query("find a period's events"))?;
        let bound = |column| rows.first().and_then(|row| row.get::<Option<i64>, _>(column));
        Ok(match (bound(0), bound(1)) {
            (Some(first), Some(last)) => Some((Some(first - 1), Some(last))),
            (_, _) => None,
        })
    }
}

fn statement(filter: &EventFilter, through: Option<i64>, newest: bool, limit: u32) -> Statement {
    let mut statement = Statement {
        sql: "SELECT id, at_ms, endpoint_id, host, kind, status, detail, message, task_id, incident_id FROM event
              WHERE 1 = 1"
            .to_owned(),
        values: Vec::new(),
    };
    match filter.endpoints.as_deref() {
        None => {}
        Some([one]) => statement.add("endpoint_id =", Value::Text(one.to_string())),
        Some(several) => {
            // A function of a column has no index: the log is then read in order.
            let column = if several.len() <= FEW { "endpoint_id" } else { "COALESCE(endpoint_id, '')" };
            let mut places = Vec::with_capacity(several.len());
            for endpoint in several {
                statement.values.push(Value::Text(endpoint.to_string()));
                places.push(format!("${}", statement.values.len()));
            }
            statement.sql.push_str(&format!(" AND {column} IN ({})", places.join(", ")));
        }
    }
    if let Some(kind) = filter.kind {
        statement.add("kind =", Value::Text(kind.word().to_owned()));
    }
    if let Some(status) = filter.status {
        statement.add("status =", Value::Text(status.word().to_owned()));
    }
    // The period is in the numbers already; this is for what lies between them by a clock that jumped.
    if let Some(since) = filter.since_ms {
        statement.add("COALESCE(at_ms, 0) >=", Value::Number(since));
    }
    if let Some(until) = filter.until_ms {
        statement.add("COALESCE(at_ms, 0) <", Value::Number(until));
    }
    if let Some(after) = filter.after {
        statement.add("id >", Value::Number(after));
    }
    if let Some(through) = through {
        statement.add("id <=", Value::Number(through));
    }
    let direction = if newest { " DESC" } else { "" };
    statement.sql.push_str(&format!(" ORDER BY id{direction} LIMIT {limit}"));
    statement
}

fn event(row: &AnyRow) -> Result<EventRow, StoreError> {
    let (kind, status): (String, String) = (row.get(4), row.get(5));
    Ok(EventRow {
        id: row.get(0),
        at_ms: row.get(1),
        endpoint: row.get(2),
        host: row.get(3),
        kind: EventKind::from_word(&kind).ok_or_else(|| StoreError::content("event kind", kind))?,
        status: EventStatus::from_word(&status).ok_or_else(|| StoreError::content("event status", status))?,
        detail: row.get(6),
        message: row.get(7),
        task: row.get(8),
        incident: row.get(9),
    })
}
