//! A fleet of 50,000 endpoints with two million events: every list and the overview within half a second. Runs
//! with `TM_LONG=1`, prints what it measured, and is as good as the build it runs in.

use std::time::{Duration, Instant};

use tm_protocol::search;

use super::*;

const ENDPOINTS: i64 = 50_000;
const EVENTS: i64 = 2_000_000;
const FLOOR: Duration = Duration::from_millis(500);

async fn fill(store: &Store) {
    let mut tx = store.begin().await.unwrap();
    for sql in [
        format!(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ENDPOINTS})
             INSERT INTO endpoint (id, host, host_key, group_name, agent_version, enrolled_ms, token_id, manager_id,
                session_epoch, task_kinds, stored_through)
             SELECT '018f3c1e-6b5a-7000-8000-' || SUBSTR('000000000000' || CAST(i AS TEXT), -12),
                'host-' || CAST(i AS TEXT), 'host-' || CAST(i AS TEXT), 'default', '0.1.0', 1, 't',
                CASE WHEN i % 10 = 0 THEN NULL ELSE 'm' END, 0, '[1,2,3]', 0 FROM n"
        ),
        format!(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {EVENTS})
             INSERT INTO event (id, at_ms, endpoint_id, host, kind, status, detail, message, task_id)
             SELECT i, i * 1000, '018f3c1e-6b5a-7000-8000-' ||
                SUBSTR('000000000000' || CAST(1 + i % {ENDPOINTS} AS TEXT), -12),
                'host-' || CAST(1 + i % {ENDPOINTS} AS TEXT),
                CASE WHEN i % 100 = 0 THEN 'cleanup' WHEN i % 100000 = 1 THEN 'restore' ELSE 'scan-administrator' END,
                CASE WHEN i % 50 = 0 THEN 'unsuccessful' WHEN i % 100000 = 1 THEN 'rolled-back' ELSE 'scanned' END,
                'no-threat-found', 'no threat found in 12345 files', '018f3c1e-6b5a-7000-8000-000000000001' FROM n"
        ),
        format!(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)
             INSERT INTO incident (id, endpoint_id, pattern, rule, state, before, detail, path, opened_ms, changed_ms)
             SELECT '018f3c1e-6b5a-7000-9000-' || SUBSTR('000000000000' || CAST(i AS TEXT), -12), '018f3c1e-6b5a-7000-8000-' ||
                SUBSTR('000000000000' || CAST(1 + i % {ENDPOINTS} AS TEXT), -12), 'p',
                'r' || CAST(i AS TEXT),
                CASE WHEN i % 100 = 0 THEN 'awaiting-cleanup' WHEN i % 1000 = 1 THEN 'unresolved' ELSE 'resolved' END,
                'awaiting-cleanup', '', CAST('/a' AS BLOB), i, i FROM n"
        ),
    ] {
        sqlx::query(AssertSqlSafe(sql)).execute(&mut *tx).await.unwrap();
    }
    Store::commit(tx).await.unwrap();
}

#[tokio::test]
async fn lists_and_overview_of_a_large_fleet_are_quick() {
    if std::env::var_os("TM_LONG").is_none() {
        return;
    }
    let (store, _folder) = scratch().await;
    if !crate::store::tests::is_sqlite(&store) {
        return;
    }
    fill(&store).await;
    let slow = std::cell::RefCell::new(Vec::new());
    let note = |name: &str, rows: usize, took: Duration| {
        println!("{name}: {rows} rows, {took:?}");
        if took > FLOOR {
            slow.borrow_mut().push(format!("{name}: {took:?}"));
        }
    };
    let of = |text: &str| Filter { terms: search::parse(text).unwrap(), ..Filter::default() };
    let all = EventFilter::default;
    let found = |text: &str| EventFilter { found: Some(of(text)), ..all() };
    let one = store.endpoints(&of("host-77")).await.unwrap().pop().map(|row| row.id);
    let last = EVENTS * 1000;
    for (name, filter) in [
        ("all", all()),
        ("one endpoint", EventFilter { endpoint: one, ..all() }),
        ("search for few", found("host-777")),
        ("search for many", found("host-7")),
        ("search for all", found("host-")),
        ("kind, common", EventFilter { kind: Some(EventKind::ScanAdministrator), ..all() }),
        ("kind, rare", EventFilter { kind: Some(EventKind::Restore), ..all() }),
        ("kind, none", EventFilter { kind: Some(EventKind::Agent), ..all() }),
        ("status, rare", EventFilter { status: Some(EventStatus::RolledBack), ..all() }),
        ("status, common", EventFilter { status: Some(EventStatus::Unsuccessful), ..all() }),
        (
            "kind and status that seldom meet",
            EventFilter {
                kind: Some(EventKind::ScanAdministrator),
                status: Some(EventStatus::RolledBack),
                ..all()
            },
        ),
        ("the last hour", EventFilter { since_ms: Some(last - HOUR_MS), ..all() }),
        ("all but the last hour", EventFilter { until_ms: Some(last - HOUR_MS), ..all() }),
        (
            "one hour of old",
            EventFilter { since_ms: Some(last / 2), until_ms: Some(last / 2 + HOUR_MS), ..all() },
        ),
        ("everything since ever", EventFilter { since_ms: Some(1), ..all() }),
        (
            "failures of the last day of one endpoint",
            EventFilter {
                endpoint: one,
                since_ms: Some(last - 24 * HOUR_MS),
                status: Some(EventStatus::Unsuccessful),
                ..all()
            },
        ),
        ("follow at the end", EventFilter { after: Some(EVENTS - 3), ..all() }),
    ] {
        for newest in [false, true] {
            let name = format!("{name}{}", if newest { ", newest" } else { "" });
            let mut best: Option<(Duration, usize)> = None;
            // The machine may have other things to do.
            for _ in 0..3 {
                let began = Instant::now();
                let rows = store.events(&filter, newest, 1000).await.unwrap().len();
                best = best.into_iter().chain([(began.elapsed(), rows)]).min();
            }
            let (took, rows) = best.unwrap();
            note(&name, rows, took);
        }
    }
    let began = Instant::now();
    let overview = store.overview().await.unwrap();
    note("overview", overview.queries.len(), began.elapsed());
    for query in Query::ALL {
        let began = Instant::now();
        let rows = store.endpoints(&Filter { query: Some(query), ..Filter::default() }).await.unwrap().len();
        let counted = overview.queries.iter().find(|(q, ..)| *q == query).map(|(_, count, _)| *count);
        assert_eq!(counted, Some(rows as u64), "{query}");
        // Tens of thousands of whole rows are not one list on a screen.
        println!("endpoints of {query}: {rows} rows, {:?}", began.elapsed());
    }
    for (name, filter) in [
        ("incidents", IncidentFilter::default()),
        (
            "incidents that wait",
            IncidentFilter { state: Some(IncidentState::AwaitingCleanup), ..IncidentFilter::default() },
        ),
    ] {
        let began = Instant::now();
        let rows = store.incidents(&filter, 1000).await.unwrap().len();
        note(name, rows, began.elapsed());
    }
    assert!(slow.borrow().is_empty(), "{:#?}", slow.borrow());
}
