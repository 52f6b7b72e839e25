//! One manager and its agents, on free loopback ports, in a folder of their own.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    FaultProxy, Output, PATIENCE, bin,
    output::rows,
    process::Process,
    raw::{self, Identity, Raw},
    wait_for,
};

/// A running manager. Dropped, it ends and its folder goes (agents are values of their own and end first if
/// they are declared after it).
#[derive(Debug)]
pub struct Lab {
    manager: Option<Process>,
    folder: TempDir,
    agents: AtomicU32,
    /// Where agents connect.
    pub agent_port: SocketAddr,
    /// Where administrators connect.
    pub admin_port: SocketAddr,
}

/// An enrolled agent.
#[derive(Debug)]
pub struct Agent {
    process: Option<Process>,
    log: PathBuf,
    /// Its data folder.
    pub data: PathBuf,
    /// Its endpoint's id.
    pub id: String,
}

impl Lab {
    /// Starts a manager with a heartbeat of one second.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start() -> Self {
        Self::prepare().started()
    }

    /// The same at another address of this machine than IPv4 loopback.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_at(ip: IpAddr) -> Self {
        Self::prepare_at(ip, &[]).started()
    }

    /// The same with a proxy before the agents' port, which is the address that agents are told.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_behind_proxy() -> (Self, FaultProxy) {
        let lab = Self::prepare();
        let proxy = FaultProxy::start(lab.agent_port);
        lab.set("public_names", &format!("[\"{}\"]", proxy.address()));
        (lab.started(), proxy)
    }

    /// Starts a manager whose database and patterns others can share.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_shared(database: &str, patterns: &Path) -> Self {
        let shared =
            [OsStr::new("--database"), OsStr::new(database), "--patterns".as_ref(), patterns.as_ref()];
        Self::prepare_with(&shared).started()
    }

    /// Starts another manager of the same fleet, on what the first one shares.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn join(&self, database: &str, patterns: &Path) -> Self {
        let ca = self.manager_data().join("ca");
        let shared =
            [OsStr::new("--database"), OsStr::new(database), "--patterns".as_ref(), patterns.as_ref()];
        let lab = Self::prepare_with(&[&shared[..], &["--join".as_ref(), ca.as_ref()]].concat());
        let profile = fs::read_to_string(self.profile()).expect("init writes the profile");
        let (own, other) = (self.admin_port.to_string(), lab.admin_port.to_string());
        assert!(profile.contains(&own), "{profile}");
        fs::write(lab.profile(), profile.replace(&own, &other)).expect("the lab's folder is writable");
        fs::set_permissions(lab.profile(), std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .expect("a file's mode can be set");
        // The same administrator's desk.
        std::os::unix::fs::symlink(self.trust(), lab.trust()).expect("the lab's folder is writable");
        let mut lab = lab;
        lab.serve();
        lab
    }

    fn prepare() -> Self {
        Self::prepare_with(&[])
    }

    fn prepare_with(more: &[&OsStr]) -> Self {
        Self::prepare_at(Ipv4Addr::LOCALHOST.into(), more)
    }

    fn prepare_at(ip: IpAddr, more: &[&OsStr]) -> Self {
        let folder = tempfile::Builder::new().prefix("tm-test-").tempdir().expect("temporary folders work");
        let (agent_port, admin_port) = free_ports(ip);
        let lab = Self { manager: None, folder, agents: AtomicU32::new(0), agent_port, admin_port };
        let init = Command::new(bin("tm-manager"))
            .args(["init", "--public-name", &ip.to_string(), "--agent-listen", &agent_port.to_string()])
            .args(["--admin-listen", &admin_port.to_string(), "--data"])
            .arg(lab.manager_data())
            .args(more)
            .output()
            .expect("programs can be run");
        Output::from(init).expect(0);
        lab.set("heartbeat", "\"1s\"");
        lab
    }

    fn started(mut self) -> Self {
        self.serve();
        self.tmctl(["pattern", "trust", "init"]).expect(0);
        self
    }

    /// Sets a top-level key of `manager.toml`; takes effect at the next start of the manager.
    ///
    /// # Panics
    /// If the file cannot be read and written.
    pub fn set(&self, key: &str, value: &str) {
        let path = self.manager_data().join("manager.toml");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let is_ours = |line: &str| {
            let line = line.trim_start_matches(['#', ' ']);
            line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
        };
        let setting = format!("{key} = {value}");
        let mut lines: Vec<&str> = text.lines().collect();
        match lines.iter().position(|line| is_ours(line)) {
            Some(at) => lines[at] = &setting,
            // Top-level keys come before every table.
            None => lines.insert(0, &setting),
        }
        fs::write(&path, lines.join("\n") + "\n").expect("the manager's folder is writable");
    }

    fn serve(&mut self) {
        let mut command = Command::new(bin("tm-manager"));
        command.args(["serve", "--data"]).arg(self.manager_data());
        let mut process = Process::start(&mut command, &self.folder.path().join("manager.log"));
        let ports = [self.agent_port, self.admin_port];
        wait_for("the manager to listen", PATIENCE, || {
            assert!(process.ended().is_none(), "the manager ended:\n{}", process.log());
            ports
                .iter()
                .all(|port| TcpStream::connect_timeout(port, Duration::from_secs(1)).is_ok())
                .then_some(())
        });
        self.manager = Some(process);
    }

    /// Stops the manager in order.
    pub fn stop_manager(&mut self) {
        if let Some(mut manager) = self.manager.take() {
            manager.stop();
        }
    }

    /// Stops the manager in order and starts it again.
    pub fn restart_manager(&mut self) {
        self.stop_manager();
        self.serve();
    }

    /// Ends the manager at once.
    pub fn kill9_manager_for_good(&mut self) {
        if let Some(mut manager) = self.manager.take() {
            manager.kill9();
        }
    }

    /// Starts the manager after it was ended.
    pub fn start_manager(&mut self) {
        self.serve();
    }

    /// Ends the manager at once and starts it again.
    pub fn kill9_manager(&mut self) {
        if let Some(mut manager) = self.manager.take() {
            manager.kill9();
        }
        self.serve();
    }

    /// The manager's process.
    ///
    /// # Panics
    /// While it is stopped.
    pub fn manager(&self) -> &Process {
        self.manager.as_ref().expect("the manager runs")
    }

    /// A command of the manager's program on its own folder, beside the one that runs.
    pub fn manager_command(&self, args: &[&str]) -> Output {
        let output = Command::new(bin("tm-manager"))
            .args(args)
            .arg("--data")
            .arg(self.manager_data())
            .output()
            .expect("tm-manager starts");
        output.into()
    }

    /// The manager's data folder.
    pub fn manager_data(&self) -> PathBuf {
        self.folder.path().join("manager")
    }

    /// The administrator's profile for `tmctl`.
    pub fn profile(&self) -> PathBuf {
        self.manager_data().join("admin.toml")
    }

    /// The administrator's folder with the keys that sign patterns. It is not the manager's.
    pub fn trust(&self) -> PathBuf {
        self.folder.path().join("trust")
    }

    /// A path in the lab's own folder, for samples.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a folder for samples.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("the lab's folder is writable");
        path
    }

    /// Runs `tmctl` as the administrator.
    pub fn tmctl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.tmctl_as(&self.profile(), args)
    }

    /// Runs `tmctl` with a profile.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn tmctl_as<S: AsRef<OsStr>>(&self, profile: &Path, args: impl IntoIterator<Item = S>) -> Output {
        tmctl(profile, &self.trust(), args)
    }

    /// Makes an account; its profile for [`Lab::tmctl_as`].
    ///
    /// # Panics
    /// If that does not work.
    pub fn account(&self, name: &str, role: &str) -> PathBuf {
        let made = self.tmctl(["account", "create", name, "--role", role, "-o", "json"]).expect(0).json();
        let token = made["token"].as_str().expect("the token is shown once").to_owned();
        let old = self.admin_token();
        let profile =
            fs::read_to_string(self.profile()).expect("init writes the profile").replace(&old, &token);
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, profile).expect("the lab's folder is writable");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .expect("a file's mode can be set");
        path
    }

    /// The administrator's bearer token.
    ///
    /// # Panics
    /// If the profile has none.
    pub fn admin_token(&self) -> String {
        let text = fs::read_to_string(self.profile()).expect("init writes the profile");
        let line = text.lines().find(|line| line.trim_start().starts_with("token")).expect("it has a token");
        line.split(['"', '\'']).nth(1).expect("texts are quoted").to_owned()
    }

    /// Makes an enrollment token.
    ///
    /// # Panics
    /// If that does not work.
    pub fn token(&self, uses: u32) -> String {
        let made =
            self.tmctl(["token", "create", "--uses", &uses.to_string(), "-o", "json"]).expect(0).json();
        made["token"].as_str().expect("the token is shown").to_owned()
    }

    /// Runs `tm-agent enroll` in a new folder; the folder, and how it went.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn enroll(&self, token: &str) -> (PathBuf, Output) {
        self.enroll_with(token, |_| {})
    }

    /// The same, with what `change` does to the command.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn enroll_with(&self, token: &str, change: impl FnOnce(&mut Command)) -> (PathBuf, Output) {
        let number = self.agents.fetch_add(1, Ordering::Relaxed) + 1;
        let data = self.path(&format!("agent-{number}"));
        let file = self.path(&format!("agent-{number}.token"));
        fs::write(&file, token).expect("the lab's folder is writable");
        let mut command = Command::new(bin("tm-agent"));
        command.arg("enroll").arg("--data").arg(&data).arg("--token-file").arg(&file);
        change(&mut command);
        let output = command.output().expect("programs can be run");
        (data, output.into())
    }

    /// The agent of a folder in which `tm-agent enroll` has printed what `enrolled` holds. It does not run yet.
    ///
    /// # Panics
    /// If it was not let in.
    pub fn enrolled(&self, (data, enrolled): (PathBuf, Output)) -> Agent {
        let id = enrolled.expect(0).out().trim().to_owned();
        Agent { process: None, log: data.with_extension("log"), data, id }
    }

    /// A copy of an agent's folder, as a cloned machine has it, with an agent running on it.
    ///
    /// # Panics
    /// If the folder cannot be copied.
    pub fn clone_of(&self, agent: &Agent) -> Agent {
        let number = self.agents.fetch_add(1, Ordering::Relaxed) + 1;
        let data = self.path(&format!("agent-{number}"));
        let copied = Command::new("cp").arg("-a").arg(&agent.data).arg(&data).status();
        assert!(copied.expect("there is cp").success(), "the folder is copied");
        let mut copy = Agent { process: None, log: data.with_extension("log"), data, id: agent.id.clone() };
        copy.run();
        copy
    }

    /// Enrolls and runs an agent; returns when it is connected.
    ///
    /// # Panics
    /// If it is not let in.
    pub fn agent(&self) -> Agent {
        self.agent_with(&self.token(1))
    }

    /// The same with a token.
    ///
    /// # Panics
    /// If it is not let in.
    pub fn agent_with(&self, token: &str) -> Agent {
        let before = self.ids();
        let (data, output) = self.enroll(token);
        output.expect(0);
        let after = self.ids();
        let mut new: Vec<String> = after.difference(&before).cloned().collect();
        assert_eq!(new.len(), 1, "one agent enrolled, endpoints before: {before:?}, after: {after:?}");
        let log = data.with_extension("log");
        let mut agent = Agent { process: None, log, data, id: new.remove(0) };
        agent.run();
        self.wait_connected(&agent);
        agent
    }

    /// `tmctl endpoint list`.
    pub fn endpoints(&self) -> Vec<Value> {
        rows(&self.tmctl(["endpoint", "list", "-o", "json"]).expect(0).json())
    }

    fn ids(&self) -> BTreeSet<String> {
        self.endpoints().iter().filter_map(|row| Some(row["id"].as_str()?.to_owned())).collect()
    }

    /// Whether an agent has a session, as the manager says.
    pub fn is_connected(&self, agent: &Agent) -> bool {
        self.endpoints()
            .iter()
            .any(|row| row["id"] == agent.id.as_str() && row["connectivity"] == "connected")
    }

    /// Waits until an agent has a session.
    pub fn wait_connected(&self, agent: &Agent) {
        wait_for("an agent to be connected", PATIENCE, || self.is_connected(agent).then_some(()));
    }

    /// Waits until an agent has no session.
    pub fn wait_away(&self, agent: &Agent) {
        wait_for("an agent to be away", PATIENCE, || (!self.is_connected(agent)).then_some(()));
    }

    /// Imports a rule under a name.
    pub fn import(&self, name: &str, rule: &str) -> Output {
        let file = self.path(name);
        fs::write(&file, rule).expect("the lab's folder is writable");
        self.tmctl([OsStr::new("pattern"), OsStr::new("import"), file.as_os_str()])
    }

    /// `tmctl scan start … --wait -o json` on one agent and one path.
    pub fn scan(&self, agent: &Agent, path: &Path) -> Output {
        self.scan_with(agent, path, &["-o", "json"])
    }

    /// The same with other arguments.
    pub fn scan_with(&self, agent: &Agent, path: &Path, more: &[&str]) -> Output {
        self.tmctl(scan_args(agent, path, more))
    }

    /// `tmctl scan start … --wait -o json` in a thread, for what happens meanwhile.
    pub fn scan_in_background(&self, agent: &Agent, path: &Path) -> std::thread::JoinHandle<Output> {
        let (profile, trust) = (self.profile(), self.trust());
        let args = scan_args(agent, path, &["-o", "json"]);
        std::thread::spawn(move || tmctl(&profile, &trust, args))
    }

    /// The newest task of an agent (`TaskView`).
    pub fn newest_task(&self, agent: &Agent) -> Option<Value> {
        let tasks = self.rest(&format!("/v1/tasks?endpoint={}&limit=1", agent.id));
        rows(&tasks).into_iter().next()
    }

    /// The detections of the newest task of an agent, by the REST contract (`DetectionView`).
    ///
    /// # Panics
    /// If it has no task.
    pub fn detections(&self, agent: &Agent) -> Vec<Value> {
        let task = self.newest_task(agent).expect("a task was ordered");
        let id = task["id"].as_str().expect("a task has an id");
        rows(&self.rest(&format!("/v1/tasks/{id}/detections")))
    }

    /// `GET` as the administrator.
    ///
    /// # Panics
    /// Unless the answer is 200 and JSON.
    pub fn rest(&self, path: &str) -> Value {
        let token = self.admin_token();
        let (status, body) = raw::get(self.admin_port, path, Some(&token), None);
        assert_eq!(status, 200, "GET {path}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).expect("answers are JSON")
    }

    /// A TLS connection to the agents' port that believes every server.
    ///
    /// # Errors
    /// If there is no connection, or the handshake is refused while it lasts.
    pub fn raw(&self, alpn: &[u8], identity: Option<&Identity>) -> std::io::Result<Raw> {
        Raw::connect(self.agent_port, alpn, identity)
    }
}

fn scan_args(agent: &Agent, path: &Path, more: &[&str]) -> Vec<std::ffi::OsString> {
    let mut args: Vec<std::ffi::OsString> =
        ["scan", "start", agent.id.as_str(), "--wait", "--path"].into_iter().map(Into::into).collect();
    args.push(path.into());
    args.extend(more.iter().map(Into::into));
    args
}

fn tmctl<S: AsRef<OsStr>>(profile: &Path, trust: &Path, args: impl IntoIterator<Item = S>) -> Output {
    let output = Command::new(bin("tmctl"))
        .arg("--profile")
        .arg(profile)
        .args(args)
        .env("TMCTL_TRUST", trust)
        // No colours, no width of somebody's terminal.
        .env("NO_COLOR", "1")
        .output()
        .expect("programs can be run");
    output.into()
}

impl Agent {
    /// Runs it (again).
    pub fn run(&mut self) {
        let mut command = Command::new(bin("tm-agent"));
        command.args(["run", "--data"]).arg(&self.data);
        self.process = Some(Process::start(&mut command, &self.log));
    }

    /// Runs it with its socket for users' scans at `socket`.
    pub fn run_at(&mut self, socket: &Path) {
        let mut command = Command::new(bin("tm-agent"));
        command.args(["run", "--data"]).arg(&self.data).arg("--socket").arg(socket);
        self.process = Some(Process::start(&mut command, &self.log));
    }

    /// Runs it with a wall clock that is as far off as the file `control` says (`+1d`, `-365d`); the clock that
    /// counts from boot is the real one.
    ///
    /// # Panics
    /// If libfaketime is not installed (`cargo xtask test` installs it).
    pub fn run_with_clock(&mut self, control: &Path) {
        let libraries = fs::read_dir("/usr/lib").expect("there are libraries");
        let faketime = libraries
            .filter_map(|entry| Some(entry.ok()?.path().join("faketime/libfaketime.so.1")))
            .find(|path| path.is_file())
            .expect("libfaketime is installed");
        let mut command = Command::new(bin("tm-agent"));
        command.args(["run", "--data"]).arg(&self.data);
        command.env("LD_PRELOAD", faketime).env("FAKETIME_TIMESTAMP_FILE", control);
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1");
        command.env("FAKETIME_NO_CACHE", "1");
        self.process = Some(Process::start(&mut command, &self.log));
    }

    /// Its process.
    ///
    /// # Panics
    /// While it is stopped.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the agent runs")
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Ends it at once.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill9();
        }
    }

    /// Ends it in order.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.stop();
        }
    }

    /// Freezes it: it holds its connection and says nothing.
    pub fn freeze(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::STOP);
        }
    }

    /// Ends [`Agent::freeze`].
    pub fn thaw(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::CONT);
        }
    }

    /// Runs `tm-agent` with its data folder, beside it.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn command(&self, args: &[&str]) -> Output {
        let output = Command::new(bin("tm-agent")).args(args).arg("--data").arg(&self.data).output();
        output.expect("programs can be run").into()
    }

    /// Its certificate and key, stolen from its folder.
    pub fn identity(&self) -> Identity {
        Identity::steal(&self.data)
    }
}

/// Two ports of an address of this machine that were free a moment ago.
fn free_ports(ip: IpAddr) -> (SocketAddr, SocketAddr) {
    let listen = || TcpListener::bind((ip, 0)).expect("the address can be listened on");
    let (one, two) = (listen(), listen());
    let address = |listener: &TcpListener| listener.local_addr().expect("a listener has an address");
    (address(&one), address(&two))
}
