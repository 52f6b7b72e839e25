//! Enrollment tokens.

use serde::{Deserialize, Serialize};

/// `POST /v1/tokens`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// How many agents it lets in, 1 to 100,000.
    pub uses: u32,
    /// How long it is good for, in seconds, 60 to 31,536,000 (a year).
    pub expires_in_s: u64,
    /// The group its endpoints start in.
    pub group: String,
}

/// The answer to `POST /v1/tokens`: the only time the token is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewToken {
    /// Its record.
    #[serde(flatten)]
    pub view: TokenView,
    /// The string for `tm-agent enroll`.
    pub token: String,
}

/// A row of `GET /v1/tokens`. `DELETE /v1/tokens/{id}` revokes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenView {
    /// Its id (not its secret).
    pub id: String,
    /// The group its endpoints start in.
    pub group: String,
    /// How many agents it lets in, in all.
    pub uses: u32,
    /// How many it has let in.
    pub used: u32,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: String,
    /// When it ends.
    pub expires_at: String,
    /// `active`, `used-up`, `expired` or `revoked`.
    pub state: String,
}
