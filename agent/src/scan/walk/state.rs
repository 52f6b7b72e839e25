//! Where a walk is: decides the next step and enters what came of the last one. Pure; the steps are in `job`.
//!
//! **Invariant:** everything met is handed over as an open file or named with the reason why not; only what
//! vanished in between is left out.
//! **Invariant:** at most [`OPEN`] folders and the first one are open, however deep the walk is. An outer folder
//! is opened again from the inner one, and is the one it was, or is looked for again from the first.

use std::{collections::HashMap, ffi::CString, os::fd::OwnedFd, sync::Arc};

use rustix::fs::FileType;
use tm_protocol::report::{PathBytes, SkipReason, Skipped};

use super::{
    Found,
    job::{Border, Job, Outcome, Seen},
    level::{Ended, Level, Next},
};

/// How many of the innermost folders are kept open.
const OPEN: usize = 32;
/// Longest path that is walked, in bytes: a thousand of the longest names. Some hundred paths are in memory.
pub(super) const LONGEST: usize = 256 << 10;
/// Steps on one mount that may have to be left behind before the rest of the mount is.
const HANGS: u32 = 3;

/// A step that is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Start,
    List,
    Look,
    Leave,
    Descend,
}

/// A walk.
#[derive(Debug)]
pub(super) struct State {
    /// Of what the step at hand is about.
    path: Vec<u8>,
    levels: Vec<Level>,
    all_local: bool,
    /// The name that is being looked at.
    name: CString,
    doing: Option<Doing>,
    started: bool,
    /// Steps left behind, by mount.
    hangs: HashMap<Option<u64>, u32>,
    /// Not yet taken.
    pub(super) found: Vec<Found>,
    /// To be closed by whoever may wait for it.
    pub(super) closing: Vec<Arc<OwnedFd>>,
}

impl State {
    pub(super) fn new(path: Vec<u8>, all_local: bool) -> Self {
        Self {
            path,
            levels: Vec::new(),
            all_local,
            name: CString::default(),
            doing: None,
            started: false,
            hangs: HashMap::new(),
            found: Vec::new(),
            closing: Vec::new(),
        }
    }

    /// What is to be done now; `None` if all is done.
    pub(super) fn next(&mut self) -> Option<Job> {
        if !self.started {
            self.started = true;
            self.doing = Some(Doing::Start);
            return Some(Job::Start { path: self.path.clone() });
        }
        loop {
            let level = self.levels.last_mut()?;
            self.path.truncate(level.path_length);
            let Some(folder) = level.folder.clone() else { return self.descend() };
            match level.next() {
                Next::Entry(entry) => {
                    let inside = level.facts;
                    self.append(&entry.name);
                    if self.path.len() > LONGEST {
                        self.skip(SkipReason::Limit);
                    } else if entry.kind == FileType::Symlink {
                        // A link cannot be mounted over, so the listing's word for it is enough. Any other
                        // kind may hide under a mount.
                        self.skip(SkipReason::Symlink);
                    } else {
                        self.doing = Some(Doing::Look);
                        self.name.clone_from(&entry.name);
                        return Some(Job::Look { folder, inside, name: entry.name, border: self.border() });
                    }
                }
                Next::Again(entry) => {
                    self.append(&entry.name);
                    self.skip(SkipReason::Changed);
                }
                Next::List { seek } => {
                    self.doing = Some(Doing::List);
                    return Some(Job::List { folder, seek });
                }
                Next::End => {
                    let (was, name) = (level.facts, level.name.clone());
                    let Some(parent) = self.levels.len().checked_sub(2).and_then(|at| self.levels.get(at))
                    else {
                        self.pop();
                        return None;
                    };
                    self.doing = Some(Doing::Leave);
                    let (parent, parent_was) = (parent.folder.clone(), parent.facts);
                    return Some(Job::Leave { child: folder, was, name, parent, parent_was });
                }
            }
        }
    }

    /// Enters what came of the job that was last given out.
    pub(super) fn apply(&mut self, outcome: Outcome) {
        self.doing = None;
        match outcome {
            Outcome::Seen(Seen::Gone) => {}
            Outcome::Seen(Seen::Skip(reason)) => self.skip(reason),
            Outcome::Seen(Seen::File(file, facts)) => {
                self.found.push(Found::File { path: PathBytes(self.path.clone()), file, facts });
            }
            Outcome::Seen(Seen::Folder(folder, facts)) => {
                let name = std::mem::take(&mut self.name);
                self.levels.push(Level::new(folder, facts, name, self.path.len()));
                let outer = self.levels.len().checked_sub(OPEN + 1).filter(|at| *at > 0);
                if let Some(level) = outer.and_then(|at| self.levels.get_mut(at)) {
                    self.closing.extend(level.close());
                }
            }
            Outcome::Listed { entries, end } => {
                match self.levels.last_mut().map_or(Ended::Well, |level| level.listed(entries, end)) {
                    Ended::Well => {}
                    Ended::Changed => self.skip(SkipReason::Changed),
                    Ended::Unreadable => self.skip(SkipReason::Unreadable),
                }
            }
            Outcome::Left { moved, parent } => {
                self.pop();
                if moved {
                    self.skip(SkipReason::Changed);
                }
                if let Some(level) = self.levels.last_mut() {
                    level.folder = parent;
                }
            }
            Outcome::Descended { steps, folder } => {
                self.lose(steps + 1, SkipReason::Changed);
                if let (Some(level), Some(folder)) = (self.levels.last_mut(), folder) {
                    level.folder = Some(folder);
                }
            }
        }
    }

    /// Goes on without the step at hand, which does not return, and names what it was about.
    pub(super) fn pass_over(&mut self) {
        let mount = self.levels.last().and_then(|level| level.facts.mount);
        match self.doing.take() {
            Some(Doing::Start | Doing::Look) => self.skip(SkipReason::Timeout),
            Some(Doing::List | Doing::Leave) => {
                self.skip(SkipReason::Timeout);
                self.pop();
            }
            Some(Doing::Descend) => self.lose(1, SkipReason::Timeout),
            None => {}
        }
        let hangs = self.hangs.entry(mount).or_default();
        *hangs += 1;
        if *hangs >= HANGS {
            let keep = self.levels.iter().rposition(|level| level.facts.mount != mount);
            self.lose(keep.map_or(0, |at| at + 1), SkipReason::Timeout);
        }
    }

    /// Names all that is not finished and ends the walk.
    pub(super) fn give_up(&mut self, reason: SkipReason) {
        if !self.started {
            self.started = true;
            self.skip(reason);
        }
        self.lose(0, reason);
    }

    fn border(&self) -> Border {
        match self.levels.first() {
            Some(first) if !self.all_local => Border::Of(first.facts),
            Some(_) | None => Border::Local,
        }
    }

    /// The way from the first folder to the innermost one, which is not open.
    fn descend(&mut self) -> Option<Job> {
        let top = self.levels.first()?.folder.clone()?;
        let steps = self.levels.iter().skip(1).map(|level| (level.name.clone(), level.facts)).collect();
        self.doing = Some(Doing::Descend);
        Some(Job::Descend { top, steps })
    }

    fn append(&mut self, name: &CString) {
        if !self.path.ends_with(b"/") {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name.as_bytes());
    }

    /// Leaves the innermost folder; the path is then still its own.
    fn pop(&mut self) {
        if let Some(mut level) = self.levels.pop() {
            self.path.truncate(level.path_length);
            self.closing.extend(level.close());
        }
    }

    /// Leaves all folders but the first `keep`, and names each.
    fn lose(&mut self, keep: usize, reason: SkipReason) {
        while self.levels.len() > keep {
            self.pop();
            self.skip(reason);
        }
    }

    fn skip(&mut self, reason: SkipReason) {
        let path = PathBytes(self.path.clone());
        self.found.push(Found::Skipped(Skipped { path, member: vec![], reason }));
    }
}
