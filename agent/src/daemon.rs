//! The running agent: one owner of state, one loop.
//!
//! **Invariant:** two agents never use one folder; the second says who holds it and ends.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use tm_protocol::{
    ALPN_BULK, ALPN_CONTROL, VERSION,
    address::Address,
    ids::{StreamId, TaskId},
    message::{Hello, Inventory, Ping, Pong, ToAgent, ToManager, Welcome},
    report::Failure,
    task::TaskKind,
    text::escape_for_display,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};
use uuid::Uuid;

use crate::{
    connection::{self, ConnectError, Link, backoff},
    enroll::Enrolled,
    paths::{Paths, replace},
    platform::facts,
    tasks::{
        Effect, Event, Now, Tasks,
        execute::{self, Context, Told},
    },
};

/// How long the manager may take to welcome us.
const WELCOME: Duration = Duration::from_secs(15);
/// How often facts are looked at again.
const INVENTORY: Duration = Duration::from_secs(60);
/// How long looking at them may hold the session up.
const LOOK: Duration = Duration::from_secs(5);
/// A session that lasted this long starts the waits anew.
const GOOD_SESSION: Duration = Duration::from_secs(60);
/// The longest silence before a link is given up, whatever the manager asks for.
const LONGEST_SILENCE: Duration = Duration::from_secs(55);
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
    pub(crate) running_task: Option<String>,
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
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    #[error("cannot listen to signals")]
    Signals(#[source] std::io::Error),
}

/// Runs until it is told to end.
pub(crate) async fn run(paths: Paths) -> Result<(), DaemonError> {
    let _lock = lock(&paths)?;
    let enrolled = Enrolled::load(&paths)?;
    let control = Arc::new(enrolled.tls(ALPN_CONTROL).map_err(DaemonError::Tls)?);
    let bulk = Arc::new(enrolled.tls(ALPN_BULK).map_err(DaemonError::Tls)?);
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let (tell, told) = mpsc::channel(TOLD);
    let status = Status {
        endpoint: enrolled.endpoint.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        since: jiff::Timestamp::now().to_string(),
        ..Status::default()
    };
    let mut agent = Agent {
        tasks: Tasks::new(enrolled.endpoint),
        stream: StreamId::new(Uuid::now_v7()),
        nonce: rand::random(),
        start: Instant::now(),
        welcomed_at: None,
        cancels: BTreeMap::new(),
        paths,
        enrolled,
        control,
        bulk,
        tell,
        told,
        status,
    };
    agent.write_status();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(endpoint = %agent.enrolled.endpoint, "The agent runs.");
    tokio::select! {
        () = agent.connect_for_ever() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    for cancel in agent.cancels.values() {
        cancel.store(true, Ordering::Release);
    }
    let _ = std::fs::remove_file(agent.paths.status());
    tracing::info!("The agent ends.");
    Ok(())
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
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(folder)?;
    Ok(file)
}

struct Agent {
    tasks: Tasks,
    stream: StreamId,
    nonce: u64,
    start: Instant,
    /// When the session in hand was welcomed.
    welcomed_at: Option<Instant>,
    cancels: BTreeMap<TaskId, Arc<AtomicBool>>,
    paths: Paths,
    enrolled: Enrolled,
    control: Arc<rustls::ClientConfig>,
    bulk: Arc<rustls::ClientConfig>,
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
    async fn connect_for_ever(&mut self) {
        let mut failures = 0;
        loop {
            let mut retry_after = Duration::ZERO;
            for address in self.enrolled.addresses.clone() {
                let ended = self.session(&address).await;
                if self.welcomed_at.take().is_some_and(|at| at.elapsed() >= GOOD_SESSION) {
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
            self.rest(wait).await;
        }
    }

    /// Waits, while running tasks go on and time is kept.
    async fn rest(&mut self, wait: Duration) {
        let over = sleep(wait);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return,
                Some(told) = self.told.recv(), if !self.tasks.is_full() => { self.hear(told); }
                () = sleep(Duration::from_secs(1)) => { self.decide(Event::Tick); }
            }
        }
    }

    /// One session, to its end.
    async fn session(&mut self, address: &Address) -> Ended {
        match self.try_session(address).await {
            Ok(ended) => ended,
            Err(error) => Ended { error, goodbye: None },
        }
    }

    async fn try_session(&mut self, address: &Address) -> Result<Ended, ConnectError> {
        let mut link = connection::dial(address, &self.control).await?;
        let mut buffer = BytesMut::new();
        send(&mut link, self.hello().into()).await?;
        let welcome = loop {
            let first = timeout(WELCOME, connection::read(&mut link, &mut buffer)).await;
            match first.map_err(|_| ConnectError::Timeout)?? {
                ToAgent::Welcome(welcome) => break welcome,
                ToAgent::Goodbye(goodbye) => return Ok(Ended::goodbye(goodbye)),
                ToAgent::Ping(Ping { nonce }) => send(&mut link, Pong { nonce }.into()).await?,
                ToAgent::Pong(_)
                | ToAgent::Assign(_)
                | ToAgent::ReportStored(_)
                | ToAgent::NoticesStored(_)
                | ToAgent::EnrollReply(_)
                | ToAgent::Cancel(_) => return Err(ConnectError::Protocol("a message before the welcome")),
            }
        };
        self.welcomed(address, &welcome);
        let mut inventory = look().await;
        if let Some(facts) = inventory.clone() {
            send(&mut link, facts.into()).await?;
        }
        let effects =
            self.tasks.handle(Event::Connected { stored_through: welcome.stored_through }, self.now());
        self.perform_all(effects, &mut link).await?;
        let heartbeat = Duration::from_millis(u64::from(welcome.heartbeat_ms.clamp(200, 60_000)));
        let silence = (heartbeat * 2).clamp(Duration::from_secs(1), LONGEST_SILENCE);
        let (mut last_heard, mut last_look) = (Instant::now(), Instant::now());
        let mut next_ping = Instant::now() + jittered(heartbeat);
        loop {
            let wake = next_ping.min(last_heard + silence).min(Instant::now() + Duration::from_secs(1));
            let effects = tokio::select! {
                message = connection::read(&mut link, &mut buffer) => {
                    last_heard = Instant::now();
                    match message? {
                        ToAgent::Ping(Ping { nonce }) => {
                            send(&mut link, Pong { nonce }.into()).await?;
                            Vec::new()
                        }
                        ToAgent::Pong(_) | ToAgent::Welcome(_) | ToAgent::NoticesStored(_) => Vec::new(),
                        ToAgent::Assign(assign) => self.tasks.handle(Event::Assigned(assign), self.now()),
                        ToAgent::Cancel(cancel) => self.tasks.handle(Event::Cancelled(cancel), self.now()),
                        ToAgent::ReportStored(stored) => {
                            self.tasks.handle(Event::Stored { through: stored.through }, self.now())
                        }
                        ToAgent::Goodbye(goodbye) => return Ok(Ended::goodbye(goodbye)),
                        ToAgent::EnrollReply(_) => return Err(ConnectError::Protocol("an enrollment nobody asked for")),
                    }
                }
                Some(told) = self.told.recv(), if !self.tasks.is_full() => match told {
                    Told::Progress(progress) => vec![Effect::Send(progress.into())],
                    told @ (Told::Detections(..) | Told::Finished(..)) => self.tasks.handle(event(told), self.now()),
                },
                () = tokio::time::sleep_until(wake.into()) => self.tasks.handle(Event::Tick, self.now()),
            };
            let changed = !effects.is_empty();
            let performed = self.perform_all(effects, &mut link).await;
            if changed {
                self.note_running();
            }
            performed?;
            let now = Instant::now();
            if now >= last_heard + silence {
                return Err(ConnectError::Timeout);
            }
            if now >= next_ping {
                send(&mut link, Ping { nonce: rand::random() }.into()).await?;
                next_ping = now + jittered(heartbeat);
            }
            if now >= last_look + INVENTORY {
                last_look = now;
                if let Some(fresh) = look().await
                    && inventory.as_ref() != Some(&fresh)
                {
                    inventory = Some(fresh.clone());
                    send(&mut link, fresh.into()).await?;
                }
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
            stream: self.stream,
            clock_ms: self.now().unix_ms,
            last_failure: self.status.last_failure.clone(),
        }
    }

    fn welcomed(&mut self, address: &Address, welcome: &Welcome) {
        tracing::info!(%address, manager = %welcome.manager, "Connected.");
        self.welcomed_at = Some(Instant::now());
        self.status.manager = Some(address.to_string());
        self.status.since = jiff::Timestamp::now().to_string();
        self.write_status();
        if let Err(error) = self.enrolled.keep_addresses(&self.paths, welcome.addresses.clone()) {
            tracing::warn!(%error, "Cannot keep the managers' addresses.");
        }
    }

    fn hear(&mut self, told: Told) {
        match told {
            // Progress without a link is lost without harm.
            Told::Progress(_) => {}
            told @ (Told::Detections(..) | Told::Finished(..)) => self.decide(event(told)),
        }
    }

    /// Decides while there is no link: what would be sent is kept, and sent at the next session.
    fn decide(&mut self, event: Event) {
        for effect in self.tasks.handle(event, self.now()) {
            match effect {
                Effect::Send(_) => {}
                Effect::Start(task, spec) => self.start_task(task, spec),
                Effect::Stop(task) => self.stop_task(task),
            }
        }
        self.note_running();
    }

    /// Performs every effect, also when the link breaks half-way: the decision has been made, and a task that
    /// counts as running must be begun. What could not be sent is kept and sent at the next session.
    async fn perform_all(&mut self, effects: Vec<Effect>, link: &mut Link) -> Result<(), ConnectError> {
        let mut sent = Ok(());
        for effect in effects {
            match effect {
                Effect::Send(message) if sent.is_ok() => sent = send(link, message).await,
                Effect::Send(_) => {}
                Effect::Start(task, spec) => self.start_task(task, spec),
                Effect::Stop(task) => self.stop_task(task),
            }
        }
        sent
    }

    fn start_task(&mut self, task: TaskId, spec: tm_protocol::task::TaskSpec) {
        let cancel = Arc::new(AtomicBool::new(false));
        self.cancels.clear();
        self.cancels.insert(task, Arc::clone(&cancel));
        let manager = self.status.manager.as_deref().and_then(|m| m.parse().ok());
        let Some(manager) = manager.or_else(|| self.enrolled.addresses.first().cloned()) else { return };
        let context = Context {
            paths: self.paths.clone(),
            manager,
            bulk: Arc::clone(&self.bulk),
            tell: self.tell.clone(),
        };
        tokio::spawn(execute::run(task, spec, context, cancel));
    }

    fn stop_task(&mut self, task: TaskId) {
        if let Some(cancel) = self.cancels.get(&task) {
            cancel.store(true, Ordering::Release);
        }
    }

    fn note_running(&mut self) {
        let running = self.tasks.running().map(|task| task.to_string());
        if running != self.status.running_task {
            self.status.running_task = running;
            self.write_status();
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

    fn now(&self) -> Now {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Now {
            elapsed_ms: u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX),
            unix_ms: i64::try_from(unix.as_millis()).unwrap_or(i64::MAX),
        }
    }
}

impl Ended {
    fn goodbye(goodbye: tm_protocol::message::Goodbye) -> Self {
        let wait = Duration::from_millis(u64::from(goodbye.retry_after_ms)).min(Duration::from_secs(3600));
        // The manager's words end up in a log, a file and the next hello: harmless, and of a length that fits.
        let code: String = goodbye.failure.code.chars().take(64).filter(|c| c.is_ascii_graphic()).collect();
        let failure = Failure::new(&code, escape_for_display(&goodbye.failure.message));
        Self { error: ConnectError::Closed, goodbye: Some((failure, wait)) }
    }
}

fn event(told: Told) -> Event {
    match told {
        Told::Detections(task, detections) => Event::Detections(task, detections),
        Told::Finished(task, outcome) => Event::Finished(task, outcome),
        Told::Progress(_) => Event::Tick,
    }
}

async fn send(link: &mut Link, message: ToManager) -> Result<(), ConnectError> {
    let mut bytes = BytesMut::new();
    message.encode(&mut bytes).map_err(ConnectError::Frame)?;
    connection::write(link, &bytes).await
}

/// The endpoint's facts; `None` if they cannot be had in time (a mount that hangs), and the session goes on.
async fn look() -> Option<Inventory> {
    timeout(LOOK, tokio::task::spawn_blocking(facts::inventory)).await.ok()?.ok()
}

/// Between 80 and 120 percent, so that a fleet's heartbeats spread.
fn jittered(heartbeat: Duration) -> Duration {
    heartbeat.mul_f64(0.8 + 0.4 * rand::random::<f64>())
}
