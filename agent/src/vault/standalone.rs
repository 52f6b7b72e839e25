//! `tm-agent vault …`: the vault for a person at the endpoint, without daemon or manager.
//!
//! **Invariant:** results go to standard output and nothing else does; the exit code is 0 done, 1 failed,
//! 3 refused (2 is wrong usage).

use std::{
    io::{self, Write as _},
    path::{Component, Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use tm_protocol::{
    ids::{Sha256, VaultId},
    report::{Failure, PathBytes, VaultEntry},
    text::{escape, escape_for_display},
};

use super::{Limits, Purge, Purged, Recovered, Vault, VaultError, bytes, error::chain, look, now_ms};
use crate::{paths::Paths, platform::fs::Place};

/// The vault will not do it.
const EXIT_REFUSED: u8 = 3;

/// What `tm-agent vault` is asked.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Take a file away and keep it, encrypted
    #[command(long_about = "Take a file away and keep it, encrypted.\n\n\
            The file must be a regular one, named without links on the way. Its item's id is printed; \
            `tm-agent vault restore ID` puts it back.\n\n\
            Exit code: 0 done, 1 failed, 3 refused. Unless it says otherwise, an error leaves the file as it \
            was.\n\n\
            Example:\n  tm-agent vault put /srv/upload/invoice.exe")]
    Put {
        #[command(flatten)]
        folder: DataFolder,
        /// The file to take away
        #[arg(value_name = "PATH")]
        path: PathBuf,
        /// Say what would be done, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Put a file back
    #[command(long_about = "Put a file back, with its owner, mode, times, attributes and flags.\n\n\
            Nothing is put over an existing file, and the folder must be there. With --to, a copy is put \
            there and the item stays in the vault.\n\n\
            Exit code: 0 done, 1 failed, 3 refused.\n\n\
            Example:\n  tm-agent vault restore 0198c5b2-93c4-7a07-bd25-4be7ed4b9d11 --to /root/sample.bin")]
    Restore {
        #[command(flatten)]
        folder: DataFolder,
        /// The item (see `tm-agent vault list`)
        #[arg(value_name = "ID")]
        id: VaultId,
        /// Put a copy here instead
        #[arg(long, value_name = "PATH")]
        to: Option<PathBuf>,
        /// Restore set-user-id and set-group-id bits and file capabilities too
        #[arg(long)]
        set_id: bool,
        /// Say what would be done, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Show what the vault holds
    List {
        #[command(flatten)]
        folder: DataFolder,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = Format::Text)]
        output: Format,
    },
    /// Settle what an interruption left
    #[command(
        long_about = "Settle what an interruption left: a file whose item is whole is taken, one whose \
            item is not is left in its place. The agent does the same when it starts; the other commands, \
            before they change anything."
    )]
    Recover {
        #[command(flatten)]
        folder: DataFolder,
    },
    /// Remove items for good
    #[command(
        long_about = "Remove items for good: those that are named, or those that were vaulted a given \
            time ago or earlier [default: 90d].\n\n\
            Example:\n  tm-agent vault purge --older-than 30d --dry-run"
    )]
    Purge {
        #[command(flatten)]
        folder: DataFolder,
        /// The items (see `tm-agent vault list`)
        #[arg(value_name = "ID", conflicts_with = "older_than")]
        ids: Vec<VaultId>,
        /// How long ago at least, for example 30d or 12h
        #[arg(long, value_name = "TIME", value_parser = parse_age)]
        older_than: Option<Duration>,
        /// Say what would be removed, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// Where the vault is.
#[derive(Debug, clap::Args)]
pub(crate) struct DataFolder {
    /// The agent's state folder
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-agent")]
    data: PathBuf,
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people
    Text,
    /// An array
    Json,
}

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("cannot write the results")]
    Print(#[source] io::Error),
}

/// Does what is asked, prints, and says by the exit code how it went.
pub(crate) fn run(command: &Command) -> ExitCode {
    let done = match command {
        Command::Put { folder, path, dry_run } => put(&folder.paths(), path, *dry_run),
        Command::Restore { folder, id, to, set_id, dry_run } => {
            restore(&folder.paths(), *id, to.as_deref(), *set_id, *dry_run)
        }
        Command::List { folder, output } => list(&folder.paths(), *output),
        Command::Recover { folder } => recover(&folder.paths()),
        Command::Purge { folder, ids, older_than, dry_run } => {
            let what = if ids.is_empty() {
                Purge::OlderThan(older_than.unwrap_or(Limits::default().retention))
            } else {
                Purge::Items(ids.clone())
            };
            purge(&folder.paths(), &what, *dry_run)
        }
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            talk(&format!("error: {}", chain(&error)));
            match error {
                Error::Vault(error) => {
                    if let Some(advice) = error.advice() {
                        talk(&format!("hint: {advice}"));
                    }
                    if error.is_refusal() { ExitCode::from(EXIT_REFUSED) } else { ExitCode::FAILURE }
                }
                Error::Print(_) => ExitCode::FAILURE,
            }
        }
    }
}

impl DataFolder {
    fn paths(&self) -> Paths {
        Paths::new(self.data.clone())
    }
}

fn put(paths: &Paths, path: &Path, dry_run: bool) -> Result<ExitCode, Error> {
    let path = full(path)?;
    if dry_run {
        let vault = Vault::open(paths, Limits::default())?;
        let would = vault.check(&path, None)?;
        say_notes(&would.notes);
        print(&format!("would vault {path} ({} bytes, SHA-256 {})", would.size, would.sha256))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut vault, _) = open_settled(paths)?;
    let held = vault.put(&path, None, None)?;
    say_notes(&held.notes);
    talk(&format!("Vaulted {path}. Put it back: tm-agent vault restore {}", held.entry.id));
    print(&held.entry.id.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn restore(
    paths: &Paths,
    id: VaultId,
    to: Option<&Path>,
    set_id: bool,
    dry_run: bool,
) -> Result<ExitCode, Error> {
    let to = to.map(full).transpose()?;
    if dry_run {
        let vault = Vault::open(paths, Limits::default())?;
        let would = vault.check_restore(id, to.as_ref(), set_id)?;
        say_notes(&would.notes);
        let (path, size, sha256) = (would.path, would.size, would.sha256);
        print(&format!("would restore {path} ({size} bytes, SHA-256 {sha256})"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut vault, recovered) = open_settled(paths)?;
    if to.is_none()
        && recovered.restored.contains(&id)
        && let Some(before) = vault.restored(id)
    {
        talk("An earlier command had put it back; that is settled now.");
        print(&before.path.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let restored = vault.restore(id, to.as_ref(), set_id)?;
    say_notes(&restored.notes);
    talk(&format!("Restored {} bytes, SHA-256 {}.", restored.size, restored.sha256));
    print(&restored.path.to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// One item of the list, as programs see it.
#[derive(Serialize)]
struct Row {
    id: VaultId,
    path: String,
    path_b64: String,
    sha256: Sha256,
    size: u64,
    vaulted_at: String,
}

impl Row {
    fn new(entry: &VaultEntry) -> Self {
        Self {
            id: entry.id,
            path: escape(&entry.path.0),
            path_b64: STANDARD.encode(&entry.path.0),
            sha256: entry.sha256,
            size: entry.size,
            vaulted_at: time(entry.vaulted_ms),
        }
    }
}

fn list(paths: &Paths, output: Format) -> Result<ExitCode, Error> {
    let listing = look(paths)?;
    if listing.damaged > 0 || listing.unsettled > 0 {
        let (damaged, unsettled) = (listing.damaged, listing.unsettled);
        talk(&format!("warning: {unsettled} unsettled items and {damaged} damaged records"));
        talk("hint: settle them: tm-agent vault recover");
    }
    let rows: Vec<Row> = listing.entries.iter().map(Row::new).collect();
    match output {
        Format::Json => {
            print(&serde_json::to_string_pretty(&rows).map_err(|error| Error::Print(error.into()))?)?;
        }
        Format::Text if rows.is_empty() => talk("The vault is empty."),
        Format::Text => {
            let lines = rows
                .iter()
                .map(|row| format!("{:36}  {:20}  {:>12}  {}", row.id, row.vaulted_at, row.size, row.path));
            let head = format!("{:36}  {:20}  {:>12}  {}", "ID", "VAULTED AT", "BYTES", "PATH");
            print(&std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn recover(paths: &Paths) -> Result<ExitCode, Error> {
    let mut vault = Vault::open(paths, Limits::default())?;
    let done = vault.recover()?;
    say_notes(&done.notes);
    print(&format!("finished {}, undone {}, damaged {}", done.finished, done.undone, done.damaged))?;
    let unsettled = done.notes.iter().any(|note| note.code == "unsettled");
    Ok(if unsettled { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn purge(paths: &Paths, what: &Purge, dry_run: bool) -> Result<ExitCode, Error> {
    let (purged, verb) = if dry_run {
        (Vault::open(paths, Limits::default())?.would_purge(what, now_ms())?, "would remove")
    } else {
        (open_settled(paths)?.0.purge(what, now_ms())?, "removed")
    };
    let Purged { removed, bytes } = purged;
    let lines: Vec<String> =
        removed.iter().map(|entry| format!("{verb} {} {}", entry.id, entry.path)).collect();
    if !lines.is_empty() {
        print(&lines.join("\n"))?;
    }
    talk(&format!("{verb} {} items, {bytes} bytes", removed.len()));
    Ok(ExitCode::SUCCESS)
}

/// Opens the vault, and settles what was left of earlier commands.
fn open_settled(paths: &Paths) -> Result<(Vault, Recovered), Error> {
    let mut vault = Vault::open(paths, Limits::default())?;
    let recovered = vault.recover()?;
    if !recovered.is_empty() {
        let Recovered { finished, undone, damaged, .. } = &recovered;
        talk(&format!(
            "Settled what was interrupted: finished {finished}, undone {undone}, damaged {damaged}."
        ));
        say_notes(&recovered.notes);
    }
    Ok((vault, recovered))
}

/// The full path that a person means, without `..`. Where `..` is used, no link may stand on the way, so that
/// leaving it out cannot lead elsewhere.
fn full(path: &Path) -> Result<PathBytes, VaultError> {
    let absolute = std::path::absolute(path).map_err(|source| VaultError::Io {
        doing: "find the full path of",
        on: bytes(path),
        source,
    })?;
    if absolute.components().any(|part| part == Component::ParentDir) {
        Place::find(&bytes(&absolute).0).map_err(VaultError::io("reach", &bytes(&absolute)))?;
    }
    let mut folded = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                folded.pop();
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) | Component::Normal(_) => folded.push(part),
        }
    }
    Ok(bytes(&folded))
}

/// Reads `90d`, `12h`, `30m` or `45s`.
fn parse_age(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end).unwrap_or((text, ""));
    let number: u64 = number.parse().map_err(|_| "expected a time such as 90d or 12h".to_owned())?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err("expected a time such as 90d or 12h".to_owned()),
    };
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(|| "too long".to_owned())
}

fn time(ms: i64) -> String {
    let at = jiff::Timestamp::from_millisecond(ms).unwrap_or_default();
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn say_notes(notes: &[Failure]) {
    for note in notes {
        talk(&format!("note: {note}"));
    }
}

/// One line to standard error, harmless whatever is in it.
fn talk(line: &str) {
    // Nobody is left to tell if standard error is closed.
    let _ = writeln!(io::stderr(), "{}", escape_for_display(line));
}

/// Lines to standard output, already harmless.
fn print(lines: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    writeln!(out, "{lines}").and_then(|()| out.flush()).map_err(Error::Print)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_units() {
        for (text, seconds) in [("90d", 7_776_000), ("12h", 43_200), ("0s", 0), ("5m", 300)] {
            assert_eq!(parse_age(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "90", "d", "1w", "-1d", "99999999999999999999d", "999999999999999999d"] {
            assert!(parse_age(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_path_is_made_full() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::os::unix::fs::symlink("a/b", root.join("link")).unwrap();
        assert_eq!(full(&root.join("a/b/../x")).unwrap(), bytes(&root.join("a/x")));
        assert_eq!(full(&root.join("a/./b//x/")).unwrap(), bytes(&root.join("a/b/x")));
        assert!(full(&root.join("link/../x")).is_err(), "it means a/x, not x");
        let here = std::env::current_dir().unwrap();
        assert_eq!(full(Path::new("x")).unwrap(), bytes(&here.join("x")));
    }
}
