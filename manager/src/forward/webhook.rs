//! A webhook: HTTPS `POST` of JSON, one batch a request.
//!
//! The body is `{"exporter": NAME, "fleet": ID, "events": [{"id": 42, "at": "…", "endpoint": ID, "host": "…", "kind":
//! "…", "status": "…", "severity": "…", "detail": "…", "message": "…", "task": ID or null, "incident": ID or null}, …]}`,
//! events by growing `id`. Any status of 200 to 299 takes the batch; with any other, or none, it comes again.
//!
//! The receiver knows us by `Authorization: Bearer TOKEN`, or by `TM-Signature: t=SECONDS,v1=HEX`: HMAC-SHA256 with the
//! shared secret over `SECONDS`, a full stop and the body's bytes. Redirects are not followed, and no proxy of the
//! environment is used.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use reqwest::{
    Client, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue},
    redirect::Policy,
};
use serde::Serialize;
use tm_protocol::ids::FleetId;

use super::{
    SendError, innermost,
    settings::{Credential, ExportError, Severity, ToWebhook},
    tls,
};
use crate::store::events::EventRow;

/// How long connecting and a whole request may take.
const CONNECT: Duration = Duration::from_secs(10);
const REQUEST: Duration = Duration::from_secs(10);
const SIGNATURE: HeaderName = HeaderName::from_static("tm-signature");

/// A receiver.
pub(super) struct Webhook {
    http: Client,
    url: Url,
    name: String,
    fleet: FleetId,
    proof: Proof,
}

/// What shows who we are.
enum Proof {
    Bearer(HeaderValue),
    Hmac(Box<hmac::Key>),
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Webhook").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Debug, Serialize)]
struct Batch<'e> {
    exporter: &'e str,
    fleet: String,
    events: Vec<Sent<'e>>,
}

#[derive(Debug, Serialize)]
struct Sent<'e> {
    id: i64,
    at: String,
    endpoint: &'e str,
    host: &'e str,
    kind: &'static str,
    status: &'static str,
    severity: &'static str,
    detail: &'e str,
    message: &'e str,
    task: Option<&'e str>,
    incident: Option<&'e str>,
}

impl<'e> Sent<'e> {
    fn new(event: &'e EventRow) -> Self {
        let at = jiff::Timestamp::from_millisecond(event.at_ms).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        Self {
            id: event.id,
            at: at.to_string(),
            endpoint: &event.endpoint,
            host: &event.host,
            kind: event.kind.word(),
            status: event.status.word(),
            severity: Severity::of(event.status).word(),
            detail: &event.detail,
            message: &event.message,
            task: event.task.as_deref(),
            incident: event.incident.as_deref(),
        }
    }
}

impl Webhook {
    /// Makes one from its settings.
    ///
    /// # Errors
    /// If the file with the authorities cannot be used.
    pub(super) fn open(name: &str, to: &ToWebhook, fleet: FleetId) -> Result<Self, ExportError> {
        let bad = |error: &dyn std::error::Error| ExportError::new(name, "url", innermost(error));
        let http = Client::builder()
            .tls_backend_preconfigured(tls::config(name, &to.ca_file, None)?)
            .https_only(true)
            .redirect(Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT)
            .timeout(REQUEST)
            .user_agent(concat!("tm-manager/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| bad(&error))?;
        let proof = match &to.credential {
            Credential::Bearer(token) => {
                let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose()))
                    .map_err(|_| ExportError::new(name, "bearer_token", "it holds what a header cannot"))?;
                value.set_sensitive(true);
                Proof::Bearer(value)
            }
            Credential::Hmac(secret) => {
                Proof::Hmac(Box::new(hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes())))
            }
        };
        let url = Url::parse(&to.url).map_err(|error| bad(&error))?;
        Ok(Self { http, url, name: name.to_owned(), fleet, proof })
    }

    /// Sends a batch; returns when the receiver has it.
    ///
    /// # Errors
    /// If it may not have it.
    pub(super) async fn send(&self, events: &[EventRow]) -> Result<(), SendError> {
        let batch = Batch {
            exporter: &self.name,
            fleet: self.fleet.to_string(),
            events: events.iter().map(Sent::new).collect(),
        };
        let body = serde_json::to_vec(&batch).expect("a batch is plain data");
        let request = self.http.post(self.url.clone()).header(CONTENT_TYPE, "application/json");
        let request = match &self.proof {
            Proof::Bearer(value) => request.header(AUTHORIZATION, value.clone()),
            Proof::Hmac(key) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                request.header(SIGNATURE, signature(key, now, &body))
            }
        };
        let answer = request.body(body).send().await.map_err(|error| failure(&error))?;
        if answer.status().is_success() { Ok(()) } else { Err(SendError::Status(answer.status().as_u16())) }
    }
}

/// Why there is no answer. The address is left out: its path may be a secret.
fn failure(error: &reqwest::Error) -> SendError {
    if error.is_timeout() {
        SendError::Slow
    } else if error.is_connect() {
        SendError::Connect(innermost(error))
    } else {
        SendError::Broken(innermost(error))
    }
}

fn signature(key: &hmac::Key, seconds: u64, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(key);
    context.update(format!("{seconds}.").as_bytes());
    context.update(body);
    format!("t={seconds},v1={}", hex::encode(context.sign()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_what_others_compute_too() {
        // printf '1750000000.{"a":1}' | openssl dgst -sha256 -hmac 0123456789abcdef
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"0123456789abcdef");
        assert_eq!(
            signature(&key, 1_750_000_000, b"{\"a\":1}"),
            "t=1750000000,v1=aa58696dd1ffda82345efcb2bcbfc7af6083276c4a92b2ca1b6a992e99c63450"
        );
    }
}
