//! Groups of endpoints. An endpoint is in exactly one.

use serde::{Deserialize, Serialize};

/// `POST /v1/groups`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateGroup {
    /// Its name: 1 to 64 letters, digits, `.`, `-`, `_`.
    pub name: String,
}

/// One group: the answer to [`CreateGroup`], or a row of `GET /v1/groups` (by name).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// How many endpoints are in it.
    pub endpoints: u64,
    /// Who made it; absent if nobody had to.
    pub created_by: Option<String>,
    /// When.
    pub created_at: Option<String>,
}
