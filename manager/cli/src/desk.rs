//! The trust folder: the keys that sign patterns, which lie on an administrator's desk and nowhere else.
//!
//! On disk (folder 0700, files 0600): `keys/ROLE-ID.key` (the format is `tm_patterns::trust`'s; sealed with a
//! passphrase where one was given; `.retired` behind the name once a rotation took it out of use), `set.json` (the
//! metadata as last seen and judged here), `pending.json` (what `init` signed, until the manager has it).
//!
//! **Invariant:** a secret key is on disk before anything that it signed leaves this machine.
//! **Invariant:** what was seen is not believed undone: a manager that goes back is noticed.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use tm_api::trust::PublishTrust;
use tm_patterns::trust::{self, Bundle, Delegate, KeyError, SigningKey, TrustError, Verified};
use tm_protocol::ids::Sha256;
use zeroize::Zeroizing;

/// A role whose keys lie on desks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seat {
    /// Names all keys.
    Root,
    /// Names the keys of the roles that list patterns.
    Targets,
    /// Lists patterns.
    Role(Delegate),
}

impl Seat {
    /// Every one.
    pub(crate) const ALL: [Self; 5] = [
        Self::Root,
        Self::Targets,
        Self::Role(Delegate::Detect),
        Self::Role(Delegate::Cleanup),
        Self::Role(Delegate::Expert),
    ];

    /// Its word.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Targets => "targets",
            Self::Role(role) => role.word(),
        }
    }

    /// The one with this word.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|seat| seat.word() == word)
    }
}

/// Why nothing can be signed here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeskError {
    /// Nowhere to look.
    #[error("no trust folder was named, and there is no home folder to look in")]
    Nowhere,
    /// Another step comes first.
    #[error("this desk has no root of trust: there is nothing in `{}`", .0.display())]
    NoTrust(PathBuf),
    /// Somebody else made one.
    #[error("the fleet already has a root of trust, and it is not the one in `{}`", .0.display())]
    Foreign(PathBuf),
    /// The folder is in use.
    #[error("`{}` already holds a root of trust that the manager does not know", .0.display())]
    Exists(PathBuf),
    /// A file of the folder.
    #[error("cannot {verb} `{}`", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it did not work.
        source: io::Error,
    },
    /// A key of the folder.
    #[error("cannot use the key `{}`", path.display())]
    Key {
        /// Which.
        path: PathBuf,
        /// Why.
        source: KeyError,
    },
    /// No key for what is to be signed.
    #[error("there is no key of the role `{role}` in `{}`", folder.display())]
    NoKey {
        /// Which role.
        role: &'static str,
        /// Where.
        folder: PathBuf,
    },
    /// A file here or at the manager is not what it should be.
    #[error("{what}: {source} ({code})", code = source.code())]
    Metadata {
        /// Which.
        what: &'static str,
        /// Why.
        source: TrustError,
    },
    /// A draft is not one.
    #[error("`{}` is no draft of a pattern", .0.display())]
    Draft(PathBuf),
    /// More desks must sign.
    #[error("the role `{role}` needs {needed} signatures, and there are {found}")]
    Signatures {
        /// Which.
        role: &'static str,
        /// How many.
        needed: u64,
        /// How many there are.
        found: u64,
    },
    /// The manager has other bytes than this machine.
    #[error("the manager stored {theirs} for the bytes that are {ours} here; nothing was signed")]
    OtherBytes {
        /// By this machine.
        ours: Sha256,
        /// By the manager.
        theirs: String,
    },
    /// The version is listed, and another publication would not do what was asked.
    #[error("this version is published already, and {0}")]
    InForce(&'static str),
    /// The pattern that was named is not listed.
    #[error("the role `{role}` lists no pattern `{name}`")]
    NotListed {
        /// Which role.
        role: &'static str,
        /// What was named.
        name: String,
    },
}

impl DeskError {
    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Nowhere => "name one with --trust or TMCTL_TRUST",
            Self::NoTrust(_) => {
                "make one (tmctl pattern trust init), or name the folder that holds it (--trust, TMCTL_TRUST)"
            }
            Self::Foreign(_) => {
                "ask who made it for the folder, or for a key of your own in it (trust add-key)"
            }
            Self::Exists(_) => "name another folder (--trust, TMCTL_TRUST), or move this one away",
            Self::Key { source: KeyError::Sealed | KeyError::Passphrase, .. } => {
                "name the file with the passphrase (--passphrase-file, TMCTL_PASSPHRASE_FILE)"
            }
            Self::NoKey { .. } => {
                "sign on the desk that has one, or have one added (tmctl pattern trust add-key)"
            }
            Self::Metadata { source: TrustError::Rollback { .. }, .. } => {
                "the manager lost what was published (an old copy?): give it back with tmctl pattern trust repair"
            }
            Self::Signatures { .. } => {
                "write a draft, have each desk sign it, and publish it: tmctl pattern draft|sign|publish"
            }
            Self::InForce(_) => "see how far it is: tmctl pattern rollout list",
            Self::File { .. }
            | Self::Key { .. }
            | Self::Metadata { .. }
            | Self::Draft(_)
            | Self::OtherBytes { .. }
            | Self::NotListed { .. } => return None,
        };
        Some(hint.to_owned())
    }

    /// Whether it is a refusal rather than a fault.
    pub(crate) const fn is_refusal(&self) -> bool {
        match self {
            Self::Foreign(_) | Self::Exists(_) | Self::NoTrust(_) | Self::NoKey { .. } | Self::InForce(_) => {
                true
            }
            Self::Metadata { .. } | Self::OtherBytes { .. } | Self::Signatures { .. } => true,
            Self::Nowhere | Self::File { .. } | Self::Key { .. } | Self::Draft(_) => false,
            Self::NotListed { .. } => false,
        }
    }
}

/// A trust folder.
#[derive(Debug)]
pub(crate) struct Desk {
    folder: PathBuf,
    passphrase: Option<Zeroizing<Vec<u8>>>,
}

impl Desk {
    /// The one in `folder`, its keys sealed with what stands in the first line of a file.
    ///
    /// # Errors
    /// If that file cannot be read.
    pub(crate) fn open(folder: PathBuf, passphrase_file: Option<&Path>) -> Result<Self, DeskError> {
        let passphrase = passphrase_file
            .map(|path| {
                let text = fs::read_to_string(path).map(Zeroizing::new);
                let text = text.map_err(|source| file("read", path, source))?;
                Ok(Zeroizing::new(text.lines().next().unwrap_or_default().as_bytes().to_vec()))
            })
            .transpose()?;
        Ok(Self { folder, passphrase })
    }

    /// Where it is.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether there are keys.
    pub(crate) fn has_keys(&self) -> bool {
        self.folder.join("keys").exists()
    }

    /// The metadata as last seen here.
    ///
    /// # Errors
    /// If they are damaged.
    pub(crate) fn seen(&self) -> Result<Option<Verified>, DeskError> {
        let Some(bytes) = read(&self.folder.join("set.json"))? else { return Ok(None) };
        let what = "the metadata in the trust folder";
        Bundle::parse(&bytes)
            .and_then(Verified::restore)
            .map(Some)
            .map_err(|source| DeskError::Metadata { what, source })
    }

    /// Notes what was seen.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub(crate) fn keep_seen(&self, set: &Verified) -> Result<(), DeskError> {
        write(&self.folder.join("set.json"), &set.bundle().to_bytes())
    }

    /// The digest that enrollment tokens carry.
    ///
    /// # Errors
    /// As [`Desk::seen`].
    pub(crate) fn root_digest(&self) -> Result<Option<Sha256>, DeskError> {
        let seen = self.seen()?;
        Ok(seen.and_then(|set| set.bundle().roots.last().map(|text| trust::root_digest(text))))
    }

    /// The keys of a role that are here.
    ///
    /// # Errors
    /// If one cannot be read.
    pub(crate) fn keys(&self, seat: Seat) -> Result<Vec<SigningKey>, DeskError> {
        let folder = self.folder.join("keys");
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(file("list", &folder, source)),
        };
        let mut paths: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                name.ends_with(".key") && name.starts_with(&format!("{}-", seat.word()))
            })
            .collect();
        paths.sort();
        let passphrase = self.passphrase.as_ref().map(|text| text.as_slice());
        paths
            .into_iter()
            .map(|path| {
                let text = fs::read_to_string(&path).map(Zeroizing::new);
                let text = text.map_err(|source| file("read", &path, source))?;
                SigningKey::from_text(&text, passphrase).map_err(|source| DeskError::Key { path, source })
            })
            .collect()
    }

    /// The same; without any it is an error.
    ///
    /// # Errors
    /// As [`Desk::keys`], or if there is none.
    pub(crate) fn some_keys(&self, seat: Seat) -> Result<Vec<SigningKey>, DeskError> {
        let keys = self.keys(seat)?;
        if keys.is_empty() {
            return Err(DeskError::NoKey { role: seat.word(), folder: self.folder.clone() });
        }
        Ok(keys)
    }

    /// Makes a key for a role and keeps it.
    ///
    /// # Errors
    /// If it cannot be made or kept.
    pub(crate) fn new_key(&self, seat: Seat) -> Result<SigningKey, DeskError> {
        let folder = self.folder.join("keys");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|source| file("make", &folder, source))?;
        let bad = |source| DeskError::Key { path: folder.clone(), source };
        let key = SigningKey::generate().map_err(bad)?;
        let text = key.to_text(self.passphrase.as_ref().map(|text| text.as_slice())).map_err(bad)?;
        write(&self.key_path(seat, &key), text.as_bytes())?;
        Ok(key)
    }

    /// Takes a key out of use; its file stays, renamed.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub(crate) fn retire(&self, seat: Seat, key: &SigningKey) -> Result<(), DeskError> {
        let path = self.key_path(seat, key);
        fs::rename(&path, path.with_extension("key.retired")).map_err(|source| file("rename", &path, source))
    }

    fn key_path(&self, seat: Seat, key: &SigningKey) -> PathBuf {
        let id = key.id();
        self.folder.join("keys").join(format!("{}-{}.key", seat.word(), id.get(..16).unwrap_or(&id)))
    }

    /// What `init` signed and the manager may not have.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn pending(&self) -> Result<Option<PublishTrust>, DeskError> {
        let path = self.folder.join("pending.json");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let pending = serde_json::from_slice(&bytes);
        pending.map(Some).map_err(|source| file("read", &path, source.into()))
    }

    /// Keeps it.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub(crate) fn keep_pending(&self, change: &PublishTrust) -> Result<(), DeskError> {
        let bytes = serde_json::to_vec(change).expect("texts are JSON");
        write(&self.folder.join("pending.json"), &bytes)
    }

    /// Forgets it.
    pub(crate) fn forget_pending(&self) {
        // Left over it does no harm: the manager refuses to have it twice.
        let _ = fs::remove_file(self.folder.join("pending.json"));
    }
}

fn file(verb: &'static str, path: &Path, source: io::Error) -> DeskError {
    DeskError::File { verb, path: path.to_path_buf(), source }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, DeskError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(file("read", path, source)),
    }
}

/// Writes a file of the folder whole, for its owner alone.
fn write(path: &Path, bytes: &[u8]) -> Result<(), DeskError> {
    let beside = path.with_extension("new");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&beside, path))
        .and_then(|()| File::open(path.parent().unwrap_or(path))?.sync_all());
    written.map_err(|source| file("write", path, source))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_kept_for_their_owner_alone_and_found_by_role() {
        let folder = tempfile::tempdir().unwrap();
        let desk = Desk::open(folder.path().join("trust"), None).unwrap();
        assert!(!desk.has_keys());
        let key = desk.new_key(Seat::Role(Delegate::Detect)).unwrap();
        let other = desk.new_key(Seat::Root).unwrap();
        let ids = |seat| desk.keys(seat).unwrap().iter().map(SigningKey::id).collect::<Vec<_>>();
        assert_eq!(ids(Seat::Role(Delegate::Detect)), [key.id()]);
        assert_eq!(ids(Seat::Root), [other.id()]);
        assert!(matches!(desk.some_keys(Seat::Targets), Err(DeskError::NoKey { role: "targets", .. })));
        for entry in fs::read_dir(folder.path().join("trust/keys")).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        let mode = fs::metadata(folder.path().join("trust/keys")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        desk.retire(Seat::Root, &other).unwrap();
        assert!(ids(Seat::Root).is_empty());
    }

    #[test]
    fn sealed_keys_need_their_passphrase() {
        let folder = tempfile::tempdir().unwrap();
        let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
        fs::write(&good, "open sesame\nsecond line\n").unwrap();
        fs::write(&bad, "open barley\n").unwrap();
        let place = folder.path().join("trust");
        Desk::open(place.clone(), Some(&good)).unwrap().new_key(Seat::Root).unwrap();
        let keys = |file: Option<&Path>| Desk::open(place.clone(), file).unwrap().keys(Seat::Root);
        assert_eq!(keys(Some(&good)).unwrap().len(), 1);
        assert!(matches!(keys(Some(&bad)), Err(DeskError::Key { source: KeyError::Passphrase, .. })));
        assert!(matches!(keys(None), Err(DeskError::Key { source: KeyError::Sealed, .. })));
    }
}
