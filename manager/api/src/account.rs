//! Administrators' accounts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an account may do. `manager/src/access.rs` is the one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Everything.
    Administrator,
    /// Everything but trust (enrollment tokens, patterns' trust) and accounts.
    Operator,
    /// Looks, changes nothing.
    Viewer,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Administrator, Self::Operator, Self::Viewer];

    /// The word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Administrator => "administrator",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }

    /// Reads [`Role::word`] back.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.word() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// `POST /v1/accounts`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateAccount {
    /// 1 to 64 characters: letters, digits, `.`, `-`, `_`, `@`.
    pub name: String,
    /// What it may do.
    pub role: Role,
}

/// The answer to `POST /v1/accounts` and `POST /v1/accounts/{name}/token`: the only time the token is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewAccountToken {
    /// The account.
    pub account: AccountView,
    /// Its bearer token. A new one ends the old one.
    pub token: String,
}

/// `GET /v1/accounts`: one a row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AccountView {
    /// Its name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// When it was made.
    pub created_at: String,
    /// When its token was last used, to within a minute.
    pub last_used_at: Option<String>,
}
