//! Signed receipts of scans: whether the endpoint's own key signed what was ordered and what came of it.
//!
//! What is signed is written anew from the stored order and the reported coverage, never taken from the agent.
//!
//! **Invariant:** `verified` is said only of a signature by the key of a certificate that this fleet issued to that
//! very endpoint, over that very task.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::{SignatureScheme, crypto::aws_lc_rs};
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use tm_protocol::{
    receipt::{Receipt, statement},
    report::Coverage,
    task::{ScanSpec, TaskSpec, TaskState},
};
use x509_parser::{prelude::FromDer as _, x509::SubjectPublicKeyInfo};

use super::{
    StoreError, Tx,
    outcomes::{Head, Ordered},
    specs,
};

/// A receipt as the `result` column holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReceiptRow {
    /// Whether the signature is the endpoint's, over the statement.
    pub(crate) verified: bool,
    /// `unsigned` or `bad-signature` where it is not.
    pub(crate) problem: Option<String>,
    /// When the scan began and ended by the endpoint's clock, where it signed.
    pub(crate) started_ms: Option<i64>,
    pub(crate) ended_ms: Option<i64>,
    pub(crate) signature_b64: String,
    /// The endpoint's key (SubjectPublicKeyInfo).
    pub(crate) key_b64: String,
    /// The statement.
    pub(crate) signed_b64: String,
}

impl ReceiptRow {
    fn without(problem: &str) -> Self {
        Self {
            verified: false,
            problem: Some(problem.to_owned()),
            started_ms: None,
            ended_ms: None,
            signature_b64: String::new(),
            key_b64: String::new(),
            signed_b64: String::new(),
        }
    }

    /// Whether a signature was given that is not the endpoint's over this scan.
    pub(super) fn is_refused(&self) -> bool {
        !self.verified && self.problem.as_deref() != Some("unsigned")
    }
}

/// Looks at the receipt of a scan that ended in `state`; tells the order it is about, and when that was begun.
///
/// # Errors
/// If the database refuses or holds a task that is not one.
pub(super) async fn look_at(
    tx: &mut Tx,
    head: &Head,
    state: TaskState,
    coverage: &Coverage,
) -> Result<(ScanSpec, Option<i64>, ReceiptRow), StoreError> {
    let (spec, began) = order(tx, head).await?;
    let Some(receipt) = &coverage.receipt else {
        return Ok((spec, began, ReceiptRow::without("unsigned")));
    };
    let keys = keys(tx, head).await?;
    let row = judge(head, &spec, state, coverage, receipt, &keys);
    Ok((spec, began, row))
}

/// What a scan was ordered to do, and when it began.
///
/// # Errors
/// If the database refuses or holds a task that is not one.
pub(super) async fn order(tx: &mut Tx, head: &Head) -> Result<(ScanSpec, Option<i64>), StoreError> {
    let ordered = match &head.order {
        Some(ordered) => ordered.clone(),
        None => {
            let row = sqlx::query("SELECT spec, started_ms FROM task WHERE id = $1")
                .bind(head.id.to_string())
                .fetch_one(&mut **tx)
                .await
                .map_err(StoreError::query("read an order"))?;
            Ordered { spec: row.get(0), started_ms: row.get(1) }
        }
    };
    match specs::from_json(&ordered.spec)? {
        TaskSpec::Scan(spec) => Ok((spec, ordered.started_ms)),
        TaskSpec::Cleanup(_) | TaskSpec::Restore(_) => Err(StoreError::content("scan", ordered.spec)),
    }
}

/// The endpoint's keys (SubjectPublicKeyInfo), newest first.
async fn keys(tx: &mut Tx, head: &Head) -> Result<Vec<Vec<u8>>, StoreError> {
    let rows = sqlx::query(
        "SELECT public_key FROM certificate WHERE endpoint_id = $1 AND public_key IS NOT NULL
         ORDER BY issued_ms DESC LIMIT 8",
    )
    .bind(head.endpoint.to_string())
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("look an endpoint's keys up"))?;
    rows.iter()
        .map(|row| {
            let text: String = row.get(0);
            STANDARD.decode(&text).map_err(|_| StoreError::content("public key", text))
        })
        .collect()
}

fn judge(
    head: &Head,
    spec: &ScanSpec,
    state: TaskState,
    coverage: &Coverage,
    receipt: &Receipt,
    keys: &[Vec<u8>],
) -> ReceiptRow {
    if receipt.signature.len() > Receipt::MAX_SIGNATURE {
        return ReceiptRow::without("bad-signature");
    }
    let signed = statement(head.id, head.endpoint, spec, coverage, receipt);
    let key = keys.iter().find(|key| is_signed(key, signed.as_bytes(), &receipt.signature));
    // A scan that was called off is not stated to be done.
    let is_consistent = receipt.whole || state != TaskState::Done;
    let verified = key.is_some() && is_consistent;
    ReceiptRow {
        verified,
        problem: (!verified).then(|| "bad-signature".to_owned()),
        started_ms: Some(receipt.started_ms),
        ended_ms: Some(receipt.ended_ms),
        signature_b64: STANDARD.encode(&receipt.signature),
        key_b64: key.or_else(|| keys.first()).map(|key| STANDARD.encode(key)).unwrap_or_default(),
        signed_b64: STANDARD.encode(&signed),
    }
}

/// Whether `signature` is one by `key` over `message` (ECDSA, P-256, SHA-256).
fn is_signed(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let Ok((_, key)) = SubjectPublicKeyInfo::from_der(key) else { return false };
    let provider = aws_lc_rs::default_provider();
    let mapping = provider.signature_verification_algorithms.mapping;
    let algorithms = mapping
        .iter()
        .filter(|(scheme, _)| *scheme == SignatureScheme::ECDSA_NISTP256_SHA256)
        .flat_map(|(_, algorithms)| *algorithms);
    algorithms
        .into_iter()
        .any(|algorithm| algorithm.verify_signature(&key.subject_public_key.data, message, signature).is_ok())
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PublicKeyData as _, SigningKey as _};
    use tm_protocol::{
        ids::{EndpointId, TaskId},
        task::TaskKind,
    };
    use uuid::Uuid;

    use super::*;
    use crate::store::specs::tests::scan;

    #[test]
    fn only_the_endpoints_own_key_over_this_very_scan_counts() {
        let key = KeyPair::generate().unwrap();
        let other = KeyPair::generate().unwrap();
        let head = Head {
            id: TaskId::new(Uuid::from_u128(1)),
            endpoint: EndpointId::new(Uuid::from_u128(2)),
            kind: TaskKind::Scan,
            dry_run: false,
            state: TaskState::Running,
            stored: TaskState::Running,
            order: None,
        };
        let TaskSpec::Scan(spec) = scan() else { panic!("a scan") };
        let coverage = Coverage { files: 3, ..Coverage::default() };
        let mut receipt = Receipt { started_ms: 1, ended_ms: 2, whole: true, signature: vec![] };
        let text = statement(head.id, head.endpoint, &spec, &coverage, &receipt);
        receipt.signature = key.sign(text.as_bytes()).unwrap();
        let keys = [other.subject_public_key_info(), key.subject_public_key_info()];

        let good = judge(&head, &spec, TaskState::Done, &coverage, &receipt, &keys);
        assert!(good.verified && !good.is_refused() && good.problem.is_none());
        assert_eq!(STANDARD.decode(&good.signed_b64).unwrap(), text.as_bytes());
        assert_eq!(STANDARD.decode(&good.key_b64).unwrap(), keys[1]);

        let bad = |row: &ReceiptRow| !row.verified && row.is_refused();
        assert!(bad(&judge(&head, &spec, TaskState::Done, &coverage, &receipt, &keys[..1])), "another's key");
        assert!(bad(&judge(&head, &spec, TaskState::Done, &coverage, &receipt, &[])), "no key");
        assert!(
            bad(&judge(&head, &spec, TaskState::Done, &coverage, &receipt, &[vec![1, 2]])),
            "no real key"
        );
        let more = Coverage { files: 4, ..Coverage::default() };
        assert!(bad(&judge(&head, &spec, TaskState::Done, &more, &receipt, &keys)), "another count");
        let twin = Head { id: TaskId::new(Uuid::from_u128(9)), ..head.clone() };
        assert!(bad(&judge(&twin, &spec, TaskState::Done, &coverage, &receipt, &keys)), "another task");
        for signature in [vec![], vec![0; 64], vec![0; 100_000]] {
            let receipt = Receipt { signature, ..receipt.clone() };
            assert!(bad(&judge(&head, &spec, TaskState::Done, &coverage, &receipt, &keys)));
        }
        let mut half = Receipt { whole: false, ..receipt };
        let text = statement(head.id, head.endpoint, &spec, &coverage, &half);
        half.signature = key.sign(text.as_bytes()).unwrap();
        assert!(
            bad(&judge(&head, &spec, TaskState::Done, &coverage, &half, &keys)),
            "called off, told as done"
        );
        assert!(judge(&head, &spec, TaskState::Cancelled, &coverage, &half, &keys).verified);
    }
}
