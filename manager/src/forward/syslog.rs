//! Syslog over TLS (RFC 5425): a batch is a connection.
//!
//! Syslog acknowledges nothing, and what was written to a socket may never be read. The end of a TLS connection is
//! acknowledged: a receiver answers `close_notify` when it has read all before it (RFC 5425, 4.4). So each batch ends
//! its connection, and counts as taken when that is answered. Events that come one by one, once a second at most, pay
//! a handshake each.
//!
//! **Invariant:** with `confirm`, nothing is taken for sent that the receiver's TLS has not read.

use std::{io, sync::Arc, time::Duration};

use rustls_pki_types::ServerName;
use tm_protocol::address::Address;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    SendError, innermost, rfc5424,
    settings::{ExportError, ToSyslog},
    tls,
};
use crate::store::events::EventRow;

/// How long connecting and the handshake may take, each.
const CONNECT: Duration = Duration::from_secs(10);
/// How long the reason for a broken connection is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A receiver.
pub(super) struct Syslog {
    connector: TlsConnector,
    address: Address,
    server_name: ServerName<'static>,
    facility: u8,
    confirm: bool,
}

impl std::fmt::Debug for Syslog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Syslog").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Syslog {
    /// Makes one from its settings.
    ///
    /// # Errors
    /// If a file that they name cannot be used, or the server's name is none.
    pub(super) fn open(name: &str, to: &ToSyslog) -> Result<Self, ExportError> {
        let server_name = ServerName::try_from(to.server_name.clone())
            .map_err(|_| ExportError::new(name, "server_name", "it is not a host name or an IP address"))?;
        let client = to.client.as_ref().map(|(certificate, key)| (certificate.as_path(), key.as_path()));
        let config = tls::config(name, &to.ca_file, client)?;
        Ok(Self {
            connector: TlsConnector::from(Arc::new(config)),
            address: to.address.clone(),
            server_name,
            facility: to.facility,
            confirm: to.confirm,
        })
    }

    /// Sends a batch; returns when the receiver has it.
    ///
    /// # Errors
    /// If it may not have all of it.
    pub(super) async fn send(&self, events: &[EventRow]) -> Result<(), SendError> {
        let mut bytes = Vec::new();
        for event in events {
            rfc5424::append(&mut bytes, event, self.facility);
        }
        let to = (self.address.host(), self.address.port());
        let tcp = timeout(CONNECT, TcpStream::connect(to))
            .await
            .map_err(|_| SendError::Slow)?
            .map_err(|error| SendError::Connect(innermost(&error)))?;
        let _ = tcp.set_nodelay(true);
        let mut link = timeout(CONNECT, self.connector.connect(self.server_name.clone(), tcp))
            .await
            .map_err(|_| SendError::Slow)?
            .map_err(|error| SendError::Tls(reason(&error)))?;
        if let Err(error) = write(&mut link, &bytes).await {
            // TLS 1.3 tells a client late that it is refused: the reason may lie there unread.
            let said = timeout(LAST_WORDS, link.read(&mut [0; 64])).await;
            let told = said.ok().and_then(Result::err).filter(|error| error.get_ref().is_some());
            return Err(broken(&told.unwrap_or(error)));
        }
        let mut answer = [0; 4096];
        loop {
            match link.read(&mut answer).await {
                // Its close_notify.
                Ok(0) => return Ok(()),
                // Syslog has no answers; whoever says something all the same is not read for ever (the caller's time
                // limit).
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return if self.confirm { Err(SendError::Unconfirmed) } else { Ok(()) };
                }
                Err(error) => return Err(broken(&error)),
            }
        }
    }
}

/// Writes everything and TLS's end. TLS alone ends: the connection stays open for the answer.
async fn write(link: &mut TlsStream<TcpStream>, bytes: &[u8]) -> io::Result<()> {
    link.write_all(bytes).await?;
    link.flush().await?;
    link.get_mut().1.send_close_notify();
    link.flush().await
}

fn broken(error: &io::Error) -> SendError {
    SendError::Broken(reason(error))
}

/// What TLS found, if it was TLS.
fn reason(error: &io::Error) -> String {
    error.get_ref().map_or_else(|| error.to_string(), |inner| innermost(inner))
}
