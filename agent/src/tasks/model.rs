//! The desk against a model of its manager, its executors and its disk: whatever happens in whatever order,
//! with crashes between any two steps, every order has one end and every report arrives once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use bytes::BytesMut;
use proptest::prelude::*;
use tm_protocol::{
    ids::{EndpointId, Sha256, StreamId, TaskId},
    message::{Assign, Cancel, Outcome, ReportBody, ToManager},
    report::{Coverage, Detection, PathBytes, Tally},
    task::{CleanupSpec, PatternRef, ScanLimits, ScanOptions, ScanSpec, TaskSpec},
};
use uuid::Uuid;

use super::{
    Event, Now,
    desk::{Act, Desk},
    journal::{
        Journal,
        record::{Boot, Found},
        tests::scratch,
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
            options: ScanOptions::default(),
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
    /// The manager calls off what it never ordered.
    CancelUnknown(u128),
    /// The executor of one running task comes to its end.
    Finish(usize),
    /// It never comes to an end.
    Hang(usize),
    /// It detects something.
    Detect(usize),
    Notice,
    /// The disk takes nothing, or takes everything again.
    Refuse(bool),
    Tick(u64),
    Cut,
    Connect,
    /// What the manager says is lost on the way.
    LoseAck(bool),
    /// The agent dies between two steps.
    Crash,
    /// It dies within the next step: after the write, or with this share of the write done.
    CrashWithin(Option<prop::sample::Index>),
    /// The machine starts again, and its wall clock says that so much time has passed.
    Reboot(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u128..12).prop_map(Step::Order),
        2 => (1u128..12).prop_map(Step::Cancel),
        1 => (20u128..23).prop_map(Step::CancelUnknown),
        1 => (0usize..4).prop_map(Step::Hang),
        2 => any::<bool>().prop_map(Step::Refuse),
        5 => (0usize..4).prop_map(Step::Finish),
        4 => (0usize..4).prop_map(Step::Detect),
        2 => Just(Step::Notice),
        3 => (1u64..1500).prop_map(Step::Tick),
        1 => Just(Step::Tick(2 * 3_600_000)),
        2 => Just(Step::Cut),
        4 => Just(Step::Connect),
        1 => any::<bool>().prop_map(Step::LoseAck),
        2 => Just(Step::Crash),
        2 => proptest::option::of(any::<prop::sample::Index>()).prop_map(Step::CrashWithin),
        1 => prop_oneof![Just(100), Just(i64::from(i32::MAX)), Just(-i64::from(i32::MAX))]
            .prop_map(Step::Reboot),
    ]
}

#[derive(Debug, Clone)]
enum Damage {
    /// A byte changes while the agent is not running.
    Flip(prop::sample::Index, u8),
    /// The same while it runs.
    Rot(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    /// What was kept earlier stands there again.
    SetBack,
}

fn damage() -> impl Strategy<Value = Damage> {
    let place = any::<prop::sample::Index>;
    prop_oneof![
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Flip(at, byte)),
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Rot(at, byte)),
        place().prop_map(Damage::Cut),
        Just(Damage::SetBack),
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
    /// Decided, and not yet performed.
    acts: VecDeque<Act>,
    is_performing: bool,
    manager: Manager,
    connected: bool,
    lose_acks: bool,
    executors: Vec<TaskId>,
    /// Those of them that never come to an end.
    hung: BTreeSet<TaskId>,
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
            acts: VecDeque::new(),
            is_performing: false,
            manager: Manager::default(),
            connected: false,
            lose_acks: false,
            executors: Vec::new(),
            hung: BTreeSet::new(),
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
        let (desk, acts) = Desk::open_with(opened, endpoint(), Boot(self.boot), self.now);
        self.desk = Some(desk);
        self.perform(acts);
    }

    fn die(&mut self) {
        self.desk = None;
        self.acts.clear();
        self.executors.clear();
        self.hung.clear();
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

    /// One after the other: what an act leads to comes after what was decided before it.
    fn perform(&mut self, acts: Vec<Act>) {
        self.acts.extend(acts);
        if std::mem::replace(&mut self.is_performing, true) {
            return;
        }
        while let Some(act) = self.acts.pop_front() {
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
        self.is_performing = false;
    }

    fn cut(&mut self) {
        if self.connected {
            self.connected = false;
            self.acts.retain(|act| !matches!(act, Act::Send(_)));
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
        // The manager hands out again what has not ended, also if the end is on its way.
        let open: Vec<u128> = self
            .manager
            .ordered
            .iter()
            .copied()
            .filter(|n| !self.manager.ends.contains_key(&id(*n)))
            .collect();
        self.handle(Event::Connected { reports, notices });
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
                let lost = if let ReportBody::Lost { count } = &report.body { *count } else { 0 };
                let follows = report.sequence - lost - 1;
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
                    ReportBody::Accepted { .. }
                    | ReportBody::Started { .. }
                    | ReportBody::Detections { .. }
                    | ReportBody::Items { .. }
                    | ReportBody::Vault { .. }
                    | ReportBody::Owned { .. } => {}
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
            ToManager::Hello(_)
            | ToManager::Inventory(_)
            | ToManager::Ping(_)
            | ToManager::Pong(_)
            | ToManager::Progress(_)
            | ToManager::Renew(_)
            | ToManager::EnrollRequest(_) => panic!("nothing of the desk's"),
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
                let is_open = self.manager.ordered.contains(n) && !self.manager.ends.contains_key(&id(*n));
                if self.connected && is_open {
                    self.handle(Event::Cancelled(Cancel { task: id(*n) }));
                }
            }
            Step::CancelUnknown(n) => {
                if self.connected && !self.manager.ends.contains_key(&id(*n)) {
                    self.handle(Event::Cancelled(Cancel { task: id(*n) }));
                }
            }
            Step::Finish(which) => self.finish(*which),
            Step::Hang(which) => self.hung.extend(self.pick(*which)),
            Step::Refuse(is_refusing) => self.desk.as_mut().unwrap().refuse(*is_refusing),
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
                    let found = vec![Found::new(detection, object, Boot(self.boot))];
                    self.handle(Event::Detected(task, found, vec![]));
                    let desk = self.desk.as_ref().unwrap();
                    // A task that was given up in the meantime is not heard any more.
                    if desk.trouble().is_none() && desk.running().contains(&task) {
                        let found = desk.found(key).unwrap().unwrap();
                        assert_eq!(found.object(Boot(self.boot)), Some(object));
                    }
                }
            }
            Step::Notice => {
                if self.is_heard() {
                    self.handle(Event::Notice { code: "n", message: String::new(), count: 0 });
                    // What is not on disk may be lost.
                    self.noted += u64::from(self.is_heard());
                }
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
            Step::Reboot(passed) => {
                self.die();
                self.boot += 1;
                self.now = Now { elapsed_ms: 10, unix_ms: self.now.unix_ms + passed };
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
            Step::Cancel(n) => {
                let is_open = self.manager.ordered.contains(n) && !self.manager.ends.contains_key(&id(*n));
                (connected && is_open).then(|| Event::Cancelled(Cancel { task: id(*n) }))
            }
            Step::Finish(which) => self.pick(*which).map(|task| Event::Finished(task, outcome(task))),
            Step::Connect => {
                let stored = self.manager.stored.get(&self.desk.as_ref().unwrap().stream());
                let (reports, notices) = stored.copied().unwrap_or_default();
                (!connected).then_some(Event::Connected { reports, notices })
            }
            Step::Order(_)
            | Step::CancelUnknown(_)
            | Step::Hang(_)
            | Step::Detect(_)
            | Step::Notice
            | Step::Refuse(_)
            | Step::Tick(_)
            | Step::Cut
            | Step::LoseAck(_)
            | Step::Crash
            | Step::CrashWithin(_)
            | Step::Reboot(_) => None,
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

    /// An executor that is still heard and has something to say.
    fn pick(&self, which: usize) -> Option<TaskId> {
        let at_work: Vec<TaskId> =
            self.executors.iter().copied().filter(|task| !self.hung.contains(task)).collect();
        at_work.get(which % at_work.len().max(1)).copied().filter(|_| self.is_heard())
    }

    /// While the desk is held up nobody listens to executors.
    fn is_heard(&self) -> bool {
        !self.desk.as_ref().unwrap().is_held_up()
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
        self.take(&Step::Refuse(false));
        for _ in 0..200 {
            self.cut();
            self.connect();
            while self.pick(0).is_some() {
                self.finish(0);
            }
            self.take(&Step::Tick(700));
            let all = self.manager.ordered.iter().all(|n| self.manager.ends.contains_key(&id(*n)));
            if all && self.executors.len() == self.hung.len() {
                // Whoever wakes up after all has nothing to add.
                self.hung.clear();
                while self.pick(0).is_some() {
                    self.finish(0);
                }
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

/// Has a folder hold what another does.
fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(to).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
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
    #![proptest_config(runs(1_500))]

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
        prop_assert!(world.manager.ends.values().all(|ends| *ends == 1), "{:?}", world.manager.ends);
        prop_assert_eq!(world.manager.lost, 0);
        // A torn write is told of; nothing else is.
        prop_assert!(world.manager.notices >= world.noted, "{} of {}", world.manager.notices, world.noted);
    }
}

proptest! {
    #![proptest_config(runs(500))]

    /// A byte of the journal changes, its end is cut off, or the machine is set back to an earlier state, at any
    /// time: the agent starts or goes on, every order still has an end, and what was lost is counted.
    #[test]
    fn damage_loses_only_what_it_touches(
        steps in prop::collection::vec(step(), 1..60),
        damages in prop::collection::vec((0usize..60, damage()), 1..4),
        kept in 0usize..60,
    ) {
        let folder = scratch();
        let copy = scratch();
        let mut world = World::new(folder.path());
        for (at, step) in steps.iter().enumerate() {
            if at == kept {
                copy_files(folder.path(), copy.path());
            }
            world.take(step);
            for (_, damage) in damages.iter().filter(|(when, _)| *when == at) {
                world.damaged = true;
                let (path, used) = newest(folder.path());
                let mut bytes = fs::read(&path).unwrap();
                match damage {
                    Damage::Rot(..) => {}
                    Damage::Flip(..) | Damage::Cut(_) | Damage::SetBack => world.die(),
                }
                match damage {
                    Damage::Flip(place, byte) | Damage::Rot(place, byte) => {
                        bytes[place.index(used.max(1))] = *byte;
                        fs::write(&path, bytes).unwrap();
                    }
                    Damage::Cut(place) => {
                        bytes.truncate(place.index(used.max(1)));
                        fs::write(&path, bytes).unwrap();
                    }
                    Damage::SetBack if at >= kept => copy_files(copy.path(), folder.path()),
                    Damage::SetBack => {}
                }
                if world.desk.is_none() {
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
