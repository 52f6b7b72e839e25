//! The roles, and what each may sign.

use std::fmt;

use serde::{Deserialize, Serialize};
use tm_protocol::ids::{EndpointId, Sha256};
use tough::schema::RoleType;

/// A role that lists patterns. Its file holds targets named `<word>/<digest>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Delegate {
    /// What to look for, for everyone or some; never how to clean.
    Detect,
    /// How the fleet's own desk cleans.
    Cleanup,
    /// How an expert cleans.
    Expert,
}

impl Delegate {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Detect, Self::Cleanup, Self::Expert];

    /// Its name in metadata, on the command line and in the store.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Detect => "detect",
            Self::Cleanup => "cleanup",
            Self::Expert => "expert",
        }
    }

    /// The one with this name.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.word() == word)
    }

    /// Whether its keys can make a pattern of this kind valid. A role that only looks never cleans, and a cure does
    /// not come in as something to look for.
    pub const fn may_sign(self, kind: Kind) -> bool {
        match (self, kind) {
            (Self::Detect, Kind::Detection) | (Self::Cleanup | Self::Expert, Kind::Custom) => true,
            (Self::Detect, Kind::Custom) | (Self::Cleanup | Self::Expert, Kind::Detection) => false,
        }
    }

    /// What it signs unless something else is said.
    pub const fn kind(self) -> Kind {
        match self {
            Self::Detect => Kind::Detection,
            Self::Cleanup | Self::Expert => Kind::Custom,
        }
    }
}

impl fmt::Display for Delegate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A role that the root names keys for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TopRole {
    /// Names all keys; on desks.
    Root,
    /// Names the keys of the delegated roles; on desks.
    Targets,
    /// Names versions and digests of all files; at the manager.
    Snapshot,
    /// Names the snapshot, often anew; at the manager.
    Timestamp,
}

impl TopRole {
    /// Its name in metadata.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Targets => "targets",
            Self::Snapshot => "snapshot",
            Self::Timestamp => "timestamp",
        }
    }

    pub(super) const fn kind(self) -> RoleType {
        match self {
            Self::Root => RoleType::Root,
            Self::Targets => RoleType::Targets,
            Self::Snapshot => RoleType::Snapshot,
            Self::Timestamp => RoleType::Timestamp,
        }
    }
}

impl fmt::Display for TopRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What a pattern is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The fleet's rules and digest lists.
    Detection,
    /// A cure, which may carry cleanup steps.
    Custom,
}

/// What a role says of a pattern beside its digest and length (`custom` of a TUF target, under `tm`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// What people call it.
    pub name: String,
    /// What it is for.
    pub kind: Kind,
    /// The endpoints that it is for; for all where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<EndpointId>>,
}

/// The key of [`About`] in a target's `custom`.
pub(super) const ABOUT: &str = "tm";

/// What metadata call a pattern.
pub(super) fn target_name(role: Delegate, sha256: Sha256) -> String {
    format!("{role}/{sha256}")
}

/// The pattern that a role's target is, if it is named as that role's targets are.
pub(super) fn target_digest(role: Delegate, name: &str) -> Option<Sha256> {
    name.strip_prefix(role.word())?.strip_prefix('/')?.parse().ok()
}
