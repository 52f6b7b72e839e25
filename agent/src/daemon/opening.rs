//! How a session begins: a link, our hello, and what the manager answers to it.
//!
//! **Invariant:** nothing but pings is heeded before the manager has said how this agent stands.

use std::time::Duration;

use bytes::BytesMut;
use tm_protocol::{
    address::Address,
    message::{Goodbye, Held, Hello, Ping, Pong, ToAgent, Welcome},
};
use tokio::time::timeout;

use super::send;
use crate::connection::{self, ConnectError, Dialler, Link};

/// How long the manager may take to welcome us.
const WELCOME: Duration = Duration::from_secs(15);

/// A link on which the manager has said how this agent stands.
pub(super) enum Opened {
    Welcomed(Box<(Link, BytesMut, Welcome)>),
    SentAway(Goodbye),
    Held(Box<(Link, BytesMut, Held)>),
}

/// Connects to a manager and says hello.
///
/// # Errors
/// If there is no link, or no answer.
pub(super) async fn open_session(
    address: Address,
    dialler: Dialler,
    hello: Hello,
) -> Result<Opened, ConnectError> {
    let mut link = dialler.dial(&address).await?;
    let mut buffer = BytesMut::new();
    send(&mut link, hello.into()).await?;
    loop {
        let first = timeout(WELCOME, connection::read(&mut link, &mut buffer)).await;
        match first.map_err(|_| ConnectError::Timeout)?? {
            ToAgent::Welcome(welcome) => return Ok(Opened::Welcomed(Box::new((link, buffer, welcome)))),
            ToAgent::Goodbye(goodbye) => return Ok(Opened::SentAway(goodbye)),
            ToAgent::Held(held) => return Ok(Opened::Held(Box::new((link, buffer, held)))),
            ToAgent::Ping(Ping { nonce }) => send(&mut link, Pong { nonce }.into()).await?,
            ToAgent::Pong(_)
            | ToAgent::Assign(_)
            | ToAgent::ReportStored(_)
            | ToAgent::NoticesStored(_)
            | ToAgent::EnrollReply(_)
            | ToAgent::Renewed(_)
            | ToAgent::Authorities(_)
            | ToAgent::NewIdentity(_)
            | ToAgent::RenewNow(_)
            | ToAgent::Cancel(_) => return Err(ConnectError::Protocol("a message before the welcome")),
        }
    }
}
