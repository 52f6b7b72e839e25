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
