//! Where everybody waits who has connected and not yet said anything that is worth an answer.
//!
//! A lobby has a thread of its own: however many strangers come and go, they keep that thread busy and nothing else.
//! Only those who have said a TLS handshake's first message whole come out of it, to where agents and administrators
//! are served.
//!
//! **Invariant:** whoever comes out holds a place among the strangers.
//! **Invariant:** the thread ends with the manager.

use std::{
    io,
    net::{SocketAddr, TcpStream as StdStream},
    sync::Arc,
    thread,
    time::Duration,
};

use rustls::server::Accepted;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    handshake::{self, Begun},
    metrics::{Held, METRICS},
    strangers::{Place, Strangers},
};

/// Those who have been heard and not been taken over yet.
const HEARD: usize = 256;
/// Those who have lost their place and not left yet; nobody else comes in before they have.
const LEAVING: usize = 256;

/// One who has said its first message.
pub(crate) struct Heard {
    accepted: Accepted,
    stream: StdStream,
    from: SocketAddr,
    place: Place,
}

impl Heard {
    /// The handshake that it has begun, to be gone on with on the present runtime.
    ///
    /// # Errors
    /// If its socket cannot be watched.
    pub(crate) async fn start(self) -> io::Result<(Begun, SocketAddr, Place)> {
        let stream = TcpStream::from_std(self.stream)?;
        // Only now is it known to take bytes; nobody's turn is spent on waiting for that.
        stream.writable().await?;
        Ok((Begun::new(self.accepted, stream), self.from, self.place))
    }
}

/// Opens the lobby of a port, with so many places. The metrics tell of strangers on the agents' port.
///
/// # Errors
/// If there is no thread for it.
pub(crate) fn open(
    listener: TcpListener,
    places: usize,
    of_agents: bool,
    ending: CancellationToken,
) -> io::Result<mpsc::Receiver<Heard>> {
    let listener = listener.into_std()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (sender, heard) = mpsc::channel(HEARD);
    // The socket takes links already, whenever the thread begins.
    let listening = of_agents.then(Listening::begin);
    thread::Builder::new().name("lobby".to_owned()).spawn(move || {
        runtime.block_on(async {
            match TcpListener::from_std(listener) {
                Ok(listener) => accept(listener, places, listening, sender, ending).await,
                Err(error) => tracing::error!(%error, "Cannot accept anybody."),
            }
        });
    })?;
    Ok(heard)
}

async fn accept(
    listener: TcpListener,
    places: usize,
    listening: Option<Listening>,
    heard: mpsc::Sender<Heard>,
    ending: CancellationToken,
) {
    let strangers = Strangers::new(places);
    let chairs = Arc::new(Semaphore::new(places + LEAVING));
    let of_agents = listening.is_some();
    loop {
        // Whoever only waits for links is listening, however the last attempt ended.
        if let Some(listening) = &listening {
            listening.say(true);
        }
        let accepted = tokio::select! {
            accepted = seated(&listener, &chairs) => accepted,
            () = ending.cancelled() => return,
        };
        let (chair, (stream, from)) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(listening) = &listening {
                    listening.say(false);
                }
                // Out of descriptors, mostly: whoever waits in the backlog is served when some are free.
                tracing::warn!(%error, "Cannot accept.");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // No place: it is turned away, and an agent tries again with jitter.
        let Some(mut place) = strangers.enter(from.ip()) else {
            if of_agents {
                METRICS.handshake("turned-away");
            }
            continue;
        };
        if of_agents {
            place.count(Held::one(METRICS.links_unproven.clone()));
        }
        let heard = heard.clone();
        tokio::spawn(async move {
            let failed = wait(stream, from, place, heard).await;
            if let Some(outcome) = failed.filter(|_| of_agents) {
                METRICS.handshake(outcome);
            }
            drop(chair);
        });
    }
}

/// Tells the metrics whether the agents' port is listened on; dropped, it is not.
struct Listening;

impl Listening {
    fn begin() -> Self {
        let listening = Self;
        listening.say(true);
        listening
    }

    fn say(&self, is_so: bool) {
        METRICS.agent_port_listening.set(i64::from(is_so));
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.say(false);
    }
}

/// The next one in, when there is a chair.
async fn seated(
    listener: &TcpListener,
    chairs: &Arc<Semaphore>,
) -> io::Result<(OwnedSemaphorePermit, (TcpStream, SocketAddr))> {
    let chair = Arc::clone(chairs).acquire_owned().await.map_err(io::Error::other)?;
    Ok((chair, listener.accept().await?))
}

/// How its handshake failed, if it came to none.
async fn wait(
    stream: TcpStream,
    from: SocketAddr,
    place: Place,
    heard: mpsc::Sender<Heard>,
) -> Option<&'static str> {
    let _ = stream.set_nodelay(true);
    let said = tokio::select! {
        said = handshake::hear(&stream) => said,
        () = place.is_lost() => return Some("turned-away"),
    };
    place.is_ready();
    match said.and_then(|accepted| Ok((accepted, stream.into_std()?))) {
        // Nobody takes it when the manager ends.
        Ok((accepted, stream)) => {
            drop(heard.send(Heard { accepted, stream, from, place }).await);
            None
        }
        Err(error) => {
            tracing::debug!(%from, %error, "It does not begin a handshake.");
            Some(if error.kind() == io::ErrorKind::TimedOut { "timeout" } else { "failed" })
        }
    }
}
