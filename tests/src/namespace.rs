//! A network of one's own: a network namespace with nothing in it but loopback. Needs root, util-linux and iproute2.
//!
//! **Invariant:** it ends with its value, and nothing outside of it is changed.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    os::fd::AsFd as _,
    process::{Child, Command, Stdio},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace, held by a process that waits in it.
#[derive(Debug)]
pub struct Namespace {
    holder: Child,
    link: File,
}

impl Namespace {
    /// Makes one; `setup` are commands of a shell in it, after loopback is up.
    ///
    /// # Panics
    /// If that does not work (not root, no iproute2).
    pub fn start(setup: &str) -> Self {
        let script = format!("set -e; ip link set lo up; {setup}; echo ready; exec cat");
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is unshare");
        let mut line = String::new();
        let out = holder.stdout.take().expect("its output is piped");
        let read = BufReader::new(out).read_line(&mut line);
        assert!(read.is_ok() && line == "ready\n", "the namespace is not as asked: `{setup}` said {line:?}");
        let link = File::open(format!("/proc/{}/ns/net", holder.id())).expect("a process has a namespace");
        Self { holder, link }
    }

    /// Does `work` inside. What it listens on and the programs that it starts stay inside; threads that it starts, too.
    ///
    /// # Panics
    /// If `work` does.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let moved = scope.spawn(|| {
                move_into_link_name_space(self.link.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may move");
                work()
            });
            match moved.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
