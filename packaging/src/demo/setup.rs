//! A manager, two agents, and a rule.

use std::{collections::BTreeSet, fs, net::TcpStream, time::Duration};

use anyhow::{Context as _, ensure};

use super::{
    RULE,
    json::{items, number, objects, text},
    stage::{Agent, Stage},
};
use crate::programs;

const OFTEN: Duration = Duration::from_millis(50);

pub(super) fn manager(stage: &mut Stage) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        stage.say(
            "You are not root: the agents here see and clean what you may. An agent that runs as root\n\
             reaches every file, and puts files back with the owners they had.\n",
        )?;
    }
    stage.heading("A manager, on free ports of this machine")?;
    let (agents, admin) = programs::free_ports()?;
    let data = stage.data("manager");
    stage.shown(
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
        0,
    )?;
    let mut manager = stage.background("tm-manager", "manager", &["serve", "--data", &data])?;
    stage.wait("the manager to listen", OFTEN, || {
        manager.check()?;
        let reached = |address| TcpStream::connect_timeout(address, Duration::from_secs(1)).is_ok();
        Ok((reached(&agents) && reached(&admin)).then_some(()))
    })?;
    stage.manager = Some(manager);
    let tokens = stage.tmctl_json(&["token", "list"])?;
    ensure!(items(&tokens).is_empty(), "a new manager has no tokens, this one says: {tokens:?}");
    stage.say(&format!("$ export TMCTL_PROFILE={}      (what `init` wrote)\n", stage.profile()))?;
    stage.heading("Keys that sign patterns: on the desk, never on the manager")?;
    stage.say(&format!("$ export TMCTL_TRUST={}\n", stage.data("trust")))?;
    stage.tmctl(&["pattern", "trust", "init"])?;
    let roles = stage.tmctl_json(&["pattern", "trust", "status"])?;
    let detect = items(&roles).into_iter().find(|role| text(role, "role") == "detect");
    let detect = detect.context("`trust status` does not show the role `detect`")?;
    ensure!(number(detect, "keys_here")? == 1, "the key is not on the desk: {detect}");
    Ok(())
}

pub(super) fn agents(stage: &mut Stage) -> anyhow::Result<()> {
    stage.heading("A token that lets two agents in, and two agents")?;
    stage.say("$ tmctl token create --uses 2 -o json      (the answer is kept in a file)\n")?;
    let made = stage.tmctl_json(&["token", "create", "--uses", "2"])?;
    let token = made.iter().find_map(|value| value.get("token")?.as_str()).context("no token was shown")?;
    // By file: a command line can be read by everybody on a machine.
    let file = stage.path("token");
    fs::write(&file, token).context("cannot write the token to a file")?;
    for name in ["agent-1", "agent-2"] {
        let data = stage.data(name);
        let file = file.display().to_string();
        stage.shown("tm-agent", &["enroll", "--data", &data, "--token-file", &file], 0)?;
        let program = Some(stage.start_agent(name)?);
        stage.agents.push(Agent { name, endpoint: String::new(), program });
    }
    Ok(())
}

/// Waits until both agents have a session, and notes which endpoint is whose.
pub(super) fn connected(stage: &mut Stage) -> anyhow::Result<()> {
    let mut agents = std::mem::take(&mut stage.agents);
    for agent in &mut agents {
        agent.endpoint = identity(stage, agent)?;
        until(stage, &agent.endpoint, "connected", || agent.program.as_mut().map_or(Ok(()), |p| p.check()))?;
    }
    stage.agents = agents;
    let ids: BTreeSet<&str> = stage.agents.iter().map(|agent| agent.endpoint.as_str()).collect();
    ensure!(ids.len() == 2, "both agents have the same id: {ids:?}");
    stage.tmctl(&["endpoint", "list"])
}

/// The endpoint that an agent says it is; and that what runs there is what was started.
fn identity(stage: &Stage, agent: &mut Agent) -> anyhow::Result<String> {
    let data = stage.data(agent.name);
    let program = agent.program.as_mut().context("the agent was started")?;
    let says = stage.wait("an agent to run", OFTEN, || {
        program.check()?;
        // It fails until the agent is up.
        Ok(stage.json("tm-agent", &["status", "--data", &data]).ok())
    })?;
    let says = says.first().context("`tm-agent status` says nothing")?;
    ensure!(number(says, "pid")? == u64::from(program.pid()), "another agent runs there: {says}");
    Ok(text(says, "endpoint").to_owned())
}

/// Waits until the manager says of an endpoint that it is `connected` or `disconnected`.
pub(super) fn until(
    stage: &Stage,
    endpoint: &str,
    connectivity: &str,
    mut check: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    stage.wait(&format!("an endpoint to be {connectivity}"), OFTEN, || {
        check()?;
        let shown = stage.tmctl_json(&["endpoint", "show", endpoint])?;
        let found = objects(&shown, &["connectivity"]);
        Ok(found.iter().any(|row| text(row, "connectivity") == connectivity).then_some(()))
    })
}

pub(super) fn pattern(stage: &Stage) -> anyhow::Result<()> {
    stage.heading("A rule that knows the EICAR test file")?;
    let file = stage.path("eicar.yar");
    fs::write(&file, RULE).context("cannot write the rule")?;
    stage.tmctl(&["pattern", "import", &file.display().to_string()])?;
    let patterns = stage.tmctl_json(&["pattern", "list"])?;
    ensure!(items(&patterns).len() == 1, "one pattern was imported, the manager lists: {patterns:?}");
    Ok(())
}
