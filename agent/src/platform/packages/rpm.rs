//! The rpm database, which only the program `rpm` can read: it has had four formats so far.
//!
//! `rpm` is asked twice for all paths together: which packages own them, then what those packages list.
//!
//! **Invariant:** a path with a control character in it is not handed over: rpm repeats paths in its answer, and
//! a newline in one could pass for a line of the answer.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tm_protocol::{report::PathBytes, text};

use crate::platform::packages::{
    Algorithm, Checksum, Manager, Owner, Owners, Package, PackageError,
    lines::Lines,
    names::{self, Folders, Wanted},
};

/// Where distributions keep the database.
const PLACES: [&str; 2] = ["/usr/lib/sysimage/rpm", "/var/lib/rpm"];
/// The file by which a database is known, in each format.
const FILES: [&str; 3] = ["rpmdb.sqlite", "Packages.db", "Packages"];
/// Programs that reinstall, best first.
const MANAGERS: [(&str, Manager); 4] = [
    ("/usr/bin/dnf", Manager::Dnf),
    ("/usr/bin/dnf5", Manager::Dnf),
    ("/usr/bin/yum", Manager::Yum),
    ("/usr/bin/zypper", Manager::Zypper),
];

/// How long one question may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How much one answer may be, in bytes. A package of 100,000 files needs some 20 MB.
const MAX_ANSWER: usize = 256 << 20;
/// Most paths or packages in one question: the system allows 2 MiB of arguments.
const MAX_ARGUMENTS: usize = 256;
/// How much rpm may complain, in bytes, before the rest is dropped.
const MAX_COMPLAINT: usize = 1024;

/// An rpm database.
#[derive(Debug)]
pub(super) struct Rpm {
    program: PathBuf,
    /// Where the database is, if not at the usual place.
    database: Option<PathBuf>,
    manager: Manager,
    patience: Duration,
}

impl Rpm {
    /// That of this system; `None` if there is none.
    pub(super) fn of_this_system() -> Option<Self> {
        let is_there =
            PLACES.iter().any(|place| FILES.iter().any(|name| Path::new(place).join(name).exists()));
        let manager = MANAGERS.iter().find(|(program, _)| Path::new(program).exists());
        is_there.then(|| Self {
            program: PathBuf::from("/usr/bin/rpm"),
            database: None,
            manager: manager.map_or(Manager::None, |(_, manager)| *manager),
            patience: PATIENCE,
        })
    }

    /// Adds the owners of `paths` to `owners`.
    pub(super) fn look_up(&self, paths: &[PathBytes], owners: &mut Owners) -> Result<(), PackageError> {
        let mut wanted = Wanted::new();
        let mut asked = Vec::new();
        for (at, path) in paths.iter().enumerate() {
            let Some(path) = names::normal(&path.0).filter(|path| !path.iter().any(u8::is_ascii_control))
            else {
                continue;
            };
            if let Some((folder, name)) = names::split(&path) {
                wanted.add(folder, name, at);
                asked.push(OsString::from(OsStr::from_bytes(&path)));
            }
        }
        let labels: Vec<OsString> = self.labels(&asked)?.into_iter().collect();
        let mut folders = Folders::new(Path::new("/"));
        for labels in labels.chunks(MAX_ARGUMENTS) {
            let format = "--queryformat=[%{=NAME}\t%{=FILEDIGESTALGO}\t%{FILEDIGESTS}\t%{FILENAMES}\n]";
            self.ask(&[format], labels, &mut |line| {
                let Some(listed) = Listed::read(line) else { return };
                for path in wanted.find(listed.path, &mut folders).filter_map(|at| paths.get(*at)) {
                    let package = Package::new(listed.package, self.manager);
                    let checksums = listed.checksum.iter().cloned().collect();
                    owners.entry(path.clone()).or_default().push(Owner { package, checksums });
                }
            })?;
        }
        Ok(())
    }

    /// The packages that own any of the paths, as rpm names them exactly.
    fn labels(&self, paths: &[OsString]) -> Result<BTreeSet<OsString>, PackageError> {
        let mut labels = BTreeSet::new();
        for paths in paths.chunks(MAX_ARGUMENTS) {
            let format = "--queryformat=package\t%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}\n";
            self.ask(&["--file", format], paths, &mut |line| {
                // "file /x is not owned by any package" has no tab, as no path that was asked for has one.
                if let Some(label) = line.strip_prefix(b"package\t") {
                    labels.insert(OsString::from(OsStr::from_bytes(label)));
                }
            })?;
        }
        Ok(labels)
    }

    /// Asks one question, and gives each line of the answer to `visit`.
    fn ask(
        &self,
        options: &[&str],
        about: &[OsString],
        visit: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PackageError> {
        if about.is_empty() {
            return Ok(());
        }
        let failed = |source| PackageError::Ask { program: self.program.clone(), source };
        let facts = fs::metadata(&self.program).map_err(failed)?;
        if facts.uid() != 0 || facts.mode() & 0o022 != 0 {
            return Err(PackageError::NotOfRoot { program: self.program.clone() });
        }
        let mut command = Command::new(&self.program);
        command.env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin").current_dir("/");
        command.arg("--query");
        if let Some(database) = &self.database {
            command.arg("--dbpath").arg(database);
        }
        command.args(options).arg("--").args(about);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let until = Instant::now() + self.patience;
        let mut rpm = Running(command.spawn().map_err(failed)?);
        let answer = rpm.0.stdout.take().expect("it was piped");
        let complaint = rpm.0.stderr.take().expect("it was piped");
        // The exit status counts the paths without an owner, so it tells nothing; what it writes does.
        let complaint = take(answer, complaint, until, visit)?;
        rpm.end(until)?;
        match error_in(&complaint) {
            Some(line) => Err(PackageError::Rpm(text::escape(line))),
            None => Ok(()),
        }
    }
}

/// The first error that is not about a missing file or package.
fn error_in(complaint: &[u8]) -> Option<&[u8]> {
    complaint
        .split(|b| *b == b'\n')
        .filter(|line| line.starts_with(b"error:"))
        .find(|line| !(line.starts_with(b"error: file /") && line.ends_with(b": No such file or directory")))
}

/// A program that is ended if it is given up.
struct Running(Child);

impl Running {
    /// Waits for the end of a program that has closed its output.
    fn end(&mut self, until: Instant) -> Result<(), PackageError> {
        while Instant::now() < until {
            match self.0.try_wait() {
                Ok(Some(_)) => return Ok(()),
                // It has said all it had to; all that is left is its exit.
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => break,
            }
        }
        Err(PackageError::Excess("it took too long"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads both outputs to their ends; gives the answer's lines to `visit`, and the complaint back.
fn take(
    answer: ChildStdout,
    complaint: ChildStderr,
    until: Instant,
    visit: &mut dyn FnMut(&[u8]),
) -> Result<Vec<u8>, PackageError> {
    let read = |error: Errno| PackageError::Ask { program: "rpm".into(), source: io::Error::from(error) };
    let mut complaints = Vec::new();
    let mut lines = Lines::default();
    let mut total = 0_usize;
    let mut block = vec![0; 64 * 1024];
    let (mut answer, mut complaint) = (Some(answer), Some(complaint));
    loop {
        let mut waiting = Vec::new();
        waiting.extend(answer.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        waiting.extend(complaint.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        if waiting.is_empty() {
            break;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(PackageError::Excess("it took too long"));
        }
        let limit = Timespec::try_from(left).expect("a limit of seconds fits");
        match poll(&mut waiting, Some(&limit)) {
            Ok(0) => return Err(PackageError::Excess("it took too long")),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(read(error)),
        }
        let mut ready = waiting.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
        if let Some(fd) = &answer
            && ready.next() == Some(true)
        {
            let taken = rustix::io::read(fd, &mut block).map_err(read)?;
            total = total.saturating_add(taken);
            if total > MAX_ANSWER {
                return Err(PackageError::Excess("it was too long"));
            }
            lines.take(block.get(..taken).unwrap_or_default(), visit);
            if taken == 0 {
                lines.end(visit);
                answer = None;
            }
        }
        if let Some(fd) = &complaint
            && ready.next() == Some(true)
        {
            let taken = rustix::io::read(fd, &mut block).map_err(read)?;
            let room = MAX_COMPLAINT.saturating_sub(complaints.len());
            complaints.extend_from_slice(block.get(..taken.min(room)).unwrap_or_default());
            if taken == 0 {
                complaint = None;
            }
        }
    }
    Ok(complaints)
}

/// One file of a package.
#[derive(Debug, PartialEq, Eq)]
struct Listed<'l> {
    package: &'l [u8],
    checksum: Option<Checksum>,
    path: &'l [u8],
}

impl<'l> Listed<'l> {
    /// Reads `NAME\tALGORITHM\tDIGEST\tPATH`; folders and links have no digest.
    fn read(line: &'l [u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |b| *b == b'\t');
        let (package, algorithm, digest, path) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        // Numbers of RFC 4880, section 9.4. SHA-1 (2) was never a default.
        let algorithm = match algorithm {
            b"1" | b"(none)" => Some(Algorithm::Md5),
            b"8" => Some(Algorithm::Sha256),
            b"9" => Some(Algorithm::Sha384),
            b"10" => Some(Algorithm::Sha512),
            _ => None,
        };
        let checksum = algorithm.and_then(|algorithm| Checksum::from_hex(algorithm, digest));
        Some(Self { package, checksum, path })
    }
}
