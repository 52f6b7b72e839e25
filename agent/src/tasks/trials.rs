//! The desk in situations that no chance brings about: a manager that is away for long or means ill, a disk
//! that takes nothing, a report that rots.

use std::{fs, path::Path};

use bytes::BytesMut;
use tm_protocol::{
    ids::{EndpointId, Sha256, TaskId},
    message::{Assign, Cancel, Outcome, Report, ReportBody, ToManager},
    report::{Coverage, Detection, PathBytes},
    task::{CleanupSpec, PatternRef, ScanLimits, ScanOptions, ScanSpec, TaskSpec},
};
use uuid::Uuid;

use super::{
    CANCEL_MS, Event, Now,
    desk::{Act, Desk},
    journal::{
        Journal,
        record::{Boot, Found},
        tests::scratch,
    },
};
use crate::platform::fs::Object;

const HOUR: u64 = 3_600_000;

fn id(n: u128) -> TaskId {
    TaskId::new(Uuid::from_u128(n))
}

fn assign(n: u128, spec: TaskSpec) -> Assign {
    Assign {
        task: id(n),
        endpoint: EndpointId::new(Uuid::from_u128(1)),
        spec,
        expires_in_ms: 60_000,
        deadline_ms: 100 * HOUR,
        issuer: "a".into(),
        reason: String::new(),
    }
}

fn scan(n: u128) -> Assign {
    scan_of(n, vec![PathBytes(b"/x".to_vec())])
}

fn scan_of(n: u128, paths: Vec<PathBytes>) -> Assign {
    let patterns = vec![PatternRef { sha256: Sha256::of(b"p"), size: 1, name: "p".into() }];
    assign(
        n,
        TaskSpec::Scan(ScanSpec {
            paths,
            patterns,
            limits: ScanLimits::default(),
            options: ScanOptions::default(),
        }),
    )
}

fn cleanup(n: u128) -> Assign {
    assign(n, TaskSpec::Cleanup(CleanupSpec { detections: vec![Sha256::of(b"d")], dry_run: false }))
}

fn found(path: &str) -> Vec<Found> {
    let detection = Detection {
        path: PathBytes(path.as_bytes().to_vec()),
        member: vec![],
        pattern: Sha256::of(b"p"),
        rule: "r".into(),
        sha256: Sha256::of(b"x"),
        size: 1,
    };
    vec![Found::new(detection, Object { device: 1, inode: 1 }, Boot(1))]
}

/// A desk, and a link that keeps all that is sent over it.
struct Bench {
    desk: Desk,
    now: Now,
    sent: Vec<Report>,
    notices: Vec<String>,
    begun: Vec<TaskId>,
    stopped: Vec<TaskId>,
    reconnects: usize,
}

impl Bench {
    fn open(folder: &Path) -> Self {
        Self::open_refusing(folder, false)
    }

    fn open_refusing(folder: &Path, is_refusing: bool) -> Self {
        let now = Now { elapsed_ms: 1000, unix_ms: 1_000_000 };
        let mut opened = Journal::open(folder).unwrap();
        if is_refusing {
            opened.0.writes_left = 0;
        }
        let (desk, acts) = Desk::open_with(opened, EndpointId::new(Uuid::from_u128(1)), Boot(1), now);
        let (begun, stopped, reconnects) = (vec![], vec![], 0);
        let mut bench = Self { desk, now, sent: vec![], notices: vec![], begun, stopped, reconnects };
        bench.perform(acts);
        bench
    }

    fn handle(&mut self, event: Event) {
        let acts = self.desk.handle(event, self.now);
        self.perform(acts);
    }

    fn pass(&mut self, ms: u64) {
        self.now.elapsed_ms += ms;
        self.handle(Event::Tick);
    }

    fn connect(&mut self, reports: u64) {
        self.handle(Event::Connected { reports, notices: 0 });
    }

    fn perform(&mut self, acts: Vec<Act>) {
        for act in acts {
            match act {
                Act::Send(frame) => {
                    let mut bytes = BytesMut::from(&frame[..]);
                    let frame = tm_protocol::frame::take(&mut bytes, ToManager::limit).unwrap().unwrap();
                    match ToManager::decode(&frame).unwrap().unwrap() {
                        ToManager::Report(report) => self.sent.push(report),
                        ToManager::Notices(told) => {
                            self.notices.extend(told.notices.into_iter().map(|notice| notice.code));
                        }
                        ToManager::Hello(_)
                        | ToManager::Inventory(_)
                        | ToManager::Ping(_)
                        | ToManager::Pong(_)
                        | ToManager::Progress(_)
                        | ToManager::Renew(_)
                        | ToManager::EnrollRequest(_) => panic!("nothing of the desk's"),
                    }
                }
                Act::Start { task, .. } => self.begun.push(task),
                Act::Stop(task) => self.stopped.push(task),
                Act::Reconnect => self.reconnects += 1,
            }
        }
    }

    fn ends(&self, task: TaskId) -> usize {
        let is_end = |report: &&Report| matches!(&report.body, ReportBody::Finished { task: of, .. } | ReportBody::Refused { task: of, .. } if *of == task);
        self.sent.iter().filter(is_end).count()
    }

    /// Detections until no more are wanted.
    fn fill(&mut self, task: TaskId) {
        let long = "x".repeat(100_000);
        for n in 0..2000 {
            if self.desk.is_held_up() {
                return;
            }
            let found = found(&format!("/{n}/{long}"));
            self.handle(Event::Detected(task, found, vec![]));
        }
        panic!("it is never full");
    }
}

#[test]
fn an_end_is_remembered_until_the_manager_has_stored_it_and_a_day_more() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.connect(0);
    bench.handle(Event::Assigned(scan(1)));
    bench.handle(Event::ReportsStored { through: 2 });
    bench.handle(Event::Disconnected);
    // Longer than the order could wait twice.
    bench.pass(2 * HOUR);
    bench.handle(Event::Finished(id(1), Outcome::Scanned(Coverage::default())));
    bench.pass(20 * HOUR);
    bench.connect(2);
    // The manager has handed it out again before it heard of the end.
    bench.handle(Event::Assigned(scan(1)));
    assert_eq!((bench.begun.len(), bench.ends(id(1))), (1, 1), "begun again");
    bench.handle(Event::ReportsStored { through: 3 });
    bench.handle(Event::Assigned(scan(1)));
    assert_eq!((bench.begun.len(), bench.ends(id(1))), (1, 1), "begun again, as soon as its end was stored");
    bench.pass(20 * HOUR);
    assert!(bench.desk.is_remembered(id(1)), "a manager that is restored from last night's copy asks again");
    bench.pass(10 * HOUR);
    assert!(!bench.desk.is_remembered(id(1)), "in the end it is forgotten");
    bench.handle(Event::Assigned(scan(2)));
    bench.pass(2 * HOUR);
    bench.handle(Event::Finished(id(2), Outcome::Scanned(Coverage::default())));
    bench.handle(Event::ReportsStored { through: 6 });
    bench.pass(HOUR / 2);
    assert!(bench.desk.is_remembered(id(2)), "a manager that is set back asks again");
}

#[test]
fn a_report_that_rots_is_told_as_lost_in_its_turn_and_the_end_it_told_is_told_anew() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.handle(Event::Assigned(scan(1)));
    bench.handle(Event::Finished(id(1), Outcome::Failed(tm_protocol::report::Failure::new("marked", "m"))));
    bench.handle(Event::Assigned(scan(2)));
    let path = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(6).position(|window| window == b"marked").unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    bench.connect(0);
    // The first few show that the link is good; then the rest is sent.
    bench.handle(Event::ReportsStored { through: 4 });
    let numbers: Vec<u64> = bench.sent.iter().map(|report| report.sequence).collect();
    assert_eq!(numbers, (1..=6).collect::<Vec<_>>());
    assert_eq!(bench.sent[2].body, ReportBody::Lost { count: 0 });
    assert_eq!((bench.ends(id(1)), bench.ends(id(2))), (1, 0));
    assert!(bench.notices.contains(&"journal-damaged".to_owned()), "{:?}", bench.notices);
}

#[test]
fn orders_that_cannot_be_noted_are_turned_away_and_leave_nothing_behind() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.connect(0);
    bench.handle(Event::Assigned(scan(1)));
    bench.desk.refuse(true);
    bench.handle(Event::Cancelled(Cancel { task: id(1) }));
    assert_eq!(bench.stopped, [id(1)], "what runs is stopped all the same");
    bench.handle(Event::Cancelled(Cancel { task: id(99) }));
    assert!(bench.desk.trouble().is_some(), "the control");
    let before = bench.desk.undone();
    for n in 100..1100 {
        bench.handle(Event::Cancelled(Cancel { task: id(n) }));
        bench.handle(Event::Assigned(scan(n)));
    }
    assert_eq!(bench.desk.undone(), before);
    bench.desk.refuse(false);
    bench.pass(1);
    assert_eq!(bench.reconnects, 1, "the manager is asked for them again");
}

#[test]
fn what_is_called_off_before_the_disk_let_it_begin_never_begins() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.connect(0);
    bench.desk.refuse(true);
    bench.handle(Event::Assigned(cleanup(2)));
    bench.handle(Event::Cancelled(Cancel { task: id(2) }));
    bench.pass(HOUR);
    bench.desk.refuse(false);
    bench.pass(1);
    assert_eq!((bench.begun.len(), bench.stopped.len(), bench.ends(id(2))), (0, 0, 1));
    bench.handle(Event::Assigned(cleanup(4)));
    assert_eq!(bench.begun, [id(4)], "nothing stands in the way of the next");
}

#[test]
fn a_manager_that_stores_nothing_cannot_fill_the_disk_and_a_cancel_has_its_say() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.connect(0);
    bench.handle(Event::Assigned(scan(1)));
    bench.handle(Event::Assigned(scan(2)));
    bench.fill(id(1));
    let before = super::journal::tests::size(folder.path());
    for n in 100..3100 {
        bench.handle(Event::Cancelled(Cancel { task: id(n) }));
        bench.handle(Event::Assigned(scan(n)));
    }
    assert_eq!(super::journal::tests::size(folder.path()), before);
    assert!(bench.desk.is_held_up());
    bench.handle(Event::Cancelled(Cancel { task: id(1) }));
    assert_eq!(bench.stopped, [id(1)]);
    assert!(!bench.desk.is_held_up(), "nobody would hear what it has done");
    bench.handle(Event::Finished(id(1), Outcome::Scanned(Coverage::default())));
    assert!(bench.desk.is_held_up());
    // The manager wakes up.
    for _ in 0..2000 {
        let through = bench.sent.last().unwrap().sequence;
        bench.handle(Event::ReportsStored { through });
    }
    assert_eq!((bench.ends(id(1)), bench.reconnects), (1, 1));
    let last = bench.sent.iter().find_map(|report| {
        if let ReportBody::Finished { outcome, .. } = &report.body { Some(outcome.clone()) } else { None }
    });
    assert_eq!(last, Some(Outcome::Cancelled(Some(Coverage::default()))));
}

#[test]
fn a_disk_that_is_full_at_the_start_is_waited_for() {
    for is_new in [true, false] {
        let folder = scratch();
        if !is_new {
            drop(Bench::open(folder.path()));
        }
        let mut bench = Bench::open_refusing(folder.path(), true);
        assert!(bench.desk.trouble().is_some());
        bench.connect(0);
        bench.handle(Event::Assigned(scan(1)));
        assert_eq!((bench.sent.len(), bench.begun.len()), (0, 0));
        bench.desk.refuse(false);
        bench.pass(1000);
        assert!(bench.desk.trouble().is_none() && bench.reconnects > 0);
        bench.handle(Event::Disconnected);
        bench.connect(0);
        bench.handle(Event::Assigned(scan(1)));
        assert_eq!(bench.begun, [id(1)]);
        assert_eq!(bench.sent.iter().map(|report| report.sequence).collect::<Vec<_>>(), [1, 2]);
        let stream = bench.desk.stream();
        drop(bench);
        assert_eq!(Bench::open(folder.path()).desk.stream(), stream);
    }
}

#[test]
fn a_task_that_does_not_stop_is_told_of_and_what_waits_for_it_is_not_begun() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.connect(0);
    bench.handle(Event::Assigned(cleanup(1)));
    bench.handle(Event::Assigned(cleanup(2)));
    bench.handle(Event::Cancelled(Cancel { task: id(1) }));
    bench.pass(CANCEL_MS);
    assert_eq!((bench.ends(id(1)), bench.begun.len()), (1, 1));
    assert!(bench.notices.contains(&"task-stuck".to_owned()), "{:?}", bench.notices);
    bench.handle(Event::Assigned(cleanup(1)));
    bench.handle(Event::Finished(id(1), Outcome::Treated(tm_protocol::report::Tally::default())));
    assert_eq!((bench.ends(id(1)), bench.begun.last()), (1, Some(&id(2))));
}

#[test]
fn orders_of_any_size_and_time_are_bounded() {
    let folder = scratch();
    let mut bench = Bench::open(folder.path());
    bench.connect(0);
    let long = || vec![PathBytes([b"/", &[b'x'; 4000][..]].concat()); 60];
    for n in 1..200 {
        let order = Assign { expires_in_ms: u64::MAX, deadline_ms: u64::MAX, ..scan_of(n, long()) };
        bench.handle(Event::Assigned(order));
        let through = bench.sent.last().unwrap().sequence;
        bench.handle(Event::ReportsStored { through });
    }
    let refused = (1..200).filter(|n| bench.ends(id(*n)) == 1).count();
    assert!((100..190).contains(&refused), "{refused}");
    // Their times reach beyond the end of all clocks.
    bench.handle(Event::Cancelled(Cancel { task: id(1) }));
    bench.pass(u64::MAX / 2);
    drop(bench);
    Bench::open(folder.path());
}
