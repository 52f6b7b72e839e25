//! A folder that a walk is in: what of its listing is still to be visited, and what was.
//!
//! **Invariant:** what stays in a folder while it is walked is visited once. Where the folder changed meanwhile,
//! its listing is read again, at most [`ROUNDS`] times, for what was not seen; then it is named as changed.

use std::{
    collections::HashSet, collections::hash_map::RandomState, ffi::CString, hash::BuildHasher as _,
    os::fd::OwnedFd, sync::Arc, vec,
};

use rustix::{fs::FileType, io::Errno};

use super::job::Entry;
use crate::platform::fs::Facts;

/// How many times the listing of a folder that keeps changing is read.
const ROUNDS: u32 = 4;
/// Entries of one folder that are remembered; a larger folder that changes is named as such.
const MOST_SEEN: usize = 100_000;

/// A folder on the way to where the walk is.
#[derive(Debug)]
pub(super) struct Level {
    /// `None` while it is closed to save descriptors.
    pub(super) folder: Option<Arc<OwnedFd>>,
    /// As its listing began.
    pub(super) facts: Facts,
    /// In the folder that holds it; empty for the start.
    pub(super) name: CString,
    /// Of the walk's path, in bytes.
    pub(super) path_length: usize,
    entries: vec::IntoIter<Entry>,
    /// Where the listing goes on after the last entry that was taken.
    resume: u64,
    /// The descriptor stands elsewhere.
    must_seek: bool,
    /// The listing was read to its end.
    ended: bool,
    round: u32,
    /// `None` if there were too many, or they are forgotten.
    seen: Option<HashSet<u64>>,
    hasher: RandomState,
}

/// What is next in a folder.
#[derive(Debug)]
pub(super) enum Next {
    /// This entry.
    Entry(Entry),
    /// A folder that was walked already, under another name.
    Again(Entry),
    /// The listing is to be read on.
    List { seek: Option<u64> },
    /// Nothing.
    End,
}

/// How a listing ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// All that stands there was visited, or it is read once more.
    Well,
    /// It changed all the time, or too much for one's memory.
    Changed,
    /// It could not be read to its end.
    Unreadable,
}

impl Level {
    /// A folder just opened.
    pub(super) fn new(folder: OwnedFd, facts: Facts, name: CString, path_length: usize) -> Self {
        Self {
            folder: Some(Arc::new(folder)),
            facts,
            name,
            path_length,
            entries: Vec::new().into_iter(),
            resume: 0,
            must_seek: false,
            ended: false,
            round: 1,
            seen: Some(HashSet::new()),
            hasher: RandomState::new(),
        }
    }

    /// Takes what is next.
    pub(super) fn next(&mut self) -> Next {
        while let Some(entry) = self.entries.next() {
            self.resume = entry.next;
            // Two names of one file are two entries; a folder has one, whatever it is called by now.
            let by_name = self.hasher.hash_one((entry.inode, Some(&entry.name)));
            let by_inode = (entry.kind == FileType::Directory)
                .then(|| self.hasher.hash_one((entry.inode, None::<&CString>)));
            let Some(seen) = &mut self.seen else { return Next::Entry(entry) };
            if !seen.insert(by_name) {
                continue;
            }
            let is_new = by_inode.is_none_or(|key| seen.insert(key));
            if seen.len() > MOST_SEEN {
                self.seen = None;
            }
            return if is_new { Next::Entry(entry) } else { Next::Again(entry) };
        }
        if self.ended {
            return Next::End;
        }
        Next::List { seek: std::mem::take(&mut self.must_seek).then_some(self.resume) }
    }

    /// Enters what was listed; `end` once the listing has ended, with what the folder then was.
    pub(super) fn listed(&mut self, entries: Vec<Entry>, end: Option<Result<Facts, Errno>>) -> Ended {
        self.entries = entries.into_iter();
        let now = match end {
            None => return Ended::Well,
            Some(Ok(now)) => now,
            Some(Err(_)) => {
                self.ended = true;
                return Ended::Unreadable;
            }
        };
        // A folder that was removed holds nothing that could have been missed.
        if now.stamp == self.facts.stamp || now.links == 0 {
            self.ended = true;
            return Ended::Well;
        }
        if self.seen.is_none() || self.round >= ROUNDS {
            self.ended = true;
            return Ended::Changed;
        }
        self.round += 1;
        self.facts = now;
        self.resume = 0;
        self.must_seek = true;
        Ended::Well
    }

    /// Lets go of descriptor and memory; the listing goes on later where it is now.
    pub(super) fn close(&mut self) -> Option<Arc<OwnedFd>> {
        self.entries = Vec::new().into_iter();
        self.must_seek = true;
        self.seen = None;
        self.folder.take()
    }
}
