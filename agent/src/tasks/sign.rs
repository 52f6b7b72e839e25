//! Signs what came of a scan with the key of the endpoint's certificate, so that its receipt can be held against
//! the endpoint later.
//!
//! **Invariant:** the key signs statements of [`tm_protocol::receipt`] and nothing that anybody else composed.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{SignatureScheme, sign::SigningKey};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    receipt::{Receipt, statement},
    report::Coverage,
    task::ScanSpec,
};

/// Who signs, with what.
#[derive(Debug, Clone)]
pub(crate) struct Signer {
    pub(crate) endpoint: EndpointId,
    pub(crate) key: Arc<dyn SigningKey>,
}

impl Signer {
    /// Adds the receipt to the `coverage` of a scan that began at `started`, and went through unless it is not
    /// `whole`. Without a signature it stays as it is, and the log says why.
    pub(super) fn sign(
        &self,
        task: TaskId,
        spec: &ScanSpec,
        coverage: &mut Coverage,
        started: SystemTime,
        whole: bool,
    ) {
        let ended_ms = unix_ms(started + Duration::from_millis(coverage.elapsed_ms));
        let mut receipt = Receipt { started_ms: unix_ms(started), ended_ms, whole, signature: Vec::new() };
        let text = statement(task, self.endpoint, spec, coverage, &receipt);
        let signed = self
            .key
            .choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256])
            .map(|signer| signer.sign(text.as_bytes()));
        match signed {
            Some(Ok(signature)) => {
                receipt.signature = signature;
                coverage.receipt = Some(receipt);
            }
            Some(Err(error)) => tracing::warn!(%task, %error, "A receipt cannot be signed."),
            None => tracing::warn!(%task, "A receipt cannot be signed: the key is of another kind."),
        }
    }
}

fn unix_ms(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
