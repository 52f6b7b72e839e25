//! Our three programs: built, found, started and ended.
//!
//! **Invariant:** only processes started here are ended here, each through the handle it was started with.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// Everything that is installed.
pub(crate) const PROGRAMS: [&str; 3] = ["tm-agent", "tm-manager", "tmctl"];

/// How long a program has to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// The repository.
pub(crate) fn root() -> anyhow::Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here.parent().context("the packaging folder lies in the repository")?.to_path_buf())
}

/// The `cargo` that runs us.
pub(crate) fn cargo() -> anyhow::Result<Command> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()?);
    Ok(cargo)
}

/// Builds the three programs.
pub(crate) fn build() -> anyhow::Result<()> {
    let args = ["build", "--locked", "--bins", "-p", "tm-agent", "-p", "tm-manager", "-p", "tmctl"];
    eprintln!("Building the programs: cargo {}", args.join(" "));
    let status = cargo()?.args(args).status().context("cannot run cargo")?;
    ensure!(status.success(), "the programs could not be built");
    Ok(())
}

/// Where a program is: beside this one.
pub(crate) fn path(name: &str) -> anyhow::Result<PathBuf> {
    let beside = env::current_exe().context("cannot tell where this program is")?.with_file_name(name);
    ensure!(beside.is_file(), "`{}` is not there; was it built?", beside.display());
    Ok(beside)
}

/// Two free loopback ports. Somebody else may take one before the manager does; then it says so.
pub(crate) fn free_ports() -> anyhow::Result<(SocketAddr, SocketAddr)> {
    let listen = || TcpListener::bind(("127.0.0.1", 0)).context("cannot listen on loopback");
    let (one, two) = (listen()?, listen()?);
    Ok((one.local_addr()?, two.local_addr()?))
}

/// A program that runs in the background until this value is dropped.
#[derive(Debug)]
pub(crate) struct Background {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Background {
    /// Starts `command`, with its output at the end of `log`.
    pub(crate) fn start(name: &str, mut command: Command, log: PathBuf) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let file = File::options()
            .append(true)
            .create(true)
            .open(&log)
            .with_context(|| format!("cannot write `{}`", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot share the log")?)
            .stderr(file)
            // Ctrl-C at the terminal is for us; we end it in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// An error with the end of its log if it no longer runs.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait().context("cannot ask after a program")? else {
            return Ok(());
        };
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
        bail!("{} has ended ({status}); the end of its log:\n{end}", self.name)
    }

    /// Ends it at once (SIGKILL); how it ended.
    pub(crate) fn kill9(mut self) -> anyhow::Result<ExitStatus> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        // Not waited for, so the number still is our child's.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a program is on the search path (or where administrators' programs and database servers lie).
pub(crate) fn is_installed(program: impl AsRef<OsStr>) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let servers = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .chain(servers.map(|version| version.path().join("bin")))
        .any(|folder| folder.join(program.as_ref()).is_file())
}
