//! Role × permission: who may do what. Pure; `http` asks it for every route.
//!
//! **Invariant:** a permission that is not named for a role is refused.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tm_api::account::Role;
use tm_protocol::ids::Sha256;

/// What a route needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permission {
    /// See who answers and who one is.
    ReadVersion,
    ReadEndpoints,
    ChangeEndpoints,
    /// Shut an agent out for ever.
    RevokeEndpoints,
    /// Make an agent that is held an endpoint of its own.
    ApproveEndpoints,
    /// Remove what is known about a revoked endpoint.
    ForgetEndpoints,
    ReadTasks,
    OrderTasks,
    CancelTasks,
    OrderCleanup,
    OrderRestore,
    ReadStatus,
    ReadCoverage,
    ReadEvents,
    ReadIncidents,
    ReadVaults,
    ReadPatterns,
    ImportPatterns,
    ChangeTrust,
    ReadTokens,
    ChangeTokens,
    ReadAccounts,
    ChangeAccounts,
    ReadAudit,
}

/// Whether `role` may do what needs `permission`.
pub(crate) const fn allows(role: Role, permission: Permission) -> bool {
    match permission {
        Permission::ReadVersion
        | Permission::ReadEndpoints
        | Permission::ReadTasks
        | Permission::ReadStatus
        | Permission::ReadCoverage
        | Permission::ReadEvents
        | Permission::ReadIncidents
        | Permission::ReadVaults
        | Permission::ReadPatterns => match role {
            Role::Administrator | Role::Operator | Role::Viewer => true,
        },
        Permission::ChangeEndpoints
        | Permission::RevokeEndpoints
        | Permission::OrderTasks
        | Permission::CancelTasks
        | Permission::OrderCleanup
        | Permission::OrderRestore
        | Permission::ImportPatterns
        | Permission::ReadTokens
        | Permission::ReadAudit => match role {
            Role::Administrator | Role::Operator => true,
            Role::Viewer => false,
        },
        Permission::ApproveEndpoints
        | Permission::ForgetEndpoints
        | Permission::ChangeTrust
        | Permission::ChangeTokens
        | Permission::ReadAccounts
        | Permission::ChangeAccounts => match role {
            Role::Administrator => true,
            Role::Operator | Role::Viewer => false,
        },
    }
}

const TOKEN_PREFIX: &str = "tma_";
/// The prefix and 32 bytes in base64.
const TOKEN_LENGTH: usize = TOKEN_PREFIX.len() + 43;

/// Writes a bearer token for an account. The store keeps only [`token_digest`] of it.
pub(crate) fn bearer_token(random: [u8; 32]) -> String {
    format!("{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(random))
}

/// What the store knows a bearer token by; `None` if the text cannot be one.
pub(crate) fn token_digest(token: &str) -> Option<Sha256> {
    (token.len() == TOKEN_LENGTH && token.starts_with(TOKEN_PREFIX)).then(|| Sha256::of(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_the_words_say() {
        // administrator, operator, viewer
        let table = [
            (Permission::ReadVersion, [true, true, true]),
            (Permission::ReadEndpoints, [true, true, true]),
            (Permission::ChangeEndpoints, [true, true, false]),
            (Permission::RevokeEndpoints, [true, true, false]),
            (Permission::ApproveEndpoints, [true, false, false]),
            (Permission::ForgetEndpoints, [true, false, false]),
            (Permission::ReadTasks, [true, true, true]),
            (Permission::OrderTasks, [true, true, false]),
            (Permission::CancelTasks, [true, true, false]),
            (Permission::OrderCleanup, [true, true, false]),
            (Permission::OrderRestore, [true, true, false]),
            (Permission::ReadStatus, [true, true, true]),
            (Permission::ReadCoverage, [true, true, true]),
            (Permission::ReadEvents, [true, true, true]),
            (Permission::ReadIncidents, [true, true, true]),
            (Permission::ReadVaults, [true, true, true]),
            (Permission::ReadPatterns, [true, true, true]),
            (Permission::ImportPatterns, [true, true, false]),
            (Permission::ChangeTrust, [true, false, false]),
            (Permission::ReadTokens, [true, true, false]),
            (Permission::ChangeTokens, [true, false, false]),
            (Permission::ReadAccounts, [true, false, false]),
            (Permission::ChangeAccounts, [true, false, false]),
            (Permission::ReadAudit, [true, true, false]),
        ];
        for (permission, allowed) in table {
            assert_eq!(Role::ALL.map(|role| allows(role, permission)), allowed, "{permission:?}");
        }
    }

    #[test]
    fn only_texts_of_the_right_shape_are_looked_up() {
        let token = bearer_token([7; 32]);
        assert_eq!(token_digest(&token), Some(Sha256::of(token.as_bytes())));
        let other = token.replace("tma_", "tmb_");
        for text in ["", "tma_", &token[1..], &format!("{token}x"), &other] {
            assert_eq!(token_digest(text), None, "{text}");
        }
    }
}
