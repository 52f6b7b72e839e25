//! `cargo xtask demo`: the whole chain on one machine, every step printed and verified.
//!
//! **Invariant:** a step counts only when its effect was read back; `--once` fails if one was not.
//! **Invariant:** nothing is left behind: programs end with this one, and the folder goes.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::{
    programs::{self, Background},
    samples,
};

/// How long anything is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// `scan --wait` when something was detected.
const DETECTED: i32 = 10;
const RULE: &str = include_str!("../demo/eicar.yar");
const RULE_NAME: &str = "eicar_test_file";

/// Runs the demo; with `once` it ends by itself.
pub(crate) fn run(once: bool) -> anyhow::Result<()> {
    programs::build()?;
    let mut demo = Demo::prepare()?;
    demo.manager()?;
    demo.agents()?;
    let endpoints = demo.connected()?;
    demo.pattern()?;
    for (number, endpoint) in (1..).zip(&endpoints) {
        demo.scan(endpoint, number)?;
    }
    demo.audit()?;
    demo.say("\nEvery step was verified.\n")?;
    if !once {
        demo.stay(&endpoints)?;
    }
    demo.end()
}

/// What runs. Fields are dropped in this order: agents, manager, folder.
#[derive(Debug)]
struct Demo {
    agents: Vec<Background>,
    manager: Option<Background>,
    folder: tempfile::TempDir,
    interrupt: Interrupt,
}

impl Demo {
    fn prepare() -> anyhow::Result<Self> {
        let interrupt = Interrupt::listen()?;
        let folder = tempfile::Builder::new()
            .prefix("tm-demo-")
            .tempdir()
            .context("cannot make a throwaway folder")?;
        Ok(Self { agents: Vec::new(), manager: None, folder, interrupt })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn data(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn profile(&self) -> String {
        self.path("manager").join("admin.toml").display().to_string()
    }

    fn manager(&mut self) -> anyhow::Result<()> {
        self.heading("A manager, on free ports of this machine")?;
        let (agents, admin) = programs::free_ports()?;
        let data = self.data("manager");
        self.succeed(
            "tm-manager",
            &[
                "init",
                "--data",
                &data,
                "--agent-listen",
                &agents.to_string(),
                "--admin-listen",
                &admin.to_string(),
                "--public-name",
                "127.0.0.1",
            ],
        )?;
        let mut manager = self.background("tm-manager", "manager", &["serve", "--data", &data])?;
        self.wait("the manager to listen", || {
            manager.check()?;
            let reached = |address| TcpStream::connect_timeout(address, Duration::from_secs(1)).is_ok();
            Ok((reached(&agents) && reached(&admin)).then_some(()))
        })?;
        self.manager = Some(manager);
        let tokens = self.tmctl_json(&["token", "list"])?;
        ensure!(items(&tokens).is_empty(), "a new manager has no tokens, this one says: {tokens:?}");
        Ok(())
    }

    fn agents(&mut self) -> anyhow::Result<()> {
        self.heading("A token that lets two agents in, and two agents")?;
        self.say("$ tmctl token create --uses 2 -o json      (the answer is kept in a file)\n")?;
        let made = self.tmctl_json(&["token", "create", "--uses", "2"])?;
        let token =
            made.iter().find_map(|value| value.get("token")?.as_str()).context("no token was shown")?;
        // By file: a command line can be read by everybody on a machine.
        let file = self.path("token");
        fs::write(&file, token).context("cannot write the token to a file")?;
        for name in ["agent-1", "agent-2"] {
            let data = self.data(name);
            let file = file.display().to_string();
            self.succeed("tm-agent", &["enroll", "--data", &data, "--token-file", &file])?;
            let agent = self.background("tm-agent", name, &["run", "--data", &data])?;
            self.agents.push(agent);
        }
        Ok(())
    }

    /// Waits until both agents have a session; gives their endpoints' ids.
    fn connected(&mut self) -> anyhow::Result<Vec<String>> {
        let profile = self.profile();
        let args = ["--profile", profile.as_str(), "endpoint", "list", "-o", "json"];
        let mut agents = std::mem::take(&mut self.agents);
        let ids = self.wait("two agents to be connected", || {
            agents.iter_mut().try_for_each(Background::check)?;
            let listed = json(&output("tmctl", &args)?.stdout);
            let ids: Vec<String> = items(&listed)
                .into_iter()
                .filter(|row| text(row, "connectivity") == "connected")
                .map(|row| text(row, "id").to_owned())
                .collect();
            Ok((ids.len() == 2).then_some(ids))
        });
        self.agents = agents;
        let ids = ids?;
        ensure!(ids.iter().collect::<BTreeSet<_>>().len() == 2, "both agents have the same id: {ids:?}");
        self.succeed("tmctl", &["--profile", &profile, "endpoint", "list"])?;
        Ok(ids)
    }

    fn pattern(&mut self) -> anyhow::Result<()> {
        self.heading("A rule that knows the EICAR test file")?;
        let file = self.path("eicar.yar");
        fs::write(&file, RULE).context("cannot write the rule")?;
        let profile = self.profile();
        self.succeed("tmctl", &["--profile", &profile, "pattern", "import", &file.display().to_string()])?;
        let patterns = self.tmctl_json(&["pattern", "list"])?;
        ensure!(items(&patterns).len() == 1, "one pattern was imported, the manager lists: {patterns:?}");
        Ok(())
    }

    /// Drops samples, scans them twice (a table to look at, JSON to check) and checks what was found.
    fn scan(&mut self, endpoint: &str, number: u32) -> anyhow::Result<()> {
        self.heading(&format!(
            "Endpoint {number}: the test file, one in a zip in a tar.gz, and a harmless look-alike"
        ))?;
        let folder = self.path(&format!("samples-{number}"));
        samples::drop_into(&folder)?;
        let folder = folder.display().to_string();
        let profile = self.profile();
        let args = ["--profile", &profile, "scan", "start", endpoint, "--path", &folder, "--wait"];
        self.shown("tmctl", &args, DETECTED)?;
        let found = self.shown("tmctl", &[&args[..], &["-o", "json"]].concat(), DETECTED)?;
        let found = json(&found);
        let mut seen: Vec<(String, Vec<String>)> = Vec::new();
        for detection in objects(&found, &["rule", "path_b64", "member"]) {
            ensure!(text(detection, "rule") == RULE_NAME, "an unexpected rule matched: {detection}");
            let member = detection.get("member").and_then(Value::as_array).map(Vec::as_slice);
            let member = member.unwrap_or_default().iter().filter_map(Value::as_str).map(str::to_owned);
            seen.push((text(detection, "path").to_owned(), member.collect()));
        }
        seen.sort();
        let at = |name: &str| format!("{folder}/{name}");
        ensure!(seen.len() == 2, "two detections are right, these were reported: {seen:?}");
        let (archive, member) = &seen[0];
        let innermost = [samples::INNER.to_owned(), samples::MEMBER.to_owned()];
        ensure!(
            *archive == at(samples::ARCHIVE) && member.ends_with(&innermost),
            "not the member that was packed: {archive} {member:?}"
        );
        ensure!(seen[1] == (at(samples::PLAIN), vec![]), "not the file that was dropped: {:?}", seen[1]);
        let results = objects(&found, &["verdict", "files", "skipped"]);
        let [result] = results.as_slice() else { bail!("one result is right, not {results:?}") };
        ensure!(text(result, "verdict") == "detected", "the verdict is not `detected`: {result}");
        ensure!(
            result.get("files").and_then(Value::as_u64) == Some(3),
            "not all 3 files were read: {result}"
        );
        self.say(&format!(
            "Verified: exactly 2 detections, `{}` is not among them, exit code {DETECTED}.\n",
            samples::LOOK_ALIKE
        ))
    }

    fn audit(&mut self) -> anyhow::Result<()> {
        self.heading("Who ordered what is on record, and the record is whole")?;
        let profile = self.profile();
        self.succeed("tmctl", &["--profile", &profile, "audit", "verify"]).map(drop)
    }

    fn stay(&mut self, endpoints: &[String]) -> anyhow::Result<()> {
        let tmctl = programs::path("tmctl")?;
        let agent = programs::path("tm-agent")?;
        let mut text = String::new();
        writeln!(text, "The manager and both agents go on running. In another terminal:\n")?;
        writeln!(text, "  alias tmctl='{} --profile {}'", tmctl.display(), self.profile())?;
        writeln!(text, "  tmctl endpoint list")?;
        for (number, endpoint) in (1..).zip(endpoints) {
            writeln!(
                text,
                "  tmctl scan start {endpoint} --path {} --wait",
                self.data(&format!("samples-{number}"))
            )?;
        }
        writeln!(text, "  tmctl task list")?;
        writeln!(text, "  tmctl audit list")?;
        writeln!(text, "  {} status --data {}", agent.display(), self.data("agent-1"))?;
        let pids: Vec<String> =
            self.agents.iter().chain(&self.manager).map(|program| program.pid().to_string()).collect();
        writeln!(text, "\nProcesses: {}. Ctrl-C ends them and removes {}.", pids.join(", "), self.data(""))?;
        self.say(&text)?;
        loop {
            if self.interrupt.within(Duration::from_secs(1)) {
                return Ok(());
            }
            self.agents.iter_mut().chain(self.manager.as_mut()).try_for_each(Background::check)?;
        }
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.say("Ending the agents and the manager.\n")?;
        self.agents.clear();
        self.manager = None;
        let path = self.folder.path().to_path_buf();
        self.folder.close().with_context(|| format!("cannot remove `{}`", path.display()))
    }

    fn background(&self, program: &str, name: &str, args: &[&str]) -> anyhow::Result<Background> {
        self.say(&format!("$ {} &\n", line(program, args)))?;
        let mut command = Command::new(programs::path(program)?);
        command.args(args);
        Background::start(name, command, self.path(&format!("{name}.log")))
    }

    /// Runs and shows a command; an error unless it exits 0.
    fn succeed(&self, program: &str, args: &[&str]) -> anyhow::Result<Vec<u8>> {
        self.shown(program, args, 0)
    }

    fn tmctl_json(&self, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        let profile = self.profile();
        let args = [&["--profile", profile.as_str()], args, &["-o", "json"]].concat();
        let output = output("tmctl", &args)?;
        ensure!(
            output.status.success(),
            "`{}` failed: {}",
            line("tmctl", &args),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(json(&output.stdout))
    }

    fn shown(&self, program: &str, args: &[&str], code: i32) -> anyhow::Result<Vec<u8>> {
        ensure!(!self.interrupt.within(Duration::ZERO), "interrupted");
        self.say(&format!("$ {}\n", line(program, args)))?;
        let output = output(program, args)?;
        let mut out = io::stdout().lock();
        out.write_all(&output.stdout)?;
        out.write_all(&output.stderr)?;
        if code != 0 {
            writeln!(out, "(exit code {})", output.status.code().unwrap_or(-1))?;
        }
        out.flush()?;
        ensure!(
            output.status.code() == Some(code),
            "`{}` should exit {code}, but: {}",
            line(program, args),
            output.status
        );
        Ok(output.stdout)
    }

    fn heading(&self, text: &str) -> anyhow::Result<()> {
        self.say(&format!("\n# {text}\n"))
    }

    fn say(&self, text: &str) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    fn wait<T>(&self, what: &str, mut fact: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = fact()? {
                return Ok(value);
            }
            ensure!(Instant::now() < end, "waited {} s in vain for {what}", PATIENCE.as_secs());
            ensure!(!self.interrupt.within(Duration::from_millis(100)), "interrupted");
        }
    }
}

/// Ctrl-C, SIGTERM and a closed terminal, as a fact that is asked for.
#[derive(Debug)]
struct Interrupt(Receiver<()>);

impl Interrupt {
    fn listen() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (ready, is_ready) = sync_channel(1);
        // One place: a second signal while the first is not yet heard says nothing new.
        let (say, heard) = sync_channel(1);
        thread::spawn(move || {
            runtime.block_on(async {
                let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
                let signals: io::Result<Vec<_>> = kinds.into_iter().map(signal).collect();
                let failed = signals.as_ref().err().map(ToString::to_string);
                let _ = ready.send(failed);
                let Ok(mut signals) = signals else { return };
                loop {
                    let [interrupt, terminate, hangup] = signals.as_mut_slice() else { return };
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    let _ = say.try_send(());
                }
            });
        });
        match is_ready.recv()? {
            None => Ok(Self(heard)),
            Some(error) => bail!("cannot listen for signals: {error}"),
        }
    }

    fn within(&self, time: Duration) -> bool {
        if time.is_zero() {
            return !matches!(self.0.try_recv(), Err(TryRecvError::Empty));
        }
        !matches!(self.0.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}

fn output(program: &str, args: &[&str]) -> anyhow::Result<std::process::Output> {
    Command::new(programs::path(program)?)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {program}"))
}

/// A command as a person would type it.
fn line(program: &str, args: &[&str]) -> String {
    let quoted = args.iter().map(|arg| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@".contains(c);
        if !arg.is_empty() && arg.chars().all(plain) { (*arg).to_owned() } else { format!("'{arg}'") }
    });
    std::iter::once(program.to_owned()).chain(quoted).collect::<Vec<_>>().join(" ")
}

/// JSON values one after the other; what is not JSON ends the list.
fn json(bytes: &[u8]) -> Vec<Value> {
    serde_json::Deserializer::from_slice(bytes).into_iter().map_while(Result::ok).collect()
}

/// The rows of a list, whether it is an array, a page or one object a line.
fn items(values: &[Value]) -> Vec<&Value> {
    match values {
        [Value::Array(rows)] => rows.iter().collect(),
        [Value::Object(page)] if page.contains_key("items") => {
            page["items"].as_array().into_iter().flatten().collect()
        }
        rows => rows.iter().collect(),
    }
}

/// Every object, however deep, that has all of `keys`.
fn objects<'v>(values: &'v [Value], keys: &[&str]) -> Vec<&'v Value> {
    let mut found = Vec::new();
    let mut open: Vec<&Value> = values.iter().rev().collect();
    while let Some(value) = open.pop() {
        if let Value::Object(map) = value {
            if keys.iter().all(|key| map.contains_key(*key)) {
                found.push(value);
            }
            open.extend(map.values());
        } else if let Value::Array(rows) = value {
            open.extend(rows.iter().rev());
        }
    }
    found
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_objects_are_found_in_every_shape_of_output() {
        for output in
            [r#"[{"a":1,"b":[{"a":2}]}]"#, r#"{"items":[{"a":1,"b":[{"a":2}]}]}"#, r#"{"a":1} {"a":2}"#]
        {
            let values = json(output.as_bytes());
            assert_eq!(objects(&values, &["a"]).len(), 2, "{output}");
            assert_eq!(items(&values)[0]["a"], 1, "{output}");
        }
        assert!(items(&json(b"[]")).is_empty());
    }

    #[test]
    fn the_rule_is_not_the_test_file_it_finds() {
        let folder = tempfile::tempdir().unwrap();
        samples::drop_into(&folder.path().join("s")).unwrap();
        let eicar = fs::read(folder.path().join("s").join(samples::PLAIN)).unwrap();
        assert_eq!(eicar.len(), 68);
        let holds = |text: &[u8]| text.windows(eicar.len()).any(|window| window == eicar);
        assert!(!holds(RULE.as_bytes()) && RULE.contains(RULE_NAME));
        assert!(!holds(&fs::read(folder.path().join("s").join(samples::LOOK_ALIKE)).unwrap()));
        assert!(holds(&eicar), "the probe finds what is there");
    }

    #[test]
    fn commands_are_printed_as_they_would_be_typed() {
        assert_eq!(line("tmctl", &["a", "b c", "/x"]), "tmctl a 'b c' /x");
    }
}
