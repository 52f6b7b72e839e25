//! `tmctl pattern`.

use std::{fs::File, io::Read as _, path::PathBuf};

use tm_api::pattern::{ImportQuery, PatternView};
use tm_patterns::{MAX_IMPORT, digests::Counts};

use crate::{
    cli::Pattern,
    client::{Client, ClientError},
    failure::{Exit, Failure, problem_line},
    output::{Column, Format, Output, say},
};

const COLUMNS: [Column<PatternView>; 8] = [
    Column::narrow("name", |p| p.name.clone()),
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

pub(crate) async fn run(command: Pattern, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Pattern::Import { file, name, force } => import(file, name, force, client, out).await?,
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

async fn import(
    file: PathBuf,
    name: Option<String>,
    force: bool,
    client: &Client,
    out: &Output,
) -> Result<(), Failure> {
    let name = match name {
        Some(name) => name,
        None => file
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| {
                Failure::Usage("the file's name cannot be the pattern's; give one with --name".into())
            })?
            .to_owned(),
    };
    let bytes = read(&file)?;
    let imported: PatternView = match client.upload(&["patterns"], &ImportQuery { name, force }, bytes).await
    {
        Ok(imported) => imported,
        Err(source) => {
            // Programs that read the rules and their places want them where they want the rest.
            if let (true, ClientError::Refused(view)) = (out.format() == Format::Json, &source) {
                out.json(view)?;
            }
            return Err(Failure::Import { file, source });
        }
    };
    warn(Some(&file), &imported);
    out.list(&[imported], &COLUMNS, "")
}

/// Reads no more than a pattern may have, so that a device or a wrong file does not fill the memory.
fn read(path: &PathBuf) -> Result<Vec<u8>, Failure> {
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
