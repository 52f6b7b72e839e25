//! Which items there are and how far each has come: a file of records, replayed at every start.
//!
//! On disk (`vault/index`): a record file ([`crate::records`]); each record is one JSON object ([`Record`])
//! with the field `what`. An item begins with `held` and ends with `dropped` or `restored`. Records of unknown
//! ids mean nothing. Items are the truth about content, the index about progress.
//!
//! **Invariant:** a record is durable before the step it announces is taken.

use std::{collections::BTreeMap, io, path::Path};

use serde::{Deserialize, Serialize};
use tm_protocol::{
    ids::{Sha256, TaskId, VaultId},
    report::{PathBytes, VaultEntry},
};

use super::b64;
use crate::{platform::fs::Object, records::RecordFile};

/// An item as the index knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) id: VaultId,
    /// Where the file was.
    #[serde(with = "b64")]
    pub(super) path: PathBytes,
    pub(super) sha256: Sha256,
    /// Of the file, in bytes.
    pub(super) size: u64,
    /// Of the item, in bytes.
    pub(super) stored: u64,
    /// In milliseconds since 1970.
    pub(super) vaulted_ms: i64,
    pub(super) task: Option<TaskId>,
    /// Device and inode of the file.
    pub(super) object: (u64, u64),
    /// Its inode flags.
    pub(super) flags: u32,
}

impl Kept {
    pub(super) fn entry(&self) -> VaultEntry {
        VaultEntry {
            id: self.id,
            path: self.path.clone(),
            sha256: self.sha256,
            size: self.size,
            vaulted_ms: self.vaulted_ms,
        }
    }
}

/// Why an item is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Why {
    /// The file was not taken after all.
    Undone,
    /// It was told to be removed.
    Purged,
    /// Its file is gone.
    Lost,
}

/// One step of one item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(super) enum Record {
    /// The item is whole; its file is about to be taken.
    Held(Kept),
    /// The file is gone from its place.
    Done { id: VaultId },
    /// A file is about to appear at `to`: this object, once it is known.
    Restoring {
        id: VaultId,
        #[serde(with = "b64")]
        to: PathBytes,
        object: Option<(u64, u64)>,
        /// The item stays.
        keep: bool,
    },
    /// The restore that was begun is over; the item stays.
    Settled { id: VaultId },
    /// The same, and a copy stands where it was to be put.
    Copied { id: VaultId },
    /// The file is back; the item goes.
    Restored {
        id: VaultId,
        #[serde(with = "b64")]
        path: PathBytes,
        sha256: Sha256,
        size: u64,
        at_ms: i64,
    },
    /// The item goes.
    Dropped { id: VaultId, why: Why },
}

/// How far an item has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// Its file may still be in its place, or in between.
    Taking,
    /// It is all that there is of the file.
    Kept,
    /// A copy may stand at `to`.
    Restoring(Attempt),
}

/// A restore that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) to: PathBytes,
    pub(super) object: Option<Object>,
    pub(super) keep: bool,
}

/// An item that was put back to its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RestoredBefore {
    /// Where it was put.
    pub(crate) path: PathBytes,
    /// Digest of its content.
    pub(crate) sha256: Sha256,
    /// Its size, in bytes.
    pub(crate) size: u64,
    /// When, in milliseconds since 1970.
    pub(crate) at_ms: i64,
}

/// How an item ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    Restored(RestoredBefore),
    Dropped(Why),
}

/// What the records say.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) items: BTreeMap<VaultId, (Kept, State)>,
    pub(super) ended: BTreeMap<VaultId, End>,
    /// Where the last copy of an item that is held was put.
    pub(super) copies: BTreeMap<VaultId, Attempt>,
    /// Stretches of the file that are no record.
    pub(super) damaged: u64,
    /// How many records were read.
    records: u64,
}

impl Content {
    fn apply(&mut self, record: Record) {
        self.records += 1;
        match record {
            Record::Held(kept) => {
                self.ended.remove(&kept.id);
                self.items.insert(kept.id, (kept, State::Taking));
            }
            Record::Done { id } | Record::Settled { id } => self.set(id, State::Kept),
            Record::Copied { id } => {
                if let Some((_, State::Restoring(attempt))) = self.items.get(&id) {
                    self.copies.insert(id, attempt.clone());
                }
                self.set(id, State::Kept);
            }
            Record::Restoring { id, to, object, keep } => {
                let object = object.map(|(device, inode)| Object { device, inode });
                self.set(id, State::Restoring(Attempt { to, object, keep }));
            }
            Record::Restored { id, path, sha256, size, at_ms } => {
                self.items.remove(&id);
                self.copies.remove(&id);
                self.ended.insert(id, End::Restored(RestoredBefore { path, sha256, size, at_ms }));
            }
            Record::Dropped { id, why } => {
                self.items.remove(&id);
                self.copies.remove(&id);
                self.ended.insert(id, End::Dropped(why));
            }
        }
    }

    fn set(&mut self, id: VaultId, state: State) {
        if let Some((_, now)) = self.items.get_mut(&id) {
            *now = state;
        }
    }

    /// The records that say the same in fewest words. Restores before `since_ms` and what was dropped are
    /// forgotten.
    fn condensed(&self, since_ms: i64) -> Vec<Record> {
        let restored = self.ended.iter().filter_map(|(id, end)| match end {
            End::Restored(r) if r.at_ms >= since_ms => Some(Record::Restored {
                id: *id,
                path: r.path.clone(),
                sha256: r.sha256,
                size: r.size,
                at_ms: r.at_ms,
            }),
            End::Restored(_) | End::Dropped(_) => None,
        });
        let items = self.items.iter().flat_map(|(id, (kept, state))| {
            let begun = |attempt: &Attempt| Record::Restoring {
                id: *id,
                to: attempt.to.clone(),
                object: attempt.object.map(|object| (object.device, object.inode)),
                keep: attempt.keep,
            };
            let copy = self.copies.get(id);
            let then = match state {
                State::Taking => None,
                State::Kept if copy.is_some() => None,
                State::Kept => Some(Record::Done { id: *id }),
                State::Restoring(attempt) => Some(begun(attempt)),
            };
            let copied = copy.map(|_| Record::Copied { id: *id });
            [Some(Record::Held(kept.clone())), copy.map(begun), copied, then].into_iter().flatten()
        });
        restored.chain(items).collect()
    }
}

/// The index and its file.
#[derive(Debug)]
pub(super) struct Index {
    file: RecordFile,
    pub(super) content: Content,
}

impl Index {
    /// Opens or creates it.
    ///
    /// # Errors
    /// If the file cannot be opened or read. Damage is no error: it is counted.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let (file, stretches) = RecordFile::open(path)?;
        let mut content = Content::default();
        for stretch in stretches {
            match stretch.body.as_deref().map(serde_json::from_slice) {
                Some(Ok(record)) => content.apply(record),
                Some(Err(_)) | None => content.damaged += 1,
            }
        }
        Ok(Self { file, content })
    }

    /// Notes a step, durably.
    ///
    /// # Errors
    /// If it cannot be written; it then counts as not taken.
    pub(super) fn note(&mut self, record: Record) -> io::Result<()> {
        self.file.append(&serde_json::to_vec(&record)?)?;
        self.file.sync()?;
        self.content.apply(record);
        Ok(())
    }

    /// Whether the file is damaged or much longer than needed.
    pub(super) fn wants_rewriting(&self) -> bool {
        let needed = u64::try_from(self.content.items.len()).unwrap_or(u64::MAX).saturating_mul(2);
        self.content.damaged > 0 || self.content.records > needed.saturating_mul(4).saturating_add(1000)
    }

    /// Writes the file anew, without damage and without what nobody needs.
    ///
    /// # Errors
    /// If it cannot be written; the old one stays.
    pub(super) fn rewrite(&mut self, path: &Path, since_ms: i64) -> io::Result<()> {
        let records = self.content.condensed(since_ms);
        let texts = records.iter().map(serde_json::to_vec).collect::<Result<Vec<_>, _>>()?;
        self.file = RecordFile::rewrite(path, &texts)?;
        self.content = Content::default();
        records.into_iter().for_each(|record| self.content.apply(record));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn kept(n: u8) -> Kept {
        Kept {
            id: VaultId::new(Uuid::from_bytes([n; 16])),
            path: PathBytes(vec![b'/', n, 0xff, b'\n']),
            sha256: Sha256::of(&[n]),
            size: 1,
            stored: 2,
            vaulted_ms: 3,
            task: Some(TaskId::new(Uuid::from_bytes([9; 16]))),
            object: (4, 5),
            flags: 0,
        }
    }

    fn id(n: u8) -> VaultId {
        kept(n).id
    }

    #[test]
    fn steps_are_found_again_and_a_rewritten_index_says_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        let mut index = Index::open(&path).unwrap();
        let to = PathBytes(b"/to".to_vec());
        for n in 1..=7 {
            index.note(Record::Held(kept(n))).unwrap();
        }
        for n in 2..=7 {
            index.note(Record::Done { id: id(n) }).unwrap();
        }
        for n in [3, 4, 5] {
            let object = (n != 3).then_some((1, u64::from(n)));
            index.note(Record::Restoring { id: id(n), to: to.clone(), object, keep: n == 3 }).unwrap();
        }
        index.note(Record::Settled { id: id(4) }).unwrap();
        for _ in 0..2 {
            let to = PathBytes(b"/copy".to_vec());
            index.note(Record::Restoring { id: id(2), to, object: Some((1, 2)), keep: true }).unwrap();
            index.note(Record::Copied { id: id(2) }).unwrap();
        }
        let restored = |n, at_ms| Record::Restored {
            id: id(n),
            path: to.clone(),
            sha256: Sha256::of(&[n]),
            size: 1,
            at_ms,
        };
        index.note(restored(5, 100)).unwrap();
        index.note(restored(6, 10)).unwrap();
        index.note(Record::Dropped { id: id(7), why: Why::Purged }).unwrap();
        index.note(Record::Done { id: id(99) }).unwrap();

        let states = |index: &Index| -> Vec<(VaultId, State)> {
            index.content.items.iter().map(|(id, (_, state))| (*id, state.clone())).collect()
        };
        let restoring = State::Restoring(Attempt { to: to.clone(), object: None, keep: true });
        let expected =
            vec![(id(1), State::Taking), (id(2), State::Kept), (id(3), restoring), (id(4), State::Kept)];
        assert_eq!(states(&index), expected);
        let mut again = Index::open(&path).unwrap();
        assert_eq!(states(&again), expected);
        assert_eq!(again.content.ended.len(), 3);
        assert!(!again.wants_rewriting());
        again.rewrite(&path, 50).unwrap();
        let last = Index::open(&path).unwrap();
        assert_eq!(states(&last), expected);
        assert_eq!(last.content.copies, index.content.copies);
        assert_eq!(last.content.copies[&id(2)].to, PathBytes(b"/copy".to_vec()));
        assert_eq!(last.content.items[&id(1)].0, kept(1));
        assert_eq!(last.content.ended.keys().copied().collect::<Vec<_>>(), [id(5)], "the rest is old");
    }

    #[test]
    fn damage_is_counted_and_costs_one_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        let mut index = Index::open(&path).unwrap();
        for n in 1..=3 {
            index.note(Record::Held(kept(n))).unwrap();
        }
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[10] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let mut index = Index::open(&path).unwrap();
        assert_eq!((index.content.items.len(), index.content.damaged), (2, 1));
        assert!(index.wants_rewriting());
        index.rewrite(&path, 0).unwrap();
        let index = Index::open(&path).unwrap();
        assert_eq!((index.content.items.len(), index.content.damaged), (2, 0));
    }
}
