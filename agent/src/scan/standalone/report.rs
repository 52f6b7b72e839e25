//! What a stand-alone scan prints: JSON lines for programs, or text for people.
//!
//! **Invariant:** one record is one line, whatever stands in a file's name; in JSON the exact bytes are
//! beside it in base64.

use std::{
    collections::BTreeMap,
    io::{self, Stderr, Write},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use tm_protocol::{
    ids::Sha256,
    quote::Quote,
    report::{Coverage, Detection, PathBytes, SkipReason, Skipped, Verdict},
    text::{escape, escape_for_display},
};

use super::{progress::Progress, units::show_size};
use crate::scan::{Event, past::Quoted};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Prints what a scan tells. If nobody takes the output any more, it calls the scan off.
pub(super) struct Report<'a, W: Write> {
    out: W,
    /// How far it is, if a person wants to know.
    progress: Option<Progress<Stderr>>,
    /// Results and progress are shown on the same terminal.
    is_shared: bool,
    format: Format,
    /// What people call the patterns.
    names: BTreeMap<Sha256, String>,
    cancel: &'a AtomicBool,
    broken: Option<io::Error>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Record<'a> {
    Detection {
        path: String,
        path_b64: String,
        member: Vec<String>,
        member_b64: Vec<String>,
        pattern: Sha256,
        pattern_name: &'a str,
        rule: &'a str,
        sha256: Sha256,
        size: u64,
    },
    Skipped {
        path: String,
        path_b64: String,
        member: Vec<String>,
        member_b64: Vec<String>,
        reason: SkipReason,
    },
    Summary {
        verdict: Verdict,
        files: u64,
        bytes: u64,
        known: u64,
        detections: u64,
        skipped: &'a BTreeMap<SkipReason, u64>,
        elapsed_s: f64,
        cpu_s: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        quoted: Option<QuotedRecord>,
    },
    Quote {
        files: u64,
        bytes: u64,
        known: u64,
        known_bytes: u64,
        skipped: &'a BTreeMap<SkipReason, u64>,
        /// `null` where there is no past scan to estimate from.
        estimate: Option<EstimateRecord>,
        elapsed_s: f64,
        cpu_s: f64,
    },
}

/// What was quoted for the same order; times are missing where they could not be estimated.
#[derive(Serialize)]
struct QuotedRecord {
    files: u64,
    bytes: u64,
    elapsed_s: Option<f64>,
    cpu_s: Option<f64>,
}

#[derive(Serialize)]
struct EstimateRecord {
    elapsed_s: f64,
    cpu_s: f64,
    runs: u32,
    same_patterns: bool,
}

impl<'a, W: Write> Report<'a, W> {
    /// Prints to `out`, which may be where progress is shown (`is_shared`); `cancel` is set if that fails.
    pub(super) fn new(
        out: W,
        progress: Option<Progress<Stderr>>,
        is_shared: bool,
        format: Format,
        names: BTreeMap<Sha256, String>,
        cancel: &'a AtomicBool,
    ) -> Self {
        Self { out, progress, is_shared, format, names, cancel, broken: None }
    }

    /// Prints one event, or shows it.
    pub(super) fn event(&mut self, event: &Event<'_>) {
        if self.broken.is_some() {
            return;
        }
        let done = match (event, self.format) {
            (Event::Detection(detection, _), Format::Json) => self.detection_json(detection),
            (Event::Detection(detection, _), Format::Text) => self.detection_text(detection),
            (Event::Skipped(skipped), Format::Json) => self.skipped_json(skipped),
            // The summary names the first ones and counts all.
            (Event::Skipped(_), Format::Text) => Ok(()),
            (Event::Now(path), Format::Json | Format::Text) => {
                if let Some(progress) = &mut self.progress {
                    progress.looks_at(path);
                }
                Ok(())
            }
            (Event::Tick(coverage), Format::Json | Format::Text) => self.tick(coverage),
        };
        if let Err(error) = done {
            self.broken = Some(error);
            self.cancel.store(true, Ordering::Relaxed);
        }
    }

    /// Prints what a scan would look at and what that is likely to cost, instead of a receipt.
    ///
    /// # Errors
    /// If it, or anything before it, could not be written.
    pub(super) fn quote(mut self, quote: &Quote) -> io::Result<()> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.clear_progress();
        let estimate = quote.estimate;
        match self.format {
            Format::Json => self.record(&Record::Quote {
                files: quote.files,
                bytes: quote.bytes,
                known: quote.known,
                known_bytes: quote.known_bytes,
                skipped: &quote.skipped,
                estimate: estimate.map(|estimate| EstimateRecord {
                    elapsed_s: seconds(estimate.elapsed_ms),
                    cpu_s: seconds(estimate.cpu_ms),
                    runs: estimate.runs,
                    same_patterns: estimate.same_patterns,
                }),
                elapsed_s: seconds(quote.elapsed_ms),
                cpu_s: seconds(quote.cpu_ms),
            })?,
            Format::Text => {
                let known = match quote.known {
                    0 => String::new(),
                    known => format!(
                        "{known} of them ({}) known clean and not read again\n",
                        show_size(quote.known_bytes)
                    ),
                };
                let cost = match estimate {
                    Some(estimate) => format!(
                        "about {:.1} s ({:.1} s of CPU time), estimated from {} past {}{}",
                        seconds(estimate.elapsed_ms),
                        seconds(estimate.cpu_ms),
                        estimate.runs,
                        if estimate.runs == 1 { "scan" } else { "scans" },
                        if estimate.same_patterns { "" } else { " with other patterns" },
                    ),
                    None => "no past scan to estimate from".to_owned(),
                };
                let files = if quote.files == 1 { "file" } else { "files" };
                let bytes = show_size(quote.bytes);
                writeln!(self.out, "would look at {} {files}, {bytes}\n{known}{cost}", quote.files)?;
            }
        }
        self.out.flush()
    }

    /// Prints the receipt, and beside it what was quoted for the same order.
    ///
    /// # Errors
    /// If it, or anything before it, could not be written.
    pub(super) fn finish(mut self, coverage: &Coverage, quoted: Option<Quoted>) -> io::Result<()> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.clear_progress();
        // To count what there is was a part of the work.
        let cpu_ms = coverage.cpu_ms.saturating_add(self.progress.as_ref().map_or(0, Progress::cpu_ms));
        match self.format {
            Format::Json => self.record(&Record::Summary {
                verdict: coverage.verdict(),
                files: coverage.files,
                bytes: coverage.bytes,
                known: coverage.known,
                detections: coverage.detections,
                skipped: &coverage.skipped,
                elapsed_s: seconds(coverage.elapsed_ms),
                cpu_s: seconds(cpu_ms),
                quoted: quoted.map(|quoted| QuotedRecord {
                    files: quoted.files,
                    bytes: quoted.bytes,
                    elapsed_s: quoted.elapsed_ms.map(seconds),
                    cpu_s: quoted.cpu_ms.map(seconds),
                }),
            })?,
            Format::Text => self.summary_text(coverage, cpu_ms, quoted)?,
        }
        self.out.flush()
    }

    /// Ends without a receipt: the scan did not come to its end.
    pub(super) fn abandon(mut self) {
        self.clear_progress();
        // The error that ended the scan is told; a second one would not help.
        let _ = self.out.flush();
    }

    fn detection_json(&mut self, detection: &Detection) -> io::Result<()> {
        let name = self.names.get(&detection.pattern).cloned().unwrap_or_default();
        self.record(&Record::Detection {
            path: shown(&detection.path),
            path_b64: base64(&detection.path),
            member: detection.member.iter().map(shown).collect(),
            member_b64: detection.member.iter().map(base64).collect(),
            pattern: detection.pattern,
            pattern_name: &name,
            rule: &detection.rule,
            sha256: detection.sha256,
            size: detection.size,
        })
    }

    fn skipped_json(&mut self, skipped: &Skipped) -> io::Result<()> {
        self.record(&Record::Skipped {
            path: shown(&skipped.path),
            path_b64: base64(&skipped.path),
            member: skipped.member.iter().map(shown).collect(),
            member_b64: skipped.member.iter().map(base64).collect(),
            reason: skipped.reason,
        })
    }

    fn record(&mut self, record: &Record<'_>) -> io::Result<()> {
        if let Some(progress) = self.progress.as_mut().filter(|_| self.is_shared) {
            progress.clear();
        }
        serde_json::to_writer(&mut self.out, record)?;
        self.out.write_all(b"\n")
    }

    fn detection_text(&mut self, detection: &Detection) -> io::Result<()> {
        if self.is_shared {
            self.clear_progress();
        }
        let place = place(&detection.path, &detection.member);
        let rule = escape_for_display(&detection.rule);
        match self.names.get(&detection.pattern) {
            Some(name) => {
                let name = escape_for_display(name);
                writeln!(self.out, "DETECTED {place}: {rule} ({name})")
            }
            None => writeln!(self.out, "DETECTED {place}: {rule}"),
        }
    }

    fn summary_text(&mut self, coverage: &Coverage, cpu_ms: u64, quoted: Option<Quoted>) -> io::Result<()> {
        for skipped in &coverage.samples {
            let place = place(&skipped.path, &skipped.member);
            writeln!(self.out, "NOT SCANNED {place}: {}", skipped.reason)?;
        }
        let gaps: u64 =
            coverage.skipped.iter().filter(|(reason, _)| reason.leaves_a_gap()).map(|(_, count)| count).sum();
        let more = gaps.saturating_sub(u64::try_from(coverage.samples.len()).unwrap_or(u64::MAX));
        if more > 0 {
            writeln!(self.out, "NOT SCANNED {more} more (-o json names all)")?;
        }
        writeln!(
            self.out,
            "{} {}, {}, in {:.1} s ({:.1} s of CPU time)",
            coverage.files,
            if coverage.files == 1 { "file" } else { "files" },
            show_size(coverage.bytes),
            seconds(coverage.elapsed_ms),
            seconds(cpu_ms),
        )?;
        if let Some(quoted) = quoted {
            let cost = match (quoted.elapsed_ms, quoted.cpu_ms) {
                (Some(elapsed), Some(cpu)) => {
                    format!("about {:.1} s ({:.1} s of CPU time)", seconds(elapsed), seconds(cpu))
                }
                (None, _) | (_, None) => "no cost".to_owned(),
            };
            let bytes = show_size(quoted.bytes);
            writeln!(self.out, "quoted before: {} files, {bytes}, {cost}", quoted.files)?;
        }
        if coverage.known > 0 {
            writeln!(self.out, "{} of them known clean, unchanged since they were read", coverage.known)?;
        }
        if !coverage.skipped.is_empty() {
            let counts: Vec<_> =
                coverage.skipped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            writeln!(self.out, "skipped: {}", counts.join(", "))?;
        }
        match (coverage.verdict(), coverage.detections) {
            (Verdict::Detected, 1) => writeln!(self.out, "verdict: detected (1 detection)"),
            (Verdict::Detected, count) => writeln!(self.out, "verdict: detected ({count} detections)"),
            (Verdict::Incomplete, _) => {
                writeln!(self.out, "verdict: incomplete (nothing found, but not everything was looked at)")
            }
            (Verdict::Clean, _) => writeln!(self.out, "verdict: clean"),
        }
    }

    fn tick(&mut self, coverage: &Coverage) -> io::Result<()> {
        self.out.flush()?;
        if let Some(progress) = &mut self.progress {
            progress.show(coverage, Instant::now());
        }
        Ok(())
    }

    fn clear_progress(&mut self) {
        if let Some(progress) = &mut self.progress {
            progress.clear();
        }
    }
}

/// A file, and the way to the member in it.
fn place(path: &PathBytes, member: &[PathBytes]) -> String {
    std::iter::once(path).chain(member).map(shown).collect::<Vec<_>>().join(" > ")
}

fn shown(path: &PathBytes) -> String {
    escape(&path.0)
}

fn base64(path: &PathBytes) -> String {
    STANDARD.encode(&path.0)
}

#[expect(clippy::cast_precision_loss, reason = "a scan does not last for 285,000 years")]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &[u8] = b"/a\n{\"type\":\"summary\"}\x1b[2J\xff";

    fn print(format: Format, detect: bool) -> String {
        let cancel = AtomicBool::new(false);
        let pattern = Sha256::of(b"p");
        let names = BTreeMap::from([(pattern, "rules.yar".to_owned())]);
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, None, false, format, names, &cancel);
        let mut coverage =
            Coverage { files: 2, bytes: 2048, elapsed_ms: 1500, cpu_ms: 500, ..Coverage::default() };
        let path = PathBytes::from(HOSTILE);
        let member = vec![PathBytes::from(&b"in\nner"[..])];
        if detect {
            coverage.detections = 1;
            let detection = Detection {
                path: path.clone(),
                member: member.clone(),
                pattern,
                rule: "evil".to_owned(),
                sha256: Sha256::of(b"x"),
                size: 1,
            };
            let object = crate::platform::fs::Object { device: 1, inode: 2 };
            report.event(&Event::Detection(&detection, object));
        }
        for _ in 0..22 {
            let skipped =
                Skipped { path: path.clone(), member: member.clone(), reason: SkipReason::Encrypted };
            report.event(&Event::Skipped(&skipped));
            coverage.skip(skipped);
        }
        report.event(&Event::Tick(&coverage));
        report.finish(&coverage, None).unwrap();
        assert!(!cancel.load(Ordering::Relaxed));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn json_is_one_lossless_record_a_line() {
        let text = print(Format::Json, true);
        let records: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(records.len(), 1 + 22 + 1);
        assert_eq!(
            records[0],
            serde_json::json!({
                "type": "detection",
                "path": escape(HOSTILE),
                "path_b64": STANDARD.encode(HOSTILE),
                "member": [r"in\nner"],
                "member_b64": [STANDARD.encode(b"in\nner")],
                "pattern": Sha256::of(b"p").to_string(),
                "pattern_name": "rules.yar",
                "rule": "evil",
                "sha256": Sha256::of(b"x").to_string(),
                "size": 1,
            })
        );
        assert_eq!(records[1]["type"], "skipped");
        assert_eq!(records[1]["reason"], "encrypted");
        assert_eq!(
            records[23],
            serde_json::json!({
                "type": "summary", "verdict": "detected", "files": 2, "bytes": 2048, "detections": 1,
                "known": 0, "skipped": { "encrypted": 22 }, "elapsed_s": 1.5, "cpu_s": 0.5,
            })
        );
    }

    #[test]
    fn text_has_harmless_lines_and_says_what_was_left_out() {
        let text = print(Format::Text, false);
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 20 + 1 + 3);
        assert_eq!(lines[0], format!(r"NOT SCANNED {} > in\nner: encrypted", escape(HOSTILE)));
        assert_eq!(
            lines[20..],
            [
                "NOT SCANNED 2 more (-o json names all)",
                "2 files, 2.0 KiB, in 1.5 s (0.5 s of CPU time)",
                "skipped: 22 encrypted",
                "verdict: incomplete (nothing found, but not everything was looked at)",
            ]
        );
        let first = print(Format::Text, true);
        assert!(first.starts_with(&format!(r"DETECTED {} > in\nner: evil (rules.yar)", escape(HOSTILE))));
    }

    #[test]
    fn output_that_nobody_takes_calls_the_scan_off() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let cancel = AtomicBool::new(false);
        let mut report = Report::new(Closed, None, false, Format::Json, BTreeMap::new(), &cancel);
        report.event(&Event::Tick(&Coverage::default()));
        assert!(cancel.load(Ordering::Relaxed));
        assert_eq!(report.finish(&Coverage::default(), None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
