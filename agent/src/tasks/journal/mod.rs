//! The agent's memory of its tasks, reports, notices and detections, on disk.
//!
//! `journal/NNNNNNNN.log` are segments of [`crate::records`]; the newest is appended to. A segment goes once
//! nothing in it counts any more, oldest first; what still counts in an old, mostly dead segment is copied
//! into the newest before.
//!
//! **Invariant:** what [`Journal::write`] returned from is on disk.
//! **Invariant:** a journal opens whatever state its files are in; damaged records are counted, and lose
//! nothing but themselves.

pub(crate) mod record;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use bytes::BytesMut;
use tm_protocol::{
    ids::{Sha256, StreamId, TaskId},
    message::{Report, ToManager},
    report::Notice,
};

use self::record::{Found, Key, Record};
use crate::{
    paths::{make_folder, sync_folder},
    records::{Place, RecordFile},
};

/// A segment of this size is followed by a new one.
const SEGMENT: u64 = 4 << 20;
/// Detections that are remembered; beyond it the oldest are forgotten, and a new scan finds them again.
pub(crate) const MAX_FOUND: usize = 100_000;

/// The journal on disk.
#[derive(Debug)]
pub(crate) struct Journal {
    folder: PathBuf,
    segment_size: u64,
    segments: BTreeMap<u64, Segment>,
    live: HashMap<Key, Location>,
    /// Keys of detections, oldest first; some may be forgotten or renewed since.
    found: VecDeque<Sha256>,
    found_count: usize,
    /// Counts streams.
    epoch: u32,
    /// The stream of this epoch, unless its record was lost.
    stream: Option<StreamId>,
    opened: Option<(u64, u64)>,
    stored: u64,
    notices_stored: u64,
    /// The stored marks have moved since they were last written.
    marks_moved: bool,
}

#[derive(Debug)]
struct Segment {
    file: RecordFile,
    live: u64,
    live_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Location {
    segment: u64,
    place: Place,
    bytes: u64,
}

/// What an opened journal held.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Records of tasks that still count, in no order.
    pub(crate) tasks: Vec<Record>,
    /// What the manager has not stored.
    pub(crate) outbox: Outbox,
    /// Stretches that were no record.
    pub(crate) damaged: u64,
}

/// What waits for the manager.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outbox {
    /// `None` if no report was ever numbered, or the record of it was lost.
    pub(crate) stream: Option<StreamId>,
    /// The highest report and the highest notice from before the last session, if there was none since.
    pub(crate) opened: Option<(u64, u64)>,
    /// The highest report and the highest notice that are known to be stored.
    pub(crate) stored: (u64, u64),
    /// Number, length in bytes and, where it is the last of a task, the task of each report, in order.
    pub(crate) reports: Vec<(u64, u64, Option<TaskId>)>,
    /// Number and length of each notice, in order.
    pub(crate) notices: Vec<(u64, u64)>,
}

impl Journal {
    /// Opens the journal in `folder`, making both if they are missing.
    ///
    /// # Errors
    /// If the folder or a file in it cannot be opened.
    pub(crate) fn open(folder: &Path) -> io::Result<(Self, Held)> {
        Self::open_sized(folder, SEGMENT)
    }

    /// The same with segments of another size.
    pub(super) fn open_sized(folder: &Path, segment_size: u64) -> io::Result<(Self, Held)> {
        make_folder(folder)?;
        let mut numbers: Vec<u64> = fs::read_dir(folder)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".log")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let mut journal = Self {
            folder: folder.to_path_buf(),
            segment_size,
            segments: BTreeMap::new(),
            live: HashMap::new(),
            found: VecDeque::new(),
            found_count: 0,
            epoch: 0,
            stream: None,
            opened: None,
            stored: 0,
            notices_stored: 0,
            marks_moved: false,
        };
        let (mut records, mut damaged) = (Vec::new(), 0);
        for number in numbers {
            let (file, stretches) = RecordFile::open(&journal.path(number))?;
            journal.segments.insert(number, Segment { file, live: 0, live_bytes: 0 });
            for stretch in stretches {
                let record =
                    stretch.body.as_deref().and_then(|body| Some((Record::decode(body)?, body.len())));
                let Some((record, bytes)) = record else {
                    damaged += 1;
                    continue;
                };
                journal.note(&record, Location { segment: number, place: stretch.place, bytes: wide(bytes) });
                records.push(record);
            }
        }
        if journal.segments.is_empty() {
            journal.add_segment(1)?;
        }
        let ends: HashMap<u64, TaskId> = records
            .iter()
            .filter(|record| record.epoch() == Some(journal.epoch))
            .filter_map(|record| {
                let Record::Report { sequence, ends, .. } = record else { return None };
                Some((*sequence, (*ends)?))
            })
            .collect();
        let outbox = journal.outbox(&ends);
        let tasks = records
            .into_iter()
            .filter(|record| match record.key() {
                key @ (Key::Accepted(_) | Key::Started(_) | Key::Ended(_)) => journal.live.contains_key(&key),
                Key::Stream
                | Key::Report(_)
                | Key::Stored
                | Key::Notice(_)
                | Key::NoticesStored
                | Key::Found(_)
                | Key::Opened => false,
            })
            .collect();
        Ok((journal, Held { tasks, outbox, damaged }))
    }

    fn outbox(&self, ends: &HashMap<u64, TaskId>) -> Outbox {
        let mut outbox = Outbox {
            stream: self.stream,
            opened: self.opened,
            stored: (self.stored, self.notices_stored),
            ..Outbox::default()
        };
        for (key, at) in &self.live {
            match key {
                Key::Report(number) => outbox.reports.push((*number, at.bytes, ends.get(number).copied())),
                Key::Notice(number) => outbox.notices.push((*number, at.bytes)),
                Key::Stream
                | Key::Accepted(_)
                | Key::Started(_)
                | Key::Ended(_)
                | Key::Stored
                | Key::NoticesStored
                | Key::Found(_)
                | Key::Opened => {}
            }
        }
        outbox.reports.sort_unstable();
        outbox.notices.sort_unstable();
        outbox
    }

    /// The epoch that reports are numbered in now.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Writes records and makes them durable, all or none.
    ///
    /// # Errors
    /// If the disk is full or fails. Nothing has then been written, and the same may be tried again.
    pub(crate) fn write(&mut self, records: &[Record]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let bodies: Vec<Vec<u8>> = records.iter().map(Record::encode).collect();
        let (number, segment) = self.newest()?;
        let places = segment.file.append_all(&bodies)?;
        segment.file.sync()?;
        let size = segment.file.len();
        let full = size >= self.segment_size;
        for ((record, body), place) in records.iter().zip(&bodies).zip(places) {
            self.note(record, Location { segment: number, place, bytes: wide(body.len()) });
        }
        if full {
            self.turn_over();
        }
        Ok(())
    }

    /// Notes that the manager has stored reports and notices up to these numbers. It is written down with the
    /// next turn-over: until then a restart makes the agent send some of them again, which changes nothing.
    pub(crate) fn stored(&mut self, reports: u64, notices: u64) {
        if reports <= self.stored && notices <= self.notices_stored {
            return;
        }
        self.drop_through(reports, notices);
        self.marks_moved = true;
    }

    /// Writes the stored marks down and lets go of what no longer counts. A failure is tried again later.
    pub(crate) fn tidy(&mut self) {
        if self.marks_moved {
            let marks = [
                Record::Stored { epoch: self.epoch, through: self.stored },
                Record::NoticesStored { epoch: self.epoch, through: self.notices_stored },
            ];
            if self.write(&marks).is_err() {
                return;
            }
            self.marks_moved = false;
        }
        self.drop_dead();
    }

    /// The frame of a report that the manager has not stored.
    ///
    /// # Errors
    /// `NotFound` if there is none of that number; `InvalidData` if it is damaged by now.
    pub(crate) fn report(&self, sequence: u64) -> io::Result<Vec<u8>> {
        let record = self.read(Key::Report(sequence))?;
        if let Record::Report { frame, .. } = record {
            Ok(frame)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    /// A notice that the manager has not stored.
    ///
    /// # Errors
    /// As [`Journal::report`].
    pub(crate) fn notice(&self, number: u64) -> io::Result<Notice> {
        let record = self.read(Key::Notice(number))?;
        if let Record::Notice { notice, .. } = record {
            Ok(notice)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    /// A detection that this agent made and noted; `None` if it never did, or has forgotten it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn found(&self, key: Sha256) -> io::Result<Option<Found>> {
        match self.read(Key::Found(key)) {
            Ok(Record::Found(found)) => Ok(Some(*found)),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Begins another stream: reports and notices that are not stored get new numbers from 1 on, in order.
    ///
    /// # Errors
    /// If it cannot be written. The old stream then goes on.
    pub(crate) fn restream(&mut self, stream: StreamId) -> io::Result<Outbox> {
        let old = self.outbox(&HashMap::new());
        let epoch = self.epoch.saturating_add(1);
        let mut records = vec![Record::Stream { stream, epoch }];
        let mut ended = HashMap::new();
        for (sequence, (number, _, _)) in (1..).zip(old.reports) {
            let (frame, ends) = match self.read(Key::Report(number)) {
                Ok(Record::Report { frame, ends, .. }) => (renumbered(&frame, sequence), ends),
                Ok(_) | Err(_) => (None, None),
            };
            // A number without a report is told as lost.
            if let Some(frame) = frame {
                ended.extend(ends.map(|task| (sequence, task)));
                records.push(Record::Report { epoch, sequence, ends, frame });
            }
        }
        for (number, (old, _)) in (1..).zip(old.notices) {
            if let Ok(notice) = self.notice(old) {
                records.push(Record::Notice { epoch, number, notice });
            }
        }
        self.write(&records)?;
        Ok(self.outbox(&ended))
    }

    fn read(&self, key: Key) -> io::Result<Record> {
        let location = self.live.get(&key).ok_or(io::ErrorKind::NotFound)?;
        let segment = self.segments.get(&location.segment).ok_or(io::ErrorKind::NotFound)?;
        Record::decode(&segment.file.read(location.place)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Keeps the books: what the record at `location` makes count, and what no longer counts because of it.
    fn note(&mut self, record: &Record, location: Location) {
        match record.epoch() {
            Some(epoch) if epoch < self.epoch => return,
            Some(epoch) if epoch > self.epoch => {
                self.live.retain(|key, old| {
                    let is_numbered = matches!(
                        key,
                        Key::Stream
                            | Key::Report(_)
                            | Key::Notice(_)
                            | Key::Stored
                            | Key::NoticesStored
                            | Key::Opened
                    );
                    if is_numbered {
                        release(&mut self.segments, *old);
                    }
                    !is_numbered
                });
                (self.epoch, self.stream, self.opened) = (epoch, None, None);
                (self.stored, self.notices_stored) = (0, 0);
            }
            Some(_) | None => {}
        }
        match record {
            Record::Stream { stream, .. } => self.stream = Some(*stream),
            Record::Ended { task, .. } => {
                self.forget(Key::Accepted(*task));
                self.forget(Key::Started(*task));
            }
            Record::Opened { reports, notices, .. } => self.opened = Some((*reports, *notices)),
            Record::Stored { through, .. } => self.drop_through(*through, 0),
            Record::NoticesStored { through, .. } => self.drop_through(0, *through),
            Record::Found(found) => {
                self.found.push_back(found.detection.key());
                self.found_count += usize::from(!self.live.contains_key(&record.key()));
            }
            Record::Report { sequence, .. } if *sequence <= self.stored => return,
            Record::Notice { number, .. } if *number <= self.notices_stored => return,
            Record::Accepted { task, .. } | Record::Started { task, .. }
                if self.live.contains_key(&Key::Ended(*task)) =>
            {
                return;
            }
            Record::Accepted { .. }
            | Record::Started { .. }
            | Record::Report { .. }
            | Record::Notice { .. } => {}
        }
        self.forget(record.key());
        if let Some(segment) = self.segments.get_mut(&location.segment) {
            segment.live += 1;
            segment.live_bytes += location.bytes;
        }
        self.live.insert(record.key(), location);
        while self.found_count > MAX_FOUND
            && let Some(oldest) = self.found.pop_front()
        {
            self.found_count -= usize::from(self.live.contains_key(&Key::Found(oldest)));
            self.forget(Key::Found(oldest));
        }
    }

    /// Forgets what the task core no longer needs to know.
    pub(crate) fn forget(&mut self, key: Key) {
        if let Some(old) = self.live.remove(&key) {
            release(&mut self.segments, old);
        }
    }

    fn drop_through(&mut self, reports: u64, notices: u64) {
        let (old, old_notices) = (self.stored, self.notices_stored);
        self.stored = old.max(reports);
        self.notices_stored = old_notices.max(notices);
        // Numbers far apart can only come from a damaged or strange journal; then what exists is looked through.
        if self.stored - old > 1 << 20 || self.notices_stored - old_notices > 1 << 20 {
            let (stored, noted) = (self.stored, self.notices_stored);
            self.live.retain(|key, location| {
                let gone = matches!(key, Key::Report(n) if *n <= stored)
                    || matches!(key, Key::Notice(n) if *n <= noted);
                if gone {
                    release(&mut self.segments, *location);
                }
                !gone
            });
            return;
        }
        (old + 1..=self.stored).for_each(|number| self.forget(Key::Report(number)));
        (old_notices + 1..=self.notices_stored).for_each(|number| self.forget(Key::Notice(number)));
    }

    fn newest(&mut self) -> io::Result<(u64, &mut Segment)> {
        self.segments
            .iter_mut()
            .next_back()
            .map(|(number, segment)| (*number, segment))
            .ok_or_else(|| io::Error::other("the journal has no segment"))
    }

    fn add_segment(&mut self, number: u64) -> io::Result<()> {
        let (file, _) = RecordFile::open(&self.path(number))?;
        sync_folder(&self.folder)?;
        self.segments.insert(number, Segment { file, live: 0, live_bytes: 0 });
        Ok(())
    }

    /// Begins a new segment, and empties the oldest into it if little in it counts. Where there is no room for
    /// that, the newest segment grows on.
    fn turn_over(&mut self) {
        let Some((newest, _)) = self.segments.last_key_value() else { return };
        if self.add_segment(newest + 1).is_err() {
            return;
        }
        if let Some(stream) = self.stream {
            let _ = self.write(&[Record::Stream { stream, epoch: self.epoch }]);
        }
        self.marks_moved = true;
        self.tidy();
        if let Some((&oldest, segment)) = self.segments.first_key_value()
            && segment.live_bytes * 2 <= segment.file.len()
            && self.segments.len() > 1
        {
            let keys: Vec<Key> =
                self.live.iter().filter(|(_, at)| at.segment == oldest).map(|(key, _)| *key).collect();
            let copies: Vec<Record> = keys.into_iter().filter_map(|key| self.read(key).ok()).collect();
            if self.write(&copies).is_ok() {
                self.drop_dead();
            }
        }
    }

    /// Removes segments in which nothing counts, from the oldest on: a record that ends another never goes
    /// before it.
    fn drop_dead(&mut self) {
        while self.segments.len() > 1
            && let Some((&oldest, segment)) = self.segments.first_key_value()
            && segment.live == 0
            && fs::remove_file(self.path(oldest)).is_ok()
        {
            self.segments.remove(&oldest);
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:08}.log"))
    }
}

fn release(segments: &mut BTreeMap<u64, Segment>, location: Location) {
    if let Some(segment) = segments.get_mut(&location.segment) {
        segment.live = segment.live.saturating_sub(1);
        segment.live_bytes = segment.live_bytes.saturating_sub(location.bytes);
    }
}

/// A report's frame with another number in it.
fn renumbered(frame: &[u8], sequence: u64) -> Option<Vec<u8>> {
    let report = decode_report(frame)?;
    encode_report(&Report { sequence, ..report })
}

/// A report's frame.
pub(crate) fn encode_report(report: &Report) -> Option<Vec<u8>> {
    let mut bytes = BytesMut::new();
    ToManager::from(report.clone()).encode(&mut bytes).ok()?;
    Some(bytes.to_vec())
}

/// The report in a frame.
pub(crate) fn decode_report(frame: &[u8]) -> Option<Report> {
    let mut bytes = BytesMut::from(frame);
    let frame = tm_protocol::frame::take(&mut bytes, ToManager::limit).ok()??;
    match ToManager::decode(&frame).ok()?? {
        ToManager::Report(report) => Some(report),
        ToManager::Hello(_)
        | ToManager::Inventory(_)
        | ToManager::Ping(_)
        | ToManager::Pong(_)
        | ToManager::Progress(_)
        | ToManager::EnrollRequest(_)
        | ToManager::Notices(_) => None,
    }
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
