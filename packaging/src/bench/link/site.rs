//! The manager that is measured: its folder, its process, and what the system says of it.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::super::{status_kib, ticks, ticks_per_second};
use crate::programs::{self, Background};

/// How long a program has to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
const RULE: &str = include_str!("../../../demo/eicar.yar");

/// A manager in a throwaway folder. Dropped, it ends and the folder goes.
#[derive(Debug)]
pub(super) struct Site {
    manager: Option<Background>,
    bins: PathBuf,
    /// Where agents connect.
    pub(super) agents: SocketAddr,
    admin: SocketAddr,
    folder: tempfile::TempDir,
}

impl Site {
    /// Makes the folder; nothing runs yet.
    pub(super) fn prepare(bins: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("tm-bench-").tempdir();
        let folder = folder.context("cannot make a throwaway folder")?;
        let (agents, admin) = programs::free_ports()?;
        let site = Self { manager: None, bins: bins.to_path_buf(), agents, admin, folder };
        let mut init = Command::new(bins.join("tm-manager"));
        init.args(["init", "--public-name", "127.0.0.1", "--agent-listen", &agents.to_string()]);
        init.args(["--admin-listen", &admin.to_string(), "--data"]).arg(site.data());
        run(&mut init)?;
        Ok(site)
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("manager")
    }

    /// Where the simulated agents are kept.
    pub(super) fn personas(&self) -> PathBuf {
        self.folder.path().join("personas")
    }

    pub(super) fn simulator(&self) -> PathBuf {
        self.bins.join("tm-sim")
    }

    /// Starts the manager, after ending the one that runs.
    pub(super) fn serve(&mut self) -> anyhow::Result<()> {
        self.manager = None;
        let mut command = Command::new(self.bins.join("tm-manager"));
        // One line for each session would be measured, too.
        command.args(["serve", "--data"]).arg(self.data()).env("TM_LOG", "warn");
        let log = self.folder.path().join("manager.log");
        self.manager = Some(Background::start("tm-manager", command, log)?);
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(self.admin).is_err() || TcpStream::connect(self.agents).is_err() {
            self.check()?;
            ensure!(Instant::now() < end, "the manager does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Kills the manager and starts it again.
    pub(super) fn kill_and_serve(&mut self) -> anyhow::Result<()> {
        self.manager.take().context("the manager runs")?.kill9()?;
        self.serve()
    }

    /// An error if the manager has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.manager.as_mut().context("the manager runs")?.check()
    }

    /// Makes the keys that sign patterns, and an enrollment token; the file that lies in.
    pub(super) fn token(&self, uses: u32) -> anyhow::Result<PathBuf> {
        self.tmctl(&["pattern", "trust", "init"])?;
        let made = self.tmctl(&["token", "create", "--uses", &uses.to_string(), "-o", "json"])?;
        let made: Value = serde_json::from_str(&made).context("no token was shown")?;
        let path = self.folder.path().join("token");
        fs::write(&path, made["token"].as_str().context("no token was shown")?)
            .context("cannot write the token to a file")?;
        Ok(path)
    }

    /// Imports a rule to scan with.
    pub(super) fn rule(&self) -> anyhow::Result<()> {
        let path = self.folder.path().join("eicar.yar");
        fs::write(&path, RULE).context("cannot write the rule to a file")?;
        self.tmctl(&["pattern", "import", &path.display().to_string()]).map(drop)
    }

    /// What `tmctl` prints.
    pub(super) fn tmctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.bins.join("tmctl"));
        command.env("TMCTL_TRUST", self.folder.path().join("trust"));
        run(command.arg("--profile").arg(self.data().join("admin.toml")).args(args))
    }

    /// CPU time that the manager has used since it started, user and system, in microseconds.
    pub(super) fn cpu_us(&mut self) -> anyhow::Result<f64> {
        self.check()?;
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()?));
        ticks(&stat.context("cannot look at the manager")?, 14)
            .map(|ticks| ticks * 1e6 / ticks_per_second())
            .context("/proc/PID/stat is of another form")
    }

    /// The manager's memory that no file is behind.
    pub(super) fn anonymous_kib(&self) -> anyhow::Result<u64> {
        status_kib(self.pid()?, "RssAnon").context("/proc/PID/status is of another form")
    }

    fn pid(&self) -> anyhow::Result<u32> {
        Ok(self.manager.as_ref().context("the manager runs")?.pid())
    }
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
