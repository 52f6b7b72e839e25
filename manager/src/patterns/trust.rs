//! The manager's part of the fleet's signed metadata: it takes what desks signed, adds snapshot and timestamp, and
//! keeps these fresh.
//!
//! On disk, `trust/{snapshot,timestamp}.key` in the data folder (the format is `tm_patterns::trust`'s), made at the
//! first start. A manager that shares a fleet with another has the same folder, as it has the same `ca`.
//!
//! **Invariant:** what is stored was judged as an agent judges it. No key here can make a pattern valid.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tm_api::rollout::StartRollout;
use tm_patterns::trust::{
    self, Bundle, Delegate, KeyError, Root, Signed, SigningKey, Start, Targets, TrustError, Verified,
};
use tm_protocol::ids::Sha256;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::store::{
    Store, StoreError,
    trust::{NewTrust, Published, TrustRow},
};

/// How long snapshot and timestamp are good for: as long as an agent may be cut off from all managers.
const GOOD_FOR: SignedDuration = SignedDuration::from_hours(14 * 24);
/// They are made anew when less than this is left.
const RENEW: SignedDuration = SignedDuration::from_hours(7 * 24);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(3600);

/// The files of the keys: the snapshot's and the timestamp's.
const NAMES: [&str; 2] = ["snapshot.key", "timestamp.key"];

/// The only keys of the metadata that a manager has.
#[derive(Debug)]
pub(crate) struct OnlineKeys {
    snapshot: SigningKey,
    timestamp: SigningKey,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OnlineKeysError {
    #[error("cannot use `{path}`")]
    File { path: String, source: io::Error },
    #[error("`{path}` is of no use")]
    Key { path: String, source: KeyError },
}

/// What a desk signed: each file that changes.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) root: Option<String>,
    pub(crate) targets: Option<String>,
    pub(crate) roles: BTreeMap<String, String>,
    /// How what is new reaches the fleet; all of it at once if nothing is said.
    pub(crate) rollout: Option<StartRollout>,
}

/// Why nothing was published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    #[error("the fleet has no root of trust yet")]
    NoTrust,
    #[error("`{file}` is at version {current} by now, and version {found} was sent")]
    Version { file: String, current: u64, found: u64 },
    #[error("others published at the same moment")]
    Overtaken,
    #[error("the metadata are refused")]
    Refused(#[source] TrustError),
    #[error("pattern {0} is not here")]
    Missing(Sha256),
    #[error("a version of `{0}` is still on its way")]
    UnderWay(String),
    #[error("endpoints would be left without a version of `{0}`")]
    Stranded(String),
    #[error("nothing is new")]
    NothingNew,
    #[error("there is no group `{0}`")]
    NoGroup(String),
    #[error("the stored metadata are damaged")]
    Damaged(#[source] TrustError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl OnlineKeys {
    /// Reads the keys in `folder`, and makes those that are missing. Blocks.
    ///
    /// # Errors
    /// If the folder cannot be used, or holds what is no key.
    pub(crate) fn open(folder: &Path) -> Result<Self, OnlineKeysError> {
        let file = |source| OnlineKeysError::File { path: folder.display().to_string(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(file)?;
        let [snapshot, timestamp] = NAMES;
        let keys = Self { snapshot: key(folder, snapshot)?, timestamp: key(folder, timestamp)? };
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(file)?;
        Ok(keys)
    }

    /// Makes `folder`, which must not exist, with the keys of `from`. Blocks.
    ///
    /// # Errors
    /// If those cannot be used, or the disk refuses.
    pub(crate) fn join(folder: &Path, from: &Path) -> Result<(), OnlineKeysError> {
        Self::open(from)?;
        let file = |path: &Path| {
            let path = path.display().to_string();
            move |source| OnlineKeysError::File { path, source }
        };
        DirBuilder::new().mode(0o700).create(folder).map_err(file(folder))?;
        for name in NAMES {
            let text = fs::read(from.join(name)).map_err(file(&from.join(name)))?;
            let mut open = OpenOptions::new();
            open.write(true).create_new(true).mode(0o600);
            let put = open.open(folder.join(name)).and_then(|mut file| {
                file.write_all(&text)?;
                file.sync_all()
            });
            put.map_err(file(&folder.join(name)))?;
        }
        Ok(())
    }

    /// The public halves, in hex: of the snapshot's key and the timestamp's.
    pub(crate) fn public(&self) -> (String, String) {
        (self.snapshot.public(), self.timestamp.public())
    }

    /// Snapshot and timestamp for a set. Their version is the time, so that a manager that was restored from a
    /// copy goes on above what agents have seen.
    fn seal(&self, bundle: &mut Bundle, above: u64, now: Timestamp) -> Result<(), TrustError> {
        let version = u64::try_from(now.as_second()).unwrap_or(1).max(above.saturating_add(1));
        trust::online(bundle, version, now + GOOD_FOR, (&self.snapshot, &self.timestamp))
    }
}

fn key(folder: &Path, name: &str) -> Result<SigningKey, OnlineKeysError> {
    let path = folder.join(name);
    let file = |source| OnlineKeysError::File { path: path.display().to_string(), source };
    let bad = |source| OnlineKeysError::Key { path: path.display().to_string(), source };
    match fs::read_to_string(&path) {
        Ok(text) => SigningKey::from_text(&text, None).map_err(bad),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = SigningKey::generate().map_err(bad)?;
            let text = key.to_text(None).map_err(bad)?;
            let beside = folder.join(format!("{name}.new"));
            let mut open = OpenOptions::new();
            open.write(true).create(true).truncate(true).mode(0o600);
            open.open(&beside)
                .and_then(|mut file| {
                    file.write_all(text.as_bytes())?;
                    file.sync_all()
                })
                .and_then(|()| fs::rename(&beside, &path))
                .map_err(file)?;
            Ok(key)
        }
        Err(source) => Err(file(source)),
    }
}

/// Reads what is in force.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn parse(row: &TrustRow) -> Result<Bundle, TrustError> {
    Bundle::parse(row.bundle.as_bytes())
}

/// Puts what a desk signed in force, with all that it lists, or changes nothing.
///
/// # Errors
/// If it does not follow on what is in force, is not signed as it must be, or lists what is not here.
pub(crate) async fn publish(
    store: &Store,
    keys: &OnlineKeys,
    change: Change,
    actor: &str,
    now: Timestamp,
) -> Result<(), PublishError> {
    let row = store.trust().await?;
    let before = row.as_ref().map(|row| parse(row).map_err(PublishError::Damaged)).transpose()?;
    let rollout = change.rollout.clone();
    let (bundle, set) = judge(keys, before, change, now)?;
    let mut listed = Vec::new();
    for role in Delegate::ALL {
        let entries = trust::entries(role, &set.role(role).signed).map_err(PublishError::Refused)?;
        listed.extend(entries.into_iter().map(|entry| entry.sha256));
    }
    let versions = set.versions();
    let roles: BTreeMap<String, u64> =
        versions.roles.iter().map(|(role, version)| (role.to_string(), *version)).collect();
    let text = String::from_utf8(bundle.to_bytes()).expect("JSON is text");
    let new = NewTrust {
        from: row.map(|row| row.generation),
        bundle: &text,
        listed: Some(&listed),
        rollout: rollout.as_ref(),
        detail: json!({ "root": versions.root, "targets": versions.targets, "roles": roles }),
    };
    match store.publish_trust(new, actor, now.as_millisecond()).await? {
        Published::Done => Ok(()),
        Published::Overtaken => Err(PublishError::Overtaken),
        Published::Missing(sha256) => Err(PublishError::Missing(sha256)),
        Published::UnderWay(name) => Err(PublishError::UnderWay(name)),
        Published::Stranded(name) => Err(PublishError::Stranded(name)),
        Published::NothingNew => Err(PublishError::NothingNew),
        Published::NoGroup(name) => Err(PublishError::NoGroup(name)),
    }
}

/// The set that comes of a change, judged as an agent would.
fn judge(
    keys: &OnlineKeys,
    before: Option<Bundle>,
    change: Change,
    now: Timestamp,
) -> Result<(Bundle, Verified), PublishError> {
    let refused = PublishError::Refused;
    let Some(mut bundle) = before else {
        let (Some(root), Some(targets)) = (change.root, change.targets) else {
            return Err(PublishError::NoTrust);
        };
        let anchor = trust::root_digest(&root);
        let mut bundle = Bundle {
            roots: vec![root],
            timestamp: String::new(),
            snapshot: String::new(),
            targets,
            roles: change.roles,
        };
        keys.seal(&mut bundle, 0, now).map_err(refused)?;
        let set = Verified::check(Start::Anchor(anchor), bundle.clone(), now).map_err(refused)?;
        return Ok((bundle, set));
    };
    let mut current = bundle.clone();
    current.roots.drain(..current.roots.len().saturating_sub(1));
    let current = Verified::restore(current).map_err(PublishError::Damaged)?;
    let versions = current.versions();
    if let Some(text) = change.root {
        let root: Signed<Root> = trust::parse("root", &text).map_err(refused)?;
        follows("root", versions.root, root.signed.version.get())?;
        bundle.roots.push(text);
    }
    if let Some(text) = change.targets {
        let targets: Signed<Targets> = trust::parse("targets", &text).map_err(refused)?;
        follows("targets", versions.targets, targets.signed.version.get())?;
        bundle.targets = text;
    }
    for (name, text) in change.roles {
        let unknown = || refused(TrustError::Malformed(format!("there is no role `{name}`")));
        let role = Delegate::from_word(&name).ok_or_else(unknown)?;
        let file: Signed<Targets> = trust::parse(role.word(), &text).map_err(refused)?;
        let seen = versions.roles.get(&role).copied().unwrap_or(0);
        follows(role.word(), seen, file.signed.version.get())?;
        bundle.roles.insert(name, text);
    }
    keys.seal(&mut bundle, versions.snapshot.max(versions.timestamp), now).map_err(refused)?;
    let set = Verified::check(Start::After(&current), bundle.clone(), now).map_err(refused)?;
    Ok((bundle, set))
}

fn follows(file: &str, current: u64, found: u64) -> Result<(), PublishError> {
    // A manager that was restored from a copy may be several behind; two that were made from the same one are equal.
    if found > current {
        Ok(())
    } else {
        Err(PublishError::Version { file: file.to_owned(), current, found })
    }
}

/// Makes snapshot and timestamp anew at once and whenever they come near their end, until the manager ends.
pub(crate) async fn keep_fresh(store: Store, keys: Arc<OnlineKeys>, ending: CancellationToken) {
    // After a start always: the store may be an older copy.
    let mut at_least = GOOD_FOR;
    loop {
        match renew(&store, &keys, Timestamp::now(), at_least).await {
            Ok(()) => at_least = RENEW,
            // Managers that share a store start at the same moment; one of them is enough.
            Err(PublishError::Overtaken) => at_least = RENEW,
            Err(error) => {
                tracing::error!(%error, cause = ?error, "The signed metadata are not kept fresh.");
            }
        }
        tokio::select! {
            () = sleep(LOOK) => {}
            () = ending.cancelled() => return,
        }
    }
}

async fn renew(
    store: &Store,
    keys: &OnlineKeys,
    now: Timestamp,
    at_least: SignedDuration,
) -> Result<(), PublishError> {
    let Some(row) = store.trust().await? else { return Ok(()) };
    let bundle = parse(&row).map_err(PublishError::Damaged)?;
    let mut current = bundle.clone();
    current.roots.drain(..current.roots.len().saturating_sub(1));
    let current = Verified::restore(current).map_err(PublishError::Damaged)?;
    if current.fresh_until() > now + at_least {
        return Ok(());
    }
    let (bundle, _) = judge(keys, Some(bundle), Change::default(), now)?;
    let text = String::from_utf8(bundle.to_bytes()).expect("JSON is text");
    let new = NewTrust {
        from: Some(row.generation),
        bundle: &text,
        listed: None,
        rollout: None,
        detail: json!({}),
    };
    match store.publish_trust(new, "manager", now.as_millisecond()).await? {
        Published::Done => Ok(()),
        // The others are about what is listed, which stays as it is.
        Published::Overtaken
        | Published::Missing(_)
        | Published::UnderWay(_)
        | Published::Stranded(_)
        | Published::NothingNew
        | Published::NoGroup(_) => Err(PublishError::Overtaken),
    }
}

#[cfg(test)]
mod tests {
    use tm_patterns::trust::{About, Entry, Holders, TopRole};

    use super::*;
    use crate::store::tests::scratch;

    struct Desk {
        key: SigningKey,
        root: String,
        targets: String,
    }

    fn in_a_year() -> Timestamp {
        Timestamp::now() + SignedDuration::from_hours(365 * 24)
    }

    fn signed<T: trust::Role>(file: T, key: &SigningKey) -> String {
        let mut file = trust::unsigned(file);
        trust::sign(&mut file, key).unwrap();
        trust::text(&file)
    }

    impl Desk {
        fn new(online: &OnlineKeys) -> Self {
            let key = SigningKey::generate().unwrap();
            let (snapshot, timestamp) = online.public();
            let own = || Holders::one(key.public());
            let roles = [
                (TopRole::Root, own()),
                (TopRole::Targets, own()),
                (TopRole::Snapshot, Holders::one(snapshot)),
                (TopRole::Timestamp, Holders::one(timestamp)),
            ];
            let root = signed(trust::root(1, &roles, in_a_year()).unwrap(), &key);
            let targets = signed(
                trust::targets(1, &Delegate::ALL.map(|role| (role, own())), in_a_year()).unwrap(),
                &key,
            );
            Self { key, root, targets }
        }

        fn list(&self, role: Delegate, version: u64, texts: &[&str]) -> String {
            let entries: Vec<Entry> = texts
                .iter()
                .map(|text| Entry {
                    sha256: Sha256::of(text.as_bytes()),
                    size: 1,
                    about: About { name: (*text).to_owned(), kind: role.kind(), endpoints: None },
                })
                .collect();
            signed(trust::role(role, version, &entries, in_a_year()).unwrap(), &self.key)
        }

        fn first(&self) -> Change {
            let roles = Delegate::ALL.map(|role| (role.to_string(), self.list(role, 1, &[])));
            Change {
                root: Some(self.root.clone()),
                targets: Some(self.targets.clone()),
                roles: roles.into(),
                rollout: None,
            }
        }

        fn detect(&self, version: u64, texts: &[&str]) -> Change {
            let file = self.list(Delegate::Detect, version, texts);
            Change { roles: [("detect".to_owned(), file)].into(), ..Change::default() }
        }
    }

    #[tokio::test]
    async fn what_a_desk_signed_is_published_once_and_nothing_else_is() {
        let (store, folder) = scratch().await;
        let keys = OnlineKeys::open(&folder.path().join("trust")).unwrap();
        assert_eq!(OnlineKeys::open(&folder.path().join("trust")).unwrap().public(), keys.public());
        let desk = Desk::new(&keys);
        let publish = async |change| publish(&store, &keys, change, "root", Timestamp::now()).await;
        assert!(matches!(publish(desk.detect(1, &[])).await, Err(PublishError::NoTrust)));
        publish(desk.first()).await.unwrap();
        let generation = async || store.trust().await.unwrap().unwrap().generation;
        assert_eq!(generation().await, 1);

        publish(desk.detect(2, &[])).await.unwrap();
        let again = publish(desk.detect(2, &[])).await;
        assert!(matches!(again, Err(PublishError::Version { current: 2, found: 2, .. })), "{again:?}");
        let unknown = publish(desk.detect(3, &["nobody uploaded it"])).await;
        assert!(matches!(unknown, Err(PublishError::Missing(_))), "{unknown:?}");
        let thief = Desk::new(&keys);
        for forged in [thief.detect(3, &[]), Change { root: Some(thief.root.clone()), ..Change::default() }] {
            let refused = publish(forged).await;
            assert!(matches!(refused, Err(PublishError::Refused(_) | PublishError::Version { .. })));
        }
        assert_eq!(generation().await, 2);
    }

    #[tokio::test]
    async fn what_nears_its_end_is_made_anew_and_versions_only_rise() {
        let (store, folder) = scratch().await;
        let keys = OnlineKeys::open(&folder.path().join("trust")).unwrap();
        let desk = Desk::new(&keys);
        let now = Timestamp::now();
        publish(&store, &keys, desk.first(), "root", now).await.unwrap();
        let set = async || {
            let bundle = parse(&store.trust().await.unwrap().unwrap()).unwrap();
            Verified::restore(bundle).unwrap()
        };
        let first = set().await;
        renew(&store, &keys, now, RENEW).await.unwrap();
        assert_eq!(set().await.versions(), first.versions(), "it is fresh enough");
        let later = now + SignedDuration::from_hours(8 * 24);
        renew(&store, &keys, later, RENEW).await.unwrap();
        let second = set().await;
        assert!(second.versions().timestamp > first.versions().timestamp);
        assert!(second.fresh_until() > first.fresh_until());
        // A clock that went back.
        renew(&store, &keys, now, GOOD_FOR + GOOD_FOR).await.unwrap();
        assert!(set().await.versions().timestamp > second.versions().timestamp);
        let strangers = OnlineKeys::open(&folder.path().join("other")).unwrap();
        assert!(matches!(renew(&store, &strangers, later, GOOD_FOR).await, Err(PublishError::Refused(_))));
    }
}
