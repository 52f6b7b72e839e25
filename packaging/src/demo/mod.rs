//! `cargo xtask demo`: the whole chain on one machine, every step printed and verified.
//!
//! **Invariant:** a step counts only when its effect was read back; `--once` fails if one was not.
//! **Invariant:** nothing is left behind: programs end with this one, and the folder goes.
//! **Invariant:** only processes that the demo started are ended by it.

mod cleanup;
mod json;
mod restore;
mod scan;
mod setup;
mod stage;

use std::{fmt::Write as _, time::Duration};

use self::stage::Stage;
use crate::programs;

/// The rule that the demo scans with, and its name.
const RULE: &str = include_str!("../../demo/eicar.yar");
const RULE_NAME: &str = "eicar_test_file";

/// Runs the demo; with `once` it ends by itself.
pub(crate) fn run(once: bool) -> anyhow::Result<()> {
    programs::build()?;
    let mut stage = Stage::prepare()?;
    setup::manager(&mut stage)?;
    setup::agents(&mut stage)?;
    setup::connected(&mut stage)?;
    setup::pattern(&stage)?;
    scan::both(&stage)?;
    cleanup::overview(&stage, 2)?;
    cleanup::rehearsed(&stage)?;
    cleanup::ordered(&stage)?;
    cleanup::killed_in_the_middle(&mut stage)?;
    cleanup::overview(&stage, 0)?;
    restore::listed(&stage)?;
    restore::put_back(&stage)?;
    restore::copied(&stage)?;
    restore::on_record(&stage)?;
    stage.say("\nEvery step was verified.\n")?;
    if !once {
        stay(&mut stage)?;
    }
    stage.end()
}

fn stay(stage: &mut Stage) -> anyhow::Result<()> {
    let tmctl = programs::path("tmctl")?;
    let agent = programs::path("tm-agent")?;
    let mut text = String::new();
    writeln!(text, "The manager and both agents go on running. In another terminal:\n")?;
    writeln!(text, "  export TMCTL_PROFILE={}", stage.profile())?;
    writeln!(text, "  export TMCTL_TRUST={}", stage.data("trust"))?;
    writeln!(text, "  alias tmctl={}", tmctl.display())?;
    writeln!(text, "  tmctl endpoint list")?;
    // The files that were put back are found again.
    if let Some(Place { endpoint, .. }) = places(stage).last() {
        writeln!(text, "  tmctl scan start {endpoint} --path {} --wait", cleanup::outbreak(stage))?;
        writeln!(text, "  tmctl status")?;
        writeln!(text, "  tmctl cleanup run {endpoint} --dry-run")?;
        writeln!(text, "  tmctl cleanup run {endpoint} --wait")?;
        writeln!(text, "  tmctl why {endpoint}")?;
    }
    writeln!(text, "  tmctl vault list --limit 5")?;
    writeln!(text, "  tmctl event list")?;
    writeln!(text, "  tmctl audit verify")?;
    writeln!(text, "  {} status --data {}", agent.display(), stage.data("agent-1"))?;
    let pids = stage.pids().join(", ");
    writeln!(text, "\nProcesses: {pids}. Ctrl-C ends them and removes {}.", stage.data(""))?;
    stage.say(&text)?;
    loop {
        if stage.interrupt.within(Duration::from_secs(1)) {
            return Ok(());
        }
        stage.check()?;
    }
}

/// An endpoint and its samples.
#[derive(Debug)]
struct Place {
    /// From 1.
    number: usize,
    endpoint: String,
    folder: String,
}

fn places(stage: &Stage) -> Vec<Place> {
    (1..)
        .zip(&stage.agents)
        .map(|(number, agent)| Place {
            number,
            endpoint: agent.endpoint.clone(),
            folder: stage.data(&format!("samples-{number}")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::samples;

    #[test]
    fn the_rule_is_not_the_test_file_it_finds() {
        let folder = tempfile::tempdir().unwrap();
        samples::drop_into(&folder.path().join("s")).unwrap();
        let eicar = fs::read(folder.path().join("s").join(samples::PLAIN)).unwrap();
        assert_eq!(eicar.len(), 68);
        let holds = samples::is_in;
        assert!(!holds(RULE.as_bytes()) && RULE.contains(RULE_NAME));
        assert!(!holds(&fs::read(folder.path().join("s").join(samples::LOOK_ALIKE)).unwrap()));
        assert!(holds(&eicar), "the probe finds what is there");
        samples::plant(&folder.path().join("many"), 3).unwrap();
        let planted = stage::read_folder(&folder.path().join("many").display().to_string()).unwrap();
        assert!(planted.iter().all(|(_, content)| content.starts_with(&eicar)));
        assert!(planted[0].1 != planted[1].1 && planted[1].1 != planted[2].1, "each is a file of its own");
    }
}
