//! Finding what is there, and nothing else.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    Place, RULE_NAME,
    json::{number, objects, text},
    places,
    stage::Stage,
};
use crate::samples;

/// `scan --wait` when something was detected.
pub(super) const DETECTED: i32 = 10;

/// Drops samples on each endpoint, scans them and checks what was found.
pub(super) fn both(stage: &Stage) -> anyhow::Result<()> {
    for Place { number, endpoint, folder } in &places(stage) {
        stage.heading(&format!(
            "Endpoint {number}: the test file, one in a zip in a tar.gz, and a harmless look-alike"
        ))?;
        samples::drop_into(Path::new(folder))?;
        stage.shown("tmctl", &["scan", "start", endpoint, "--path", folder, "--wait"], DETECTED)?;
        let task = stage.newest_task(endpoint)?;
        let found = stage.tmctl_json(&["task", "detections", text(&task, "id")])?;
        exactly_what_was_dropped(folder, &found)?;
        let result = task.get("result").context("a scan that has ended has a result")?;
        ensure!(text(result, "verdict") == "detected", "the verdict is not `detected`: {result}");
        ensure!(self::number(result, "files")? == 3, "not all 3 files were read: {result}");
        stage.verified(&format!(
            "exactly 2 detections, `{}` is not among them, exit code {DETECTED}",
            samples::LOOK_ALIKE
        ))?;
    }
    Ok(())
}

fn exactly_what_was_dropped(folder: &str, found: &[Value]) -> anyhow::Result<()> {
    let mut seen: Vec<(String, Vec<String>)> = Vec::new();
    for detection in objects(found, &["rule", "path_b64", "member"]) {
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
    Ok(())
}
