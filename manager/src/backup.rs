//! One file with everything that a manager is: database, patterns, keys, configuration.
//!
//! The file is text, a JSON value a line: a header (`{"tm_backup":1,…}`); for each table that has rows a line that
//! names it and its columns, and its rows as arrays; for each file a line that names it, and its bytes as base64
//! texts; at the end a line with the digest of every byte before it. It holds keys and is readable by its owner only.
//!
//! **Invariant:** a copy shows the database as it was at one moment, and every pattern that it names.
//! **Invariant:** nothing of a copy is used before all of it was read and its digest compared. A restored folder has
//! its configuration last: one without was not finished.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256 as Hasher};
use tm_protocol::ids::Sha256;

use crate::store::{
    Store, StoreError,
    export::{ExportError, Line},
    schema::Version,
};

const FORMAT: u32 = 1;
/// Bytes of a file in one line.
const PIECE: usize = 192 << 10;
/// Longest line that is read: a row is at most some MiB.
const LONGEST: u64 = 64 << 20;
/// Folders of the data folder that are copied beside the patterns, with the folders in them: certificate authorities
/// and what signs patterns' metadata.
const FOLDERS: [&str; 2] = ["ca", "trust"];
/// Files of the data folder. The last one last.
const FILES: [&str; 2] = ["admin.toml", "manager.toml"];
const PATTERNS: &str = "patterns/";

/// Why there is no copy, or it was not restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackupError {
    #[error("cannot use `{}`", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("`{}` is there already", .0.display())]
    Exists(PathBuf),
    #[error("`{}` is no whole copy of a manager: {what}", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    #[error("the bytes of the pattern {0} are missing or not its own")]
    Pattern(Sha256),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    tm_backup: u32,
    version: String,
    schema: i64,
    at_ms: i64,
}

/// What begins with an object; rows and pieces follow it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Mark {
    Table { table: String, columns: Vec<String> },
    File { file: String },
    End { sha256: String },
}

/// What a copy holds, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) rows: u64,
    pub(crate) patterns: u64,
    /// When it was made, in milliseconds since 1970.
    pub(crate) at_ms: i64,
}

/// Where a manager's things are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a> {
    /// Its data folder.
    pub(crate) data: &'a Path,
    /// Its folder of patterns.
    pub(crate) patterns: &'a Path,
}

/// Writes a copy to `to`, which must not exist, while managers work.
///
/// # Errors
/// If something cannot be read or written; there is then no file.
pub(crate) async fn write(
    store: &Store,
    places: Places<'_>,
    to: &Path,
    now_ms: i64,
) -> Result<Sum, BackupError> {
    if to.symlink_metadata().is_ok() {
        return Err(BackupError::Exists(to.to_path_buf()));
    }
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = to.with_file_name(name);
    let failed = |source| BackupError::File { path: partial.clone(), source };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial).map_err(failed)?;
    let done = fill(store, places, file, now_ms).await.and_then(|sum| {
        // Not a rename: it would take the place of what came meanwhile.
        fs::hard_link(&partial, to)
            .and_then(|()| {
                File::open(to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?
                    .sync_all()
            })
            .map_err(|source| BackupError::File { path: to.to_path_buf(), source })?;
        Ok(sum)
    });
    let _ = fs::remove_file(&partial);
    done
}

async fn fill(store: &Store, places: Places<'_>, file: File, now_ms: i64) -> Result<Sum, BackupError> {
    let mut out = Out { file: BufWriter::new(file), hasher: Hasher::new() };
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let schema = Version::of_this_program().number;
    let written = |source| BackupError::Export(ExportError::Write(source));
    out.line(&Header { tm_backup: FORMAT, version, schema, at_ms: now_ms }).map_err(written)?;
    let mut sum = Sum { at_ms: now_ms, ..Sum::default() };
    let (mut table, mut patterns) = (String::new(), Vec::new());
    let take = |row: &Line| {
        if row.table != table {
            table.clone_from(&row.table);
            out.line(&Mark::Table { table: table.clone(), columns: row.columns.clone() })?;
        }
        if table == "pattern" {
            let at = row.columns.iter().position(|column| column == "sha256");
            patterns.extend(at.and_then(|at| row.values[at].as_str()?.parse::<Sha256>().ok()));
        }
        sum.rows += 1;
        out.line(&row.values)
    };
    store.export(take).await?;
    // Patterns are never changed or removed: those that the rows name are there still.
    for pattern in &patterns {
        let path = places.patterns.join(pattern.to_string());
        let digest = out.copy(&format!("{PATTERNS}{pattern}"), &path)?;
        if digest != *pattern {
            return Err(BackupError::Pattern(*pattern));
        }
        sum.patterns += 1;
    }
    for name in own_files(places.data)? {
        out.copy(&name, &places.data.join(&name))?;
    }
    out.end().map_err(written)?;
    Ok(sum)
}

/// What is copied of a data folder, the configuration last.
fn own_files(data: &Path) -> Result<Vec<String>, BackupError> {
    let mut names = Vec::new();
    let mut folders: Vec<String> = FOLDERS.map(ToOwned::to_owned).into();
    while let Some(folder) = folders.pop() {
        let path = data.join(&folder);
        let failed = |source| BackupError::File { path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            // There is none before the first start.
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder == "trust" => continue,
            Err(source) => return Err(failed(source)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            let Some(name) = entry.file_name().to_str().map(|name| format!("{folder}/{name}")) else {
                continue;
            };
            if kind.is_file() {
                names.push(name);
            } else if kind.is_dir() && FOLDERS.contains(&folder.as_str()) {
                folders.push(name);
            }
        }
    }
    names.sort();
    names.extend(FILES.iter().filter(|name| data.join(name).is_file()).map(ToString::to_string));
    Ok(names)
}

/// Whether a copy of ours may hold a file of this name in one of [`FOLDERS`], at most one folder deeper.
fn is_in_folders(name: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    let parts: Vec<&str> = name.split('/').collect();
    matches!(parts.len(), 2 | 3) && FOLDERS.contains(&parts[0]) && parts.iter().all(|part| plain(part))
}

/// The file that is written, and the digest of what was.
struct Out {
    file: BufWriter<File>,
    hasher: Hasher,
}

impl Out {
    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.hasher.update(&text);
        self.file.write_all(&text)
    }

    /// Copies a file in; the digest of its bytes.
    fn copy(&mut self, name: &str, path: &Path) -> Result<Sha256, BackupError> {
        let failed = |source| BackupError::File { path: path.to_path_buf(), source };
        let written = |source| BackupError::Export(ExportError::Write(source));
        let mut file = File::open(path).map_err(failed)?;
        self.line(&Mark::File { file: name.to_owned() }).map_err(written)?;
        let mut hasher = Hasher::new();
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            let most = u64::try_from(PIECE).unwrap_or(u64::MAX);
            (&mut file).take(most).read_to_end(&mut piece).map_err(failed)?;
            if piece.is_empty() {
                return Ok(Sha256::new(hasher.finalize().into()));
            }
            hasher.update(&piece);
            self.line(&STANDARD.encode(&piece)).map_err(written)?;
        }
    }

    fn end(mut self) -> io::Result<()> {
        let sha256 = hex::encode(self.hasher.clone().finalize());
        self.line(&Mark::End { sha256 })?;
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }
}

/// A copy whose digest is right.
#[derive(Debug)]
pub(crate) struct Verified {
    path: PathBuf,
    header: Header,
    /// Its configuration.
    pub(crate) config: String,
}

impl Verified {
    /// Reads all of a copy and compares its digest.
    ///
    /// # Errors
    /// If it cannot be read, or is not one, not whole, or changed.
    pub(crate) fn open(path: &Path) -> Result<Self, BackupError> {
        let mut lines = Lines::open(path)?;
        let damaged = |what| BackupError::Damaged { path: path.to_path_buf(), what };
        let first = lines.next()?.ok_or_else(|| damaged("it is empty"))?;
        let header: Header =
            serde_json::from_slice(&first).map_err(|_| damaged("it does not begin like one"))?;
        if header.tm_backup != FORMAT {
            return Err(damaged("its format is another version's"));
        }
        let (mut config, mut inside) = (Vec::new(), String::new());
        loop {
            let before = lines.digest();
            let line = lines.next()?.ok_or_else(|| damaged("its end is missing"))?;
            match serde_json::from_slice(&line).map_err(|_| damaged("a line is not JSON"))? {
                Value::String(piece) if inside == "manager.toml" => {
                    config.extend(STANDARD.decode(piece).map_err(|_| damaged("a file is not base64"))?);
                }
                Value::Object(_) => {
                    match mark(&line).ok_or_else(|| damaged("a line is of another version"))? {
                        Mark::File { file } => inside = file,
                        Mark::Table { .. } => inside.clear(),
                        Mark::End { sha256 } if sha256 == before => break,
                        Mark::End { .. } => return Err(damaged("its digest is another")),
                    }
                }
                Value::Array(_) | Value::String(_) => {}
                Value::Null | Value::Bool(_) | Value::Number(_) => return Err(damaged("a line is no row")),
            }
        }
        if lines.next()?.is_some() {
            return Err(damaged("something follows its end"));
        }
        let config = String::from_utf8(config).map_err(|_| damaged("its configuration is no text"))?;
        Ok(Self { path: path.to_path_buf(), header, config })
    }

    /// Fills an empty database and new folders with the copy; `config` is what its configuration is to be.
    ///
    /// # Errors
    /// If something cannot be written; the data folder then has no configuration.
    pub(crate) async fn restore(
        &self,
        store: &Store,
        places: Places<'_>,
        config: &str,
    ) -> Result<Sum, BackupError> {
        let damaged = |what| BackupError::Damaged { path: self.path.clone(), what };
        let folder = |path: &Path| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|source| BackupError::File { path: path.to_path_buf(), source })
        };
        folder(&places.data.join("ca"))?;
        folder(places.patterns)?;
        let mut filling = store.begin_filling(self.header.schema).await?;
        let mut sum = Sum { at_ms: self.header.at_ms, ..Sum::default() };
        let mut row = Line { table: String::new(), columns: Vec::new(), values: Vec::new() };
        let mut into: Option<Target> = None;
        let mut lines = Lines::open(&self.path)?;
        lines.next()?;
        while let Some(line) = lines.next()? {
            match serde_json::from_slice(&line).map_err(|_| damaged("a line is not JSON"))? {
                Value::Array(values) => {
                    row.values = values;
                    filling.put(&row).await?;
                    sum.rows += 1;
                }
                Value::String(piece) => {
                    let bytes = STANDARD.decode(piece).map_err(|_| damaged("a file is not base64"))?;
                    into.as_mut().ok_or_else(|| damaged("a file has no name"))?.write(&bytes)?;
                }
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
                    if let Some(file) = into.take() {
                        sum.patterns += u64::from(file.finish()?);
                    }
                    match mark(&line).ok_or_else(|| damaged("a line is of another version"))? {
                        Mark::Table { table, columns } => (row.table, row.columns) = (table, columns),
                        Mark::File { file } if file == "manager.toml" => into = Some(Target::Nowhere),
                        Mark::File { file } => {
                            into = Some(
                                Target::open(&file, places)?
                                    .ok_or_else(|| damaged("it names a file that no manager has"))?,
                            );
                        }
                        Mark::End { .. } => break,
                    }
                }
            }
        }
        filling.finish(store).await?;
        let mut last = Target::new(places.data.join("manager.toml"), None)?;
        last.write(config.as_bytes())?;
        last.finish()?;
        Ok(sum)
    }
}

fn mark(line: &[u8]) -> Option<Mark> {
    serde_json::from_slice(line).ok()
}

/// A file that is written, under another name until it is whole.
enum Target {
    /// It is written otherwise.
    Nowhere,
    File {
        file: File,
        partial: PathBuf,
        path: PathBuf,
        hasher: Hasher,
        pattern: Option<Sha256>,
    },
}

impl Target {
    /// `None` for a name that no copy of ours has.
    fn open(name: &str, places: Places<'_>) -> Result<Option<Self>, BackupError> {
        if let Some(pattern) = name.strip_prefix(PATTERNS) {
            let Ok(digest) = pattern.parse::<Sha256>() else { return Ok(None) };
            return Self::new(places.patterns.join(digest.to_string()), Some(digest)).map(Some);
        }
        if is_in_folders(name) {
            let path = places.data.join(name);
            let folder = path.parent().unwrap_or(places.data);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(|source| BackupError::File { path: folder.to_path_buf(), source })?;
            return Self::new(path, None).map(Some);
        }
        if FILES.contains(&name) {
            return Self::new(places.data.join(name), None).map(Some);
        }
        Ok(None)
    }

    fn new(path: PathBuf, pattern: Option<Sha256>) -> Result<Self, BackupError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".restored");
        let partial = path.with_file_name(name);
        let _ = fs::remove_file(&partial);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial);
        let file = file.map_err(|source| BackupError::File { path: partial.clone(), source })?;
        Ok(Self::File { file, partial, path, hasher: Hasher::new(), pattern })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        match self {
            Self::Nowhere => Ok(()),
            Self::File { file, partial, hasher, .. } => {
                hasher.update(bytes);
                let failed = |source| BackupError::File { path: partial.clone(), source };
                file.write_all(bytes).map_err(failed)
            }
        }
    }

    /// Gives the file its name; whether it is a pattern.
    fn finish(self) -> Result<bool, BackupError> {
        let Self::File { file, partial, path, hasher, pattern } = self else { return Ok(false) };
        if let Some(expected) = pattern.filter(|expected| *expected != Sha256::new(hasher.finalize().into()))
        {
            return Err(BackupError::Pattern(expected));
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        file.sync_all()
            .and_then(|()| fs::rename(&partial, &path))
            .and_then(|()| File::open(folder)?.sync_all())
            .map_err(|source| BackupError::File { path: path.clone(), source })?;
        Ok(pattern.is_some())
    }
}

/// A copy's lines, and the digest of those that were read.
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    hasher: Hasher,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, BackupError> {
        let file =
            File::open(path).map_err(|source| BackupError::File { path: path.to_path_buf(), source })?;
        Ok(Self { path: path.to_path_buf(), file: BufReader::new(file), hasher: Hasher::new() })
    }

    fn next(&mut self) -> Result<Option<Vec<u8>>, BackupError> {
        let mut line = Vec::new();
        let read = self.file.by_ref().take(LONGEST).read_until(b'\n', &mut line);
        read.map_err(|source| BackupError::File { path: self.path.clone(), source })?;
        if line.is_empty() {
            return Ok(None);
        }
        self.hasher.update(&line);
        if line.pop() != Some(b'\n') {
            return Err(BackupError::Damaged { path: self.path.clone(), what: "a line does not end" });
        }
        Ok(Some(line))
    }

    fn digest(&self) -> String {
        hex::encode(self.hasher.clone().finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_names_keys_of_every_authority_and_no_path_out_of_its_folders() {
        for good in ["ca/key.der", "ca/authorities.json", "ca/0a1b2c/key.der", "trust/snapshot.key"] {
            assert!(is_in_folders(good), "{good}");
        }
        for bad in [
            "ca",
            "ca/",
            "/ca/key.der",
            "ca//key.der",
            "ca/..",
            "ca/../x",
            "ca/a/../x",
            "ca/a/b/c",
            "ca/.hidden",
            "ca/a\0b",
            "patterns/x",
            "admin.toml",
            "",
            "ca\\key.der",
            "trust/../ca/key.der",
        ] {
            assert!(!is_in_folders(bad), "{bad}");
        }
    }

    #[test]
    fn folders_of_further_authorities_are_copied() {
        let data = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            let path = data.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        };
        let names = ["ca/0a1b/key.der", "ca/ids.json", "trust/snapshot.key", "manager.toml"];
        names.iter().for_each(|name| put(name));
        assert_eq!(own_files(data.path()).unwrap(), names);
    }
}
