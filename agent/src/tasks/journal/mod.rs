//! The agent's memory of its tasks, reports, notices and detections, on disk.
//!
//! `journal/NNNNNNNN.log` are segments of [`crate::records`]; the newest is appended to. A segment goes once
//! nothing in it counts any more, oldest first; what still counts in an old, mostly dead segment is copied
//! into the newest before, and so it is where dead segments have gathered behind one that is alive. A segment
//! that cannot be read is set aside as `NNNNNNNN.bad`.
//!
//! **Invariant:** what [`Journal::write`] returned from is on disk.
//! **Invariant:** a journal opens whatever state its files are in; damaged records are counted, and lose
//! nothing but themselves.
//! **Invariant:** the files take at most about twice what counts in them, and a few segments more.
//! **Invariant:** a stream takes the place of another whole or not at all: its name is written last.

pub(crate) mod record;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeMap, HashMap},
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
/// The same in bytes: whoever makes files chooses how long their paths are.
const MAX_FOUND_BYTES: u64 = 64 << 20;
/// Segments of dead records that may lie behind one that is mostly alive.
const SLACK: u64 = 4;
/// How much is copied or renumbered with one write, in bytes.
const PIECE: u64 = 1 << 20;

/// The journal on disk.
#[derive(Debug)]
pub(crate) struct Journal {
    folder: PathBuf,
    segment_size: u64,
    segments: BTreeMap<u64, Segment>,
    live: HashMap<Key, Location>,
    /// Keys of detections by when they were last noted.
    found: BTreeMap<u64, Sha256>,
    found_bytes: u64,
    /// Counts what was noted.
    noted: u64,
    /// Counts streams.
    epoch: u32,
    /// The highest epoch that was met; one that did not become whole is never used again.
    highest_epoch: u32,
    /// What stands there of later epochs, of which it is not known that they are whole.
    staged: Vec<(u32, Key, Location)>,
    /// The stream of this epoch, unless its record was lost.
    stream: Option<StreamId>,
    opened: Option<(u64, u64)>,
    stored: u64,
    notices_stored: u64,
    /// The stored marks have moved since they were last written.
    marks_moved: bool,
    /// How many more writes the disk takes.
    #[cfg(test)]
    pub(super) writes_left: u32,
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
    /// When it was noted, as [`Journal::noted`] counts; a copy is as old as what it is a copy of.
    stamp: u64,
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
        make_room_for(folder)?;
        let mut numbers: Vec<u64> =
            fs::read_dir(folder)?.filter_map(|entry| number_of(entry.ok()?.file_name().to_str()?)).collect();
        numbers.sort_unstable();
        let last = numbers.last().copied().unwrap_or(0);
        let mut journal = Self {
            folder: folder.to_path_buf(),
            segment_size,
            segments: BTreeMap::new(),
            live: HashMap::new(),
            found: BTreeMap::new(),
            found_bytes: 0,
            noted: 0,
            epoch: 0,
            highest_epoch: 0,
            staged: Vec::new(),
            stream: None,
            opened: None,
            stored: 0,
            notices_stored: 0,
            marks_moved: false,
            #[cfg(test)]
            writes_left: u32::MAX,
        };
        let (mut tasks, mut ends) = (Vec::new(), HashMap::new());
        let (mut damaged, mut set_aside) = (0, 0);
        for number in numbers {
            let (file, stretches) = match RecordFile::open(&journal.path(number)) {
                Ok(opened) => opened,
                Err(error) if will_pass(&error) => return Err(error),
                Err(error) => {
                    tracing::error!(%error, number, "A segment of the journal cannot be read and is set aside.");
                    let _ = fs::rename(journal.path(number), journal.path(number).with_extension("bad"));
                    set_aside += 1;
                    continue;
                }
            };
            journal.segments.insert(number, Segment { file, live: 0, live_bytes: 0 });
            for stretch in stretches {
                let record =
                    stretch.body.as_deref().and_then(|body| Some((Record::decode(body)?, body.len())));
                let Some((record, bytes)) = record else {
                    damaged += 1;
                    continue;
                };
                let location = journal.location(number, stretch.place, bytes);
                journal.note(&record, location);
                match record {
                    Record::Accepted { .. }
                    | Record::Started { .. }
                    | Record::Ended { .. }
                    | Record::Outcome { .. } => tasks.push(record),
                    Record::Report { epoch, sequence, ends: Some(task), .. } => {
                        ends.insert((epoch, sequence), task);
                    }
                    // Reports, notices and detections may be many, and are read again when they are wanted.
                    Record::Stream { .. }
                    | Record::Report { .. }
                    | Record::Stored { .. }
                    | Record::Notice { .. }
                    | Record::NoticesStored { .. }
                    | Record::Found(_)
                    | Record::Opened { .. } => {}
                }
            }
        }
        // Without any stream that is known to be whole, what there is is better than nothing.
        if journal.epoch == 0
            && let Some(epoch) = journal.staged.iter().map(|(epoch, _, _)| *epoch).max()
        {
            journal.enter(epoch);
        }
        journal.staged.clear();
        if journal.segments.is_empty() || set_aside > 0 {
            let next = last.checked_add(1).ok_or_else(|| io::Error::other("no number is left"))?;
            journal.add_segment(next)?;
        }
        let epoch = journal.epoch;
        let ends: HashMap<u64, TaskId> =
            ends.into_iter().filter(|((of, _), _)| *of == epoch).map(|((_, n), task)| (n, task)).collect();
        let outbox = journal.outbox(&ends);
        tasks.retain(|record: &Record| journal.live.contains_key(&record.key()));
        Ok((journal, Held { tasks, outbox, damaged: damaged + set_aside }))
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
                | Key::Opened
                | Key::Outcome(_) => {}
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
        self.append(records, &[])?;
        if self.newest()?.1.file.len() >= self.segment_size {
            self.turn_over();
        }
        Ok(())
    }

    /// Appends to the newest segment, however full it is. Records that are copies are as old as `stamps` say.
    fn append(&mut self, records: &[Record], stamps: &[u64]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        #[cfg(test)]
        {
            self.writes_left = self.writes_left.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        }
        let bodies: Vec<Vec<u8>> = records.iter().map(Record::encode).collect();
        let (number, segment) = self.newest()?;
        let places = segment.file.append_all(&bodies)?;
        segment.file.sync()?;
        for (at, ((record, body), place)) in records.iter().zip(&bodies).zip(places).enumerate() {
            let mut location = self.location(number, place, body.len());
            location.stamp = stamps.get(at).copied().unwrap_or(location.stamp);
            self.note(record, location);
        }
        Ok(())
    }

    fn location(&mut self, segment: u64, place: Place, bytes: usize) -> Location {
        self.noted += 1;
        Location { segment, place, bytes: wide(bytes), stamp: self.noted }
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
            if self.append(&marks, &[]).is_err() {
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
        let before = self.newest()?.1.file.len();
        let done = self.write_stream(stream);
        if done.is_err() {
            self.staged.clear();
            // What was written of it would fill the disk the more, the more often it is tried.
            self.newest()?.1.file.cut(before)?;
        }
        let ended = done?;
        if self.newest()?.1.file.len() >= self.segment_size {
            self.turn_over();
        }
        Ok(self.outbox(&ended))
    }

    fn write_stream(&mut self, stream: StreamId) -> io::Result<HashMap<u64, TaskId>> {
        let old = self.outbox(&HashMap::new());
        self.highest_epoch = self.highest_epoch.saturating_add(1);
        let epoch = self.highest_epoch;
        let reports = old.reports.iter().zip(1..).map(|((old, len, _), new)| (Key::Report(*old), *len, new));
        let notices = old.notices.iter().zip(1..).map(|((old, len), new)| (Key::Notice(*old), *len, new));
        let mut ended = HashMap::new();
        let (mut piece, mut bytes) = (Vec::new(), 0);
        for (key, len, number) in reports.chain(notices) {
            match self.read(key) {
                Ok(Record::Report { frame, ends, .. }) => {
                    let Some(frame) = renumbered(&frame, number) else { continue };
                    ended.extend(ends.map(|task| (number, task)));
                    piece.push(Record::Report { epoch, sequence: number, ends, frame });
                }
                Ok(Record::Notice { notice, .. }) => piece.push(Record::Notice { epoch, number, notice }),
                // A number without a report is told as lost.
                Ok(_) | Err(_) => continue,
            }
            bytes += len;
            if bytes >= PIECE {
                self.append(&piece, &[])?;
                piece.clear();
                bytes = 0;
            }
        }
        self.append(&piece, &[])?;
        // From here on it counts, and what came before does not.
        self.append(&[Record::Stream { stream, epoch }], &[])?;
        Ok(ended)
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
                self.highest_epoch = self.highest_epoch.max(epoch);
                if !record.is_of_whole_stream() {
                    self.staged.push((epoch, record.key(), location));
                    return;
                }
                self.enter(epoch);
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
            | Record::Notice { .. }
            | Record::Found(_)
            | Record::Outcome { .. } => {}
        }
        self.count(record.key(), location);
    }

    /// Goes over to a later stream: what was numbered in the one before no longer counts.
    fn enter(&mut self, epoch: u32) {
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
        self.highest_epoch = self.highest_epoch.max(epoch);
        let (now, later) = std::mem::take(&mut self.staged).into_iter().partition(|(of, ..)| *of <= epoch);
        self.staged = later;
        let now: Vec<(u32, Key, Location)> = now;
        now.into_iter().filter(|(of, ..)| *of == epoch).for_each(|(_, key, at)| self.count(key, at));
    }

    fn count(&mut self, key: Key, location: Location) {
        self.forget(key);
        if let Some(segment) = self.segments.get_mut(&location.segment) {
            segment.live += 1;
            segment.live_bytes += location.bytes;
        }
        self.live.insert(key, location);
        if let Key::Found(found) = key {
            self.found.insert(location.stamp, found);
            self.found_bytes += location.bytes;
        }
        while (self.found.len() > MAX_FOUND || self.found_bytes > MAX_FOUND_BYTES)
            && let Some((_, oldest)) = self.found.pop_first()
        {
            self.forget(Key::Found(oldest));
        }
    }

    /// Forgets what the task core no longer needs to know.
    pub(crate) fn forget(&mut self, key: Key) {
        if let Some(old) = self.live.remove(&key) {
            release(&mut self.segments, old);
            if matches!(key, Key::Found(_)) {
                self.found.remove(&old.stamp);
                self.found_bytes = self.found_bytes.saturating_sub(old.bytes);
            }
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

    /// Begins a new segment, and empties the oldest into it if little in it counts, or if it keeps too much that
    /// no longer counts from going. Where there is no room for that, the newest segment grows on.
    fn turn_over(&mut self) {
        let Some(next) = self.segments.last_key_value().and_then(|(newest, _)| newest.checked_add(1)) else {
            return;
        };
        if self.add_segment(next).is_err() {
            return;
        }
        if let Some(stream) = self.stream {
            let _ = self.append(&[Record::Stream { stream, epoch: self.epoch }], &[]);
        }
        self.marks_moved = true;
        self.tidy();
        let (mut live, mut all) = (0, 0);
        for segment in self.segments.values() {
            live += segment.live_bytes;
            all += segment.file.len();
        }
        let slack = self.segment_size.saturating_mul(SLACK);
        if let Some((&oldest, segment)) = self.segments.first_key_value()
            && self.segments.len() > 1
            && (segment.live_bytes * 2 <= segment.file.len() || all > live * 2 + slack)
            && self.empty(oldest).is_ok()
        {
            self.drop_dead();
        }
    }

    /// Copies what counts in a segment into the newest, in its order.
    fn empty(&mut self, number: u64) -> io::Result<()> {
        let mut keys: Vec<(u64, Key)> = self
            .live
            .iter()
            .filter(|(_, at)| at.segment == number)
            .map(|(key, at)| (at.stamp, *key))
            .collect();
        keys.sort_unstable_by_key(|(stamp, _)| *stamp);
        let (mut piece, mut stamps, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (stamp, key) in keys {
            match self.read(key) {
                Ok(record) => {
                    bytes += self.live.get(&key).map_or(0, |at| at.bytes);
                    piece.push(record);
                    stamps.push(stamp);
                }
                // It is damaged by now. Were it to count, no segment would ever go any more.
                Err(error) => {
                    tracing::error!(%error, ?key, "A record of the journal cannot be read again and is lost.");
                    self.forget(key);
                }
            }
            if bytes >= PIECE {
                self.append(&piece, &stamps)?;
                piece.clear();
                stamps.clear();
                bytes = 0;
            }
        }
        self.append(&piece, &stamps)
    }

    /// Removes segments in which nothing counts, from the oldest on: a record that ends another never goes
    /// before it, also if the machine stops in between.
    fn drop_dead(&mut self) {
        while self.segments.len() > 1
            && let Some((&oldest, segment)) = self.segments.first_key_value()
            && segment.live == 0
            && fs::remove_file(self.path(oldest)).is_ok()
        {
            self.segments.remove(&oldest);
            if sync_folder(&self.folder).is_err() {
                return;
            }
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:08}.log"))
    }
}

/// The number in a segment's name.
fn number_of(name: &str) -> Option<u64> {
    let number: u64 = name.strip_suffix(".log")?.parse().ok()?;
    (name == format!("{number:08}.log")).then_some(number)
}

/// Makes the folder; what stands in its place and is none is set aside.
fn make_room_for(folder: &Path) -> io::Result<()> {
    if folder.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
        fs::rename(folder, folder.with_extension("bad"))?;
    }
    make_folder(folder)
}

/// Whether it says nothing about the file: the same may go well later.
fn will_pass(error: &io::Error) -> bool {
    use rustix::io::Errno;
    Errno::from_io_error(error).is_some_and(|errno| {
        matches!(
            errno,
            Errno::MFILE
                | Errno::NFILE
                | Errno::NOMEM
                | Errno::NOSPC
                | Errno::DQUOT
                | Errno::ROFS
                | Errno::INTR
                | Errno::AGAIN
        )
    })
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
        | ToManager::Renew(_)
        | ToManager::EnrollRequest(_)
        | ToManager::Notices(_) => None,
    }
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
