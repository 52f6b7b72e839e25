//! Files that agents hand in, in as many pieces as it takes.
//!
//! On disk, in `uploads/`, for the owner alone: `<id>.json` (whose it is, what was announced), `<id>.part` (what has
//! arrived, from the beginning) and, when it is whole, `<id>.whole` instead. Names of agents' choosing never become
//! names here.
//!
//! **Invariant:** a file `<id>.whole` has the digest that was announced, and is durable before the agent is told.
//! **Invariant:** what was announced and has not been taken away stays within the [`Quotas`], whatever agents do, and
//! an upload belongs to the endpoint that began it.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tm_protocol::ids::{EndpointId, Sha256};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What is held of an upload before it is written, in bytes; a cut costs at most so many.
const PIECE: usize = 64 << 10;
/// How long an upload that was taken over by another link has to let go.
const LET_GO: Duration = Duration::from_secs(5);

/// What agents may leave here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quotas {
    /// Uploads of one endpoint, and their bytes as announced.
    pub(super) own: usize,
    pub(super) own_bytes: u64,
    /// Those of all.
    pub(super) all: usize,
    pub(super) all_bytes: u64,
    /// What stays free of the file system: so many percent, and not more than so many bytes.
    pub(super) spare_percent: u64,
    pub(super) spare_most: u64,
    /// How long nothing may come of an upload that has begun, and how long a whole one waits to be taken.
    pub(super) stale: Duration,
    pub(super) kept: Duration,
}

impl Default for Quotas {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            own: 8,
            own_bytes: 8 << 30,
            all: 10_000,
            all_bytes: 256 << 30,
            spare_percent: 10,
            spare_most: 4 << 30,
            stale: day,
            kept: 7 * day,
        }
    }
}

/// What an agent announces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Announced {
    /// In bytes, at least 1.
    pub(super) size: u64,
    pub(super) sha256: Sha256,
    pub(super) kind: Kind,
}

/// What is handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// A sealed archive of evidence.
    Evidence,
}

/// Why an upload is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    #[error("there is no such upload of this endpoint")]
    Unknown,
    #[error("nothing can be announced to be empty, or to be more than may be left here")]
    Size,
    #[error("this endpoint has left as much as it may")]
    OwnQuota,
    #[error("there is no room")]
    Full,
    #[error("the upload stands at {0}")]
    Offset(u64),
    #[error("more was sent than announced")]
    TooMuch,
    #[error("what arrived is not what was announced")]
    Digest,
    #[error("another link goes on with it")]
    TakenOver,
    #[error("cannot store it")]
    Store(#[source] io::Error),
}

/// What lies on disk beside the bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sheet {
    endpoint: EndpointId,
    announced: Announced,
}

/// Every upload.
#[derive(Debug)]
pub(super) struct Uploads {
    folder: PathBuf,
    quotas: Quotas,
    known: Mutex<HashMap<Uuid, Arc<Upload>>>,
}

/// One upload.
#[derive(Debug)]
pub(super) struct Upload {
    id: Uuid,
    endpoint: EndpointId,
    announced: Announced,
    /// Bytes that have arrived and are written.
    offset: AtomicU64,
    is_whole: AtomicBool,
    /// Cancelled when another link goes on with it.
    writer: Mutex<CancellationToken>,
    writing: Arc<tokio::sync::Mutex<()>>,
}

/// How far one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) id: Uuid,
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) is_whole: bool,
}

/// The right to go on with one.
#[derive(Debug)]
pub(super) struct Writer {
    upload: Arc<Upload>,
    part: Arc<File>,
    taken_over: CancellationToken,
    waiting: Vec<u8>,
    _only: OwnedMutexGuard<()>,
}

impl Upload {
    fn standing(&self) -> Standing {
        Standing {
            id: self.id,
            offset: self.offset.load(Ordering::Acquire),
            size: self.announced.size,
            is_whole: self.is_whole.load(Ordering::Acquire),
        }
    }
}

impl Uploads {
    /// Opens `folder`, creating it where it is missing, and takes up what is in it.
    ///
    /// # Errors
    /// If it cannot be made or read.
    pub(super) fn open(folder: PathBuf, quotas: Quotas) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let uploads = Self { folder, quotas, known: Mutex::default() };
        for entry in fs::read_dir(&uploads.folder)? {
            let path = entry?.path();
            let id =
                path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<Uuid>().ok());
            let taken_up = id.is_some_and(|id| uploads.take_up(id));
            if !taken_up {
                fs::remove_file(path)?;
            }
        }
        Ok(uploads)
    }

    /// Whether what is on disk makes an upload.
    fn take_up(&self, id: Uuid) -> bool {
        if self.lock().contains_key(&id) {
            return true;
        }
        let sheet = fs::read(self.file(id, "json")).ok();
        let sheet: Option<Sheet> = sheet.and_then(|sheet| serde_json::from_slice(&sheet).ok());
        let length = |extension| fs::metadata(self.file(id, extension)).ok().map(|file| file.len());
        let Some(Sheet { endpoint, announced }) = sheet else { return false };
        let (offset, is_whole) = match (length("whole"), length("part")) {
            (Some(whole), _) => (whole, true),
            (None, Some(part)) => (part, false),
            (None, None) => return false,
        };
        if offset > announced.size || is_whole && offset != announced.size {
            return false;
        }
        let upload = Upload {
            id,
            endpoint,
            announced,
            offset: AtomicU64::new(offset),
            is_whole: AtomicBool::new(is_whole),
            writer: Mutex::default(),
            writing: Arc::default(),
        };
        self.lock().insert(id, Arc::new(upload));
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Arc<Upload>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, id: Uuid, extension: &str) -> PathBuf {
        self.folder.join(format!("{id}.{extension}"))
    }

    /// Begins an upload, or finds the one of this endpoint that was announced alike before. Blocks.
    ///
    /// # Errors
    /// If it is too large, a quota is used up, or the disk refuses.
    pub(super) fn begin(&self, endpoint: EndpointId, announced: Announced) -> Result<Standing, UploadError> {
        if announced.size == 0 || announced.size > self.quotas.own_bytes {
            return Err(UploadError::Size);
        }
        let mut known = self.lock();
        let own = || known.values().filter(|upload| upload.endpoint == endpoint);
        if let Some(upload) = own().find(|upload| upload.announced == announced) {
            return Ok(upload.standing());
        }
        let (count, bytes) = own().fold((0, 0), |(n, bytes), upload| (n + 1, bytes + upload.announced.size));
        if count >= self.quotas.own || bytes + announced.size > self.quotas.own_bytes {
            return Err(UploadError::OwnQuota);
        }
        let (all, missing) = known.values().fold((0, 0), |(all, missing), upload| {
            let size = upload.announced.size;
            (all + size, missing + size - upload.offset.load(Ordering::Acquire).min(size))
        });
        if known.len() >= self.quotas.all || all + announced.size > self.quotas.all_bytes {
            return Err(UploadError::Full);
        }
        if !self.has_room(missing + announced.size).map_err(UploadError::Store)? {
            return Err(UploadError::Full);
        }
        let id = Uuid::now_v7();
        if let Err(error) = self.lay_out(id, endpoint, &announced) {
            self.remove_files(id);
            return Err(UploadError::Store(error));
        }
        let upload = Arc::new(Upload {
            id,
            endpoint,
            announced,
            offset: AtomicU64::new(0),
            is_whole: AtomicBool::new(false),
            writer: Mutex::default(),
            writing: Arc::default(),
        });
        let standing = upload.standing();
        known.insert(id, upload);
        Ok(standing)
    }

    /// Not synced: an upload that a power cut takes away is begun anew.
    fn lay_out(&self, id: Uuid, endpoint: EndpointId, announced: &Announced) -> io::Result<()> {
        let sheet = Sheet { endpoint, announced: announced.clone() };
        let mut file = self.create(id, "json")?;
        serde_json::to_writer(&mut file, &sheet)?;
        self.create(id, "part").map(|_| ())
    }

    fn create(&self, id: Uuid, extension: &str) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.file(id, extension))
    }

    fn has_room(&self, wanted: u64) -> io::Result<bool> {
        let disk = rustix::fs::statvfs(&self.folder)?;
        let (free, whole) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
        Ok(free.saturating_sub(wanted)
            >= (whole / 100 * self.quotas.spare_percent).min(self.quotas.spare_most))
    }

    fn of(&self, id: Uuid, endpoint: EndpointId) -> Result<Arc<Upload>, UploadError> {
        let upload = self.lock().get(&id).cloned();
        upload.filter(|upload| upload.endpoint == endpoint).ok_or(UploadError::Unknown)
    }

    /// How far an upload of `endpoint` is.
    ///
    /// # Errors
    /// If it has none such.
    pub(super) fn standing(&self, id: Uuid, endpoint: EndpointId) -> Result<Standing, UploadError> {
        self.of(id, endpoint).map(|upload| upload.standing())
    }

    /// The right to send the `length` bytes from `offset` on. A link that had it before loses it: it is mostly one
    /// that has broken without anybody noticing.
    ///
    /// # Errors
    /// If there is no such upload, it stands elsewhere, or so many bytes are too many.
    pub(super) async fn go_on(
        &self,
        id: Uuid,
        endpoint: EndpointId,
        offset: u64,
        length: u64,
    ) -> Result<Writer, UploadError> {
        let upload = self.of(id, endpoint)?;
        let taken_over = CancellationToken::new();
        {
            let mut writer = upload.writer.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *writer, taken_over.clone()).cancel();
        }
        let only = tokio::time::timeout(LET_GO, Arc::clone(&upload.writing).lock_owned());
        let only = only.await.map_err(|_| UploadError::TakenOver)?;
        let standing = upload.standing();
        if standing.is_whole || standing.offset != offset {
            return Err(UploadError::Offset(standing.offset));
        }
        if offset.checked_add(length).is_none_or(|end| end > standing.size) {
            return Err(UploadError::TooMuch);
        }
        let part = OpenOptions::new().write(true).open(self.file(id, "part")).map_err(UploadError::Store)?;
        Ok(Writer { upload, part: Arc::new(part), taken_over, waiting: Vec::new(), _only: only })
    }

    /// Ends a request: if everything has arrived, and it is what was announced, the upload is whole.
    ///
    /// # Errors
    /// If it is something else, which is thrown away, or the disk refuses.
    pub(super) async fn finish(&self, mut writer: Writer) -> Result<Standing, UploadError> {
        writer.flush().await?;
        let upload = Arc::clone(&writer.upload);
        let standing = upload.standing();
        if standing.offset < standing.size {
            return Ok(standing);
        }
        let (part, whole) = (self.file(upload.id, "part"), self.file(upload.id, "whole"));
        let (folder, expected) = (self.folder.clone(), upload.announced.sha256);
        let checked = tokio::task::spawn_blocking(move || {
            let found = digest(&part)?;
            if found == expected {
                File::open(&part)?.sync_all()?;
                fs::rename(&part, &whole)?;
                File::open(&folder)?.sync_all()?;
            }
            Ok::<_, io::Error>(found == expected)
        });
        let checked = checked.await.map_err(io::Error::other).and_then(|checked| checked);
        if checked.map_err(UploadError::Store)? {
            upload.is_whole.store(true, Ordering::Release);
            tracing::info!(endpoint = %upload.endpoint, upload = %upload.id, bytes = standing.size, "A file has arrived.");
            return Ok(upload.standing());
        }
        tracing::warn!(endpoint = %upload.endpoint, upload = %upload.id, "A file is not what was announced.");
        self.forget(upload.id);
        Err(UploadError::Digest)
    }

    /// Takes an upload away.
    ///
    /// # Errors
    /// If `endpoint` has none such.
    pub(super) fn give_up(&self, id: Uuid, endpoint: EndpointId) -> Result<(), UploadError> {
        let upload = self.of(id, endpoint)?;
        upload.writer.lock().unwrap_or_else(PoisonError::into_inner).cancel();
        self.forget(id);
        Ok(())
    }

    fn forget(&self, id: Uuid) {
        self.lock().remove(&id);
        self.remove_files(id);
    }

    fn remove_files(&self, id: Uuid) {
        // The sheet goes last: without it nothing is taken up again.
        for extension in ["part", "whole", "json"] {
            if let Err(error) = fs::remove_file(self.file(id, extension))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, upload = %id, "Cannot remove an upload.");
            }
        }
    }

    /// Removes uploads with which nobody went on for long, and whole ones that nobody took. Blocks.
    pub(super) fn sweep(&self, now: SystemTime) {
        let all: Vec<Arc<Upload>> = self.lock().values().cloned().collect();
        for upload in all {
            // One that is being written is not stale.
            let Ok(_only) = upload.writing.try_lock() else { continue };
            let (extension, most) = if upload.is_whole.load(Ordering::Acquire) {
                ("whole", self.quotas.kept)
            } else {
                ("part", self.quotas.stale)
            };
            let touched = fs::metadata(self.file(upload.id, extension)).and_then(|file| file.modified());
            let is_stale =
                touched.map_or(true, |touched| now.duration_since(touched).is_ok_and(|age| age > most));
            if is_stale {
                tracing::info!(endpoint = %upload.endpoint, upload = %upload.id, "An upload is too old and is removed.");
                self.forget(upload.id);
            }
        }
    }
}

impl Writer {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// If the disk refuses; what was written before stays.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), UploadError> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= PIECE { self.flush().await } else { Ok(()) }
    }

    /// Writes what has been taken.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) async fn flush(&mut self) -> Result<(), UploadError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let (part, bytes) = (Arc::clone(&self.part), std::mem::take(&mut self.waiting));
        let at = self.upload.offset.load(Ordering::Acquire);
        let end = at + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if end > self.upload.announced.size {
            return Err(UploadError::TooMuch);
        }
        let written = tokio::task::spawn_blocking(move || part.write_all_at(&bytes, at)).await;
        written.map_err(io::Error::other).and_then(|written| written).map_err(UploadError::Store)?;
        self.upload.offset.store(end, Ordering::Release);
        Ok(())
    }

    /// Until another link goes on with it, or it is given up.
    pub(super) async fn taken_over(&self) {
        self.taken_over.cancelled().await;
    }
}

fn digest(path: &Path) -> io::Result<Sha256> {
    let (mut file, mut hash, mut chunk) = (File::open(path)?, sha2::Sha256::new(), vec![0; 256 << 10]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(Sha256::new(hash.finalize().into())),
            read => hash.update(chunk.get(..read).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(n: u128) -> EndpointId {
        EndpointId::new(Uuid::from_u128(n))
    }

    fn announced(bytes: &[u8]) -> Announced {
        let size = u64::try_from(bytes.len()).unwrap();
        Announced { size, sha256: Sha256::of(bytes), kind: Kind::Evidence }
    }

    fn quotas() -> Quotas {
        Quotas { own: 3, own_bytes: 1000, all: 5, all_bytes: 1500, spare_percent: 0, ..Quotas::default() }
    }

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[tokio::test]
    async fn an_upload_goes_on_after_a_restart_and_is_whole_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..900_u32).map(|n| n.to_le_bytes()[0]).collect();
        let at = folder.path().join("uploads");
        let id = {
            let uploads = Uploads::open(at.clone(), quotas()).unwrap();
            let begun = uploads.begin(endpoint(1), announced(&bytes)).unwrap();
            assert_eq!(uploads.begin(endpoint(1), announced(&bytes)).unwrap(), begun, "it is the same again");
            let mut writer = uploads.go_on(begun.id, endpoint(1), 0, 400).await.unwrap();
            writer.write(&bytes[..400]).await.unwrap();
            assert_eq!(uploads.finish(writer).await.unwrap().offset, 400);
            begun.id
        };
        let uploads = Uploads::open(at.clone(), quotas()).unwrap();
        let standing = uploads.standing(id, endpoint(1)).unwrap();
        assert_eq!((standing.offset, standing.size, standing.is_whole), (400, 900, false));
        assert!(matches!(uploads.standing(id, endpoint(2)), Err(UploadError::Unknown)));
        let elsewhere = uploads.go_on(id, endpoint(1), 401, 1).await;
        assert!(matches!(elsewhere, Err(UploadError::Offset(400))), "{elsewhere:?}");
        let too_much = uploads.go_on(id, endpoint(1), 400, 501).await;
        assert!(matches!(too_much, Err(UploadError::TooMuch)), "{too_much:?}");
        // A second link takes over from a first that only seems to be there.
        let mut first = uploads.go_on(id, endpoint(1), 400, 500).await.unwrap();
        first.write(b"lost").await.unwrap();
        let (first_ends, second) = tokio::join!(
            async {
                first.taken_over().await;
                drop(first);
            },
            uploads.go_on(id, endpoint(1), 400, 500)
        );
        let () = first_ends;
        let mut writer = second.unwrap();
        writer.write(&bytes[400..]).await.unwrap();
        assert!(uploads.finish(writer).await.unwrap().is_whole);
        assert_eq!(fs::read(uploads.file(id, "whole")).unwrap(), bytes);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(uploads.file(id, "whole")).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        let again = uploads.go_on(id, endpoint(1), 900, 0).await;
        assert!(matches!(again, Err(UploadError::Offset(900))), "it has ended");
        assert!(Uploads::open(at, quotas()).unwrap().standing(id, endpoint(1)).unwrap().is_whole);
    }

    #[tokio::test]
    async fn what_is_not_as_announced_is_thrown_away() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(folder.path().join("u"), quotas()).unwrap();
        let begun = uploads.begin(endpoint(1), announced(b"right")).unwrap();
        let mut writer = uploads.go_on(begun.id, endpoint(1), 0, 5).await.unwrap();
        writer.write(b"wrong").await.unwrap();
        assert!(matches!(uploads.finish(writer).await, Err(UploadError::Digest)));
        assert!(matches!(uploads.standing(begun.id, endpoint(1)), Err(UploadError::Unknown)));
        assert_eq!(names(&folder.path().join("u")), 0);
        // More than was announced is never written.
        let begun = uploads.begin(endpoint(1), announced(b"right")).unwrap();
        let mut writer = uploads.go_on(begun.id, endpoint(1), 0, 5).await.unwrap();
        writer.write(b"right and more").await.unwrap();
        assert!(matches!(uploads.finish(writer).await, Err(UploadError::TooMuch)));
        uploads.give_up(begun.id, endpoint(1)).unwrap();
        assert_eq!(names(&folder.path().join("u")), 0);
    }

    #[tokio::test]
    async fn quotas_hold_for_each_and_for_all() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(folder.path().join("u"), quotas()).unwrap();
        let begin = |who, size: u64, mark: u8| {
            let announced = Announced { size, sha256: Sha256::of(&[mark]), kind: Kind::Evidence };
            uploads.begin(endpoint(who), announced)
        };
        assert!(matches!(begin(1, 0, 0), Err(UploadError::Size)));
        assert!(matches!(begin(1, 1001, 0), Err(UploadError::Size)));
        assert!(matches!(begin(1, u64::MAX, 0), Err(UploadError::Size)));
        begin(1, 900, 1).unwrap();
        assert!(matches!(begin(1, 101, 2), Err(UploadError::OwnQuota)));
        begin(1, 50, 2).unwrap();
        begin(1, 50, 3).unwrap();
        assert!(matches!(begin(1, 1, 4), Err(UploadError::OwnQuota)));
        assert!(matches!(begin(2, 501, 1), Err(UploadError::Full)), "all together are too large");
        begin(2, 499, 1).unwrap();
        begin(3, 1, 1).unwrap();
        assert!(matches!(begin(4, 1, 1), Err(UploadError::Full)), "all together are too many");
        // Ten thousand more change nothing.
        for n in 0..10_000_u32 {
            let mark = Sha256::of(&n.to_le_bytes());
            let announced = Announced { size: 1, sha256: mark, kind: Kind::Evidence };
            assert!(uploads.begin(endpoint(1), announced).is_err());
        }
        assert_eq!(names(&folder.path().join("u")), 10);
        let full = Quotas { spare_percent: 101, spare_most: u64::MAX, ..quotas() };
        let uploads = Uploads::open(folder.path().join("v"), full).unwrap();
        assert!(matches!(uploads.begin(endpoint(1), announced(b"x")), Err(UploadError::Full)));
        assert_eq!(names(&folder.path().join("v")), 0);
    }

    #[tokio::test]
    async fn what_nobody_goes_on_with_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("u");
        let uploads = Uploads::open(at.clone(), quotas()).unwrap();
        let whole = uploads.begin(endpoint(1), announced(b"x")).unwrap();
        let mut writer = uploads.go_on(whole.id, endpoint(1), 0, 1).await.unwrap();
        writer.write(b"x").await.unwrap();
        uploads.finish(writer).await.unwrap();
        let begun = uploads.begin(endpoint(1), announced(b"yy")).unwrap();
        let written = uploads.begin(endpoint(1), announced(b"zz")).unwrap();
        let writer = uploads.go_on(written.id, endpoint(1), 0, 1).await.unwrap();
        let hours = |n: u32| SystemTime::now() + Duration::from_secs(3600) * n;
        uploads.sweep(hours(23));
        assert!(uploads.standing(begun.id, endpoint(1)).is_ok());
        uploads.sweep(hours(25));
        assert!(uploads.standing(begun.id, endpoint(1)).is_err());
        assert!(uploads.standing(written.id, endpoint(1)).is_ok(), "it is being written");
        assert!(uploads.standing(whole.id, endpoint(1)).is_ok());
        drop(writer);
        uploads.sweep(hours(24 * 8));
        assert_eq!(names(&at), 0);
    }

    #[test]
    fn what_a_crash_leaves_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(folder.path().to_path_buf(), quotas()).unwrap();
        let good = uploads.begin(endpoint(1), announced(b"x")).unwrap();
        let long = uploads.begin(endpoint(1), announced(b"yy")).unwrap();
        fs::write(uploads.file(long.id, "part"), b"more than that").unwrap();
        fs::write(uploads.file(Uuid::from_u128(7), "part"), b"").unwrap();
        fs::write(uploads.file(Uuid::from_u128(8), "json"), b"{").unwrap();
        fs::write(folder.path().join("other"), b"").unwrap();
        let uploads = Uploads::open(folder.path().to_path_buf(), quotas()).unwrap();
        assert!(uploads.standing(good.id, endpoint(1)).is_ok());
        assert_eq!(names(folder.path()), 2);
    }
}
