//! Versions of patterns in waves: whom they reach, what stops them, and what a stopped one takes with it.

use tm_api::rollout::{RolloutState, Share, StartRollout};
use tm_patterns::digests::Counts;
use tm_protocol::{report::OwnedFile, task::PatternRef};

use super::*;
use crate::store::{
    patterns::NewPattern,
    rollouts::{Move, Moved, RolloutRow},
    trust::{NewTrust, Published},
};

/// A store with endpoints, and what their agents have said.
struct Fleet {
    store: Store,
    endpoints: Vec<EndpointId>,
    said: std::cell::RefCell<std::collections::HashMap<EndpointId, u64>>,
    _folder: tempfile::TempDir,
}

fn pattern(text: &str) -> PatternRef {
    PatternRef { sha256: Sha256::of(text.as_bytes()), size: 1, name: "p".to_owned() }
}

fn terms(waves: &str, brake_share: u16) -> StartRollout {
    StartRollout {
        group: None,
        waves: waves.parse().unwrap(),
        brake_share: Share::new(brake_share).unwrap(),
        every_s: None,
    }
}

fn found(pattern: &PatternRef, path: &str) -> Detection {
    Detection { pattern: pattern.sha256, ..find(path, "r") }
}

impl Fleet {
    /// With the version `old` for all, and `new` so.
    async fn start(count: u128, terms: &StartRollout) -> Self {
        let (store, folder) = scratch().await;
        let mut endpoints = Vec::new();
        for n in 1..=count {
            endpoints.push(put(&store, n, &format!("web-{n:02}"), &[], true).await);
        }
        let fleet = Self { store, endpoints, said: std::cell::RefCell::default(), _folder: folder };
        assert_eq!(fleet.publish(&["old"], None).await, Published::Done);
        assert_eq!(fleet.publish(&["old", "new"], Some(terms)).await, Published::Done);
        fleet
    }

    async fn publish(&self, texts: &[&str], rollout: Option<&StartRollout>) -> Published {
        let listed: Vec<Sha256> = texts.iter().map(|text| pattern(text).sha256).collect();
        for text in texts {
            let (reference, digests) = (pattern(text), Counts::default());
            let new = NewPattern { reference, rules: 1, digests, warnings: Vec::new(), forced: false };
            self.store.import_pattern(&new, "root", 1).await.unwrap();
        }
        let from = self.store.trust().await.unwrap().map(|row| row.generation);
        let detail = serde_json::json!({});
        let new = NewTrust { from, bundle: "b", listed: Some(&listed), rollout, detail };
        self.store.publish_trust(new, "root", 1).await.unwrap()
    }

    async fn rollout(&self) -> RolloutRow {
        self.store.rollout("p").await.unwrap().unwrap()
    }

    async fn state(&self) -> RolloutState {
        self.rollout().await.state
    }

    async fn advance(&self, now_ms: i64) -> Moved {
        self.store.move_rollout(self.rollout().await.id, Move::Advance, "ann", now_ms).await.unwrap()
    }

    /// Which of so many endpoints get the new version; the others get the old one.
    async fn reached(&self, count: u128) -> Vec<u128> {
        let versions = self.store.versions().await.unwrap();
        let gets = |n: u128| versions.named("p", EndpointId::new(Uuid::from_u128(n)), "default").unwrap();
        let is_new = |n: &u128| {
            let row = gets(*n);
            assert!([pattern("old"), pattern("new")].contains(&row.reference));
            row.reference == pattern("new")
        };
        (1..=count).filter(is_new).collect()
    }

    async fn say(&self, endpoint: EndpointId, body: ReportBody, now_ms: i64) {
        let sequence = {
            let mut said = self.said.borrow_mut();
            let last = said.entry(endpoint).or_default();
            *last += 1;
            *last
        };
        let report = Report { sequence, at_ms: now_ms, body };
        self.store.record_reports(&[(endpoint, report)], now_ms).await.unwrap();
    }

    async fn order(&self, endpoint: EndpointId, with: &PatternRef) -> TaskId {
        let TaskSpec::Scan(spec) = scan_spec() else { panic!("a scan") };
        let spec = TaskSpec::Scan(tm_protocol::task::ScanSpec { patterns: vec![with.clone()], ..spec });
        let order =
            Order { spec: &spec, issuer: "root", reason: "", expires_in_ms: HOUR_MS, deadline_ms: HOUR_MS };
        let task = TaskId::new(Uuid::now_v7());
        let recipient = Recipient { task, endpoint, host: "web".to_owned(), is_unsupported: false };
        self.store.create_tasks(&order, vec![recipient], 1).await.unwrap();
        task
    }

    /// A scan of one endpoint with a version that finds this; told twice, as after a break.
    async fn scan(&self, endpoint: EndpointId, with: &PatternRef, paths: &[&str]) -> TaskId {
        let task = self.order(endpoint, with).await;
        self.say(endpoint, ReportBody::Accepted { task }, 2).await;
        self.say(endpoint, ReportBody::Started { task }, 2).await;
        let detections: Vec<Detection> = paths.iter().map(|path| found(with, path)).collect();
        if !detections.is_empty() {
            for _ in 0..2 {
                let detections = detections.clone();
                self.say(endpoint, ReportBody::Detections { task, detections }, 3).await;
            }
        }
        let coverage = Coverage { files: 9, ..Coverage::default() };
        self.say(endpoint, ReportBody::Finished { task, outcome: Outcome::Scanned(coverage) }, 4).await;
        task
    }

    async fn owned(&self, endpoint: EndpointId, task: TaskId, with: &PatternRef) {
        let file = OwnedFile {
            pattern: with.sha256,
            path: b"/usr/bin/\x1b[2Jcron"[..].into(),
            package: "cron\n".to_owned(),
        };
        self.say(endpoint, ReportBody::Owned { task, files: vec![file] }, 3).await;
    }

    async fn deployments(&self) -> Vec<EventRow> {
        let mut events = self.store.events(&EventFilter::default(), false, 1000).await.unwrap();
        events.retain(|event| event.kind == EventKind::PatternDeployment);
        events
    }

    async fn actions(&self) -> Vec<String> {
        let log = self.store.audit_after(0, 999).await.unwrap();
        log.into_iter().map(|record| record.action).filter(|action| action.starts_with("rollout.")).collect()
    }
}

#[tokio::test]
async fn a_wave_reaches_its_share_and_each_wave_those_before_it() {
    let fleet = Fleet::start(0, &terms("1%,10%,100%", 200)).await;
    let first = fleet.reached(4000).await;
    // 40 of 4000 are expected; five times the spread of chance around it.
    assert!((8..=72).contains(&first.len()), "{}", first.len());
    assert_eq!(fleet.reached(4000).await, first, "it is the same whoever asks");
    assert!(matches!(fleet.advance(5).await, Moved::Done(row) if row.wave == 2));
    let second = fleet.reached(4000).await;
    assert!((305..=495).contains(&second.len()), "{}", second.len());
    assert!(first.iter().all(|n| second.contains(n)), "nobody falls out");
    fleet.advance(6).await;
    assert_eq!(fleet.reached(4000).await.len(), 4000);
    assert_eq!(fleet.state().await, RolloutState::Running, "its brake still watches");
    assert!(matches!(fleet.advance(7).await, Moved::Done(row) if row.state == RolloutState::Complete));
    assert_eq!(fleet.advance(8).await, Moved::Not(RolloutState::Complete));
    assert_eq!(fleet.reached(4000).await.len(), 4000);
    let expected = ["rollout.start", "rollout.advance", "rollout.advance", "rollout.advance"];
    assert_eq!(fleet.actions().await, expected);
}

#[tokio::test]
async fn a_group_gets_its_version_and_others_keep_theirs() {
    let fleet = Fleet::start(1, &terms("100%", 200)).await;
    fleet.store.create_group("servers", "ann", 1).await.unwrap();
    let mut for_group = terms("100%", 200);
    for_group.group = Some("nobody".to_owned());
    let refused = fleet.publish(&["old", "new", "third"], Some(&for_group)).await;
    assert_eq!(refused, Published::NoGroup("nobody".to_owned()));
    for_group.group = Some("servers".to_owned());
    assert_eq!(fleet.publish(&["new", "third"], Some(&for_group)).await, Published::Done);
    let versions = fleet.store.versions().await.unwrap();
    for (group, text) in [("servers", "third"), ("default", "new"), ("other", "new")] {
        let of: Vec<&PatternRef> =
            versions.of(fleet.endpoints[0], group).into_iter().map(|row| &row.reference).collect();
        assert_eq!(of, [&pattern(text)], "{group}");
    }
    let reach = |text: &str| versions.reach(pattern(text).sha256);
    assert_eq!(
        (reach("third"), reach("new"), reach("old")),
        ("100% of servers".into(), "all".into(), "none".into())
    );
}

#[tokio::test]
async fn no_publication_takes_a_version_from_those_that_the_newest_does_not_reach() {
    let ten = terms("10%,100%", 200);
    let fleet = Fleet::start(0, &ten).await;
    assert_eq!(fleet.publish(&["old", "new"], Some(&ten)).await, Published::NothingNew);
    let under_way = Published::UnderWay("p".to_owned());
    assert_eq!(fleet.publish(&["third"], None).await, under_way);
    assert_eq!(fleet.publish(&["old", "new", "third"], Some(&ten)).await, under_way);
    assert_eq!(fleet.publish(&["new"], None).await, Published::Stranded("p".to_owned()));
    assert_eq!(fleet.reached(100).await.len() % 100, fleet.reached(100).await.len(), "nothing was changed");
    // To go back is always possible, and so is to end it all.
    assert_eq!(fleet.publish(&["old"], None).await, Published::Done);
    assert_eq!(fleet.state().await, RolloutState::Withdrawn);
    assert_eq!(fleet.reached(100).await, [0_u128; 0]);
    assert_eq!(fleet.publish(&["old", "new"], Some(&ten)).await, Published::Done);
    assert_eq!(fleet.publish(&[], None).await, Published::Done);
    let versions = fleet.store.versions().await.unwrap();
    assert!(versions.of(EndpointId::new(Uuid::nil()), "default").is_empty());
    // What was withdrawn and is published again without waves is for all.
    assert_eq!(fleet.publish(&["new"], None).await, Published::Done);
    assert_eq!(fleet.reached(100).await.len(), 100);
}

#[tokio::test]
async fn three_endpoints_above_the_share_stop_it_and_fewer_do_not() {
    let fleet = Fleet::start(12, &terms("100%", 2500)).await;
    let (old, new) = (pattern("old"), pattern("new"));
    for endpoint in &fleet.endpoints[..5] {
        fleet.scan(*endpoint, &old, &["/x"]).await;
    }
    for endpoint in &fleet.endpoints[..2] {
        fleet.scan(*endpoint, &new, &["/a", "/b"]).await;
        fleet.scan(*endpoint, &new, &["/a"]).await;
    }
    assert_eq!(fleet.state().await, RolloutState::Running, "two of two");
    for endpoint in &fleet.endpoints[2..11] {
        fleet.scan(*endpoint, &new, &[]).await;
    }
    let counts = fleet.store.rollout_counts(fleet.rollout().await.id).await.unwrap();
    assert_eq!((counts.looked, counts.hits), (11, 2), "each endpoint once");
    fleet.scan(fleet.endpoints[11], &new, &["/a"]).await;
    assert_eq!(fleet.state().await, RolloutState::Running, "three of twelve are not more than a quarter");
    fleet.scan(fleet.endpoints[5], &new, &["/a"]).await;
    let row = fleet.rollout().await;
    assert_eq!((row.state, row.stopped_code.as_deref()), (RolloutState::Stopped, Some("brake-share")));
    assert!(row.stopped_reason.unwrap().contains("4 of the 12 endpoints"));
    assert_eq!(fleet.reached(100).await, [0_u128; 0], "everybody goes back");
    let events = fleet.deployments().await;
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].status, events[0].detail.as_str()), (EventStatus::Unsuccessful, "brake-share"));
    assert_eq!(events[0].endpoint, fleet.endpoints[5].to_string());

    // Only whoever says that it was right gets it going again, and then nothing watches.
    let resume = async |force| {
        let id = fleet.rollout().await.id;
        fleet.store.move_rollout(id, Move::Resume { force }, "ann", 9).await.unwrap()
    };
    assert!(matches!(resume(false).await, Moved::Braked(why) if why.contains("4 of the 12")));
    assert!(matches!(resume(true).await, Moved::Done(row) if !row.is_watched()));
    for endpoint in &fleet.endpoints {
        fleet.scan(*endpoint, &new, &["/c"]).await;
    }
    assert_eq!(fleet.state().await, RolloutState::Running);
    assert_eq!(fleet.actions().await, ["rollout.start", "rollout.resume"]);
}

#[tokio::test]
async fn a_file_of_a_package_stops_it_at_once_if_the_scan_was_ordered_so() {
    let fleet = Fleet::start(2, &terms("10%,100%", 10_000)).await;
    let (old, new) = (pattern("old"), pattern("new"));
    let [one, two] = fleet.endpoints[..] else { panic!("two endpoints") };
    let with_old = fleet.order(one, &old).await;
    fleet.owned(one, with_old, &new).await;
    let with_new = fleet.order(one, &new).await;
    fleet.owned(two, with_new, &new).await;
    fleet.owned(one, TaskId::new(Uuid::now_v7()), &new).await;
    fleet.owned(one, with_old, &old).await;
    assert_eq!(fleet.state().await, RolloutState::Running, "what was not ordered stops nothing");
    fleet.owned(one, with_new, &new).await;
    let row = fleet.rollout().await;
    assert_eq!((row.state, row.stopped_code.as_deref()), (RolloutState::Stopped, Some("brake-package")));
    let reason = row.stopped_reason.unwrap();
    assert!(reason.contains(r"`/usr/bin/\u{1b}[2Jcron`") && reason.contains(r"package `cron\n`"), "{reason}");
    fleet.owned(one, with_new, &new).await;
    assert_eq!(fleet.deployments().await.len(), 1, "it is told once");
}

#[tokio::test]
async fn what_is_stopped_is_not_sent_and_takes_its_cleanups_with_it() {
    let fleet = Fleet::start(2, &terms("100%", 200)).await;
    let (old, new) = (pattern("old"), pattern("new"));
    let [one, two] = fleet.endpoints[..] else { panic!("two endpoints") };
    fleet.scan(one, &new, &["/bad"]).await;
    fleet.scan(two, &old, &["/bad"]).await;
    let clean = async |endpoint, now_ms| {
        let row = fleet.store.endpoint(endpoint).await.unwrap().unwrap();
        let wish = CleanupWish {
            endpoints: &[(row, true)],
            keys: &[],
            dry_run: false,
            when_connected: false,
            issuer: "root",
            reason: "",
            expires_in_ms: HOUR_MS,
            deadline_ms: HOUR_MS,
        };
        fleet.store.order_cleanup(&wish, now_ms).await.unwrap().map(|rows| rows[0].id)
    };
    let (of_new, of_old) = (clean(one, 5).await.unwrap(), clean(two, 5).await.unwrap());
    let queued = fleet.order(one, &new).await;
    let id = fleet.rollout().await.id;
    fleet.store.move_rollout(id, Move::Stop { reason: "why" }, "ann", 6).await.unwrap();

    let live: Vec<LiveTask> = fleet.store.live_tasks(7).await.unwrap();
    assert_eq!(live.len(), 3);
    let sent = fleet.store.claim(&live, 7).await.unwrap();
    let mut sent: Vec<(TaskId, TaskSpec)> = sent.into_iter().map(|due| (due.task, due.spec)).collect();
    sent.sort_by_key(|(task, _)| *task == of_old);
    assert_eq!(sent.len(), 2, "the cleanup of what it found is not sent");
    let TaskSpec::Scan(scan) = &sent[0].1 else { panic!("{sent:?}") };
    assert_eq!((sent[0].0, &scan.patterns), (queued, &vec![old.clone()]));
    assert_eq!(sent[1].0, of_old);
    let task = fleet.store.task(of_new).await.unwrap().unwrap();
    assert_eq!((task.state, task.code.as_deref()), (TaskState::Cancelled, Some("pattern-stopped")));
    assert_eq!(fleet.store.order_of(queued).await.unwrap().unwrap(), sent[0].1, "and it stays so");
    assert_eq!(clean(one, 8).await, Err(CleanupRefusal::Nothing(Some("web-01".to_owned()))));
}

#[tokio::test]
async fn a_cleanup_that_its_agent_may_have_is_called_off_there() {
    let fleet = Fleet::start(1, &terms("100%", 200)).await;
    let one = fleet.endpoints[0];
    fleet.scan(one, &pattern("new"), &["/bad"]).await;
    let row = fleet.store.endpoint(one).await.unwrap().unwrap();
    let order = async |now_ms| {
        let wish = CleanupWish {
            endpoints: &[(row.clone(), true)],
            keys: &[found(&pattern("new"), "/bad").key().to_string()],
            dry_run: false,
            when_connected: false,
            issuer: "root",
            reason: "",
            expires_in_ms: HOUR_MS,
            deadline_ms: HOUR_MS,
        };
        fleet.store.order_cleanup(&wish, now_ms).await.unwrap().unwrap()[0].id
    };
    let task = order(5).await;
    let live = fleet.store.live_tasks(6).await.unwrap();
    assert_eq!(fleet.store.claim(&live, 6).await.unwrap().len(), 1);
    assert_eq!(fleet.store.call_off_stopped(6).await.unwrap(), 0, "nothing is stopped");
    let id = fleet.rollout().await.id;
    fleet.store.move_rollout(id, Move::Stop { reason: "" }, "ann", 7).await.unwrap();
    let again = fleet.store.claim(&live, 8).await.unwrap();
    assert!(again.is_empty(), "it is not sent again");
    assert_eq!(fleet.store.call_off_stopped(8).await.unwrap(), 1);
    assert_eq!(fleet.store.call_off_stopped(9).await.unwrap(), 0, "once");
    let row = fleet.store.task(task).await.unwrap().unwrap();
    assert_eq!((row.state, row.cancel_ms), (TaskState::Queued, Some(8)), "its agent has the last word");
    fleet.say(one, ReportBody::Finished { task, outcome: Outcome::Cancelled(None) }, 10).await;

    // What a person orders by name, knowing that it was stopped, is done.
    order(11).await;
    assert_eq!(fleet.store.call_off_stopped(12).await.unwrap(), 0);
    let live = fleet.store.live_tasks(12).await.unwrap();
    assert_eq!(fleet.store.claim(&live, 12).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_scan_that_its_agent_may_have_is_called_off_and_one_without_another_pattern_is_refused() {
    let fleet = Fleet::start(1, &terms("100%", 200)).await;
    let one = fleet.endpoints[0];
    let sent = fleet.order(one, &pattern("new")).await;
    let live = fleet.store.live_tasks(2).await.unwrap();
    assert_eq!(fleet.store.claim(&live, 2).await.unwrap().len(), 1);
    let begun = fleet.order(one, &pattern("new")).await;
    fleet.say(one, ReportBody::Accepted { task: begun }, 2).await;
    let id = fleet.rollout().await.id;
    fleet.store.move_rollout(id, Move::Stop { reason: "" }, "ann", 3).await.unwrap();
    let alone = TaskSpec::Scan(tm_protocol::task::ScanSpec {
        patterns: vec![PatternRef { name: "q".to_owned(), ..pattern("new") }],
        ..match scan_spec() {
            TaskSpec::Scan(spec) => spec,
            TaskSpec::Cleanup(_) | TaskSpec::Restore(_) => panic!("a scan"),
        }
    });
    let order =
        Order { spec: &alone, issuer: "root", reason: "", expires_in_ms: HOUR_MS, deadline_ms: HOUR_MS };
    let refused = TaskId::new(Uuid::now_v7());
    let recipient = Recipient { task: refused, endpoint: one, host: "web".to_owned(), is_unsupported: false };
    fleet.store.create_tasks(&order, vec![recipient], 4).await.unwrap();

    let live = fleet.store.live_tasks(6).await.unwrap();
    let due = fleet.store.claim(&live, 6).await.unwrap();
    let due: Vec<TaskId> = due.iter().map(|due| due.task).collect();
    assert_eq!(due, [begun], "what its agent has taken stays as it is");
    let row = fleet.store.task(sent).await.unwrap().unwrap();
    assert_eq!((row.state, row.cancel_ms), (TaskState::Queued, Some(6)));
    let row = fleet.store.task(refused).await.unwrap().unwrap();
    assert_eq!((row.state, row.code.as_deref()), (TaskState::Refused, Some("pattern-stopped")));
}

#[tokio::test]
async fn a_wave_begins_by_itself_once_somebody_has_looked_and_not_after_the_brake() {
    let mut every = terms("1%,10%,100%", 200);
    every.every_s = Some(60);
    let fleet = Fleet::start(3, &every).await;
    assert_eq!(fleet.store.advance_rollouts(61_000).await.unwrap(), 0, "nobody has looked");
    fleet.scan(fleet.endpoints[0], &pattern("new"), &[]).await;
    assert_eq!(fleet.store.advance_rollouts(60_000).await.unwrap(), 0, "it is not time");
    let (a, b) = tokio::join!(fleet.store.advance_rollouts(61_000), fleet.store.advance_rollouts(61_000));
    assert_eq!(a.unwrap() + b.unwrap(), 1, "two managers begin it once");
    let row = fleet.rollout().await;
    assert_eq!((row.wave, row.next_ms), (2, Some(121_000)));
    assert_eq!(fleet.store.advance_rollouts(121_000).await.unwrap(), 1);
    for endpoint in &fleet.endpoints {
        fleet.scan(*endpoint, &pattern("new"), &["/a"]).await;
    }
    assert_eq!(fleet.state().await, RolloutState::Stopped);
    assert_eq!(fleet.store.advance_rollouts(i64::MAX).await.unwrap(), 0);
    assert_eq!(fleet.rollout().await.wave, 3);
    let expected = ["rollout.start", "rollout.advance", "rollout.advance"];
    assert_eq!(fleet.actions().await, expected);
}
