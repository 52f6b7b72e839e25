//! What a quick scan looks at: what runs, what starts by itself, and where things are dropped.
//!
//! Running programs (also those that are gone from disk), autostart places, folders that anybody may write to, and
//! in home folders the files that are executable or were changed lately.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use tm_protocol::report::PathBytes;

use crate::platform::fs::Facts;

/// How long ago a file in a home folder may have been changed to count as lately, in seconds: two weeks.
const LATELY_S: i64 = 14 * 24 * 3600;

/// Folders that anybody may write to.
const OPEN_TO_ALL: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// Where things are put that start by themselves, or that change how others start.
const AUTOSTART: [&str; 37] = [
    "/etc/cron.d",
    "/etc/cron.daily",
    "/etc/cron.hourly",
    "/etc/cron.monthly",
    "/etc/cron.weekly",
    "/etc/crontab",
    "/etc/anacrontab",
    "/var/spool/cron",
    "/etc/systemd",
    "/usr/lib/systemd",
    "/usr/local/lib/systemd",
    "/run/systemd/system",
    "/etc/init.d",
    "/etc/rc.local",
    "/etc/rc.d",
    "/etc/inittab",
    "/etc/profile",
    "/etc/profile.d",
    "/etc/bash.bashrc",
    "/etc/bashrc",
    "/etc/environment",
    "/etc/ld.so.preload",
    "/etc/ld.so.conf.d",
    "/etc/pam.d",
    "/etc/security",
    "/lib/security",
    "/etc/xdg/autostart",
    "/etc/udev/rules.d",
    "/etc/update-motd.d",
    "/etc/network",
    "/etc/NetworkManager/dispatcher.d",
    "/etc/dhcp",
    "/etc/modules-load.d",
    "/etc/sudoers.d",
    "/etc/ssh",
    "/usr/local/bin",
    "/usr/local/sbin",
];

/// What a quick scan looks at, on this machine, now.
#[derive(Debug, Default)]
pub(super) struct Quick {
    /// Looked at whole; none lies within another.
    pub(super) whole: Vec<PathBytes>,
    /// Of these only what [`is_of_interest`].
    pub(super) homes: Vec<PathBytes>,
    /// Programs that run and are gone from disk, open, by the name under which the kernel still has them.
    pub(super) gone: Vec<(PathBytes, OwnedFd)>,
}

impl Quick {
    /// Finds out.
    pub(super) fn now() -> Self {
        let mut whole: BTreeSet<PathBuf> = OPEN_TO_ALL.iter().chain(&AUTOSTART).filter_map(real).collect();
        let mut gone = Vec::new();
        for pid in pids() {
            let link = PathBuf::from(format!("/proc/{pid}/exe"));
            let Ok(program) = fs::read_link(&link) else { continue };
            if fs::symlink_metadata(&program).is_ok() {
                whole.insert(program);
            } else if let Ok(file) = File::open(&link) {
                gone.push((bytes(&link), file.into()));
            }
        }
        let homes: BTreeSet<PathBuf> = homes().iter().filter_map(real).collect();
        let is_within =
            |path: &PathBuf, of: &BTreeSet<PathBuf>| path.ancestors().skip(1).any(|outer| of.contains(outer));
        let is_seen_at_home = |path: &PathBuf| {
            is_within(path, &homes)
                && fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.mode() & 0o111 != 0)
        };
        let alone = whole.iter().filter(|path| !is_within(path, &whole) && !is_seen_at_home(path));
        let homes_alone = homes.iter().filter(|home| {
            !whole.contains(*home)
                && !is_within(home, &whole)
                && !is_within(home, &homes)
                && home.parent().is_some()
        });
        Self {
            homes: homes_alone.map(|path| bytes(path)).collect(),
            whole: alone.map(|path| bytes(path)).collect(),
            gone,
        }
    }
}

/// Whether a file of a home folder is looked at: it is executable, or was changed lately. What counts is the time
/// that nobody can set.
pub(super) fn is_of_interest(facts: &Facts) -> bool {
    let (_, _, changed) = facts.stamp.parts();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(i64::MAX, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    facts.is_executable || changed.0.saturating_add(LATELY_S) > now
}

/// The place itself, without links; `None` if it is not there.
fn real(path: &(impl AsRef<Path> + ?Sized)) -> Option<PathBuf> {
    fs::canonicalize(path).ok()
}

/// Home folders of everybody who has one, and what lies in `/home` besides.
fn homes() -> Vec<PathBuf> {
    let accounts = fs::read("/etc/passwd").unwrap_or_default();
    let fields =
        accounts.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b':').nth(5));
    let named = fields.filter(|home| home.starts_with(b"/") && is_for_people(home));
    let mut homes: Vec<PathBuf> =
        named.map(|home| PathBuf::from(std::ffi::OsStr::from_bytes(home))).collect();
    homes.extend(["/root".into(), "/home".into()]);
    homes
}

/// Services name folders of the system as their home: those are not looked through.
fn is_for_people(home: &[u8]) -> bool {
    let system =
        [&b"/bin"[..], b"/sbin", b"/usr", b"/dev", b"/proc", b"/sys", b"/run", b"/var", b"/etc", b"/lib"];
    home.len() > 1 && home != b"/nonexistent" && !system.iter().any(|folder| home.starts_with(folder))
}

fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn bytes(path: &Path) -> PathBytes {
    PathBytes::from(path.as_os_str().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::platform::fs::facts_of;

    #[test]
    fn every_place_is_named_once() {
        let quick = Quick::now();
        let all: Vec<PathBuf> = quick
            .whole
            .iter()
            .chain(&quick.homes)
            .map(|path| PathBuf::from(std::ffi::OsStr::from_bytes(&path.0)))
            .collect();
        for path in &all {
            assert_eq!(
                fs::canonicalize(path).ok().as_ref(),
                Some(path),
                "links are not followed by the walk"
            );
            assert_eq!(all.iter().filter(|other| path.starts_with(other)).count(), 1, "{path:?}");
        }
        let tmp = fs::canonicalize("/tmp").unwrap();
        assert!(all.iter().any(|path| tmp.starts_with(path)));
        let own = fs::read_link("/proc/self/exe").unwrap();
        assert!(all.iter().any(|path| own.starts_with(path)), "this program runs");
    }

    #[test]
    fn in_home_folders_programs_and_new_files_count() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, b"x").unwrap();
        let facts = || facts_of(File::open(&file).unwrap()).unwrap();
        assert!(is_of_interest(&facts()), "it was changed just now");
        assert!(!facts().is_executable);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o710)).unwrap();
        assert!(facts().is_executable);
        let old = facts_of(File::open("/etc/protocols").or_else(|_| File::open("/etc/os-release")).unwrap())
            .unwrap();
        assert_eq!(is_of_interest(&old), old.stamp.parts().2.0 + LATELY_S > now_s());
    }

    fn now_s() -> i64 {
        i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
    }

    #[test]
    fn homes_of_services_are_left_alone() {
        for (home, expected) in [
            (&b"/home/a"[..], true),
            (b"/srv/people/b", true),
            (b"/", false),
            (b"/var/lib/x", false),
            (b"/usr/sbin", false),
        ] {
            assert_eq!(is_for_people(home), expected);
        }
    }
}
