//! An agent whose identity another one uses, too: it says what it is, waits for an administrator, and is another endpoint
//! from then on.
//!
//! **Invariant:** a held agent carries nothing out, and reports nothing: what its journal holds may be the other one's.
//! **Invariant:** what was copied is set aside before anything is done under the new identity (`enroll::set_aside`), whenever
//! the machine stops in between.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::BytesMut;
use tm_protocol::{
    message::{Held, NewIdentity, Ping, Pong, ToAgent},
    report::Failure,
};
use tokio::time::timeout;

use super::{Agent, Ended, LONGEST_SILENCE, send};
use crate::{
    connection::{self, ConnectError, Link},
    platform::facts,
    renewal,
};

/// The shortest silence after which the manager is given up: it says something every few seconds.
const SILENCE: Duration = Duration::from_secs(15);

impl Agent {
    /// Waits until somebody has decided, or the link ends.
    pub(super) async fn wait_as_held(
        &mut self,
        mut link: Link,
        mut buffer: BytesMut,
        held: Held,
    ) -> Result<Ended, ConnectError> {
        tracing::warn!("Another agent with this identity is connected; this one waits for an administrator.");
        for cancel in self.cancels.values() {
            cancel.store(true, Ordering::Release);
        }
        self.status.last_failure = Some(held_failure());
        self.write_status();
        let no_key = |_| ConnectError::Protocol("no key can be made");
        // The same key as long as this process lives: by it the manager knows who was approved.
        let asked = match self.own_key.take() {
            Some(asked) => asked,
            None => renewal::Asked::new().map_err(no_key)?.0,
        };
        let request = asked.request().map_err(no_key);
        self.own_key = Some(asked);
        let looking = tokio::task::spawn_blocking(facts::inventory);
        let facts = self.meanwhile(looking).await.map_err(|_| ConnectError::Protocol("no facts"))?;
        send(&mut link, facts.into()).await?;
        send(&mut link, request?.into()).await?;
        let heartbeat = Duration::from_millis(u64::from(held.heartbeat_ms));
        let silence = (heartbeat * 2).clamp(SILENCE, LONGEST_SILENCE);
        loop {
            let said = self.meanwhile(timeout(silence, connection::read(&mut link, &mut buffer))).await;
            match said.map_err(|_| ConnectError::Timeout)?? {
                ToAgent::Ping(Ping { nonce }) => send(&mut link, Pong { nonce }.into()).await?,
                ToAgent::Pong(_) => {}
                ToAgent::Goodbye(goodbye) => return Ok(Ended::goodbye(goodbye)),
                ToAgent::NewIdentity(new) => return Err(self.become_another(new)),
                ToAgent::Welcome(_)
                | ToAgent::Assign(_)
                | ToAgent::ReportStored(_)
                | ToAgent::NoticesStored(_)
                | ToAgent::EnrollReply(_)
                | ToAgent::Renewed(_)
                | ToAgent::Authorities(_)
                | ToAgent::Held(_)
                | ToAgent::RenewNow(_)
                | ToAgent::Cancel(_) => return Err(ConnectError::Protocol("a held agent is told something")),
            }
        }
    }

    /// What is told of earlier attempts. Once held, this process stays held: after a manager was away, it may be the first
    /// to come.
    pub(super) fn last_failure(&self) -> Option<Failure> {
        if self.own_key.is_some() { Some(held_failure()) } else { self.status.last_failure.clone() }
    }

    /// Takes the new identity in; the process then begins anew with it. Why the link ends.
    fn become_another(&mut self, new: NewIdentity) -> ConnectError {
        let Some(asked) = &self.own_key else {
            return ConnectError::Protocol("an identity nobody asked for");
        };
        if new.endpoint == self.enrolled.endpoint {
            return ConnectError::Protocol("the new identity is the old one");
        }
        let installed = tokio::task::block_in_place(|| {
            asked.install(&self.paths, &self.enrolled, new.endpoint, new.certificate)
        });
        match installed {
            Ok(_) => {
                tracing::info!(endpoint = %new.endpoint, "This agent is an endpoint of its own.");
                self.is_another = true;
                ConnectError::Anew
            }
            Err(error) => {
                let why = connection::chain(&error);
                tracing::warn!("The new identity is not taken: {why}.");
                self.status.renewal_failure = Some(why);
                self.write_status();
                ConnectError::Protocol("the new identity is none")
            }
        }
    }
}

fn held_failure() -> Failure {
    let message = "another agent with this identity is connected and answers; an administrator decides which is which \
                   (`tmctl endpoint conflicts`)";
    Failure::new(Held::CODE, message)
}
