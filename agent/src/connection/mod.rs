//! One connection to a manager: dialled, spoken over, read from.

pub(crate) mod backoff;
pub(crate) mod fetch;
pub(crate) mod trust;

use std::{io, sync::Arc, time::Duration};

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
            Self::Handshake(_) => "handshake-failed",
            Self::Broken(_) => "link-broken",
            Self::Closed => "link-closed",
            Self::Anew => "link-renewed",
            Self::Timeout => "link-silent",
            Self::Frame(_) | Self::Protocol(_) => "protocol",
        }
    }
}

/// Connects to any of the addresses that `address` stands for now.
pub(crate) async fn dial(address: &Address, config: &Arc<ClientConfig>) -> Result<Link, ConnectError> {
    let resolved = tokio::net::lookup_host((address.host(), address.port()))
        .await
        .map_err(|e| ConnectError::Resolve(address.host().to_owned(), e))?;
    let mut last = ConnectError::Resolve(address.host().to_owned(), io::Error::from(io::ErrorKind::NotFound));
    for socket in resolved {
        let stream = match timeout(DIAL, TcpStream::connect(socket)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                last = ConnectError::Connect(socket.to_string(), error);
                continue;
            }
            Err(_) => {
                last = ConnectError::Connect(socket.to_string(), io::Error::from(io::ErrorKind::TimedOut));
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        // The name is not checked (see `tls`): the address stands in for it.
        let name = ServerName::IpAddress(socket.ip().into());
        let shaken = timeout(DIAL, TlsConnector::from(Arc::clone(config)).connect(name, stream)).await;
        // Another address of the same name may lead to the manager where this one leads to somebody else.
        last = match shaken {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(error)) => ConnectError::Handshake(error),
            Err(_) => ConnectError::Handshake(io::Error::from(io::ErrorKind::TimedOut)),
        };
    }
    Err(last)
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
