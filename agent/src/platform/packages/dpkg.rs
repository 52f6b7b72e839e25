//! dpkg's database, read from its files as `dpkg(1)`, `deb(5)` and `dpkg-divert(1)` describe them:
//! `info/NAME.list` names a package's paths one a line, `info/NAME.md5sums` has `DIGEST  PATH` lines with paths
//! relative to `/`, `status` has the digests of configuration files, and `diversions` has three lines each:
//! the path that others lose, where theirs lies instead, and the package that keeps it (`:` is the local
//! administrator, and then every package loses it). `NAME` ends with `:ARCHITECTURE` where a package may be
//! installed for several.
//!
//! **Invariant:** files are streamed; what is held depends on the number of paths asked for, not on the size of
//! the database.
//! **Invariant:** a path with a newline in it is nobody's, as dpkg has no way to list it.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use tm_protocol::report::PathBytes;

use crate::platform::packages::{
    Algorithm, Checksum, Manager, Owner, Owners, Package, PackageError,
    lines::Lines,
    names::{self, Folders, Wanted},
};

/// Most diversions that are looked at; a system has some ten.
const MAX_DIVERSIONS: usize = 10_000;

/// A dpkg database.
#[derive(Debug)]
pub(super) struct Dpkg {
    root: PathBuf,
    admin: PathBuf,
}

/// Which packages' files are meant by a listed path, where it is diverted.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Whose {
    /// Everybody's.
    All,
    /// Only that package's: the others' lie elsewhere.
    Only(Vec<u8>),
    /// Everybody's but that package's: theirs has been moved here.
    AllBut(Vec<u8>),
}

impl Whose {
    /// Whether the package with that name, maybe with an architecture, is among them.
    fn includes(&self, stem: &[u8]) -> bool {
        let (name, _) = qualified(stem);
        match self {
            Self::All => true,
            Self::Only(keeper) => keeper == name,
            Self::AllBut(keeper) => keeper != name,
        }
    }
}

/// A path asked for, and whose files it stands for.
#[derive(Debug)]
struct Target {
    path: usize,
    whose: Whose,
}

/// Packages' claims to paths.
type Claims = BTreeMap<(usize, Vec<u8>), Claim>;

/// What one package says of one path.
#[derive(Debug, Default)]
struct Claim {
    checksums: Vec<Checksum>,
    is_config: bool,
}

impl Dpkg {
    /// The database in the folder `admin` of the system at `root`; `None` if there is none.
    pub(super) fn at(root: &Path, admin: &Path) -> Option<Self> {
        let is_there = admin.join("info").is_dir();
        is_there.then(|| Self { root: root.to_path_buf(), admin: admin.to_path_buf() })
    }

    /// Adds the owners of `paths` to `owners`.
    pub(super) fn look_up(&self, paths: &[PathBytes], owners: &mut Owners) -> Result<(), PackageError> {
        let mut folders = Folders::new(&self.root);
        let wanted = self.wanted(paths, &mut folders)?;
        let mut claims = self.claims(&wanted, &mut folders)?;
        self.add_md5sums(&wanted, &mut folders, &mut claims)?;
        if claims.values().any(|claim| claim.checksums.is_empty()) {
            self.add_conffiles(&wanted, &mut folders, &mut claims)?;
        }
        for ((path, stem), Claim { checksums, is_config }) in claims {
            let Some(path) = paths.get(path) else { continue };
            let manager = if is_config { Manager::AptConfig } else { Manager::Apt };
            let owner = Owner { package: Package::new(&stem, manager), checksums };
            owners.entry(path.clone()).or_default().push(owner);
        }
        Ok(())
    }

    /// What to look for: each path under its own name, and under the one that it was diverted from.
    fn wanted(&self, paths: &[PathBytes], folders: &mut Folders) -> Result<Wanted<Target>, PackageError> {
        let diversions = self.diversions()?;
        let mut own = Wanted::new();
        let normal: Vec<_> = paths.iter().map(|path| names::normal(&path.0)).collect();
        for (path, normal) in normal.iter().enumerate() {
            if let Some((folder, name)) = normal.as_deref().and_then(names::split) {
                own.add(folder, name, path);
            }
        }
        let mut kept: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        let mut moved: Vec<(PathBuf, Vec<u8>, Target)> = Vec::new();
        for Diversion { from, to, keeper } in diversions {
            for path in own.find(&from, folders) {
                kept.insert(*path, keeper.clone());
            }
            let here: Vec<usize> = own.find(&to, folders).copied().collect();
            let Some((folder, name)) = names::split(&from) else { continue };
            let Some(folder) = folders.real(folder) else { continue };
            for path in here {
                let target = Target { path, whose: Whose::AllBut(keeper.clone()) };
                moved.push((folder.to_path_buf(), name.to_vec(), target));
            }
        }
        let mut wanted = Wanted::new();
        for (path, normal) in normal.iter().enumerate() {
            if let Some((folder, name)) = normal.as_deref().and_then(names::split) {
                let whose = kept.remove(&path).map_or(Whose::All, Whose::Only);
                wanted.add(folder, name, Target { path, whose });
            }
        }
        for (folder, name, target) in moved {
            wanted.add(folder.as_os_str().as_bytes(), &name, target);
        }
        Ok(wanted)
    }

    fn diversions(&self) -> Result<Vec<Diversion>, PackageError> {
        let mut diversions = Vec::new();
        let mut lines = Vec::new();
        self.lines("diversions", &mut |line| {
            lines.push(line.to_vec());
            if let [from, to, keeper] = lines.as_mut_slice() {
                if diversions.len() < MAX_DIVERSIONS {
                    let [from, to, keeper] = [from, to, keeper].map(std::mem::take);
                    diversions.push(Diversion { from, to, keeper });
                }
                lines.clear();
            }
        })?;
        Ok(diversions)
    }

    /// Which packages list what is wanted.
    fn claims(&self, wanted: &Wanted<Target>, folders: &mut Folders) -> Result<Claims, PackageError> {
        let info = self.admin.join("info");
        let failed = |source| PackageError::Read { path: info.clone(), source };
        let mut claims = Claims::new();
        for entry in fs::read_dir(&info).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let Some(stem) = name.as_bytes().strip_suffix(b".list") else { continue };
            self.lines(Path::new("info").join(&name), &mut |line| {
                for target in wanted.find(line, folders).filter(|target| target.whose.includes(stem)) {
                    claims.entry((target.path, stem.to_vec())).or_default();
                }
            })?;
        }
        Ok(claims)
    }

    /// The checksums in the packages' own lists. A package may come without one.
    fn add_md5sums(
        &self,
        wanted: &Wanted<Target>,
        folders: &mut Folders,
        claims: &mut Claims,
    ) -> Result<(), PackageError> {
        let mut stems: Vec<Vec<u8>> = claims.keys().map(|(_, stem)| stem.clone()).collect();
        stems.sort();
        stems.dedup();
        for stem in stems {
            let mut name = b"info/".to_vec();
            name.extend_from_slice(&stem);
            name.extend_from_slice(b".md5sums");
            self.lines(OsStr::from_bytes(&name), &mut |line| {
                let Some((digest, path)) = line.split_at_checked(32) else { return };
                let Some(path) = path.strip_prefix(b"  ") else { return };
                let listed = [b"/", path].concat();
                note(&listed, &stem, wanted, folders, claims, &mut |claim| claim.add(digest));
            })?;
        }
        Ok(())
    }

    /// The checksums of configuration files as their packages delivered them.
    fn add_conffiles(
        &self,
        wanted: &Wanted<Target>,
        folders: &mut Folders,
        claims: &mut Claims,
    ) -> Result<(), PackageError> {
        let mut stanza = Stanza::default();
        self.lines("status", &mut |line| {
            let Some((path, digest)) = stanza.conffile(line) else { return };
            if wanted.find(path, folders).next().is_none() {
                return;
            }
            let (package, architecture) = (stanza.package.clone(), stanza.architecture.clone());
            let stems: Vec<Vec<u8>> = claims
                .keys()
                .filter(|(_, stem)| {
                    let (name, of) = qualified(stem);
                    name == package && of.is_none_or(|of| of == architecture)
                })
                .map(|(_, stem)| stem.clone())
                .collect();
            for stem in stems {
                note(path, &stem, wanted, folders, claims, &mut |claim| {
                    claim.is_config = true;
                    claim.add(digest);
                });
            }
        })
    }

    /// Gives each line of one of the database's files to `visit`, without its end. A file that is not there has
    /// none.
    fn lines(&self, name: impl AsRef<Path>, visit: &mut dyn FnMut(&[u8])) -> Result<(), PackageError> {
        let path = self.admin.join(name);
        let mut read = || {
            let mut file = File::open(&path)?;
            let (mut lines, mut block) = (Lines::default(), vec![0; 64 * 1024]);
            loop {
                match file.read(&mut block) {
                    Ok(0) => break,
                    Ok(taken) => lines.take(block.get(..taken).unwrap_or_default(), visit),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            lines.end(visit);
            Ok(())
        };
        match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(PackageError::Read { path, source }),
            Ok(()) => Ok(()),
        }
    }
}

impl Claim {
    fn add(&mut self, digest: &[u8]) {
        let checksum = Checksum::from_hex(Algorithm::Md5, digest);
        self.checksums.extend(checksum.filter(|checksum| !self.checksums.contains(checksum)));
    }
}

/// Changes the claims of the package `stem` to a listed path.
fn note(
    listed: &[u8],
    stem: &[u8],
    wanted: &Wanted<Target>,
    folders: &mut Folders,
    claims: &mut Claims,
    change: &mut dyn FnMut(&mut Claim),
) {
    for target in wanted.find(listed, folders).filter(|target| target.whose.includes(stem)) {
        if let Some(claim) = claims.get_mut(&(target.path, stem.to_vec())) {
            change(claim);
        }
    }
}

/// A package's name and, if it is given, architecture.
fn qualified(stem: &[u8]) -> (&[u8], Option<&[u8]>) {
    match stem.iter().position(|b| *b == b':') {
        Some(at) => (stem.get(..at).unwrap_or_default(), stem.get(at + 1..)),
        None => (stem, None),
    }
}

#[derive(Debug)]
struct Diversion {
    from: Vec<u8>,
    to: Vec<u8>,
    keeper: Vec<u8>,
}

/// Where in `status` a line stands.
#[derive(Debug, Default)]
struct Stanza {
    package: Vec<u8>,
    architecture: Vec<u8>,
    in_conffiles: bool,
}

impl Stanza {
    /// Takes the next line; if it names a configuration file, its path and digest.
    fn conffile<'l>(&mut self, line: &'l [u8]) -> Option<(&'l [u8], &'l [u8])> {
        if self.in_conffiles
            && let Some(line) = line.strip_prefix(b" ")
        {
            // A path may hold blanks, so it is what is left when the known words behind it are gone.
            let line = line.strip_suffix(b" remove-on-upgrade").unwrap_or(line);
            let line = line.strip_suffix(b" obsolete").unwrap_or(line);
            let at = line.iter().rposition(|b| *b == b' ')?;
            return Some((line.get(..at)?, line.get(at + 1..)?));
        }
        self.in_conffiles = line == b"Conffiles:";
        if line.is_empty() {
            *self = Self::default();
        } else if let Some(package) = line.strip_prefix(b"Package: ") {
            self.package = package.to_vec();
        } else if let Some(architecture) = line.strip_prefix(b"Architecture: ") {
            self.architecture = architecture.to_vec();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Instant};

    use super::*;
    use crate::platform::packages::Packages;

    const ONE: &str = "11111111111111111111111111111111";
    const TWO: &str = "22222222222222222222222222222222";

    /// A system with `/bin` and `/lib` as links into `/usr`, as most have them.
    struct System {
        folder: tempfile::TempDir,
    }

    impl System {
        fn new() -> Self {
            let system = Self { folder: tempfile::tempdir().unwrap() };
            for folder in ["usr/bin", "usr/lib", "etc", "run", "var", "opt/odd", "dpkg/info"] {
                fs::create_dir_all(system.path(folder)).unwrap();
            }
            symlink("usr/bin", system.path("bin")).unwrap();
            symlink("usr/lib", system.path("lib")).unwrap();
            symlink("../run", system.path("var/run")).unwrap();
            system
        }

        fn path(&self, within: &str) -> PathBuf {
            fs::canonicalize(self.folder.path()).unwrap().join(within)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path("dpkg").join(name), text).unwrap();
        }

        fn package(&self, name: &str, list: &[&str], md5sums: &[(&str, &str)]) {
            self.write(
                &format!("info/{name}.list"),
                &list.iter().map(|p| format!("{p}\n")).collect::<String>(),
            );
            let md5sums: String = md5sums.iter().map(|(sum, path)| format!("{sum}  {path}\n")).collect();
            self.write(&format!("info/{name}.md5sums"), &md5sums);
        }

        /// The owners of paths below the root, as `name digest digest`; configuration files are marked.
        fn owners(&self, within: &[&str]) -> Vec<Vec<String>> {
            let wanted: Vec<PathBytes> = within
                .iter()
                .map(|name| PathBytes(self.path(name).as_os_str().as_bytes().to_vec()))
                .collect();
            let packages = Packages::of_dpkg(&self.path(""), &self.path("dpkg"));
            let found = packages.look_up(&wanted).unwrap();
            let show = |owner: &Owner| {
                let digests = [ONE, TWO].into_iter().filter(|digits| {
                    let checksum = Checksum::from_hex(Algorithm::Md5, digits.as_bytes()).unwrap();
                    owner.checksums.contains(&checksum)
                });
                let config = owner.package.reinstall().is_some_and(|c| c.contains("confmiss"));
                let words = [owner.package.to_string()].into_iter().chain(digests.map(|d| d[..1].to_owned()));
                words.chain(config.then(|| "config".to_owned())).collect::<Vec<_>>().join(" ")
            };
            let mut owners: Vec<Vec<String>> =
                wanted.iter().map(|path| found.get(path).into_iter().flatten().map(show).collect()).collect();
            owners.iter_mut().for_each(|owners| owners.sort());
            owners
        }

        fn owner(&self, within: &str) -> Vec<String> {
            self.owners(&[within]).remove(0)
        }
    }

    #[test]
    fn a_file_is_found_under_either_name_of_a_merged_folder() {
        let system = System::new();
        system.package("old", &["/.", "/bin", "/bin/ls", "/lib/x.so"], &[(ONE, "bin/ls")]);
        system.package("new", &["/usr/bin/cat"], &[(TWO, "usr/bin/cat")]);
        system.package("daemon", &["/var/run/d.pid"], &[(ONE, "var/run/d.pid")]);
        assert_eq!(system.owner("usr/bin/ls"), ["old 1"]);
        assert_eq!(system.owner("usr/bin/cat"), ["new 2"]);
        assert_eq!(system.owner("usr/lib/x.so"), ["old"], "listed without a checksum");
        assert_eq!(system.owner("run/d.pid"), ["daemon 1"]);
        assert_eq!(system.owner("usr/bin/../bin//./ls"), ["old 1"], "another spelling");
        assert!(system.owner("usr/bin/dog").is_empty());
        assert!(system.owner("opt/ls").is_empty(), "the same name elsewhere");
        let all = system.owners(&["usr/bin/cat", "usr/bin/dog", "usr/bin/ls"]);
        assert_eq!(all, [vec!["new 2".to_owned()], vec![], vec!["old 1".to_owned()]], "several at once");
    }

    #[test]
    fn odd_names_are_whole_lines() {
        let system = System::new();
        let names = [
            "opt/odd/a b",
            "opt/odd/ end ",
            "opt/odd/\u{e4}\u{202e}",
            "opt/odd/back\\slash",
            "opt/odd/tab\t",
        ];
        let listed: Vec<String> = names.iter().map(|name| format!("/{name}")).collect();
        let listed: Vec<&str> = listed.iter().map(String::as_str).collect();
        let sums: Vec<(&str, &str)> = names.iter().map(|name| (ONE, *name)).collect();
        system.package("odd", &listed, &sums);
        for name in names {
            assert_eq!(system.owner(name), ["odd 1"], "{name:?}");
        }
        // A stranger's name that holds a listed one after a newline, and one that ends in a listed one.
        for name in ["opt/odd/x\n/opt/odd/a b", "opt/odd/a b\n", "opt/odd/a", "opt/odd/a b "] {
            assert!(system.owner(name).is_empty(), "{name:?}");
        }
        let long = format!("opt/{}", "x".repeat(20_000));
        system.package("long", &[&format!("/{long}"), "/opt/odd/after"], &[]);
        assert!(system.owner(&long).is_empty());
        assert_eq!(system.owner("opt/odd/after"), ["long"], "a line after one that is too long");
    }

    #[test]
    fn packages_of_several_architectures_share_a_file() {
        let system = System::new();
        system.package("libx:amd64", &["/usr/lib/shared"], &[(ONE, "usr/lib/shared")]);
        system.package("libx:i386", &["/usr/lib/shared", "/etc/x.conf"], &[(ONE, "usr/lib/shared")]);
        system.write(
            "status",
            &format!(
                "Package: libx\nArchitecture: amd64\nConffiles:\n /etc/x.conf {ONE}\n\n\
                 Package: libx\nArchitecture: i386\nConffiles:\n /etc/x.conf {TWO}\nVersion: 1\n"
            ),
        );
        assert_eq!(system.owner("usr/lib/shared"), ["libx:amd64 1", "libx:i386 1"]);
        assert_eq!(system.owner("etc/x.conf"), ["libx:i386 2 config"]);
    }

    #[test]
    fn configuration_files_have_their_checksums_in_the_status() {
        let system = System::new();
        let files = ["/etc/a", "/etc/b c", "/etc/d", "/etc/e", "/etc/f", "/etc/g"];
        system.package("p", &files, &[(TWO, "etc/g")]);
        system.write(
            "status",
            &format!(
                "Package: other\nConffiles:\n /etc/a {TWO}\n\n\
                 Package: p\nStatus: install ok installed\nArchitecture: all\nConffiles:\n /etc/a {ONE}\n \
                 /etc/b c {ONE} obsolete\n /etc/d {ONE} remove-on-upgrade\n /etc/e newconffile\n \
                 /etc/g {ONE}\nDescription: x\n /etc/f {ONE}\n"
            ),
        );
        assert_eq!(system.owner("etc/a"), ["p 1 config"], "not the other package's");
        assert_eq!(system.owner("etc/b c"), ["p 1 config"]);
        assert_eq!(system.owner("etc/d"), ["p 1 config"]);
        assert_eq!(system.owner("etc/e"), ["p config"], "not known yet");
        assert_eq!(system.owner("etc/f"), ["p"], "a line of the description");
        assert_eq!(system.owner("etc/g"), ["p 2"], "the package's own list is enough");
    }

    #[test]
    fn a_diverted_file_lies_elsewhere() {
        let system = System::new();
        system.package("dash", &["/bin/sh"], &[(ONE, "bin/sh")]);
        system.package("shell", &["/bin/sh"], &[(TWO, "bin/sh")]);
        assert_eq!(system.owner("usr/bin/sh"), ["dash 1", "shell 2"], "the control");
        system.write("diversions", "/bin/sh\n/bin/sh.distrib\ndash\n");
        assert_eq!(system.owner("usr/bin/sh"), ["dash 1"]);
        assert_eq!(system.owner("usr/bin/sh.distrib"), ["shell 2"]);
        system.write("diversions", "/usr/bin/sh\n/usr/bin/sh.real\n:\n/x\n");
        assert!(system.owner("usr/bin/sh").is_empty(), "the administrator has put another there");
        assert_eq!(system.owner("usr/bin/sh.real"), ["dash 1", "shell 2"]);
    }

    #[test]
    fn damage_is_an_error_or_costs_a_checksum() {
        let system = System::new();
        system.package("p", &["/usr/bin/x"], &[("1111", "usr/bin/x"), ("z", "")]);
        assert_eq!(system.owner("usr/bin/x"), ["p"], "a checksum that is none");
        fs::write(system.path("dpkg/info/q.list"), b"\xff\0\n/usr/bin/x").unwrap();
        assert_eq!(system.owner("usr/bin/x"), ["p", "q"], "a last line without an end");

        fs::create_dir(system.path("dpkg/info/bad.list")).unwrap();
        let packages = Packages::of_dpkg(&system.path(""), &system.path("dpkg"));
        let error = packages.look_up(&[PathBytes(b"/x".to_vec())]).unwrap_err();
        assert!(matches!(error, PackageError::Read { .. }), "{error}");
        assert!(Dpkg::at(Path::new("/"), &system.path("none")).is_none());
    }

    /// The system that the tests run on, if it is Debian's.
    #[test]
    fn the_files_of_this_system_are_found() {
        let Some(dpkg) = Dpkg::at(Path::new("/"), Path::new("/var/lib/dpkg")) else {
            eprintln!("not tried: this system has no dpkg database");
            return;
        };
        let begin = Instant::now();
        let mut paths: Vec<PathBytes> = Vec::new();
        for entry in fs::read_dir("/usr/bin").unwrap().map(|entry| entry.unwrap()) {
            if entry.file_type().unwrap().is_file() && paths.len() < 98 {
                paths.push(PathBytes(entry.path().as_os_str().as_bytes().to_vec()));
            }
        }
        let ls = PathBytes(b"/usr/bin/ls".to_vec());
        let copyright = PathBytes(b"/usr/share/doc/bash/copyright".to_vec());
        paths.extend([ls.clone(), copyright.clone()]);
        let mut owners = Owners::new();
        dpkg.look_up(&paths, &mut owners).unwrap();
        let elapsed = begin.elapsed();

        let [owner] = owners.get(&ls).unwrap().as_slice() else { panic!("{owners:?}") };
        assert_eq!(owner.package.to_string(), "coreutils");
        let mut digester = crate::platform::packages::Digester::new(&[Algorithm::Md5].into());
        digester.update(&fs::read("/usr/bin/ls").unwrap());
        let (_, computed) = digester.finish();
        assert!(owner.checksums.len() == 1 && computed.contains(&owner.checksums[0]), "{owner:?}");
        assert_eq!(owners.get(&copyright).map(Vec::len), Some(1));
        eprintln!("{} of {} paths have owners, found in {elapsed:?}", owners.len(), paths.len());
    }
}
