//! Where the demo plays: its programs, its folder, and how a step is printed, run and read back.
//!
//! **Invariant:** a command is printed as a person would type it, and its output is what that person would see;
//! only the middle of a long one is left out, and that is said.

use std::{
    fs,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::{Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::json::{items, json, text};
use crate::{
    interrupt::Interrupt,
    programs::{self, Background},
};

/// How long anything is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How much later than a command's death a signal that ended it is heard.
const HEARING: Duration = Duration::from_millis(300);
/// Lines of a long output that are shown at its beginning, and at its end.
const HEAD: usize = 4;
const TAIL: usize = 2;

/// What runs. Fields are dropped in this order: agents, manager, folder.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) agents: Vec<Agent>,
    pub(super) manager: Option<Background>,
    folder: tempfile::TempDir,
    pub(super) interrupt: Interrupt,
}

/// An agent that plays.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: &'static str,
    /// Its endpoint's id; empty until it is connected.
    pub(super) endpoint: String,
    /// `None` after it was killed.
    pub(super) program: Option<Background>,
}

impl Stage {
    /// An empty one.
    ///
    /// # Errors
    /// If there is no room for a temporary folder, or signals cannot be heard.
    pub(super) fn prepare() -> anyhow::Result<Self> {
        let interrupt = Interrupt::listen()?;
        let folder = tempfile::Builder::new()
            .prefix("tm-demo-")
            .tempdir()
            .context("cannot make a throwaway folder")?;
        Ok(Self { agents: Vec::new(), manager: None, folder, interrupt })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The same as text, for a command line.
    pub(super) fn data(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(super) fn profile(&self) -> String {
        self.path("manager").join("admin.toml").display().to_string()
    }

    /// An error with the end of its log if one of the programs has ended by itself.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let agents = self.agents.iter_mut().filter_map(|agent| agent.program.as_mut());
        agents.chain(self.manager.as_mut()).try_for_each(Background::check)
    }

    /// Process ids of everything that runs.
    pub(super) fn pids(&self) -> Vec<String> {
        let agents = self.agents.iter().filter_map(|agent| agent.program.as_ref());
        agents.chain(&self.manager).map(|program| program.pid().to_string()).collect()
    }

    /// Starts a program whose output goes to `NAME.log`.
    pub(super) fn background(&self, program: &str, name: &str, args: &[&str]) -> anyhow::Result<Background> {
        self.say(&format!("$ {} &\n", line(program, args)))?;
        Background::start(name, self.command(program, args)?, self.path(&format!("{name}.log")))
    }

    /// Starts an agent, for the first time or again.
    pub(super) fn start_agent(&self, name: &str) -> anyhow::Result<Background> {
        self.background("tm-agent", name, &["run", "--data", &self.data(name)])
    }

    /// Runs a command for everybody to see; an error unless it exits with `code`.
    pub(super) fn shown(&self, program: &str, args: &[&str], code: i32) -> anyhow::Result<()> {
        self.announce(program, args)?;
        let mut command = self.command(program, args)?;
        // At a terminal the program knows how wide it is.
        let status = if io::stdout().is_terminal() {
            command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {program}"))?
        } else {
            let output = run(program, &mut command)?;
            self.say_bytes(&output.stdout, &output.stderr)?;
            output.status
        };
        self.judge(program, args, status, code)
    }

    /// The same for a command that prints more than anybody reads: only the beginning and the end are shown.
    pub(super) fn shown_in_short(&self, program: &str, args: &[&str], code: i32) -> anyhow::Result<()> {
        self.announce(program, args)?;
        let output = run(program, &mut self.command(program, args)?)?;
        self.say_bytes(in_short(&String::from_utf8_lossy(&output.stdout)).as_bytes(), &output.stderr)?;
        self.judge(program, args, output.status, code)
    }

    /// [`Stage::shown`] of `tmctl`, exit code 0.
    pub(super) fn tmctl(&self, args: &[&str]) -> anyhow::Result<()> {
        self.shown("tmctl", args, 0)
    }

    /// What `tmctl … -o json` says, to check what was shown; not printed.
    pub(super) fn tmctl_json(&self, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        self.json("tmctl", args)
    }

    /// What a program says with `-o json`; not printed.
    pub(super) fn json(&self, program: &str, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        let args = [args, &["-o", "json"]].concat();
        let output = run(program, &mut self.command(program, &args)?)?;
        ensure!(
            output.status.success(),
            "`{}` failed: {}",
            line(program, &args),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(json(&output.stdout))
    }

    /// The newest task of an endpoint, with its items if it is a cleanup or a restore.
    pub(super) fn newest_task(&self, endpoint: &str) -> anyhow::Result<Value> {
        let listed = self.tmctl_json(&["task", "list", "--endpoint", endpoint, "--limit", "1"])?;
        let id = items(&listed).first().map(|task| text(task, "id").to_owned());
        let id = id.context("no task was ordered for the endpoint")?;
        self.task(&id)
    }

    /// One task, likewise.
    pub(super) fn task(&self, id: &str) -> anyhow::Result<Value> {
        self.tmctl_json(&["task", "show", id])?.into_iter().next().context("`tmctl task show` says nothing")
    }

    pub(super) fn heading(&self, text: &str) -> anyhow::Result<()> {
        self.say(&format!("\n# {text}\n"))
    }

    pub(super) fn verified(&self, text: &str) -> anyhow::Result<()> {
        self.say(&format!("Verified: {text}.\n"))
    }

    pub(super) fn say(&self, text: &str) -> anyhow::Result<()> {
        self.say_bytes(text.as_bytes(), &[])
    }

    /// Waits until `fact` is one, and asks for it `every` so often.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        every: Duration,
        mut fact: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = fact()? {
                return Ok(value);
            }
            ensure!(Instant::now() < end, "waited {} s in vain for {what}", PATIENCE.as_secs());
            ensure!(!self.interrupt.within(every), "interrupted");
        }
    }

    /// Ends everything and removes the folder.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        self.say("Ending the agents and the manager.\n")?;
        self.agents.clear();
        self.manager = None;
        let path = self.folder.path().to_path_buf();
        self.folder.close().with_context(|| format!("cannot remove `{}`", path.display()))
    }

    fn command(&self, program: &str, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(programs::path(program)?);
        command.args(args).env("TMCTL_PROFILE", self.profile()).env("TMCTL_TRUST", self.data("trust"));
        Ok(command)
    }

    fn announce(&self, program: &str, args: &[&str]) -> anyhow::Result<()> {
        ensure!(!self.interrupt.within(Duration::ZERO), "interrupted");
        self.say(&format!("$ {}\n", line(program, args)))
    }

    fn judge(&self, program: &str, args: &[&str], status: ExitStatus, code: i32) -> anyhow::Result<()> {
        if status.code() == Some(code) {
            if code != 0 {
                self.say(&format!("(exit code {code})\n"))?;
            }
            return Ok(());
        }
        // Ctrl-C reaches the command, too, and it may be the first of the two to end.
        ensure!(!self.interrupt.within(HEARING), "interrupted");
        bail!("`{}` should exit {code}, but: {status}", line(program, args))
    }

    fn say_bytes(&self, out: &[u8], more: &[u8]) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(out)?;
        stdout.write_all(more)?;
        Ok(stdout.flush()?)
    }
}

/// Reads a folder's files: name and content, in order of names.
///
/// # Errors
/// If one cannot be read.
pub(super) fn read_folder(folder: &str) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list `{folder}`"))? {
        let path = entry?.path();
        let content = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        files.push((path.display().to_string(), content));
    }
    files.sort();
    Ok(files)
}

fn run(program: &str, command: &mut Command) -> anyhow::Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {program}"))
}

/// A command as a person would type it.
fn line(program: &str, args: &[&str]) -> String {
    let quoted = args.iter().map(|arg| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@".contains(c);
        if !arg.is_empty() && arg.chars().all(plain) { (*arg).to_owned() } else { format!("'{arg}'") }
    });
    std::iter::once(program.to_owned()).chain(quoted).collect::<Vec<_>>().join(" ")
}

/// The beginning and the end of a long text, and how much is between them.
fn in_short(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let left_out = lines.len().saturating_sub(HEAD + TAIL);
    if left_out <= 1 {
        return text.to_owned();
    }
    let (head, rest) = lines.split_at(HEAD);
    let tail = &rest[left_out..];
    format!("{}\n  [{left_out} more lines]\n{}\n", head.join("\n"), tail.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_printed_as_they_would_be_typed() {
        assert_eq!(line("tmctl", &["a", "b c", "/x"]), "tmctl a 'b c' /x");
    }

    #[test]
    fn only_the_middle_of_a_long_output_is_left_out() {
        let lines = |count: u32| (1..=count).map(|n| format!("{n}\n")).collect::<String>();
        assert_eq!(in_short(&lines(7)), lines(7));
        assert_eq!(in_short(""), "");
        assert_eq!(in_short(&lines(9)), "1\n2\n3\n4\n  [3 more lines]\n8\n9\n");
    }
}
