//! Containers: looked into in memory, never unpacked to a path.
//!
//! Raw bytes and members are both judged. Every limit holds for the whole tree of one file; one that is
//! reached, a member that is encrypted, broken or of a kind without a reader is reported as skipped. Where
//! readers of a format disagree about what is in a container, every reading is judged as far as it goes, and
//! the container is reported as malformed.
//!
//! **Invariant:** names inside containers are labels. None is ever used as a path.
//!
//! **Invariant:** work for each entry of a container is at most O(log n) of their number.

mod ar;
mod budget;
mod cab;
mod codec;
mod cover;
mod cpio;
mod field;
mod kind;
mod rpm;
mod sevenz;
mod streams;
mod tar;
#[cfg(test)]
mod tests;
mod zip;

use std::{
    io::{self, Read},
    time::Instant,
};

use tm_protocol::{
    report::{PathBytes, SkipReason},
    task::ScanLimits,
};

use self::{
    budget::Budget,
    codec::Decoder,
    field::len,
    kind::{Found, Kind},
};
use crate::{
    item::{Findings, Match, Skip},
    judge::Judge,
};

/// Once a file's findings need more than this (names are the file's own), the rest is one skip.
const MAX_FINDINGS_BYTES: usize = 4 << 20;
/// Longest name of a member that is kept, in bytes.
const MAX_NAME: usize = 4096;
/// What is asked of a decoder at a time, in bytes.
const CHUNK: usize = 64 << 10;
/// Members below this size grow to twice theirs, in bytes.
const FEW: usize = 8 << 20;
/// The name of content that its container does not name.
const UNNAMED: &[u8] = b"content";
/// The name of a container that stands behind another one's end.
const APPENDED: &[u8] = b"appended";

/// One file's tree of containers while it is walked.
pub(crate) struct Walk<'a> {
    engine: &'a mut Judge,
    budget: Budget<'a>,
    /// Names from the outermost container to the one that is walked.
    within: Vec<PathBytes>,
    chunk: Vec<u8>,
    findings_bytes: usize,
    full: bool,
    /// Where the member that was judged last, as it lies in its container, begins and ends in memory.
    last: (usize, usize),
    findings: Findings,
}

/// Makes room for `more` bytes: ahead of what comes, but of much not by much, which is not counted.
fn make_room(bytes: &mut Vec<u8>, more: usize) -> Result<(), SkipReason> {
    if bytes.capacity() - bytes.len() >= more {
        return Ok(());
    }
    let ahead = if bytes.len() < FEW { bytes.len() } else { bytes.len() / 8 };
    bytes.try_reserve_exact(ahead.max(more)).map_err(|_| SkipReason::Limit)
}

/// What came out of a decoder, held in memory, and why it broke off if it did.
struct Taken {
    bytes: Vec<u8>,
    whole: Result<(), SkipReason>,
    /// What the decoder holds until it is gone, in bytes.
    workspace: u64,
}

/// Judges `bytes` and everything in them.
pub(crate) fn look(engine: &mut Judge, limits: &ScanLimits, bytes: &[u8]) -> Findings {
    let mut walk = Walk {
        engine,
        budget: Budget::new(limits, len(bytes), Instant::now()),
        within: Vec::new(),
        chunk: vec![0; CHUNK],
        findings_bytes: 0,
        full: false,
        last: (0, 0),
        findings: Findings::default(),
    };
    walk.judge(bytes);
    walk.findings
}

/// Whether a file that begins with `head` and ends with `tail` may be a container, or carry one: what a file that is
/// not looked into could hold. `tail` should have the last 64 KiB and some.
pub(crate) fn may_hold(head: &[u8], tail: &[u8]) -> bool {
    kind::may_be(head, tail)
}

impl Walk<'_> {
    fn judge(&mut self, bytes: &[u8]) {
        let Some(time) = self.budget.time_left() else { return self.skip(SkipReason::Timeout) };
        let judged = self.engine.judge(bytes, time);
        for (pattern, rule) in judged.matches {
            if self.has_room(rule.len()) {
                self.findings.matches.push(Match { member: self.within.clone(), pattern, rule });
            }
        }
        if judged.timed_out {
            return self.skip(SkipReason::Timeout);
        }
        for (number, Found { kind, at }) in kind::containers(bytes).into_iter().enumerate() {
            if number > 0 && kind == Kind::Zip && kind::is_zip_at(bytes, self.last) {
                // The last member of a tar, which was judged as such: an unzipper finds the same in the whole.
            } else if kind == Kind::Other {
                self.skip(SkipReason::Unsupported);
            } else if !self.budget.allows_depth(self.within.len()) {
                return self.skip(SkipReason::Limit);
            } else if let Err(reason) = self.look_into(kind, bytes.get(at..).unwrap_or_default()) {
                self.skip(reason);
            }
        }
    }

    fn look_into(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), SkipReason> {
        match kind {
            Kind::Zip => zip::members(self, bytes),
            Kind::Gzip => streams::gzip(self, bytes),
            Kind::Bzip2 => streams::bzip2(self, bytes),
            Kind::Xz => streams::xz(self, bytes),
            Kind::Lzma => streams::lzma(self, bytes),
            Kind::Lzip => streams::lzip(self, bytes),
            Kind::Zstd => streams::zstd(self, bytes),
            Kind::Tar => tar::members(self, bytes),
            Kind::SevenZip => sevenz::members(self, bytes),
            Kind::Ar => ar::members(self, bytes),
            Kind::Cpio => cpio::members(self, bytes),
            Kind::Rpm => rpm::members(self, bytes),
            Kind::Cab => cab::members(self, bytes),
            Kind::Other => Err(SkipReason::Unsupported),
        }
    }

    /// Judges a member that lies in its container as it is. Says whether it did; `Err` ends the container.
    fn member(&mut self, name: &[u8], bytes: &[u8]) -> Result<bool, SkipReason> {
        self.count_member()?;
        let allowed = self.budget.view(len(bytes));
        if allowed {
            self.named(name, |walk| walk.judge(bytes));
            let begin = bytes.as_ptr().addr();
            self.last = (begin, begin.saturating_add(bytes.len()));
        } else {
            self.skip_member(name, SkipReason::Limit);
        }
        Ok(allowed)
    }

    /// Counts bytes that a decoder reads and that others may read as well. `Err` ends the container.
    fn charge(&mut self, packed: u64) -> Result<(), SkipReason> {
        if self.budget.charge(packed) { Ok(()) } else { Err(SkipReason::Limit) }
    }

    /// Judges what `decoder` makes of a member packed into `packed` bytes. `Err` ends the container.
    fn unpack(
        &mut self,
        name: &[u8],
        packed: u64,
        decoder: Result<Decoder<'_>, SkipReason>,
    ) -> Result<(), SkipReason> {
        let Decoder { mut reader, workspace } = match decoder {
            Ok(decoder) => decoder,
            Err(reason) => return self.unread(name, reason),
        };
        let taken = self.take_out(name, packed, workspace, &mut reader)?;
        // What a decoder holds is not needed while its output is looked into.
        drop(reader);
        self.judge_taken(name, taken);
        Ok(())
    }

    /// Counts a member that cannot be looked at. `Err` ends the container.
    fn unread(&mut self, name: &[u8], reason: SkipReason) -> Result<(), SkipReason> {
        self.count_member()?;
        self.skip_member(name, reason);
        Ok(())
    }

    /// Reads what comes out of `reader`, a decoder with `workspace` bytes of its own that reads `packed` bytes.
    /// Nothing if there is no room for the decoder, which is said. `Err` ends the container.
    fn take_out(
        &mut self,
        name: &[u8],
        packed: u64,
        workspace: u64,
        reader: &mut dyn Read,
    ) -> Result<Option<Taken>, SkipReason> {
        self.count_member()?;
        if self.budget.is_spent() {
            return Err(SkipReason::Limit);
        }
        if !self.budget.has_workspace(workspace) {
            self.skip_member(name, SkipReason::Limit);
            return Ok(None);
        }
        let mut bytes = Vec::new();
        self.budget.hold(workspace);
        let whole = self.fill(&mut bytes, packed, reader);
        Ok(Some(Taken { bytes, whole, workspace }))
    }

    /// Judges what was taken out, by a decoder that is gone. What did come out is judged even if it broke off: a
    /// truncated dropper is still one.
    fn judge_taken(&mut self, name: &[u8], taken: Option<Taken>) {
        let Some(Taken { bytes, whole, workspace }) = taken else { return };
        self.budget.release(workspace);
        self.named(name, |walk| {
            walk.judge(&bytes);
            if let Err(reason) = whole {
                walk.skip(reason);
            }
        });
        let held = len(&bytes);
        // Only what is gone is free for others.
        drop(bytes);
        self.budget.release(held);
    }

    /// Reads up to `bytes` bytes of a decoder in vain, to come to what is behind them. What goes wrong is left
    /// to whoever reads on. `Err` ends the container.
    fn pass(&mut self, reader: &mut dyn Read, mut bytes: u64) -> Result<(), SkipReason> {
        while bytes > 0 {
            let room = field::index(bytes).min(self.chunk.len());
            let got = match reader.read(self.chunk.get_mut(..room).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => return Ok(()),
                Ok(got) => u64::try_from(got).unwrap_or(u64::MAX),
            };
            self.charge(got)?;
            if self.budget.time_left().is_none() {
                return Err(SkipReason::Timeout);
            }
            bytes = bytes.saturating_sub(got);
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut Vec<u8>, packed: u64, reader: &mut dyn Read) -> Result<(), SkipReason> {
        let mut room = self.budget.room(packed);
        loop {
            let got = match reader.read(&mut self.chunk) {
                Ok(0) => return Ok(()),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(codec::reason(&error)),
            };
            let take = field::index(room).min(got);
            let more = u64::try_from(take).unwrap_or(u64::MAX);
            make_room(bytes, take)?;
            self.budget.hold(more);
            self.budget.unpacked(more);
            room -= more;
            bytes.extend_from_slice(self.chunk.get(..take).unwrap_or_default());
            if take < got {
                return Err(SkipReason::Limit);
            }
            if self.budget.time_left().is_none() {
                return Err(SkipReason::Timeout);
            }
        }
    }

    /// Looks at what stands behind a container's end: if it is a container, it is a member of this one. The
    /// bytes themselves have been judged with the whole.
    fn behind(&mut self, rest: &[u8]) -> Result<(), SkipReason> {
        let rest = field::after_zeros(rest);
        if kind::containers(rest).is_empty() {
            return Ok(());
        }
        self.member(APPENDED, rest).map(drop)
    }

    fn count_member(&mut self) -> Result<(), SkipReason> {
        if self.budget.time_left().is_none() {
            Err(SkipReason::Timeout)
        } else if self.budget.count_member() {
            Ok(())
        } else {
            Err(SkipReason::Limit)
        }
    }

    fn skip_member(&mut self, name: &[u8], reason: SkipReason) {
        self.named(name, |walk| walk.skip(reason));
    }

    fn named(&mut self, name: &[u8], act: impl FnOnce(&mut Self)) {
        self.within.push(PathBytes(name.get(..MAX_NAME).unwrap_or(name).to_vec()));
        act(self);
        self.within.pop();
    }

    /// Reports that the container that is walked, or something in it, was not looked at.
    fn skip(&mut self, reason: SkipReason) {
        let skip = Skip { member: self.within.clone(), reason };
        // Two readings of one container come to the same end.
        if self.findings.skips.last() != Some(&skip) && self.has_room(0) {
            self.findings.skips.push(skip);
        }
    }

    /// Whether one more finding fits; says once that the rest does not.
    fn has_room(&mut self, more: usize) -> bool {
        self.findings_bytes += 64 + more + self.within.iter().map(|name| name.0.len() + 32).sum::<usize>();
        if self.findings_bytes <= MAX_FINDINGS_BYTES {
            return true;
        }
        if !self.full {
            self.full = true;
            self.findings.skips.push(Skip { member: Vec::new(), reason: SkipReason::Limit });
        }
        false
    }
}
