//! The desk against a model of its manager, its executors and its disk: whatever happens in whatever order,
//! with crashes between any two steps, every order has one end and every report arrives once.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test cares for the kinds it makes, and fails on others"
)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use bytes::BytesMut;
use proptest::prelude::*;
use tm_protocol::{
    ids::{EndpointId, Sha256, StreamId, TaskId},
    message::{Assign, Cancel, Outcome, ReportBody, ToManager},
    report::{Coverage, Detection, PathBytes, Tally},
    task::{CleanupSpec, PatternRef, ScanLimits, ScanSpec, TaskSpec},
};
use uuid::Uuid;

use super::{
    Event, Now,
    desk::{Act, Desk},
    journal::{
        Journal,
        record::{Boot, Found},
    },
};
use crate::platform::fs::Object;

/// Small, so that segments turn over.
const SEGMENT: u64 = 3000;

fn endpoint() -> EndpointId {
    EndpointId::new(Uuid::from_u128(1))
}

/// Even numbers change the host.
fn assign(n: u128) -> Assign {
    let pattern = PatternRef { sha256: Sha256::of(b"p"), size: 1, name: "p".into() };
    let spec = if n.is_multiple_of(2) {
        TaskSpec::Cleanup(CleanupSpec { detections: vec![Sha256::of(b"d")], dry_run: false })
    } else {
        TaskSpec::Scan(ScanSpec {
            paths: vec![PathBytes(b"/x".to_vec())],
            patterns: vec![pattern],
            limits: ScanLimits::default(),
        })
    };
    Assign {
        task: id(n),
        endpoint: endpoint(),
        spec,
        expires_in_ms: 2_000,
        deadline_ms: 5_000,
        issuer: "a".into(),
        reason: String::new(),
    }
}

fn id(n: u128) -> TaskId {
    TaskId::new(Uuid::from_u128(n))
}

#[derive(Debug, Clone)]
enum Step {
    Order(u128),
    Cancel(u128),
    /// The executor of one running task comes to its end.
    Finish(usize),
    /// It detects something.
    Detect(usize),
    Notice,
    Tick(u64),
    Cut,
    Connect,
    /// What the manager says is lost on the way.
    LoseAck(bool),
    /// The agent dies between two steps.
    Crash,
    /// It dies within the next step: after the write, or with this share of the write done.
    CrashWithin(Option<prop::sample::Index>),
    Reboot,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u128..12).prop_map(Step::Order),
        2 => (1u128..12).prop_map(Step::Cancel),
        5 => (0usize..4).prop_map(Step::Finish),
        4 => (0usize..4).prop_map(Step::Detect),
        2 => Just(Step::Notice),
        3 => (1u64..1500).prop_map(Step::Tick),
        2 => Just(Step::Cut),
        4 => Just(Step::Connect),
        1 => any::<bool>().prop_map(Step::LoseAck),
        2 => Just(Step::Crash),
        2 => proptest::option::of(any::<prop::sample::Index>()).prop_map(Step::CrashWithin),
        1 => Just(Step::Reboot),
    ]
}

/// What the manager knows.
#[derive(Default)]
struct Manager {
    stored: HashMap<StreamId, (u64, u64)>,
    ordered: BTreeSet<u128>,
    ends: BTreeMap<TaskId, u32>,
    notices: u64,
    lost: u64,
}

struct World {
    folder: PathBuf,
    desk: Option<Desk>,
    manager: Manager,
    connected: bool,
    lose_acks: bool,
    executors: Vec<TaskId>,
    now: Now,
    boot: u128,
    noted: u64,
    next_find: u64,
    /// The disk has lost something that was promised.
    damaged: bool,
}

impl World {
    fn new(folder: &Path) -> Self {
        let mut world = Self {
            folder: folder.to_path_buf(),
            desk: None,
            manager: Manager::default(),
            connected: false,
            lose_acks: false,
            executors: Vec::new(),
            now: Now { elapsed_ms: 1_000, unix_ms: 1_000_000 },
            boot: 1,
            noted: 0,
            next_find: 0,
            damaged: false,
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let opened = Journal::open_sized(&self.folder, SEGMENT).unwrap();
        let (desk, acts) = Desk::open_with(opened, endpoint(), Boot(self.boot), self.now).unwrap();
        self.desk = Some(desk);
        self.perform(acts);
    }

    fn die(&mut self) {
        self.desk = None;
        self.executors.clear();
        self.connected = false;
    }

    fn crash(&mut self) {
        self.die();
        self.start();
    }

    fn handle(&mut self, event: Event) {
        let acts = self.desk.as_mut().unwrap().handle(event, self.now);
        self.perform(acts);
    }

    fn perform(&mut self, acts: Vec<Act>) {
        for act in acts {
            match act {
                Act::Send(frame) => self.send(&frame),
                Act::Start { task, spec, .. } => {
                    let changes = spec.kind().changes_host();
                    assert!(!self.executors.contains(&task), "begun twice");
                    assert!(self.damaged || !self.manager.ends.contains_key(&task), "begun after its end");
                    let changing =
                        self.executors.iter().filter(|t| t.uuid().as_u128().is_multiple_of(2)).count();
                    assert!(!changes || changing == 0, "two tasks change the host");
                    self.executors.push(task);
                }
                Act::Stop(task) => assert!(self.executors.contains(&task), "stopped what does not run"),
                Act::Reconnect => {
                    self.cut();
                    self.connect();
                }
            }
        }
    }

    fn cut(&mut self) {
        if self.connected {
            self.connected = false;
            self.handle(Event::Disconnected);
        }
    }

    fn connect(&mut self) {
        if self.connected {
            return;
        }
        self.connected = true;
        let stream = self.desk.as_ref().unwrap().stream();
        let (reports, notices) = self.manager.stored.get(&stream).copied().unwrap_or_default();
        self.handle(Event::Connected { reports, notices });
        // The manager hands out again what has not ended.
        let open: Vec<u128> = self
            .manager
            .ordered
            .iter()
            .copied()
            .filter(|n| !self.manager.ends.contains_key(&id(*n)))
            .collect();
        for n in open {
            if self.connected {
                self.handle(Event::Assigned(assign(n)));
            }
        }
    }

    /// The manager reads a frame, checks it as the real one does, stores it and says so.
    fn send(&mut self, frame: &[u8]) {
        if !self.connected {
            return;
        }
        let stream = self.desk.as_ref().unwrap().stream();
        let (mut reports, mut notices) = self.manager.stored.get(&stream).copied().unwrap_or_default();
        let mut bytes = BytesMut::from(frame);
        let frame = tm_protocol::frame::take(&mut bytes, ToManager::limit).unwrap().unwrap();
        match ToManager::decode(&frame).unwrap().unwrap() {
            ToManager::Report(report) => {
                let follows = match &report.body {
                    ReportBody::Lost { count } => report.sequence - count - 1,
                    _ => report.sequence - 1,
                };
                assert!(follows <= reports, "reports were left out: {} after {reports}", report.sequence);
                if report.sequence <= reports {
                    return;
                }
                reports = report.sequence;
                match report.body {
                    ReportBody::Finished { task, .. } | ReportBody::Refused { task, .. } => {
                        *self.manager.ends.entry(task).or_default() += 1;
                    }
                    ReportBody::Lost { count } => self.manager.lost += count + 1,
                    _ => {}
                }
            }
            ToManager::Notices(message) => {
                for (number, notice) in (message.first..).zip(message.notices) {
                    if number > notices {
                        notices = number;
                        self.manager.notices += 1;
                        if notice.code == "notices-lost" {
                            self.manager.lost += notice.count;
                        }
                    }
                }
            }
            other => panic!("{other:?}"),
        }
        self.manager.stored.insert(stream, (reports, notices));
        if !self.lose_acks {
            self.handle(Event::ReportsStored { through: reports });
            self.handle(Event::NoticesStored { through: notices });
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Order(n) => {
                self.manager.ordered.insert(*n);
                if self.connected && !self.manager.ends.contains_key(&id(*n)) {
                    self.handle(Event::Assigned(assign(*n)));
                }
            }
            Step::Cancel(n) => {
                if self.connected && self.manager.ordered.contains(n) {
                    self.handle(Event::Cancelled(Cancel { task: id(*n) }));
                }
            }
            Step::Finish(which) => self.finish(*which),
            Step::Detect(which) => {
                if let Some(task) = self.pick(*which) {
                    self.next_find += 1;
                    let detection = Detection {
                        path: PathBytes(format!("/x/{}", self.next_find).into_bytes()),
                        member: vec![],
                        pattern: Sha256::of(b"p"),
                        rule: "r".into(),
                        sha256: Sha256::of(b"x"),
                        size: 1,
                    };
                    let object = Object { device: 1, inode: self.next_find };
                    let key = detection.key();
                    self.handle(Event::Detected(task, vec![Found::new(detection, object, Boot(self.boot))]));
                    let desk = self.desk.as_ref().unwrap();
                    // A task that was given up in the meantime is not heard any more.
                    if desk.running().contains(&task) {
                        let found = desk.found(key).unwrap().unwrap();
                        assert_eq!(found.object(Boot(self.boot)), Some(object));
                    }
                }
            }
            Step::Notice => {
                self.noted += 1;
                self.handle(Event::Notice { code: "n", message: String::new(), count: 0 });
            }
            Step::Tick(ms) => {
                self.now.elapsed_ms += ms;
                self.now.unix_ms += i64::try_from(*ms).unwrap();
                self.handle(Event::Tick);
            }
            Step::Cut => self.cut(),
            Step::Connect => self.connect(),
            Step::LoseAck(lose) => self.lose_acks = *lose,
            Step::Crash => self.crash(),
            Step::Reboot => {
                self.die();
                self.boot += 1;
                self.now = Now { elapsed_ms: 10, unix_ms: self.now.unix_ms + 100 };
                self.start();
            }
            Step::CrashWithin(_) => {}
        }
    }

    /// The step's decision is made, and then the agent dies: before anything of it left the desk, and perhaps
    /// with only a part of it on disk.
    fn take_and_die(&mut self, step: &Step, torn: Option<&prop::sample::Index>) {
        let before = newest(&self.folder);
        let connected = std::mem::replace(&mut self.connected, false);
        let event = match step {
            Step::Order(n) if connected && !self.manager.ends.contains_key(&id(*n)) => {
                self.manager.ordered.insert(*n);
                Some(Event::Assigned(assign(*n)))
            }
            Step::Cancel(n) if connected && self.manager.ordered.contains(n) => {
                Some(Event::Cancelled(Cancel { task: id(*n) }))
            }
            Step::Finish(which) => self.pick(*which).map(|task| Event::Finished(task, outcome(task))),
            _ => None,
        };
        if let Some(event) = event {
            let _ = self.desk.as_mut().unwrap().handle(event, self.now);
        }
        self.die();
        let after = newest(&self.folder);
        if let Some(share) = torn
            && after.0 == before.0
            && after.1 > before.1
        {
            let keep = before.1 + share.index(after.1 - before.1);
            let bytes = fs::read(&after.0).unwrap();
            fs::write(&after.0, &bytes[..keep]).unwrap();
        }
        self.start();
    }

    fn pick(&self, which: usize) -> Option<TaskId> {
        self.executors.get(which % self.executors.len().max(1)).copied()
    }

    fn finish(&mut self, which: usize) {
        if let Some(task) = self.pick(which) {
            self.executors.retain(|other| *other != task);
            self.handle(Event::Finished(task, outcome(task)));
        }
    }

    /// Lets everything that can happen happen.
    fn settle(&mut self) {
        self.lose_acks = false;
        for _ in 0..200 {
            self.cut();
            self.connect();
            while !self.executors.is_empty() {
                self.finish(0);
            }
            self.take(&Step::Tick(700));
            let all = self.manager.ordered.iter().all(|n| self.manager.ends.contains_key(&id(*n)));
            if all && self.executors.is_empty() {
                return;
            }
        }
        panic!("not settled: {:?} of {:?}", self.manager.ends, self.manager.ordered);
    }
}

fn outcome(task: TaskId) -> Outcome {
    if task.uuid().as_u128().is_multiple_of(2) {
        Outcome::Treated(Tally::default())
    } else {
        Outcome::Scanned(Coverage::default())
    }
}

/// The newest segment and how much of it is in use.
fn newest(folder: &Path) -> (PathBuf, usize) {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let path = files.pop().unwrap();
    let used = fs::read(&path).unwrap().iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    (path, used)
}

/// In memory where there is such a place: thousands of runs flush to it.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn runs(usual: u32) -> ProptestConfig {
    let long = std::env::var_os("TM_TEST_LONG").is_some();
    ProptestConfig {
        cases: if long { usual * 10 } else { usual },
        max_shrink_iters: 2_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(runs(2_000))]

    #[test]
    fn every_order_has_one_end_and_every_report_arrives_once(steps in prop::collection::vec(step(), 1..60)) {
        let folder = scratch();
        let mut world = World::new(folder.path());
        let mut dying = None;
        for step in &steps {
            match (dying.take(), step) {
                (_, Step::CrashWithin(torn)) => dying = Some(torn),
                (Some(torn), step) => world.take_and_die(step, torn.as_ref()),
                (None, step) => world.take(step),
            }
        }
        world.settle();
        for n in &world.manager.ordered {
            prop_assert_eq!(world.manager.ends.get(&id(*n)), Some(&1), "task {}", n);
        }
        prop_assert_eq!(world.manager.lost, 0);
        // A torn write is told of; nothing else is.
        prop_assert!(world.manager.notices >= world.noted, "{} of {}", world.manager.notices, world.noted);
    }
}

proptest! {
    #![proptest_config(runs(500))]

    /// A byte of the journal changes, or its end is cut off, at any time: the agent starts, every order still
    /// has an end, and what was lost is counted.
    #[test]
    fn damage_loses_only_what_it_touches(
        steps in prop::collection::vec(step(), 1..60),
        damages in prop::collection::vec((0usize..60, any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..4),
    ) {
        let folder = scratch();
        let mut world = World::new(folder.path());
        for (at, step) in steps.iter().enumerate() {
            world.take(step);
            for (when, place, byte, cut) in &damages {
                if *when == at {
                    world.die();
                    world.damaged = true;
                    let (path, used) = newest(folder.path());
                    let mut bytes = fs::read(&path).unwrap();
                    let place = place.index(used.max(1));
                    if *cut { bytes.truncate(place) } else { bytes[place] = *byte }
                    fs::write(&path, bytes).unwrap();
                    world.start();
                }
            }
        }
        world.settle();
        for n in &world.manager.ordered {
            // A lost end may be told again as interrupted; a lost beginning is begun again.
            prop_assert!(world.manager.ends.contains_key(&id(*n)), "task {}", n);
        }
    }
}
