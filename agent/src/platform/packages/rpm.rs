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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A real package, built and installed into a throwaway folder with a database of its own.
    struct Installed {
        folder: tempfile::TempDir,
    }

    impl Installed {
        /// `None` if this system has no `rpm` and `rpmbuild`.
        fn new() -> Option<Self> {
            if !["/usr/bin/rpm", "/usr/bin/rpmbuild"].iter().all(|program| Path::new(program).exists()) {
                eprintln!("not tried: `rpm` and `rpmbuild` are not installed (Debian: apt-get install rpm)");
                return None;
            }
            let installed = Self { folder: tempfile::tempdir().unwrap() };
            let files = installed.path("files");
            let spec = format!(
                "Name: tm-sample\nVersion: 1.0~rc1\nRelease: 2\nEpoch: 3\nSummary: x\nLicense: MIT\n\
                 BuildArch: noarch\n%description\nx\n%install\nmkdir -p %{{buildroot}}{files}/sub\n\
                 printf 'hello\\n' > %{{buildroot}}{files}/hello\n\
                 printf 'odd\\n' > '%{{buildroot}}{files}/sub/odd na\u{ef}me'\n\
                 ln -s hello %{{buildroot}}{files}/link\n%files\n{files}\n",
                files = files.display()
            );
            fs::write(installed.path("sample.spec"), spec).unwrap();
            let top = format!("_topdir {}", installed.path("top").display());
            let build = ["-bb", "--quiet", "--define", &top, "--define", "_build_id_links none"];
            run(Command::new("/usr/bin/rpmbuild").args(build).arg(installed.path("sample.spec")));
            let package = installed.path("top/RPMS/noarch/tm-sample-1.0~rc1-2.noarch.rpm");
            let mut install = Command::new("/usr/bin/rpm");
            install.args(["--install", "--nodeps", "--dbpath"]).arg(installed.path("db")).arg(package);
            if Path::new("/etc/debian_version").exists() {
                // Debian's own addition: rpm there thinks that it must be a mistake.
                install.arg("--force-debian");
            }
            run(&mut install);
            assert_eq!(fs::read(files.join("hello")).unwrap(), b"hello\n", "the control: it is installed");
            Some(installed)
        }

        fn path(&self, name: &str) -> PathBuf {
            fs::canonicalize(self.folder.path()).unwrap().join(name)
        }

        fn rpm(&self) -> Rpm {
            Rpm {
                program: "/usr/bin/rpm".into(),
                database: Some(self.path("db")),
                manager: Manager::Dnf,
                patience: PATIENCE,
            }
        }
    }

    fn run(command: &mut Command) {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn bytes(path: &Path) -> PathBytes {
        PathBytes(path.as_os_str().as_bytes().to_vec())
    }

    #[test]
    fn an_installed_package_owns_its_files() {
        let Some(installed) = Installed::new() else { return };
        let hello = bytes(&installed.path("files/hello"));
        let odd = bytes(&installed.path("files/sub/odd na\u{ef}me"));
        let link = bytes(&installed.path("files/link"));
        fs::write(installed.path("files/stranger"), b"x").unwrap();
        let stranger = bytes(&installed.path("files/stranger"));
        let missing = bytes(&installed.path("files/missing"));
        // What a stranger's file would have to be called to pass for a line of rpm's answer.
        let digest = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let forged = format!("tm-sample\t8\t{digest}\t{}", installed.path("files/stranger").display());
        let forger = PathBytes([b"/tmp/x\npackage\ttm-sample\n", forged.as_bytes()].concat());
        let paths = [&hello, &odd, &link, &stranger, &missing, &forger].map(Clone::clone);
        let mut owners = Owners::new();
        installed.rpm().look_up(&paths, &mut owners).unwrap();

        let only = |path: &PathBytes| {
            let [owner] = owners.get(path).unwrap().as_slice() else { panic!("{owners:?}") };
            assert_eq!(owner.package.reinstall().as_deref(), Some("dnf reinstall tm-sample"));
            owner.checksums.clone()
        };
        assert_eq!(only(&hello), [Checksum::from_hex(Algorithm::Sha256, digest.as_bytes()).unwrap()]);
        assert_eq!(only(&odd).len(), 1);
        assert_eq!(only(&link), []);
        assert_eq!(owners.len(), 3, "{owners:?}");

        let mut none = Owners::new();
        installed.rpm().look_up(&[stranger], &mut none).unwrap();
        assert!(none.is_empty(), "nobody owns any");
    }

    #[test]
    fn a_damaged_database_is_an_error_and_no_answer() {
        let Some(installed) = Installed::new() else { return };
        let hello = bytes(&installed.path("files/hello"));
        for entry in fs::read_dir(installed.path("db")).unwrap().map(|entry| entry.unwrap()) {
            fs::write(entry.path(), vec![b'x'; 8192]).unwrap();
        }
        let mut owners = Owners::new();
        let error = installed.rpm().look_up(&[hello], &mut owners).unwrap_err();
        assert!(matches!(error, PackageError::Rpm(_)), "{error}");
        assert!(owners.is_empty());
    }

    #[test]
    fn a_program_that_hangs_floods_or_is_not_roots_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("rpm");
        let ask = |script: &str, mode, patience| {
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
            let rpm = Rpm { program: program.clone(), database: None, manager: Manager::None, patience };
            rpm.look_up(&[PathBytes(b"/x".to_vec())], &mut Owners::new())
        };
        let second = Duration::from_secs(1);
        assert!(matches!(ask("exit 0", 0o777, second), Err(PackageError::NotOfRoot { .. })));
        if !rustix::process::geteuid().is_root() {
            eprintln!("not tried: only root can make a program that is root's");
            return;
        }
        ask("echo \"file $6 is not owned by any package\"; exit 1", 0o755, PATIENCE).unwrap();
        let begin = Instant::now();
        for script in ["exec sleep 100", "exec >&- 2>&-; exec sleep 100", "while :; do echo x; done"] {
            let error = ask(script, 0o755, second).unwrap_err();
            assert!(matches!(error, PackageError::Excess(_)), "{script}: {error}");
        }
        let error = ask("exec cat /dev/zero", 0o755, PATIENCE).unwrap_err();
        assert!(matches!(error, PackageError::Excess("it was too long")), "{error}");
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
        let error = ask("echo 'error: \u{9b}rpmdb' >&2", 0o755, PATIENCE).unwrap_err();
        assert_eq!(error.to_string(), r"rpm says: error: \u{9b}rpmdb");
        fs::remove_file(&program).unwrap();
        let rpm = Rpm { program, database: None, manager: Manager::None, patience: second };
        let error = rpm.look_up(&[PathBytes(b"/x".to_vec())], &mut Owners::new()).unwrap_err();
        assert!(matches!(error, PackageError::Ask { .. }), "{error}");
    }

    #[test]
    fn a_line_of_the_answer_is_read_or_ignored() {
        let md5 = "900150983cd24fb0d6963f7d28e17f72";
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for (line, algorithm, digest) in [
            (format!("p\t8\t{sha256}\t/a\tb"), Algorithm::Sha256, Some(sha256)),
            (format!("p\t1\t{md5}\t/a\tb"), Algorithm::Md5, Some(md5)),
            (format!("p\t(none)\t{md5}\t/a\tb"), Algorithm::Md5, Some(md5)),
            (format!("p\t2\t{md5}\t/a\tb"), Algorithm::Md5, None),
            (format!("p\t8\t{md5}\t/a\tb"), Algorithm::Md5, None),
            ("p\t8\t\t/a\tb".to_owned(), Algorithm::Md5, None),
        ] {
            let checksum = digest.map(|digits| Checksum::from_hex(algorithm, digits.as_bytes()).unwrap());
            let listed = Listed { package: b"p", checksum, path: b"/a\tb" };
            assert_eq!(Listed::read(line.as_bytes()), Some(listed), "{line:?}");
        }
        for line in ["", "file /a is not owned by any package", "p\t8\tx"] {
            assert_eq!(Listed::read(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(error_in(b"error: file /a: No such file or directory\nwarning: old\n"), None);
        assert_eq!(error_in(b"warning: x\nerror: cannot open\n"), Some(&b"error: cannot open"[..]));
    }
}
