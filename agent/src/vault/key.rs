//! The vault's key: 32 random bytes that never leave the endpoint.
//!
//! On disk (`vault/key`, mode 0600): the magic `TMVKEY1\n`, the key, and their CRC-32 (IEEE, little-endian).
//!
//! **Invariant:** a new key is made only where no item exists that an older one could be needed for.

use std::{fs, io, path::Path};

use hkdf::Hkdf;
use rustix::fs::OFlags;
use sha2::Sha256;
use tm_protocol::ids::VaultId;
use zeroize::Zeroizing;

use super::{bytes, error::VaultError};
use crate::paths::replace;

const MAGIC: &[u8; 8] = b"TMVKEY1\n";
const LEN: usize = 8 + 32 + 4;

/// The key of one vault.
pub(super) struct VaultKey {
    secret: Hkdf<Sha256>,
}

impl VaultKey {
    /// Reads the key, or makes one if `may_make`.
    ///
    /// # Errors
    /// If it is missing or damaged and must not be made anew, or the system refuses.
    pub(super) fn load(path: &Path, may_make: bool) -> Result<Self, VaultError> {
        let on = bytes(path);
        let io = |doing, source| VaultError::Io { doing, on: on.clone(), source };
        match read(path) {
            Ok(text) => match parse(&text) {
                Some(secret) => Ok(Self::new(&secret)),
                None if may_make => Self::make(path),
                None => Err(VaultError::Key("damaged")),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if may_make {
                    Self::make(path)
                } else {
                    Err(VaultError::Key("missing"))
                }
            }
            Err(error) => Err(io("read", error)),
        }
    }

    fn make(path: &Path) -> Result<Self, VaultError> {
        let secret: Zeroizing<[u8; 32]> = Zeroizing::new(rand::random());
        let mut text = Zeroizing::new(Vec::with_capacity(LEN));
        text.extend_from_slice(MAGIC);
        text.extend_from_slice(secret.as_ref());
        let crc = crc32fast::hash(&text);
        text.extend_from_slice(&crc.to_le_bytes());
        replace(path, &text).map_err(|source| {
            // Half a key under the other name is of no use to anybody.
            let _ = fs::remove_file(path.with_extension("new"));
            VaultError::Io { doing: "write", on: bytes(path), source }
        })?;
        Ok(Self::new(&secret))
    }

    fn new(secret: &[u8; 32]) -> Self {
        Self { secret: Hkdf::new(None, secret) }
    }

    /// Names the key without giving anything of it away, to tell another vault's item from a damaged one.
    pub(super) fn name(&self) -> [u8; 8] {
        let mut name = [0; 8];
        self.expand(b"tm-vault key name", &mut name);
        name
    }

    /// The key of one item (HKDF-SHA256, RFC 5869).
    pub(super) fn of_item(&self, id: VaultId) -> Zeroizing<[u8; 32]> {
        let mut key = Zeroizing::new([0; 32]);
        let info = [&b"tm-vault item"[..], id.uuid().as_bytes()].concat();
        self.expand(&info, key.as_mut());
        key
    }

    fn expand(&self, info: &[u8], out: &mut [u8]) {
        self.secret.expand(info, out).expect("far below 255 times the digest's length");
    }
}

fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    use std::{io::Read as _, os::unix::fs::OpenOptionsExt as _};
    let nofollow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let file = fs::OpenOptions::new().read(true).custom_flags(nofollow).open(path)?;
    let mut text = Zeroizing::new(Vec::with_capacity(LEN + 1));
    file.take(u64::try_from(LEN).unwrap_or(0) + 1).read_to_end(&mut text)?;
    Ok(text)
}

fn parse(text: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
    let (checked, crc) = text.split_at_checked(LEN - 4)?;
    if crc != crc32fast::hash(checked).to_le_bytes() {
        return None;
    }
    let secret = checked.strip_prefix(MAGIC)?;
    Some(Zeroizing::new(secret.try_into().ok()?))
}

impl std::fmt::Debug for VaultKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VaultKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_a_damaged_one_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        assert!(matches!(VaultKey::load(&path, false), Err(VaultError::Key("missing"))));
        let id = VaultId::new(uuid::Uuid::now_v7());
        let first = VaultKey::load(&path, true).unwrap();
        let again = VaultKey::load(&path, true).unwrap();
        assert_eq!((first.name(), first.of_item(id)), (again.name(), again.of_item(id)));
        let good = fs::read(&path).unwrap();
        assert_eq!(good.len(), LEN);
        for at in 0..LEN {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(VaultKey::load(&path, false), Err(VaultError::Key("damaged"))), "{at}");
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        assert!(VaultKey::load(&path, false).is_err());
        let other = VaultKey::load(&folder.path().join("other"), true).unwrap();
        assert_ne!(other.name(), first.name());
    }
}
