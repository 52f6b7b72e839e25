//! Removing what was found: rehearsed, ordered, and through the death of an agent in the middle.

use std::{collections::BTreeSet, fs, os::unix::process::ExitStatusExt as _, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    Place,
    json::{items, number, objects, text},
    places,
    scan::DETECTED,
    setup::until,
    stage::{Stage, read_folder},
};
use crate::samples;

/// Files in the outbreak: enough that a cleanup of them has a middle.
const OUTBREAK: usize = 300;
/// How many of them are gone when its agent is killed, or some more.
const MIDDLE: usize = OUTBREAK / 4;
/// How often it is looked how far that cleanup is.
const CLOSELY: Duration = Duration::from_millis(2);
/// What the kernel says of a process that SIGKILL ended.
const KILLED: i32 = 9;

/// The overview, with so many endpoints that need cleanup.
pub(super) fn overview(stage: &Stage, waiting: u64) -> anyhow::Result<()> {
    stage.heading(if waiting > 0 {
        "Overview: who needs what, and the command for it"
    } else {
        "Overview: nobody needs anything any more"
    })?;
    stage.tmctl(&["status"])?;
    let status = stage.tmctl_json(&["status"])?;
    for (query, count) in [("needs-cleanup", waiting), ("unresolved", 0), ("connected", 2)] {
        let counted = count_of(&status, query)?;
        ensure!(counted == count, "{query} counts {counted} endpoints, {count} is right");
        let listed = stage.tmctl_json(&["endpoint", "list", "--query", query])?;
        let listed = items(&listed).len();
        ensure!(u64::try_from(listed)? == count, "{query} lists {listed} endpoints and counts {count}");
    }
    stage.verified("each count is the length of its list (`tmctl endpoint list --query …`)")
}

fn count_of(status: &[Value], query: &str) -> anyhow::Result<u64> {
    let lines = objects(status, &["name", "count"]);
    let line = lines.into_iter().find(|line| text(line, "name") == query);
    number(line.with_context(|| format!("the overview has no line `{query}`"))?, "count")
}

/// A dry run on the first endpoint: it says what would happen, and nothing does.
pub(super) fn rehearsed(stage: &Stage) -> anyhow::Result<()> {
    let Place { endpoint, folder, .. } = first(stage)?;
    stage.heading("Endpoint 1: what a cleanup would do, file by file")?;
    let before = read_folder(&folder)?;
    stage.tmctl(&["cleanup", "run", &endpoint, "--dry-run"])?;
    let task = stage.newest_task(&endpoint)?;
    ensure!(verdicts(&task) == ["would-vault"; 2], "two files would be vaulted, not: {task}");
    ensure!(read_folder(&folder)? == before, "a dry run changed `{folder}`");
    ensure!(vault(stage, &endpoint)?.is_empty(), "a dry run put something in the vault");
    stage.verified("every file is as it was, and the vault is empty")
}

/// A cleanup of the first endpoint, and a scan that looks again.
pub(super) fn ordered(stage: &Stage) -> anyhow::Result<()> {
    let Place { endpoint, folder, .. } = first(stage)?;
    stage.heading("Endpoint 1: remove it, then look again")?;
    let before = read_folder(&folder)?;
    stage.tmctl(&["cleanup", "run", &endpoint, "--wait"])?;
    let task = stage.newest_task(&endpoint)?;
    ensure!(text(&task, "state") == "done", "the cleanup is not done: {task}");
    ensure!(verdicts(&task) == ["vaulted"; 2], "two files are in the vault, not: {task}");
    stage.tmctl(&["scan", "start", &endpoint, "--path", &folder, "--wait"])?;
    let kept: Vec<_> = before.into_iter().filter(|(name, _)| name.ends_with(samples::LOOK_ALIKE)).collect();
    ensure!(kept.len() == 1 && read_folder(&folder)? == kept, "not only the look-alike is left, as it was");
    stage
        .verified(&format!("both files are gone, `{}` is as it was, exit code 0: clean", samples::LOOK_ALIKE))
}

/// An outbreak on the second endpoint, whose agent is killed while it cleans up.
pub(super) fn killed_in_the_middle(stage: &mut Stage) -> anyhow::Result<()> {
    let Place { endpoint, folder: small, .. } =
        places(stage).into_iter().nth(1).context("there are two endpoints")?;
    stage.heading(&format!(
        "Endpoint 2: {OUTBREAK} infected files, and kill -9 in the middle of their cleanup"
    ))?;
    let folder = outbreak(stage);
    samples::plant(Path::new(&folder), OUTBREAK)?;
    let planted = names(&folder)?;
    stage.shown_in_short("tmctl", &["scan", "start", &endpoint, "--path", &folder, "--wait"], DETECTED)?;
    let scanned = stage.newest_task(&endpoint)?;
    let found = scanned.pointer("/result/detections").and_then(Value::as_u64);
    ensure!(found == Some(u64::try_from(OUTBREAK)?), "not every planted file was found: {scanned}");
    stage.tmctl(&["cleanup", "run", &endpoint])?;
    let task = text(&stage.newest_task(&endpoint)?, "id").to_owned();

    kill_when_some_are_gone(stage, &folder)?;
    until(stage, &endpoint, "disconnected", || Ok(()))?;
    let left = names(&folder)?.len();
    ensure!(0 < left && left < OUTBREAK, "{left} of {OUTBREAK} files are left: that is not the middle");
    stage.say(&format!("({left} of {OUTBREAK} files are left, and nobody is at work)\n"))?;
    stage.tmctl(&["why", &endpoint])?;
    let halted = stage.task(&task)?;
    ensure!(text(&halted, "state") == "running", "the cleanup waits for its agent, not: {halted}");
    stage.verified("the endpoint is away, its cleanup has not ended")?;

    stage.heading("Endpoint 2: the agent is back, and goes on by itself")?;
    let name = stage.agents.get(1).context("there are two agents")?.name;
    let program = stage.start_agent(name)?;
    if let Some(agent) = stage.agents.get_mut(1) {
        agent.program = Some(program);
    }
    stage.shown_in_short("tmctl", &["task", "follow", &task, "--timeout", "60s"], 0)?;
    let ended = stage.task(&task)?;
    ensure!(text(&ended, "state") == "done", "the cleanup is not done: {ended}");
    let left: Vec<String> = names(&folder)?.into_iter().chain(names(&small)?).collect();
    ensure!(left == [format!("{small}/{}", samples::LOOK_ALIKE)], "these are left: {left:?}");
    each_is_in_the_vault_once(stage, &endpoint, &planted)?;
    stage.tmctl(&["why", &endpoint])?;
    let why = stage.tmctl_json(&["why", &endpoint])?;
    let open = objects(&why, &["open_detections", "state"]);
    ensure!(
        !open.is_empty() && open.iter().all(|incident| text(incident, "state") == "resolved"),
        "not every incident is resolved: {open:?}"
    );
    stage
        .verified(&format!("none of {OUTBREAK} is left, each is in the vault once, the incident is resolved"))
}

/// Where the outbreak is.
pub(super) fn outbreak(stage: &Stage) -> String {
    stage.data("outbreak-2")
}

/// Files of an endpoint's vault, as the manager lists them.
pub(super) fn vault(stage: &Stage, endpoint: &str) -> anyhow::Result<Vec<Value>> {
    let listed = stage.tmctl_json(&["vault", "list", "--endpoint", endpoint, "--limit", "100000"])?;
    Ok(items(&listed).into_iter().cloned().collect())
}

/// What came of each item of a task.
pub(super) fn verdicts(task: &Value) -> Vec<&str> {
    let items = task.get("items").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|item| text(item, "verdict")).collect()
}

pub(super) fn first(stage: &Stage) -> anyhow::Result<Place> {
    places(stage).into_iter().next().context("there are two endpoints")
}

fn kill_when_some_are_gone(stage: &mut Stage, folder: &str) -> anyhow::Result<()> {
    let agent = stage.agents.get_mut(1).context("there are two agents")?;
    let mut program = agent.program.take().context("the agent runs")?;
    stage.wait("the cleanup to be in its middle", CLOSELY, || {
        program.check()?;
        Ok((names(folder)?.len() + MIDDLE <= OUTBREAK).then_some(()))
    })?;
    let (pid, status) = (program.pid(), program.kill9()?);
    ensure!(status.signal() == Some(KILLED), "the agent did not die of the signal, but: {status}");
    stage.say(&format!("$ kill -9 {pid}      (its agent, as soon as a quarter of the files is gone)\n"))
}

/// Names of a folder's files, with the folder, in order.
fn names(folder: &str) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list `{folder}`"))?;
    let mut names: Vec<String> =
        entries.map(|entry| Ok(entry?.path().display().to_string())).collect::<anyhow::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn each_is_in_the_vault_once(stage: &Stage, endpoint: &str, planted: &[String]) -> anyhow::Result<()> {
    let held = stage.wait("the manager's list of the vault", Duration::from_millis(200), || {
        let held = vault(stage, endpoint)?;
        // Besides the outbreak's: the two that were dropped at first.
        Ok((held.len() == planted.len() + 2).then_some(held))
    })?;
    let paths: BTreeSet<&str> = held.iter().map(|item| text(item, "path")).collect();
    ensure!(paths.len() == held.len(), "a file is in the vault twice");
    ensure!(planted.iter().all(|path| paths.contains(path.as_str())), "a file is in no vault");
    Ok(())
}
