//! Files that are never taken away, whatever was detected in them: without them the endpoint does not start, or
//! nobody can repair it.
//!
//! A file is known by its path and by its object on disk (device and inode), so that another name of it is
//! known too. Which files these are is found out anew for each cleanup.
//!
//! **Invariant:** a path counts also while another file stands there: what has taken the place of a shell is
//! replaced by reinstalling its package, not taken away.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt, fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::platform::fs::Object;

/// Folders with programs.
const PROGRAM_FOLDERS: [&str; 4] = ["usr/bin", "bin", "usr/sbin", "sbin"];
/// Folders with libraries; their subfolders for single architectures belong to them.
const LIBRARY_FOLDERS: [&str; 8] =
    ["usr/lib", "lib", "usr/lib64", "lib64", "usr/lib32", "lib32", "usr/libx32", "libx32"];

const INITS: [&str; 4] = ["sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd", "sbin/openrc-init"];
/// In [`PROGRAM_FOLDERS`]; `/etc/shells` names more.
const SHELLS: [&str; 9] = ["sh", "bash", "dash", "ash", "busybox", "ksh", "mksh", "zsh", "rbash"];
/// In [`PROGRAM_FOLDERS`].
const PACKAGE_MANAGERS: [&str; 26] = [
    "apk",
    "apt",
    "apt-cache",
    "apt-get",
    "apt-key",
    "dnf",
    "dnf-3",
    "dnf4",
    "dnf5",
    "dpkg",
    "dpkg-deb",
    "dpkg-divert",
    "dpkg-query",
    "dpkg-split",
    "dpkg-trigger",
    "microdnf",
    "pacman",
    "pacman-key",
    "rpm",
    "rpmdb",
    "rpmkeys",
    "tdnf",
    "transactional-update",
    "yum",
    "zypper",
    "rpm-ostree",
];
/// What apt fetches packages with.
const FETCHERS: [&str; 7] = [
    "usr/lib/apt/methods/copy",
    "usr/lib/apt/methods/file",
    "usr/lib/apt/methods/gpgv",
    "usr/lib/apt/methods/http",
    "usr/lib/apt/methods/https",
    "usr/lib/apt/methods/sqv",
    "usr/lib/apt/methods/store",
];
/// In [`PROGRAM_FOLDERS`], and beside the running program.
const OWN_PROGRAMS: [&str; 4] = ["tm-agent", "tm-manager", "tm-portal", "tmctl"];
const OWN_FOLDERS: [&str; 3] = ["var/lib/tm-agent", "var/lib/tm-manager", "var/lib/tm-portal"];

/// Libraries that nearly every program needs, by the exact name it asks for: glibc's and musl's.
const LIBRARIES: [&str; 6] =
    ["libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libresolv.so.2"];
/// How names of dynamic loaders and of musl begin, before an architecture and a version.
const LOADERS: [&str; 6] = ["ld-linux", "ld64.so.", "ld.so.", "ld-musl-", "libc.musl-", "ld-uClibc"];

/// Folders in `/boot` that belong to a boot loader. Some file systems there do not tell cases apart.
const BOOT_FOLDERS: [&str; 8] =
    ["efi", "grub", "grub2", "loader", "extlinux", "syslinux", "dtbs", "firmware"];
/// How names of kernels, their first file systems and their boot loaders begin, in `/boot`.
const BOOT_NAMES: [&str; 13] = [
    "vmlinu",
    "initrd",
    "initramfs",
    "bzimage",
    "zimage",
    "uimage",
    "uinitrd",
    "image",
    "kernel",
    "ldlinux",
    "extlinux",
    "boot.scr",
    "u-boot",
];
const BOOTS: [&str; 2] = ["boot", "efi"];
/// Links at the root to kernels and first file systems.
const BOOT_LINKS: [&str; 4] = ["vmlinuz", "vmlinuz.old", "initrd.img", "initrd.img.old"];

/// How deep and how far `/boot` is looked through for objects; its paths count at any depth.
const BOOT_DEPTH: usize = 8;
const BOOT_FILES: usize = 10_000;
/// How much of `/etc/shells` is read, in bytes.
const MAX_SHELLS: usize = 64 * 1024;

/// What a file is critical for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// It is the first program, or may become it.
    Init,
    /// It is a library that nearly every program needs, or what loads it.
    Library,
    /// It is a shell.
    Shell,
    /// It installs packages.
    PackageManager,
    /// It is a program of ours.
    OwnProgram,
    /// It is in a folder of ours.
    OwnState,
    /// The machine starts with it.
    Boot,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Init => "the system's first program (init)",
            Self::Library => "the C library or the dynamic loader",
            Self::Shell => "a shell",
            Self::PackageManager => "a program of the package manager",
            Self::OwnProgram => "a program of Threat Management",
            Self::OwnState => "part of Threat Management's own data",
            Self::Boot => "needed to start the machine",
        })
    }
}

/// The critical files of a system.
#[derive(Debug)]
pub(crate) struct Critical {
    paths: HashMap<PathBuf, Role>,
    objects: HashMap<Object, Role>,
    folders: Vec<(PathBuf, Role)>,
    folder_objects: HashMap<Object, Role>,
    boots: Vec<PathBuf>,
}

impl Critical {
    /// Those of this system, where our data lies in `state`. Blocks for some milliseconds.
    pub(crate) fn survey(state: &Path) -> Self {
        Self::survey_at(Path::new("/"), state)
    }

    /// Those of the system whose root folder is `root`; the running init and the running program are those of
    /// this system all the same.
    pub(crate) fn survey_at(root: &Path, state: &Path) -> Self {
        let mut critical = Self {
            paths: HashMap::new(),
            objects: HashMap::new(),
            folders: Vec::new(),
            folder_objects: HashMap::new(),
            boots: Vec::new(),
        };
        critical.add_programs(root);
        critical.add_shells(root);
        critical.add_libraries(root);
        critical.add_boot(root);
        let own = OWN_FOLDERS.iter().map(|name| root.join(name));
        own.chain([state.to_path_buf()]).for_each(|folder| critical.add_folder(&folder, Role::OwnState));
        critical
    }

    /// What the file at `path` (in its normal spelling, no link on the way), which is `object`, is critical for.
    pub(crate) fn role(&self, path: &[u8], object: Object) -> Option<Role> {
        let path = Path::new(OsStr::from_bytes(path));
        let placed = self.paths.get(path).copied().or_else(|| self.boot_role(path));
        // A file that has been removed since may have left its number to another, so the place comes first.
        placed.or_else(|| self.folder_role(path)).or_else(|| self.objects.get(&object).copied())
    }

    fn boot_role(&self, path: &Path) -> Option<Role> {
        let within = self.boots.iter().find_map(|boot| path.strip_prefix(boot).ok())?;
        boots(within).then_some(Role::Boot)
    }

    /// A folder has other names too, where it is mounted once more; so the folders above are compared as
    /// objects.
    fn folder_role(&self, path: &Path) -> Option<Role> {
        let named = self.folders.iter().find(|(folder, _)| path.starts_with(folder)).map(|(_, role)| *role);
        named.or_else(|| {
            path.ancestors().skip(1).find_map(|folder| self.folder_objects.get(&object(folder)?).copied())
        })
    }

    fn add_programs(&mut self, root: &Path) {
        // Read through the link, this also finds a program whose file has been replaced since it started.
        for (link, role) in [("/proc/1/exe", Role::Init), ("/proc/self/exe", Role::OwnProgram)] {
            if let Some(object) = object(Path::new(link)) {
                self.objects.entry(object).or_insert(role);
            }
            if let Ok(path) = fs::read_link(link) {
                self.paths.entry(path).or_insert(role);
            }
        }
        let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.to_path_buf()));
        for name in OWN_PROGRAMS {
            if let Some(folder) = &beside {
                self.add(&folder.join(name), Role::OwnProgram);
            }
        }
        for folder in PROGRAM_FOLDERS.map(|folder| root.join(folder)) {
            OWN_PROGRAMS.iter().for_each(|name| self.add(&folder.join(name), Role::OwnProgram));
            PACKAGE_MANAGERS.iter().for_each(|name| self.add(&folder.join(name), Role::PackageManager));
            SHELLS.iter().for_each(|name| self.add(&folder.join(name), Role::Shell));
        }
        FETCHERS.iter().for_each(|name| self.add(&root.join(name), Role::PackageManager));
        INITS.iter().for_each(|name| self.add(&root.join(name), Role::Init));
    }

    fn add_shells(&mut self, root: &Path) {
        let text = fs::read(root.join("etc/shells")).unwrap_or_default();
        let text = text.get(..MAX_SHELLS).unwrap_or(&text);
        for line in text.split(|b| *b == b'\n').map(<[u8]>::trim_ascii) {
            if let Some(within) = line.strip_prefix(b"/").filter(|within| !within.is_empty()) {
                self.add(&root.join(OsStr::from_bytes(within)), Role::Shell);
            }
        }
    }

    fn add_libraries(&mut self, root: &Path) {
        for folder in LIBRARY_FOLDERS.map(|folder| root.join(folder)) {
            self.add_libraries_in(&folder);
            let subfolders = names_in(&folder).filter(|name| name.to_string_lossy().contains("-linux-"));
            subfolders.for_each(|name| self.add_libraries_in(&folder.join(name)));
        }
    }

    fn add_libraries_in(&mut self, folder: &Path) {
        LIBRARIES.iter().for_each(|name| self.add(&folder.join(name), Role::Library));
        for name in names_in(folder) {
            let shown = name.to_string_lossy();
            if LOADERS.iter().any(|start| shown.starts_with(start)) && shown.contains(".so.") {
                self.add(&folder.join(&name), Role::Library);
            }
        }
    }

    fn add_boot(&mut self, root: &Path) {
        BOOT_LINKS.iter().for_each(|name| self.add(&root.join(name), Role::Boot));
        for boot in BOOTS.iter().filter_map(|name| fs::canonicalize(root.join(name)).ok()) {
            let mut left = BOOT_FILES;
            self.add_boot_files(&boot, &boot, BOOT_DEPTH, &mut left);
            self.boots.push(boot);
        }
    }

    fn add_boot_files(&mut self, boot: &Path, folder: &Path, depth: usize, left: &mut usize) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if *left == 0 {
                return;
            }
            *left -= 1;
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth > 0 => self.add_boot_files(boot, &path, depth - 1, left),
                Ok(kind) if kind.is_file() && path.strip_prefix(boot).is_ok_and(boots) => {
                    if let Some(object) = object(&path) {
                        self.objects.entry(object).or_insert(Role::Boot);
                    }
                }
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Adds a file under each of its spellings, and as an object.
    fn add(&mut self, path: &Path, role: Role) {
        if let (Some(Ok(folder)), Some(name)) = (path.parent().map(fs::canonicalize), path.file_name()) {
            self.paths.entry(folder.join(name)).or_insert(role);
        }
        if let Ok(real) = fs::canonicalize(path)
            && let Some(object) = object(&real)
        {
            self.paths.entry(real).or_insert(role);
            self.objects.entry(object).or_insert(role);
        }
    }

    fn add_folder(&mut self, path: &Path, role: Role) {
        if let Ok(real) = fs::canonicalize(path) {
            self.folder_objects.extend(object(&real).map(|object| (object, role)));
            self.folders.push((real, role));
        }
    }
}

/// Whether the machine starts with a file at that place in `/boot`.
fn boots(within: &Path) -> bool {
    let mut names = within.iter().map(|name| name.to_string_lossy().to_ascii_lowercase()).peekable();
    let Some(first) = names.next() else { return false };
    match names.peek() {
        Some(_) => BOOT_FOLDERS.contains(&first.as_str()),
        None => BOOT_NAMES.iter().any(|start| first.starts_with(start)),
    }
}

/// What stands at `path`, behind all links.
fn object(path: &Path) -> Option<Object> {
    let facts = fs::metadata(path).ok()?;
    Some(Object { device: facts.dev(), inode: facts.ino() })
}

/// The names in a folder; none if it cannot be read.
fn names_in(folder: &Path) -> impl Iterator<Item = std::ffi::OsString> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn system() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for name in [
            "usr/bin",
            "usr/sbin",
            "usr/lib/x86_64-linux-gnu",
            "usr/lib/systemd",
            "usr/lib64",
            "usr/lib/apt/methods",
            "etc/alternatives",
            "opt/shells",
            "boot/grub/x86",
            "boot/EFI/vendor",
            "state/patterns",
            "home",
        ] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.join(name)).unwrap();
        }
        for name in [
            "usr/bin/dash",
            "usr/bin/real-dnf",
            "usr/bin/dpkg",
            "usr/bin/tmctl",
            "usr/bin/ls",
            "opt/shells/fish",
            "usr/lib/systemd/systemd",
            "usr/lib/x86_64-linux-gnu/libc-2.31.so",
            "usr/lib/libc.so.7",
            "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
            "usr/lib/ld-musl-x86_64.so.1",
            "usr/lib/libz.so.1",
            "usr/lib/apt/methods/http",
            "boot/vmlinuz-6.1",
            "boot/initrd.img-6.1",
            "boot/grub/x86/ext2.mod",
            "boot/EFI/vendor/shimx64.efi",
            "boot/miner",
            "boot/hidden",
            "state/lock",
            "state/patterns/p",
            "home/sh",
        ] {
            fs::write(root.join(name), name).unwrap();
        }
        symlink("dash", root.join("usr/bin/sh")).unwrap();
        symlink("../../etc/alternatives/dnf", root.join("usr/bin/dnf")).unwrap();
        symlink("../../usr/bin/real-dnf", root.join("etc/alternatives/dnf")).unwrap();
        symlink("../lib/systemd/systemd", root.join("usr/sbin/init")).unwrap();
        symlink("libc-2.31.so", root.join("usr/lib/x86_64-linux-gnu/libc.so.6")).unwrap();
        let shells = "# comment\n/bin/sh\n  /opt/shells/fish  \n/opt/gone\nrelative\n/\n";
        fs::write(root.join("etc/shells"), shells).unwrap();
        folder
    }

    /// The role of the file `name` below `root`, as a cleanup asks for it.
    fn role(critical: &Critical, root: &Path, name: &str) -> Option<Role> {
        let path = fs::canonicalize(root).unwrap().join(name);
        let facts = fs::symlink_metadata(&path).unwrap();
        let object = Object { device: facts.dev(), inode: facts.ino() };
        critical.role(path.as_os_str().as_bytes(), object)
    }

    #[test]
    fn what_a_system_needs_is_critical_and_nothing_else() {
        let folder = system();
        let root = folder.path();
        let critical = Critical::survey_at(root, &root.join("state"));
        for (name, expected) in [
            ("usr/bin/dash", Some(Role::Shell)),
            ("opt/shells/fish", Some(Role::Shell)),
            ("usr/bin/real-dnf", Some(Role::PackageManager)),
            ("usr/bin/dpkg", Some(Role::PackageManager)),
            ("usr/lib/apt/methods/http", Some(Role::PackageManager)),
            ("usr/bin/tmctl", Some(Role::OwnProgram)),
            ("usr/lib/systemd/systemd", Some(Role::Init)),
            ("usr/lib/x86_64-linux-gnu/libc-2.31.so", Some(Role::Library)),
            ("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", Some(Role::Library)),
            ("usr/lib/ld-musl-x86_64.so.1", Some(Role::Library)),
            ("boot/vmlinuz-6.1", Some(Role::Boot)),
            ("boot/initrd.img-6.1", Some(Role::Boot)),
            ("boot/grub/x86/ext2.mod", Some(Role::Boot)),
            ("boot/EFI/vendor/shimx64.efi", Some(Role::Boot)),
            ("state/lock", Some(Role::OwnState)),
            ("state/patterns/p", Some(Role::OwnState)),
            ("usr/bin/ls", None),
            ("usr/lib/libz.so.1", None),
            ("usr/lib/libc.so.7", None),
            ("boot/miner", None),
            ("boot/hidden", None),
            ("home/sh", None),
            ("etc/shells", None),
        ] {
            assert_eq!(role(&critical, root, name), expected, "{name}");
        }
    }

    #[test]
    fn another_name_of_a_critical_file_is_known_by_its_object() {
        let folder = system();
        let root = folder.path();
        let link = |from: &str, to: &str| fs::hard_link(root.join(from), root.join(to)).unwrap();
        link("usr/bin/dash", "home/dash");
        link("usr/lib/x86_64-linux-gnu/libc-2.31.so", "home/libc");
        link("boot/grub/x86/ext2.mod", "home/mod");
        link("usr/bin/ls", "home/ls");
        let critical = Critical::survey_at(root, &root.join("state"));
        assert_eq!(role(&critical, root, "home/dash"), Some(Role::Shell));
        assert_eq!(role(&critical, root, "home/libc"), Some(Role::Library));
        assert_eq!(role(&critical, root, "home/mod"), Some(Role::Boot));
        assert_eq!(role(&critical, root, "home/ls"), None, "the control");
    }

    #[test]
    fn a_critical_place_counts_whatever_stands_there() {
        let folder = system();
        let root = folder.path();
        // The link is replaced by a file of a stranger's: before the survey, and after it.
        let replace = |name: &str| {
            fs::remove_file(root.join(name)).unwrap();
            fs::write(root.join(name), "malware").unwrap();
        };
        replace("usr/bin/sh");
        let critical = Critical::survey_at(root, &root.join("state"));
        assert_eq!(role(&critical, root, "usr/bin/sh"), Some(Role::Shell));
        replace("usr/bin/dpkg");
        replace("usr/bin/dnf");
        replace("boot/vmlinuz-6.1");
        fs::write(root.join("boot/grub/new.mod"), "malware").unwrap();
        fs::write(root.join("state/new"), "malware").unwrap();
        assert_eq!(role(&critical, root, "usr/bin/dpkg"), Some(Role::PackageManager));
        assert_eq!(role(&critical, root, "usr/bin/dnf"), Some(Role::PackageManager));
        assert_eq!(role(&critical, root, "boot/vmlinuz-6.1"), Some(Role::Boot));
        assert_eq!(role(&critical, root, "boot/grub/new.mod"), Some(Role::Boot));
        assert_eq!(role(&critical, root, "state/new"), Some(Role::OwnState));
    }

    #[test]
    fn our_folder_is_known_under_another_name() {
        let folder = system();
        let root = folder.path();
        symlink("state", root.join("other")).unwrap();
        let critical = Critical::survey_at(root, &root.join("other"));
        assert_eq!(role(&critical, root, "state/patterns/p"), Some(Role::OwnState));
        // As a second mount would show it: other names, the same objects.
        assert_eq!(role(&critical, root, "other/patterns/p"), Some(Role::OwnState));
        assert_eq!(role(&critical, root, "home/sh"), None, "the control");
    }

    #[test]
    fn this_system_has_a_shell_a_c_library_and_this_program() {
        let critical = Critical::survey(Path::new("/none"));
        let real = |path: &str| fs::canonicalize(path).unwrap();
        let at =
            |path: &Path| role(&critical, Path::new("/"), path.strip_prefix("/").unwrap().to_str().unwrap());
        assert_eq!(at(&real("/bin/sh")), Some(Role::Shell));
        assert_eq!(at(&std::env::current_exe().unwrap()), Some(Role::OwnProgram));
        let mapped = fs::read_to_string("/proc/self/maps").unwrap();
        let library =
            mapped.split_whitespace().find(|word| word.contains("/libc.so") || word.contains("/ld-"));
        if let Some(library) = library {
            assert_eq!(at(&real(library)), Some(Role::Library), "{library}");
        }
        assert_eq!(at(&real("/etc/passwd")), None);
    }
}
