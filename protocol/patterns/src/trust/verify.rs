//! Judges a set of metadata: whole, signed, newer, and meant for this endpoint.
//!
//! A set travels and lies on disk as the JSON of [`Bundle`], of which each member is the exact text of one file.
//!
//! **Invariant:** what a set in force has seen is never undone: no version goes back, unless the root gave the role
//! other keys.
//! **Invariant:** a digest that no role lists is never admitted.

use std::collections::BTreeMap;

use jiff::Timestamp as Time;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tm_protocol::ids::{EndpointId, Sha256};
use tough::schema::{
    Metafile, Role, RoleType, Root, Signed, Snapshot, Target, Targets, Timestamp,
    decoded::{Decoded, Hex},
};

use super::roles::{ABOUT, About, Delegate, TopRole, target_digest, target_name};

/// Longest set, in bytes.
pub const MAX_BUNDLE: usize = 16 << 20;
/// Most roots in one set.
const MAX_ROOTS: usize = 1024;

/// A whole set of metadata, each file as its exact text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// Every root, oldest first; the last is the one that counts.
    pub roots: Vec<String>,
    /// `timestamp`.
    pub timestamp: String,
    /// `snapshot`.
    pub snapshot: String,
    /// `targets`.
    pub targets: String,
    /// The delegated roles' files by name; all of [`Delegate::ALL`].
    pub roles: BTreeMap<String, String>,
}

/// Why a set, or a pattern, is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// A file is not what it should be.
    #[error("the signed metadata cannot be read: {0}")]
    Malformed(String),
    /// No root has the digest that this endpoint was given when it was enrolled.
    #[error("the manager has no root of trust with the digest that this endpoint was enrolled with")]
    Anchor,
    /// A root does not follow from the one before it.
    #[error("root version {0} is not signed by the keys of the root before it and its own")]
    Root(u64),
    /// Too few good signatures.
    #[error("`{0}` does not carry enough good signatures of its keys")]
    Signature(String),
    /// Signed with the keys of another role, or listing what its role may not sign.
    #[error("`{0}` is signed by a role that may not sign it")]
    WrongRole(String),
    /// Older than what is in force.
    #[error("`{role}` has version {found}, and version {seen} was seen already")]
    Rollback {
        /// Which file.
        role: String,
        /// What came.
        found: u64,
        /// What is in force.
        seen: u64,
    },
    /// Past its end; whoever holds back newer files shows these.
    #[error("`{what}` ended at {at}")]
    Expired {
        /// Which file.
        what: String,
        /// When.
        at: Time,
    },
    /// Files of different sets beside each other.
    #[error("`{0}` is not the one that the rest of the set names")]
    Mixed(String),
    /// Nobody signed it.
    #[error("no role of the fleet has signed pattern {0}")]
    Unsigned(Sha256),
    /// Signed, but by a role that may not sign what it is to be used for.
    #[error("pattern {sha256} is signed by role `{role}`, which does not cover what it is to be used for")]
    PatternRole {
        /// Which.
        sha256: Sha256,
        /// By whom.
        role: Delegate,
    },
    /// Signed for others.
    #[error("pattern {0} is not meant for this endpoint")]
    Endpoint(Sha256),
}

impl TrustError {
    /// What programs compare.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "trust-malformed",
            Self::Anchor => "trust-unknown-root",
            Self::Root(_) => "trust-bad-root",
            Self::Signature(_) => "trust-bad-signature",
            Self::WrongRole(_) => "trust-wrong-role",
            Self::Rollback { .. } => "trust-rollback",
            Self::Expired { .. } => "trust-expired",
            Self::Mixed(_) => "trust-mixed",
            Self::Unsigned(_) => "pattern-unsigned",
            Self::PatternRole { .. } => "pattern-wrong-role",
            Self::Endpoint(_) => "pattern-not-for-endpoint",
        }
    }
}

/// Where judging begins.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// The digest of a root's text, and nothing else known.
    Anchor(Sha256),
    /// The set in force.
    After(&'a Verified),
}

/// What a pattern is to be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To look for something.
    Look,
    /// To change an endpoint by its steps.
    Clean,
}

/// The versions of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions {
    /// Of the root.
    pub root: u64,
    /// Of the timestamp.
    pub timestamp: u64,
    /// Of the snapshot.
    pub snapshot: u64,
    /// Of `targets`.
    pub targets: u64,
    /// Of the delegated roles.
    pub roles: BTreeMap<Delegate, u64>,
}

/// A file that is past its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expired {
    /// Which.
    pub what: String,
    /// Since when.
    pub at: Time,
}

/// A set that was found good.
#[derive(Debug, Clone)]
pub struct Verified {
    root: Signed<Root>,
    timestamp: Signed<Timestamp>,
    snapshot: Signed<Snapshot>,
    targets: Signed<Targets>,
    roles: BTreeMap<Delegate, Signed<Targets>>,
    /// With one root: the one that counts.
    bundle: Bundle,
}

impl Bundle {
    /// Reads the JSON of a set.
    ///
    /// # Errors
    /// If it is none, or longer than [`MAX_BUNDLE`].
    pub fn parse(bytes: &[u8]) -> Result<Self, TrustError> {
        if bytes.len() > MAX_BUNDLE {
            return Err(TrustError::Malformed(format!("more than {MAX_BUNDLE} bytes")));
        }
        serde_json::from_slice(bytes).map_err(|error| TrustError::Malformed(error.to_string()))
    }

    /// The JSON of the set.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts are JSON")
    }
}

/// The digest that an enrollment token names a root by.
pub fn root_digest(text: &str) -> Sha256 {
    Sha256::of(text.as_bytes())
}

impl Verified {
    /// Judges a set that came in at `now`.
    ///
    /// # Errors
    /// With the first thing that is wrong; the set in force then stays.
    pub fn check(start: Start<'_>, bundle: Bundle, now: Time) -> Result<Self, TrustError> {
        let (root, text) = newest_root(start, &bundle.roots)?;
        let set = Self::whole(root, Bundle { roots: vec![text], ..bundle })?;
        if let Start::After(before) = start {
            set.goes_on_from(before)?;
        }
        match set.expired(now) {
            Some(Expired { what, at }) => Err(TrustError::Expired { what, at }),
            None => Ok(set),
        }
    }

    /// Takes up a set that was found good before and kept where only its owner writes. It may be past its end.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn restore(bundle: Bundle) -> Result<Self, TrustError> {
        let [text] = bundle.roots.as_slice() else {
            return Err(TrustError::Malformed("not one root".to_owned()));
        };
        let root: Signed<Root> = read("root", text)?;
        root.signed.verify_role(&root).map_err(|_| TrustError::Root(root.signed.version.get()))?;
        Self::whole(root, bundle)
    }

    fn whole(root: Signed<Root>, bundle: Bundle) -> Result<Self, TrustError> {
        let timestamp: Signed<Timestamp> = top(&root.signed, TopRole::Timestamp, &bundle.timestamp)?;
        let snapshot: Signed<Snapshot> = top(&root.signed, TopRole::Snapshot, &bundle.snapshot)?;
        let targets: Signed<Targets> = top(&root.signed, TopRole::Targets, &bundle.targets)?;
        if !targets.signed.targets.is_empty() {
            return Err(TrustError::WrongRole("targets".to_owned()));
        }
        let mut roles = BTreeMap::new();
        for role in Delegate::ALL {
            let text = bundle.roles.get(role.word()).ok_or_else(|| TrustError::Mixed(role.to_string()))?;
            let file = delegated(&root.signed, &targets.signed, role, text)?;
            fits_role(role, &file.signed)?;
            roles.insert(role, file);
        }
        if bundle.roles.len() != roles.len() {
            return Err(TrustError::Malformed("roles that nobody knows".to_owned()));
        }
        names(&timestamp.signed.meta, "snapshot", snapshot.signed.version.get(), &bundle.snapshot)?;
        if timestamp.signed.meta.len() != 1 || snapshot.signed.meta.len() != 1 + roles.len() {
            return Err(TrustError::Mixed("snapshot".to_owned()));
        }
        names(&snapshot.signed.meta, "targets", targets.signed.version.get(), &bundle.targets)?;
        for (role, file) in &roles {
            let text = bundle.roles.get(role.word()).map_or("", String::as_str);
            names(&snapshot.signed.meta, role.word(), file.signed.version.get(), text)?;
        }
        Ok(Self { root, timestamp, snapshot, targets, roles, bundle })
    }

    /// Nothing goes back behind `before`, and what kept its version kept its text.
    fn goes_on_from(&self, before: &Self) -> Result<(), TrustError> {
        let step = |role: &str, found: u64, seen: u64, is_same: bool| {
            if found < seen {
                Err(TrustError::Rollback { role: role.to_owned(), found, seen })
            } else if found == seen && !is_same {
                Err(TrustError::Mixed(role.to_owned()))
            } else {
                Ok(())
            }
        };
        let (new, old) = (&self.bundle, &before.bundle);
        // Lists that desks sign first: a manager that was restored and one that holds back are told apart by them.
        let (found, seen) = (self.targets.signed.version.get(), before.targets.signed.version.get());
        step("targets", found, seen, new.targets == old.targets)?;
        for (role, file) in &self.roles {
            let seen = before.roles.get(role).map_or(0, |file| file.signed.version.get());
            let is_same = new.roles.get(role.word()) == old.roles.get(role.word());
            step(role.word(), file.signed.version.get(), seen, is_same)?;
        }
        // A thief may have driven these up to the highest number; other keys begin anew.
        let same_keys = |kind| keys_of(&self.root.signed, kind) == keys_of(&before.root.signed, kind);
        if same_keys(RoleType::Snapshot) {
            let (found, seen) = (self.snapshot.signed.version.get(), before.snapshot.signed.version.get());
            step("snapshot", found, seen, new.snapshot == old.snapshot)?;
        }
        if same_keys(RoleType::Timestamp) {
            let (found, seen) = (self.timestamp.signed.version.get(), before.timestamp.signed.version.get());
            step("timestamp", found, seen, new.timestamp == old.timestamp)?;
        }
        Ok(())
    }

    /// What is past its end at `now`; the most telling one if several are.
    pub fn expired(&self, now: Time) -> Option<Expired> {
        let ends = [
            ("root".to_owned(), self.root.signed.expires),
            ("targets".to_owned(), self.targets.signed.expires),
            ("snapshot".to_owned(), self.snapshot.signed.expires),
            ("timestamp".to_owned(), self.timestamp.signed.expires),
        ];
        let roles = self.roles.iter().map(|(role, file)| (role.to_string(), file.signed.expires));
        let past = ends.into_iter().chain(roles).find(|(_, at)| *at <= now);
        past.map(|(what, at)| Expired { what, at })
    }

    /// Says what the fleet signed of the pattern with this digest, if `endpoint` may use it so.
    ///
    /// # Errors
    /// If nobody signed it, for something else, or for others.
    pub fn admit(&self, sha256: Sha256, to: Use, endpoint: EndpointId) -> Result<(About, u64), TrustError> {
        let may = |role| match to {
            Use::Look => matches!(role, Delegate::Detect),
            Use::Clean => matches!(role, Delegate::Cleanup | Delegate::Expert),
        };
        let mut refusal = TrustError::Unsigned(sha256);
        for (role, file) in &self.roles {
            let name = target_name(*role, sha256);
            let target = file.signed.targets.iter().find(|(known, _)| known.raw() == name);
            let Some((_, target)) = target else { continue };
            let about = about(*role, target)?;
            if !may(*role) {
                refusal = TrustError::PatternRole { sha256, role: *role };
            } else if about.endpoints.as_ref().is_some_and(|named| !named.contains(&endpoint)) {
                refusal = TrustError::Endpoint(sha256);
            } else {
                return Ok((about, target.length));
            }
        }
        Err(refusal)
    }

    /// Whether some role lists the pattern.
    pub fn lists(&self, sha256: Sha256) -> bool {
        self.roles.iter().any(|(role, file)| {
            let name = target_name(*role, sha256);
            file.signed.targets.keys().any(|known| known.raw() == name)
        })
    }

    /// The set, with the one root that counts.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Its root.
    pub fn root(&self) -> &Signed<Root> {
        &self.root
    }

    /// Its `targets`.
    pub fn targets(&self) -> &Signed<Targets> {
        &self.targets
    }

    /// The file of a role.
    pub fn role(&self, role: Delegate) -> &Signed<Targets> {
        self.roles.get(&role).expect("a set has all roles")
    }

    /// When the timestamp, or the snapshot if that is sooner, ends.
    pub fn fresh_until(&self) -> Time {
        self.timestamp.signed.expires.min(self.snapshot.signed.expires)
    }

    /// Its versions.
    pub fn versions(&self) -> Versions {
        Versions {
            root: self.root.signed.version.get(),
            timestamp: self.timestamp.signed.version.get(),
            snapshot: self.snapshot.signed.version.get(),
            targets: self.targets.signed.version.get(),
            roles: self.roles.iter().map(|(role, file)| (*role, file.signed.version.get())).collect(),
        }
    }
}

/// The newest root that follows from where judging begins, and its text.
fn newest_root(start: Start<'_>, texts: &[String]) -> Result<(Signed<Root>, String), TrustError> {
    if texts.len() > MAX_ROOTS {
        return Err(TrustError::Malformed("too many roots".to_owned()));
    }
    let (mut root, mut text) = match start {
        Start::Anchor(digest) => {
            let text = texts.iter().find(|text| root_digest(text) == digest).ok_or(TrustError::Anchor)?;
            let root: Signed<Root> = read("root", text)?;
            root.signed.verify_role(&root).map_err(|_| TrustError::Root(root.signed.version.get()))?;
            (root, text.clone())
        }
        Start::After(before) => {
            (before.root.clone(), before.bundle.roots.first().cloned().unwrap_or_default())
        }
    };
    let mut last = 0;
    for next in texts {
        let candidate: Signed<Root> = read("root", next)?;
        last = candidate.signed.version.get();
        // Older ones are history, and not believed again.
        if last <= root.signed.version.get() {
            continue;
        }
        let follows = last == root.signed.version.get() + 1
            && root.signed.verify_role(&candidate).is_ok()
            && candidate.signed.verify_role(&candidate).is_ok();
        if !follows {
            return Err(TrustError::Root(last));
        }
        (root, text) = (candidate, next.clone());
    }
    let seen = root.signed.version.get();
    if last < seen {
        return Err(TrustError::Rollback { role: "root".to_owned(), found: last, seen });
    }
    Ok((root, text))
}

/// Reads a file. Which kind it says it is, is looked at here: `tough` writes that anew before it checks signatures.
pub(super) fn read<T: Role + DeserializeOwned>(role: &str, text: &str) -> Result<Signed<T>, TrustError> {
    let malformed = |error: serde_json::Error| TrustError::Malformed(format!("{role}: {error}"));
    let value: serde_json::Value = serde_json::from_str(text).map_err(malformed)?;
    let kind = match T::TYPE {
        RoleType::Root => "root",
        RoleType::Snapshot => "snapshot",
        RoleType::Targets | RoleType::DelegatedTargets => "targets",
        RoleType::Timestamp => "timestamp",
    };
    if value.pointer("/signed/_type").and_then(serde_json::Value::as_str) != Some(kind) {
        return Err(TrustError::Malformed(format!("{role}: not a file of the kind `{kind}`")));
    }
    Signed::<T>::deserialize(value).map_err(malformed)
}

/// Reads a file of a role that the root names the keys of.
fn top<T: Role + DeserializeOwned>(root: &Root, role: TopRole, text: &str) -> Result<Signed<T>, TrustError> {
    let file: Signed<T> = read(role.word(), text)?;
    let own = keys_of(root, role.kind());
    root.verify_role(&file).map_err(|_| unsigned(role.word(), &file, own, root, None))?;
    Ok(file)
}

/// Reads the file of a delegated role.
fn delegated(
    root: &Root,
    targets: &Targets,
    role: Delegate,
    text: &str,
) -> Result<Signed<Targets>, TrustError> {
    let file: Signed<Targets> = read(role.word(), text)?;
    let delegations =
        targets.delegations.as_ref().ok_or_else(|| TrustError::Malformed("targets: no roles".to_owned()))?;
    delegations.verify_role(&file, role.word()).map_err(|_| {
        let own = delegations.roles.iter().find(|known| known.name == role.word());
        unsigned(role.word(), &file, own.map_or(&[], |own| &own.keyids), root, Some(targets))
    })?;
    Ok(file)
}

/// Why a file's signatures do not do: those of another role, or none.
fn unsigned<T>(
    role: &str,
    file: &Signed<T>,
    own: &[Decoded<Hex>],
    root: &Root,
    targets: Option<&Targets>,
) -> TrustError {
    let delegations = targets.and_then(|targets| targets.delegations.as_ref());
    let is_known = |id| {
        root.keys.contains_key(id) || delegations.is_some_and(|delegations| delegations.keys.contains_key(id))
    };
    let mut signers = file.signatures.iter().map(|signature| &signature.keyid).peekable();
    let is_others = signers.peek().is_some() && signers.all(|id| !own.contains(id) && is_known(id));
    if is_others { TrustError::WrongRole(role.to_owned()) } else { TrustError::Signature(role.to_owned()) }
}

fn keys_of(root: &Root, role: RoleType) -> &[Decoded<Hex>] {
    root.roles.get(&role).map_or(&[], |keys| &keys.keyids)
}

/// Every target of a role's file is one that the role may sign, named by its own digest.
fn fits_role(role: Delegate, file: &Targets) -> Result<(), TrustError> {
    if file.delegations.is_some() {
        return Err(TrustError::WrongRole(role.to_string()));
    }
    for (name, target) in &file.targets {
        let digest =
            target_digest(role, name.raw()).ok_or_else(|| TrustError::WrongRole(role.to_string()))?;
        if target.hashes.sha256.as_ref() != digest.as_bytes() {
            return Err(TrustError::Malformed(format!("{role}: a target is not named by its digest")));
        }
        if !role.may_sign(about(role, target)?.kind) {
            return Err(TrustError::WrongRole(role.to_string()));
        }
    }
    Ok(())
}

pub(super) fn about(role: Delegate, target: &Target) -> Result<About, TrustError> {
    let missing = || TrustError::Malformed(format!("{role}: a target does not say what it is"));
    let value = target.custom.get(ABOUT).ok_or_else(missing)?;
    About::deserialize(value).map_err(|error| TrustError::Malformed(format!("{role}: {error}")))
}

/// Whether `meta` names exactly this text.
fn names(
    meta: &std::collections::HashMap<String, Metafile>,
    role: &str,
    version: u64,
    text: &str,
) -> Result<(), TrustError> {
    let named = meta.get(&format!("{role}.json"));
    let is_named = named.is_some_and(|named| {
        let hash = named.hashes.as_ref().map(|hashes| hashes.sha256.as_ref());
        named.version.get() == version && hash == Some(Sha256::of(text.as_bytes()).as_bytes().as_slice())
    });
    if is_named { Ok(()) } else { Err(TrustError::Mixed(role.to_owned())) }
}
