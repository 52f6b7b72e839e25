//! One live link to one agent.
//!
//! **Invariant:** what is handed in is acknowledged only after it was committed.
//! **Invariant:** an agent that is read more slowly, or that the store makes wait, keeps its session: it is
//! still sent orders, answers and pings, and its silence is not counted.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::BytesMut;
use tm_protocol::{
    VERSION,
    ids::{EndpointId, ManagerId},
    message::{
        Goodbye, Held, Hello, Notices, NoticesStored, Ping, Pong, Renewed, Report, ReportBody, ReportStored,
        ToManager, Welcome,
    },
    report::Failure,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    LinkError,
    authorities::Live,
    doors::Doors,
    held,
    intake::{Failed, Intake, Lane, inventory_rows},
    lookups::Lookups,
    meter::{Cost, Meter, Meters},
    now_ms,
    peers::Peers,
    read, read_any,
    registry::{Command, Registry},
    renewal, write,
};
use crate::{
    addresses::Addresses,
    metrics::METRICS,
    store::{
        Store,
        streams::{Counts, HandedIn, last},
    },
};

/// How long a new link may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// Highest number of a stream: what the store can count to.
const LAST_NUMBER: u64 = i64::MAX.unsigned_abs();
/// Longest silence.
const LONGEST_SILENCE: Duration = Duration::from_secs(55);

/// What every session works with.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) intake: Intake,
    pub(crate) doors: Doors,
    pub(crate) lookups: Lookups,
    pub(crate) registry: Registry,
    /// Agents that came with another's identity.
    pub(crate) held: held::Places,
    pub(crate) meters: Meters,
    pub(crate) authorities: Arc<Live>,
    pub(crate) manager: ManagerId,
    pub(crate) addresses: Addresses,
    pub(crate) peers: Peers,
    pub(crate) heartbeat: Duration,
    pub(crate) ending: CancellationToken,
}

/// Serves an agent whose certificate has been judged, until its end.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    endpoint: EndpointId,
    shared: &Shared,
) -> LinkError {
    match serve(link, endpoint, shared).await {
        Ok(never) => match never {},
        Err(error) => {
            METRICS.session_ended(error.reason());
            error
        }
    }
}

async fn serve<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    endpoint: EndpointId,
    shared: &Shared,
) -> Result<Infallible, LinkError> {
    let mut buffer = BytesMut::new();
    let hello = match timeout(HELLO, read(link, &mut buffer)).await.map_err(|_| LinkError::Silent)?? {
        ToManager::Hello(hello) => hello,
        ToManager::Inventory(_)
        | ToManager::Ping(_)
        | ToManager::Pong(_)
        | ToManager::Report(_)
        | ToManager::Notices(_)
        | ToManager::Progress(_)
        | ToManager::Renew(_)
        | ToManager::EnrollRequest(_) => return Err(LinkError::Protocol("the first message is no hello")),
    };
    if hello.min_version > VERSION || hello.max_version < VERSION {
        let failure = Failure::new("version", format!("this manager speaks protocol version {VERSION} only"));
        return Err(goodbye(link, failure, 300_000).await);
    }
    if let Some(failure) = sound(&hello) {
        return Err(goodbye(link, failure, 60_000).await);
    }
    let meter = shared.meters.of(endpoint, Instant::now().into_std());
    let Some((turn, wait)) = meter.queue(Instant::now().into_std()) else {
        let failure = Failure::new("too-many-links", "several links of this endpoint wait for a session");
        return Err(goodbye(link, failure, 10_000).await);
    };
    sleep(wait).await;
    let was_held = hello.last_failure.as_ref().is_some_and(|failure| failure.code == Held::CODE);
    if was_held || shared.peers.is_held(endpoint, hello.process_nonce).await.map_err(LinkError::Store)? {
        if meter.may_log(Instant::now().into_std()) {
            tracing::warn!(%endpoint, "Two agents use one identity; the newer is held.");
        }
        if shared.registry.is_new_conflict(endpoint, Instant::now().into_std())
            && let Err(error) = shared.store.report_conflict(endpoint, &hello.boot_id, now_ms()).await
        {
            tracing::warn!(%endpoint, %error, "Cannot report two agents of one identity.");
        }
        drop(turn);
        return Err(held::run(link, &mut buffer, endpoint, shared).await);
    }
    let opened = shared.doors.open(endpoint, shared.manager, &hello).await.map_err(LinkError::Store)?;
    let welcome = Welcome {
        version: VERSION,
        manager: shared.manager,
        manager_version: env!("CARGO_PKG_VERSION").to_owned(),
        clock_ms: now_ms(),
        heartbeat_ms: u32::try_from(shared.heartbeat.as_millis()).unwrap_or(u32::MAX),
        addresses: shared.addresses.get(),
        stored_through: opened.stored.reports,
        notices_through: opened.stored.notices,
    };
    if opened.was_elsewhere.is_some() {
        shared.peers.moved(endpoint, opened.epoch).await;
    }
    let mut commands = shared.registry.enter(endpoint, opened.epoch, hello.process_nonce);
    drop(turn);
    let ended = async {
        write(link, &welcome.into()).await?;
        let authorities = shared.authorities.now().message(shared.registry.count());
        write(link, &authorities.into()).await?;
        let lane = shared.intake.lane(endpoint, opened.epoch, opened.stored);
        let session = Session {
            endpoint,
            handed: opened.stored,
            told: opened.stored,
            has_renewed: false,
            lane,
            meter,
            shared,
        };
        session.converse(link, &mut buffer, &mut commands).await
    }
    .await;
    shared.registry.leave(endpoint, opened.epoch);
    if let Err(error) = shared.doors.close(endpoint, opened.epoch).await {
        tracing::warn!(%endpoint, %error, "Cannot note the end of a session.");
    }
    ended
}

/// A session after its welcome.
struct Session<'s> {
    endpoint: EndpointId,
    /// What the agent has handed in, and what it has been told is stored.
    handed: Counts,
    told: Counts,
    /// Whether it has asked for a new certificate.
    has_renewed: bool,
    lane: Lane,
    meter: Meter,
    shared: &'s Shared,
}

impl Session<'_> {
    async fn converse<L: AsyncRead + AsyncWrite + Unpin>(
        mut self,
        link: &mut L,
        buffer: &mut BytesMut,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<Infallible, LinkError> {
        if self.meter.may_log(Instant::now().into_std()) {
            tracing::info!(endpoint = %self.endpoint, "Connected.");
        }
        let heartbeat = self.shared.heartbeat;
        let silence = (heartbeat * 2).clamp(Duration::from_secs(1), LONGEST_SILENCE);
        let mut last_heard = Instant::now();
        let mut read_from = last_heard;
        let mut next_ping = last_heard + heartbeat;
        let mut did_read = true;
        let mut asked: Vec<oneshot::Sender<()>> = Vec::new();
        loop {
            let has_room = self.lane.has_room();
            let reads = has_room && read_from <= Instant::now();
            if !(reads && did_read) {
                // Nobody is silent who is not listened to.
                last_heard = Instant::now();
            }
            did_read = reads;
            tokio::select! {
                message = read_any(link, buffer), if reads => {
                    last_heard = Instant::now();
                    self.shared.registry.saw(self.endpoint);
                    for answer in asked.drain(..) {
                        let _ = answer.send(());
                    }
                    let (message, bytes) = message?;
                    METRICS.message(kind(message.as_ref()));
                    let rows = match message {
                        Some(message) => self.take(link, message, bytes).await?,
                        None => 0,
                    };
                    read_from = last_heard + self.charge(Cost { bytes, rows }, last_heard);
                }
                stored = self.lane.advanced() => self.tell(link, stored.map_err(LinkError::from)?).await?,
                command = commands.recv() => match command {
                    Some(Command::Send(message)) => write(link, &message).await?,
                    Some(Command::AreYouThere(answer)) => {
                        asked.push(answer);
                        write(link, &Ping { nonce: rand::random() }.into()).await?;
                    }
                    Some(Command::ShutOut) => return Err(shut_out(link).await),
                    Some(Command::GiveWay) | None => return Err(LinkError::Replaced),
                },
                () = sleep_until(read_from), if has_room && !reads => {}
                // While nothing is read, no ping of the agent's is answered either.
                () = sleep_until(next_ping), if !reads => {
                    next_ping = Instant::now() + heartbeat;
                    write(link, &Ping { nonce: rand::random() }.into()).await?;
                }
                () = sleep_until(last_heard + silence), if reads => return Err(LinkError::Silent),
                () = self.shared.ending.cancelled() => {
                    let failure = Failure::new("manager-ending", "the manager ends");
                    return Err(goodbye(link, failure, 0).await);
                }
            }
        }
    }

    /// Does what a message is for; the rows that it makes the store write.
    async fn take<L: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        link: &mut L,
        message: ToManager,
        bytes: usize,
    ) -> Result<usize, LinkError> {
        match message {
            ToManager::Ping(Ping { nonce }) => {
                METRICS.heartbeats.inc();
                write(link, &Pong { nonce }.into()).await.map(|()| 0)
            }
            ToManager::Pong(_) => {
                METRICS.heartbeats.inc();
                Ok(0)
            }
            ToManager::Inventory(facts) => {
                let rows = inventory_rows(&facts);
                self.lane.inventory(facts);
                Ok(rows)
            }
            ToManager::Progress(progress) => {
                self.shared.registry.progressed(self.endpoint, progress);
                Ok(1)
            }
            ToManager::Report(report) => {
                if follows(&report, self.handed.reports)? {
                    return Ok(self.hand_in(HandedIn::Report(report), bytes));
                }
                if report.sequence <= self.told.reports {
                    write(link, &ReportStored { through: self.told.reports }.into()).await?;
                }
                Ok(0)
            }
            ToManager::Notices(notices) => {
                if go_on(&notices, self.handed.notices)? {
                    return Ok(self.hand_in(HandedIn::Notices(notices), bytes));
                }
                if last(&notices) <= self.told.notices {
                    write(link, &NoticesStored { through: self.told.notices }.into()).await?;
                }
                Ok(0)
            }
            ToManager::Renew(request) => {
                let renewed = if self.has_renewed {
                    Renewed::Refused(Failure::new("too-many", "one renewal a session"))
                } else {
                    self.has_renewed = true;
                    renewal::renew(self.endpoint, &request, self.shared).await.map_err(LinkError::Store)?
                };
                write(link, &renewed.into()).await?;
                Ok(1)
            }
            ToManager::Hello(_) | ToManager::EnrollRequest(_) => {
                Err(LinkError::Protocol("a message out of place"))
            }
        }
    }

    fn hand_in(&mut self, item: HandedIn, bytes: usize) -> usize {
        let rows = item.rows();
        self.handed = self.handed.after(&item);
        self.lane.hand_in(item, bytes);
        rows
    }

    /// Acknowledges what is stored and was not acknowledged yet.
    async fn tell<L: AsyncWrite + Unpin>(&mut self, link: &mut L, stored: Counts) -> Result<(), LinkError> {
        if stored.reports > self.told.reports {
            write(link, &ReportStored { through: stored.reports }.into()).await?;
        }
        if stored.notices > self.told.notices {
            write(link, &NoticesStored { through: stored.notices }.into()).await?;
        }
        self.told = stored;
        Ok(())
    }

    fn charge(&self, cost: Cost, now: Instant) -> Duration {
        let (pause, warning) = self.meter.charge(cost, now.into_std());
        if let Some(held) = warning {
            tracing::warn!(
                endpoint = %self.endpoint, messages = held.messages, bytes = held.bytes, rows = held.rows,
                paused_ms = held.paused.as_millis(), "An agent hands in more than its limits allow and is read more slowly.",
            );
        }
        pause
    }
}

/// What a message is counted as.
const fn kind(message: Option<&ToManager>) -> &'static str {
    match message {
        None => "unknown",
        Some(ToManager::Ping(_)) => "ping",
        Some(ToManager::Pong(_)) => "pong",
        Some(ToManager::Inventory(_)) => "inventory",
        Some(ToManager::Progress(_)) => "progress",
        Some(ToManager::Report(_)) => "report",
        Some(ToManager::Notices(_)) => "notices",
        Some(ToManager::Renew(_)) => "renew",
        Some(ToManager::Hello(_) | ToManager::EnrollRequest(_)) => "out-of-place",
    }
}

/// Whether a report is the next one; `false` if it was handed in before.
fn follows(report: &Report, handed: u64) -> Result<bool, LinkError> {
    if report.weight() > Report::MAX_WEIGHT {
        return Err(LinkError::Protocol("a report is too heavy"));
    }
    if report.sequence == 0 || report.sequence > LAST_NUMBER {
        return Err(LinkError::Protocol("a report has no number"));
    }
    if report.sequence <= handed {
        return Ok(false);
    }
    // The count is the agent's own loss; it can spoil no numbers but its own.
    let skipped = match report.body {
        ReportBody::Lost { count } => count,
        ReportBody::Accepted { .. }
        | ReportBody::Started { .. }
        | ReportBody::Refused { .. }
        | ReportBody::Detections { .. }
        | ReportBody::Finished { .. }
        | ReportBody::Items { .. }
        | ReportBody::Vault { .. }
        | ReportBody::Owned { .. } => 0,
    };
    if report.sequence - handed - 1 == skipped {
        Ok(true)
    } else {
        Err(LinkError::Protocol("reports were left out"))
    }
}

/// Whether notices bring new ones; `false` if all were handed in before.
fn go_on(notices: &Notices, handed: u64) -> Result<bool, LinkError> {
    if notices.notices.is_empty() || notices.notices.len() > Notices::MAX {
        return Err(LinkError::Protocol("no notices, or too many at once"));
    }
    if notices.first == 0 || last(notices) > LAST_NUMBER {
        return Err(LinkError::Protocol("notices have no number"));
    }
    Ok(last(notices) > handed)
}

/// Texts of a hello that no honest agent makes so long.
fn sound(hello: &Hello) -> Option<Failure> {
    let short = hello.agent_version.len() <= 64
        && hello.boot_id.len() <= 64
        && hello.task_kinds.len() <= 64
        && hello
            .last_failure
            .as_ref()
            .is_none_or(|f| f.code.len() <= 64 && f.message.len() <= Failure::MAX_TEXT);
    (!short).then(|| Failure::new("hello", "the hello is too long"))
}

/// Tells an agent that it was revoked, and that there is no hurry to ask again.
pub(crate) async fn shut_out<L: AsyncWrite + Unpin>(link: &mut L) -> LinkError {
    let failure = Failure::new("revoked", "the certificate of this endpoint was revoked; enroll it anew");
    goodbye(link, failure, 3_600_000).await
}

pub(super) async fn goodbye<L: AsyncWrite + Unpin>(
    link: &mut L,
    failure: Failure,
    retry_after_ms: u32,
) -> LinkError {
    let ending = failure.code == "manager-ending";
    let _ = write(link, &Goodbye { failure, retry_after_ms }.into()).await;
    if ending { LinkError::Ending } else { LinkError::Protocol("sent away") }
}

impl From<Failed> for LinkError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Superseded => Self::Replaced,
            Failed::Store => Self::Unstorable,
        }
    }
}
