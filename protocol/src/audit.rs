//! The audit log's hash chain: pure, so that the manager writes it and anybody else can check it.
//!
//! Each record's hash is the SHA-256 of the hash before it and the record's fields, every field preceded
//! by its length (u64, big-endian) so that no two records have the same bytes. The first record follows 32
//! zero bytes. A record that is changed, removed or put between others breaks every hash after it; the
//! end of the log is guarded by noting the newest hash elsewhere (`tmctl audit verify` prints it).

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::ids::Sha256;

/// Who ordered what, when, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Its place in the log; the first is 1.
    pub sequence: i64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// The account, or `system`.
    pub actor: String,
    /// What was done, as `noun.verb` (`token.create`, `scan.start`).
    pub action: String,
    /// On what: an id or name.
    pub subject: String,
    /// Parameters as JSON text; never a secret.
    pub detail: String,
    /// The hash of the record before, or zeros.
    pub previous: Sha256,
    /// This record's hash.
    pub hash: Sha256,
}

impl AuditRecord {
    /// What stands before the first record.
    pub const GENESIS: Sha256 = Sha256::new([0; 32]);

    /// The hash that a record with these fields must have.
    pub fn expected_hash(&self) -> Sha256 {
        let mut hasher = sha2::Sha256::new();
        hasher.update(self.previous.as_bytes());
        hasher.update(self.sequence.to_be_bytes());
        hasher.update(self.at_ms.to_be_bytes());
        for field in [&self.actor, &self.action, &self.subject, &self.detail] {
            hasher.update(u64::try_from(field.len()).unwrap_or(u64::MAX).to_be_bytes());
            hasher.update(field.as_bytes());
        }
        Sha256::new(hasher.finalize().into())
    }
}

/// Where a chain breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokenChain {
    /// A number is missing, doubled or out of order.
    #[error("record {found} stands where record {expected} should: records were removed or reordered")]
    Sequence {
        /// What should come.
        expected: i64,
        /// What comes.
        found: i64,
    },
    /// It does not follow the record before it.
    #[error("record {0} does not follow the one before it: a record was replaced")]
    Link(i64),
    /// Its fields are not those that were hashed.
    #[error("record {0} was changed after it was written")]
    Content(i64),
}

/// Checks records that follow `after` (sequence and hash; use 0 and [`AuditRecord::GENESIS`] for the whole log).
/// Returns the newest sequence and hash.
///
/// # Errors
/// At the first record that does not fit.
pub fn verify<'a>(
    after: (i64, Sha256),
    records: impl IntoIterator<Item = &'a AuditRecord>,
) -> Result<(i64, Sha256), BrokenChain> {
    let (mut sequence, mut hash) = after;
    for record in records {
        if record.sequence != sequence + 1 {
            return Err(BrokenChain::Sequence { expected: sequence + 1, found: record.sequence });
        }
        if record.previous != hash {
            return Err(BrokenChain::Link(record.sequence));
        }
        if record.hash != record.expected_hash() {
            return Err(BrokenChain::Content(record.sequence));
        }
        (sequence, hash) = (record.sequence, record.hash);
    }
    Ok((sequence, hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(n: i64) -> Vec<AuditRecord> {
        let mut previous = AuditRecord::GENESIS;
        (1..=n)
            .map(|sequence| {
                let mut record = AuditRecord {
                    sequence,
                    at_ms: 1000 + sequence,
                    actor: "admin".into(),
                    action: "scan.start".into(),
                    subject: format!("task-{sequence}"),
                    detail: "{}".into(),
                    previous,
                    hash: AuditRecord::GENESIS,
                };
                record.hash = record.expected_hash();
                previous = record.hash;
                record
            })
            .collect()
    }

    #[test]
    fn every_kind_of_tampering_is_found_where_it_happened() {
        let start = (0, AuditRecord::GENESIS);
        let good = log(5);
        assert_eq!(verify(start, &good), Ok((5, good[4].hash)));

        let mut changed = good.clone();
        changed[2].actor = "someone else".into();
        assert_eq!(verify(start, &changed), Err(BrokenChain::Content(3)));

        let mut rehashed = changed;
        rehashed[2].hash = rehashed[2].expected_hash();
        assert_eq!(verify(start, &rehashed), Err(BrokenChain::Link(4)));

        let mut removed = good.clone();
        removed.remove(1);
        assert_eq!(verify(start, &removed), Err(BrokenChain::Sequence { expected: 2, found: 3 }));

        // Moving a byte from one field to the next must change the hash.
        let mut moved = good;
        moved[0].action = "scan.startt".into();
        moved[0].subject = "ask-1".into();
        assert_eq!(verify(start, &moved), Err(BrokenChain::Content(1)));
    }
}
