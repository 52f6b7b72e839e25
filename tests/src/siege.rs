//! Many unpleasant clients at once: they connect from several loopback addresses, behave in one manner each, and come
//! back whenever they are thrown out.
//!
//! **Invariant:** every connection ends with its [`Siege`].

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::sleep,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

/// How soon one comes back that was thrown out.
const BACK: Duration = Duration::from_secs(2);
/// Between two bytes of those who are slow.
const DRIP: Duration = Duration::from_secs(1);

/// How one behaves.
#[derive(Debug, Clone)]
pub enum Manner {
    /// Connects and says nothing.
    Silent,
    /// Says half of a TLS handshake's first message, and nothing more.
    HalfHello,
    /// Says a first message whole, and answers nothing.
    WholeHello(Arc<ClientConfig>),
    /// Shakes hands and says nothing.
    Idle(Arc<ClientConfig>),
    /// Shakes hands, says this, and then this byte again and again, one a second.
    Drip(Arc<ClientConfig>, Arc<str>, u8),
    /// Shakes hands, says this again and again as fast as it is taken, and reads nothing.
    Deaf(Arc<ClientConfig>, Arc<str>),
}

/// Clients that besiege a port.
#[derive(Debug)]
pub struct Siege {
    tally: Arc<Tally>,
    tasks: TaskTracker,
    ending: CancellationToken,
    _guard: DropGuard,
}

#[derive(Debug, Default)]
struct Tally {
    open: AtomicU64,
    opened: AtomicU64,
    ended: AtomicU64,
    failed: AtomicU64,
}

/// How a siege goes.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Connections that are open, as far as their clients know.
    pub open: u64,
    /// Connections there have been.
    pub opened: u64,
    /// Those of them that the other side ended.
    pub ended: u64,
    /// Attempts that came to no connection.
    pub failed: u64,
}

/// The loopback address of the `n`th source, never 127.0.0.x, where the good ones are.
#[must_use]
pub fn source(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 1)) + n % 0x00fe_0000)
}

/// Connects from a source, or from where the good ones are.
///
/// # Errors
/// If there is no connection.
pub async fn connect(from: Option<u32>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind((source(from), 0).into())?;
    }
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Lets this process have as many descriptors as it may; how many.
///
/// # Panics
/// If the limit cannot be raised as far as it says.
pub fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("the limit may be raised");
    maximum.unwrap_or(u64::MAX)
}

impl Siege {
    /// Begins a siege of `at` by `count` clients of each of these manners, from `sources` addresses in turn (none:
    /// from the one where the good ones are).
    ///
    /// # Panics
    /// Outside of a runtime.
    #[must_use]
    pub fn lay(at: SocketAddr, sources: u32, manners: Vec<(u32, Manner)>) -> Self {
        let (tally, tasks, ending) =
            (Arc::new(Tally::default()), TaskTracker::new(), CancellationToken::new());
        let manners = manners.into_iter().flat_map(|(count, manner)| (0..count).map(move |_| manner.clone()));
        for (number, manner) in (0_u32..).zip(manners) {
            let (tally, ending) = (Arc::clone(&tally), ending.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = besiege(number, sources, at, &manner, &tally) => {}
                    () = ending.cancelled() => {}
                }
            });
        }
        tasks.close();
        Self { tally, tasks, _guard: ending.clone().drop_guard(), ending }
    }

    /// How it goes.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Tally { open, opened, ended, failed } = &*self.tally;
        Seen { open: of(open), opened: of(opened), ended: of(ended), failed: of(failed) }
    }

    /// Ends it; how it went.
    pub async fn lift(self) -> Seen {
        let seen = self.seen();
        self.ending.cancel();
        self.tasks.wait().await;
        seen
    }
}

async fn besiege(number: u32, sources: u32, at: SocketAddr, manner: &Manner, tally: &Tally) {
    // Not all in the same moment.
    sleep(Duration::from_micros(u64::from(number) * 200)).await;
    loop {
        match connect(number.checked_rem(sources), at).await {
            Ok(stream) => {
                tally.opened.fetch_add(1, Ordering::Relaxed);
                let open = Open::new(tally);
                let _ = behave(stream, at, manner).await;
                drop(open);
                tally.ended.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => {
                tally.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        sleep(BACK).await;
    }
}

struct Open<'t>(&'t Tally);

impl<'t> Open<'t> {
    fn new(tally: &'t Tally) -> Self {
        tally.open.fetch_add(1, Ordering::Relaxed);
        Self(tally)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Until the other side ends it.
async fn behave(mut stream: TcpStream, at: SocketAddr, manner: &Manner) -> io::Result<()> {
    match manner {
        Manner::Silent => until_closed(&mut stream).await,
        Manner::HalfHello => {
            // A record of 512 bytes with a ClientHello in it, of which 40 come.
            let mut half = vec![22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
            half.resize(40, 7);
            stream.write_all(&half).await?;
            until_closed(&mut stream).await
        }
        Manner::WholeHello(config) => {
            stream.write_all(&hello(config, at)?).await?;
            until_closed(&mut stream).await
        }
        Manner::Idle(config) => until_closed(&mut shake(stream, at, config).await?).await,
        Manner::Drip(config, beginning, byte) => {
            let (mut read, mut write) = tokio::io::split(shake(stream, at, config).await?);
            write.write_all(beginning.as_bytes()).await?;
            write.flush().await?;
            let drips = async {
                loop {
                    sleep(DRIP).await;
                    write.write_all(&[*byte]).await?;
                    write.flush().await?;
                }
            };
            tokio::select! {
                dripped = drips => dripped,
                closed = until_closed(&mut read) => closed,
            }
        }
        Manner::Deaf(config, saying) => {
            let mut link = shake(stream, at, config).await?;
            loop {
                link.write_all(saying.as_bytes()).await?;
                link.flush().await?;
            }
        }
    }
}

async fn shake(
    stream: TcpStream,
    at: SocketAddr,
    config: &Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    TlsConnector::from(Arc::clone(config)).connect(ServerName::from(at.ip()), stream).await
}

async fn until_closed(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<()> {
    let mut some = [0; 64];
    while stream.read(&mut some).await? > 0 {}
    Ok(())
}

/// The first message of a TLS handshake.
///
/// # Errors
/// If the configuration makes none.
pub fn hello(config: &Arc<ClientConfig>, at: SocketAddr) -> io::Result<Vec<u8>> {
    let mut connection =
        ClientConnection::new(Arc::clone(config), ServerName::from(at.ip())).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes)?;
    }
    Ok(bytes)
}
