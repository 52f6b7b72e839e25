//! How every refusal looks: a code that programs compare, a sentence for people.

use serde::{Deserialize, Serialize};

/// The body of every answer with a status of 400 or more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorView {
    /// What went wrong.
    pub code: Code,
    /// What was tried, on what, and why it did not work; lower case, no full stop.
    pub message: String,
    /// What to do next, where there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// For `target-ambiguous` and `target-unknown`: the machines that may have been meant.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// For `pattern-refused`: where in the text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<crate::pattern::Problem>,
}

/// A machine that may have been meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its id.
    pub id: String,
    /// Its host name.
    pub host: String,
    /// Its addresses.
    pub addresses: Vec<String>,
}

/// What can go wrong. New codes may come; a client that does not know one sees `other`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// No token, or one that is not known or has been revoked.
    NotAuthenticated,
    /// The account's role does not allow it.
    NotAllowed,
    /// No such thing.
    NotFound,
    /// The request itself makes no sense.
    Invalid,
    /// The request is too large.
    TooLarge,
    /// Something with that name is already there.
    AlreadyExists,
    /// It would leave the manager without an administrator, or the like.
    Conflict,
    /// A target matches no endpoint.
    TargetUnknown,
    /// A target matches several endpoints where one was meant.
    TargetAmbiguous,
    /// A mitigation task was ordered for an endpoint that is not connected.
    NotConnected,
    /// The pattern does not compile or is not allowed.
    PatternRefused,
    /// Too many requests; try again later.
    TooMany,
    /// The store or another part is out of reach for the moment.
    Unavailable,
    /// A fault of the manager; its log says more.
    Internal,
    /// A code this client does not know.
    #[serde(other)]
    Other,
}
