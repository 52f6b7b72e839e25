//! The signed receipt of a scan: which bytes an endpoint's key signs.
//!
//! The statement is ASCII text, one fact a line, in a fixed order, each list before what follows it; paths are
//! hexadecimal digits of their exact bytes. Two different scans never have the same statement, and its first
//! line is a context that the key signs in no other use (TLS 1.3 begins with 64 spaces).
//!
//! **Invariant:** endpoint and manager write the statement with this one function; it is never parsed.

use std::fmt::Write as _;

use bincode::{Decode, Encode};

use crate::{
    ids::{EndpointId, TaskId},
    report::{Coverage, PathBytes, Verdict},
    task::ScanSpec,
};

/// The first line of every statement.
pub const CONTEXT: &str = "threat-management scan receipt v1";

/// What an endpoint adds to the coverage of a scan to make it a signed receipt.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Receipt {
    /// When the scan began, in milliseconds since 1970 by the endpoint's clock.
    pub started_ms: i64,
    /// When it ended, likewise.
    pub ended_ms: i64,
    /// Whether it went through; `false` if it was called off or ran out of time.
    pub whole: bool,
    /// ECDSA (P-256, SHA-256, ASN.1 form) over the [`statement`], by the key of the endpoint's certificate. At most
    /// [`Receipt::MAX_SIGNATURE`] bytes.
    pub signature: Vec<u8>,
}

impl Receipt {
    /// Longest signature that is looked at, in bytes.
    pub const MAX_SIGNATURE: usize = 512;
}

/// The bytes that are signed: the order `spec` for `endpoint`, what came of it, and the times in `receipt` (its
/// signature is not read).
pub fn statement(
    task: TaskId,
    endpoint: EndpointId,
    spec: &ScanSpec,
    coverage: &Coverage,
    receipt: &Receipt,
) -> String {
    let mut text = format!("{CONTEXT}\ntask {task}\nendpoint {endpoint}\n");
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name} {value}");
    };
    for pattern in &spec.patterns {
        line("pattern", &pattern.sha256);
    }
    for path in &spec.paths {
        line("path", &digits(path));
    }
    let limits = &spec.limits;
    line("limit-file-bytes", &limits.file_bytes);
    line("limit-depth", &limits.depth);
    line("limit-members", &limits.members);
    line("limit-member-bytes", &limits.member_bytes);
    line("limit-total-bytes", &limits.total_bytes);
    line("limit-ratio", &limits.ratio);
    line("limit-file-ms", &limits.file_ms);
    line("all-local", &spec.options.all_local);
    line("cpu-percent", &spec.options.cpu_percent.map_or_else(|| "none".to_owned(), |p| p.to_string()));
    line("quick", &spec.options.quick);
    line("full", &spec.options.full);
    line("processes", &spec.options.processes);
    line("fresh", &spec.options.fresh);
    line("started-ms", &receipt.started_ms);
    line("ended-ms", &receipt.ended_ms);
    line("whole", &receipt.whole);
    line("files", &coverage.files);
    line("bytes", &coverage.bytes);
    line("known", &coverage.known);
    line("detections", &coverage.detections);
    for (reason, count) in &coverage.skipped {
        line("skipped", &format_args!("{reason} {count}"));
    }
    for sample in &coverage.samples {
        let names: Vec<String> = std::iter::once(&sample.path).chain(&sample.member).map(digits).collect();
        line("sample", &format_args!("{} {}", sample.reason, names.join(" ")));
    }
    line("elapsed-ms", &coverage.elapsed_ms);
    line("cpu-ms", &coverage.cpu_ms);
    let verdict = match coverage.verdict() {
        Verdict::Clean if !receipt.whole => Verdict::Incomplete,
        verdict @ (Verdict::Clean | Verdict::Detected | Verdict::Incomplete) => verdict,
    };
    line("verdict", &verdict);
    text
}

fn digits(path: &PathBytes) -> String {
    hex::encode(&path.0)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        ids::Sha256,
        report::{SkipReason, Skipped},
        task::{PatternRef, ScanLimits, ScanOptions},
    };

    fn all() -> (ScanSpec, Coverage, Receipt) {
        let spec = ScanSpec {
            paths: vec![PathBytes(b"/a\n\xff".to_vec())],
            patterns: vec![PatternRef { sha256: Sha256::new([1; 32]), size: 1, name: "p".into() }],
            limits: ScanLimits::default(),
            options: ScanOptions::default(),
        };
        let mut coverage = Coverage { files: 1, bytes: 2, elapsed_ms: 3, cpu_ms: 4, ..Coverage::default() };
        let (path, member) = (PathBytes(b"/z".to_vec()), vec![PathBytes(b"m".to_vec())]);
        coverage.skip(Skipped { path, member, reason: SkipReason::Encrypted });
        (spec, coverage, Receipt { started_ms: 5, ended_ms: 6, whole: true, signature: vec![] })
    }

    fn said(spec: &ScanSpec, coverage: &Coverage, receipt: &Receipt) -> String {
        let (task, endpoint) = (TaskId::new(Uuid::from_u128(1)), EndpointId::new(Uuid::from_u128(2)));
        statement(task, endpoint, spec, coverage, receipt)
    }

    #[test]
    fn every_fact_has_its_line() {
        let (spec, coverage, receipt) = all();
        let text = said(&spec, &coverage, &receipt);
        assert!(text.is_ascii() && text.starts_with("threat-management scan receipt v1\ntask "));
        for line in [
            "path 2f610aff",
            "all-local false",
            "cpu-percent none",
            "quick false",
            "full false",
            "processes false",
            "fresh false",
            "started-ms 5",
            "ended-ms 6",
            "whole true",
            "files 1",
            "skipped encrypted 1",
            "sample encrypted 2f7a 6d",
            "verdict incomplete",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
    }

    #[test]
    fn whatever_is_changed_changes_the_statement() {
        let (spec, coverage, receipt) = all();
        let before = said(&spec, &coverage, &receipt);
        let specs: [fn(&mut ScanSpec); 9] = [
            |s| s.paths.push(PathBytes(vec![])),
            |s| s.patterns.clear(),
            |s| s.limits.depth = 1,
            |s| s.options.all_local = true,
            |s| s.options.cpu_percent = Some(10),
            |s| s.options.quick = true,
            |s| s.options.full = true,
            |s| s.options.processes = true,
            |s| s.options.fresh = true,
        ];
        for change in specs {
            let mut other = spec.clone();
            change(&mut other);
            assert_ne!(said(&other, &coverage, &receipt), before);
        }
        let coverages: [fn(&mut Coverage); 7] = [
            |c| c.known += 1,
            |c| c.files += 1,
            |c| c.bytes += 1,
            |c| c.skipped.clear(),
            |c| c.samples.clear(),
            |c| c.elapsed_ms += 1,
            |c| c.detections += 1,
        ];
        for change in coverages {
            let mut other = coverage.clone();
            change(&mut other);
            assert_ne!(said(&spec, &other, &receipt), before);
        }
        let receipts: [fn(&mut Receipt); 3] = [|r| r.started_ms = 0, |r| r.ended_ms = 0, |r| r.whole = false];
        for change in receipts {
            let mut other = receipt.clone();
            change(&mut other);
            assert_ne!(said(&spec, &coverage, &other), before);
        }
    }

    #[test]
    fn what_was_called_off_is_not_stated_to_be_clean() {
        let (spec, _, mut receipt) = all();
        assert!(said(&spec, &Coverage::default(), &receipt).ends_with("verdict clean\n"));
        receipt.whole = false;
        assert!(said(&spec, &Coverage::default(), &receipt).ends_with("verdict incomplete\n"));
    }
}
