//! `tmctl audit`.

use serde::Serialize;
use tm_protocol::{
    audit::{self, AuditRecord, BrokenChain},
    ids::Sha256,
};

use crate::{
    cli::Audit,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Format, Output},
};

const COLUMNS: [Column<AuditRecord>; 8] = [
    Column::narrow("sequence", |r| r.sequence.to_string()),
    Column::time("at", |r| time(r.at_ms)),
    Column::narrow("actor", |r| r.actor.clone()),
    Column::narrow("action", |r| r.action.clone()),
    Column::narrow("subject", |r| r.subject.clone()),
    Column::narrow("detail", |r| r.detail.clone()),
    Column::wide("previous", |r| r.previous.to_string()),
    Column::wide("hash", |r| r.hash.to_string()),
];

/// What `verify` says; the newest record's number and hash are for a note elsewhere.
#[derive(Debug, Serialize)]
struct Verified {
    whole: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash: Option<Sha256>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

const VERIFIED: [Column<Verified>; 4] = [
    Column::narrow("whole", |v| v.whole.to_string()),
    Column::narrow("sequence", |v| v.sequence.map(|s| s.to_string()).unwrap_or_default()),
    Column::narrow("hash", |v| v.hash.map(|h| h.to_string()).unwrap_or_default()),
    Column::narrow("problem", |v| v.problem.clone().unwrap_or_default()),
];

pub(crate) async fn run(command: Audit, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Audit::List { after } => {
            let mut records: Vec<AuditRecord> = Vec::new();
            client.pages(&["audit"], "the audit log", after, |page| records.extend(page)).await?;
            out.list(&records, &COLUMNS, "no records")?;
        }
        Audit::Verify => verify(client, out).await?,
    }
    Ok(Exit::Done)
}

async fn verify(client: &Client, out: &Output) -> Result<(), Failure> {
    let mut chain = Chain::default();
    client.pages(&["audit"], "the audit log", 0, |page| chain.take(&page)).await?;
    match chain.0 {
        Ok((sequence, hash)) => {
            let good = Verified { whole: true, sequence: Some(sequence), hash: Some(hash), problem: None };
            match out.format() {
                Format::Table => out.line(&format!("whole: {sequence} records, newest hash {hash}")),
                Format::Json | Format::Csv => out.one(&good, &VERIFIED),
            }
        }
        Err(broken) => {
            let bad =
                Verified { whole: false, sequence: None, hash: None, problem: Some(broken.to_string()) };
            match out.format() {
                Format::Table => {}
                Format::Json | Format::Csv => out.one(&bad, &VERIFIED)?,
            }
            Err(Failure::Audit(broken))
        }
    }
}

/// The chain so far, page by page: its newest record, or where it broke first.
struct Chain(Result<(i64, Sha256), BrokenChain>);

impl Default for Chain {
    fn default() -> Self {
        Self(Ok((0, AuditRecord::GENESIS)))
    }
}

impl Chain {
    fn take(&mut self, page: &[AuditRecord]) {
        if let Ok(after) = &self.0 {
            self.0 = audit::verify(*after, page);
        }
    }
}

fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |at| format!("{at:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_checked_across_pages_and_stays_broken() {
        let mut previous = AuditRecord::GENESIS;
        let mut log: Vec<AuditRecord> = Vec::new();
        for sequence in 1..=6 {
            let mut record = AuditRecord {
                sequence,
                at_ms: sequence,
                actor: "a".into(),
                action: "b.c".into(),
                subject: String::new(),
                detail: "{}".into(),
                previous,
                hash: AuditRecord::GENESIS,
            };
            record.hash = record.expected_hash();
            previous = record.hash;
            log.push(record);
        }
        let check = |log: &[AuditRecord]| {
            let mut chain = Chain::default();
            log.chunks(2).for_each(|page| chain.take(page));
            chain.0
        };
        assert_eq!(check(&log), Ok((6, log[5].hash)));
        assert_eq!(check(&[]), Ok((0, AuditRecord::GENESIS)));
        log[2].actor = "somebody else".into();
        assert_eq!(check(&log), Err(BrokenChain::Content(3)));
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(time(i64::MAX), i64::MAX.to_string());
    }
}
