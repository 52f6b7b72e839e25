//! A throwaway PostgreSQL server: its own folder, a free loopback port, a password of its own.
//!
//! It runs as whoever runs the tests; where that is root, which PostgreSQL refuses, as the user `postgres`.
//! Nothing is flushed to the disk: what is tried is what our programs do, not the server's power cuts.
//!
//! **Invariant:** the server and its folder go with the value.

use std::{
    fs,
    io::Read as _,
    net::{Ipv4Addr, TcpListener},
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{Output, PATIENCE, process::Process, wait_for};

/// The name of its administrator.
const USER: &str = "tm";
/// Where the folder is kept in memory if there is as much room.
const MEMORY: &str = "/dev/shm";
const ROOM: u64 = 4 << 30;

/// A running server.
#[derive(Debug)]
pub struct Postgres {
    // Before the folder: fields are dropped in order.
    process: Process,
    programs: PathBuf,
    password: String,
    port: u16,
    _folder: TempDir,
}

impl Postgres {
    /// Starts a server.
    ///
    /// # Panics
    /// If there is none to start (`cargo xtask test` installs it) or it does not come up.
    pub fn start() -> Self {
        let programs = programs().expect("PostgreSQL is installed (Debian: apt-get install postgresql)");
        let folder = folder();
        let owner = owner();
        let own = |path: &Path| {
            if let Some((user, group)) = owner {
                chown(path, Some(user), Some(group)).expect("root may give files away");
            }
        };
        own(folder.path());
        let run = |name: &str| {
            let mut command = Command::new(programs.join(name));
            command
                .current_dir(folder.path())
                .env_clear()
                .env("LC_ALL", "C.UTF-8")
                .env("PATH", "/usr/bin:/bin");
            if let Some((user, group)) = owner {
                command.uid(user).gid(group);
            }
            command
        };
        let mut random = [0; 16];
        let mut source = fs::File::open("/dev/urandom").expect("there are random numbers");
        source.read_exact(&mut random).expect("they do not end");
        let password = hex::encode(random);
        let secret = folder.path().join("password");
        fs::write(&secret, &password).expect("the folder is writable");
        own(&secret);
        let data = folder.path().join("data");
        let made = run("initdb")
            .args(["-U", USER, "-A", "scram-sha-256", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"])
            .arg("--pwfile")
            .arg(&secret)
            .arg("-D")
            .arg(&data)
            .output()
            .expect("initdb can be run");
        Output::from(made).expect(0);
        let log = folder.path().join("log");
        // Somebody else may take a free port before the server does.
        for _ in 0..5 {
            let port = free_port();
            let mut server = run("postgres");
            server.arg("-D").arg(&data).arg("-k").arg(folder.path()).args(["-p", &port.to_string()]);
            for setting in [
                "listen_addresses=127.0.0.1",
                "fsync=off",
                "synchronous_commit=off",
                "full_page_writes=off",
                "wal_level=minimal",
                "max_wal_senders=0",
                "max_wal_size=64MB",
                "shared_buffers=64MB",
                "max_connections=200",
            ] {
                server.args(["-c", setting]);
            }
            let mut process = Process::start(&mut server, &log);
            let state = data.join("postmaster.pid");
            let is_up = wait_for("PostgreSQL to be ready", PATIENCE, || {
                if process.ended().is_some() {
                    return Some(false);
                }
                let text = fs::read_to_string(&state).unwrap_or_default();
                (text.lines().nth(7).map(str::trim) == Some("ready")).then_some(true)
            });
            if is_up {
                return Self { process, programs, password, port, _folder: folder };
            }
        }
        panic!("PostgreSQL does not start:\n{}", fs::read_to_string(&log).unwrap_or_default());
    }

    /// The address of the server, without a database: `postgres://…:port`.
    pub fn server(&self) -> String {
        format!("postgres://{USER}:{}@127.0.0.1:{}", self.password, self.port)
    }

    /// Makes a database; its address.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn database(&self, name: &str) -> String {
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        format!("{}/{name}", self.server())
    }

    /// Carries out SQL; what it prints, columns apart by `|`.
    ///
    /// # Panics
    /// If the server refuses.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let output = Command::new(self.programs.join("psql"))
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", USER])
            .args(["-p", &self.port.to_string(), "-d", database, "-c", sql])
            .env("PGPASSWORD", &self.password)
            .output()
            .expect("psql can be run");
        Output::from(output).expect(0).out().trim_end().to_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // At once: nobody needs what is in it.
        self.process.signal(Signal::QUIT);
        let _ = self.process.wait(Duration::from_secs(10));
    }
}

/// Where the newest installed server's programs are.
fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    folders.sort();
    let newest = folders.into_iter().map(|(_, folder)| folder).rev();
    let path = std::env::var_os("PATH").unwrap_or_default();
    newest.chain(std::env::split_paths(&path)).find(|folder| folder.join("initdb").is_file())
}

fn folder() -> TempDir {
    let room = rustix::fs::statvfs(MEMORY).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    let place = if room >= ROOM { PathBuf::from(MEMORY) } else { std::env::temp_dir() };
    let mut builder = tempfile::Builder::new();
    builder.prefix("tm-postgres-");
    builder.tempdir_in(place).or_else(|_| builder.tempdir()).expect("temporary folders work")
}

/// Who the server runs as, if not as us.
fn owner() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("there is a list of users");
    let find = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    Some(find("postgres").or_else(|| find("nobody")).expect("there is a user without privileges"))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback can be listened on");
    listener.local_addr().expect("a listener has an address").port()
}
