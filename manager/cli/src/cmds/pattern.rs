//! `tmctl pattern`.

use std::{fs::File, io::Read as _, path::PathBuf};

use tm_api::pattern::PatternView;
use tm_patterns::{MAX_IMPORT, digests::Counts};

use super::{publish, rollout, trust};
use crate::{
    cli::Pattern,
    client::Client,
    desk::Desk,
    failure::{Exit, Failure, problem_line},
    output::{Column, Output, say},
};

const COLUMNS: [Column<PatternView>; 10] = [
    Column::narrow("name", |p| p.name.clone()),
    Column::narrow("state", |p| p.state.clone()),
    Column::narrow("reach", |p| p.reach.clone()),
    Column::narrow("kind", |p| p.kind.clone()),
    Column::narrow("rules", |p| p.rules.to_string()),
    Column::narrow("digests", digests),
    Column::narrow("size", |p| p.size.to_string()),
    Column::narrow("imported_by", |p| p.imported_by.clone()),
    Column::time("imported_at", |p| p.imported_at.clone()),
    Column::narrow("sha256", |p| p.sha256.clone()),
];

fn digests(pattern: &PatternView) -> String {
    let counts = pattern.digests.map(|digests| Counts::new(digests.md5, digests.sha1, digests.sha256));
    counts.map_or("-".to_owned(), |counts| counts.to_string())
}

pub(crate) async fn run(
    command: Pattern,
    client: &Client,
    desk: &Desk,
    out: &Output,
) -> Result<Exit, Failure> {
    match command {
        Pattern::Import(what) => {
            let file = what.file.clone();
            let imported = publish::import(what, client, desk, out).await?;
            warn(Some(&file), &imported);
            out.list(&[imported], &COLUMNS, "")?;
        }
        Pattern::Draft { import, out: path } => {
            let file = import.file.clone();
            let sent = publish::draft(import, &path, client, desk, out).await?;
            warn(Some(&file), &sent);
            out.list(&[sent], &COLUMNS, "")?;
        }
        Pattern::Sign { draft } => publish::sign(&draft, desk)?,
        Pattern::Publish { draft, rollout } => {
            publish::publish(&draft, rollout.terms(), client, desk).await?
        }
        Pattern::Retire { pattern, role } => publish::retire(&pattern, role, client, desk).await?,
        Pattern::Rollout(command) => return rollout::run(command, client, out).await,
        Pattern::Trust(command) => return trust::run(command, client, desk, out).await,
        Pattern::List => {
            let patterns: Vec<PatternView> = client.get(&["patterns"], &()).await?;
            out.list(&patterns, &COLUMNS, "no patterns; import one: tmctl pattern import FILE")?;
        }
        Pattern::Show { pattern } => {
            let pattern: PatternView = client.get(&["patterns", &pattern], &()).await?;
            warn(None, &pattern);
            out.one(&pattern, &COLUMNS)?;
        }
    }
    Ok(Exit::Done)
}

/// Reads no more than a pattern may have, so that a device or a wrong file does not fill the memory.
pub(super) fn read(path: &PathBuf) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_IMPORT.saturating_add(1)).read_to_end(&mut bytes))
        .map_err(|source| Failure::File { verb: "read", path: path.clone(), source })?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_IMPORT) {
        return Err(Failure::PatternTooLarge { path: path.clone() });
    }
    Ok(bytes)
}

fn warn(file: Option<&PathBuf>, pattern: &PatternView) {
    for warning in &pattern.warnings {
        say(&format!("warning: {}\n", problem_line(file.map(PathBuf::as_path), warning)));
    }
}
