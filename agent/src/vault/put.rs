//! Taking a file into the vault.
//!
//! Order: look and compare; read, hash and seal into a new item; item, its folder and the index to disk; only
//! then the file is taken away ([`super::take`]), its folder goes to disk, and the index says so.
//!
//! **Invariant:** an error before the last step leaves the file as it was and no item.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use rustix::io::Errno;
use sha2::Digest as _;
use tm_protocol::{
    ids::{Sha256, TaskId, VaultId},
    report::{Failure, PathBytes, VaultEntry},
};
use uuid::Uuid;

use super::{
    Judged, Vault, VaultError, find,
    index::{Kept, Record, Why},
    item::{ItemWriter, Metadata, item_len},
    item_name, now_ms,
    seal::CHUNK,
    shown,
    take::{Target, Untaken, take},
};
use crate::platform::{
    attributes::{self, Attributes, Xattrs},
    create::{Unseen, is_within, readable},
    fs::{Kind, Object, OpenError, Place, Residence},
};

/// Bytes that stay free on the vault's file system, for the index, the journal and whoever else needs them.
const RESERVE: u64 = 1 << 20;

/// A file that was vaulted.
#[derive(Debug)]
pub(crate) struct Held {
    /// Its item.
    pub(crate) entry: VaultEntry,
    /// How many other names of the same file remain.
    pub(crate) other_links: u64,
    /// What an administrator should know besides: `other-links`, `metadata`, `immutable`, `unsettled`.
    pub(crate) notes: Vec<Failure>,
}

/// A file that would be vaulted.
#[derive(Debug)]
pub(crate) struct WouldHold {
    /// Digest of its content.
    pub(crate) sha256: Sha256,
    /// Its size, in bytes.
    pub(crate) size: u64,
    /// As in [`Held`].
    pub(crate) notes: Vec<Failure>,
}

/// A file that was looked at and is held open.
struct Examined {
    place: Place,
    path: PathBytes,
    file: File,
    seen: Attributes,
    xattrs: Xattrs,
    flags: u32,
    parent_uid: u32,
}

impl Vault {
    /// Takes the file at `path` into the vault, if it is what was judged.
    ///
    /// # Errors
    /// The file is then still in its place and whole, or it is in the vault and [`Vault::recover`] settles
    /// what is left to do.
    pub(crate) fn put(
        &mut self,
        path: &PathBytes,
        judged: Option<&Judged>,
        task: Option<TaskId>,
    ) -> Result<Held, VaultError> {
        let examined = self.examine(path, judged)?;
        let id = VaultId::new(Uuid::now_v7());
        let metadata = examined.metadata(task);
        let stored = self.check_room(&metadata)?;
        let sha256 = self.write_item(id, &examined, &metadata, stored, judged)?;
        let kept = Kept {
            id,
            path: path.clone(),
            sha256,
            size: metadata.size,
            stored,
            vaulted_ms: metadata.vaulted_ms,
            task,
            object: metadata.object,
            flags: metadata.flags,
        };
        let entry = kept.entry();
        let noted = self.note(Record::Held(kept));
        let mut notes = examined.notes();
        let taken = noted.map_err(Untaken::Intact).and_then(|()| examined.take(id, sha256));
        match taken {
            Ok(()) => {}
            Err(Untaken::Intact(error)) => {
                self.undo(id, &examined);
                return Err(error);
            }
            Err(Untaken::Unclear(error)) => return Err(error),
        }
        // The file is in the vault and gone from its place, whatever becomes of this record.
        if let Err(error) = self.note(Record::Done { id }) {
            notes.push(unsettled(&error));
        }
        Ok(Held { entry, other_links: examined.seen.links.saturating_sub(1), notes })
    }

    /// Everything that [`Vault::put`] would check; nothing is changed.
    ///
    /// # Errors
    /// Those of [`Vault::put`].
    pub(crate) fn check(&self, path: &PathBytes, judged: Option<&Judged>) -> Result<WouldHold, VaultError> {
        let examined = self.examine(path, judged)?;
        self.check_room(&examined.metadata(None))?;
        let (sha256, _) = digest(&examined.file, path)?;
        examined.still(judged, sha256)?;
        Ok(WouldHold { sha256, size: examined.seen.size, notes: examined.notes() })
    }

    fn examine(&self, path: &PathBytes, judged: Option<&Judged>) -> Result<Examined, VaultError> {
        let io = |doing| VaultError::io(doing, path);
        let place = find(path, VaultError::Gone)?;
        let facts = place.facts().map_err(|errno| match errno {
            Errno::NOENT => VaultError::Gone(path.clone()),
            errno => io("look at")(errno),
        })?;
        match facts.kind {
            Kind::Regular => {}
            Kind::Symlink => return Err(VaultError::Symlink(path.clone())),
            Kind::Folder => return Err(VaultError::NotRegular(path.clone(), "a folder")),
            Kind::Special => return Err(VaultError::NotRegular(path.clone(), "a device, socket or fifo")),
        }
        local(place.residence(), path)?;
        self.refuse_own(&place, path, Some(facts.object()))?;
        let parent = readable(place.folder()).map_err(io("open the folder of"))?;
        if attributes::is_firm(attributes::flags(&parent).map_err(io("look at the folder of"))?) {
            return Err(VaultError::Immutable(folder_of(path)));
        }
        if attributes::room(&parent).map_err(io("look at the folder of"))?.read_only {
            return Err(io("remove")(Errno::ROFS));
        }
        let file: File = match place.open_regular(&facts) {
            Ok(fd) => fd.into(),
            Err(OpenError::Gone) => return Err(VaultError::Gone(path.clone())),
            Err(OpenError::Changed) => {
                return Err(VaultError::Changed(
                    path.clone(),
                    "was exchanged while it was opened".to_owned(),
                ));
            }
            Err(OpenError::Refused(errno)) => return Err(io("open")(errno)),
        };
        let seen = attributes::attributes(&file).map_err(io("look at"))?;
        if let Some(judged) = judged {
            if judged.object.is_some_and(|object| object != seen.object) {
                return Err(VaultError::Changed(path.clone(), "is another file than was judged".to_owned()));
            }
            if judged.size != seen.size {
                let text = format!("has {} bytes, and {} when it was judged", seen.size, judged.size);
                return Err(VaultError::Changed(path.clone(), text));
            }
        }
        let xattrs = attributes::xattrs(&file).map_err(io("read the attributes of"))?;
        let flags = attributes::flags(&file).map_err(io("read the flags of"))?;
        let parent_uid = attributes::attributes(&parent).map_err(io("look at the folder of"))?.uid;
        Ok(Examined { place, path: path.clone(), file, seen, xattrs, flags, parent_uid })
    }

    /// Refuses what belongs to the agent.
    pub(super) fn refuse_own(
        &self,
        place: &Place,
        path: &PathBytes,
        object: Option<Object>,
    ) -> Result<(), VaultError> {
        let is_own = object.is_some_and(|object| self.own.contains(&object));
        let within = is_within(place.folder(), &self.own).map_err(VaultError::io("look around", path))?;
        if is_own || within { Err(VaultError::OwnFile(path.clone())) } else { Ok(()) }
    }

    /// Whether the item fits. How long it will be.
    fn check_room(&self, metadata: &Metadata) -> Result<u64, VaultError> {
        let on = &metadata.path;
        let needed = item_len(metadata).map_err(|source| VaultError::Io {
            doing: "describe",
            on: on.clone(),
            source,
        })?;
        let (used, quota) = (self.used(), self.limits.quota_bytes);
        if used.saturating_add(needed) > quota {
            return Err(VaultError::Full { used, quota, needed });
        }
        let room = attributes::room(&self.items).map_err(VaultError::io("find room for", on))?;
        if room.read_only || room.files == Some(0) {
            return Err(VaultError::NoFiles("in the vault"));
        }
        if room.bytes < needed.saturating_add(RESERVE) {
            let needed = needed.saturating_add(RESERVE);
            return Err(VaultError::NoRoom { on: "in the vault", needed, free: room.bytes });
        }
        Ok(needed)
    }

    /// Makes the item, durably. On error there is none.
    fn write_item(
        &self,
        id: VaultId,
        examined: &Examined,
        metadata: &Metadata,
        stored: u64,
        judged: Option<&Judged>,
    ) -> Result<Sha256, VaultError> {
        let io = |doing| VaultError::io(doing, &examined.path);
        let unseen = match Unseen::nameless(&self.items).map_err(io("make an item for"))? {
            Some(unseen) => unseen,
            None => {
                let items = readable(&self.items).map_err(io("make an item for"))?;
                let name = [item_name(id).as_bytes(), super::PART].concat();
                let name = std::ffi::CString::new(name).expect("neither part has a zero byte");
                Unseen::named(items, &name).map_err(io("make an item for"))?
            }
        };
        let made = self.fill_item(&unseen, id, examined, metadata, stored).and_then(|sha256| {
            examined.still(judged, sha256)?;
            let on =
                |source| VaultError::Io { doing: "store the item of", on: examined.path.clone(), source };
            unseen.file().sync_all().map_err(on)?;
            unseen.publish(&self.items, &item_name(id)).map_err(io("store the item of"))?;
            Ok(sha256)
        });
        let sha256 = match made {
            Ok(sha256) => sha256,
            Err(error) => {
                unseen.discard();
                return Err(error);
            }
        };
        if let Err(errno) = rustix::fs::fsync(&self.items) {
            let _ = self.remove_item(id);
            return Err(VaultError::io("sync the folder of item", &shown(id))(errno));
        }
        Ok(sha256)
    }

    fn fill_item(
        &self,
        unseen: &Unseen,
        id: VaultId,
        examined: &Examined,
        metadata: &Metadata,
        stored: u64,
    ) -> Result<Sha256, VaultError> {
        let on = |source| VaultError::Io { doing: "write the item of", on: examined.path.clone(), source };
        reserve(unseen.file(), stored).map_err(|errno| on(errno.into()))?;
        let mut writer = ItemWriter::begin(unseen.file(), &self.key, id, metadata).map_err(on)?;
        let read = each_piece(&examined.file, &examined.path, metadata.size, |piece| {
            writer.push(piece).map_err(on)
        })?;
        if read != metadata.size {
            return Err(VaultError::Changed(examined.path.clone(), "changed while it was read".to_owned()));
        }
        writer.finish().map_err(on)
    }

    /// Takes back what was done so far. What cannot be taken back now, [`Vault::recover`] does.
    fn undo(&mut self, id: VaultId, examined: &Examined) {
        let _ = attributes::set_flags(&examined.file, examined.flags);
        let _ = self.note(Record::Dropped { id, why: Why::Undone });
        let _ = self.remove_item(id);
    }
}

impl Examined {
    fn metadata(&self, task: Option<TaskId>) -> Metadata {
        Metadata {
            path: self.path.clone(),
            size: self.seen.size,
            mode: self.seen.mode,
            uid: self.seen.uid,
            gid: self.seen.gid,
            accessed: self.seen.accessed,
            modified: self.seen.modified,
            flags: self.flags,
            xattrs: self.xattrs.all.clone(),
            xattrs_left_out: self.xattrs.left_out,
            links: self.seen.links,
            object: (self.seen.object.device, self.seen.object.inode),
            parent_uid: self.parent_uid,
            vaulted_ms: now_ms(),
            task,
        }
    }

    /// Whether the file is what was judged, and did not change while it was read.
    fn still(&self, judged: Option<&Judged>, sha256: Sha256) -> Result<(), VaultError> {
        let now = attributes::attributes(&self.file).map_err(VaultError::io("look at", &self.path))?;
        let is_other = (now.size, now.modified) != (self.seen.size, self.seen.modified);
        // A new name or mode changes this time too, and whoever owns the file can give it one all the time.
        if is_other || (now.changed != self.seen.changed && digest(&self.file, &self.path)?.0 != sha256) {
            return Err(VaultError::Changed(self.path.clone(), "changed while it was read".to_owned()));
        }
        if judged.is_some_and(|judged| judged.sha256 != sha256) {
            return Err(VaultError::Changed(
                self.path.clone(),
                "has other content than was judged".to_owned(),
            ));
        }
        Ok(())
    }

    fn take(&self, id: VaultId, sha256: Sha256) -> Result<(), Untaken> {
        let Some(name) = self.place.name() else {
            return Err(Untaken::Intact(VaultError::NotRegular(self.path.clone(), "a folder")));
        };
        if attributes::is_firm(self.flags) && attributes::loosen(&self.file).is_err() {
            return Err(Untaken::Intact(VaultError::Immutable(self.path.clone())));
        }
        take(Target {
            id,
            path: &self.path,
            parent: self.place.folder(),
            name,
            object: self.seen.object,
            sha256,
            seen: Some(&self.seen),
        })
    }

    fn notes(&self) -> Vec<Failure> {
        let mut notes = Vec::new();
        let others = self.seen.links.saturating_sub(1);
        if others > 0 {
            let names = if others == 1 { "name" } else { "names" };
            notes
                .push(Failure::new("other-links", format!("{others} other {names} of the same file remain")));
        }
        if self.xattrs.left_out > 0 {
            let text = format!("{} extended attributes cannot be kept", self.xattrs.left_out);
            notes.push(Failure::new("metadata", text));
        }
        if attributes::is_firm(self.flags) {
            notes.push(Failure::new("immutable", "the file was marked immutable or append-only"));
        }
        notes
    }
}

/// Refuses file systems that are not of this machine.
pub(super) fn local(residence: Result<Residence, Errno>, path: &PathBytes) -> Result<(), VaultError> {
    match residence.map_err(VaultError::io("look at", path))? {
        Residence::Local => Ok(()),
        Residence::Pseudo => {
            Err(VaultError::Residence(path.clone(), "a file system that the kernel makes up"))
        }
        Residence::Remote => Err(VaultError::Residence(path.clone(), "a remote file system")),
    }
}

/// Asks for room ahead, so that a full disk is known before work is done. Not every file system can.
pub(super) fn reserve(file: &File, len: u64) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        other => other,
    }
}

/// Reads a file from its beginning, at most `most` bytes and one more; how many there were.
fn each_piece(
    file: &File,
    path: &PathBytes,
    most: u64,
    mut sink: impl FnMut(&[u8]) -> Result<(), VaultError>,
) -> Result<u64, VaultError> {
    let mut piece = vec![0; CHUNK];
    let mut at = 0;
    // A file that grows while it is read must not be read for ever.
    while at <= most {
        let n = match file.read_at(&mut piece, at) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(VaultError::Io { doing: "read", on: path.clone(), source }),
        };
        if n == 0 {
            break;
        }
        sink(piece.get(..n).unwrap_or_default())?;
        at += u64::try_from(n).unwrap_or(u64::MAX);
    }
    Ok(at)
}

/// Digest and length of a file's content, from its beginning.
pub(super) fn digest(file: &File, path: &PathBytes) -> Result<(Sha256, u64), VaultError> {
    let mut hasher = sha2::Sha256::new();
    let most = attributes::attributes(file).map_err(VaultError::io("look at", path))?.size;
    let len = each_piece(file, path, most, |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    let digest: [u8; 32] = hasher.finalize().into();
    Ok((Sha256::new(digest), len))
}

/// The step took effect and could not be noted.
pub(super) fn unsettled(error: &VaultError) -> Failure {
    let text = format!("it is done, but the vault could not note it: {}", super::error::chain(error));
    Failure::new("unsettled", text)
}

fn folder_of(path: &PathBytes) -> PathBytes {
    let end = path.0.iter().rposition(|b| *b == b'/').unwrap_or(0).max(1);
    PathBytes(path.0.get(..end).unwrap_or_default().to_vec())
}
