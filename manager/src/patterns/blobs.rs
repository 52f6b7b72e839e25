//! Pattern bytes on disk: one file a pattern, named by its digest.
//!
//! **Invariant:** a file with a digest's name holds the bytes of that digest, whole and durable.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tm_protocol::ids::{ManagerId, Sha256};

/// What a file is called while it is written: with the writer's own id, because managers may share a folder.
const PARTIAL: &str = ".partial-";

/// The folder of pattern files.
#[derive(Debug, Clone)]
pub(crate) struct Blobs {
    folder: PathBuf,
    partial: String,
    writes: Arc<AtomicU64>,
}

impl Blobs {
    /// Opens `folder`, creating it where it is missing, and removes what a crash of `manager` left half-written.
    ///
    /// # Errors
    /// If the folder cannot be made or read.
    pub(crate) fn open(folder: PathBuf, manager: ManagerId) -> io::Result<Self> {
        let partial = format!("{PARTIAL}{manager}-");
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(partial.as_bytes()) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { folder, partial, writes: Arc::default() })
    }

    /// Where the bytes of `digest` are, if they are here.
    pub(crate) fn path(&self, digest: Sha256) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    /// Stores `bytes`, whose digest is `digest`. On return they survive a power cut. Blocks.
    ///
    /// # Errors
    /// If the disk refuses; nothing is then to be seen under the digest's name.
    pub(crate) fn put(&self, digest: Sha256, bytes: &[u8]) -> io::Result<()> {
        // Two imports of the same bytes at once each write a file of their own; either rename is right.
        let number = self.writes.fetch_add(1, Ordering::Relaxed);
        let partial = self.folder.join(format!("{}{number}", self.partial));
        let written = write_durably(&partial, bytes).and_then(|()| fs::rename(&partial, self.path(digest)));
        if let Err(error) = written {
            // The name is never used again; the next start removes what cannot be removed now.
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
        File::open(&self.folder)?.sync_all()
    }
}

fn write_durably(path: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_is_put_is_there_and_leftovers_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/patterns");
        let (own, other) = (ManagerId::new(Uuid::from_u128(1)), ManagerId::new(Uuid::from_u128(2)));
        let blobs = Blobs::open(inner.clone(), own).unwrap();
        let digest = Sha256::of(b"rule a { condition: true }");
        assert!(!blobs.path(digest).exists());
        for _ in 0..2 {
            blobs.put(digest, b"rule a { condition: true }").unwrap();
            assert_eq!(fs::read(blobs.path(digest)).unwrap(), b"rule a { condition: true }");
        }
        let others = format!("{PARTIAL}{other}-9");
        fs::write(inner.join(format!("{PARTIAL}{own}-9")), b"half").unwrap();
        fs::write(inner.join(&others), b"half").unwrap();
        Blobs::open(inner.clone(), own).unwrap();
        let mut names: Vec<_> = fs::read_dir(&inner).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [others.as_str(), digest.to_string().as_str()], "another may be writing");
    }

    #[test]
    fn a_write_that_fails_shows_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("patterns"), ManagerId::new(Uuid::nil())).unwrap();
        fs::remove_dir(folder.path().join("patterns")).unwrap();
        let digest = Sha256::of(b"x");
        assert!(blobs.put(digest, b"x").is_err());
        assert!(!blobs.path(digest).exists());
    }
}
