//! The vault: an inert, encrypted keep of removed files, from which each can be put back.
//!
//! On disk, below the state folder and for root alone: `vault/lock` (held while somebody works on the vault;
//! it names the process), `vault/key` ([`key`]), `vault/index` ([`index`]), `vault/items/<id>` ([`item`]).
//!
//! **Invariant:** a file is removed from its place only after its item is whole and durable, and only the very
//! file that was read: same object, same content, taken through held descriptors, whoever changes names
//! around it meanwhile.
//! **Invariant:** an item is removed only after its file is back and durable, or because that was asked for.
//! **Invariant:** after a crash or an error at any point, [`Vault::recover`] ends with exactly one of: the
//! file in its place and no item, or an item and no file. It may itself be cut off and called again.
//! **Invariant:** nothing is ever put over an existing name, and no link is followed on the way to one.
//! **Invariant:** the vault's own files and the state folder are neither vaulted nor restored into.

mod b64;
mod error;
mod index;
mod item;
mod key;
mod purge;
mod put;
mod recover;
mod restore;
mod seal;
pub(crate) mod standalone;
mod take;

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags},
    io::Errno,
};
use tm_protocol::{
    ids::{Sha256, TaskId, VaultId},
    report::{PathBytes, VaultEntry},
};

pub(crate) use self::{
    error::VaultError,
    index::RestoredBefore,
    purge::{Purge, Purged},
    recover::Recovered,
};
use self::{
    index::{End, Index, State},
    item::{ItemFault, ItemReader},
    key::VaultKey,
};
use crate::{
    paths::{Paths, make_folder, sync_folder},
    platform::{
        attributes,
        fs::{Object, Place},
    },
};

/// How long another user of the vault is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// How much is kept, and for how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most bytes in items.
    pub(crate) quota_bytes: u64,
    /// How long items are kept before [`Purge::OlderThan`] may take them without being told an age, and how
    /// long it is remembered that an item was put back.
    pub(crate) retention: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { quota_bytes: 5 << 30, retention: Duration::from_secs(90 * 24 * 3600) }
    }
}

/// What a file must be to be vaulted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Judged {
    /// The object on disk; `None` where only content binds (device numbers may change with a boot).
    pub(crate) object: Option<Object>,
    /// Digest of its content.
    pub(crate) sha256: Sha256,
    /// Its size, in bytes.
    pub(crate) size: u64,
}

/// The vault of one state folder, held against other processes.
#[derive(Debug)]
pub(crate) struct Vault {
    folder: PathBuf,
    items: OwnedFd,
    index: Index,
    key: VaultKey,
    limits: Limits,
    /// Folders and files that are never touched.
    own: Vec<Object>,
    /// Held as long as this value lives.
    _lock: File,
}

impl Vault {
    /// Opens the vault, and makes it at first use. Waits up to 5 s for another process to leave it. What an
    /// interruption left is not settled by this: [`Vault::recover`] does.
    ///
    /// # Errors
    /// `in-use`, `no-key`, or whatever the system says.
    pub(crate) fn open(paths: &Paths, limits: Limits) -> Result<Self, VaultError> {
        let folder = paths.vault();
        let items = items_folder(&folder);
        let is_new = !folder.is_dir();
        on_path(make_folder(&folder), "make", &folder)?;
        let lock = lock(&folder.join("lock"))?;
        on_path(make_folder(&items), "make", &items)?;
        if is_new {
            on_path(sync_folder(paths.root()), "sync", paths.root())?;
        }
        let items_fd = open_folder(&items)?;
        let may_make = on_path(has_no_item(&items), "list", &items)?;
        // Syncs the vault's folder when it makes a key, and with it the folder of items.
        let key = VaultKey::load(&folder.join("key"), may_make)?;
        let path = index_file(&folder);
        let had_index = path.exists();
        let index = on_path(Index::open(&path), "open", &path)?;
        if !had_index {
            on_path(sync_folder(&folder), "sync", &folder)?;
        }
        let own = [paths.root(), &folder, &items, Path::new("/proc/self/exe")]
            .into_iter()
            .map(|path| {
                let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
                fd.and_then(attributes::attributes)
                    .map(|found| found.object)
                    .map_err(VaultError::io("look at", &bytes(path)))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { folder, items: items_fd, index, key, limits, own, _lock: lock })
    }

    /// What the vault holds, oldest first.
    pub(crate) fn list(&self) -> Vec<VaultEntry> {
        entries(&self.index)
    }

    /// One item.
    pub(crate) fn entry(&self, id: VaultId) -> Option<VaultEntry> {
        self.index.content.items.get(&id).map(|(kept, _)| kept.entry())
    }

    /// What this task vaulted from this place already.
    pub(crate) fn find(&self, task: TaskId, path: &PathBytes) -> Option<VaultEntry> {
        let mut items = self.index.content.items.values();
        items.find(|(kept, _)| kept.task == Some(task) && kept.path == *path).map(|(kept, _)| kept.entry())
    }

    /// An item that was put back to its place earlier and is no longer held. Forgotten after the retention.
    pub(crate) fn restored(&self, id: VaultId) -> Option<RestoredBefore> {
        match self.index.content.ended.get(&id)? {
            End::Restored(before) => Some(before.clone()),
            End::Dropped(_) => None,
        }
    }

    /// Bytes that items take.
    fn used(&self) -> u64 {
        self.index.content.items.values().map(|(kept, _)| kept.stored).sum()
    }

    /// Notes a step of an item, durably.
    fn note(&mut self, record: index::Record) -> Result<(), VaultError> {
        let noted = self.index.note(record);
        on_path(noted, "write", &index_file(&self.folder))
    }

    fn open_item(&self, id: VaultId) -> Result<ItemReader, VaultError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.items, item_name(id), flags, Mode::empty()) {
            Err(Errno::NOENT) => return Err(VaultError::Damaged(id, "its file is missing")),
            Err(Errno::LOOP) => return Err(VaultError::Damaged(id, "its file is a link")),
            other => other.map_err(VaultError::io("open item", &shown(id)))?,
        };
        ItemReader::open(file.into(), &self.key, id).map_err(|fault| item_error(id, fault))
    }

    /// Removes an item's file, if it is there, durably.
    fn remove_item(&self, id: VaultId) -> Result<(), VaultError> {
        match rustix::fs::unlinkat(&self.items, item_name(id), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(VaultError::io("remove item", &shown(id))(errno)),
        }
        rustix::fs::fsync(&self.items).map_err(VaultError::io("sync the folder of item", &shown(id)))
    }
}

/// What the vault of a state folder holds, read without holding it against others.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// Oldest first.
    pub(crate) entries: Vec<VaultEntry>,
    /// Damaged records of the index.
    pub(crate) damaged: u64,
    /// Items that are not in the index or were interrupted: [`Vault::recover`] settles them.
    pub(crate) unsettled: u64,
}

/// Lists a vault without changing anything; one that was never used is empty.
///
/// # Errors
/// Whatever the system says.
pub(crate) fn look(paths: &Paths) -> Result<Listing, VaultError> {
    let folder = paths.vault();
    let path = index_file(&folder);
    if !path.exists() && !items_folder(&folder).exists() {
        return Ok(Listing::default());
    }
    let index = on_path(Index::open(&path), "open", &path)?;
    let items = items_folder(&folder);
    let names =
        on_path(fs::read_dir(&items).and_then(Iterator::collect::<Result<Vec<_>, _>>), "list", &items)?;
    let is_known = |name: &[u8]| {
        let id = std::str::from_utf8(name).ok().and_then(|name| name.parse::<VaultId>().ok());
        id.is_some_and(|id| index.content.items.contains_key(&id))
    };
    let unknown = names.iter().filter(|entry| !is_known(entry.file_name().as_bytes())).count();
    let interrupted = index.content.items.values().filter(|(_, state)| *state != State::Kept).count();
    Ok(Listing {
        entries: entries(&index),
        damaged: index.content.damaged,
        unsettled: u64::try_from(unknown + interrupted).unwrap_or(u64::MAX),
    })
}

/// Changes whenever anybody changes the vault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation(u64, u64, SystemTime);

/// The vault's generation; `None` if it was never used.
pub(crate) fn generation(paths: &Paths) -> Option<Generation> {
    use std::os::unix::fs::MetadataExt as _;
    let index = fs::symlink_metadata(index_file(&paths.vault())).ok()?;
    Some(Generation(index.ino(), index.len(), index.modified().ok()?))
}

fn entries(index: &Index) -> Vec<VaultEntry> {
    index.content.items.values().map(|(kept, _)| kept.entry()).collect()
}

fn index_file(folder: &Path) -> PathBuf {
    folder.join("index")
}

fn items_folder(folder: &Path) -> PathBuf {
    folder.join("items")
}

/// Takes the vault for this process.
fn lock(path: &Path) -> Result<File, VaultError> {
    let nofollow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(nofollow);
    let mut file = on_path(options.open(path), "open", path)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(Duration::from_millis(50)),
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = (&mut file).take(16).read_to_string(&mut pid);
                return Err(VaultError::InUse(pid.trim().to_owned()));
            }
            Err(TryLockError::Error(source)) => return on_path(Err(source), "lock", path),
        }
    }
    // For people who find the vault in use; without it, it is held all the same.
    let _ =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn open_folder(path: &Path) -> Result<OwnedFd, VaultError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(VaultError::io("open", &bytes(path)))
}

/// Whether there is nothing that an older key could be needed for.
fn has_no_item(items: &Path) -> std::io::Result<bool> {
    for entry in fs::read_dir(items)? {
        if !entry?.file_name().as_bytes().ends_with(PART) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How the name of an item ends that is not whole, on file systems that have no files without a name.
const PART: &[u8] = b".part";

fn item_name(id: VaultId) -> CString {
    CString::new(id.to_string()).expect("an id has no zero byte")
}

fn shown(id: VaultId) -> PathBytes {
    PathBytes(id.to_string().into_bytes())
}

/// What a folder of our own is called while an item's file is in between.
fn private_name(id: VaultId) -> CString {
    CString::new(format!(".tm-{id}")).expect("an id has no zero byte")
}

fn item_error(id: VaultId, fault: ItemFault) -> VaultError {
    match fault {
        ItemFault::Damaged(why) => VaultError::Damaged(id, why),
        ItemFault::Foreign => VaultError::Foreign(id),
        ItemFault::Read(source) => VaultError::Io { doing: "read item", on: shown(id), source },
        ItemFault::Sink(source) => {
            VaultError::Io { doing: "write the content of item", on: shown(id), source }
        }
    }
}

/// Goes to where `path` is; the path must be absolute and without `.` and `..`.
fn find(path: &PathBytes, missing: fn(PathBytes) -> VaultError) -> Result<Place, VaultError> {
    let relative = path.0.split(|b| *b == b'/').any(|name| name == b"." || name == b"..");
    if path.0.first() != Some(&b'/') || relative || path.0.contains(&0) {
        return Err(VaultError::BadPath(path.clone()));
    }
    Place::find(&path.0).map_err(|errno| match errno {
        Errno::NOENT | Errno::NOTDIR => missing(path.clone()),
        Errno::LOOP => VaultError::Symlink(path.clone()),
        errno => VaultError::io("reach", path)(errno),
    })
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

fn bytes(path: &Path) -> PathBytes {
    PathBytes(path.as_os_str().as_bytes().to_vec())
}

fn on_path<T>(result: std::io::Result<T>, doing: &'static str, path: &Path) -> Result<T, VaultError> {
    result.map_err(|source| VaultError::Io { doing, on: bytes(path), source })
}

/// Whether this is the object, given that content is compared as well. Device numbers may have changed since
/// with a boot.
fn is_same_inode(a: Object, b: Object) -> bool {
    a.inode == b.inode
}
