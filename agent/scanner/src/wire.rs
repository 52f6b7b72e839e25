//! What the pool and its worker say to each other.
//!
//! Orders go down a Unix `SOCK_SEQPACKET` socket (the worker's standard input), one message each, with the
//! open files beside it; its threads take turns at receiving, which shares out the work. Answers come up a
//! pipe (standard output) as a length (u32, little-endian) and that many bytes. A third file, in memory and
//! seen by both, names the item that each thread has in hand: it outlives a worker that dies.
//!
//! Both ends are the same program, so the encoding has no versions.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt as _,
};

use bincode::{Decode, Encode, config};
use tm_patterns::{Pattern, digests::Image};
use tm_protocol::{ids::Sha256, task::ScanLimits};

use crate::{
    item::Findings,
    sandbox::{Frame, PartState},
};

/// Open files in one message.
pub(crate) const BATCH: usize = 64;
/// Longest answer; a worker that claims more is killed.
const MAX_ANSWER: usize = 16 << 20;

/// What a worker is started with.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) patterns: Vec<Pattern>,
    pub(crate) limits: ScanLimits,
    pub(crate) threads: usize,
    pub(crate) nice: i32,
}

impl Setup {
    /// What goes into the set-up file.
    pub(crate) fn told(&self) -> Told {
        let text = |pattern: &Pattern| pattern.digests().is_none().then(|| pattern.text().to_owned());
        let patterns = self.patterns.iter().map(|pattern| (pattern.sha256(), text(pattern))).collect();
        Told { patterns, limits: self.limits }
    }

    /// Digest lists, in their order.
    pub(crate) fn lists(&self) -> Vec<&Image> {
        self.patterns.iter().filter_map(Pattern::digests).collect()
    }
}

/// The content of the set-up file.
#[derive(Debug, Encode, Decode)]
pub(crate) struct Told {
    /// Rule texts; those without are digest lists, which come as files.
    pub(crate) patterns: Vec<(Sha256, Option<String>)>,
    pub(crate) limits: ScanLimits,
}

/// A message to the worker.
#[derive(Debug, Encode, Decode)]
pub(crate) enum Order {
    /// The first: set-up file and slots file are beside it. The frame is here and not in that file because
    /// it holds before the file, with the patterns, is read. So many digest lists follow.
    Setup(Frame, usize),
    /// Digest lists, compiled and sealed, whose files are beside it.
    Lists,
    /// Items, whose files are beside it in the same order.
    Items(Vec<u64>),
    /// Tell what the rules cost. Beside it a file with the text of the pattern that was set up.
    Measure,
}

/// A message from the worker.
#[derive(Debug, Encode, Decode)]
pub(crate) enum Answer {
    /// The patterns are compiled.
    Ready { rules: u32, warnings: Vec<Place>, sandbox: Vec<PartState> },
    /// One of them is wrong.
    Refused { pattern: usize, problems: Vec<Place> },
    /// An item is done.
    Done { id: u64, findings: Findings },
    /// What the rules cost: remarks on all that are slow, and how many there was no time for.
    Measured { remarks: Vec<Place>, unmeasured: usize },
}

/// [`tm_patterns::Problem`], encodable.
#[derive(Debug, Encode, Decode)]
pub(crate) struct Place {
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) message: String,
}

impl From<tm_patterns::Problem> for Place {
    fn from(p: tm_patterns::Problem) -> Self {
        Self { line: p.line, column: p.column, message: p.message }
    }
}

impl From<Place> for tm_patterns::Problem {
    fn from(p: Place) -> Self {
        Self { line: p.line, column: p.column, message: p.message }
    }
}

pub(crate) fn encode<M: Encode>(message: &M) -> io::Result<Vec<u8>> {
    bincode::encode_to_vec(message, config::standard()).map_err(io::Error::other)
}

pub(crate) fn decode<M: Decode<()>>(bytes: &[u8]) -> io::Result<M> {
    let limited = config::standard().with_limit::<{ 128 << 20 }>();
    bincode::decode_from_slice(bytes, limited).map(|(message, _)| message).map_err(io::Error::other)
}

pub(crate) fn write_answer(out: &mut impl Write, answer: &Answer) -> io::Result<()> {
    let body = encode(answer)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&body)
}

pub(crate) fn read_answer(input: &mut impl Read) -> io::Result<Answer> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_ANSWER {
        return Err(io::Error::other("an answer of the scan worker is too long"));
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    decode(&body)
}

/// What a worker's threads have in hand: for each 16 bytes, item id + 1 (0 = nothing) and the start in
/// milliseconds of the monotonic clock.
#[derive(Debug)]
pub(crate) struct Slots(pub(crate) File);

impl Slots {
    pub(crate) fn set(&self, thread: usize, id: u64, started_ms: u64) -> io::Result<()> {
        let mut slot = [0; 16];
        slot[..8].copy_from_slice(&id.saturating_add(1).to_le_bytes());
        slot[8..].copy_from_slice(&started_ms.to_le_bytes());
        self.0.write_all_at(&slot, offset(thread))
    }

    pub(crate) fn clear(&self, thread: usize) -> io::Result<()> {
        self.0.write_all_at(&[0; 16], offset(thread))
    }

    /// Item and start of every busy thread.
    pub(crate) fn busy(&self, threads: usize) -> Vec<(u64, u64)> {
        let mut busy = Vec::new();
        for thread in 0..threads {
            let mut slot = [0; 16];
            if self.0.read_exact_at(&mut slot, offset(thread)).is_err() {
                continue;
            }
            let (id, started) = slot.split_at(8);
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
            if let Some(id) = number(id).checked_sub(1) {
                busy.push((id, number(started)));
            }
        }
        busy
    }
}

fn offset(thread: usize) -> u64 {
    u64::try_from(thread).unwrap_or(u64::MAX).saturating_mul(16)
}

/// Milliseconds of the monotonic clock, which all processes share.
pub(crate) fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}
