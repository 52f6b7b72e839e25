//! One live link to one agent.
//!
//! **Invariant:** a report is acknowledged only after it was committed.

use std::time::Duration;

use bytes::BytesMut;
use tm_protocol::{
    VERSION,
    address::Address,
    ids::{EndpointId, ManagerId},
    message::{Goodbye, Hello, Ping, Pong, ReportStored, ToManager, Welcome},
    report::Failure,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    LinkError,
    intake::Intake,
    now_ms, read,
    registry::{Command, Registry},
    write,
};
use crate::store::Store;

/// How long a new link may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// How long an older session has to prove that it is alive when its identity appears again.
const PROOF: Duration = Duration::from_secs(5);
/// Longest silence.
const LONGEST_SILENCE: Duration = Duration::from_secs(55);

/// What every session works with.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) intake: Intake,
    pub(crate) registry: Registry,
    pub(crate) manager: ManagerId,
    pub(crate) addresses: Vec<Address>,
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
        Err(error) => error,
    }
}

async fn serve<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    endpoint: EndpointId,
    shared: &Shared,
) -> Result<std::convert::Infallible, LinkError> {
    let mut buffer = BytesMut::new();
    let hello = match timeout(HELLO, read(link, &mut buffer)).await.map_err(|_| LinkError::Silent)?? {
        ToManager::Hello(hello) => hello,
        ToManager::Inventory(_)
        | ToManager::Ping(_)
        | ToManager::Pong(_)
        | ToManager::Report(_)
        | ToManager::Notices(_)
        | ToManager::Progress(_)
        | ToManager::EnrollRequest(_) => return Err(LinkError::Protocol("the first message is no hello")),
    };
    if hello.min_version > VERSION || hello.max_version < VERSION {
        let failure = Failure::new("version", format!("this manager speaks protocol version {VERSION} only"));
        return Err(goodbye(link, failure, 300_000).await);
    }
    if let Some(failure) = sound(&hello) {
        return Err(goodbye(link, failure, 60_000).await);
    }
    if is_elsewhere(endpoint, &hello, &shared.registry).await {
        tracing::warn!(%endpoint, "Two agents use one identity; the newer is sent away.");
        let failure =
            Failure::new("identity-in-use", "another agent with this identity is connected and answers");
        return Err(goodbye(link, failure, 60_000).await);
    }
    let opened = shared
        .store
        .open_session(endpoint, shared.manager, &hello, now_ms())
        .await
        .map_err(LinkError::Store)?;
    let welcome = Welcome {
        version: VERSION,
        manager: shared.manager,
        manager_version: env!("CARGO_PKG_VERSION").to_owned(),
        clock_ms: now_ms(),
        heartbeat_ms: u32::try_from(shared.heartbeat.as_millis()).unwrap_or(u32::MAX),
        addresses: shared.addresses.clone(),
        stored_through: opened.stored_through,
        notices_through: 0,
    };
    let mut commands = shared.registry.enter(endpoint, opened.epoch, hello.process_nonce);
    let ended = async {
        write(link, &welcome.into()).await?;
        converse(link, &mut buffer, endpoint, opened.stored_through, &mut commands, shared).await
    }
    .await;
    shared.registry.leave(endpoint, opened.epoch);
    if let Err(error) = shared.store.close_session(endpoint, opened.epoch, now_ms()).await {
        tracing::warn!(%endpoint, %error, "Cannot note the end of a session.");
    }
    ended
}

async fn converse<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    buffer: &mut BytesMut,
    endpoint: EndpointId,
    mut stored: u64,
    commands: &mut mpsc::Receiver<Command>,
    shared: &Shared,
) -> Result<std::convert::Infallible, LinkError> {
    tracing::info!(%endpoint, "Connected.");
    let silence = (shared.heartbeat * 2).clamp(Duration::from_secs(1), LONGEST_SILENCE);
    let mut last_heard = Instant::now();
    let mut asked: Vec<oneshot::Sender<()>> = Vec::new();
    loop {
        tokio::select! {
            message = read(link, buffer) => {
                last_heard = Instant::now();
                shared.registry.saw(endpoint);
                for answer in asked.drain(..) {
                    let _ = answer.send(());
                }
                match message? {
                    ToManager::Ping(Ping { nonce }) => write(link, &Pong { nonce }.into()).await?,
                    ToManager::Pong(_) => {}
                    ToManager::Inventory(facts) => {
                        shared.store.record_inventory(endpoint, &facts).await.map_err(LinkError::Store)?;
                    }
                    ToManager::Progress(progress) => shared.registry.progressed(endpoint, progress),
                    ToManager::Report(report) => {
                        if report.sequence > stored + 1 {
                            return Err(LinkError::Protocol("reports were left out"));
                        }
                        if report.sequence == stored + 1 {
                            shared.intake.store(endpoint, report).await.map_err(LinkError::Store)?;
                            stored += 1;
                        }
                        write(link, &ReportStored { through: stored }.into()).await?;
                    }
                    ToManager::Hello(_) | ToManager::EnrollRequest(_) | ToManager::Notices(_) => {
                        return Err(LinkError::Protocol("a message out of place"));
                    }
                }
            }
            command = commands.recv() => match command {
                Some(Command::Send(message)) => write(link, &message).await?,
                Some(Command::AreYouThere(answer)) => {
                    asked.push(answer);
                    write(link, &Ping { nonce: rand::random() }.into()).await?;
                }
                Some(Command::GiveWay) | None => return Err(LinkError::Replaced),
            },
            () = sleep_until(last_heard + silence) => return Err(LinkError::Silent),
            () = shared.ending.cancelled() => {
                let failure = Failure::new("manager-ending", "the manager ends");
                return Err(goodbye(link, failure, 0).await);
            }
        }
    }
}

/// Whether another process holds this identity and answers. The same process coming back is never another.
async fn is_elsewhere(endpoint: EndpointId, hello: &Hello, registry: &Registry) -> bool {
    let Some((older, nonce)) = registry.standing(endpoint) else { return false };
    if nonce == hello.process_nonce {
        return false;
    }
    let (answer, answered) = oneshot::channel();
    if older.try_send(Command::AreYouThere(answer)).is_err() {
        return false;
    }
    matches!(timeout(PROOF, answered).await, Ok(Ok(())))
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

async fn goodbye<L: AsyncWrite + Unpin>(link: &mut L, failure: Failure, retry_after_ms: u32) -> LinkError {
    let ending = failure.code == "manager-ending";
    let _ = write(link, &Goodbye { failure, retry_after_ms }.into()).await;
    if ending { LinkError::Ending } else { LinkError::Protocol("sent away") }
}
