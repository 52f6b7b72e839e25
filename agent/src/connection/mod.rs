//! One connection to a manager: dialled, spoken over, read from.
//!
//! **Invariant:** every connection of the agent, of whatever kind, begins at [`Dialler::dial`]: where a proxy is set,
//! nothing goes around it.

pub(crate) mod backoff;
pub(crate) mod fetch;
pub(crate) mod proxy;
pub(crate) mod trust;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use rustls::{ClientConfig, pki_types::ServerName};
use tm_protocol::{
    address::Address,
    frame::{self, FrameError},
    message::ToAgent,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use self::proxy::{Proxy, ProxyError};

/// How long one address may take to accept, and then to shake hands.
const DIAL: Duration = Duration::from_secs(10);
/// How long the network may take to accept what we write.
const WRITE: Duration = Duration::from_secs(30);

/// A connection to a manager that has proven to be one.
pub(crate) type Link = TlsStream<TcpStream>;

/// Why there is no connection, or no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the name `{0}` cannot be resolved")]
    Resolve(String, #[source] io::Error),
    #[error("no connection to {0}")]
    Connect(String, #[source] io::Error),
    #[error("no way through the proxy {0}")]
    Proxy(Address, #[source] ProxyError),
    #[error("the manager did not prove who it is, or did not accept us")]
    Handshake(#[source] io::Error),
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    #[error("the manager closed the connection")]
    Closed,
    #[error("timed out")]
    Timeout,
    #[error("the manager sent what is no frame")]
    Frame(#[source] FrameError),
    #[error("the manager broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the agent begins another session")]
    Anew,
}

impl ConnectError {
    /// Whether the manager refuses our certificate because it has ended.
    pub(crate) fn is_expired(&self) -> bool {
        let (Self::Handshake(error) | Self::Broken(error)) = self else { return false };
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
        matches!(cause, Some(rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired)))
    }

    /// What programs compare.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Resolve(..) => "name-unresolved",
            Self::Connect(..) => "connect-failed",
            Self::Proxy(_, error) => error.code(),
            Self::Handshake(_) => "handshake-failed",
            Self::Broken(_) => "link-broken",
            Self::Closed => "link-closed",
            Self::Anew => "link-renewed",
            Self::Timeout => "link-silent",
            Self::Frame(_) | Self::Protocol(_) => "protocol",
        }
    }
}

/// How connections of one kind are made: as whom, trusting whom, and by which way.
#[derive(Debug, Clone)]
pub(crate) struct Dialler {
    tls: Arc<ClientConfig>,
    proxy: Option<Arc<Proxy>>,
}

impl Dialler {
    /// Through `proxy`, if there is one.
    pub(crate) fn new(tls: ClientConfig, proxy: Option<Arc<Proxy>>) -> Self {
        Self { tls: Arc::new(tls), proxy }
    }

    /// Connects to any of the endpoints that `address` stands for now.
    ///
    /// # Errors
    /// If none of them is reached, or proves to be a manager.
    pub(crate) async fn dial(&self, address: &Address) -> Result<Link, ConnectError> {
        match &self.proxy {
            Some(proxy) => {
                let through = |error| ConnectError::Proxy(proxy.address().clone(), error);
                let (mut stream, at) = reach(proxy).await.map_err(through)?;
                proxy.open(&mut stream, address).await.map_err(through)?;
                self.shake(stream, at).await
            }
            None => self.dial_directly(address).await,
        }
    }

    async fn dial_directly(&self, address: &Address) -> Result<Link, ConnectError> {
        let unresolved = |error| ConnectError::Resolve(address.host().to_owned(), error);
        let mut last = unresolved(io::ErrorKind::NotFound.into());
        for socket in resolve(address).await.map_err(unresolved)? {
            // Another address of the same name may lead to the manager where this one leads to somebody else.
            last = match connect(socket).await {
                Ok(stream) => match self.shake(stream, socket).await {
                    Ok(link) => return Ok(link),
                    Err(error) => error,
                },
                Err(error) => ConnectError::Connect(socket.to_string(), error),
            };
        }
        Err(last)
    }

    async fn shake(&self, stream: TcpStream, at: SocketAddr) -> Result<Link, ConnectError> {
        // The name is not checked (see `tls`): the address stands in for it.
        let name = ServerName::IpAddress(at.ip().into());
        match timeout(DIAL, TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream)).await {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(error)) => Err(ConnectError::Handshake(error)),
            Err(_) => Err(ConnectError::Handshake(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// A connection to a proxy itself, and where it leads.
///
/// # Errors
/// If there is none.
async fn reach(proxy: &Proxy) -> Result<(TcpStream, SocketAddr), ProxyError> {
    let mut last = ProxyError::Resolve(io::ErrorKind::NotFound.into());
    for socket in resolve(proxy.address()).await.map_err(ProxyError::Resolve)? {
        match connect(socket).await {
            Ok(stream) => return Ok((stream, socket)),
            Err(error) => last = ProxyError::Unreachable(error),
        }
    }
    Err(last)
}

/// Tries the way to a manager through a proxy, or, if no manager is known, to the proxy alone. Nothing is said to the
/// manager.
///
/// # Errors
/// If there is no such way.
pub(crate) async fn try_proxy(proxy: &Proxy, manager: Option<&Address>) -> Result<(), ProxyError> {
    let (mut stream, _) = reach(proxy).await?;
    match manager {
        Some(manager) => proxy.open(&mut stream, manager).await,
        None => Ok(()),
    }
}

async fn resolve(address: &Address) -> io::Result<Vec<SocketAddr>> {
    let resolving = tokio::net::lookup_host((address.host(), address.port()));
    timeout(DIAL, resolving)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map(Iterator::collect)
}

async fn connect(socket: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(DIAL, TcpStream::connect(socket)).await;
    let stream = stream.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Writes bytes out, all of them.
pub(crate) async fn write<W: tokio::io::AsyncWrite + Unpin>(
    link: &mut W,
    bytes: &[u8],
) -> Result<(), ConnectError> {
    let all = async {
        link.write_all(bytes).await?;
        link.flush().await
    };
    timeout(WRITE, all).await.map_err(|_| ConnectError::Timeout)?.map_err(ConnectError::Broken)
}

/// The next message that this build knows. Safe to drop half-way: what has arrived stays in `buffer`.
pub(crate) async fn read<R: tokio::io::AsyncRead + Unpin>(
    link: &mut R,
    buffer: &mut BytesMut,
) -> Result<ToAgent, ConnectError> {
    loop {
        while let Some(frame) = frame::take(buffer, ToAgent::limit).map_err(ConnectError::Frame)? {
            if let Some(message) = ToAgent::decode(&frame).map_err(ConnectError::Frame)? {
                return Ok(message);
            }
        }
        if link.read_buf(buffer).await.map_err(ConnectError::Broken)? == 0 {
            return Err(ConnectError::Closed);
        }
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
