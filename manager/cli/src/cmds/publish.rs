//! From a pattern's file to one that agents load: sent as a draft, signed here, put in force.
//!
//! A draft's file is JSON: `format` (`tm-draft-1`), the role, the role's next file with the signatures so far, and
//! how what is new in it reaches the fleet. That last is nobody's to sign: among what is signed the manager chooses.
//!
//! **Invariant:** what is signed is the digest of the bytes on this machine, never one that the manager names.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use tm_api::{
    pattern::{ImportQuery, PatternView},
    rollout::{RolloutState, RolloutView, Share, StartRollout},
    trust::PublishTrust,
};
use tm_patterns::{
    Pattern, ReadError,
    trust::{self, About, Delegate, Entry, Signed, Targets, TrustError, Verified},
};
use tm_protocol::ids::Sha256;

use super::trust::{current, expiry, send};
use crate::{
    cli::ImportPattern,
    client::{Client, ClientError},
    desk::{Desk, DeskError, Seat},
    failure::Failure,
    output::{Format, Output, say},
};

const FORMAT: &str = "tm-draft-1";

/// A role's next file, on its way to enough signatures.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Draft {
    format: String,
    role: String,
    file: String,
    /// Absent where all endpoints get it at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rollout: Option<StartRollout>,
}

/// Imports, signs and publishes in one go; the pattern as it then is.
///
/// # Errors
/// If any of these is refused; nothing is then in force that was not before.
pub(crate) async fn import(
    what: ImportPattern,
    client: &Client,
    desk: &Desk,
    out: &Output,
) -> Result<PatternView, Failure> {
    let role = what.role;
    // Before anything is sent: without a key nothing can come of it.
    desk.some_keys(Seat::Role(role))?;
    let terms = what.rollout.clone().terms();
    let prepared = prepare(&what, out).await?;
    let set = current(client, desk).await?;
    let (sent, entry) = upload(&what, prepared, client, out).await?;
    let mut listed = trust::entries(role, &set.role(role).signed).map_err(metadata)?;
    listed.retain(|other| other.about.name == entry.about.name || other.sha256 == entry.sha256);
    let is_in_force = listed == [entry.clone()];
    if is_in_force && terms.is_some() {
        return Err(DeskError::InForce("a rollout begins with a new one").into());
    }
    if !is_in_force {
        let kept = if terms.is_some() { in_use(&entry.about.name, client).await? } else { Vec::new() };
        if listed.contains(&entry) && (terms.is_some() || !stays_chosen(&entry, client).await?) {
            return Err(DeskError::InForce("endpoints get it as its rollout says").into());
        }
        let mut file = next(&set, role, Some(entry), &kept)?;
        sign_here(desk, role, &mut file)?;
        put_in_force(client, desk, (role, &file), terms, &set).await?;
    }
    let mut view: PatternView = client.get(&["patterns", &sent.sha256], &()).await?;
    view.warnings = sent.warnings;
    Ok(view)
}

/// Sends a pattern, and writes what is to be signed.
///
/// # Errors
/// If the manager refuses the pattern, or the file cannot be written.
pub(crate) async fn draft(
    what: ImportPattern,
    path: &Path,
    client: &Client,
    desk: &Desk,
    out: &Output,
) -> Result<PatternView, Failure> {
    let prepared = prepare(&what, out).await?;
    let set = current(client, desk).await?;
    let terms = what.rollout.clone().terms();
    let (sent, entry) = upload(&what, prepared, client, out).await?;
    let kept = if terms.is_some() { in_use(&entry.about.name, client).await? } else { Vec::new() };
    let file = next(&set, what.role, Some(entry), &kept)?;
    write(path, what.role, &file, terms)?;
    say("a draft: sign it (tmctl pattern sign), then publish it (tmctl pattern publish)\n");
    Ok(sent)
}

/// Signs a draft with every key that is here.
///
/// # Errors
/// If it is none, or there is no key.
pub(crate) fn sign(path: &Path, desk: &Desk) -> Result<(), Failure> {
    let (role, mut file, terms) = read(path)?;
    let keys = sign_here(desk, role, &mut file)?;
    write(path, role, &file, terms)?;
    let listed = trust::entries(role, &file.signed).map_err(metadata)?;
    say(&format!("signed with {keys} key(s) of `{role}`, which will list:\n"));
    for entry in listed {
        let line = format!("  {}  {}", entry.sha256, entry.about.name);
        say(&(tm_protocol::text::escape_for_display(&line) + "\n"));
    }
    Ok(())
}

/// Puts a signed draft in force. `terms` take the place of those in the draft.
///
/// # Errors
/// If it carries too few signatures, others published since it was written, or it leaves out the version that
/// endpoints which the new one does not reach go on with.
pub(crate) async fn publish(
    path: &Path,
    terms: Option<StartRollout>,
    client: &Client,
    desk: &Desk,
) -> Result<(), Failure> {
    let set = current(client, desk).await?;
    let (role, file, drafted) = read(path)?;
    put_in_force(client, desk, (role, &file), terms.or(drafted), &set).await?;
    say(&format!("in force: `{role}` version {}\n", file.signed.version));
    Ok(())
}

/// Takes a pattern off a role's list.
///
/// # Errors
/// If it is not on it, or the change is refused.
pub(crate) async fn retire(
    pattern: &str,
    role: Delegate,
    client: &Client,
    desk: &Desk,
) -> Result<(), Failure> {
    let set = current(client, desk).await?;
    let mut entries = trust::entries(role, &set.role(role).signed).map_err(metadata)?;
    let before = entries.len();
    entries.retain(|entry| entry.about.name != pattern && entry.sha256.to_string() != pattern);
    if entries.len() == before {
        return Err(DeskError::NotListed { role: role.word(), name: pattern.to_owned() }.into());
    }
    let version = set.role(role).signed.version.get() + 1;
    let file = trust::role(role, version, &entries, expiry()).map_err(metadata)?;
    let mut file = trust::unsigned(file);
    sign_here(desk, role, &mut file)?;
    put_in_force(client, desk, (role, &file), None, &set).await?;
    say("withdrawn: no agent that hears of it loads it any more\n");
    Ok(())
}

fn metadata(source: TrustError) -> Failure {
    DeskError::Metadata { what: "the metadata", source }.into()
}

/// A pattern as this machine has it.
struct Prepared {
    name: String,
    bytes: Vec<u8>,
    /// Digest and size of what is signed; or why it is no pattern.
    ours: Result<(Sha256, u64), ReadError>,
}

/// Reads the pattern and tries it on this machine.
async fn prepare(what: &ImportPattern, out: &Output) -> Result<Prepared, Failure> {
    let name = match &what.name {
        Some(name) => name.clone(),
        None => what
            .file
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| {
                Failure::Usage("the file's name cannot be the pattern's; give one with --name".into())
            })?
            .to_owned(),
    };
    let bytes = super::pattern::read(&what.file)?;
    let ours = match Pattern::read(name.clone(), bytes.as_slice()) {
        Ok(imported) => {
            let reference = imported.pattern.reference();
            let tried = super::trial::of(imported.pattern, what.force).await;
            tried.map_err(|view| refused(what, ClientError::Refused(Box::new(view)), out))?;
            Ok((reference.sha256, reference.size))
        }
        // What is no pattern here is for the manager to say why, in the words that it has for it.
        Err(error) => Err(error),
    };
    Ok(Prepared { name, bytes, ours })
}

/// Sends the pattern's bytes; what the manager made of them, and what is to be signed.
async fn upload(
    what: &ImportPattern,
    prepared: Prepared,
    client: &Client,
    out: &Output,
) -> Result<(PatternView, Entry), Failure> {
    let Prepared { name, bytes, ours } = prepared;
    let query = ImportQuery { name: name.clone(), force: what.force };
    let sent: PatternView =
        client.upload(&["patterns"], &query, bytes).await.map_err(|source| refused(what, source, out))?;
    let (sha256, size) = ours.map_err(|error| other_bytes(&error, &sent))?;
    if sha256.to_string() != sent.sha256 {
        return Err(DeskError::OtherBytes { ours: sha256, theirs: sent.sha256 }.into());
    }
    let endpoints = (!what.endpoint.is_empty()).then(|| what.endpoint.clone());
    let about = About { name, kind: what.role.kind(), endpoints };
    Ok((sent, Entry { sha256, size, about }))
}

fn refused(what: &ImportPattern, source: ClientError, out: &Output) -> Failure {
    // Programs that read the rules and their places want them where they want the rest.
    if let (true, ClientError::Refused(view)) = (out.format() == Format::Json, &source)
        && let Err(failure) = out.json(view)
    {
        return failure;
    }
    Failure::Import { file: what.file.clone(), source }
}

fn other_bytes(_: &ReadError, sent: &PatternView) -> Failure {
    DeskError::OtherBytes { ours: Sha256::of(b""), theirs: sent.sha256.clone() }.into()
}

/// The versions of a name that endpoints get now, by digest.
async fn in_use(name: &str, client: &Client) -> Result<Vec<String>, Failure> {
    let patterns: Vec<PatternView> = client.get(&["patterns"], &()).await?;
    let used = patterns.into_iter().filter(|pattern| pattern.name == name && pattern.reach != "none");
    Ok(used.map(|pattern| pattern.sha256).collect())
}

/// Whether everybody who gets any version of a name would get this one if there were no other.
async fn stays_chosen(entry: &Entry, client: &Client) -> Result<bool, Failure> {
    let rollouts: Vec<RolloutView> = client.get(&["rollouts"], &()).await?;
    let own = rollouts.iter().find(|rollout| rollout.sha256 == entry.sha256.to_string());
    Ok(own.is_none_or(|rollout| match rollout.state {
        RolloutState::Withdrawn => true,
        RolloutState::Stopped => false,
        RolloutState::Running | RolloutState::Complete => {
            rollout.group.is_none() && rollout.reach == Some(Share::ALL)
        }
    }))
}

/// A role's next file: with this entry, in the place of what has its name or digest, but for the versions of its name
/// that are to be `kept` beside it.
fn next(
    set: &Verified,
    role: Delegate,
    entry: Option<Entry>,
    kept: &[String],
) -> Result<Signed<Targets>, Failure> {
    let mut entries = trust::entries(role, &set.role(role).signed).map_err(metadata)?;
    if let Some(entry) = entry {
        let stays =
            |old: &Entry| old.about.name != entry.about.name || kept.contains(&old.sha256.to_string());
        entries.retain(|old| stays(old) && old.sha256 != entry.sha256);
        entries.push(entry);
    }
    let version = set.role(role).signed.version.get() + 1;
    trust::role(role, version, &entries, expiry()).map(trust::unsigned).map_err(metadata)
}

/// Signs with every key of the role that is here; how many.
fn sign_here(desk: &Desk, role: Delegate, file: &mut Signed<Targets>) -> Result<usize, Failure> {
    let keys = desk.some_keys(Seat::Role(role))?;
    for key in &keys {
        trust::sign(file, key).map_err(metadata)?;
    }
    Ok(keys.len())
}

async fn put_in_force(
    client: &Client,
    desk: &Desk,
    (role, file): (Delegate, &Signed<Targets>),
    rollout: Option<StartRollout>,
    set: &Verified,
) -> Result<(), Failure> {
    let needed = trust::role_holders(&set.targets().signed, role).map_or(1, |holders| holders.threshold);
    let found = u64::try_from(trust::signers(file).len()).unwrap_or(u64::MAX);
    if found < needed {
        return Err(DeskError::Signatures { role: role.word(), needed, found }.into());
    }
    let roles = [(role.to_string(), trust::text(file))].into();
    send(client, desk, &PublishTrust { roles, rollout, ..PublishTrust::default() }, set).await.map(drop)
}

fn read(path: &Path) -> Result<(Delegate, Signed<Targets>, Option<StartRollout>), Failure> {
    let text = fs::read_to_string(path).map_err(|source| Failure::File {
        verb: "read",
        path: path.to_path_buf(),
        source,
    })?;
    let draft: Option<Draft> = serde_json::from_str(&text).ok();
    let parsed = draft.filter(|draft| draft.format == FORMAT).and_then(|draft| {
        let role = Delegate::from_word(&draft.role)?;
        let file = trust::parse(role.word(), &draft.file).ok()?;
        trust::entries(role, &file.signed).is_ok().then_some((role, file, draft.rollout))
    });
    parsed.ok_or_else(|| DeskError::Draft(path.to_path_buf()).into())
}

fn write(
    path: &Path,
    role: Delegate,
    file: &Signed<Targets>,
    rollout: Option<StartRollout>,
) -> Result<(), Failure> {
    let draft = Draft { format: FORMAT.to_owned(), role: role.to_string(), file: trust::text(file), rollout };
    let text = serde_json::to_string_pretty(&draft).expect("texts are JSON");
    fs::write(path, text).map_err(|source| Failure::File { verb: "write", path: path.to_path_buf(), source })
}
