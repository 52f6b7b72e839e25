//! Signing keys and how they lie in files.
//!
//! A file is JSON: `format` (`tm-trust-key-1`), `public` (hex), and either `secret` (PKCS #8, hex) or `sealed`: the
//! same under AES-256-GCM with a key that PBKDF2-HMAC-SHA-512 makes from a passphrase.
//!
//! **Invariant:** a secret is never shown, and is wiped from memory when it is let go.

use std::fmt;

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    pbkdf2::{self, PBKDF2_HMAC_SHA512},
    rand,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use serde::{Deserialize, Serialize};
use tough::schema::{
    Signature,
    decoded::{Decoded, Hex},
    key::Key,
};
use zeroize::Zeroizing;

const FORMAT: &str = "tm-trust-key-1";
/// What a guess at a passphrase costs.
const ROUNDS: u32 = 210_000;
/// More than a file may ask for: a forged one must not hold a desk up.
const MAX_ROUNDS: u32 = 10_000_000;

/// Why there is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No randomness, or a failure of the library.
    #[error("a key cannot be made on this machine")]
    Make,
    /// Not a key file, or a damaged one.
    #[error("this is not a key of a trust folder, or it is damaged")]
    Damaged,
    /// It is sealed and no passphrase was given.
    #[error("the key is sealed with a passphrase")]
    Sealed,
    /// It is sealed with another passphrase.
    #[error("the passphrase is not the one that the key is sealed with")]
    Passphrase,
}

/// An Ed25519 key that signs metadata.
pub struct SigningKey {
    pkcs8: Zeroizing<Vec<u8>>,
    pair: Ed25519KeyPair,
    id: Decoded<Hex>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: String,
    public: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<Zeroizing<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed: Option<Sealed>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    rounds: u32,
    salt: String,
    nonce: String,
    secret: String,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Makes one.
    ///
    /// # Errors
    /// If the machine has no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        let pair = Ed25519KeyPair::generate().map_err(|_| KeyError::Make)?;
        let pkcs8 = pair.to_pkcs8().map_err(|_| KeyError::Make)?;
        Self::from_pkcs8(Zeroizing::new(pkcs8.as_ref().to_vec())).ok_or(KeyError::Make)
    }

    fn from_pkcs8(pkcs8: Zeroizing<Vec<u8>>) -> Option<Self> {
        let pair = Ed25519KeyPair::from_pkcs8(&pkcs8).ok()?;
        let id = public(&hex::encode(pair.public_key()))?.key_id().ok()?;
        Some(Self { pkcs8, pair, id })
    }

    /// The public half, in hex.
    pub fn public(&self) -> String {
        hex::encode(self.pair.public_key())
    }

    /// What metadata call it, in hex.
    pub fn id(&self) -> String {
        hex::encode(&*self.id)
    }

    /// The text of its file, sealed if there is a passphrase.
    ///
    /// # Errors
    /// If the machine has no randomness.
    pub fn to_text(&self, passphrase: Option<&[u8]>) -> Result<Zeroizing<String>, KeyError> {
        let mut file = File { format: FORMAT.to_owned(), public: self.public(), secret: None, sealed: None };
        match passphrase {
            None => file.secret = Some(Zeroizing::new(hex::encode(&*self.pkcs8))),
            Some(passphrase) => file.sealed = Some(self.seal(passphrase)?),
        }
        serde_json::to_string_pretty(&file).map(Zeroizing::new).map_err(|_| KeyError::Make)
    }

    fn seal(&self, passphrase: &[u8]) -> Result<Sealed, KeyError> {
        let (mut salt, mut nonce) = ([0; 16], [0; NONCE_LEN]);
        rand::fill(&mut salt).and_then(|()| rand::fill(&mut nonce)).map_err(|_| KeyError::Make)?;
        let mut secret = self.pkcs8.to_vec();
        derive(passphrase, &salt, ROUNDS)?
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(self.public().as_bytes()),
                &mut secret,
            )
            .map_err(|_| KeyError::Make)?;
        Ok(Sealed {
            rounds: ROUNDS,
            salt: hex::encode(salt),
            nonce: hex::encode(nonce),
            secret: hex::encode(secret),
        })
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// If it is damaged, or sealed with another passphrase than the one given.
    pub fn from_text(text: &str, passphrase: Option<&[u8]>) -> Result<Self, KeyError> {
        let file: File = serde_json::from_str(text).map_err(|_| KeyError::Damaged)?;
        let pkcs8 = match (&file.secret, &file.sealed, passphrase) {
            (Some(secret), None, _) => Zeroizing::new(hex::decode(&**secret).map_err(|_| KeyError::Damaged)?),
            (None, Some(sealed), Some(passphrase)) => open(sealed, &file.public, passphrase)?,
            (None, Some(_), None) => return Err(KeyError::Sealed),
            (None | Some(_), _, _) => return Err(KeyError::Damaged),
        };
        let key = Self::from_pkcs8(pkcs8).ok_or(KeyError::Damaged)?;
        let is_right = file.format == FORMAT && key.public() == file.public;
        if is_right { Ok(key) } else { Err(KeyError::Damaged) }
    }

    pub(super) fn key_id(&self) -> &Decoded<Hex> {
        &self.id
    }

    pub(super) fn sign(&self, message: &[u8]) -> Signature {
        let sig = self.pair.sign(message).as_ref().to_vec();
        Signature { keyid: self.id.clone(), sig: sig.into() }
    }
}

/// The key that `text` (hex) is the public half of; `None` if it is none.
pub(super) fn public(text: &str) -> Option<Key> {
    let is_ed25519 = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    is_ed25519.then(|| text.parse().ok()).flatten()
}

fn open(sealed: &Sealed, public: &str, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let bytes = |text: &str| hex::decode(text).map_err(|_| KeyError::Damaged);
    let nonce = <[u8; NONCE_LEN]>::try_from(bytes(&sealed.nonce)?).map_err(|_| KeyError::Damaged)?;
    let mut secret = Zeroizing::new(bytes(&sealed.secret)?);
    if sealed.rounds > MAX_ROUNDS {
        return Err(KeyError::Damaged);
    }
    let opened = derive(passphrase, &bytes(&sealed.salt)?, sealed.rounds)?
        .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(public.as_bytes()), &mut secret)
        .map_err(|_| KeyError::Passphrase)?
        .len();
    secret.truncate(opened);
    Ok(secret)
}

fn derive(passphrase: &[u8], salt: &[u8], rounds: u32) -> Result<LessSafeKey, KeyError> {
    let rounds = std::num::NonZeroU32::new(rounds).ok_or(KeyError::Damaged)?;
    let mut key = Zeroizing::new([0; 32]);
    pbkdf2::derive(PBKDF2_HMAC_SHA512, rounds, salt, passphrase, &mut *key);
    UnboundKey::new(&AES_256_GCM, &*key).map(LessSafeKey::new).map_err(|_| KeyError::Make)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_from_its_file_and_only_with_its_passphrase() {
        let key = SigningKey::generate().unwrap();
        let open = key.to_text(None).unwrap();
        assert_eq!(SigningKey::from_text(&open, None).unwrap().id(), key.id());
        let sealed = key.to_text(Some(b"correct horse")).unwrap();
        assert!(!sealed.contains(&hex::encode(&*key.pkcs8)));
        let read = |passphrase| SigningKey::from_text(&sealed, passphrase).map(|key| key.id());
        assert_eq!(read(Some(b"correct horse")), Ok(key.id()));
        assert_eq!(read(Some(b"wrong")), Err(KeyError::Passphrase));
        assert_eq!(read(None), Err(KeyError::Sealed));
        assert!(!format!("{key:?}").contains(&hex::encode(&*key.pkcs8)));
    }

    #[test]
    fn what_is_no_key_file_is_refused() {
        let key = SigningKey::generate().unwrap();
        let other = SigningKey::generate().unwrap();
        let good = key.to_text(None).unwrap();
        for bad in [
            String::new(),
            "{}".to_owned(),
            good.replace(FORMAT, "tm-trust-key-2"),
            good.replace(&key.public(), &other.public()),
            good.replace("secret", "secrets"),
            good[..good.len() / 2].to_owned(),
        ] {
            assert_eq!(SigningKey::from_text(&bad, None).err(), Some(KeyError::Damaged), "{bad}");
        }
        let sealed = key.to_text(Some(b"x")).unwrap().replace("210000", "4000000000");
        assert_eq!(SigningKey::from_text(&sealed, Some(b"x")).err(), Some(KeyError::Damaged));
    }
}
