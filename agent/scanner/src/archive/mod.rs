//! Containers: looked into in memory, never unpacked to a path.
//!
//! Raw bytes and members are both judged. Every limit holds for the whole tree of one file; one that is
//! reached, a member that is encrypted, broken or of a kind without a reader is reported as skipped.
//!
//! **Invariant:** names inside containers are labels. None is ever used as a path.

mod gzip;
mod tar;
mod zip;

use std::{
    io::{self, Read},
    time::{Duration, Instant},
};

use tm_protocol::{
    report::{PathBytes, SkipReason},
    task::ScanLimits,
};

use crate::{
    engine::Engine,
    item::{Findings, Match, Skip},
};

/// Member output below this size is never judged by its ratio: short texts can be very compressible.
const RATIO_FREE: u64 = 1 << 20;
/// How far from the end a zip's end record may begin: its own 22 bytes and the longest comment.
const ZIP_TAIL: usize = 22 + 65_535;
/// Once a file's findings need more than this (names are the file's own), the rest is one skip.
const MAX_FINDINGS_BYTES: usize = 4 << 20;

/// One file's tree of containers while it is walked.
pub(crate) struct Walk<'a> {
    engine: &'a mut Engine,
    limits: &'a ScanLimits,
    deadline: Instant,
    members: u32,
    total_bytes: u64,
    findings_bytes: usize,
    full: bool,
    findings: Findings,
}

/// What a container is, told by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zip,
    Gzip,
    Tar,
    /// A container that this version has no reader for.
    Other,
}

/// Judges `bytes` and everything in them.
pub(crate) fn look(engine: &mut Engine, limits: &ScanLimits, bytes: &[u8]) -> Findings {
    let mut walk = Walk {
        engine,
        limits,
        deadline: Instant::now() + Duration::from_millis(limits.file_ms),
        members: 0,
        total_bytes: 0,
        findings_bytes: 0,
        full: false,
        findings: Findings::default(),
    };
    walk.judge(&mut Vec::new(), bytes);
    walk.findings
}

impl Walk<'_> {
    fn judge(&mut self, member: &mut Vec<PathBytes>, bytes: &[u8]) {
        let Some(time) = self.time_left() else { return self.skip(member, SkipReason::Timeout) };
        let judged = self.engine.judge(bytes, time);
        for (pattern, rule) in judged.matches {
            if self.has_room(member, rule.len()) {
                self.findings.matches.push(Match { member: member.clone(), pattern, rule });
            }
        }
        if judged.timed_out {
            return self.skip(member, SkipReason::Timeout);
        }
        let Some(kind) = kind_of(bytes) else { return };
        if kind == Kind::Other {
            return self.skip(member, SkipReason::Unsupported);
        }
        if u32::try_from(member.len()).is_ok_and(|depth| depth >= self.limits.depth) {
            return self.skip(member, SkipReason::Limit);
        }
        let whole = match kind {
            Kind::Zip => zip::members(self, member, bytes),
            Kind::Gzip => gzip::members(self, member, bytes),
            Kind::Tar => tar::members(self, member, bytes),
            Kind::Other => Ok(()),
        };
        if let Err(reason) = whole {
            self.skip(member, reason);
        }
    }

    /// Unpacks one member through `reader` and judges it. `Err` ends the container it is in.
    fn member(
        &mut self,
        within: &mut Vec<PathBytes>,
        name: &[u8],
        packed: u64,
        reader: &mut impl Read,
    ) -> Result<(), SkipReason> {
        if self.time_left().is_none() {
            return Err(SkipReason::Timeout);
        }
        if self.members >= self.limits.members {
            return Err(SkipReason::Limit);
        }
        self.members += 1;
        let unpacked = self.unpack(packed, reader);
        within.push(PathBytes(name.to_vec()));
        match unpacked {
            Ok(bytes) => self.judge(within, &bytes),
            Err((bytes, reason)) => {
                // What did come out is judged all the same: a truncated dropper is still one.
                self.judge(within, &bytes);
                self.skip(within, reason);
            }
        }
        within.pop();
        Ok(())
    }

    fn unpack(&mut self, packed: u64, reader: &mut impl Read) -> Result<Vec<u8>, (Vec<u8>, SkipReason)> {
        let ratio_limit = packed.saturating_mul(u64::from(self.limits.ratio)).max(RATIO_FREE);
        let limit = self
            .limits
            .member_bytes
            .min(ratio_limit)
            .min(self.limits.total_bytes.saturating_sub(self.total_bytes));
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        loop {
            let got = match reader.read(&mut chunk) {
                Ok(0) => break Ok(bytes),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break Err((bytes, SkipReason::Malformed)),
            };
            let room = limit.saturating_sub(len(&bytes));
            let take = usize::try_from(room).unwrap_or(usize::MAX).min(got);
            bytes.extend_from_slice(chunk.get(..take).unwrap_or_default());
            self.total_bytes += u64::try_from(take).unwrap_or(u64::MAX);
            if take < got {
                break Err((bytes, SkipReason::Limit));
            }
            if self.time_left().is_none() {
                break Err((bytes, SkipReason::Timeout));
            }
        }
    }

    fn skip_member(&mut self, within: &mut Vec<PathBytes>, name: &[u8], reason: SkipReason) {
        within.push(PathBytes(name.to_vec()));
        self.skip(within, reason);
        within.pop();
    }

    fn skip(&mut self, member: &[PathBytes], reason: SkipReason) {
        if self.has_room(member, 0) {
            self.findings.skips.push(Skip { member: member.to_vec(), reason });
        }
    }

    /// Whether one more finding fits; says once that the rest does not.
    fn has_room(&mut self, member: &[PathBytes], more: usize) -> bool {
        self.findings_bytes += 64 + more + member.iter().map(|name| name.0.len()).sum::<usize>();
        if self.findings_bytes <= MAX_FINDINGS_BYTES {
            return true;
        }
        if !self.full {
            self.full = true;
            self.findings.skips.push(Skip { member: Vec::new(), reason: SkipReason::Limit });
        }
        false
    }

    fn time_left(&self) -> Option<Duration> {
        self.deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Magic numbers: PKWARE APPNOTE 4.3.7/4.3.16, RFC 1952, POSIX.1-1988 `ustar`, and those of containers that
/// have no reader here.
fn kind_of(bytes: &[u8]) -> Option<Kind> {
    if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"PK\x05\x06") {
        return Some(Kind::Zip);
    }
    if bytes.starts_with(b"\x1f\x8b\x08") {
        return Some(Kind::Gzip);
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some(Kind::Tar);
    }
    let other: [&[u8]; 9] = [
        b"7z\xbc\xaf\x27\x1c",
        b"Rar!\x1a\x07",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
        b"MSCF\0\0\0\0",
        b"!<arch>\n",
        b"\xed\xab\xee\xdb",
        b"070701",
        b"070707",
    ];
    // Self-extracting archives have a program in front; a zip is read from its end (APPNOTE 4.3.16).
    let tail = bytes.get(bytes.len().saturating_sub(ZIP_TAIL)..).unwrap_or_default();
    if tail.windows(4).any(|window| window == b"PK\x05\x06") && zip::opens(bytes) {
        return Some(Kind::Zip);
    }
    let bzip2 = bytes.starts_with(b"BZh") && bytes.get(4..10) == Some(b"\x31\x41\x59\x26\x53\x59");
    let compress = bytes.starts_with(b"\x1f\x9d")
        && bytes.get(2).is_some_and(|flags| flags & 0x60 == 0 && (9..=16).contains(&(flags & 0x1f)));
    // The form that streams take: dictionary size in full kilobytes, length not told.
    let lzma = bytes.starts_with(b"\x5d\0\0") && bytes.get(5..13) == Some(&[0xff; 8]);
    (bzip2 || compress || lzma || other.iter().any(|magic| bytes.starts_with(magic))).then_some(Kind::Other)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;
    use tm_protocol::ids::Sha256;

    use super::*;

    const RULE: &str = "rule marker { strings: $a = \"needle-47\" condition: $a }";

    fn engine() -> Engine {
        Engine::compile(&[(Sha256::of(RULE.as_bytes()), RULE.to_owned())]).unwrap().0
    }

    fn zipped(name: &str, content: &[u8]) -> Vec<u8> {
        let mut writer = ::zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        writer.start_file(name, ::zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap().into_inner()
    }

    /// Two members; the names may be the same.
    fn zipped_twice(first: &str, second: &str) -> Vec<u8> {
        let mut writer = ::zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        for (name, content) in [("1.txt", b"needle-47 "), ("2.txt", b"harmless  ")] {
            writer.start_file(name, ::zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(&content.repeat(50)).unwrap();
        }
        let mut bytes = writer.finish().unwrap().into_inner();
        for at in 0..bytes.len() - 5 {
            match &bytes[at..at + 5] {
                b"1.txt" => bytes[at..at + 5].copy_from_slice(first.as_bytes()),
                b"2.txt" => bytes[at..at + 5].copy_from_slice(second.as_bytes()),
                _ => {}
            }
        }
        bytes
    }

    fn tarred(name: &str, content: &[u8]) -> Vec<u8> {
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut header = ::tar::Header::new_ustar();
        header.set_size(len(content));
        builder.append_data(&mut header, name, content).unwrap();
        builder.into_inner().unwrap()
    }

    fn gzipped(content: &[u8]) -> Vec<u8> {
        let mut encoder =
            flate2::GzBuilder::new().filename("inner.tar").write(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn skips(limits: &ScanLimits, bytes: &[u8]) -> Vec<SkipReason> {
        look(&mut engine(), limits, bytes).skips.iter().map(|skip| skip.reason).collect()
    }

    #[test]
    fn a_marker_is_found_through_three_containers() {
        let bytes = gzipped(&tarred("dir/inner.zip", &zipped("deep.txt", &b"needle-47 ".repeat(20))));
        let findings = look(&mut engine(), &ScanLimits::default(), &bytes);
        let members: Vec<Vec<PathBytes>> = findings.matches.into_iter().map(|m| m.member).collect();
        let names = ["inner.tar", "dir/inner.zip", "deep.txt"].map(|n| PathBytes(n.into())).to_vec();
        assert_eq!(members, [names]);
        assert_eq!(findings.skips, []);
    }

    #[test]
    fn a_zip_behind_a_program_is_looked_into() {
        let mut bytes = b"#!/bin/sh\nexec unzip \"$0\"\n".to_vec();
        bytes.extend_from_slice(&zipped("deep.txt", &b"needle-47 ".repeat(20)));
        let findings = look(&mut engine(), &ScanLimits::default(), &bytes);
        assert_eq!(findings.matches.len(), 1);
        assert_eq!(findings.matches[0].member, [PathBytes(b"deep.txt".to_vec())]);
        // The four bytes alone make no zip, and no complaint either.
        assert_eq!(skips(&ScanLimits::default(), b"text with PK\x05\x06 in it"), []);
    }

    #[test]
    fn what_is_not_looked_at_is_said() {
        let limits = ScanLimits::default();
        let nested = gzipped(&tarred("inner.zip", &zipped("deep.txt", b"x")));
        let shallow = ScanLimits { depth: 2, ..limits };
        let raw_only = ScanLimits { depth: 0, ..limits };
        let few = ScanLimits { members: 0, ..limits };
        let bomb = gzipped(&vec![0; 64 << 20]);
        let small = ScanLimits { member_bytes: 1000, ..limits };
        let mut truncated = gzipped(&b"some text that is long enough to be cut ".repeat(100));
        truncated.truncate(truncated.len() - 12);
        for (name, limits, bytes, expected) in [
            ("whole", &limits, &nested, vec![]),
            ("depth", &shallow, &nested, vec![SkipReason::Limit]),
            ("raw only", &raw_only, &nested, vec![SkipReason::Limit]),
            ("members", &few, &nested, vec![SkipReason::Limit]),
            ("ratio", &limits, &bomb, vec![SkipReason::Limit]),
            ("member size", &small, &gzipped(&[7; 2000]), vec![SkipReason::Limit]),
            ("truncated", &limits, &truncated, vec![SkipReason::Malformed]),
            ("7z", &limits, &b"7z\xbc\xaf\x27\x1cxxxx".to_vec(), vec![SkipReason::Unsupported]),
            ("compress", &limits, &b"\x1f\x9d\x90xxx".to_vec(), vec![SkipReason::Unsupported]),
            ("different names", &limits, &zipped_twice("a.txt", "b.txt"), vec![]),
            ("same names", &limits, &zipped_twice("a.txt", "a.txt"), vec![SkipReason::Malformed]),
            ("not a zip", &limits, &b"PK\x03\x04 nonsense".to_vec(), vec![SkipReason::Malformed]),
        ] {
            assert_eq!(skips(limits, bytes), expected, "{name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damaged_containers_never_panic_and_never_pass_silently_as_other_bytes(
            at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
        ) {
            let mut engine = engine();
            for good in [zipped("a", b"text"), tarred("a", b"text"), gzipped(b"text")] {
                let mut bad = good.clone();
                let index = at.index(bad.len());
                bad[index] = byte;
                let _ = look(&mut engine, &ScanLimits::default(), &bad);
                bad.truncate(cut.index(bad.len()));
                let _ = look(&mut engine, &ScanLimits::default(), &bad);
            }
        }
    }
}
