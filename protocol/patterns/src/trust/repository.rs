//! Makes metadata: on the desk root, targets and the delegated roles, at the manager snapshot and timestamp.
//!
//! **Invariant:** what is made here passes [`super::Verified::check`] once enough keys have signed it.

use std::{collections::HashMap, num::NonZeroU64};

use jiff::Timestamp as Time;
use serde::{Serialize, de::DeserializeOwned};
use tm_protocol::ids::Sha256;
use tough::{
    TargetName,
    schema::{
        DelegatedRole, Delegations, Hashes, Metafile, PathPattern, PathSet, Role, RoleKeys, Root, Signed,
        Snapshot, Target, Targets, Timestamp,
        decoded::{Decoded, Hex},
        key::Key,
    },
};

use super::{
    keys::{self, SigningKey},
    roles::{ABOUT, About, Delegate, TopRole, target_digest, target_name},
    verify::{self, TrustError},
};

const SPEC: &str = "1.0.0";

/// Whose signatures a role needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holders {
    /// The public keys, in hex.
    pub keys: Vec<String>,
    /// How many of them must sign, 1 to their number.
    pub threshold: u64,
}

impl Holders {
    /// One key, alone.
    pub fn one(key: String) -> Self {
        Self { keys: vec![key], threshold: 1 }
    }
}

/// A pattern that a role lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Which.
    pub sha256: Sha256,
    /// Its length, in bytes.
    pub size: u64,
    /// What is said of it.
    pub about: About,
}

/// A root. `version` counts from 1.
///
/// # Errors
/// If a role has no keys, a key is none, or more signatures are asked for than there are keys.
pub fn root(version: u64, roles: &[(TopRole, Holders)], expires: Time) -> Result<Root, TrustError> {
    let mut root = Root {
        spec_version: SPEC.to_owned(),
        consistent_snapshot: false,
        version: number(version)?,
        expires,
        keys: HashMap::new(),
        roles: HashMap::new(),
        _extra: HashMap::new(),
    };
    for (role, holders) in roles {
        let (keyids, threshold) = take(role.word(), holders, &mut root.keys)?;
        root.roles.insert(role.kind(), RoleKeys { keyids, threshold, _extra: HashMap::new() });
    }
    Ok(root)
}

/// A `targets`, which names the keys of every delegated role.
///
/// # Errors
/// As [`root`].
pub fn targets(version: u64, roles: &[(Delegate, Holders)], expires: Time) -> Result<Targets, TrustError> {
    let mut targets = Targets::new(SPEC.to_owned(), number(version)?, expires);
    let mut delegations = Delegations::new();
    for (role, holders) in roles {
        let (keyids, threshold) = take(role.word(), holders, &mut delegations.keys)?;
        let path = PathPattern::new(format!("{role}/*")).map_err(|_| malformed(role.word()))?;
        delegations.roles.push(DelegatedRole {
            name: role.to_string(),
            keyids,
            threshold,
            paths: PathSet::Paths(vec![path]),
            terminating: true,
            targets: None,
        });
    }
    targets.delegations = Some(delegations);
    Ok(targets)
}

/// The file of a delegated role.
///
/// # Errors
/// If the role may not sign one of the entries.
pub fn role(role: Delegate, version: u64, entries: &[Entry], expires: Time) -> Result<Targets, TrustError> {
    let mut targets = Targets::new(SPEC.to_owned(), number(version)?, expires);
    // It hands nothing on.
    targets.delegations = None;
    for Entry { sha256, size, about } in entries {
        if !role.may_sign(about.kind) {
            return Err(TrustError::WrongRole(role.to_string()));
        }
        let name = TargetName::new(target_name(role, *sha256)).map_err(|_| malformed(role.word()))?;
        let about = serde_json::to_value(about).map_err(|_| malformed(role.word()))?;
        let target = Target {
            length: *size,
            hashes: hashes(sha256.as_bytes()),
            custom: HashMap::from([(ABOUT.to_owned(), about)]),
            _extra: HashMap::new(),
        };
        targets.targets.insert(name, target);
    }
    Ok(targets)
}

/// What a role lists, by name and digest.
///
/// # Errors
/// If it is not a file of that role.
pub fn entries(role: Delegate, file: &Targets) -> Result<Vec<Entry>, TrustError> {
    let mut entries = Vec::new();
    for (name, target) in &file.targets {
        let sha256 =
            target_digest(role, name.raw()).ok_or_else(|| TrustError::WrongRole(role.to_string()))?;
        entries.push(Entry { sha256, size: target.length, about: verify::about(role, target)? });
    }
    entries.sort_by(|a, b| (&a.about.name, a.sha256).cmp(&(&b.about.name, b.sha256)));
    Ok(entries)
}

/// Who signs for a role, as a root says.
pub fn holders(root: &Root, role: TopRole) -> Option<Holders> {
    let keys = root.roles.get(&role.kind())?;
    gather(&keys.keyids, keys.threshold, &root.keys)
}

/// Who signs for a delegated role, as `targets` says.
pub fn role_holders(targets: &Targets, role: Delegate) -> Option<Holders> {
    let delegations = targets.delegations.as_ref()?;
    let named = delegations.roles.iter().find(|named| named.name == role.word())?;
    gather(&named.keyids, named.threshold, &delegations.keys)
}

/// A file that nobody has signed yet.
pub fn unsigned<T>(signed: T) -> Signed<T> {
    Signed { signed, signatures: Vec::new() }
}

/// Signs a file, in the place of an older signature of the same key.
///
/// # Errors
/// If the file has no canonical form.
pub fn sign<T: Role>(file: &mut Signed<T>, key: &SigningKey) -> Result<(), TrustError> {
    let message = file.signed.canonical_form().map_err(|_| malformed("a file"))?;
    file.signatures.retain(|signature| signature.keyid != *key.key_id());
    file.signatures.push(key.sign(&message));
    Ok(())
}

/// The ids of the keys that signed a file, good or not, in hex.
pub fn signers<T>(file: &Signed<T>) -> Vec<String> {
    file.signatures.iter().map(|signature| hex::encode(&*signature.keyid)).collect()
}

/// The text of a file. It is kept as it is: digests are of texts.
pub fn text<T: Serialize>(file: &Signed<T>) -> String {
    serde_json::to_string(file).expect("metadata are JSON")
}

/// Reads the text of a file, without judging it.
///
/// # Errors
/// If it is none.
pub fn parse<T: Role + DeserializeOwned>(what: &str, text: &str) -> Result<Signed<T>, TrustError> {
    verify::read(what, text)
}

/// Snapshot and timestamp of a set, signed: the manager's part. `version` is that of both.
///
/// # Errors
/// If a text is no file of its role.
pub fn online(
    bundle: &mut verify::Bundle,
    version: u64,
    expires: Time,
    (snapshot_key, timestamp_key): (&SigningKey, &SigningKey),
) -> Result<(), TrustError> {
    let mut snapshot = unsigned(Snapshot::new(SPEC.to_owned(), number(version)?, expires));
    let files = bundle.roles.iter().map(|(role, text)| (role.as_str(), text));
    for (role, text) in files.chain([("targets", &bundle.targets)]) {
        let file: Signed<Targets> = parse(role, text)?;
        snapshot.signed.meta.insert(format!("{role}.json"), metafile(file.signed.version, text));
    }
    sign(&mut snapshot, snapshot_key)?;
    bundle.snapshot = text(&snapshot);
    let mut timestamp = unsigned(Timestamp::new(SPEC.to_owned(), number(version)?, expires));
    let named = metafile(snapshot.signed.version, &bundle.snapshot);
    timestamp.signed.meta.insert("snapshot.json".to_owned(), named);
    sign(&mut timestamp, timestamp_key)?;
    bundle.timestamp = text(&timestamp);
    Ok(())
}

fn metafile(version: NonZeroU64, text: &str) -> Metafile {
    Metafile {
        length: u64::try_from(text.len()).ok(),
        hashes: Some(hashes(Sha256::of(text.as_bytes()).as_bytes())),
        version,
        _extra: HashMap::new(),
    }
}

fn hashes(sha256: &[u8; 32]) -> Hashes {
    Hashes { sha256: sha256.to_vec().into(), _extra: HashMap::new() }
}

fn number(version: u64) -> Result<NonZeroU64, TrustError> {
    NonZeroU64::new(version).ok_or_else(|| malformed("version 0"))
}

fn malformed(what: &str) -> TrustError {
    TrustError::Malformed(format!("{what} cannot be written"))
}

type Ids = (Vec<Decoded<Hex>>, NonZeroU64);

fn take(role: &str, holders: &Holders, known: &mut HashMap<Decoded<Hex>, Key>) -> Result<Ids, TrustError> {
    let wrong = |what: &str| TrustError::Malformed(format!("{role}: {what}"));
    let mut ids = Vec::new();
    for text in &holders.keys {
        let key = keys::public(text).ok_or_else(|| wrong("a key that is none"))?;
        let id = key.key_id().map_err(|_| wrong("a key that is none"))?;
        if ids.contains(&id) {
            return Err(wrong("a key is named twice"));
        }
        known.insert(id.clone(), key);
        ids.push(id);
    }
    let count = u64::try_from(ids.len()).unwrap_or(u64::MAX);
    match NonZeroU64::new(holders.threshold) {
        Some(threshold) if threshold.get() <= count => Ok((ids, threshold)),
        Some(_) | None => Err(wrong("the threshold is from 1 to the number of keys")),
    }
}

fn gather(
    ids: &[Decoded<Hex>],
    threshold: NonZeroU64,
    known: &HashMap<Decoded<Hex>, Key>,
) -> Option<Holders> {
    let public = |id| match known.get(id)? {
        Key::Ed25519 { keyval, .. } => Some(hex::encode(&*keyval.public)),
        Key::Rsa { .. } | Key::Ecdsa { .. } | Key::EcdsaOld { .. } => None,
    };
    let keys = ids.iter().map(public).collect::<Option<Vec<_>>>()?;
    Some(Holders { keys, threshold: threshold.get() })
}
