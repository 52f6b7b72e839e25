//! The agent's certificate and what it judges others by: renewal over the session and after the end, authorities that
//! follow one another, a clock that stands wrong.
//!
//! **Invariant:** what a session or a link is opened with is what is on the disk.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tm_protocol::{
    ALPN_BULK, ALPN_CONTROL, ALPN_RENEW,
    address::Address,
    message::{Authorities, Renew, Renewed},
    text::escape_for_display,
};

use super::{Agent, elapsed_ms, ends, now, signer};
use crate::{
    clock,
    connection::{self, Dialler, Link, proxy::Proxy},
    enroll::Enrolled,
    renewal,
    tasks::Event,
    tls::{self, KnownTime},
};

/// How soon a renewal that was not given is asked for again.
const RENEWAL: Duration = Duration::from_secs(3600);
/// How far this machine's clock may be from the manager's before that is told, in seconds.
const SKEW_S: u64 = 600;

/// The TLS of both kinds of link, with the present certificate.
pub(super) struct Links {
    pub(super) control: Dialler,
    pub(super) bulk: Dialler,
}

impl Links {
    pub(super) fn of(
        enrolled: &Enrolled,
        time: &KnownTime,
        proxy: Option<&Arc<Proxy>>,
    ) -> Result<Self, rustls::Error> {
        Ok(Self {
            control: Dialler::new(enrolled.tls(ALPN_CONTROL, time)?, proxy.cloned()),
            bulk: Dialler::new(enrolled.tls(ALPN_BULK, time)?, proxy.cloned()),
        })
    }
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error(transparent)]
    Identity(#[from] crate::enroll::EnrollError),
    #[error("the disk does not take the authorities")]
    Keep(#[source] std::io::Error),
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
    #[error("the manager refused: {0}")]
    Refused(String),
}

impl Agent {
    /// The request for the next certificate, when two thirds of the present one's time have passed by the manager's
    /// clock. A task that runs may still fetch patterns with the present one; it is left to it unless time is short.
    pub(super) fn renewal_due(&mut self) -> Option<Renew> {
        if self.asked.is_some() || self.ask_after.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        let now_ms = self.manager_offset_ms?.saturating_add(elapsed_ms(now()));
        let (begin, end) = self.enrolled.validity_ms();
        let anew = self.status.running_task.is_none() && self.anew_at.is_some_and(|at| Instant::now() >= at);
        if !anew
            && !clock::is_renewal_due(now_ms, begin, end, self.spread, self.status.running_task.is_some())
        {
            return None;
        }
        self.ask_after = Some(Instant::now() + RENEWAL);
        match renewal::Asked::new() {
            Ok((asked, request)) => {
                self.asked = Some(asked);
                Some(request)
            }
            Err(error) => {
                tracing::warn!("No new key can be made: {}.", connection::chain(&error));
                None
            }
        }
    }

    /// The key was copied: the next certificate is asked for as soon as no task runs. That is said again until it is done.
    pub(super) fn renew_now(&mut self) {
        if self.anew_at.is_none() {
            tracing::info!("This endpoint's key was copied, and is replaced.");
            self.anew_at = Some(Instant::now());
            self.ask_after = None;
        }
    }

    /// Trusts the authorities that a manager names, if the one that vouches for this very manager is among them.
    pub(super) fn learn(&mut self, told: Authorities, link: &Link) {
        let manager = link.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let roots = tls::roots_of(&told.certificates.concat());
        let roots = roots.filter(|roots| manager.is_some_and(|manager| tls::is_vouched_for(manager, roots)));
        let Some((issuing, roots)) = roots.and_then(|roots| Some((roots.first()?.clone(), roots))) else {
            tracing::warn!("The manager names authorities that do not vouch for it; they are not trusted.");
            return;
        };
        if self.enrolled.is_from(&issuing) {
            self.anew_at = None;
        } else if self.anew_at.is_none() {
            let within = Duration::from_millis(u64::from(told.renew_within_ms));
            self.anew_at = Some(Instant::now() + within.mul_f64(rand::random()));
        }
        let count = roots.len();
        let kept = tokio::task::block_in_place(|| {
            if !self.enrolled.keep_roots(&self.paths, roots).map_err(RenewalError::Keep)? {
                return Ok(None);
            }
            Links::of(&self.enrolled, &self.time, self.config.proxy.as_ref())
                .map(Some)
                .map_err(RenewalError::Tls)
        });
        match kept {
            Ok(None) => {}
            Ok(Some(links)) => {
                tracing::info!(count, "The certificate authorities have changed.");
                self.links = links;
            }
            Err(error) => {
                tracing::warn!("Cannot keep the certificate authorities: {}.", connection::chain(&error));
            }
        }
    }

    /// Takes the next certificate in. `true` if the session has to begin anew with it.
    pub(super) fn renewed(&mut self, renewed: Renewed) -> bool {
        let Some(asked) = self.asked.take() else { return false };
        let installed = match renewed {
            Renewed::Certified { certificate } => tokio::task::block_in_place(|| {
                let enrolled =
                    asked.install(&self.paths, &self.enrolled, self.enrolled.endpoint, certificate)?;
                let links = Links::of(&enrolled, &self.time, self.config.proxy.as_ref())?;
                Ok::<_, RenewalError>((enrolled, links))
            }),
            Renewed::Refused(failure) => Err(RenewalError::Refused(escape_for_display(&failure.to_string()))),
        };
        match installed {
            Ok((enrolled, links)) => {
                tracing::info!("The certificate is renewed.");
                self.signer = signer(&enrolled);
                self.status.certificate_ends = ends(&enrolled);
                self.status.renewal_failure = None;
                self.enrolled = enrolled;
                self.links = links;
                self.ask_after = None;
                self.anew_at = None;
                true
            }
            Err(error) => {
                let why = connection::chain(&error);
                tracing::warn!("The certificate is not renewed: {why}.");
                self.status.renewal_failure = Some(why);
                self.write_status();
                false
            }
        }
    }

    /// Renews a certificate that has ended. `true` if that went well.
    pub(super) async fn renew_late(&mut self, address: &Address) -> bool {
        let dialler = match self.enrolled.tls(ALPN_RENEW, &self.time) {
            Ok(config) => Dialler::new(config, self.config.proxy.clone()),
            Err(error) => {
                tracing::warn!(%error, "A renewal cannot be set up.");
                return false;
            }
        };
        let (asked, request) = match renewal::Asked::new() {
            Ok(asked) => asked,
            Err(error) => {
                tracing::warn!("No new key can be made: {}.", connection::chain(&error));
                return false;
            }
        };
        self.asked = Some(asked);
        match self.meanwhile(renewal::ask_late(address.clone(), dialler, request)).await {
            Ok(renewed) => self.renewed(renewed),
            Err(error) => {
                self.asked = None;
                tracing::warn!(%address, "The ended certificate is not renewed: {}.", connection::chain(&error));
                false
            }
        }
    }

    /// Says once that this machine's clock stands wrong.
    pub(super) fn watch_skew(&mut self, manager_ms: i64) {
        let skew_s = now().unix_ms.saturating_sub(manager_ms) / 1000;
        let was_wrong = self.status.clock_ahead_s.is_some();
        let is_wrong = skew_s.unsigned_abs() > SKEW_S;
        self.status.clock_ahead_s = is_wrong.then_some(skew_s);
        if is_wrong && !was_wrong {
            let message = format!("this machine's clock is {skew_s} s ahead of the manager's");
            tracing::warn!("{message}.");
            self.decide(Event::Notice { code: "clock-skew", message, count: 0 });
        }
    }
}
