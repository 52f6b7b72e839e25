//! Agents: who they are, how they come in, and the live links to them.
//!
//! **Invariant:** identity comes from the certificate, never from a message.

pub(crate) mod authorities;
pub(crate) mod bulk;
pub(crate) mod ca;
pub(crate) mod doors;
pub(crate) mod enrollment;
pub(crate) mod expiry;
pub(crate) mod held;
pub(crate) mod intake;
pub(crate) mod links;
pub(crate) mod listener;
pub(crate) mod lookups;
pub(crate) mod meter;
pub(crate) mod peers;
pub(crate) mod registry;
pub(crate) mod renewal;
pub(crate) mod session;
pub(crate) mod tls;

use std::{io, time::SystemTime};

use bytes::BytesMut;
use tm_protocol::{
    frame::{self, FrameError},
    message::{ToAgent, ToManager},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the link broke")]
    Broken(#[source] io::Error),
    #[error("the agent closed the link")]
    Closed,
    #[error("silence for too long")]
    Silent,
    #[error("no frame")]
    Frame(#[source] FrameError),
    #[error("protocol: {0}")]
    Protocol(&'static str),
    #[error("the store failed")]
    Store(#[source] crate::store::StoreError),
    #[error("the store cannot take what the agent hands in")]
    Unstorable,
    #[error("replaced by a newer session")]
    Replaced,
    #[error("the manager ends")]
    Ending,
}

impl LinkError {
    /// Every [`LinkError::reason`].
    pub(crate) const REASONS: [&str; 9] =
        ["broken", "closed", "silent", "frame", "protocol", "store", "unstorable", "replaced", "ending"];

    /// A word for it, for what is counted.
    pub(crate) const fn reason(&self) -> &'static str {
        match self {
            Self::Broken(_) => "broken",
            Self::Closed => "closed",
            Self::Silent => "silent",
            Self::Frame(_) => "frame",
            Self::Protocol(_) => "protocol",
            Self::Store(_) => "store",
            Self::Unstorable => "unstorable",
            Self::Replaced => "replaced",
            Self::Ending => "ending",
        }
    }
}

/// The next message that this build knows. Safe to drop half-way: what has arrived stays in `buffer`.
pub(crate) async fn read(
    link: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> Result<ToManager, LinkError> {
    loop {
        if let (Some(message), _) = read_any(link, buffer).await? {
            return Ok(message);
        }
    }
}

/// The next message and the length of its frame, in bytes; `None` for one that this build does not know. Safe
/// to drop half-way.
pub(crate) async fn read_any(
    link: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> Result<(Option<ToManager>, usize), LinkError> {
    loop {
        if let Some(frame) = frame::take(buffer, ToManager::limit).map_err(LinkError::Frame)? {
            let message = ToManager::decode(&frame).map_err(LinkError::Frame)?;
            return Ok((message, frame::HEADER_LENGTH + frame.body.len()));
        }
        if link.read_buf(buffer).await.map_err(LinkError::Broken)? == 0 {
            return Err(LinkError::Closed);
        }
    }
}

/// Writes one message out.
pub(crate) async fn write(link: &mut (impl AsyncWrite + Unpin), message: &ToAgent) -> Result<(), LinkError> {
    let mut bytes = BytesMut::new();
    message.encode(&mut bytes).map_err(LinkError::Frame)?;
    let all = async {
        link.write_all(&bytes).await?;
        link.flush().await
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), all)
        .await
        .map_err(|_| LinkError::Silent)?
        .map_err(LinkError::Broken)
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
