//! The fleet's signed metadata. Texts of files are exact: digests and signatures are of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::rollout::StartRollout;

/// `GET /v1/trust`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrustView {
    /// What is in force; absent until a desk has made a root of trust.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<TrustFiles>,
    /// The public half (Ed25519, hex) of the key that this manager signs snapshots with.
    pub snapshot_key: String,
    /// The same for timestamps.
    pub timestamp_key: String,
}

/// Every file of the metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustFiles {
    /// Every root, oldest first.
    pub roots: Vec<String>,
    /// The manager's, made anew often.
    pub timestamp: String,
    /// The manager's.
    pub snapshot: String,
    /// A desk's.
    pub targets: String,
    /// Desks', by role.
    pub roles: BTreeMap<String, String>,
}

/// `POST /v1/trust` (roles only) and `POST /v1/trust/root` (everything): files that desks signed. Each must have a
/// higher version than the one in force, or nothing is changed (`conflict`); the answer is a [`TrustView`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishTrust {
    /// The next root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The next `targets`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<String>,
    /// The roles' next files, by role.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, String>,
    /// How what is newly listed reaches the fleet; all of it at once where it is absent. Only at `/v1/trust`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<StartRollout>,
}
