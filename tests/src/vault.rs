//! `tm-agent vault …`: no daemon, no manager.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::{Output, bin, strace::Line};

/// A vault in a state folder of its own.
#[derive(Debug, Clone)]
pub struct Vault {
    /// The state folder.
    pub state: PathBuf,
}

/// An item as `vault list -o json` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its id.
    pub id: String,
    /// The exact bytes of its path.
    pub path: Vec<u8>,
    /// Digest of its content.
    pub sha256: String,
    /// Its size, in bytes.
    pub size: u64,
}

impl Vault {
    /// The vault of a state folder, which need not be there.
    pub fn new(state: &Path) -> Self {
        Self { state: state.to_owned() }
    }

    /// A command on it.
    pub fn line<S: AsRef<OsStr>>(&self, args: &[S]) -> Line {
        let mut all = vec![OsStr::new("vault").to_owned()];
        all.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
        all.extend([OsStr::new("--data").to_owned(), self.state.as_os_str().to_owned()]);
        Line { program: bin("tm-agent"), args: all, rules: vec![] }
    }

    /// Runs a command on it.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        self.line(args).run()
    }

    /// Takes a file away; its item's id.
    ///
    /// # Panics
    /// If that is not done.
    #[track_caller]
    pub fn put(&self, path: &Path) -> String {
        id(&self.run(&[OsStr::new("put"), path.as_os_str()]).expect(0))
    }

    /// What it holds.
    ///
    /// # Panics
    /// If it cannot be listed.
    #[track_caller]
    pub fn items(&self) -> Vec<Item> {
        let list = self.run(&["list", "-o", "json"]).expect(0).json();
        list.as_array().expect("a list").iter().map(item).collect()
    }

    /// Settles what was interrupted; the words that say what was done.
    ///
    /// # Panics
    /// If that is not done.
    #[track_caller]
    pub fn recover(&self) -> String {
        self.run(&["recover"]).expect(0).out().trim().to_owned()
    }

    /// Names in the folder of items, sorted.
    pub fn files(&self) -> Vec<String> {
        names(&self.state.join("vault/items"))
    }
}

/// The id that `put` printed last.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn id(output: &Output) -> String {
    let text = output.out();
    let id = text.trim().lines().next_back().unwrap_or_default().to_owned();
    assert_eq!(id.len(), 36, "{}", output.both());
    id
}

/// Names in a folder, sorted; none if it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().as_bytes().escape_ascii().to_string()).collect();
    names.sort();
    names
}

fn item(row: &Value) -> Item {
    let text = |key: &str| row[key].as_str().unwrap_or_else(|| panic!("{key} in {row}")).to_owned();
    let shown = text("path");
    let path = STANDARD.decode(text("path_b64")).expect("it is base64");
    assert_eq!(tm_protocol::text::unescape(&shown).as_deref(), Some(&*path), "both name the same path");
    assert!(text("vaulted_at").ends_with('Z'), "{row}");
    let size = row["size"].as_u64().expect("a number");
    Item { id: text("id"), path, sha256: text("sha256"), size }
}
