//! Patterns.

use serde::{Deserialize, Serialize};

/// `POST /v1/patterns?name=…`; the body is the pattern's bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportQuery {
    /// What people will call it: 1 to 128 characters, no control characters, no `/`.
    pub name: String,
    /// Take it although some of its rules can hold up a scan. They are still named.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// One pattern: the answer to an import, a row of `GET /v1/patterns`, or `GET /v1/patterns/{pattern}`
/// (digest, unambiguous start of one with at least 8 digits, or name).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PatternView {
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// What people call it. The newest published under a name is the one that the name means on an
    /// endpoint, of those that reach it.
    pub name: String,
    /// `published` if a role of the fleet lists it, so that agents load it; else `draft`.
    pub state: String,
    /// Who gets it where its name is meant: `all`, `none`, or a share of all or of a group (`10% of servers`).
    #[serde(default)]
    pub reach: String,
    /// What kind it is (`detection`).
    pub kind: String,
    /// Its length, in bytes.
    pub size: u64,
    /// How many rules it holds; 0 for a digest list.
    pub rules: u32,
    /// What a digest list holds; absent for rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests: Option<Digests>,
    /// Who imported it.
    pub imported_by: String,
    /// When.
    pub imported_at: String,
    /// What the compiler remarked without refusing, or which lines of a digest list hold none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Problem>,
}

/// How many digests a list holds, each once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Of these.
    pub md5: u64,
    /// Of these.
    pub sha1: u64,
    /// Of these.
    pub sha256: u64,
}

/// A place in a pattern's text and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Line, from 1; 0 if it concerns the whole.
    pub line: u32,
    /// Column in characters, from 1; 0 if it concerns the whole line.
    pub column: u32,
    /// What is wrong.
    pub message: String,
}
