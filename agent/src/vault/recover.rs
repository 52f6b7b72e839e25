//! Settling what a crash, a full disk or a damaged index left.
//!
//! **Invariant:** may be cut off anywhere and called again; each step is noted before or proved after.
//! **Invariant:** a file is removed here only if it has the inode and the content of the item, and the item
//! was read whole before.

use std::{fs, os::unix::ffi::OsStrExt as _};

use rustix::{fs::AtFlags, io::Errno};
use tm_protocol::{ids::VaultId, report::Failure};

use super::{
    PART, Vault, VaultError, find,
    index::{Attempt, Kept, Record, State, Why},
    index_file, item_error, items_folder, now_ms, on_path,
    restore::same_file,
    shown,
    take::{Target, Untaken, give_back, go_on, take},
};
use crate::platform::{attributes, fs::Object};

/// What was settled.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// Files that were taken and are now noted as such, and files that were put back likewise.
    pub(crate) finished: u64,
    /// Items that were begun and are gone again; restores that had no effect.
    pub(crate) undone: u64,
    /// Damaged records of the index, and damaged, foreign or lost items.
    pub(crate) damaged: u64,
    /// Of `finished`, the items whose file is back in its place.
    pub(crate) restored: Vec<VaultId>,
    /// What an administrator should know. Codes: `index-damaged`, `item-damaged`, `item-lost`, `item-found`,
    /// `left-alone` (something else stands in a file's place), `unsettled`, `strange-file`.
    pub(crate) notes: Vec<Failure>,
}

impl Recovered {
    /// Whether there was nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.finished == 0 && self.undone == 0 && self.damaged == 0 && self.notes.is_empty()
    }

    fn say(&mut self, code: &str, text: impl Into<String>) {
        self.notes.push(Failure::new(code, text));
    }

    fn say_damaged(&mut self, code: &str, text: impl Into<String>) {
        self.damaged += 1;
        self.say(code, text);
    }
}

impl Vault {
    /// Settles what was interrupted, finds items that the index does not know, and sets damage aside. Cheap
    /// where there is nothing to do.
    ///
    /// # Errors
    /// Whatever the system says; what was settled until then is. What cannot be settled now (a place that
    /// cannot be reached) is no error but a note `unsettled`, and tried again next time.
    pub(crate) fn recover(&mut self) -> Result<Recovered, VaultError> {
        let mut done = Recovered::default();
        for name in ["key.new", "index.new"] {
            let path = self.folder.join(name);
            if path.symlink_metadata().is_ok() {
                on_path(fs::remove_file(&path), "remove", &path)?;
            }
        }
        let damaged = self.index.content.damaged;
        if damaged > 0 {
            done.damaged += damaged;
            let text = format!("{damaged} damaged records of the index were set aside");
            done.say("index-damaged", text);
        }
        self.recover_files(&mut done)?;
        let open: Vec<(Kept, State)> = self.index.content.items.values().cloned().collect();
        for (kept, state) in open {
            let settled = match &state {
                State::Kept => self.check_there(&kept, &mut done),
                State::Taking => self.recover_taking(&kept, &mut done),
                State::Restoring(attempt) => self.recover_restoring(&kept, attempt, &mut done),
            };
            if let Err(error) = settled {
                let text = format!("item {} stays unsettled: {}", kept.id, super::error::chain(&error));
                done.say("unsettled", text);
            }
        }
        if self.index.wants_rewriting() {
            let retention = i64::try_from(self.limits.retention.as_millis()).unwrap_or(i64::MAX);
            let path = index_file(&self.folder);
            if let Err(error) = self.index.rewrite(&path, now_ms().saturating_sub(retention)) {
                done.say("unsettled", format!("the index could not be written anew: {error}"));
            }
        }
        Ok(done)
    }

    /// Files in the folder of items: what should not be there goes, what is not known is looked at.
    fn recover_files(&mut self, done: &mut Recovered) -> Result<(), VaultError> {
        let folder = items_folder(&self.folder);
        let mut names = on_path(fs::read_dir(&folder), "list", &folder)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<Vec<_>, _>>()
            .or_else(|error| on_path(Err(error), "list", &folder))?;
        names.sort_unstable();
        for name in names {
            if name.as_bytes().ends_with(PART) {
                let path = folder.join(&name);
                rustix::fs::unlinkat(&self.items, &*name, AtFlags::empty())
                    .map_err(VaultError::io("remove", &super::bytes(&path)))?;
                done.undone += 1;
                continue;
            }
            let Some(id) = name.to_str().and_then(|name| name.parse::<VaultId>().ok()) else {
                let name = tm_protocol::text::escape(name.as_bytes());
                done.say("strange-file", format!("`{name}` in the folder of items is not the vault's"));
                continue;
            };
            if self.index.content.items.contains_key(&id) {
                continue;
            }
            if self.index.content.ended.contains_key(&id) {
                self.remove_item(id)?;
                continue;
            }
            if let Err(error) = self.recover_unknown(id, done) {
                done.say(
                    "unsettled",
                    format!("item {id} cannot be looked at: {}", super::error::chain(&error)),
                );
            }
        }
        Ok(())
    }

    /// An item that the index does not know: it was never noted, or the note was lost.
    fn recover_unknown(&mut self, id: VaultId, done: &mut Recovered) -> Result<(), VaultError> {
        let kept = match self.read_whole(id) {
            Ok(kept) => kept,
            Err(error @ (VaultError::Damaged(..) | VaultError::Foreign(_))) => {
                done.say_damaged("item-damaged", error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if self.is_in_place(&kept)? {
            self.remove_item(id)?;
            done.undone += 1;
            return Ok(());
        }
        let text = format!("item {id} (`{}`) was not in the index and is now", kept.path);
        self.note(Record::Held(kept))?;
        self.note(Record::Done { id })?;
        done.say("item-found", text);
        Ok(())
    }

    /// A file that may still be in its place, or in between.
    fn recover_taking(&mut self, kept: &Kept, done: &mut Recovered) -> Result<(), VaultError> {
        let id = kept.id;
        let place = match find(&kept.path, VaultError::Gone) {
            Ok(place) => Some(place),
            Err(VaultError::Gone(_) | VaultError::Symlink(_)) => None,
            Err(error) => return Err(error),
        };
        let target = place.as_ref().and_then(|place| {
            Some(Target {
                id,
                path: &kept.path,
                parent: place.folder(),
                name: place.name()?,
                object: object(kept),
                sha256: kept.sha256,
                seen: None,
            })
        });
        let fault = match self.read_whole(id) {
            Ok(_) => None,
            Err(error @ (VaultError::Damaged(..) | VaultError::Foreign(_))) => Some(error),
            Err(error) => return Err(error),
        };
        let Some(target) = target else {
            // The folder is gone, and the file with it.
            if let Some(error) = fault {
                done.say_damaged("item-damaged", error.to_string());
            }
            self.note(Record::Done { id })?;
            done.finished += 1;
            return Ok(());
        };
        if let Some(error) = fault {
            give_back(target)?;
            if self.is_in_place(kept)? {
                self.restore_flags(kept)?;
                self.note(Record::Dropped { id, why: Why::Undone })?;
                self.remove_item(id)?;
                done.undone += 1;
            } else {
                done.say_damaged("item-damaged", error.to_string());
                self.note(Record::Done { id })?;
            }
            return Ok(());
        }
        self.loosen(kept)?;
        let taken = match go_on(target) {
            Ok(true) => Ok(()),
            Ok(false) if self.is_in_place(kept)? => take(target),
            Ok(false) => Err(Untaken::Intact(VaultError::Gone(kept.path.clone()))),
            Err(error) => Err(error),
        };
        match taken {
            Ok(()) | Err(Untaken::Intact(VaultError::Gone(_))) => {
                if place.as_ref().is_some_and(|place| place.facts().is_ok()) {
                    done.say("left-alone", format!("something else stands in the place of `{}`", kept.path));
                }
            }
            Err(Untaken::Intact(error @ VaultError::Changed(..))) => {
                done.say("left-alone", error.to_string())
            }
            Err(Untaken::Intact(error) | Untaken::Unclear(error)) => return Err(error),
        }
        if let Some(place) = &place {
            crate::platform::create::sync_names(place.folder())
                .map_err(VaultError::io("sync the folder of", &kept.path))?;
        }
        self.note(Record::Done { id })?;
        done.finished += 1;
        Ok(())
    }

    fn recover_restoring(
        &mut self,
        kept: &Kept,
        attempt: &Attempt,
        done: &mut Recovered,
    ) -> Result<(), VaultError> {
        if self.resume_restore(kept, attempt)? {
            done.finished += 1;
            if !attempt.keep {
                done.restored.push(kept.id);
            }
        } else {
            done.undone += 1;
        }
        Ok(())
    }

    /// An item at rest must have its file.
    fn check_there(&mut self, kept: &Kept, done: &mut Recovered) -> Result<(), VaultError> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        match rustix::fs::statat(&self.items, super::item_name(kept.id), flags) {
            Ok(_) => Ok(()),
            Err(Errno::NOENT) => {
                self.note(Record::Dropped { id: kept.id, why: Why::Lost })?;
                let text = format!("item {} (`{}`) is lost: its file is missing", kept.id, kept.path);
                done.say_damaged("item-lost", text);
                Ok(())
            }
            Err(errno) => Err(VaultError::io("look at item", &shown(kept.id))(errno)),
        }
    }

    /// Reads an item from end to end; what the index should say of it.
    fn read_whole(&self, id: VaultId) -> Result<Kept, VaultError> {
        let mut reader = self.open_item(id)?;
        let sha256 = reader.content(|_| Ok(())).map_err(|fault| item_error(id, fault))?;
        let metadata = reader.metadata();
        let stored = super::item::item_len(metadata).unwrap_or(metadata.size);
        Ok(Kept {
            id,
            path: metadata.path.clone(),
            sha256,
            size: metadata.size,
            stored,
            vaulted_ms: metadata.vaulted_ms,
            task: metadata.task,
            object: (metadata.object().device, metadata.object().inode),
            flags: metadata.flags,
        })
    }

    /// Whether the file itself stands in its place.
    fn is_in_place(&self, kept: &Kept) -> Result<bool, VaultError> {
        let place = match find(&kept.path, VaultError::Gone) {
            Ok(place) => place,
            Err(VaultError::Gone(_) | VaultError::Symlink(_)) => return Ok(false),
            Err(error) => return Err(error),
        };
        Ok(same_file(&place, &kept.path, object(kept), kept.sha256)?.is_some())
    }

    /// Takes the mark off the file that stands in its way, if it is the file.
    fn loosen(&self, kept: &Kept) -> Result<(), VaultError> {
        if !attributes::is_firm(kept.flags) {
            return Ok(());
        }
        let place = find(&kept.path, VaultError::Gone)?;
        if let Some((file, _)) = same_file(&place, &kept.path, object(kept), kept.sha256)? {
            attributes::loosen(&file).map_err(VaultError::io("take the mark off", &kept.path))?;
        }
        Ok(())
    }

    fn restore_flags(&self, kept: &Kept) -> Result<(), VaultError> {
        let place = find(&kept.path, VaultError::Gone)?;
        if let Some((file, _)) = same_file(&place, &kept.path, object(kept), kept.sha256)? {
            attributes::set_flags(&file, kept.flags).map_err(VaultError::io("mark", &kept.path))?;
        }
        Ok(())
    }
}

fn object(kept: &Kept) -> Object {
    Object { device: kept.object.0, inode: kept.object.1 }
}
