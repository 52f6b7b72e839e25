//! Putting a file back.
//!
//! The content and all that belongs to it are written and checked in a file that has no name, in the folder
//! where it goes; only then it gets its name, and is looked at again under it.
//!
//! **Invariant:** nothing appears under the name before it is whole, and nothing that stands there is touched.
//! **Invariant:** set-user-id and set-group-id bits and capabilities come back only when that is asked for.

use std::{fs::File, io::Write as _, os::fd::AsFd as _};

use rustix::io::Errno;
use tm_protocol::{
    ids::{Sha256, VaultId},
    report::{Failure, PathBytes},
};

use super::{
    Vault, VaultError, find,
    index::{Attempt, Kept, Record, State},
    item::{ItemFault, ItemReader, Metadata},
    item_error, now_ms, private_name,
    put::{digest, local, reserve, unsettled},
};
use crate::platform::{
    attributes::{self, Attributes},
    create::{INSIDE, Unseen, is_object_at, private_folder, readable, remove_private, sync_names},
    fs::{Object, Place, facts_at, open_regular_at, residence_of},
};

/// Bits that make a program run as its owner or group.
const SET_ID: u32 = 0o6000;
/// The attribute that gives a program rights of root.
const CAPABILITY: &[u8] = b"security.capability";

/// A file that was put back.
#[derive(Debug)]
pub(crate) struct Restored {
    /// Where.
    pub(crate) path: PathBytes,
    /// Digest of its content.
    pub(crate) sha256: Sha256,
    /// Its size, in bytes.
    pub(crate) size: u64,
    /// What an administrator should know besides: `set-id-withheld`, `metadata`, `other-links`, `unsettled`.
    pub(crate) notes: Vec<Failure>,
}

/// A file that would be put back.
#[derive(Debug)]
pub(crate) struct WouldRestore {
    /// Where.
    pub(crate) path: PathBytes,
    /// Digest of its content.
    pub(crate) sha256: Sha256,
    /// Its size, in bytes.
    pub(crate) size: u64,
    /// As in [`Restored`], as far as it can be told.
    pub(crate) notes: Vec<Failure>,
}

/// An item and the place that it goes to, both held open.
struct Prepared {
    kept: Kept,
    reader: ItemReader,
    place: Place,
    to: PathBytes,
    /// The item stays: it does not go to its own place.
    keep: bool,
}

impl Vault {
    /// Puts an item's file back to its place and removes the item; or, with `to`, puts a copy there and keeps
    /// the item.
    ///
    /// # Errors
    /// The item is then still there; should its file stand in its place all the same, [`Vault::recover`]
    /// settles that.
    pub(crate) fn restore(
        &mut self,
        id: VaultId,
        to: Option<&PathBytes>,
        set_id: bool,
    ) -> Result<Restored, VaultError> {
        let mut prepared = self.prepare(id, to)?;
        let unseen = self.unseen(&prepared)?;
        let mut notes = withheld(prepared.reader.metadata(), set_id);
        let written = fill(&mut prepared, &unseen).and_then(|()| {
            notes.extend(dress(unseen.file(), prepared.reader.metadata(), set_id, &prepared.to)?);
            let on = |source| VaultError::Io { doing: "store", on: prepared.to.clone(), source };
            unseen.file().sync_all().map_err(on)?;
            let seen =
                attributes::attributes(unseen.file()).map_err(VaultError::io("look at", &prepared.to))?;
            self.note(Record::Restoring {
                id,
                to: prepared.to.clone(),
                object: Some((seen.object.device, seen.object.inode)),
                keep: prepared.keep,
            })?;
            Ok(seen)
        });
        let published = written.and_then(|seen| {
            let name = prepared.place.name().ok_or_else(|| VaultError::Exists(prepared.to.clone()))?;
            unseen.publish(prepared.place.folder(), name).map_err(|errno| match errno {
                Errno::EXIST => VaultError::Exists(prepared.to.clone()),
                errno => VaultError::io("give its name to", &prepared.to)(errno),
            })?;
            Ok(seen)
        });
        let seen = match published {
            Ok(seen) => seen,
            Err(error) => {
                let had_home = unseen.has_home();
                unseen.discard();
                self.give_up(id, &prepared, had_home);
                return Err(error);
            }
        };
        let flags = prepared.reader.metadata().flags;
        notes.extend(mark(unseen.file(), flags, &prepared.to)?);
        if unseen.has_home() {
            remove_private(prepared.place.folder(), &private_name(id))
                .map_err(VaultError::io("remove the private folder beside", &prepared.to))?;
        }
        sync_names(prepared.place.folder()).map_err(VaultError::io("sync the folder of", &prepared.to))?;
        match confirm(&prepared.place, &prepared.to, seen.object, prepared.kept.sha256)? {
            Some(found) => notes.extend(differs(&seen, &found)),
            None => {
                self.note(Record::Settled { id })?;
                let text = "was exchanged as soon as it was put back; the item stays in the vault".to_owned();
                return Err(VaultError::Changed(prepared.to, text));
            }
        }
        let others = prepared.reader.metadata().links.saturating_sub(1);
        if others > 0 {
            let text = format!("the file had {others} other names, which are not tied to it any more");
            notes.push(Failure::new("other-links", text));
        }
        if let Err(error) = self.finish_restore(&prepared.kept, &prepared.to, prepared.keep) {
            notes.push(unsettled(&error));
        }
        let Kept { sha256, size, .. } = prepared.kept;
        Ok(Restored { path: prepared.to, sha256, size, notes })
    }

    /// Everything that [`Vault::restore`] would check, the whole item included; nothing is changed.
    ///
    /// # Errors
    /// Those of [`Vault::restore`].
    pub(crate) fn check_restore(
        &self,
        id: VaultId,
        to: Option<&PathBytes>,
        set_id: bool,
    ) -> Result<WouldRestore, VaultError> {
        let mut prepared = self.prepare(id, to)?;
        let found = prepared.reader.content(|_| Ok(())).map_err(|fault| item_error(id, fault))?;
        is_expected(&prepared.kept, found)?;
        let notes = withheld(prepared.reader.metadata(), set_id);
        let Kept { sha256, size, .. } = prepared.kept;
        Ok(WouldRestore { path: prepared.to, sha256, size, notes })
    }

    fn prepare(&self, id: VaultId, to: Option<&PathBytes>) -> Result<Prepared, VaultError> {
        let Some((kept, state)) = self.index.content.items.get(&id) else {
            return Err(match self.restored(id) {
                Some(before) => VaultError::RestoredBefore(id, before.path),
                None => VaultError::UnknownItem(id),
            });
        };
        match state {
            State::Kept => {}
            State::Taking | State::Restoring(_) => return Err(VaultError::Unsettled(id)),
        }
        let reader = self.open_item(id)?;
        let metadata = reader.metadata();
        // The item is authenticated, the index is not.
        let to_path = to.unwrap_or(&metadata.path).clone();
        let io = |doing| VaultError::io(doing, &to_path);
        let place = find(&to_path, VaultError::NoParent)?;
        match place.facts() {
            Ok(_) => return Err(VaultError::Exists(to_path)),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(io("look at")(errno)),
        }
        local(residence_of(place.folder()), &to_path)?;
        self.refuse_own(&place, &to_path, None)?;
        let folder = readable(place.folder()).map_err(io("open the folder of"))?;
        let around = attributes::attributes(&folder).map_err(io("look at the folder of"))?;
        // Whoever could exchange the folder for one of somebody else would choose who gets the file.
        if to.is_none() && around.uid != metadata.parent_uid {
            return Err(VaultError::ParentChanged(to_path));
        }
        if attributes::is_firm(attributes::flags(&folder).map_err(io("look at the folder of"))?) {
            return Err(VaultError::Immutable(to_path));
        }
        let room = attributes::room(&folder).map_err(io("find room for"))?;
        if room.read_only || room.files == Some(0) {
            return Err(VaultError::NoFiles("where the file goes"));
        }
        if room.bytes < metadata.size {
            let needed = metadata.size;
            return Err(VaultError::NoRoom { on: "where the file goes", needed, free: room.bytes });
        }
        Ok(Prepared { kept: kept.clone(), reader, place, to: to_path, keep: to.is_some() })
    }

    /// A file that nobody sees, in the folder where it goes.
    fn unseen(&mut self, prepared: &Prepared) -> Result<Unseen, VaultError> {
        let io = || VaultError::io("make", &prepared.to);
        let folder = prepared.place.folder();
        if let Some(unseen) = Unseen::nameless(folder).map_err(io())? {
            return Ok(unseen);
        }
        let id = prepared.kept.id;
        let (to, keep) = (prepared.to.clone(), prepared.keep);
        self.note(Record::Restoring { id, to, object: None, keep })?;
        let made = private_folder(folder, &private_name(id)).and_then(|home| Unseen::named(home, INSIDE));
        made.map_err(|errno| {
            self.give_up(id, prepared, true);
            io()(errno)
        })
    }

    /// Ends a restore that did not come to a file. What cannot be ended now, [`Vault::recover`] ends.
    fn give_up(&mut self, id: VaultId, prepared: &Prepared, had_home: bool) {
        if had_home && remove_private(prepared.place.folder(), &private_name(id)).is_err() {
            return;
        }
        // Also where the record of the beginning failed: it may stand in the file all the same.
        let _ = self.note(Record::Settled { id });
    }

    /// The file stands in its place: the item goes, unless it is to stay.
    pub(super) fn finish_restore(
        &mut self,
        kept: &Kept,
        to: &PathBytes,
        keep: bool,
    ) -> Result<(), VaultError> {
        let id = kept.id;
        if keep {
            return self.note(Record::Copied { id });
        }
        let (path, sha256, size) = (to.clone(), kept.sha256, kept.size);
        self.note(Record::Restored { id, path, sha256, size, at_ms: now_ms() })?;
        self.remove_item(id)
    }

    /// Whether the last copy of this item was put at `to` and stands there, unchanged.
    ///
    /// # Errors
    /// If the place cannot be looked at.
    pub(crate) fn has_copy_at(&self, id: VaultId, to: &PathBytes) -> Result<bool, VaultError> {
        let (Some((kept, _)), Some(copy)) =
            (self.index.content.items.get(&id), self.index.content.copies.get(&id))
        else {
            return Ok(false);
        };
        let (Some(object), true) = (copy.object, copy.to == *to) else { return Ok(false) };
        let place = find(to, VaultError::NoParent)?;
        Ok(same_file(&place, to, object, kept.sha256)?.is_some())
    }

    /// Goes on with a restore that was cut off: true if its file stands in its place.
    pub(super) fn resume_restore(&mut self, kept: &Kept, attempt: &Attempt) -> Result<bool, VaultError> {
        let io = |doing| VaultError::io(doing, &attempt.to);
        let place = match find(&attempt.to, VaultError::NoParent) {
            Ok(place) => Some(place),
            Err(VaultError::NoParent(_) | VaultError::Symlink(_)) => None,
            Err(error) => return Err(error),
        };
        let mut is_there = false;
        if let Some(place) = &place {
            discard_private(place, kept.id, &attempt.to)?;
            if let Some(object) = attempt.object
                && let Some((file, _)) = same_file(place, &attempt.to, object, kept.sha256)?
            {
                // Read it anew: flags come last, and it may have been cut off before them.
                if let Ok(reader) = self.open_item(kept.id) {
                    mark(&file, reader.metadata().flags, &attempt.to)?;
                }
                sync_names(place.folder()).map_err(io("sync the folder of"))?;
                is_there = true;
            }
        }
        if is_there {
            self.finish_restore(kept, &attempt.to, attempt.keep)?;
        } else {
            self.note(Record::Settled { id: kept.id })?;
        }
        Ok(is_there)
    }
}

/// Removes what a restore left in its private folder. It is our own copy.
fn discard_private(place: &Place, id: VaultId, path: &PathBytes) -> Result<(), VaultError> {
    use crate::platform::create::find_private;
    let io = || VaultError::io("remove the private folder beside", path);
    match find_private(place.folder(), &private_name(id)) {
        Ok(Some(folder)) => {
            match rustix::fs::unlinkat(&folder, INSIDE, rustix::fs::AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(io()(errno)),
            }
            remove_private(place.folder(), &private_name(id)).map_err(io())
        }
        Ok(None) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(io()(errno)),
    }
}

/// Writes the content and compares its digest.
fn fill(prepared: &mut Prepared, unseen: &Unseen) -> Result<(), VaultError> {
    let id = prepared.kept.id;
    let on = |source| VaultError::Io { doing: "write", on: prepared.to.clone(), source };
    reserve(unseen.file(), prepared.reader.metadata().size).map_err(|errno| on(errno.into()))?;
    let mut file = unseen.file();
    let found = prepared.reader.content(|piece| file.write_all(piece)).map_err(|fault| match fault {
        ItemFault::Sink(source) => on(source),
        fault @ (ItemFault::Damaged(_) | ItemFault::Foreign | ItemFault::Read(_)) => item_error(id, fault),
    })?;
    is_expected(&prepared.kept, found)
}

fn is_expected(kept: &Kept, found: Sha256) -> Result<(), VaultError> {
    if found == kept.sha256 {
        Ok(())
    } else {
        Err(VaultError::Damaged(kept.id, "its digest is not the one in the index"))
    }
}

/// Gives the file all that belonged to it, but for its flags. Notes what the file system would not take.
fn dress(file: &File, metadata: &Metadata, set_id: bool, to: &PathBytes) -> Result<Vec<Failure>, VaultError> {
    let io = |doing| VaultError::io(doing, to);
    let mut notes = Vec::new();
    let mut mode = metadata.mode;
    // First of all: the kernel takes set-id bits and capabilities away with a change of owner.
    match attributes::set_owner(file, metadata.uid, metadata.gid) {
        Ok(()) => {}
        Err(errno) if is_unsupported(errno) => {
            let text = format!("its owner {}:{} cannot be set here: {errno}", metadata.uid, metadata.gid);
            notes.push(Failure::new("metadata", text));
            mode &= !SET_ID;
        }
        Err(errno) => return Err(io("set the owner of")(errno)),
    }
    for (name, value) in &metadata.xattrs {
        if name == CAPABILITY && !set_id {
            continue;
        }
        match attributes::set_xattr(file, name, value) {
            Ok(()) => {}
            Err(errno) if is_unsupported(errno) => {
                let text = format!("its attribute {} cannot be set here: {errno}", PathBytes(name.clone()));
                notes.push(Failure::new("metadata", text));
            }
            Err(errno) => return Err(io("set an attribute of")(errno)),
        }
    }
    if !set_id {
        mode &= !SET_ID;
    }
    attributes::set_mode(file, mode).map_err(io("set the mode of"))?;
    attributes::set_times(file, metadata.accessed, metadata.modified).map_err(io("set the times of"))?;
    Ok(notes)
}

/// Sets the flags, which would keep the file from getting its name, and makes that last.
fn mark(file: &File, flags: u32, to: &PathBytes) -> Result<Option<Failure>, VaultError> {
    if flags == 0 {
        return Ok(None);
    }
    match attributes::set_flags(file, flags) {
        Ok(()) => {}
        Err(errno) if is_unsupported(errno) || errno == Errno::NOTTY => {
            let text = format!("its flags (see lsattr) cannot be set here: {errno}");
            return Ok(Some(Failure::new("metadata", text)));
        }
        Err(errno) => return Err(VaultError::io("set the flags of", to)(errno)),
    }
    file.sync_all().map_err(|source| VaultError::Io { doing: "store", on: to.clone(), source })?;
    Ok(None)
}

/// What the file system or its mount does not do, as against what went wrong.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS | Errno::INVAL | Errno::NOSYS)
}

/// Looks at what stands under the name: `None` if it is not the file; else what it is like.
fn confirm(
    place: &Place,
    path: &PathBytes,
    object: Object,
    sha256: Sha256,
) -> Result<Option<Attributes>, VaultError> {
    let exact = match place.name() {
        Some(name) => is_object_at(place.folder(), name, object).map_err(VaultError::io("look at", path))?,
        None => false,
    };
    if exact { Ok(same_file(place, path, object, sha256)?.map(|(_, found)| found)) } else { Ok(None) }
}

/// Opens what stands under the name, if it has this inode and this content.
pub(super) fn same_file(
    place: &Place,
    path: &PathBytes,
    object: Object,
    sha256: Sha256,
) -> Result<Option<(File, Attributes)>, VaultError> {
    use crate::platform::fs::{Kind, OpenError};
    let io = |doing| VaultError::io(doing, path);
    let Some(name) = place.name() else { return Ok(None) };
    let facts = match facts_at(place.folder(), name) {
        Err(Errno::NOENT) => return Ok(None),
        other => other.map_err(io("look at"))?,
    };
    if facts.kind != Kind::Regular || !super::is_same_inode(facts.object(), object) {
        return Ok(None);
    }
    let file: File = match open_regular_at(place.folder(), name, &facts) {
        Ok(fd) => fd.into(),
        Err(OpenError::Gone | OpenError::Changed) => return Ok(None),
        Err(OpenError::Refused(errno)) => return Err(io("open")(errno)),
    };
    let found = attributes::attributes(file.as_fd()).map_err(io("look at"))?;
    let (content, _) = digest(&file, path)?;
    Ok((content == sha256).then_some((file, found)))
}

/// A note if the file is not any more what it was made to be.
fn differs(made: &Attributes, found: &Attributes) -> Option<Failure> {
    let alike = |a: &Attributes| (a.mode, a.uid, a.gid, a.modified, a.size);
    (alike(made) != alike(found))
        .then(|| Failure::new("metadata", "its owner, mode or times changed right after it was put back"))
}

/// A note if the file could make who runs it somebody else, and that is not restored.
fn withheld(metadata: &Metadata, set_id: bool) -> Vec<Failure> {
    let capable = metadata.xattrs.iter().any(|(name, _)| name == CAPABILITY);
    let what = match (metadata.mode & SET_ID != 0, capable) {
        (_, _) if set_id => return vec![],
        (false, false) => return vec![],
        (true, false) => "set-user-id and set-group-id bits were",
        (false, true) => "file capabilities were",
        (true, true) => "set-user-id and set-group-id bits and file capabilities were",
    };
    vec![Failure::new("set-id-withheld", format!("its {what} not restored"))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_withheld_is_said() {
        let plain = |mode: u32, capable: bool| Metadata {
            path: PathBytes(b"/a".to_vec()),
            size: 0,
            mode,
            uid: 0,
            gid: 0,
            accessed: (0, 0),
            modified: (0, 0),
            flags: 0,
            xattrs: if capable { vec![(CAPABILITY.to_vec(), vec![1])] } else { vec![] },
            xattrs_left_out: 0,
            links: 1,
            object: (0, 0),
            parent_uid: 0,
            vaulted_ms: 0,
            task: None,
        };
        for (mode, capable, set_id, said) in [
            (0o755, false, false, false),
            (0o4755, false, false, true),
            (0o2755, false, false, true),
            (0o755, true, false, true),
            (0o6755, true, true, false),
        ] {
            assert_eq!(
                !withheld(&plain(mode, capable), set_id).is_empty(),
                said,
                "{mode:o} {capable} {set_id}"
            );
        }
    }
}
