//! The running agent: one owner of state, one loop.
//!
//! **Invariant:** two agents never use one folder; the second says who holds it and ends.

mod certificate;
mod held;
mod opening;

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use tm_protocol::{
    VERSION,
    address::Address,
    ids::{Sha256, TaskId},
    message::{Goodbye, Hello, Inventory, Ping, Pong, ToAgent, ToManager, Welcome},
    report::Failure,
    task::{CleanupSpec, TaskKind, TaskSpec},
    text::escape_for_display,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
    time::sleep,
};
use uuid::Uuid;

use self::{
    certificate::Links,
    opening::{Opened, open_session},
};
use crate::{
    clock,
    config::Config,
    connection::{self, ConnectError, Link, backoff},
    enroll::{self, Enrolled},
    local,
    paths::{Paths, replace},
    platform::facts,
    renewal,
    tasks::{
        Event, Now, care,
        desk::{Act, Desk},
        execute::{self, Context, Told, Work},
        journal::record::{Boot, Found},
        sign::Signer,
    },
    tls::KnownTime,
};

/// How often facts are looked at again.
const INVENTORY: Duration = Duration::from_secs(60);
/// A session that lasted this long starts the waits anew.
const GOOD_SESSION: Duration = Duration::from_secs(60);
/// The longest silence before a link is given up, whatever the manager asks for.
const LONGEST_SILENCE: Duration = Duration::from_secs(55);
/// How often the vault is looked after.
const CARE: Duration = Duration::from_secs(60);
/// How often time is kept.
const TICK: Duration = Duration::from_secs(1);
/// How far the wall clock may drift between two looks before it counts as a jump, in milliseconds.
const CLOCK_JUMP_MS: u64 = 60_000;
/// What running tasks have told and the loop has not heard; beyond it they wait.
const TOLD: usize = 64;

/// What `tm-agent status` shows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) endpoint: String,
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// Present while there is a session.
    pub(crate) manager: Option<String>,
    /// Since when it is connected or not (RFC 3339).
    pub(crate) since: String,
    pub(crate) last_failure: Option<Failure>,
    /// Where the proxy is that every connection goes through, if one is set.
    #[serde(default)]
    pub(crate) proxy: Option<String>,
    /// Why the settings are not used, if they are not.
    #[serde(default)]
    pub(crate) settings_fault: Option<String>,
    pub(crate) running_task: Option<String>,
    /// When the certificate ends (RFC 3339).
    #[serde(default)]
    pub(crate) certificate_ends: String,
    /// Why the certificate was not renewed when it was to be, if it was not.
    #[serde(default)]
    pub(crate) renewal_failure: Option<String>,
    /// By how many seconds this machine's clock is ahead of the manager's, if that is much; negative if behind.
    #[serde(default)]
    pub(crate) clock_ahead_s: Option<i64>,
    /// Why nothing can be written down, if nothing can: no task is then taken.
    #[serde(default)]
    pub(crate) journal_trouble: Option<String>,
}

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("another tm-agent (pid {0}) already uses this folder")]
    Locked(String),
    #[error("cannot use the folder `{path}`")]
    Folder { path: String, source: std::io::Error },
    #[error(transparent)]
    Identity(#[from] crate::enroll::EnrollError),
    #[error("cannot open the journal in `{path}`")]
    Journal { path: String, source: std::io::Error },
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    #[error("cannot listen to signals")]
    Signals(#[source] std::io::Error),
}

/// Why the agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to.
    Told,
    /// It has become another endpoint: the process has to begin anew, so that nothing of the old one goes on in it.
    Another,
}

/// Runs until it is told to end, or has become another endpoint; users' scans come in at `socket`.
pub(crate) async fn run(paths: Paths, socket: &Path) -> Result<End, DaemonError> {
    let _lock = lock(&paths)?;
    let (config, config_fault) = match Config::load(&paths) {
        Ok(config) => (config, None),
        Err(error) => (Config::cautious(&paths), Some(connection::chain(&error))),
    };
    let enrolled = Enrolled::load(&paths)?;
    enroll::set_aside(&paths)
        .map_err(|source| DaemonError::Folder { path: paths.root().display().to_string(), source })?;
    let time = KnownTime::unknown();
    if let Some(offset_ms) = clock::last_known(&paths, &facts::boot_id()) {
        time.set(offset_ms);
    }
    let links = Links::of(&enrolled, &time, config.proxy.as_ref()).map_err(DaemonError::Tls)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let (tell, told) = mpsc::channel(TOLD);
    let boot = Boot(facts::boot_id().parse().map_or(0, |id: Uuid| id.as_u128()));
    let (desk, acts) = Desk::open(&paths.journal(), enrolled.endpoint, boot, now())
        .map_err(|source| DaemonError::Journal { path: paths.journal().display().to_string(), source })?;
    let status = Status {
        endpoint: enrolled.endpoint.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        since: jiff::Timestamp::now().to_string(),
        certificate_ends: ends(&enrolled),
        proxy: config.proxy.as_ref().map(|proxy| proxy.address().to_string()),
        settings_fault: config_fault.clone(),
        ..Status::default()
    };
    let mut agent = Agent {
        desk,
        nonce: rand::random(),
        shown: care::Shown::default(),
        last_care: None,
        care: None,
        look: None,
        manager_offset_ms: None,
        config,
        clock_offset_ms: None,
        welcomed_at: None,
        cancels: BTreeMap::new(),
        paths,
        signer: signer(&enrolled),
        enrolled,
        links,
        time,
        asked: None,
        own_key: None,
        is_another: false,
        ask_after: None,
        anew_at: None,
        spread: rand::random(),
        tell,
        told,
        status,
    };
    agent.watch_clock();
    if let Some(message) = config_fault {
        tracing::error!("The settings are not used: {message}.");
        agent.decide(Event::Notice { code: "config-invalid", message, count: 0 });
    }
    agent.care();
    agent.write_status();
    acts.into_iter().for_each(|act| agent.perform(act));
    let _users = serve_users(&agent.paths, socket);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(endpoint = %agent.enrolled.endpoint, "The agent runs.");
    tokio::select! {
        () = agent.connect_until_another() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let end = if agent.is_another { End::Another } else { End::Told };
    for cancel in agent.cancels.values() {
        cancel.store(true, Ordering::Release);
    }
    let _ = std::fs::remove_file(agent.paths.status());
    tracing::info!("The agent ends.");
    Ok(end)
}

/// Scans for this endpoint's users, until it is dropped. An agent that cannot does everything else.
fn serve_users(paths: &Paths, socket: &Path) -> Option<local::Server> {
    let data = paths.root().to_owned();
    let start = move || {
        let mut command = Command::new("/proc/self/exe");
        command.args(["scan-session", "--data"]).arg(&data).env_clear().stdout(Stdio::null());
        if let Some(filter) = std::env::var_os("TM_LOG") {
            command.env("TM_LOG", filter);
        }
        command
    };
    let server = local::Server::start(socket, local::Limits::default(), Box::new(start));
    server
        .inspect_err(|error| {
            let error = escape_for_display(&connection::chain(error));
            tracing::error!(error, "Users cannot scan through this agent.");
        })
        .ok()
}

/// Whether an agent holds the folder.
pub(crate) fn is_running(paths: &Paths) -> bool {
    File::open(paths.lock())
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)))
}

fn lock(paths: &Paths) -> Result<File, DaemonError> {
    let folder = |source| DaemonError::Folder { path: paths.root().display().to_string(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(paths.lock())
        .map_err(folder)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            return Err(DaemonError::Locked(holder.trim().to_owned()));
        }
        Err(std::fs::TryLockError::Error(source)) => return Err(folder(source)),
    }
    // For people who wonder who holds it; on a full disk it is held all the same.
    let _ =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

struct Agent {
    desk: Desk,
    nonce: u64,
    /// The vault as the manager was last told of it.
    shown: care::Shown,
    last_care: Option<Instant>,
    care: Option<JoinHandle<()>>,
    look: Option<JoinHandle<Inventory>>,
    /// The manager's wall time less elapsed time, when it last welcomed us, in milliseconds.
    manager_offset_ms: Option<i64>,
    config: Config,
    /// Wall time less elapsed time, when last looked at.
    clock_offset_ms: Option<i64>,
    /// When the session in hand was welcomed.
    welcomed_at: Option<Instant>,
    cancels: BTreeMap<TaskId, Arc<AtomicBool>>,
    paths: Paths,
    enrolled: Enrolled,
    signer: Option<Signer>,
    links: Links,
    /// What a manager said that the time is.
    time: KnownTime,
    /// The key whose certificate is awaited in this session.
    asked: Option<renewal::Asked>,
    /// The key for an identity of its own, while another agent has this one's, too.
    own_key: Option<renewal::Asked>,
    /// Whether the identity on disk is another endpoint's.
    is_another: bool,
    /// When the next certificate is to be asked for although the present one is still good for long: another
    /// authority issues now, or its key was copied.
    anew_at: Option<Instant>,
    /// When a refused renewal may be asked for again.
    ask_after: Option<Instant>,
    /// Where in the time for it this agent renews, from 0 to 1: a fleet's renewals spread.
    spread: f64,
    tell: mpsc::Sender<Told>,
    told: mpsc::Receiver<Told>,
    status: Status,
}

/// How a session ended.
struct Ended {
    error: ConnectError,
    /// The manager's own words, if it said goodbye.
    goodbye: Option<(Failure, Duration)>,
}

impl Agent {
    async fn connect_until_another(&mut self) {
        let mut failures = 0;
        loop {
            let mut retry_after = Duration::ZERO;
            for address in self.enrolled.addresses.clone() {
                let before = self.desk.stored();
                let ended = self.session(&address).await;
                if self.is_another {
                    return;
                }
                self.asked = None;
                if ended.error.is_expired() && self.renew_late(&address).await {
                    failures = 0;
                }
                // A session that brought something across was a good one, however short.
                let was_good = self.welcomed_at.take().is_some_and(|at| at.elapsed() >= GOOD_SESSION);
                if was_good || self.desk.stored() != before {
                    failures = 0;
                }
                let failure = match ended.goodbye {
                    Some((failure, wait)) => {
                        retry_after = retry_after.max(wait);
                        failure
                    }
                    None => Failure::new(ended.error.code(), connection::chain(&ended.error)),
                };
                tracing::warn!(%address, code = failure.code, "No session: {}.", failure.message);
                self.status.last_failure = Some(failure);
                if self.status.manager.take().is_some() {
                    self.status.since = jiff::Timestamp::now().to_string();
                }
                self.write_status();
            }
            let wait = backoff::wait(failures, rand::random()).max(retry_after);
            failures += 1;
            self.meanwhile(sleep(wait)).await;
        }
    }

    /// Waits for something outside of any session, while running tasks go on and time is kept.
    async fn meanwhile<F: Future>(&mut self, something: F) -> F::Output {
        tokio::pin!(something);
        loop {
            tokio::select! {
                output = &mut something => return output,
                Some(told) = self.told.recv(), if !self.desk.is_held_up() => {
                    if let Some(event) = event(told) {
                        self.decide(event);
                    }
                }
                () = sleep(TICK) => self.tick(),
            }
        }
    }

    /// One session, to its end.
    async fn session(&mut self, address: &Address) -> Ended {
        let ended = match self.try_session(address).await {
            Ok(ended) => ended,
            Err(error) => Ended { error, goodbye: None },
        };
        self.decide(Event::Disconnected);
        ended
    }

    async fn try_session(&mut self, address: &Address) -> Result<Ended, ConnectError> {
        let opening = open_session(address.clone(), self.links.control.clone(), self.hello());
        let (mut link, mut buffer, welcome) = match self.meanwhile(opening).await? {
            Opened::Welcomed(session) => *session,
            Opened::SentAway(goodbye) => return Ok(Ended::goodbye(goodbye)),
            Opened::Held(waiting) => {
                let (link, buffer, held) = *waiting;
                return self.wait_as_held(link, buffer, held).await;
            }
        };
        self.welcomed(address, &welcome);
        let mut inventory = None;
        self.begin_look();
        let standing = Event::Connected { reports: welcome.stored_through, notices: welcome.notices_through };
        let acts = self.handle(standing);
        self.perform_all(acts, &mut link).await?;
        let heartbeat = Duration::from_millis(u64::from(welcome.heartbeat_ms.clamp(200, 60_000)));
        let silence = (heartbeat * 2).clamp(Duration::from_secs(1), LONGEST_SILENCE);
        let (mut last_heard, mut last_look) = (Instant::now(), Instant::now());
        let mut next_ping = Instant::now() + jittered(heartbeat);
        loop {
            let wake = next_ping.min(last_heard + silence).min(Instant::now() + TICK);
            let acts = tokio::select! {
                message = connection::read(&mut link, &mut buffer) => {
                    last_heard = Instant::now();
                    match message? {
                        ToAgent::Ping(Ping { nonce }) => {
                            send(&mut link, Pong { nonce }.into()).await?;
                            Vec::new()
                        }
                        ToAgent::Pong(_) | ToAgent::Welcome(_) => Vec::new(),
                        ToAgent::Assign(assign) => self.handle(Event::Assigned(assign)),
                        ToAgent::Cancel(cancel) => self.handle(Event::Cancelled(cancel)),
                        ToAgent::ReportStored(stored) => {
                            self.handle(Event::ReportsStored { through: stored.through })
                        }
                        ToAgent::NoticesStored(stored) => {
                            self.handle(Event::NoticesStored { through: stored.through })
                        }
                        ToAgent::Renewed(renewed) => {
                            if self.renewed(renewed) {
                                return Err(ConnectError::Anew);
                            }
                            Vec::new()
                        }
                        ToAgent::Authorities(authorities) => {
                            self.learn(authorities, &link);
                            Vec::new()
                        }
                        ToAgent::RenewNow(_) => {
                            self.renew_now();
                            Vec::new()
                        }
                        ToAgent::Goodbye(goodbye) => return Ok(Ended::goodbye(goodbye)),
                        ToAgent::Held(_) | ToAgent::NewIdentity(_) => {
                            return Err(ConnectError::Protocol("a session is not held"));
                        }
                        ToAgent::EnrollReply(_) => return Err(ConnectError::Protocol("an enrollment nobody asked for")),
                    }
                }
                Some(told) = self.told.recv(), if !self.desk.is_held_up() => match told {
                    Told::Progress(progress) => {
                        send(&mut link, progress.into()).await?;
                        Vec::new()
                    }
                    told @ (Told::Detected { .. }
                    | Told::Treated(..)
                    | Told::Finished(..)
                    | Told::Vault { .. }
                    | Told::Notice { .. }) => {
                        event(told).map(|event| self.handle(event)).unwrap_or_default()
                    }
                },
                facts = looked(&mut self.look) => {
                    if let Some(fresh) = facts && inventory.as_ref() != Some(&fresh) {
                        inventory = Some(fresh.clone());
                        send(&mut link, fresh.into()).await?;
                    }
                    Vec::new()
                }
                () = tokio::time::sleep_until(wake.into()) => {
                    self.care();
                    self.watch_clock();
                    self.handle(Event::Tick)
                }
            };
            self.perform_all(acts, &mut link).await?;
            let now = Instant::now();
            if now >= last_heard + silence {
                return Err(ConnectError::Timeout);
            }
            if now >= next_ping {
                send(&mut link, Ping { nonce: rand::random() }.into()).await?;
                next_ping = now + jittered(heartbeat);
            }
            if let Some(request) = self.renewal_due() {
                send(&mut link, request.into()).await?;
            }
            if now >= last_look + INVENTORY {
                last_look = now;
                self.begin_look();
            }
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            min_version: VERSION,
            max_version: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: facts::boot_id(),
            process_nonce: self.nonce,
            task_kinds: TaskKind::ALL.iter().map(|kind| kind.number()).collect(),
            stream: self.desk.stream(),
            clock_ms: now().unix_ms,
            last_failure: self.last_failure(),
        }
    }

    fn welcomed(&mut self, address: &Address, welcome: &Welcome) {
        tracing::info!(%address, manager = %welcome.manager, "Connected.");
        self.welcomed_at = Some(Instant::now());
        let offset_ms = welcome.clock_ms.saturating_sub(elapsed_ms(now()));
        self.time.set(offset_ms);
        self.watch_skew(welcome.clock_ms);
        if let Err(error) = clock::keep(&self.paths, &facts::boot_id(), offset_ms, elapsed_ms(now())) {
            tracing::warn!(%error, "Cannot keep the manager's time.");
        }
        if let Err(error) = renewal::forget_old(&self.paths) {
            tracing::warn!(%error, "Cannot remove the replaced identity.");
        }
        if self.manager_offset_ms.replace(offset_ms).is_none() {
            // Now it can be told what is too old.
            self.last_care = None;
        }
        self.status.manager = Some(address.to_string());
        self.status.since = jiff::Timestamp::now().to_string();
        self.write_status();
        if let Err(error) = self.enrolled.keep_addresses(&self.paths, welcome.addresses.clone()) {
            tracing::warn!(%error, "Cannot keep the managers' addresses.");
        }
    }

    /// Decides and writes down. A disk that is slow holds up this thread, not the runtime.
    fn handle(&mut self, event: Event) -> Vec<Act> {
        let acts = tokio::task::block_in_place(|| self.desk.handle(event, now()));
        self.note_running();
        acts
    }

    /// Decides while there is no link: what would be sent is kept, and sent in the next session.
    fn decide(&mut self, event: Event) {
        for act in self.handle(event) {
            self.perform(act);
        }
    }

    /// Looks after the vault now and then, in a thread of its own.
    fn care(&mut self) {
        if self.last_care.is_some_and(|at| at.elapsed() < CARE) {
            return;
        }
        self.last_care = Some(Instant::now());
        // One that is held up (a disk that hangs, a manager that is away) is not joined by others.
        if self.care.as_ref().is_some_and(|care| !care.is_finished()) {
            return;
        }
        let (paths, limits) = (self.paths.clone(), self.config.vault);
        let (tell, shown) = (self.tell.clone(), self.shown.clone());
        let now_ms = trusted_ms(now(), self.manager_offset_ms);
        let care = move || care::look_after(&paths, limits, now_ms, &shown, &tell);
        self.care = Some(tokio::task::spawn_blocking(care));
    }

    /// Looks at the endpoint's facts in a thread of its own. One that hangs (a mount) is not joined by others.
    fn begin_look(&mut self) {
        if self.look.is_none() {
            self.look = Some(tokio::task::spawn_blocking(facts::inventory));
        }
    }

    fn tick(&mut self) {
        self.care();
        self.watch_clock();
        self.decide(Event::Tick);
    }

    /// Performs every act, also when the link breaks half-way: the decision has been made, and a task that
    /// counts as running must be begun. What could not be sent is kept and sent in the next session.
    async fn perform_all(&mut self, acts: Vec<Act>, link: &mut Link) -> Result<(), ConnectError> {
        let mut result = Ok(());
        for act in acts {
            match act {
                Act::Send(bytes) => {
                    if result.is_ok() {
                        result = connection::write(link, &bytes).await;
                    }
                }
                Act::Reconnect => result = result.and(Err(ConnectError::Anew)),
                act @ (Act::Start { .. } | Act::Stop(_)) => self.perform(act),
            }
        }
        result
    }

    fn perform(&mut self, act: Act) {
        match act {
            Act::Start { task, spec, resumed } => self.start_task(task, spec, resumed),
            Act::Stop(task) => {
                if let Some(cancel) = self.cancels.get(&task) {
                    cancel.store(true, Ordering::Release);
                }
            }
            // Without a link there is nothing to send on and none to end.
            Act::Send(_) | Act::Reconnect => {}
        }
    }

    fn start_task(&mut self, task: TaskId, spec: TaskSpec, resumed: bool) {
        let cancel = Arc::new(AtomicBool::new(false));
        let running = self.desk.running();
        self.cancels.retain(|task, cancel| running.contains(task) || Arc::strong_count(cancel) > 1);
        self.cancels.insert(task, Arc::clone(&cancel));
        let manager = self.status.manager.as_deref().and_then(|m| m.parse().ok());
        let context = Context {
            paths: self.paths.clone(),
            endpoint: self.enrolled.endpoint,
            manager: manager.or_else(|| self.enrolled.addresses.first().cloned()),
            bulk: self.links.bulk.clone(),
            tell: self.tell.clone(),
            boot: self.desk.boot(),
            vault: self.config.vault,
            shown: self.shown.clone(),
            signer: self.signer.clone(),
            clock: SystemTime::now,
        };
        let work = match spec {
            TaskSpec::Scan(spec) => Work::Scan(spec),
            TaskSpec::Restore(spec) => Work::Restore { spec, resumed },
            TaskSpec::Cleanup(spec) => Work::Cleanup { noted: self.noted(&spec), dry_run: spec.dry_run },
        };
        tokio::spawn(execute::run(task, work, context, cancel));
    }

    /// What the journal knows of the detections that a cleanup names.
    fn noted(&self, spec: &CleanupSpec) -> Result<Vec<(Sha256, Option<Found>)>, Failure> {
        let look_up = |key: &Sha256| Ok((*key, self.desk.found(*key)?));
        let noted: std::io::Result<Vec<_>> = spec.detections.iter().map(look_up).collect();
        noted.map_err(|error| Failure::new("journal-unreadable", format!("cannot read the journal: {error}")))
    }

    fn note_running(&mut self) {
        let running = self.desk.running().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let running = (!running.is_empty()).then_some(running);
        let trouble = self.desk.trouble().map(ToOwned::to_owned);
        if running != self.status.running_task || trouble != self.status.journal_trouble {
            self.status.running_task = running;
            self.status.journal_trouble = trouble;
            self.write_status();
        }
    }

    /// Tells the manager of a wall clock that jumped. Tasks do not depend on it; records do.
    fn watch_clock(&mut self) {
        let now = now();
        let offset = now.unix_ms.saturating_sub(elapsed_ms(now));
        let jump = offset.saturating_sub(self.clock_offset_ms.replace(offset).unwrap_or(offset));
        if jump.unsigned_abs() >= CLOCK_JUMP_MS {
            let direction = if jump > 0 { "forward" } else { "back" };
            let seconds = jump.unsigned_abs() / 1000;
            tracing::warn!(seconds, direction, "The system's clock jumped.");
            let message = format!("the endpoint's clock jumped {direction} by {seconds} s");
            self.decide(Event::Notice { code: "clock-jumped", message, count: seconds });
        }
    }

    fn write_status(&self) {
        let written = serde_json::to_vec(&self.status)
            .map_err(std::io::Error::other)
            .and_then(|bytes| replace(&self.paths.status(), &bytes));
        if let Err(error) = written {
            tracing::warn!(%error, "Cannot write the status file.");
        }
    }
}

/// When the certificate ends, for people.
fn ends(enrolled: &Enrolled) -> String {
    jiff::Timestamp::from_millisecond(enrolled.validity_ms().1).unwrap_or_default().to_string()
}

/// What signs receipts; a key of a kind that cannot leaves them unsigned.
fn signer(enrolled: &Enrolled) -> Option<Signer> {
    match enrolled.signing_key() {
        Ok(key) => Some(Signer { endpoint: enrolled.endpoint, key }),
        Err(error) => {
            tracing::warn!(%error, "The endpoint's key cannot sign receipts.");
            None
        }
    }
}

/// The clocks. Elapsed time counts suspend, so that a deadline means what its issuer thinks.
fn now() -> Now {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let elapsed = Duration::try_from(boot).unwrap_or_default();
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Now {
        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        unix_ms: i64::try_from(unix.as_millis()).unwrap_or(i64::MAX),
    }
}

impl Ended {
    fn goodbye(goodbye: Goodbye) -> Self {
        let wait = Duration::from_millis(u64::from(goodbye.retry_after_ms)).min(Duration::from_secs(3600));
        // The manager's words end up in a log, a file and the next hello: harmless, and of a length that fits.
        let code: String = goodbye.failure.code.chars().take(64).filter(|c| c.is_ascii_graphic()).collect();
        let failure = Failure::new(&code, escape_for_display(&goodbye.failure.message));
        Self { error: ConnectError::Closed, goodbye: Some((failure, wait)) }
    }
}

/// What the core hears of it; progress is for the link alone, and without one it is lost without harm.
fn event(told: Told) -> Option<Event> {
    match told {
        Told::Detected { task, found, owned } => Some(Event::Detected(task, found, owned)),
        Told::Treated(task, items) => Some(Event::Treated(task, items)),
        Told::Finished(task, outcome) => Some(Event::Finished(task, outcome)),
        Told::Vault { first, items } => Some(Event::Vault { first, items }),
        Told::Notice { code, message, count } => Some(Event::Notice { code, message, count }),
        Told::Progress(_) => None,
    }
}

async fn send(link: &mut Link, message: ToManager) -> Result<(), ConnectError> {
    let mut bytes = BytesMut::new();
    message.encode(&mut bytes).map_err(ConnectError::Frame)?;
    connection::write(link, &bytes).await
}

/// The endpoint's facts, once they have been looked at; `None` if that failed. Safe to drop half-way.
async fn looked(look: &mut Option<JoinHandle<Inventory>>) -> Option<Inventory> {
    let Some(looking) = look else { return std::future::pending().await };
    let facts = looking.await.ok();
    *look = None;
    facts
}

fn elapsed_ms(now: Now) -> i64 {
    i64::try_from(now.elapsed_ms).unwrap_or(i64::MAX)
}

/// The wall time that things may be removed for good by: the earlier of this machine's and the manager's, so that
/// neither clock alone can make everything old. `None` before a manager has told its time.
fn trusted_ms(now: Now, manager_offset_ms: Option<i64>) -> Option<i64> {
    Some(now.unix_ms.min(manager_offset_ms?.saturating_add(elapsed_ms(now))))
}

/// Between 80 and 120 percent, so that a fleet's heartbeats spread.
fn jittered(heartbeat: Duration) -> Duration {
    heartbeat.mul_f64(0.8 + 0.4 * rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_clock_alone_makes_things_old() {
        let (day, year) = (86_400_000, 365 * 86_400_000);
        let at = |unix_ms| Now { elapsed_ms: 5_000, unix_ms };
        for (local, manager_at_0, expected) in [
            (day, None, None),
            (day, Some(day - 5_000), Some(day)),
            (day + year, Some(day - 5_000), Some(day)),
            (day, Some(day + year), Some(day)),
            (day, Some(i64::MAX), Some(day)),
            (day, Some(i64::MIN), Some(i64::MIN + 5_000)),
        ] {
            assert_eq!(trusted_ms(at(local), manager_at_0), expected, "{local} {manager_at_0:?}");
        }
    }
}
