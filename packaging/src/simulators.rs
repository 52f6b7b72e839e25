//! Simulator processes: started, told what to do, and added up.
//!
//! **Invariant:** only processes started here are ended here, and each is asked to end before it is killed.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

/// Agents of one process: it holds one descriptor for each, and 20,000 at most where a usual hard limit stands.
pub(crate) const EACH: u32 = 15_000;
/// How long a simulator has to end after it was asked.
const GRACE: Duration = Duration::from_secs(10);

/// All simulator processes of one fleet. Dropped, they end.
#[derive(Debug)]
pub(crate) struct Simulators {
    all: Vec<One>,
    agents: u32,
}

/// What the agents came to, over all processes. Times are in milliseconds since 1970, 0 if there was none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Agents enrolled anew.
    pub(crate) enrolled: u64,
    /// Agents that have a session now.
    pub(crate) connected: u64,
    /// Sessions there have been.
    pub(crate) sessions: u64,
    /// Sessions that ended and were not cut on purpose.
    pub(crate) broken: u64,
    /// Attempts that came to no session.
    pub(crate) refused: u64,
    /// Tasks that came, each once, and how often one came again.
    pub(crate) tasks: u64,
    pub(crate) repeated: u64,
    /// Tasks whose end the manager has acknowledged.
    pub(crate) done: u64,
    pub(crate) last_connected_ms: u64,
    pub(crate) last_task_ms: u64,
    pub(crate) last_done_ms: u64,
    /// Why a session ended last, or did not begin.
    pub(crate) last_end: String,
}

#[derive(Debug)]
struct One {
    child: Child,
    orders: Option<ChildStdin>,
    heard: Arc<Heard>,
}

/// What a process has said so far.
#[derive(Debug, Default)]
struct Heard {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: bool,
    ended: bool,
    enrolled: u64,
    last: Value,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, line: &str) {
        let Ok(line) = serde_json::from_str::<Value>(line) else { return };
        let mut state = self.lock();
        if line["ready"].is_u64() {
            state.ready = true;
        } else if let Some(count) = line["enrolled"].as_u64() {
            state.enrolled = count;
        } else {
            state.last = line;
        }
        drop(state);
        self.news.notify_all();
    }
}

impl Simulators {
    /// Starts as many processes as `agents` need, for the manager at `at`, with their agents kept in `personas`.
    ///
    /// # Errors
    /// If a process cannot be started.
    pub(crate) fn start(
        program: &Path,
        at: SocketAddr,
        personas: &Path,
        agents: u32,
        token: Option<&Path>,
    ) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;
        fs::create_dir_all(personas).with_context(|| format!("cannot make `{}`", personas.display()))?;
        let mut all = Self { all: Vec::new(), agents };
        for (number, first) in (0..agents).step_by(usize::try_from(EACH)?).enumerate() {
            let mut command = Command::new(program);
            command.arg(at.to_string()).arg(personas.join(format!("personas-{number}.jsonl")));
            command.args([first.to_string(), EACH.min(agents - first).to_string()]);
            command.args(token);
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                // Ctrl-C at the terminal is for us; we end it in order.
                .process_group(0)
                .spawn()
                .context("cannot start a simulator")?;
            let orders = child.stdin.take();
            let out = child.stdout.take().context("its output is a pipe")?;
            let heard = Arc::<Heard>::default();
            all.all.push(One { child, orders, heard: Arc::clone(&heard) });
            thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    heard.take(&line);
                }
                heard.lock().ended = true;
                heard.news.notify_all();
            });
        }
        Ok(all)
    }

    /// How many processes there are.
    pub(crate) fn processes(&self) -> usize {
        self.all.len()
    }

    /// Whether every process has all its agents.
    ///
    /// # Errors
    /// If a process has ended; it has said why.
    pub(crate) fn are_ready(&mut self) -> anyhow::Result<bool> {
        self.check()?;
        Ok(self.all.iter().all(|one| one.heard.lock().ready))
    }

    /// Tells every process something.
    ///
    /// # Errors
    /// If one no longer listens.
    pub(crate) fn tell(&mut self, word: &str) -> anyhow::Result<()> {
        for one in &mut self.all {
            let orders = one.orders.as_mut().context("a simulator is ending")?;
            writeln!(orders, "{word}").context("a simulator has ended")?;
        }
        Ok(())
    }

    /// What it came to so far.
    pub(crate) fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        for one in &self.all {
            let state = one.heard.lock();
            let of = |key: &str| state.last[key].as_u64().unwrap_or(0);
            sums.enrolled += state.enrolled;
            sums.connected += of("connected");
            sums.sessions += of("sessions");
            sums.broken += of("broken");
            sums.refused += of("refused");
            sums.tasks += of("tasks");
            sums.repeated += of("repeated");
            sums.done += of("done");
            sums.last_connected_ms = sums.last_connected_ms.max(of("last_connected_ms"));
            sums.last_task_ms = sums.last_task_ms.max(of("last_task_ms"));
            sums.last_done_ms = sums.last_done_ms.max(of("last_done_ms"));
            if let Some(why) = state.last["last_end"].as_str().filter(|why| !why.is_empty()) {
                why.clone_into(&mut sums.last_end);
            }
        }
        sums
    }

    /// Waits until every process has its agents.
    ///
    /// # Errors
    /// If one ends, or no agent is enrolled for as long as `patience`.
    pub(crate) fn wait_ready(&mut self, patience: Duration) -> anyhow::Result<()> {
        let (mut since, mut known) = (Instant::now(), 0);
        while !self.are_ready()? {
            let enrolled = self.sums().enrolled;
            if enrolled > known {
                (since, known) = (Instant::now(), enrolled);
            }
            ensure!(
                since.elapsed() < patience,
                "the simulators have {enrolled} agents after waiting in vain"
            );
            self.pause();
        }
        Ok(())
    }

    /// Waits until the sums are as `enough` says; what they are then.
    ///
    /// # Errors
    /// If a process ends, or nothing changes for as long as `patience`.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        patience: Duration,
        enough: impl Fn(&Sums) -> bool,
    ) -> anyhow::Result<Sums> {
        let (mut since, mut last) = (Instant::now(), self.sums());
        loop {
            self.check()?;
            let now = self.sums();
            if enough(&now) {
                return Ok(now);
            }
            if (now.sessions, now.done) > (last.sessions, last.done) || now.connected > last.connected {
                (since, last) = (Instant::now(), now);
            } else if since.elapsed() >= patience {
                bail!("waited in vain for {what}: {now:?} of {} agents", self.agents);
            }
            self.pause();
        }
    }

    /// Asks every process to end, and waits; what it came to in the end.
    ///
    /// # Errors
    /// If one has failed or does not end by itself.
    pub(crate) fn end(mut self) -> anyhow::Result<Sums> {
        self.ask_to_end();
        for one in &mut self.all {
            let end = Instant::now() + GRACE;
            while one.child.try_wait().context("cannot ask after a simulator")?.is_none() {
                ensure!(Instant::now() < end, "a simulator does not end");
                thread::sleep(Duration::from_millis(10));
            }
            let status = one.child.wait().context("cannot ask after a simulator")?;
            ensure!(status.success(), "a simulator has failed ({status})");
            while !one.heard.lock().ended {
                ensure!(Instant::now() < end, "a simulator's output does not end");
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(self.sums())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        for one in &mut self.all {
            if let Some(status) = one.child.try_wait().context("cannot ask after a simulator")? {
                bail!("a simulator has ended ({status})");
            }
        }
        Ok(())
    }

    /// Until something is new, or a moment has passed.
    fn pause(&self) {
        let Some(one) = self.all.first() else { return };
        let state = one.heard.lock();
        let _ = one.heard.news.wait_timeout(state, Duration::from_millis(100));
    }

    fn ask_to_end(&mut self) {
        for one in &mut self.all {
            // The end of its input.
            one.orders = None;
        }
    }
}

impl Drop for Simulators {
    fn drop(&mut self) {
        self.ask_to_end();
        let end = Instant::now() + GRACE;
        for one in &mut self.all {
            while matches!(one.child.try_wait(), Ok(None)) && Instant::now() < end {
                thread::sleep(Duration::from_millis(10));
            }
            let _ = one.child.kill();
            let _ = one.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_processes_say_is_added_up() {
        let heard = Heard::default();
        for line in [
            r#"{"enrolled":100}"#,
            r#"{"ready":15000}"#,
            r#"{"connected":1,"sessions":1}"#,
            "no line of its own",
            r#"{"connected":7,"sessions":9,"done":3,"last_done_ms":5,"last_end":"why"}"#,
        ] {
            heard.take(line);
        }
        let state = heard.lock();
        assert!(state.ready && state.enrolled == 100);
        assert_eq!((state.last["connected"].as_u64(), state.last["done"].as_u64()), (Some(7), Some(3)));
    }
}
