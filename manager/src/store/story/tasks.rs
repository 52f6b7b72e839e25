//! Tasks that are called off, expire, are not understood or are lied about.

use super::*;

#[tokio::test]
async fn an_agent_that_does_not_know_a_kind_is_not_sent_it() {
    let lab = Lab::start().await;
    lab.scan(&[find("/a", "evil")], 100).await;
    let kinds = async |kinds: &str| {
        let mut tx = lab.store.begin().await.unwrap();
        sqlx::query("UPDATE endpoint SET task_kinds = $1")
            .bind(kinds.to_owned())
            .execute(&mut *tx)
            .await
            .unwrap();
        Store::commit(tx).await.unwrap();
    };
    kinds("[1]").await;
    let refused = lab.cleanup(&[], false).await.unwrap().remove(0);
    assert_eq!((refused.state, refused.code.as_deref()), (TaskState::Refused, Some("unsupported")));
    assert_eq!(lab.task(refused.id).await, refused);
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);
    assert_eq!(lab.last_event().await.2, "unsupported");
    // Ordered while nobody knew, found out when it connects.
    kinds("[]").await;
    let task = lab.cleanup(&[], false).await.unwrap().remove(0);
    assert_eq!(task.state, TaskState::Queued);
    kinds("[1]").await;
    assert_eq!(lab.store.claim(&lab.live(1).await, 7).await.unwrap().len(), 0);
    assert_eq!(lab.task(task.id).await.code.as_deref(), Some("unsupported"));
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);
}

#[tokio::test]
async fn calling_off_ends_what_was_never_sent_and_waits_for_the_agent_otherwise() {
    let lab = Lab::start().await;
    let a = find("/a", "evil");
    lab.scan(std::slice::from_ref(&a), 100).await;
    let cancels = async || {
        let log = lab.store.audit_after(0, 100).await.unwrap();
        log.iter().filter(|record| record.action == "task.cancel").count()
    };
    // Never sent.
    let task = lab.cleanup(&[], false).await.unwrap().remove(0).id;
    for _ in 0..2 {
        let Cancelled::Yes(row) = lab.store.cancel_task(task, "root", 5).await.unwrap() else {
            panic!("yes")
        };
        assert_eq!((row.state, row.code.as_deref()), (TaskState::Cancelled, Some("cancelled")));
    }
    assert_eq!(cancels().await, 1);
    assert_eq!(lab.live(1).await, [], "it is not sent any more");
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);
    assert_eq!(
        lab.last_event().await,
        (EventKind::Cleanup, EventStatus::Unsuccessful, "cancelled".to_owned())
    );

    // Sent, and not answered yet.
    let task = lab.cleanup(&[], false).await.unwrap().remove(0).id;
    assert_eq!(lab.store.claim(&lab.live(1).await, 1).await.unwrap().len(), 1);
    for _ in 0..2 {
        let Cancelled::Yes(row) = lab.store.cancel_task(task, "root", 5).await.unwrap() else {
            panic!("yes")
        };
        assert_eq!((row.state, row.cancel_ms), (TaskState::Queued, Some(5)));
    }
    assert_eq!(cancels().await, 2);
    assert!(lab.live(1).await[0].is_cancelled);
    assert_eq!(lab.store.claim(&lab.live(1).await, 1).await.unwrap().len(), 0, "the order is not sent again");
    assert_eq!(lab.standing().await, [(IncidentState::Cleaning, 1, 1)], "its agent has the last word");
    lab.end(task, Outcome::Cancelled(None), 9).await;
    assert_eq!(lab.task(task).await.state, TaskState::Cancelled);
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);

    // The agent was quicker.
    let task = lab.cleanup(&[], false).await.unwrap().remove(0).id;
    lab.begin(task, 10).await;
    assert!(matches!(lab.store.cancel_task(task, "root", 11).await.unwrap(), Cancelled::Yes(_)));
    let items = vec![item(&a, ItemVerdict::Gone, None, None)];
    lab.say(ReportBody::Items { task, items: items.clone() }, 12).await;
    lab.end(task, Outcome::Treated(tally(&items, 0)), 13).await;
    let Cancelled::Ended(row) = lab.store.cancel_task(task, "root", 14).await.unwrap() else {
        panic!("ended")
    };
    assert_eq!(row.state, TaskState::Done);
    assert_eq!(cancels().await, 3);
    let nobody = TaskId::new(Uuid::from_u128(99));
    assert_eq!(lab.store.cancel_task(nobody, "root", 1).await.unwrap(), Cancelled::Unknown);
}

#[tokio::test]
async fn a_task_is_either_sent_or_called_off_at_once() {
    let lab = Lab::start().await;
    let (mut sent, mut ended) = (0, 0);
    for round in 0..40 {
        let task = lab.order_scan(round).await;
        let live = [LiveTask { task, endpoint: lab.endpoint, is_cancelled: false }];
        let cancel = async {
            if round % 2 == 0 {
                tokio::task::yield_now().await;
            }
            lab.store.cancel_task(task, "root", 5).await.unwrap()
        };
        let (claimed, cancelled) = tokio::join!(lab.store.claim(&live, 5), cancel);
        let Cancelled::Yes(row) = cancelled else { panic!("it had not ended") };
        let was_sent = claimed.unwrap().len() == 1;
        assert_eq!(row.state == TaskState::Cancelled, !was_sent, "round {round}");
        if was_sent {
            sent += 1;
            // It could not be handed over after all: nobody has it, so it ends.
            lab.store.unclaim(&[(lab.endpoint, task)], 6).await.unwrap();
            assert_eq!(lab.task(task).await.state, TaskState::Cancelled, "round {round}");
        } else {
            ended += 1;
        }
    }
    assert_eq!(sent + ended, 40);
    // What could not be handed over and was not called off waits again.
    let task = lab.order_scan(1).await;
    lab.store.claim(&lab.live(2).await, 2).await.unwrap();
    lab.store.unclaim(&[(lab.endpoint, task)], 3).await.unwrap();
    assert_eq!(lab.task(task).await.state, TaskState::Queued);
    assert_eq!(lab.store.claim(&lab.live(4).await, 4).await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_waited_too_long_expires_and_what_may_have_begun_does_not() {
    let lab = Lab::start().await;
    lab.scan(&[find("/a", "evil")], 100).await;
    let unsent = lab.cleanup(&[], false).await.unwrap().remove(0);
    assert_eq!(lab.store.expire_tasks(unsent.expires_ms - 1).await.unwrap(), 0);
    assert_eq!(lab.store.expire_tasks(unsent.expires_ms).await.unwrap(), 1);
    assert_eq!(lab.task(unsent.id).await.state, TaskState::Expired);
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);
    assert_eq!(
        lab.last_event().await,
        (EventKind::Cleanup, EventStatus::Unsuccessful, "cannot-connect".to_owned())
    );

    let sent = lab.cleanup(&[], false).await.unwrap().remove(0);
    lab.store.claim(&lab.live(1).await, 1).await.unwrap();
    assert_eq!(lab.store.expire_tasks(sent.expires_ms + 1).await.unwrap(), 0);
    assert_eq!(lab.live(sent.expires_ms + 1).await.len(), 1, "its agent is asked again");
    let late = sent.expires_ms + HOUR_MS + 600_000;
    assert_eq!(lab.store.expire_tasks(late - 1).await.unwrap(), 0);
    assert_eq!(lab.store.expire_tasks(late).await.unwrap(), 1);
    let row = lab.task(sent.id).await;
    assert_eq!((row.state, row.code.as_deref()), (TaskState::Failed, Some("timeout")));
    assert_eq!(lab.standing().await, [(IncidentState::AwaitingCleanup, 1, 1)]);
    // Too late to be believed about the task; what it did is believed.
    lab.end(sent.id, Outcome::Treated(Tally::default()), late + 1).await;
    assert_eq!(lab.task(sent.id).await.state, TaskState::Failed);
    // More than one batch.
    for _ in 0..501 {
        lab.order_scan(0).await;
    }
    assert_eq!(lab.store.expire_tasks(HOUR_MS).await.unwrap(), 501);
}

#[tokio::test]
async fn a_hostile_agent_changes_only_what_is_its_own() {
    let lab = Lab::start().await;
    let other = put(&lab.store, 2, "other", &[], true).await;
    let a = find("/a", "evil");
    lab.scan(std::slice::from_ref(&a), 100).await;
    let task = lab.cleanup(&[], false).await.unwrap().remove(0).id;
    lab.begin(task, 1).await;
    let items = vec![item(&a, ItemVerdict::Vaulted, Some(1), None)];
    let entry = |path: &str| VaultEntry {
        id: vault_id(1),
        path: path.as_bytes().into(),
        sha256: a.sha256,
        size: 1,
        vaulted_ms: 1,
    };
    lab.say_as(other, 1, ReportBody::Items { task, items: items.clone() }, 2).await;
    lab.say_as(other, 2, ReportBody::Finished { task, outcome: Outcome::Treated(tally(&items, 0)) }, 3).await;
    assert_eq!(lab.standing().await, [(IncidentState::Cleaning, 1, 1)]);
    assert_eq!(lab.store.items(task, 0, 9).await.unwrap(), []);

    // An id that another endpoint named first, and a listing that would empty its vault.
    lab.say(ReportBody::Items { task, items }, 4).await;
    lab.say_as(other, 3, ReportBody::Vault { first: true, items: vec![entry("/stolen")] }, 5).await;
    let vault = lab.store.vault(VaultFilter::default(), 9).await.unwrap();
    assert_eq!((vault.len(), vault[0].host.as_str(), vault[0].path.as_slice()), (1, "web-07", &b"/a"[..]));
    lab.say(ReportBody::Vault { first: true, items: vec![entry("/a2")] }, 6).await;
    let mine = VaultFilter { endpoint: Some(lab.endpoint), before: None };
    assert_eq!(lab.store.vault(mine, 9).await.unwrap()[0].path, b"/a2");
    lab.say(ReportBody::Vault { first: true, items: vec![] }, 7).await;
    assert_eq!(lab.store.vault(mine, 9).await.unwrap(), []);

    // More items than any order names.
    let flood: Vec<ItemReport> =
        (0..1100).map(|n| item(&find(&format!("/{n}"), "x"), ItemVerdict::Gone, None, None)).collect();
    lab.say(ReportBody::Items { task, items: flood }, 8).await;
    assert_eq!(lab.store.items(task, 0, 2000).await.unwrap().len(), 1000);

    // Texts that a database cannot hold, or that have no end.
    let failure = Failure { code: format!("a\0{}", "b".repeat(5000)), message: "c\0".repeat(50_000) };
    let scan = lab.order_scan(9).await;
    let nul = Detection { rule: format!("r\0{}", "é".repeat(9000)), ..find("/nul", "") };
    lab.say(ReportBody::Detections { task: scan, detections: vec![nul] }, 10).await;
    lab.say(ReportBody::Refused { task: scan, failure }, 11).await;
    let row = lab.task(scan).await;
    assert_eq!(row.state, TaskState::Refused);
    assert!(row.code.unwrap().len() <= 66 && row.message.unwrap().len() < 10_000);
    assert_eq!(lab.incidents().await.len(), 2);

    // A sum where a scan was ordered would make the task unreadable.
    let scan = lab.order_scan(12).await;
    lab.end(scan, Outcome::Treated(Tally::default()), 13).await;
    assert_eq!(lab.task(scan).await.code.as_deref(), Some("wrong-outcome"));
    let scan = lab.order_scan(14).await;
    lab.end(scan, Outcome::Failed(Failure::new("limit", "x")), 15).await;
    assert_eq!(lab.last_event().await.2, "limit");
    assert_eq!(TaskKind::Scan.word(), lab.task(scan).await.kind);
}

#[tokio::test]
async fn a_scan_that_only_says_its_cost_finds_and_covers_nothing() {
    let lab = Lab::start().await;
    let TaskSpec::Scan(real) = scan_spec() else { panic!("a scan") };
    let mut asks = real.clone();
    asks.options.dry_run = true;
    let asks = TaskSpec::Scan(asks);
    let covered = async || {
        let row = sqlx::query("SELECT COUNT(*) FROM covered").fetch_one(lab.store.reader()).await.unwrap();
        row.get::<i64, _>(0)
    };
    let quote = |files| Quote { files, ..Quote::default() };

    // Whatever an agent says of it, nothing was looked at.
    for outcome in [
        Outcome::Scanned(Coverage { files: 9, ..Coverage::default() }),
        Outcome::Failed(Failure::new("path-refused", "no")),
        Outcome::Cancelled(Some(Coverage::default())),
    ] {
        let task = lab.order_to_scan(&asks, 1).await;
        lab.begin(task, 1).await;
        lab.say(ReportBody::Detections { task, detections: vec![find("/a", "evil")] }, 2).await;
        lab.end(task, outcome.clone(), 3).await;
        let row = lab.task(task).await;
        assert!(row.dry_run && row.state.is_final() && row.state != TaskState::Done, "{outcome:?}: {row:?}");
        assert_eq!(row.result, None, "{outcome:?}");
        assert_eq!(lab.store.detections(task, 0, 10).await.unwrap().len(), 0, "{outcome:?}");
    }
    assert_eq!((covered().await, lab.standing().await), (0, vec![]));

    for files in [3, 4] {
        let task = lab.order_to_scan(&asks, files).await;
        lab.begin(task, files).await;
        lab.end(task, Outcome::Quoted(quote(4)), files + 1).await;
    }
    let newest = lab.order_to_scan(&asks, 6).await;
    lab.begin(newest, 6).await;
    lab.end(newest, Outcome::Quoted(quote(7)), 7).await;
    let row = lab.task(newest).await;
    assert_eq!((row.state, row.result), (TaskState::Done, Some(ResultRow::Quote(Box::new(quote(7))))));
    assert_eq!(covered().await, 0);

    // The real one has it beside it; another order, or an older one, has not.
    let task = lab.order_scan(8).await;
    let row = lab.task(task).await;
    let before = lab.store.quote_before(&row, &real).await.unwrap().unwrap();
    assert_eq!(before.id, newest);
    let mut other = real.clone();
    other.options.fresh = true;
    assert_eq!(lab.store.quote_before(&row, &other).await.unwrap(), None);
    let early = TaskRow { created_ms: 2, ..row };
    assert_eq!(lab.store.quote_before(&early, &real).await.unwrap(), None);

    lab.begin(task, 9).await;
    lab.end(task, Outcome::Quoted(quote(1)), 10).await;
    let row = lab.task(task).await;
    assert_eq!((row.state, row.code.as_deref()), (TaskState::Failed, Some("wrong-outcome")));
    lab.scan(&[], 11).await;
    assert!(covered().await > 0, "the control");
}
