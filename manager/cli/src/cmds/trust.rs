//! `tmctl pattern trust`: who may sign patterns. Keys are made and used here; the manager gets only signatures.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tm_api::trust::{PublishTrust, TrustView};
use tm_patterns::trust::{self, Bundle, Delegate, Holders, SigningKey, Start, TopRole, TrustError, Verified};

use crate::{
    cli::Trust,
    client::Client,
    desk::{Desk, DeskError, Seat},
    failure::{Exit, Failure},
    output::{Column, Output, say},
};

/// How long what a desk signs is good for.
const GOOD_FOR: SignedDuration = SignedDuration::from_hours(365 * 24);

/// One role, as `trust status` shows it.
#[derive(Debug, Serialize)]
struct RoleView {
    role: &'static str,
    version: u64,
    expires: String,
    threshold: u64,
    keys: usize,
    keys_here: usize,
}

const COLUMNS: [Column<RoleView>; 6] = [
    Column::narrow("role", |r| r.role.to_owned()),
    Column::narrow("version", |r| r.version.to_string()),
    Column::narrow("threshold", |r| r.threshold.to_string()),
    Column::narrow("keys", |r| r.keys.to_string()),
    Column::narrow("keys_here", |r| r.keys_here.to_string()),
    Column::time("expires", |r| r.expires.clone()),
];

pub(crate) async fn run(command: Trust, client: &Client, desk: &Desk, out: &Output) -> Result<Exit, Failure> {
    match command {
        Trust::Init => init(client, desk).await?,
        Trust::Status => {
            let set = current(client, desk).await?;
            out.list(&status(desk, &set)?, &COLUMNS, "")?;
        }
        Trust::Rotate { role } => rotate(client, desk, role).await?,
        Trust::AddKey { role, public } => {
            let key = match public {
                Some(public) => public,
                None => desk.new_key(role)?.public(),
            };
            change(client, desk, role, |holders| holders.keys.push(key.clone())).await?;
            say(&format!("the role `{}` has one key more: {key}\n", role.word()));
        }
        Trust::Threshold { role, count } => {
            change(client, desk, role, |holders| holders.threshold = count).await?;
            say(&format!("`{}` needs {count} signature(s) from now on\n", role.word()));
        }
        Trust::Repair => repair(client, desk).await?,
    }
    Ok(Exit::Done)
}

/// When what is signed now ends.
pub(crate) fn expiry() -> Timestamp {
    Timestamp::now() + GOOD_FOR
}

/// What is in force at the manager, judged by what this desk has seen, and noted as seen.
///
/// # Errors
/// If this desk has no trust, or the manager shows something else than what the fleet signed.
pub(crate) async fn current(client: &Client, desk: &Desk) -> Result<Verified, Failure> {
    let Some(seen) = desk.seen()? else { return Err(DeskError::NoTrust(desk.folder().to_path_buf()).into()) };
    let view: TrustView = client.get(&["trust"], &()).await?;
    judged(view, Start::After(&seen), desk)
}

/// Sends what was signed here; what is in force then.
///
/// # Errors
/// If the manager refuses it, or shows something else than what was sent.
pub(crate) async fn send(
    client: &Client,
    desk: &Desk,
    change: &PublishTrust,
    before: &Verified,
) -> Result<Verified, Failure> {
    let path: &[&str] =
        if change.root.is_some() || change.targets.is_some() { &["trust", "root"] } else { &["trust"] };
    let view: TrustView = client.post(path, change).await?;
    judged(view, Start::After(before), desk)
}

fn judged(view: TrustView, start: Start<'_>, desk: &Desk) -> Result<Verified, Failure> {
    let metadata = |source| DeskError::Metadata { what: "the manager's metadata", source };
    let files = view.files.ok_or_else(|| DeskError::Exists(desk.folder().to_path_buf()))?;
    let bundle = Bundle {
        roots: files.roots,
        timestamp: files.timestamp,
        snapshot: files.snapshot,
        targets: files.targets,
        roles: files.roles,
    };
    let set = Verified::check(start, bundle, Timestamp::now()).map_err(metadata)?;
    desk.keep_seen(&set)?;
    Ok(set)
}

fn malformed(source: TrustError) -> Failure {
    DeskError::Metadata { what: "the new metadata", source }.into()
}

async fn init(client: &Client, desk: &Desk) -> Result<(), Failure> {
    let view: TrustView = client.get(&["trust"], &()).await?;
    let pending = desk.pending()?;
    let folder = || desk.folder().to_path_buf();
    if let Some(files) = &view.files {
        let ours = match &pending {
            Some(PublishTrust { root: Some(root), .. }) => Some(trust::root_digest(root)),
            Some(_) | None => desk.root_digest()?,
        };
        if !files.roots.iter().any(|root| Some(trust::root_digest(root)) == ours) {
            return Err(DeskError::Foreign(folder()).into());
        }
    }
    let change = match (pending, &view.files) {
        (Some(change), _) => change,
        (None, Some(_)) => {
            say(&format!("the fleet's root of trust is already the one in {}\n", shown(desk)));
            return Ok(());
        }
        (None, None) if desk.has_keys() => return Err(DeskError::Exists(folder()).into()),
        (None, None) => {
            let change = first(desk, &view)?;
            desk.keep_pending(&change)?;
            change
        }
    };
    let root = change.root.as_deref().unwrap_or_default();
    let anchor = trust::root_digest(root);
    let view = match view.files {
        Some(_) => view,
        None => client.post(&["trust", "root"], &change).await?,
    };
    judged(view, Start::Anchor(anchor), desk)?;
    desk.forget_pending();
    say(&format!(
        "a new root of trust: its keys are in {}; keep a copy of that folder in a safe place, and none on the \
         manager\nroot digest: {anchor}\n",
        shown(desk)
    ));
    Ok(())
}

fn shown(desk: &Desk) -> String {
    tm_protocol::text::escape_for_display(&desk.folder().display().to_string())
}

/// The first files of a fleet, signed with new keys.
fn first(desk: &Desk, view: &TrustView) -> Result<PublishTrust, Failure> {
    let root_key = desk.new_key(Seat::Root)?;
    let targets_key = desk.new_key(Seat::Targets)?;
    let tops = [
        (TopRole::Root, Holders::one(root_key.public())),
        (TopRole::Targets, Holders::one(targets_key.public())),
        (TopRole::Snapshot, Holders::one(view.snapshot_key.clone())),
        (TopRole::Timestamp, Holders::one(view.timestamp_key.clone())),
    ];
    let root = trust::root(1, &tops, expiry()).map_err(malformed)?;
    let mut change = PublishTrust { root: Some(signed(root, &[root_key])?), ..PublishTrust::default() };
    let mut named = Vec::new();
    for role in Delegate::ALL {
        let key = desk.new_key(Seat::Role(role))?;
        named.push((role, Holders::one(key.public())));
        let file = trust::role(role, 1, &[], expiry()).map_err(malformed)?;
        change.roles.insert(role.to_string(), signed(file, &[key])?);
    }
    let targets = trust::targets(1, &named, expiry()).map_err(malformed)?;
    change.targets = Some(signed(targets, &[targets_key])?);
    Ok(change)
}

/// The text of a file with the signatures of these keys.
pub(crate) fn signed<T: trust::Role>(file: T, keys: &[SigningKey]) -> Result<String, Failure> {
    let mut file = trust::unsigned(file);
    for key in keys {
        trust::sign(&mut file, key).map_err(malformed)?;
    }
    Ok(trust::text(&file))
}

/// Who signs for a role.
fn holders(set: &Verified, seat: Seat) -> Result<Holders, Failure> {
    let holders = match seat {
        Seat::Root => trust::holders(&set.root().signed, TopRole::Root),
        Seat::Targets => trust::holders(&set.root().signed, TopRole::Targets),
        Seat::Role(role) => trust::role_holders(&set.targets().signed, role),
    };
    holders.ok_or_else(|| malformed(TrustError::Malformed("keys of an unknown kind".to_owned())))
}

async fn rotate(client: &Client, desk: &Desk, seat: Seat) -> Result<(), Failure> {
    let old = desk.some_keys(seat)?;
    let new = desk.new_key(seat)?;
    let public = new.public();
    change(client, desk, seat, |holders| {
        holders.keys.retain(|key| old.iter().all(|old| old.public() != *key));
        holders.keys.push(public.clone());
    })
    .await?;
    for key in &old {
        desk.retire(seat, key)?;
    }
    say(&format!(
        "`{}` is signed with a new key from now on; the old one is good for nothing\n",
        seat.word()
    ));
    Ok(())
}

/// Changes who signs for a role, and signs anew what depends on it.
async fn change(
    client: &Client,
    desk: &Desk,
    seat: Seat,
    edit: impl FnOnce(&mut Holders),
) -> Result<(), Failure> {
    let set = current(client, desk).await?;
    let versions = set.versions();
    let mut edited = holders(&set, seat)?;
    edit(&mut edited);
    let pick = |other: Seat| if other == seat { Ok(edited.clone()) } else { holders(&set, other) };
    let mut change = PublishTrust::default();
    let mut roles = Vec::new();
    for role in Delegate::ALL {
        roles.push((role, pick(Seat::Role(role))?));
    }
    let targets = trust::targets(versions.targets + 1, &roles, expiry()).map_err(malformed)?;
    match seat {
        Seat::Root | Seat::Targets => {
            let mut tops = vec![(TopRole::Root, pick(Seat::Root)?), (TopRole::Targets, pick(Seat::Targets)?)];
            for top in [TopRole::Snapshot, TopRole::Timestamp] {
                let unknown = || malformed(TrustError::Malformed("keys of an unknown kind".to_owned()));
                tops.push((top, trust::holders(&set.root().signed, top).ok_or_else(unknown)?));
            }
            let root = trust::root(versions.root + 1, &tops, expiry()).map_err(malformed)?;
            change.root = Some(signed(root, &desk.some_keys(Seat::Root)?)?);
            if seat == Seat::Targets {
                change.targets = Some(signed(targets, &desk.some_keys(Seat::Targets)?)?);
            }
        }
        Seat::Role(role) => {
            change.targets = Some(signed(targets, &desk.some_keys(Seat::Targets)?)?);
            let entries = trust::entries(role, &set.role(role).signed).map_err(malformed)?;
            let version = versions.roles.get(&role).copied().unwrap_or(0) + 1;
            let file = trust::role(role, version, &entries, expiry()).map_err(malformed)?;
            change.roles.insert(role.to_string(), signed(file, &desk.keys(seat)?)?);
        }
    }
    send(client, desk, &change, &set).await.map(drop)
}

fn status(desk: &Desk, set: &Verified) -> Result<Vec<RoleView>, Failure> {
    let versions = set.versions();
    let mut rows = Vec::new();
    for seat in Seat::ALL {
        let holders = holders(set, seat)?;
        let (version, expires) = match seat {
            Seat::Root => (versions.root, set.root().signed.expires),
            Seat::Targets => (versions.targets, set.targets().signed.expires),
            Seat::Role(role) => {
                (versions.roles.get(&role).copied().unwrap_or(0), set.role(role).signed.expires)
            }
        };
        let here = desk.keys(seat)?;
        rows.push(RoleView {
            role: seat.word(),
            version,
            expires: expires.to_string(),
            threshold: holders.threshold,
            keys: holders.keys.len(),
            keys_here: here.iter().filter(|key| holders.keys.contains(&key.public())).count(),
        });
    }
    for (role, version) in [("snapshot", versions.snapshot), ("timestamp", versions.timestamp)] {
        let expires = set.fresh_until().to_string();
        rows.push(RoleView { role, version, expires, threshold: 1, keys: 1, keys_here: 0 });
    }
    Ok(rows)
}

/// Gives a manager that was restored from an old copy what this desk has seen since.
async fn repair(client: &Client, desk: &Desk) -> Result<(), Failure> {
    let Some(seen) = desk.seen()? else { return Err(DeskError::NoTrust(desk.folder().to_path_buf()).into()) };
    let view: TrustView = client.get(&["trust"], &()).await?;
    let files = view.files.ok_or_else(|| DeskError::Exists(desk.folder().to_path_buf()))?;
    let mut change = PublishTrust::default();
    let version = |what: &str, text: &str| -> Result<u64, Failure> {
        let file = trust::parse::<trust::Targets>(what, text).map_err(malformed)?;
        Ok(file.signed.version.get())
    };
    let versions = seen.versions();
    if version("targets", &files.targets)? < versions.targets {
        change.targets = Some(seen.bundle().targets.clone());
    }
    for (role, ours) in &versions.roles {
        let theirs = files.roles.get(role.word()).map_or("", String::as_str);
        if version(role.word(), theirs)? < *ours {
            let text = seen.bundle().roles.get(role.word()).cloned().unwrap_or_default();
            change.roles.insert(role.to_string(), text);
        }
    }
    if change.targets.is_none() && change.roles.is_empty() {
        say("the manager has everything that this desk has seen\n");
        return Ok(());
    }
    send(client, desk, &change, &seen).await?;
    say("the manager has again what was published\n");
    Ok(())
}
