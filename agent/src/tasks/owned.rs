//! Which of the files that a scan found something in belong to packages: a pattern that hits what a distribution
//! delivered is more likely wrong than right, and a manager that is rolling it out wants to know at once.
//!
//! **Invariant:** of one scan, one file is told for each pattern, so that a pattern that hits everything costs little.

use std::collections::HashSet;

use tm_protocol::{
    ids::Sha256,
    report::{Detection, OwnedFile, PathBytes},
};

use super::journal::record::Found;
use crate::platform::packages::{PackageError, Packages};

/// What was found, and of its files those that belong to packages.
pub(super) type Finds = (Vec<Found>, Vec<OwnedFile>);

/// Longest path that is told, in bytes.
const MAX_PATH: usize = 4096;
/// Longest name of a package that is told, in bytes.
const MAX_PACKAGE: usize = 256;

/// Asks for one scan.
#[derive(Debug, Default)]
pub(super) struct Owned {
    packages: Option<Packages>,
    told: HashSet<Sha256>,
    gave_up: bool,
}

impl Owned {
    /// The files among these that are to be told. Blocks, as [`Packages::look_up`] does.
    ///
    /// # Errors
    /// If the package databases cannot be asked. They are not asked again.
    pub(super) fn among(&mut self, found: &[&Detection]) -> Result<Vec<OwnedFile>, PackageError> {
        let open: Vec<&Detection> =
            found.iter().copied().filter(|one| !self.told.contains(&one.pattern)).collect();
        if self.gave_up || open.is_empty() {
            return Ok(Vec::new());
        }
        let mut paths: Vec<PathBytes> = open.iter().map(|one| one.path.clone()).collect();
        paths.sort_unstable();
        paths.dedup();
        let packages = self.packages.get_or_insert_with(Packages::of_this_system);
        let owners = packages.look_up(&paths).inspect_err(|_| self.gave_up = true)?;
        let mut files = Vec::new();
        for one in open {
            let Some(owner) = owners.get(&one.path).and_then(|owners| owners.first()) else { continue };
            if !self.told.insert(one.pattern) {
                continue;
            }
            let mut path = one.path.clone();
            path.0.truncate(MAX_PATH);
            let package = clip(owner.package.to_string());
            files.push(OwnedFile { pattern: one.pattern, path, package });
        }
        Ok(files)
    }
}

fn clip(mut text: String) -> String {
    let end = (0..=MAX_PACKAGE.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn detection(pattern: &[u8], path: &str) -> Detection {
        Detection {
            path: path.as_bytes().into(),
            member: vec![],
            pattern: Sha256::of(pattern),
            rule: "r".into(),
            sha256: Sha256::of(b"x"),
            size: 1,
        }
    }

    /// A system with one package and two files of it, as dpkg notes them.
    fn owned(folder: &std::path::Path) -> Owned {
        let info = folder.join("dpkg/info");
        fs::create_dir_all(&info).unwrap();
        fs::create_dir_all(folder.join("usr/bin")).unwrap();
        fs::write(info.join("cron.list"), "/.\n/usr\n/usr/bin\n/usr/bin/crontab\n/usr/bin/cron\n").unwrap();
        fs::write(folder.join("dpkg/status"), "Package: cron\nStatus: install ok installed\n").unwrap();
        Owned { packages: Some(Packages::of_dpkg(folder, &folder.join("dpkg"))), ..Owned::default() }
    }

    #[test]
    fn one_file_of_a_package_is_told_for_each_pattern() {
        let folder = tempfile::tempdir().unwrap();
        let mut owned = owned(folder.path());
        let root = folder.path().to_str().unwrap();
        let mut told = |found: &[Detection]| {
            let below = |one: &Detection| Detection {
                path: PathBytes([root.as_bytes(), &one.path.0].concat()),
                ..one.clone()
            };
            let found: Vec<Detection> = found.iter().map(below).collect();
            let files = owned.among(&found.iter().collect::<Vec<_>>()).unwrap();
            let shown = |file: OwnedFile| format!("{} {}", file.path, file.package).replace(root, "");
            files.into_iter().map(shown).collect::<Vec<_>>()
        };
        assert_eq!(told(&[detection(b"a", "/home/x"), detection(b"b", "/usr/bin/other")]), [""; 0]);
        let first = told(&[
            detection(b"a", "/home/x"),
            detection(b"a", "/usr/bin/cron"),
            detection(b"a", "/usr/bin/crontab"),
        ]);
        assert_eq!(first, ["/usr/bin/cron cron"]);
        let next = told(&[detection(b"a", "/usr/bin/crontab"), detection(b"b", "/usr/bin/crontab")]);
        assert_eq!(next, ["/usr/bin/crontab cron"]);
    }
}
