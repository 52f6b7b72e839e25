//! Bringing back what was removed, byte for byte, and the record of it all.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    Place,
    cleanup::{first, outbreak, vault, verdicts},
    json::{items, text},
    places,
    stage::Stage,
};
use crate::samples;

/// Files of the outbreak that are put back.
const SOME: usize = 3;

/// The vault of the first endpoint.
pub(super) fn listed(stage: &Stage) -> anyhow::Result<()> {
    let Place { endpoint, .. } = first(stage)?;
    stage.heading("What was removed lies encrypted in its endpoint's vault")?;
    stage.tmctl(&["vault", "list", "--endpoint", &endpoint])?;
    let held = vault(stage, &endpoint)?.len();
    ensure!(held == 2, "two files were removed there, the vault lists {held}");
    // The agent's own word for it, beside the manager's.
    let data = stage.data("agent-1");
    let here = stage.json("tm-agent", &["vault", "list", "--data", &data])?;
    ensure!(items(&here).len() == held, "the agent holds other files: {here:?}");
    let kept = read_tree(&stage.path("agent-1").join("vault"))?;
    ensure!(!kept.is_empty(), "there is nothing in the vault's folder");
    let in_the_clear = kept.iter().find(|(_, content)| samples::is_in(content));
    ensure!(in_the_clear.is_none(), "the test file can be read in {in_the_clear:?}");
    stage.verified(
        "manager and agent list the same 2 files; no file in the vault's folder shows the test file",
    )
}

/// Some files of the outbreak, back in their places.
pub(super) fn put_back(stage: &Stage) -> anyhow::Result<()> {
    let Place { endpoint, .. } = places(stage).into_iter().nth(1).context("there are two endpoints")?;
    stage.heading("Endpoint 2: some of it was needed after all")?;
    let folder = outbreak(stage);
    let before = vault(stage, &endpoint)?;
    let chosen: Vec<(usize, &str)> = (0..SOME)
        .map(|number| {
            let path = samples::planted(Path::new(&folder), number).display().to_string();
            let item = before.iter().find(|item| text(item, "path") == path);
            Ok((number, text(item.with_context(|| format!("`{path}` is not in the vault"))?, "id")))
        })
        .collect::<anyhow::Result<_>>()?;
    let ids: Vec<&str> = chosen.iter().map(|(_, id)| *id).collect();
    stage.tmctl(&[&["vault", "restore"], ids.as_slice(), &["--wait"]].concat())?;
    let task = stage.newest_task(&endpoint)?;
    ensure!(text(&task, "state") == "done", "the restore is not done: {task}");
    ensure!(verdicts(&task) == ["restored"; SOME], "{SOME} files are restored, not: {task}");
    for (number, _) in &chosen {
        let path = samples::planted(Path::new(&folder), *number);
        let content = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        ensure!(content == samples::content(*number), "`{}` is not as it was", path.display());
        let facts = fs::metadata(&path)?;
        ensure!(
            facts.permissions().mode() & 0o7777 == samples::MODE && facts.mtime() == samples::MODIFIED,
            "`{}` has another mode or time than it had",
            path.display()
        );
    }
    let back = fs::read_dir(&folder)?.count();
    ensure!(back == SOME, "{back} files are back, {SOME} were ordered");
    ensure!(vault(stage, &endpoint)?.len() == before.len() - SOME, "what is back has left the vault");
    stage.verified("every byte, the modes and the times are what they were; nothing else came back")
}

/// A copy of one file elsewhere, for somebody who has to look at it.
pub(super) fn copied(stage: &Stage) -> anyhow::Result<()> {
    let Place { endpoint, .. } = first(stage)?;
    stage.heading("Endpoint 1: a copy of one file in another place, for an expert")?;
    let held = vault(stage, &endpoint)?;
    let archive = held.iter().find(|item| text(item, "path").ends_with(samples::ARCHIVE));
    let archive = archive.context("the archive is in the vault")?;
    let to = stage.data("for-the-expert.tar.gz");
    stage.tmctl(&["vault", "restore", text(archive, "id"), "--to", &to, "--wait"])?;
    ensure!(fs::read(&to)? == samples::archive()?, "`{to}` is not the archive that was removed");
    ensure!(vault(stage, &endpoint)?.len() == held.len(), "a copy takes nothing out of the vault");
    stage.verified("it is the archive, byte for byte, and the vault still holds it")
}

/// Every file in a folder and its folders.
fn read_tree(folder: &Path) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let (mut files, mut open) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = open.pop() {
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot list `{}`", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else {
                let content = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
                files.push((path, content));
            }
        }
    }
    Ok(files)
}

/// The events of the first endpoint, and the audit log.
pub(super) fn on_record(stage: &Stage) -> anyhow::Result<()> {
    let Place { endpoint, .. } = first(stage)?;
    stage.heading("What happened, who ordered what, and that the record is whole")?;
    stage.tmctl(&["endpoint", "events", &endpoint])?;
    let events = stage.tmctl_json(&["endpoint", "events", &endpoint])?;
    for (kind, status) in
        [("scan-administrator", "assessed"), ("cleanup", "resolved"), ("scan-administrator", "scanned")]
    {
        let is_there = |event: &&Value| text(event, "kind") == kind && text(event, "status") == status;
        ensure!(items(&events).iter().any(is_there), "there is no event of a {kind} that is {status}");
    }
    stage.tmctl(&["audit", "verify"])?;
    let orders = stage.tmctl_json(&["audit", "list"])?;
    for action in ["scan.start", "cleanup.run", "vault.restore"] {
        let is_there = |record: &&Value| text(record, "action") == action;
        ensure!(items(&orders).iter().any(is_there), "no `{action}` is on record");
    }
    stage.verified("every order is on record, and the record is whole")
}
