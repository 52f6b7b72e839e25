//! Which package a file belongs to, and which checksum the package gives it: dpkg's own files ([`dpkg`]) and
//! the rpm database ([`rpm`]).
//!
//! The answer protects files from being taken for malware by mistake. Who is root can rewrite either database
//! and so shield a file; the refusal that follows is reported, so that it does not stay hidden.
//!
//! **Invariant:** dpkg's programs are never run; rpm's one is, by its absolute name, without a shell, with an
//! empty environment, a time limit and a bounded answer.
//! **Invariant:** a name that could mean something to a shell never becomes part of an advised command.

mod checksum;
mod dpkg;
mod lines;
mod names;
mod rpm;

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
};

use tm_protocol::{report::PathBytes, text};

pub(crate) use crate::platform::packages::{
    checksum::{Algorithm, Checksum, Digester},
    names::normal,
};
use crate::platform::packages::{dpkg::Dpkg, rpm::Rpm};

/// Why it cannot be told which package a file belongs to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackageError {
    /// A file of dpkg's.
    #[error("cannot read `{}`", text::escape(path.as_os_str().as_encoded_bytes()))]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program `rpm` could not be run to its end.
    #[error("cannot ask `{}`", program.display())]
    Ask {
        /// Its absolute name.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program `rpm` may be written by others than root.
    #[error("`{}` is not root's alone, so it is not asked", program.display())]
    NotOfRoot {
        /// Its absolute name.
        program: PathBuf,
    },
    /// `rpm` names an error of its own.
    #[error("rpm says: {0}")]
    Rpm(String),
    /// `rpm` took or said more than is allowed.
    #[error("rpm's answer was not taken: {0}")]
    Excess(&'static str),
}

/// By which program a package is put right again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manager {
    /// Debian's.
    Apt,
    /// Debian's, for a configuration file: one that is missing is taken for the administrator's wish.
    AptConfig,
    /// Fedora's.
    Dnf,
    /// Older than dnf.
    Yum,
    /// SUSE's.
    Zypper,
    /// None that is known: rpm alone.
    None,
}

/// A package by name, as its database has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    name: Vec<u8>,
    manager: Manager,
}

impl Package {
    /// A package of that name (`libc6:amd64`).
    pub(crate) fn new(name: &[u8], manager: Manager) -> Self {
        Self { name: name.to_vec(), manager }
    }

    /// The command that puts its files right again; `None` if there is no such command, or if the name is not
    /// one that a command should hold.
    pub(crate) fn reinstall(&self) -> Option<String> {
        if !is_plain(&self.name) {
            return None;
        }
        let command = match self.manager {
            Manager::Apt => "apt-get install --reinstall",
            Manager::AptConfig => "apt-get install --reinstall -o Dpkg::Options::=--force-confmiss",
            Manager::Dnf => "dnf reinstall",
            Manager::Yum => "yum reinstall",
            Manager::Zypper => "zypper install --force",
            Manager::None => return None,
        };
        Some(format!("{command} {self}"))
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::escape(&self.name))
    }
}

/// Whether a name is made of what dpkg and rpm allow in names and architectures.
fn is_plain(name: &[u8]) -> bool {
    name.len() <= 256
        && name.first().is_some_and(u8::is_ascii_alphanumeric)
        && name.iter().all(|b| b.is_ascii_alphanumeric() || b"+-._:".contains(b))
}

/// A package that lists a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// Which.
    pub(crate) package: Package,
    /// What it says the content is; empty if it does not say (or not in a way that can be computed here).
    pub(crate) checksums: Vec<Checksum>,
}

/// The owners of each path that has one. A path may have several: architectures of one package share files.
pub(crate) type Owners = HashMap<PathBytes, Vec<Owner>>;

/// The package databases of a system.
#[derive(Debug)]
pub(crate) struct Packages {
    dpkg: Option<Dpkg>,
    rpm: Option<Rpm>,
}

impl Packages {
    /// Those of this system; there may be none.
    pub(crate) fn of_this_system() -> Self {
        let root = Path::new("/");
        Self { dpkg: Dpkg::at(root, Path::new("/var/lib/dpkg")), rpm: Rpm::of_this_system() }
    }

    /// For a made-up system: dpkg's files at `admin`, with paths below `root`.
    #[cfg(test)]
    pub(crate) fn of_dpkg(root: &Path, admin: &Path) -> Self {
        Self { dpkg: Dpkg::at(root, admin), rpm: None }
    }

    /// Who owns `paths`, all at once: each database is gone through a few times for all of them. Paths have to
    /// be absolute and to lead through no link; others have no owner. Blocks, for some 10 ms on a system of
    /// 1000 packages; at most [`rpm::PATIENCE`] longer where rpm is asked.
    ///
    /// # Errors
    /// If a database is there and cannot be read; then nothing is known of any path.
    pub(crate) fn look_up(&self, paths: &[PathBytes]) -> Result<Owners, PackageError> {
        let mut owners = Owners::new();
        if paths.is_empty() {
            return Ok(owners);
        }
        if let Some(dpkg) = &self.dpkg {
            dpkg.look_up(paths, &mut owners)?;
        }
        if let Some(rpm) = &self.rpm {
            rpm.look_up(paths, &mut owners)?;
        }
        Ok(owners)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_name_becomes_part_of_a_command() {
        for (name, manager, command) in [
            (&b"coreutils"[..], Manager::Apt, Some("apt-get install --reinstall coreutils")),
            (b"libc6:amd64", Manager::Apt, Some("apt-get install --reinstall libc6:amd64")),
            (b"libstdc++6", Manager::Dnf, Some("dnf reinstall libstdc++6")),
            (
                b"cron",
                Manager::AptConfig,
                Some("apt-get install --reinstall -o Dpkg::Options::=--force-confmiss cron"),
            ),
            (b"bash", Manager::Yum, Some("yum reinstall bash")),
            (b"bash", Manager::Zypper, Some("zypper install --force bash")),
            (b"bash", Manager::None, None),
            (b"a;reboot", Manager::Apt, None),
            (b"a b", Manager::Apt, None),
            (b"$(id)", Manager::Apt, None),
            (b"-o", Manager::Apt, None),
            (b"a\nb", Manager::Apt, None),
            ("b\u{e4}sh".as_bytes(), Manager::Apt, None),
            (b"", Manager::Apt, None),
        ] {
            let package = Package::new(name, manager);
            assert_eq!(package.reinstall().as_deref(), command, "{}", name.escape_ascii());
        }
        assert_eq!(Package::new(b"a\x1b[2J\n", Manager::Apt).to_string(), r"a\u{1b}[2J\n");
    }
}
