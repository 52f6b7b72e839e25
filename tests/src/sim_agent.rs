//! Simulated agents: the real wire with a real certificate, and no host behind it. Many fit one process.
//!
//! One behaves as an agent must: it numbers what it reports and tells, keeps it until it is stored, sends it
//! again after each break, answers pings, and takes tasks. What it does with a task is its script's affair.
//! For misbehaviour there is [`crate::wire`].
//!
//! **Invariant:** at most [`WINDOW`] reports and messages of notices are on their way unacknowledged.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tm_protocol::{
    ids::{EndpointId, StreamId, TaskId},
    message::{Assign, Hello, Notices, Outcome, Ping, Pong, Report, ReportBody, ToAgent},
    report::{Coverage, Notice},
};
use tokio::{
    sync::{Notify, oneshot},
    time::{sleep, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    fleet::{Fleet, Pace, Totals},
    wire::{Persona, Wire},
};

/// Reports, and messages of notices, that may be on their way.
pub const WINDOW: u64 = 64;
/// How long a session may take to be opened.
const OPEN: Duration = Duration::from_secs(20);
/// Bytes that may wait to be written before more are queued.
const UNWRITTEN: usize = 64 * 1024;

/// What an agent does with an order: the reports that it makes of it.
pub type Script = Arc<dyn Fn(&Assign) -> Vec<ReportBody> + Send + Sync>;

/// Takes every order, begins it and is done with it.
pub fn done_at_once() -> Script {
    Arc::new(|assign| {
        let task = assign.task;
        let outcome = Outcome::Scanned(Coverage { files: 1, ..Coverage::default() });
        vec![
            ReportBody::Accepted { task },
            ReportBody::Started { task },
            ReportBody::Finished { task, outcome },
        ]
    })
}

/// Takes every order and begins it; the test says what comes of it.
pub fn begun() -> Script {
    Arc::new(|assign| {
        let task = assign.task;
        vec![ReportBody::Accepted { task }, ReportBody::Started { task }]
    })
}

/// A simulated agent, running until it is dropped.
#[derive(Debug)]
pub struct SimAgent {
    /// Who it is.
    pub persona: Persona,
    shared: Arc<Shared>,
    _ending: DropGuard,
}

/// How far an agent is.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Whether it has a session.
    pub connected: bool,
    /// Sessions it has had.
    pub sessions: u64,
    /// Reports made, and those of them that are stored.
    pub reports: u64,
    /// Stored ones.
    pub reports_stored: u64,
    /// Notices made.
    pub notices: u64,
    /// Stored ones.
    pub notices_stored: u64,
    /// How often each order has come.
    pub assigned: BTreeMap<TaskId, u64>,
    /// Why the last session ended.
    pub last_end: String,
}

struct Shared {
    state: Mutex<State>,
    /// There is something to send.
    wake: Notify,
    script: Script,
    fleet: Fleet,
    /// What it hands in is numbered anew with each value: its journal is in memory and begins empty.
    stream: StreamId,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

/// What an agent's journal would hold, and what the test waits for.
#[derive(Debug, Default)]
struct State {
    seen: Snapshot,
    reports: VecDeque<Report>,
    notices: VecDeque<(u64, Notice)>,
    /// The highest that were sent in this session.
    reports_sent: u64,
    notices_sent: u64,
    waiting: VecDeque<(u64, Instant, oneshot::Sender<Duration>)>,
    /// Numbers of the reports that end a task and are not stored.
    ends: VecDeque<u64>,
    pings: Vec<oneshot::Sender<Duration>>,
}

impl SimAgent {
    /// Runs `persona` on the present runtime, connecting to `at`.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn start(persona: Persona, at: SocketAddr, script: Script) -> Self {
        Self::start_at(persona, vec![at], script)
    }

    /// The same with several managers to go to, in order, again and again.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn start_at(persona: Persona, at: Vec<SocketAddr>, script: Script) -> Self {
        Self::start_in(&Fleet::new(Pace::Quick), persona, at, script)
    }

    /// The same as one of a fleet, which is counted together.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn start_in(fleet: &Fleet, persona: Persona, at: Vec<SocketAddr>, script: Script) -> Self {
        let (state, fleet, stream) = (Mutex::default(), fleet.clone(), new_stream(persona.endpoint));
        let shared = Arc::new(Shared { state, wake: Notify::new(), script, fleet, stream });
        let ending = CancellationToken::new();
        let guard = ending.clone().drop_guard();
        let (inner, who) = (Arc::clone(&shared), persona.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = live(&who, &at, &inner) => {}
                () = ending.cancelled() => {}
            }
        });
        Self { persona, shared, _ending: guard }
    }

    /// How far it is.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.lock().seen.clone()
    }

    /// Reports; to be sent when there is a session.
    pub fn report(&self, body: ReportBody) {
        self.shared.lock().report(body);
        self.shared.wake.notify_one();
    }

    /// Reports and waits until it is stored; how long that took.
    ///
    /// # Panics
    /// If the agent has ended.
    pub async fn report_timed(&self, body: ReportBody) -> Duration {
        let (sender, stored) = oneshot::channel();
        {
            let mut state = self.shared.lock();
            let number = state.report(body);
            state.waiting.push_back((number, Instant::now(), sender));
        }
        self.shared.wake.notify_one();
        stored.await.expect("the agent runs")
    }

    /// Tells something unasked.
    pub fn notice(&self, code: &str, message: &str) {
        let mut state = self.shared.lock();
        state.seen.notices += 1;
        let number = state.seen.notices;
        let notice =
            Notice { at_ms: 1_750_000_000_000, code: code.into(), message: message.into(), count: 0 };
        state.notices.push_back((number, notice));
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Pings and waits for the answer; how long that took. `None` if the link ended meanwhile.
    pub async fn ping_timed(&self) -> Option<Duration> {
        let (sender, answered) = oneshot::channel();
        self.shared.lock().pings.push(sender);
        self.shared.wake.notify_one();
        answered.await.ok()
    }
}

/// A stream that no agent had before.
fn new_stream(endpoint: EndpointId) -> StreamId {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let low = endpoint.uuid().as_u128() & u128::from(u64::MAX);
    let hex = format!("{:016x}{low:016x}", now.as_nanos() & u128::from(u64::MAX));
    let text = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    text.parse().expect("so many digits are an id")
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn report(&mut self, body: ReportBody) -> u64 {
        self.seen.reports += 1;
        let sequence = self.seen.reports;
        if matches!(body, ReportBody::Finished { .. } | ReportBody::Refused { .. }) {
            self.ends.push_back(sequence);
        }
        self.reports.push_back(Report { sequence, at_ms: 1_750_000_000_000, body });
        sequence
    }

    fn reports_are_stored(&mut self, through: u64, totals: &Totals) {
        self.seen.reports_stored = self.seen.reports_stored.max(through);
        while self.ends.front().is_some_and(|number| *number <= through) {
            self.ends.pop_front();
            totals.done();
        }
        while self.reports.front().is_some_and(|report| report.sequence <= through) {
            self.reports.pop_front();
        }
        while self.waiting.front().is_some_and(|(number, ..)| *number <= through) {
            if let Some((_, since, sender)) = self.waiting.pop_front() {
                let _ = sender.send(since.elapsed());
            }
        }
    }

    fn notices_are_stored(&mut self, through: u64) {
        self.seen.notices_stored = self.seen.notices_stored.max(through);
        while self.notices.front().is_some_and(|(number, _)| *number <= through) {
            self.notices.pop_front();
        }
    }

    /// The next report to send, if the window allows one.
    fn next_report(&mut self) -> Option<Report> {
        let first = self.reports.front()?.sequence;
        let next = (self.reports_sent + 1).max(first);
        if next >= first + WINDOW {
            return None;
        }
        let report = self.reports.get(usize::try_from(next - first).ok()?)?.clone();
        self.reports_sent = next;
        Some(report)
    }

    /// The next notices to send.
    fn next_notices(&mut self) -> Option<Notices> {
        let most = u64::try_from(Notices::MAX).ok()?;
        let oldest = self.notices.front()?.0;
        let first = (self.notices_sent + 1).max(oldest);
        if first >= oldest + WINDOW * most {
            return None;
        }
        let skip = usize::try_from(first - oldest).ok()?;
        let notices: Vec<Notice> =
            self.notices.iter().skip(skip).take(Notices::MAX).map(|(_, notice)| notice.clone()).collect();
        if notices.is_empty() {
            return None;
        }
        self.notices_sent = first + u64::try_from(notices.len()).ok()? - 1;
        Some(Notices { first, notices })
    }
}

/// Connects, again and again.
async fn live(persona: &Persona, at: &[SocketAddr], shared: &Shared) {
    let mut attempt = 0_u64;
    let mut failures = 0_u32;
    for at in at.iter().copied().cycle() {
        attempt += 1;
        let before = shared.lock().seen.sessions;
        let ended = session(persona, at, shared).await;
        {
            let mut state = shared.lock();
            state.pings.clear();
            let opened = state.seen.sessions > before;
            failures = if opened { 0 } else { failures.saturating_add(1) };
            if let Err(error) = ended {
                shared.fleet.totals.ended(opened, &error);
                state.seen.last_end = error.to_string();
            }
        }
        sleep(shared.fleet.pace.wait(persona.endpoint, attempt, failures)).await;
    }
}

/// That an agent has a session, for as long as it has.
struct Standing<'s>(&'s Shared);

impl<'s> Standing<'s> {
    fn new(shared: &'s Shared) -> Self {
        let mut state = shared.lock();
        state.seen.connected = true;
        state.seen.sessions += 1;
        shared.fleet.totals.connected();
        Self(shared)
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.0.lock().seen.connected = false;
        self.0.fleet.totals.away();
    }
}

/// One session, until it breaks; `Ok` if it was cut on purpose.
async fn session(persona: &Persona, at: SocketAddr, shared: &Shared) -> io::Result<()> {
    let nonce = u64::try_from(persona.endpoint.uuid().as_u128() & u128::from(u64::MAX)).unwrap_or(0);
    let turn = shared.fleet.turn().await;
    let hello = Hello { stream: shared.stream, ..persona.hello(nonce) };
    let opened = timeout(OPEN, persona.open_with(at, hello)).await;
    let opened = opened.map_err(|_| io::ErrorKind::TimedOut)?;
    drop(turn);
    let (Wire { mut ears, mut mouth }, welcome) = opened?;
    let mut cut = shared.fleet.cuts();
    let _standing = Standing::new(shared);
    {
        let mut state = shared.lock();
        state.reports_sent = welcome.stored_through;
        state.notices_sent = welcome.notices_through;
        state.reports_are_stored(welcome.stored_through, &shared.fleet.totals);
        state.notices_are_stored(welcome.notices_through);
    }
    // As agents do, in every session.
    mouth.queue(&persona.inventory().into());
    let heartbeat = Duration::from_millis(u64::from(welcome.heartbeat_ms));
    let silence = heartbeat * 2;
    let mut last_heard = tokio::time::Instant::now();
    let mut next_ping = last_heard + heartbeat;
    let mut asked: VecDeque<(u64, Instant, oneshot::Sender<Duration>)> = VecDeque::new();
    let mut pings = 0_u64;
    loop {
        while mouth.len() < UNWRITTEN {
            let mut state = shared.lock();
            if let Some(sender) = state.pings.pop() {
                pings += 1;
                asked.push_back((pings, Instant::now(), sender));
                mouth.queue(&Ping { nonce: pings }.into());
            } else if let Some(report) = state.next_report() {
                mouth.queue(&report.into());
            } else if let Some(notices) = state.next_notices() {
                mouth.queue(&notices.into());
            } else {
                break;
            }
        }
        tokio::select! {
            heard = ears.hear() => {
                last_heard = tokio::time::Instant::now();
                match heard? {
                    ToAgent::Ping(Ping { nonce }) => mouth.queue(&Pong { nonce }.into()),
                    ToAgent::Pong(Pong { nonce }) => {
                        if asked.front().is_some_and(|(number, ..)| *number == nonce)
                            && let Some((_, since, sender)) = asked.pop_front()
                        {
                            let _ = sender.send(since.elapsed());
                        }
                    }
                    ToAgent::Assign(assign) => {
                        let mut state = shared.lock();
                        let times = state.seen.assigned.entry(assign.task).or_default();
                        *times += 1;
                        // What was taken once is not begun again.
                        shared.fleet.totals.assigned(*times == 1);
                        if *times == 1 {
                            for body in (shared.script)(&assign) {
                                state.report(body);
                            }
                        }
                    }
                    ToAgent::ReportStored(stored) => {
                        shared.lock().reports_are_stored(stored.through, &shared.fleet.totals);
                    }
                    ToAgent::NoticesStored(stored) => shared.lock().notices_are_stored(stored.through),
                    ToAgent::Cancel(_) => {}
                    ToAgent::Goodbye(goodbye) => return Err(io::Error::other(goodbye.failure.to_string())),
                    ToAgent::Authorities(_) | ToAgent::RenewNow(_) => {}
                    ToAgent::Held(_) | ToAgent::NewIdentity(_) | ToAgent::Welcome(_) | ToAgent::EnrollReply(_) | ToAgent::Renewed(_) => {
                        return Err(io::Error::other("a message out of place"));
                    }
                }
            }
            pushed = mouth.push(), if !mouth.is_empty() => pushed?,
            () = shared.wake.notified() => {}
            _ = cut.changed() => return Ok(()),
            () = sleep_until(next_ping) => {
                next_ping += heartbeat;
                mouth.queue(&Ping { nonce: 0 }.into());
            }
            () = sleep_until(last_heard + silence) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
