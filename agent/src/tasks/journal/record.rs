//! What the journal holds: one kind of record for each thing that must outlive the process.
//!
//! On disk a record is the format's number (1) and then the bincode of [`Record`]. A variant never changes; a
//! new need gets a new variant at the end. Orders and reports are kept as the exact frames of the wire, so
//! that what is sent again is what was sent before.
//!
//! **Invariant:** a record says by itself what it changes, so that records which were copied into a later
//! segment, or of which some are missing, are still read right.

use bincode::{Decode, Encode, config};
use tm_protocol::{
    ids::{Sha256, StreamId, TaskId},
    report::{Detection, Notice},
};

use crate::{platform::fs::Object, tasks::Now};

const FORMAT: u8 = 1;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Record {
    /// Reports and notices of this epoch are numbered in this stream.
    Stream { stream: StreamId, epoch: u32 },
    /// A task was accepted.
    Accepted {
        task: TaskId,
        /// The order's frame.
        order: Vec<u8>,
        /// Until when it may be begun.
        expires: Due,
    },
    /// It was begun.
    Started {
        task: TaskId,
        /// Until when it may run.
        ends: Due,
        /// How often it has been begun, this time included.
        attempt: u32,
    },
    /// It has ended.
    Ended {
        task: TaskId,
        /// The stream and the number of the report that says so.
        stream: StreamId,
        sequence: u64,
        /// Until when the order is recognised if it comes again.
        forget: Due,
    },
    /// A report that the manager must store.
    Report {
        /// Counts streams; what is of an earlier epoch than the newest no longer counts.
        epoch: u32,
        sequence: u64,
        /// The task whose end it tells.
        ends: Option<TaskId>,
        /// Its frame.
        frame: Vec<u8>,
    },
    /// The manager has stored every report up to this one.
    Stored { epoch: u32, through: u64 },
    /// A notice that the manager should store.
    Notice { epoch: u32, number: u64, notice: Notice },
    /// The manager has stored every notice up to this one.
    NoticesStored { epoch: u32, through: u64 },
    /// Something that this agent detected.
    Found(Box<Found>),
    /// Numbers above these have been given out since the last session (none, if they are the highest there
    /// are): a manager that knows such a number has seen a later state of this journal.
    Opened { epoch: u32, reports: u64, notices: u64 },
    /// The frame of the report that told a task's end: a manager that was set back to an earlier state asks again.
    Outcome { task: TaskId, frame: Vec<u8> },
}

/// Something that this agent detected: the only things a cleanup may remove.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Found {
    /// What was found.
    pub(crate) detection: Detection,
    device: u64,
    inode: u64,
    /// The boot in which the device had this number.
    boot: u128,
}

impl Found {
    pub(crate) fn new(detection: Detection, object: Object, boot: Boot) -> Self {
        Self { detection, device: object.device, inode: object.inode, boot: boot.0 }
    }

    /// The object on disk that was judged; `None` if the machine was booted since, because device numbers may
    /// then stand for other devices.
    pub(crate) fn object(&self, boot: Boot) -> Option<Object> {
        (self.boot == boot.0).then_some(Object { device: self.device, inode: self.inode })
    }
}

/// Which boot of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Boot(pub(crate) u128);

/// A moment ahead that outlives the process: on the boot's own clock while the boot lasts, by wall time after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Due {
    boot: u128,
    /// When it was written, on the clock of that boot and in wall time.
    elapsed_ms: u64,
    unix_ms: i64,
    /// How long it was ahead then.
    left_ms: u64,
}

impl Due {
    pub(crate) fn new(left_ms: u64, now: Now, boot: Boot) -> Self {
        Self { boot: boot.0, elapsed_ms: now.elapsed_ms, unix_ms: now.unix_ms, left_ms }
    }

    /// The moment on this boot's clock. After another boot, wall time tells how long the machine was off; a
    /// wall clock that went back tells nothing, and never makes the time longer than it was.
    pub(crate) fn at(&self, now: Now, boot: Boot) -> u64 {
        if self.boot == boot.0 {
            return self.elapsed_ms.saturating_add(self.left_ms);
        }
        let passed = u64::try_from(now.unix_ms.saturating_sub(self.unix_ms)).unwrap_or(0);
        now.elapsed_ms.saturating_add(self.left_ms.saturating_sub(passed))
    }
}

/// What a record is about. A later record of the same key takes the place of the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Stream,
    Accepted(TaskId),
    Started(TaskId),
    Ended(TaskId),
    Report(u64),
    Stored,
    Notice(u64),
    NoticesStored,
    Found(Sha256),
    Opened,
    Outcome(TaskId),
}

impl Record {
    pub(crate) fn key(&self) -> Key {
        match self {
            Self::Stream { .. } => Key::Stream,
            Self::Accepted { task, .. } => Key::Accepted(*task),
            Self::Started { task, .. } => Key::Started(*task),
            Self::Ended { task, .. } => Key::Ended(*task),
            Self::Report { sequence, .. } => Key::Report(*sequence),
            Self::Stored { .. } => Key::Stored,
            Self::Notice { number, .. } => Key::Notice(*number),
            Self::NoticesStored { .. } => Key::NoticesStored,
            Self::Found(found) => Key::Found(found.detection.key()),
            Self::Opened { .. } => Key::Opened,
            Self::Outcome { task, .. } => Key::Outcome(*task),
        }
    }

    /// The epoch of what is numbered in a stream.
    pub(crate) fn epoch(&self) -> Option<u32> {
        match self {
            Self::Stream { epoch, .. }
            | Self::Report { epoch, .. }
            | Self::Stored { epoch, .. }
            | Self::Notice { epoch, .. }
            | Self::NoticesStored { epoch, .. }
            | Self::Opened { epoch, .. } => Some(*epoch),
            Self::Accepted { .. }
            | Self::Started { .. }
            | Self::Ended { .. }
            | Self::Found(_)
            | Self::Outcome { .. } => None,
        }
    }

    /// Whether it is only ever written once everything of its stream's beginning is.
    pub(crate) fn is_of_whole_stream(&self) -> bool {
        match self {
            Self::Stream { .. } | Self::Stored { .. } | Self::NoticesStored { .. } | Self::Opened { .. } => {
                true
            }
            Self::Accepted { .. }
            | Self::Started { .. }
            | Self::Ended { .. }
            | Self::Report { .. }
            | Self::Notice { .. }
            | Self::Found(_)
            | Self::Outcome { .. } => false,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = bincode::encode_to_vec(self, config::standard()).expect("records are plain data");
        [&[FORMAT][..], &body].concat()
    }

    /// `None` if the bytes are no record of a format that this version knows.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (format, body) = bytes.split_first()?;
        let limits = config::standard().with_limit::<{ 8 << 20 }>();
        let (record, read) = bincode::decode_from_slice(body, limits).ok()?;
        (*format == FORMAT && read == body.len()).then_some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(elapsed_ms: u64, unix_ms: i64) -> Now {
        Now { elapsed_ms, unix_ms }
    }

    #[test]
    fn time_left_runs_on_the_boots_clock_and_survives_reboots_and_wrong_clocks() {
        let due = Due::new(1000, at(500, 10_000), Boot(1));
        for (now, boot, expected) in [
            (at(600, 10_100), Boot(1), 1500),
            // A wall clock a year ahead or behind changes nothing within a boot.
            (at(600, 31_536_010_000), Boot(1), 1500),
            (at(600, -31_536_000_000), Boot(1), 1500),
            (at(5, 10_300), Boot(2), 705),
            (at(5, 99_000), Boot(2), 5),
            (at(5, 2_000), Boot(2), 1005),
        ] {
            assert_eq!(due.at(now, boot), expected, "{now:?} {boot:?}");
        }
    }

    #[test]
    fn records_come_back_and_other_bytes_do_not() {
        let record = Record::Stored { epoch: 1, through: 7 };
        let bytes = record.encode();
        assert_eq!(Record::decode(&bytes), Some(record));
        for wrong in [&[][..], &[1], &[2, 5, 7], &[&bytes[..], &[0]].concat(), &[1, 200, 1]] {
            assert_eq!(Record::decode(wrong), None, "{wrong:?}");
        }
    }
}
