//! Paths as package databases spell them, matched with paths as they are on disk.
//!
//! A package may list `/bin/ls` where the system has `/bin` as a link to `/usr/bin`, or `/var/run/x` for
//! `/run/x`. So a listed path is first compared by its last name, and only where that fits its folder is
//! resolved.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// How many folders are remembered; beyond it they are resolved anew.
const MAX_FOLDERS: usize = 16_384;

/// The spelling of an absolute path without `//`, `.` and `..`; `None` if it is not absolute. Only right for a
/// path that leads through no link.
pub(crate) fn normal(path: &[u8]) -> Option<Vec<u8>> {
    path.starts_with(b"/").then(|| {
        let mut names: Vec<&[u8]> = Vec::new();
        for name in path.split(|b| *b == b'/') {
            match name {
                b"" | b"." => {}
                b".." => {
                    names.pop();
                }
                name => names.push(name),
            }
        }
        names.iter().fold(if names.is_empty() { vec![b'/'] } else { vec![] }, |mut path, name| {
            path.push(b'/');
            path.extend_from_slice(name);
            path
        })
    })
}

/// A path split before its last name; the folder is `/` or does not end with one.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = path.iter().rposition(|b| *b == b'/')?;
    let (folder, name) = (path.get(..at)?, path.get(at + 1..)?);
    (!name.is_empty()).then_some((if folder.is_empty() { b"/" } else { folder }, name))
}

/// Resolves folders and remembers them.
#[derive(Debug)]
pub(super) struct Folders {
    root: PathBuf,
    known: HashMap<Vec<u8>, Option<PathBuf>>,
}

impl Folders {
    /// Of a system whose root folder is `root`.
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf(), known: HashMap::new() }
    }

    /// Where the listed `folder` really is; `None` if it is not there.
    pub(super) fn real(&mut self, folder: &[u8]) -> Option<&Path> {
        if !self.known.contains_key(folder) {
            if self.known.len() >= MAX_FOLDERS {
                self.known.clear();
            }
            let within = folder.strip_prefix(b"/").unwrap_or(folder);
            let real = fs::canonicalize(self.root.join(OsStr::from_bytes(within))).ok();
            self.known.insert(folder.to_vec(), real);
        }
        self.known.get(folder)?.as_deref()
    }
}

/// What is looked for, by last name.
#[derive(Debug)]
pub(super) struct Wanted<T> {
    by_name: HashMap<Vec<u8>, Vec<(PathBuf, T)>>,
}

impl<T> Wanted<T> {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { by_name: HashMap::new() }
    }

    /// Looks for `name` in the folder that is really `folder`.
    pub(super) fn add(&mut self, folder: &[u8], name: &[u8], what: T) {
        let folder = PathBuf::from(OsStr::from_bytes(folder));
        self.by_name.entry(name.to_vec()).or_default().push((folder, what));
    }

    /// What a listed path stands for, if it is looked for.
    pub(super) fn find<'a>(
        &'a self,
        listed: &[u8],
        folders: &'a mut Folders,
    ) -> impl Iterator<Item = &'a T> + use<'a, T> {
        let candidates = split(listed).and_then(|(folder, name)| Some((folder, self.by_name.get(name)?)));
        let real = candidates.and_then(|(folder, _)| folders.real(folder));
        let candidates = candidates.map(|(_, list)| list.as_slice()).unwrap_or_default();
        candidates.iter().filter(move |(folder, _)| Some(folder.as_path()) == real).map(|(_, what)| what)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_path_has_one_normal_spelling() {
        for (path, spelling) in [
            (&b"/a/b"[..], Some(&b"/a/b"[..])),
            (b"//a//./b/", Some(b"/a/b")),
            (b"/a/../b", Some(b"/b")),
            (b"/..", Some(b"/")),
            (b"/", Some(b"/")),
            (b"/a\n\xff/b", Some(b"/a\n\xff/b")),
            (b"a/b", None),
            (b"", None),
        ] {
            assert_eq!(normal(path).as_deref(), spelling, "{}", path.escape_ascii());
        }
        assert_eq!(split(b"/a"), Some((&b"/"[..], &b"a"[..])));
        assert_eq!(split(b"/a/b"), Some((&b"/a"[..], &b"b"[..])));
        assert_eq!(split(b"/"), None);
        assert_eq!(split(b"a"), None);
    }

    #[test]
    fn a_listed_path_is_found_under_each_spelling_of_its_folder() {
        let root = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(root.path()).unwrap();
        fs::create_dir_all(real.join("usr/bin")).unwrap();
        symlink("usr/bin", real.join("bin")).unwrap();
        let mut wanted = Wanted::new();
        wanted.add(real.join("usr/bin").as_os_str().as_bytes(), b"ls", 1);
        wanted.add(real.join("bin").as_os_str().as_bytes(), b"ls", 2);
        let mut folders = Folders::new(root.path());
        let mut find = |listed: &[u8]| wanted.find(listed, &mut folders).copied().collect::<Vec<_>>();
        assert_eq!(find(b"/usr/bin/ls"), [1]);
        assert_eq!(find(b"/bin/ls"), [1]);
        assert_eq!(find(b"/bin/cat"), [0; 0]);
        assert_eq!(find(b"/sbin/ls"), [0; 0], "no such folder");
        assert_eq!(find(b"ls"), [0; 0]);
    }
}
