//! The demo's sample folders.
//!
//! **Invariant:** the test file's 68 bytes stand nowhere in the repository or in this program as one piece,
//! so that no scanner takes either for the test file.

use std::{
    fs::{self, File, Permissions},
    io::{Cursor, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use flate2::{Compression, write::GzEncoder};
use zip::{ZipWriter, write::SimpleFileOptions};

/// The two halves of the EICAR anti-virus test file.
const HALVES: [&str; 2] = [r"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-", "STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"];

/// The file that holds the test file itself.
pub(crate) const PLAIN: &str = "invoice.com";
/// The archive that holds [`INNER`].
pub(crate) const ARCHIVE: &str = "backup.tar.gz";
/// The archive within [`ARCHIVE`].
pub(crate) const INNER: &str = "inner.zip";
/// The test file's name within [`INNER`].
pub(crate) const MEMBER: &str = "eicar.com";
/// The file that looks like it and is harmless in every scanner's eyes.
pub(crate) const LOOK_ALIKE: &str = "look-alike.txt";
/// The mode of planted files.
pub(crate) const MODE: u32 = 0o640;
/// When they were last changed, in seconds since 1970.
pub(crate) const MODIFIED: i64 = 1_600_000_000;

/// Fills `folder` with one plain test file, one in a zip in a tar.gz, and a look-alike.
pub(crate) fn drop_into(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let eicar = HALVES.concat();
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write `{}`", path.display()))
    };
    put(PLAIN, eicar.as_bytes())?;
    put(ARCHIVE, &archive()?)?;
    // The same letters, one place further on: the rule wants them at the beginning.
    put(LOOK_ALIKE, format!("The test file begins with {}.\n", &eicar[..40]).as_bytes())
}

/// Fills `folder` with `count` files in which the test file is detected, no two of them alike.
pub(crate) fn plant(folder: &Path, count: usize) -> anyhow::Result<()> {
    fs::create_dir(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(MODIFIED.unsigned_abs());
    for number in 0..count {
        let path = planted(folder, number);
        let plant = || {
            let mut file = File::create(&path)?;
            file.write_all(&content(number))?;
            file.set_permissions(Permissions::from_mode(MODE))?;
            file.set_modified(modified)
        };
        plant().with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(())
}

/// Where the file of a number is planted.
pub(crate) fn planted(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("report-{number:03}.doc"))
}

/// What is in it.
pub(crate) fn content(number: usize) -> Vec<u8> {
    format!("{}\nNo. {number}\n", HALVES.concat()).into_bytes()
}

/// Whether the test file stands anywhere in `bytes`.
pub(crate) fn is_in(bytes: &[u8]) -> bool {
    let eicar = HALVES.concat();
    bytes.windows(eicar.len()).any(|window| window == eicar.as_bytes())
}

/// What [`ARCHIVE`] holds.
pub(crate) fn archive() -> anyhow::Result<Vec<u8>> {
    tar_gz(INNER, &zip(MEMBER, HALVES.concat().as_bytes())?)
}

fn zip(name: &str, content: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file(name, SimpleFileOptions::default())?;
    zip.write_all(content)?;
    Ok(zip.finish()?.into_inner())
}

fn tar_gz(name: &str, content: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    let mut header = tar::Header::new_gnu();
    header.set_size(u64::try_from(content.len())?);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content)?;
    Ok(tar.into_inner()?.finish()?)
}
