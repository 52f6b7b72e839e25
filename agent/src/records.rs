//! A file of records that is only appended to, and that damage cannot bring out of step.
//!
//! On disk, each record stands between zero bytes: its body and the body's CRC-32 (IEEE, little-endian),
//! made free of zero bytes by Consistent Overhead Byte Stuffing (Cheshire and Baker, 1999). Two zero bytes
//! stand between neighbours, so that a changed byte spoils one record at most, wherever it lies. Zero bytes
//! after the last record mean nothing: the file is given room ahead of need, so that short records still fit
//! on a full disk.
//!
//! **Invariant:** a byte that was changed, cut off or zeroed loses the record it belongs to, is counted, and
//! leaves every other record readable. No content of a record is ever taken for another record.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    ops::Range,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use rustix::fs::{FallocateFlags, OFlags};

use crate::paths::sync_folder;

/// How much room is made ahead of need, in bytes.
const ROOM: u64 = 256 << 10;
/// Largest file that is read; ours are far smaller.
const MAX_FILE: u64 = 1 << 30;
const CRC: usize = 4;

/// A stretch of a file that is no padding.
#[derive(Debug)]
pub(crate) struct Stretch {
    /// Where it lies in the file.
    pub(crate) place: Place,
    /// The record; `None` if what stands there is none.
    pub(crate) body: Option<Vec<u8>>,
}

/// Where a record lies in its file, for [`RecordFile::read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    offset: u64,
    len: u32,
}

/// A file that records are appended to.
#[derive(Debug)]
pub(crate) struct RecordFile {
    file: File,
    /// Where the last record ends.
    end: u64,
    /// Up to where the file has room.
    room: u64,
}

impl RecordFile {
    /// Opens or creates the file and reads all of it. Nothing is written.
    ///
    /// # Errors
    /// If the file cannot be opened or read, is no regular file, or is larger than a gibibyte.
    pub(crate) fn open(path: &Path) -> io::Result<(Self, Vec<Stretch>)> {
        let file = options().create(true).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        if metadata.len() > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 GiB"));
        }
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes)?;
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let stretches = stretches(bytes.get(..end).unwrap_or_default());
        Ok((Self { file, end: wide(end), room: wide(bytes.len()) }, stretches))
    }

    /// Writes a file anew with these records, whole or not at all, and opens it.
    ///
    /// # Errors
    /// If it cannot be written; what stood there is then untouched.
    pub(crate) fn rewrite<R: AsRef<[u8]>>(path: &Path, records: &[R]) -> io::Result<Self> {
        let beside = path.with_extension("new");
        let file = options().create(true).truncate(true).open(&beside)?;
        let mut new = Self { file, end: 0, room: 0 };
        let written = new.append_all(records).and_then(|_| new.file.sync_all());
        let moved = written.and_then(|()| fs::rename(&beside, path));
        if let Err(error) = moved {
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        sync_folder(path.parent().unwrap_or(path))?;
        Ok(new)
    }

    /// Appends one record. It is durable after [`RecordFile::sync`].
    ///
    /// # Errors
    /// If it cannot be written whole; the file then holds what it held.
    pub(crate) fn append(&mut self, body: &[u8]) -> io::Result<Place> {
        self.append_all(&[body]).map(|places| places.first().copied().unwrap_or(Place { offset: 0, len: 0 }))
    }

    /// Appends records with one write.
    ///
    /// # Errors
    /// If they cannot all be written whole; the file then holds what it held.
    pub(crate) fn append_all<R: AsRef<[u8]>>(&mut self, bodies: &[R]) -> io::Result<Vec<Place>> {
        let mut bytes = Vec::new();
        let mut places = Vec::with_capacity(bodies.len());
        for body in bodies {
            bytes.extend_from_slice(&[0, 0]);
            let framed = frame(body.as_ref());
            let len = u32::try_from(framed.len()).map_err(io::Error::other)?;
            places.push(Place { offset: self.end + wide(bytes.len()), len });
            bytes.extend_from_slice(&framed);
        }
        bytes.push(0);
        self.make_room(wide(bytes.len()));
        if let Err(error) = self.file.write_all_at(&bytes, self.end) {
            // What was written of it must not be found later.
            if self.file.write_all_at(&vec![0; bytes.len()], self.end).is_err() {
                let _ = self.file.set_len(self.end);
                self.room = self.end;
            }
            return Err(error);
        }
        self.end += wide(bytes.len()) - 1;
        self.room = self.room.max(self.end + 1);
        Ok(places)
    }

    /// Makes what was appended durable.
    ///
    /// # Errors
    /// If the disk says that it is not.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Reads a record again.
    ///
    /// # Errors
    /// If it cannot be read or is damaged by now (`InvalidData`).
    pub(crate) fn read(&self, place: Place) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; place.len.try_into().unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, place.offset)?;
        unframe(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a record is damaged"))
    }

    /// Takes back what was appended since [`RecordFile::len`] was `len`.
    ///
    /// # Errors
    /// If the file cannot be cut off there.
    pub(crate) fn cut(&mut self, len: u64) -> io::Result<()> {
        if len < self.end {
            self.file.set_len(len)?;
            self.end = len;
            self.room = len;
        }
        Ok(())
    }

    /// How much of the file is in use, in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.end
    }

    /// Room is a reserve for bad times: where there is none to be had, the write itself will tell.
    fn make_room(&mut self, needed: u64) {
        let until = self.end + needed;
        if until <= self.room {
            return;
        }
        let more = (until - self.room).max(ROOM);
        if rustix::fs::fallocate(&self.file, FallocateFlags::empty(), self.room, more).is_ok() {
            self.room += more;
        }
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let nofollow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    options.read(true).write(true).mode(0o600).custom_flags(nofollow);
    options
}

fn frame(body: &[u8]) -> Vec<u8> {
    let mut checked = Vec::with_capacity(body.len() + CRC);
    checked.extend_from_slice(body);
    checked.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    cobs::encode_vec(&checked)
}

fn unframe(framed: &[u8]) -> Option<Vec<u8>> {
    let mut checked = cobs::decode_vec(framed).ok()?;
    let at = checked.len().checked_sub(CRC)?;
    let crc = checked.split_off(at);
    (crc == crc32fast::hash(&checked).to_le_bytes()).then_some(checked)
}

fn stretches(bytes: &[u8]) -> Vec<Stretch> {
    let mut found = Vec::new();
    let mut offset = 0;
    for framed in bytes.split(|byte| *byte == 0) {
        let range: Range<usize> = offset..offset + framed.len();
        offset = range.end + 1;
        if let Ok(len) = u32::try_from(framed.len())
            && len > 0
        {
            let place = Place { offset: wide(range.start), len };
            found.push(Stretch { place, body: unframe(framed) });
        }
    }
    found
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bodies(stretches: &[Stretch]) -> Vec<Vec<u8>> {
        stretches.iter().filter_map(|s| s.body.clone()).collect()
    }

    fn damaged(stretches: &[Stretch]) -> usize {
        stretches.iter().filter(|s| s.body.is_none()).count()
    }

    #[test]
    fn records_come_back_in_order_and_by_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let records = [&b"one"[..], b"", &[0; 300], b"\0\0", &[7; 70_000]];
        let (mut file, found) = RecordFile::open(&path).unwrap();
        assert!(found.is_empty());
        let places: Vec<Place> = records.iter().map(|r| file.append(r).unwrap()).collect();
        file.sync().unwrap();
        let (mut again, found) = RecordFile::open(&path).unwrap();
        assert_eq!(bodies(&found), records);
        assert_eq!(again.len(), file.len());
        for ((place, record), stretch) in places.into_iter().zip(records).zip(&found) {
            assert_eq!(stretch.place, place);
            assert_eq!(again.read(place).unwrap(), record);
        }
        again.append(b"more").unwrap();
        let (_, found) = RecordFile::open(&path).unwrap();
        assert_eq!(bodies(&found).last().unwrap(), b"more");
        assert_eq!((found.len(), damaged(&found)), (6, 0));

        RecordFile::rewrite(&path, &[b"new"]).unwrap();
        assert_eq!(bodies(&RecordFile::open(&path).unwrap().1), [b"new"]);
        assert!(!path.with_extension("new").exists());
    }

    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("real"), b"").unwrap();
        std::os::unix::fs::symlink("real", folder.path().join("link")).unwrap();
        assert!(RecordFile::open(&folder.path().join("link")).is_err());
    }

    proptest! {
        /// Whatever byte changes, at most the record it lies in is lost, and none is made up.
        #[test]
        fn one_changed_byte_spoils_one_record(
            records in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..40), 1..12),
            at in any::<prop::sample::Index>(), to in any::<u8>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("f");
            let (mut file, _) = RecordFile::open(&path).unwrap();
            file.append_all(&records).unwrap();
            let end = usize::try_from(file.len()).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at.index(end);
            let changed = bytes[at] != to;
            bytes[at] = to;
            std::fs::write(&path, &bytes).unwrap();
            let (_, found) = RecordFile::open(&path).unwrap();
            let kept = bodies(&found);
            prop_assert!(kept.len() + 1 >= records.len(), "{} of {}", kept.len(), records.len());
            let mut rest = records.iter();
            prop_assert!(kept.iter().all(|k| rest.any(|r| r == k)), "in order and none made up");
            prop_assert!(kept.len() == records.len() || (changed && damaged(&found) > 0));
        }

        /// A file that ends anywhere holds every record before that.
        #[test]
        fn a_cut_loses_only_what_lies_behind_it(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..12),
            at in any::<prop::sample::Index>(), zeros in any::<bool>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("f");
            let (mut file, _) = RecordFile::open(&path).unwrap();
            let places = file.append_all(&records).unwrap();
            let cut = at.index(usize::try_from(file.len()).unwrap() + 1);
            let mut bytes = std::fs::read(&path).unwrap();
            let size = bytes.len();
            bytes.truncate(cut);
            if zeros { bytes.resize(size, 0); }
            std::fs::write(&path, &bytes).unwrap();
            let whole = places.iter().filter(|p| p.offset + u64::from(p.len) <= wide(cut)).count();
            let (mut file, found) = RecordFile::open(&path).unwrap();
            prop_assert_eq!(bodies(&found), records[..whole].to_vec());
            file.append(b"next").unwrap();
            let again = RecordFile::open(&path).unwrap().1;
            let again = bodies(&again);
            prop_assert_eq!(again.last().unwrap(), b"next");
            prop_assert_eq!(again.len(), whole + 1);
        }
    }
}
