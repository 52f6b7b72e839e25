//! One file from the manager, whole, however often the link is cut.
//!
//! On disk, `<sha256>.part` among the patterns: what has arrived, from the beginning. It stays when the agent ends,
//! and whoever needs the file goes on from there.
//!
//! **Invariant:** nothing here is believed: whoever asked for the bytes compares their digest before they are used,
//! and throws a part away that turns out to be of something else.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::RngExt as _;
use tm_protocol::ids::Sha256;
use tokio::time::sleep;

use super::{aside, client::Client};

/// How often in a row nothing more may arrive.
const TRIES: u32 = 6;
/// The first wait after that; each is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// How long the manager may say "later", in seconds, all together.
const MOST_WAITED: u64 = 1800;

/// What has arrived.
#[derive(Debug)]
pub(super) enum Arrived {
    /// On disk.
    Disk(Part),
    /// In memory, because there is no room on disk.
    Memory(Vec<u8>),
}

/// A file of which the first bytes are here.
#[derive(Debug)]
pub(super) struct Part {
    file: Arc<File>,
    path: PathBuf,
    length: u64,
}

impl Arrived {
    /// Takes up the part at `path`, of a file of `length` bytes. Blocks.
    fn open(path: &Path, length: u64) -> Self {
        match Part::open(path, length) {
            Ok(part) => Self::Disk(part),
            Err(error) => {
                tracing::warn!(%error, "Cannot keep what has been fetched half.");
                Self::Memory(Vec::new())
            }
        }
    }

    fn length(&self) -> u64 {
        match self {
            Self::Disk(part) => part.length,
            Self::Memory(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        }
    }

    /// Blocks.
    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let part = match self {
            Self::Memory(memory) => {
                memory.extend_from_slice(bytes);
                return Ok(());
            }
            Self::Disk(part) => part,
        };
        if let Err(error) = part.file.write_all_at(bytes, part.length) {
            // A full disk stands in the way of no scan: what is there is taken into memory, and its room given back.
            tracing::warn!(%error, "Cannot keep what is being fetched.");
            let mut memory = Vec::new();
            let mut read = &*part.file;
            read.rewind()?;
            read.take(part.length).read_to_end(&mut memory)?;
            let _ = fs::remove_file(&part.path);
            memory.extend_from_slice(bytes);
            *self = Self::Memory(memory);
            return Ok(());
        }
        part.length += u64::try_from(bytes.len()).unwrap_or_default();
        Ok(())
    }

    /// Begins anew. Blocks.
    fn clear(&mut self) -> io::Result<()> {
        match self {
            Self::Memory(memory) => memory.clear(),
            Self::Disk(part) => {
                part.file.set_len(0)?;
                part.length = 0;
            }
        }
        Ok(())
    }

    /// The bytes, from the beginning. Blocks.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn reader(&self) -> io::Result<Box<dyn Read + '_>> {
        Ok(match self {
            Self::Memory(bytes) => Box::new(bytes.as_slice()),
            Self::Disk(part) => {
                let mut file = &*part.file;
                file.rewind()?;
                Box::new(file)
            }
        })
    }

    /// Makes the part the file at `path`, durably; `false` if it is in memory. Blocks.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn place(&self, path: &Path) -> io::Result<bool> {
        let Self::Disk(part) = self else { return Ok(false) };
        part.file.sync_all()?;
        fs::rename(&part.path, path)?;
        crate::paths::sync_folder(path.parent().unwrap_or(path))?;
        Ok(true)
    }

    /// Throws it away. Blocks.
    pub(super) fn discard(self) {
        if let Self::Disk(part) = self
            && let Err(error) = fs::remove_file(&part.path)
        {
            tracing::warn!(%error, "Cannot remove what was fetched.");
        }
    }
}

impl Part {
    fn open(path: &Path, length: u64) -> io::Result<Self> {
        let nofollow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nofollow)
                .open(path)
        };
        let is_ours = |file: &File| {
            let meta = file.metadata()?;
            let own = rustix::process::geteuid().as_raw();
            Ok::<_, io::Error>(
                meta.is_file() && meta.uid() == own && meta.mode() & 0o177 == 0 && meta.nlink() == 1,
            )
        };
        let mut file = open();
        if !file.as_ref().is_ok_and(|file| is_ours(file).unwrap_or(false)) {
            // Somebody else's, or a link to somewhere: never written to.
            fs::remove_file(path)?;
            file = open();
        }
        let file = file?;
        let mut there = file.metadata()?.len();
        if there > length {
            file.set_len(0)?;
            there = 0;
        }
        Ok(Self { file: Arc::new(file), path: path.to_path_buf(), length: there })
    }
}

/// Why an attempt ended.
enum Ended {
    /// The link.
    Cut(String),
    /// The manager has others to serve first; in so many seconds.
    Later(u64),
    /// For good.
    Refused(String),
}

/// The file of `length` bytes with this digest that the manager has at `at`; what has arrived of it lies in `folder`.
/// Its digest is not compared.
///
/// # Errors
/// If the manager refuses it, or too often nothing more arrives.
pub(super) async fn download(
    client: &mut Client<'_>,
    at: &str,
    folder: &Path,
    digest: Sha256,
    length: u64,
) -> Result<Arrived, String> {
    let path = part_of(folder, digest);
    let lost = || "it could not be written".to_owned();
    let mut arrived = aside(move || Arrived::open(&path, length)).await.ok_or_else(lost)?;
    let (mut in_vain, mut waited) = (0, 0);
    while arrived.length() < length {
        let before = arrived.length();
        let (back, ended) = attempt(client, at, digest, length, arrived).await.ok_or_else(lost)?;
        arrived = back;
        let Err(ended) = ended else { continue };
        client.drop_link();
        match ended {
            Ended::Refused(why) => return Err(why),
            Ended::Later(seconds) => {
                waited += seconds;
                if waited > MOST_WAITED {
                    return Err("the manager is busy".to_owned());
                }
                tracing::info!(seconds, sha256 = %digest, "The manager serves others first; the transfer waits.");
                // All who were sent away do not come back at once.
                let jitter = rand::rng().random_range(0..=2000 * seconds);
                sleep(Duration::from_millis(1000 * seconds + jitter)).await;
            }
            Ended::Cut(_) if arrived.length() > before => in_vain = 0,
            Ended::Cut(why) => {
                in_vain += 1;
                if in_vain > TRIES {
                    return Err(why);
                }
                let most = FIRST_WAIT * 2_u32.saturating_pow(in_vain);
                let share = rand::rng().random_range(0.5..=1.0);
                sleep(most.mul_f64(share)).await;
            }
        }
    }
    Ok(arrived)
}

/// Where the part of a file lies.
pub(super) fn part_of(folder: &Path, digest: Sha256) -> PathBuf {
    folder.join(format!("{digest}.part"))
}

/// One request for what is missing; `None` if what arrived could not be kept anywhere.
async fn attempt(
    client: &mut Client<'_>,
    at: &str,
    digest: Sha256,
    length: u64,
    mut arrived: Arrived,
) -> Option<(Arrived, Result<(), Ended>)> {
    let have = arrived.length();
    let range =
        if have > 0 { format!("Range: bytes={have}-\r\nIf-Range: \"{digest}\"\r\n") } else { String::new() };
    let head = match client.get(at, &range).await {
        Ok(head) => head,
        Err(why) => return Some((arrived, Err(Ended::Cut(why)))),
    };
    let refused = |arrived, why: &str| Some((arrived, Err(Ended::Refused(why.to_owned()))));
    match head.status {
        206 if head.part == Some((have, length)) && head.length == Some(length - have) && have > 0 => {}
        // The whole, whatever was asked for.
        200 if head.length == Some(length) => {
            arrived = aside(move || arrived.clear().map(|()| arrived)).await?.ok()?;
        }
        200 | 206 => return refused(arrived, "its length is not the one that was ordered"),
        503 => {
            let seconds = head.retry_after.unwrap_or(5).clamp(1, 300);
            return Some((arrived, Err(Ended::Later(seconds))));
        }
        404 => return refused(arrived, "the manager does not have it"),
        410 => return refused(arrived, "its rollout was stopped, and nobody is sent it any more"),
        status => return refused(arrived, &format!("the manager answers {status}")),
    }
    loop {
        let left = length - arrived.length();
        if left == 0 {
            client.end(&head);
            return Some((arrived, Ok(())));
        }
        let bytes = match client.next(left).await {
            Ok(bytes) => bytes,
            Err(why) => return Some((arrived, Err(Ended::Cut(why)))),
        };
        arrived = aside(move || arrived.push(&bytes).map(|()| arrived)).await?.ok()?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_part_is_taken_up_if_it_is_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = part_of(folder.path(), Sha256::of(b"x"));
        let mut arrived = Arrived::open(&path, 10);
        arrived.push(b"0123").unwrap();
        drop(arrived);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let mut arrived = Arrived::open(&path, 10);
        assert_eq!(arrived.length(), 4);
        arrived.push(b"456789").unwrap();
        let mut bytes = Vec::new();
        arrived.reader().unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"0123456789");
        assert_eq!(Arrived::open(&path, 9).length(), 0, "longer than the whole: of something else");

        fs::write(&path, "0123").unwrap();
        let target = folder.path().join("target");
        fs::write(&target, "not to be written").unwrap();
        for make in
            [&|| symlink(&target, &path).unwrap() as _, &|| fs::hard_link(&target, &path).unwrap(), &|| {
                fs::write(&path, "01").unwrap();
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
            }] as [&dyn Fn(); 3]
        {
            fs::remove_file(&path).unwrap();
            make();
            let mut arrived = Arrived::open(&path, 100);
            assert_eq!(arrived.length(), 0);
            arrived.push(b"x").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"x");
            assert_eq!(fs::read(&target).unwrap(), b"not to be written");
        }
    }

    #[test]
    fn where_nothing_can_be_kept_it_is_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let mut arrived = Arrived::open(&folder.path().join("none/part"), 10);
        arrived.push(b"01").unwrap();
        arrived.clear().unwrap();
        arrived.push(b"23").unwrap();
        assert!(matches!(&arrived, Arrived::Memory(bytes) if bytes == b"23"));
        assert!(!arrived.place(&folder.path().join("x")).unwrap());
    }
}
