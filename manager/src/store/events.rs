//! The Threat Event Log: append and read.
//!
//! **Invariant:** an event is written in the transaction of what it tells of.
//! **Invariant:** numbers grow in the order of commits, so that whoever reads on from the last number he saw
//! misses none: they are given at the end of a transaction, to all of its events, and the counter's row is held
//! from there to the commit.

use std::collections::{BTreeSet, HashMap};

use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::ids::{EndpointId, IncidentId, TaskId};

use super::{
    PARTS, Store, StoreError, Tx, agent_text,
    endpoints::{Condition, Filter},
    parts, places, rows,
};
use crate::metrics::METRICS;

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

/// A line that is written when its transaction ends.
#[derive(Debug)]
pub(super) struct Pending {
    endpoint: EndpointId,
    kind: EventKind,
    status: EventStatus,
    detail: String,
    message: String,
    task: Option<TaskId>,
    incident: Option<IncidentId>,
    at_ms: i64,
}

/// Appends one event, inside the transaction of what it tells of. An endpoint that is not known has no events.
///
/// # Errors
/// None here: the commit fails if the database refuses it.
pub(crate) async fn append(tx: &mut Tx, event: NewEvent<'_>) -> Result<(), StoreError> {
    tx.events.push(Pending {
        endpoint: event.endpoint,
        kind: event.kind,
        status: event.status,
        detail: agent_text(event.detail, MAX_DETAIL),
        message: agent_text(event.message, MAX_MESSAGE),
        task: event.task,
        incident: event.incident,
        at_ms: event.at_ms,
    });
    Ok(())
}

/// Numbers and writes what was appended in a transaction that is about to be committed; of which kinds that was.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(super) async fn write(tx: &mut Tx) -> Result<Vec<EventKind>, StoreError> {
    let mut pending = std::mem::take(&mut tx.events);
    if pending.is_empty() {
        return Ok(Vec::new());
    }
    let hosts = hosts(tx, pending.iter().map(|event| event.endpoint)).await?;
    pending.retain(|event| hosts.contains_key(&event.endpoint));
    let count = i64::try_from(pending.len()).unwrap_or(i64::MAX);
    if count == 0 {
        return Ok(Vec::new());
    }
    let last: i64 = sqlx::query("UPDATE counter SET value = value + $1 WHERE name = 'event' RETURNING value")
        .bind(count)
        .fetch_one(&mut **tx)
        .await
        .map_err(StoreError::query("number events"))?
        .get(0);
    let mut number = last - count;
    for part in parts(&pending, PARTS[0]) {
        let sql = format!(
            "INSERT INTO event (id, at_ms, endpoint_id, host, kind, status, detail, message, task_id,
                incident_id) VALUES {}",
            rows(part.len(), 10)
        );
        let mut query = sqlx::query(tx.engine.listed(sql));
        for event in part {
            number += 1;
            query = query
                .bind(number)
                .bind(event.at_ms)
                .bind(event.endpoint.to_string())
                .bind(hosts.get(&event.endpoint).cloned().unwrap_or_default())
                .bind(event.kind.word())
                .bind(event.status.word())
                .bind(event.detail.clone())
                .bind(event.message.clone())
                .bind(event.task.map(|task| task.to_string()))
                .bind(event.incident.map(|incident| incident.to_string()));
        }
        query.execute(&mut **tx).await.map_err(StoreError::query("append events"))?;
    }
    Ok(pending.iter().map(|event| event.kind).collect())
}

/// What endpoints are called now; those that are not known are left out.
async fn hosts(
    tx: &mut Tx,
    endpoints: impl Iterator<Item = EndpointId>,
) -> Result<HashMap<EndpointId, String>, StoreError> {
    let distinct: BTreeSet<EndpointId> = endpoints.collect();
    let distinct: Vec<EndpointId> = distinct.into_iter().collect();
    let mut hosts = HashMap::with_capacity(distinct.len());
    for part in parts(&distinct, PARTS[0]) {
        let sql = format!("SELECT id, host FROM endpoint WHERE id IN {}", places(1, part.len()));
        let mut query = sqlx::query(tx.engine.listed(sql));
        for endpoint in part {
            query = query.bind(endpoint.to_string());
        }
        let rows =
            query.fetch_all(&mut **tx).await.map_err(StoreError::query("look events' endpoints up"))?;
        for row in rows {
            let id: String = row.get(0);
            let id = id.parse().map_err(|_| StoreError::content("endpoint id", id))?;
            hosts.insert(id, row.get(1));
        }
    }
    Ok(hosts)
}

/// Appends one event of the manager itself, inside the transaction of what it tells of.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(crate) async fn append_own(
    tx: &mut Tx,
    status: EventStatus,
    detail: &str,
    message: &str,
    at_ms: i64,
) -> Result<(), StoreError> {
    let number = number(tx).await?;
    sqlx::query(
        "INSERT INTO event (id, at_ms, endpoint_id, host, kind, status, detail, message)
         VALUES ($1, $2, '', 'manager', $3, $4, $5, $6)",
    )
    .bind(number)
    .bind(at_ms)
    .bind(EventKind::Certificate.word())
    .bind(status.word())
    .bind(detail.to_owned())
    .bind(message.to_owned())
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("append an event of the manager"))?;
    METRICS.event(EventKind::Certificate);
    Ok(())
}

async fn number(tx: &mut Tx) -> Result<i64, StoreError> {
    let row = sqlx::query("UPDATE counter SET value = value + 1 WHERE name = 'event' RETURNING value")
        .fetch_one(&mut **tx)
        .await
        .map_err(StoreError::query("number an event"))?;
    Ok(row.get(0))
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
    /// Of this one.
    pub(crate) endpoint: Option<EndpointId>,
    /// Of those that fit this, as they are now.
    pub(crate) found: Option<Filter>,
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

/// Whose events.
#[derive(Debug)]
enum Whose {
    Everybodys,
    Of(Vec<EndpointId>),
    Found(Condition),
}

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
        let Some(bound) = self.bound(&filter, newest).await? else { return Ok(Vec::new()) };
        filter.after = filter.after.max(bound.after);
        let whose = match (filter.endpoint, &filter.found) {
            (Some(endpoint), _) => Whose::Of(vec![endpoint]),
            (None, Some(found)) => match self.endpoint_ids(found, FEW + 1).await? {
                none if none.is_empty() => return Ok(Vec::new()),
                few if few.len() <= FEW => Whose::Of(few),
                _many => Whose::Found(Condition::of(found)),
            },
            (None, None) => Whose::Everybodys,
        };
        let rows = statement(&filter, &whose, bound.through, newest, limit).fetch(self).await;
        let rows = rows.map_err(StoreError::query("read the events"))?;
        let mut events = rows.iter().map(event).collect::<Result<Vec<_>, _>>()?;
        if newest {
            events.reverse();
        }
        Ok(events)
    }

    /// Where in the log a period begins or ends, on the side that is read from, so that the log need not be read
    /// from there; `None` if nothing lies within the period. Clocks jump: numbers and times need not have the
    /// same order, but whatever lies within the period lies within this bound.
    async fn bound(&self, filter: &EventFilter, newest: bool) -> Result<Option<Bound>, StoreError> {
        let (sought, direction, limit) = match (newest, filter.since_ms, filter.until_ms) {
            (false, Some(since), _) => ("MIN(id)", "", since),
            (true, _, Some(until)) => ("MAX(id)", " DESC", until),
            (_, _, _) => return Ok(Some(Bound::default())),
        };
        // Where the log begins (or ends) within the period there is nothing to look for.
        let sql = format!("SELECT at_ms FROM event ORDER BY id{direction} LIMIT 1");
        let first = Statement { sql, values: Vec::new() };
        let first = first.fetch(self).await.map_err(StoreError::query("find a period's events"))?;
        let is_within = first.first().is_none_or(|row| (row.get::<i64, _>(0) >= limit) != newest);
        if is_within {
            return Ok(Some(Bound::default()));
        }
        let mut statement =
            Statement { sql: format!("SELECT {sought} FROM event WHERE 1 = 1"), values: Vec::new() };
        if let Some(since) = filter.since_ms {
            statement.add("at_ms >=", Value::Number(since));
        }
        if let Some(until) = filter.until_ms {
            statement.add("at_ms <", Value::Number(until));
        }
        let rows = statement.fetch(self).await.map_err(StoreError::query("find a period's events"))?;
        let number = rows.first().and_then(|row| row.get::<Option<i64>, _>(0));
        Ok(number.map(|number| {
            if newest {
                Bound { after: None, through: Some(number) }
            } else {
                Bound { after: Some(number - 1), through: None }
            }
        }))
    }
}

/// Numbers between which events are looked for.
#[derive(Debug, Clone, Copy, Default)]
struct Bound {
    after: Option<i64>,
    through: Option<i64>,
}

fn statement(
    filter: &EventFilter,
    whose: &Whose,
    through: Option<i64>,
    newest: bool,
    limit: u32,
) -> Statement {
    let mut statement = Statement {
        sql: "SELECT id, at_ms, endpoint_id, host, kind, status, detail, message, task_id, incident_id FROM event
              WHERE 1 = 1"
            .to_owned(),
        values: Vec::new(),
    };
    match whose {
        Whose::Everybodys => {}
        Whose::Of(endpoints) => {
            let mut places = Vec::with_capacity(endpoints.len());
            for endpoint in endpoints {
                statement.values.push(Value::Text(endpoint.to_string()));
                places.push(format!("${}", statement.values.len()));
            }
            statement.sql.push_str(&format!(" AND endpoint_id IN ({})", places.join(", ")));
        }
        Whose::Found(condition) => {
            // The condition's placeholders count from one. A function of a column has no index: the log is read
            // in order.
            statement.values.extend(condition.values.iter().cloned().map(Value::Text));
            statement.sql.push_str(&format!(
                " AND COALESCE(endpoint_id, '') IN (SELECT id FROM endpoint WHERE {})",
                condition.sql
            ));
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

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        time::Duration,
    };

    use tm_protocol::search;
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        endpoints::tests::put,
        tests::{is_sqlite, scratch},
    };

    fn new(endpoint: EndpointId, at_ms: i64) -> NewEvent<'static> {
        NewEvent {
            endpoint,
            kind: EventKind::Cleanup,
            status: EventStatus::Resolved,
            detail: "removed",
            message: "1 item done",
            task: Some(TaskId::new(Uuid::from_u128(5))),
            incident: None,
            at_ms,
        }
    }

    async fn write(store: &Store, event: NewEvent<'_>) {
        let mut tx = store.begin().await.unwrap();
        append(&mut tx, event).await.unwrap();
        Store::commit(tx).await.unwrap();
    }

    async fn numbers(store: &Store, filter: EventFilter, newest: bool, limit: u32) -> Vec<i64> {
        store.events(&filter, newest, limit).await.unwrap().iter().map(|event| event.id).collect()
    }

    #[tokio::test]
    async fn events_are_found_by_all_that_can_be_asked() {
        let (store, _folder) = scratch().await;
        let (a, b) = (put(&store, 1, "a", &[], true).await, put(&store, 2, "b", &[], true).await);
        write(&store, new(a, 100)).await;
        write(&store, NewEvent { kind: EventKind::Agent, status: EventStatus::Noted, ..new(b, 200) }).await;
        // The clock was set back.
        write(&store, NewEvent { status: EventStatus::Assessed, ..new(b, 50) }).await;
        write(&store, new(a, 300)).await;
        // An endpoint that is not known has no events, and no number is used up.
        write(&store, new(EndpointId::new(Uuid::from_u128(9)), 300)).await;
        write(&store, new(b, 400)).await;

        let all = EventFilter::default;
        assert_eq!(numbers(&store, all(), false, 9).await, [1, 2, 3, 4, 5]);
        assert_eq!(numbers(&store, all(), false, 2).await, [1, 2]);
        assert_eq!(numbers(&store, all(), true, 2).await, [4, 5]);
        assert_eq!(numbers(&store, EventFilter { after: Some(3), ..all() }, false, 9).await, [4, 5]);
        let of = |endpoint| EventFilter { endpoint: Some(endpoint), ..all() };
        assert_eq!(numbers(&store, of(a), false, 9).await, [1, 4]);
        let found = |text: &str| EventFilter {
            found: Some(Filter { terms: search::parse(text).unwrap(), ..Filter::default() }),
            ..all()
        };
        assert_eq!(numbers(&store, found("a"), false, 9).await, [1, 4]);
        assert_eq!(numbers(&store, found("a,b"), true, 3).await, [3, 4, 5]);
        assert_eq!(numbers(&store, found("c"), true, 3).await, [0; 0]);
        let many = EventFilter { kind: Some(EventKind::Cleanup), since_ms: Some(60), ..found("b,x") };
        let whose = Whose::Found(Condition::of(many.found.as_ref().unwrap()));
        let rows = statement(&many, &whose, Some(9), false, 9).fetch(&store).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.get::<i64, _>(0)).collect::<Vec<_>>(), [5]);
        for (filter, found) in [
            (EventFilter { kind: Some(EventKind::Agent), ..all() }, vec![2]),
            (EventFilter { status: Some(EventStatus::Resolved), ..all() }, vec![1, 4, 5]),
            (
                EventFilter { kind: Some(EventKind::Cleanup), status: Some(EventStatus::Assessed), ..all() },
                vec![3],
            ),
            (EventFilter { since_ms: Some(200), ..all() }, vec![2, 4, 5]),
            (EventFilter { until_ms: Some(200), ..all() }, vec![1, 3]),
            (EventFilter { since_ms: Some(100), until_ms: Some(301), ..all() }, vec![1, 2, 4]),
            (EventFilter { since_ms: Some(100), after: Some(1), ..of(a) }, vec![4]),
            (EventFilter { since_ms: Some(401), ..all() }, vec![]),
            (EventFilter { kind: Some(EventKind::Restore), ..all() }, vec![]),
        ] {
            assert_eq!(numbers(&store, filter.clone(), false, 9).await, found, "{filter:?}");
            assert_eq!(numbers(&store, filter.clone(), true, 9).await, found, "{filter:?}");
        }
        let first = &store.events(&all(), false, 1).await.unwrap()[0];
        assert_eq!((first.host.as_str(), first.at_ms, first.incident.as_ref()), ("a", 100, None));
        assert_eq!(first.task, Some(Uuid::from_u128(5).to_string()));
    }

    #[tokio::test]
    async fn a_host_name_stays_as_it_was_and_what_is_void_is_no_event() {
        let (store, _folder) = scratch().await;
        let a = put(&store, 1, "before", &[], true).await;
        write(&store, new(a, 1)).await;
        let mut tx = store.begin().await.unwrap();
        sqlx::query("UPDATE endpoint SET host = 'after'").execute(&mut *tx).await.unwrap();
        append(&mut tx, new(a, 2)).await.unwrap();
        drop(tx);
        let events = store.events(&EventFilter::default(), false, 9).await.unwrap();
        assert_eq!(events.iter().map(|e| (e.id, e.host.as_str())).collect::<Vec<_>>(), [(1, "before")]);
        let long = "é\0".repeat(5000);
        write(&store, NewEvent { message: &long, detail: &long, ..new(a, 3) }).await;
        let last = store.events(&EventFilter::default(), true, 1).await.unwrap().remove(0);
        assert!(last.message.len() <= 2 * MAX_MESSAGE && last.detail.len() <= 2 * MAX_DETAIL);
        assert_eq!(last.id, 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn whoever_reads_on_from_the_last_number_misses_none() {
        const WRITERS: u128 = 6;
        const EACH: i64 = 40;
        let (store, _folder) = scratch().await;
        let mut endpoints = Vec::new();
        for n in 1..=WRITERS {
            endpoints.push(put(&store, n, "h", &[], true).await);
        }
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (store, done) = (store.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let (mut seen, mut last) = (Vec::new(), None);
                loop {
                    let is_last = done.load(Ordering::SeqCst);
                    let next =
                        numbers(&store, EventFilter { after: last, ..EventFilter::default() }, false, 7)
                            .await;
                    last = next.last().copied().or(last);
                    let is_empty = next.is_empty();
                    seen.extend(next);
                    if is_last && is_empty {
                        return seen;
                    }
                }
            })
        };
        let writers: Vec<_> = endpoints
            .into_iter()
            .map(|endpoint| {
                let store = store.clone();
                tokio::spawn(async move {
                    for n in 0..EACH {
                        let mut tx = store.begin().await.unwrap();
                        append(&mut tx, new(endpoint, n)).await.unwrap();
                        // Room for another to overtake, if it could.
                        tokio::time::sleep(Duration::from_millis(u64::try_from(n % 3).unwrap())).await;
                        append(&mut tx, new(endpoint, n)).await.unwrap();
                        Store::commit(tx).await.unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
        done.store(true, Ordering::SeqCst);
        let seen = reader.await.unwrap();
        let all: Vec<i64> = (1..=i64::try_from(WRITERS).unwrap() * EACH * 2).collect();
        assert_eq!(seen, all);
    }

    /// How SQLite goes about a statement.
    async fn plan(store: &Store, mut statement: Statement) -> String {
        statement.sql.insert_str(0, "EXPLAIN QUERY PLAN ");
        let rows = statement.fetch(store).await.unwrap();
        rows.iter().map(|row| row.get::<String, _>(3)).collect::<Vec<_>>().join("; ")
    }

    #[tokio::test]
    async fn no_list_reads_the_whole_log_or_sorts_it() {
        let (store, _folder) = scratch().await;
        if !is_sqlite(&store) {
            return;
        }
        let one = EndpointId::new(Uuid::from_u128(1));
        let all = EventFilter::default;
        let of = |filter: &EventFilter| filter.endpoint.map_or(Whose::Everybodys, |id| Whose::Of(vec![id]));
        for (filter, index) in [
            (all(), "sqlite_autoindex_event_1"),
            (EventFilter { after: Some(5), ..all() }, "sqlite_autoindex_event_1 (id>?)"),
            (EventFilter { endpoint: Some(one), ..all() }, "event_by_endpoint (endpoint_id=?)"),
            (
                EventFilter { endpoint: Some(one), after: Some(5), ..all() },
                "event_by_endpoint (endpoint_id=? AND id>?)",
            ),
            (EventFilter { kind: Some(EventKind::Agent), ..all() }, "(kind=?)"),
            (EventFilter { status: Some(EventStatus::Noted), ..all() }, "event_by_status (status=?)"),
            (
                EventFilter { kind: Some(EventKind::Agent), status: Some(EventStatus::Noted), ..all() },
                "event_by_kind_and_status (kind=? AND status=?)",
            ),
            (EventFilter { since_ms: Some(5), after: Some(7), ..all() }, "sqlite_autoindex_event_1 (id>?)"),
        ] {
            for newest in [false, true] {
                let plan = plan(&store, statement(&filter, &of(&filter), None, newest, 1000)).await;
                assert!(plan.contains(index) && !plan.contains("TEMP B-TREE"), "{filter:?}: {plan}");
            }
        }
        // The control: a column without an index is noticed.
        let mut bad = statement(&all(), &Whose::Everybodys, None, false, 10);
        bad.sql = bad.sql.replace("ORDER BY id", "ORDER BY message");
        assert!(plan(&store, bad).await.contains("TEMP B-TREE"));
    }
}
