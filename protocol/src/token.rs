//! The enrollment token: one string that tells a new agent where its manager is, how to know it, and the
//! secret that lets it in.
//!
//! Form: `tm1.` + base64url (no padding) of a JSON object + `.` + the first 8 hex digits of the SHA-256 of
//! all before that dot, so that a cut-off paste is told apart from a wrong token.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{address::Address, ids::Sha256};

const PREFIX: &str = "tm1.";
/// Longer texts are refused unread (64 addresses of the longest kind fit).
const MAX_LENGTH: usize = 32 * 1024;

/// What `tmctl token create` prints and `tm-agent enroll` takes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrollmentToken {
    /// Every address a manager may be reached at, in order of preference. Never empty.
    #[serde(rename = "a")]
    pub addresses: Vec<Address>,
    /// The SHA-256 of the CA certificate's DER: the only thing the agent trusts at first.
    #[serde(rename = "c")]
    pub ca: Sha256,
    /// 32 random bytes. The manager stores only their digest.
    #[serde(rename = "s", with = "secret_text")]
    pub secret: Zeroizing<[u8; 32]>,
    /// The SHA-256 of the fleet's root of trust for patterns. A desk adds it, never the manager, which could
    /// otherwise choose it; an agent without one loads no pattern.
    #[serde(rename = "r", default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Sha256>,
}

/// Why a text is not an enrollment token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// It does not begin like one.
    #[error("this is not an enrollment token (it would begin with `tm1.`)")]
    NotAToken,
    /// Its end is missing or a character has changed.
    #[error("the enrollment token is incomplete or altered (was it cut off when it was copied?)")]
    Damaged,
    /// It is whole but does not say what a token must say.
    #[error("the enrollment token was made by an incompatible version")]
    Incompatible,
}

impl fmt::Display for EnrollmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = Zeroizing::new(serde_json::to_vec(self).map_err(|_| fmt::Error)?);
        let text = Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&*body)));
        write!(f, "{}.{}", *text, check(&text))
    }
}

impl fmt::Debug for EnrollmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrollmentToken").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

impl FromStr for EnrollmentToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let text = text.trim();
        if !text.starts_with(PREFIX) || text.len() > MAX_LENGTH {
            return Err(InvalidToken::NotAToken);
        }
        let (signed, sum) = text.rsplit_once('.').ok_or(InvalidToken::Damaged)?;
        let body = signed.strip_prefix(PREFIX).ok_or(InvalidToken::Damaged)?;
        if check(signed) != sum {
            return Err(InvalidToken::Damaged);
        }
        let body = Zeroizing::new(URL_SAFE_NO_PAD.decode(body).map_err(|_| InvalidToken::Damaged)?);
        let token: Self = serde_json::from_slice(&body).map_err(|_| InvalidToken::Incompatible)?;
        if token.addresses.is_empty() { Err(InvalidToken::Incompatible) } else { Ok(token) }
    }
}

fn check(text: &str) -> String {
    Sha256::of(text.as_bytes()).to_string()[..8].to_owned()
}

mod secret_text {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use zeroize::Zeroizing;

    pub(super) fn serialize<S: Serializer>(
        secret: &Zeroizing<[u8; 32]>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(URL_SAFE_NO_PAD.encode(**secret)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Zeroizing<[u8; 32]>, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(&*text).map_err(D::Error::custom)?);
        let array = <[u8; 32]>::try_from(bytes.as_slice()).map_err(D::Error::custom)?;
        Ok(Zeroizing::new(array))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_text_and_damage_is_named() {
        let token = EnrollmentToken {
            addresses: vec!["m.example:4433".parse().unwrap(), "[2001:db8::1]:4433".parse().unwrap()],
            ca: Sha256::of(b"ca"),
            secret: Zeroizing::new([7; 32]),
            root: None,
        };
        let anchored = EnrollmentToken { root: Some(Sha256::of(b"root")), ..token.clone() };
        assert_eq!(anchored.to_string().parse::<EnrollmentToken>(), Ok(anchored));
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse::<EnrollmentToken>().as_ref(), Ok(&token));
        assert_eq!(text[..text.len() - 1].parse::<EnrollmentToken>(), Err(InvalidToken::Damaged));
        assert_eq!(text[..20].parse::<EnrollmentToken>(), Err(InvalidToken::Damaged));
        assert_eq!(text.replacen("tm1.e", "tm1.f", 1).parse::<EnrollmentToken>(), Err(InvalidToken::Damaged));
        assert_eq!("hello".parse::<EnrollmentToken>(), Err(InvalidToken::NotAToken));
        assert!(!format!("{token:?}").contains("BwcH"), "the secret never reaches a log");
    }
}
