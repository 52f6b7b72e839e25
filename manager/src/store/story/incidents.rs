//! Incidents from their first find to their end, and what an overview makes of them.

use super::*;

#[tokio::test]
async fn a_threat_is_found_cleaned_and_put_back() {
    let lab = Lab::start().await;
    let (a, b) = (find("/srv/a", "evil"), find("/srv/b", "evil"));
    let scan = lab.scan(&[a.clone(), b.clone()], 100).await;
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 2, 2)]);
    assert_eq!(
        lab.last_event().await,
        (EventKind::ScanAdministrator, EventStatus::Assessed, "manual-cleanup-needed".to_owned())
    );
    let shown = lab.store.detections(scan, 0, 9).await.unwrap();
    assert_eq!(shown[0].key, a.key().to_string());
    assert_eq!(shown[1].incident, Some(lab.incidents().await[0].id.to_string()));

    let task = lab.cleanup(&[], false).await.unwrap().remove(0);
    assert_eq!((task.kind.as_str(), task.state, task.dry_run), ("cleanup", TaskState::Queued, false));
    assert_eq!(lab.standing().await, [(IncidentState::Cleaning, 2, 2)]);
    assert_eq!(lab.incidents().await[0].task, Some(task.id.to_string()));
    assert_eq!(lab.last_event().await, (EventKind::Cleanup, EventStatus::InProgress, "ordered".to_owned()));

    lab.begin(task.id, 1001).await;
    let items = vec![item(&a, ItemVerdict::Vaulted, Some(7), None), item(&b, ItemVerdict::Gone, None, None)];
    lab.say(ReportBody::Items { task: task.id, items: items.clone() }, 1002).await;
    assert_eq!(lab.standing().await, [(IncidentState::Cleaning, 2, 0)]);
    lab.end(task.id, Outcome::Treated(tally(&items, 0)), 1003).await;
    assert_eq!(lab.standing().await, [(IncidentState::Resolved, 2, 0)]);
    let done = lab.task(task.id).await;
    assert_eq!(done.state, TaskState::Done);
    assert!(matches!(done.result, Some(ResultRow::Treatment(sum)) if (sum.done, sum.gone) == (1, 1)));
    assert_eq!(lab.last_event().await, (EventKind::Cleanup, EventStatus::Resolved, "removed".to_owned()));
    let shown = lab.store.items(task.id, 0, 9).await.unwrap();
    assert_eq!(
        shown.iter().map(|row| row.verdict).collect::<Vec<_>>(),
        [ItemVerdict::Vaulted, ItemVerdict::Gone]
    );
    assert_eq!(shown[0].detections, [a.key().to_string()]);
    let vault = lab.store.vault(VaultFilter::default(), 9).await.unwrap();
    assert_eq!((vault.len(), vault[0].path.as_slice(), vault[0].vaulted_ms), (1, &b"/srv/a"[..], 1002));

    // To another place: it stays in the vault, and the threat stays resolved.
    let copy = lab.restore(&[7], Some("/tmp/a")).await.unwrap().remove(0).id;
    lab.begin(copy, 2001).await;
    let back = ItemReport { detections: Vec::new(), ..item(&a, ItemVerdict::Restored, Some(7), None) };
    lab.say(ReportBody::Items { task: copy, items: vec![back.clone()] }, 2002).await;
    lab.end(copy, Outcome::Treated(tally(std::slice::from_ref(&back), 0)), 2003).await;
    assert_eq!(lab.last_event().await.2, "restored-elsewhere");
    assert_eq!(lab.standing().await, [(IncidentState::Resolved, 2, 0)]);
    assert_eq!(lab.store.vault(VaultFilter::default(), 9).await.unwrap().len(), 1);

    let restore = lab.restore(&[7], None).await.unwrap().remove(0).id;
    assert_eq!(
        lab.restore(&[7], None).await,
        Err(RestoreRefusal::UnderWay { item: vault_id(7), task: restore })
    );
    lab.begin(restore, 2101).await;
    lab.say(ReportBody::Items { task: restore, items: vec![back.clone()] }, 2102).await;
    lab.end(restore, Outcome::Treated(tally(&[back], 0)), 2103).await;
    assert_eq!(lab.standing().await, [(IncidentState::RolledBack, 2, 1)]);
    assert_eq!(lab.last_event().await, (EventKind::Restore, EventStatus::RolledBack, "restored".to_owned()));
    assert_eq!(lab.events().await.last().unwrap().incident, Some(lab.incidents().await[0].id.to_string()));
    assert_eq!(lab.store.vault(VaultFilter::default(), 9).await.unwrap(), []);
    assert_eq!(lab.restore(&[7], None).await, Err(RestoreRefusal::Unknown(vault_id(7))));

    // Found again: a new incident. The old one is closed.
    lab.scan(std::slice::from_ref(&a), 3000).await;
    assert_eq!(
        lab.standing().await,
        [(IncidentState::AwaitingCleanup, 1, 1), (IncidentState::RolledBack, 2, 1)]
    );
}

#[tokio::test]
async fn what_is_found_again_joins_and_counts_once() {
    let lab = Lab::start().await;
    let (a, b, c) = (find("/a", "evil"), find("/b", "evil"), find("/a", "other"));
    lab.scan(&[a.clone(), c.clone()], 100).await;
    lab.scan(&[a.clone(), b.clone()], 200).await;
    let mut standing = lab.standing().await;
    standing.sort_by_key(|(_, all, _)| *all);
    assert_eq!(
        standing,
        [(IncidentState::AwaitingCleanup, 1, 1), (IncidentState::AwaitingCleanup, 2, 2)],
        "one for each rule"
    );
    assert_eq!(lab.count("SELECT COUNT(*) FROM detection").await, 4, "each scan keeps its own");
    // Cleaned once, both scans' finds of it are settled.
    let items = [&a, &b, &c].map(|find| item(find, ItemVerdict::Gone, None, None)).to_vec();
    lab.clean(items, Outcome::Treated).await;
    assert_eq!(lab.count("SELECT COUNT(*) FROM detection WHERE settled_ms IS NULL").await, 0);
    assert_eq!(lab.last_event().await.2, "no-longer-exists");
    assert!(
        lab.standing().await.iter().all(|(state, _, open)| (*state, *open) == (IncidentState::Resolved, 0))
    );
}

#[tokio::test]
async fn what_a_cleanup_leaves_decides_where_the_incident_stands() {
    let refused = |find: &Detection| item(find, ItemVerdict::Refused, None, Some("likely-false-positive"));
    let vaulted = |find: &Detection| item(find, ItemVerdict::Vaulted, Some(1), None);
    let (a, b) = (find("/a", "evil"), find("/b", "evil"));
    type End = fn(Tally) -> Outcome;
    let interrupted: End = |_| Outcome::Failed(Failure::new("interrupted", "the agent was restarted"));
    type Case = (&'static str, Vec<ItemReport>, End, IncidentState, TaskState, &'static str);
    let cases: [Case; 8] = [
        (
            "one is refused",
            vec![vaulted(&a), refused(&b)],
            Outcome::Treated,
            IncidentState::Unresolved,
            TaskState::Failed,
            "likely-false-positive",
        ),
        (
            "called off before anything",
            vec![],
            |_| Outcome::Cancelled(None),
            IncidentState::AwaitingCleanup,
            TaskState::Cancelled,
            "cancelled",
        ),
        (
            "called off between two",
            vec![vaulted(&a)],
            |tally| Outcome::TreatedUntilCancelled(Tally { left: 1, ..tally }),
            IncidentState::AwaitingCleanup,
            TaskState::Cancelled,
            "cancelled",
        ),
        (
            "out of time after a refusal",
            vec![refused(&a)],
            |tally| Outcome::TreatedUntilDeadline(Tally { left: 1, ..tally }),
            IncidentState::Unresolved,
            TaskState::Failed,
            "deadline",
        ),
        (
            "cut off, but everything was done",
            vec![vaulted(&a), item(&b, ItemVerdict::Gone, None, None)],
            interrupted,
            IncidentState::Resolved,
            TaskState::Failed,
            "interrupted",
        ),
        (
            "cut off before anything",
            vec![],
            interrupted,
            IncidentState::AwaitingCleanup,
            TaskState::Failed,
            "interrupted",
        ),
        (
            "expired on the endpoint",
            vec![],
            |_| Outcome::Expired,
            IncidentState::AwaitingCleanup,
            TaskState::Expired,
            "expired",
        ),
        (
            "a sum of another order",
            vec![],
            |_| Outcome::Treated(Tally { dry_run: true, done: 2, ..Tally::default() }),
            IncidentState::AwaitingCleanup,
            TaskState::Failed,
            "wrong-outcome",
        ),
    ];
    for (name, items, outcome, state, task_state, detail) in cases {
        let lab = Lab::start().await;
        lab.scan(&[a.clone(), b.clone()], 100).await;
        let task = if outcome(Tally::default()) == Outcome::Expired {
            let task = lab.cleanup(&[], false).await.unwrap()[0].id;
            lab.say(ReportBody::Accepted { task }, 1001).await;
            lab.end(task, Outcome::Expired, 1002).await;
            task
        } else {
            lab.clean(items, outcome).await
        };
        assert_eq!(lab.incidents().await[0].state, state, "{name}");
        assert_eq!(lab.task(task).await.state, task_state, "{name}");
        let (kind, status, said) = lab.last_event().await;
        assert_eq!(
            (kind, status, said.as_str()),
            (EventKind::Cleanup, EventStatus::Unsuccessful, detail),
            "{name}"
        );
        assert_eq!(lab.count("SELECT COUNT(*) FROM incident WHERE state = 'cleaning'").await, 0, "{name}");
    }
}

#[tokio::test]
async fn an_unresolved_incident_is_tried_again_and_waits_as_before_if_that_is_called_off() {
    let lab = Lab::start().await;
    let a = find("/a", "evil");
    lab.scan(std::slice::from_ref(&a), 100).await;
    lab.clean(vec![item(&a, ItemVerdict::Failed, None, Some("immutable"))], Outcome::Treated).await;
    let row = lab.incidents().await.remove(0);
    assert_eq!((row.state, row.detail.as_str()), (IncidentState::Unresolved, "immutable"));
    let again = lab.cleanup(&[], false).await.unwrap()[0].id;
    assert_eq!(lab.standing().await, [(IncidentState::Cleaning, 1, 1)]);
    assert!(matches!(lab.store.cancel_task(again, "root", 5).await.unwrap(), Cancelled::Yes(_)));
    assert_eq!(lab.standing().await, [(IncidentState::Unresolved, 1, 1)]);
    // Away for a moment, and there again when it is looked at.
    let task = lab.cleanup(&[], false).await.unwrap()[0].id;
    lab.begin(task, 10).await;
    lab.say(ReportBody::Items { task, items: vec![item(&a, ItemVerdict::Vaulted, Some(3), None)] }, 11).await;
    assert_eq!(lab.standing().await, [(IncidentState::Cleaning, 1, 0)]);
    let back = item(&a, ItemVerdict::Failed, Some(3), Some("came-back"));
    lab.say(ReportBody::Items { task, items: vec![back.clone()] }, 12).await;
    lab.end(task, Outcome::Treated(tally(&[back], 0)), 13).await;
    let row = lab.incidents().await.remove(0);
    assert_eq!((row.state, row.open, row.detail.as_str()), (IncidentState::Unresolved, 1, "came-back"));
    assert_eq!(lab.store.items(task, 0, 9).await.unwrap().len(), 1, "told twice, one item");
    assert_eq!(lab.last_event().await.2, "came-back");
    assert_eq!(lab.store.vault(VaultFilter::default(), 9).await.unwrap().len(), 1, "the copy is kept");
}

#[tokio::test]
async fn what_is_told_after_the_end_still_counts() {
    let lab = Lab::start().await;
    let a = find("/a", "evil");
    lab.scan(std::slice::from_ref(&a), 100).await;
    let task = lab.clean(vec![], |_| Outcome::Cancelled(None)).await;
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);
    lab.say(ReportBody::Items { task, items: vec![item(&a, ItemVerdict::Vaulted, Some(1), None)] }, 2000)
        .await;
    assert_eq!(lab.standing().await, [(IncidentState::Resolved, 1, 0)]);
    assert_eq!(lab.task(task).await.state, TaskState::Cancelled);
}

#[tokio::test]
async fn a_large_incident_is_cleaned_by_several_tasks_and_a_file_by_one() {
    let lab = Lab::start().await;
    let many: Vec<Detection> = (0..1400)
        .flat_map(|n| {
            ["x", "y"].map(|member| Detection {
                member: vec![PathBytes(member.as_bytes().to_vec())],
                ..find(&format!("/{n:04}"), "evil")
            })
        })
        .collect();
    lab.scan(&many, 100).await;
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 2800, 2800)]);
    let tasks = lab.cleanup(&[], false).await.unwrap();
    assert_eq!(tasks.len(), 3);
    let due = lab.store.claim(&lab.live(1).await, 1).await.unwrap();
    let mut files: Vec<(Sha256, usize)> = Vec::new();
    for (at, due) in due.iter().enumerate() {
        let TaskSpec::Cleanup(spec) = &due.spec else { panic!("a cleanup") };
        assert!(spec.detections.len() <= 1000, "{}", spec.detections.len());
        files.extend(spec.detections.iter().map(|key| (*key, at)));
    }
    assert_eq!(files.len(), 2800);
    for pair in many.chunks(2) {
        let task_of = |find: &Detection| {
            let wanted = find.key();
            files.iter().find(|(key, _)| *key == wanted).unwrap().1
        };
        assert_eq!(task_of(&pair[0]), task_of(&pair[1]), "{}", pair[0].path);
    }
    let cancelled = Outcome::Cancelled(None);
    lab.end(tasks[0].id, cancelled.clone(), 2).await;
    lab.end(tasks[1].id, cancelled.clone(), 3).await;
    assert_eq!(lab.incidents().await[0].state, IncidentState::Cleaning, "one still works on it");
    lab.end(tasks[2].id, cancelled, 4).await;
    assert_eq!(lab.incidents().await[0].state, IncidentState::AwaitingCleanup);
}

#[tokio::test]
async fn a_cleanup_is_ordered_by_key_once_and_a_dry_run_moves_nothing() {
    let lab = Lab::start().await;
    let (a, b) = (find("/a", "evil"), find("/b", "evil"));
    assert_eq!(lab.cleanup(&[], false).await, Err(CleanupRefusal::Nothing(Some("web-07".to_owned()))));
    lab.scan(&[a.clone(), b.clone()], 100).await;
    let start = a.key().to_string()[..8].to_owned();
    assert_eq!(
        lab.cleanup(&["00000000".to_owned()], false).await,
        Err(CleanupRefusal::Unknown("00000000".to_owned()))
    );

    let dry = lab.cleanup(std::slice::from_ref(&start), true).await.unwrap().remove(0);
    assert!(dry.dry_run);
    lab.begin(dry.id, 1).await;
    let would = item(&a, ItemVerdict::WouldVault, None, None);
    lab.say(ReportBody::Items { task: dry.id, items: vec![would.clone()] }, 2).await;
    lab.end(dry.id, Outcome::Treated(Tally { dry_run: true, ..tally(&[would], 0) }), 3).await;
    assert_eq!(lab.task(dry.id).await.state, TaskState::Done);
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 2, 2)]);
    assert_eq!(lab.events().await.len(), 1, "the scan's");
    assert_eq!(lab.store.vault(VaultFilter::default(), 9).await.unwrap(), []);

    let task = lab.cleanup(std::slice::from_ref(&start), false).await.unwrap().remove(0).id;
    let under_way = Err(CleanupRefusal::UnderWay { task, host: "web-07".to_owned() });
    assert_eq!(lab.cleanup(std::slice::from_ref(&start), false).await, under_way);
    assert_eq!(lab.cleanup(&[], false).await, under_way);
    let whole = [a.key().to_string(), start.clone()];
    assert_eq!(lab.cleanup(&whole, true).await.unwrap().len(), 1, "a dry run may be asked for at any time");
    // Only one of two was asked for, so the incident still waits for a person.
    lab.begin(task, 5).await;
    let items = vec![item(&a, ItemVerdict::Vaulted, Some(1), None)];
    lab.say(ReportBody::Items { task, items: items.clone() }, 6).await;
    lab.end(task, Outcome::Treated(tally(&items, 0)), 7).await;
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 2, 1)]);
    assert_eq!(
        lab.last_event().await,
        (EventKind::Cleanup, EventStatus::Assessed, "manual-cleanup-needed".to_owned())
    );

    // Two keys that begin alike.
    let mut tx = lab.store.begin().await.unwrap();
    sqlx::query("UPDATE detection SET identity = $1 WHERE rule = 'evil' AND path = $2")
        .bind(format!("{start}{}", "f".repeat(56)))
        .bind(b"/b".to_vec())
        .execute(&mut *tx)
        .await
        .unwrap();
    Store::commit(tx).await.unwrap();
    let Err(CleanupRefusal::Ambiguous(_, keys)) = lab.cleanup(std::slice::from_ref(&start), false).await
    else {
        panic!("ambiguous")
    };
    assert_eq!(keys.len(), 2);
}

#[tokio::test]
async fn endpoints_that_a_search_found_may_have_nothing_to_clean_and_named_ones_not() {
    let lab = Lab::start().await;
    put(&lab.store, 2, "web-08", &[], false).await;
    lab.scan(&[find("/a", "evil")], 100).await;
    let all = lab.store.endpoints(&Filter::default()).await.unwrap();
    let searched: Vec<_> = all.iter().map(|row| (row.clone(), false)).collect();
    let named: Vec<_> = all.iter().map(|row| (row.clone(), true)).collect();
    assert_eq!(
        lab.cleanup_of(&named, &[], false, 1).await,
        Err(CleanupRefusal::Nothing(Some("web-08".to_owned())))
    );
    assert_eq!(lab.cleanup_of(&searched, &[], false, 1).await.unwrap().len(), 1);
    assert!(matches!(lab.cleanup_of(&searched, &[], false, 1).await, Err(CleanupRefusal::UnderWay { .. })));
    assert_eq!(lab.cleanup_of(&searched[1..], &[], false, 1).await, Err(CleanupRefusal::Nothing(None)));

    // Who is away is named, and nobody gets anything.
    lab.say_as(EndpointId::new(Uuid::from_u128(2)), 1, ReportBody::Lost { count: 3 }, 5).await;
    assert_eq!(
        lab.last_event().await,
        (EventKind::Agent, EventStatus::Unsuccessful, "reports-lost".to_owned())
    );
    let mut tx = lab.store.begin().await.unwrap();
    sqlx::query("UPDATE endpoint SET manager_id = NULL").execute(&mut *tx).await.unwrap();
    Store::commit(tx).await.unwrap();
    let key = find("/a", "evil").key().to_string();
    let me = [(lab.me().await, true)];
    let refused = lab.cleanup_of(&me, std::slice::from_ref(&key), true, 9).await;
    assert!(matches!(refused, Err(CleanupRefusal::Away(rows)) if rows[0].host == "web-07"));
}

#[tokio::test]
async fn a_restore_that_fails_is_told_and_a_cleaned_again_file_is_resolved() {
    let lab = Lab::start().await;
    let (a, b) = (find("/a", "evil"), find("/b", "other"));
    lab.scan(&[a.clone(), b.clone()], 100).await;
    let items =
        vec![item(&a, ItemVerdict::Vaulted, Some(1), None), item(&b, ItemVerdict::Vaulted, Some(2), None)];
    lab.clean(items, Outcome::Treated).await;
    let task = lab.restore(&[1, 2], None).await.unwrap().remove(0).id;
    lab.begin(task, 2001).await;
    let bare = |find: &Detection, verdict, n, code| ItemReport {
        detections: vec![],
        ..item(find, verdict, Some(n), code)
    };
    let items =
        vec![bare(&a, ItemVerdict::Restored, 1, None), bare(&b, ItemVerdict::Failed, 2, Some("exists"))];
    lab.say(ReportBody::Items { task, items: items.clone() }, 2002).await;
    lab.end(task, Outcome::Treated(tally(&items, 0)), 2003).await;
    let state = async |rule: &str| {
        lab.incidents().await.into_iter().find(|row| row.rule == rule).map(|row| row.state)
    };
    assert_eq!(state("evil").await, Some(IncidentState::RolledBack));
    assert_eq!(state("other").await, Some(IncidentState::RollbackFailed));
    assert_eq!(
        lab.last_event().await,
        (EventKind::Restore, EventStatus::RollbackFailed, "exists".to_owned())
    );
    assert_eq!(lab.store.vault(VaultFilter::default(), 9).await.unwrap().len(), 1);

    // Named again, what was put back is cleaned again.
    assert!(
        matches!(lab.cleanup(&[], false).await, Err(CleanupRefusal::Nothing(_))),
        "nobody asked for that"
    );
    let key = [a.key().to_string()];
    let task = lab.cleanup(&key, false).await.unwrap().remove(0).id;
    assert_eq!(state("evil").await, Some(IncidentState::Cleaning));
    lab.begin(task, 3).await;
    let items = vec![item(&a, ItemVerdict::Vaulted, Some(3), None)];
    lab.say(ReportBody::Items { task, items: items.clone() }, 4).await;
    lab.end(task, Outcome::Treated(tally(&items, 0)), 5).await;
    assert_eq!(state("evil").await, Some(IncidentState::Resolved));
}

#[tokio::test]
async fn the_overview_counts_what_its_lists_show() {
    let lab = Lab::start().await;
    put(&lab.store, 2, "away", &[], false).await;
    put(&lab.store, 3, "third", &[], true).await;
    let check = async |query: Query, hosts: &[&str], ordered: u64| {
        let overview = lab.store.overview().await.unwrap();
        let (_, count, queued) = overview.queries.iter().find(|(q, ..)| *q == query).copied().unwrap();
        let filter = Filter { query: Some(query), ..Filter::default() };
        let listed = lab.store.endpoints(&filter).await.unwrap();
        let shown: Vec<&str> = listed.iter().map(|row| row.host.as_str()).collect();
        assert_eq!(shown, hosts, "{query}");
        assert_eq!((count, queued), (hosts.len() as u64, ordered), "{query}");
        for row in lab.store.endpoints(&Filter::default()).await.unwrap() {
            let queries = lab.store.queries_of(row.id).await.unwrap();
            assert_eq!(queries.contains(&query), hosts.contains(&row.host.as_str()), "{query} {}", row.host);
        }
    };
    check(Query::Connected, &["third", "web-07"], 0).await;
    check(Query::Disconnected, &["away"], 0).await;
    check(Query::AgentInstalled, &["away"], 0).await;
    check(Query::NeedsCleanup, &[], 0).await;
    let (a, b) = (find("/a", "evil"), find("/b", "other"));
    lab.scan(&[a.clone(), b.clone()], 100).await;
    check(Query::NeedsCleanup, &["web-07"], 0).await;
    let task = lab.cleanup(&[], false).await.unwrap().remove(0).id;
    check(Query::NeedsCleanup, &[], 1).await;
    let overview = lab.store.overview().await.unwrap();
    assert_eq!((overview.endpoints, overview.incidents_open), (3, 2));
    assert_eq!((overview.tasks_queued, overview.tasks_running), (1, 0));
    lab.begin(task, 2).await;
    assert_eq!(lab.store.overview().await.unwrap().tasks_running, 1);
    let items =
        vec![item(&a, ItemVerdict::Gone, None, None), item(&b, ItemVerdict::Refused, None, Some("x"))];
    lab.say(ReportBody::Items { task, items: items.clone() }, 3).await;
    lab.end(task, Outcome::Treated(tally(&items, 0)), 4).await;
    check(Query::NeedsCleanup, &[], 0).await;
    check(Query::Unresolved, &["web-07"], 0).await;
    lab.cleanup(&[], false).await.unwrap();
    check(Query::Unresolved, &[], 1).await;
    let filter = Filter {
        query: Some(Query::Connected),
        terms: tm_protocol::search::parse("web").unwrap(),
        ..Filter::default()
    };
    assert_eq!(lab.store.endpoints(&filter).await.unwrap().len(), 1);
}
