//! How an identity is written into a certificate: exactly one URI in the subject alternative name.
//!
//! `tm://<fleet>/endpoint/<endpoint id>` for an agent, `tm://<fleet>/manager/<manager id>` for a manager.
//! Both sides check the fleet and the role; nothing else in a certificate says who somebody is.

use std::{fmt, str::FromStr};

use crate::ids::{EndpointId, FleetId, ManagerId, Sha256};

/// Who a certificate speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The certificate authority that vouches for it.
    pub fleet: FleetId,
    /// What it is within the fleet.
    pub role: Role,
}

/// What a certificate's owner may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// An agent, on this endpoint.
    Endpoint(EndpointId),
    /// A manager.
    Manager(ManagerId),
}

/// How a client says in its first message which authority it believes: a distinguished name (DER) whose only
/// attribute, the common name, is the SHA-256 of the authority's certificate in hex. Managers that answer for several
/// authorities show the certificate that the client can judge.
pub fn authority_hint(authority: &Sha256) -> Vec<u8> {
    // SEQUENCE { SET { SEQUENCE { OID 2.5.4.3, UTF8String (64 bytes) } } }
    let mut name = vec![0x30, 0x4b, 0x31, 0x49, 0x30, 0x47, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x40];
    name.extend_from_slice(authority.to_string().as_bytes());
    name
}

/// A URI that is not an identity of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an identity of this system (`tm://<fleet>/endpoint|manager/<id>` is expected)")]
pub struct InvalidIdentity;

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Endpoint(id) => write!(f, "tm://{}/endpoint/{id}", self.fleet),
            Role::Manager(id) => write!(f, "tm://{}/manager/{id}", self.fleet),
        }
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        let rest = uri.strip_prefix("tm://").ok_or(InvalidIdentity)?;
        let mut parts = rest.split('/');
        let (Some(fleet), Some(role), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidIdentity);
        };
        let role = match role {
            "endpoint" => Role::Endpoint(id.parse().map_err(|_| InvalidIdentity)?),
            "manager" => Role::Manager(id.parse().map_err(|_| InvalidIdentity)?),
            _ => return Err(InvalidIdentity),
        };
        let identity = Self { fleet: fleet.parse().map_err(|_| InvalidIdentity)?, role };
        // One identity has one spelling: upper-case hex would be a second one.
        if identity.to_string() == uri { Ok(identity) } else { Err(InvalidIdentity) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLEET: &str = "018f3c1e-6b5a-7000-8000-0123456789ab";
    const ID: &str = "018f3c1e-6b5a-7000-8000-0123456789ac";

    #[test]
    fn identities_have_one_spelling() {
        for role in ["endpoint", "manager"] {
            let uri = format!("tm://{FLEET}/{role}/{ID}");
            assert_eq!(uri.parse::<Identity>().unwrap().to_string(), uri);
        }
        for bad in [
            String::new(),
            format!("tm://{FLEET}/admin/{ID}"),
            format!("tm://{FLEET}/endpoint/{ID}/x"),
            format!("tm://{FLEET}/endpoint/"),
            format!("TM://{FLEET}/endpoint/{ID}"),
            format!("tm://{}/endpoint/{ID}", FLEET.to_uppercase()),
        ] {
            assert_eq!(bad.parse::<Identity>(), Err(InvalidIdentity), "{bad}");
        }
    }
}
