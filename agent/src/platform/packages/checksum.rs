//! Checksums as package databases give them, and their computation.

use std::collections::BTreeSet;

use md5::Md5;
use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// How a checksum is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Algorithm {
    /// dpkg's, and that of rpm packages from before 2009.
    Md5,
    /// rpm's.
    Sha256,
    /// rpm's, where a distribution chose it.
    Sha384,
    /// rpm's, where a distribution chose it.
    Sha512,
}

impl Algorithm {
    const fn length(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}

/// The checksum of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checksum {
    algorithm: Algorithm,
    digest: Vec<u8>,
}

impl Checksum {
    /// Reads hex digits of either case; `None` if they are not the digest of that algorithm.
    pub(crate) fn from_hex(algorithm: Algorithm, digits: &[u8]) -> Option<Self> {
        let digest = hex::decode(digits).ok()?;
        (digest.len() == algorithm.length()).then_some(Self { algorithm, digest })
    }

    /// How it is computed.
    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

/// Computes several checksums in one pass, SHA-256 always among them.
#[derive(Debug)]
pub(crate) struct Digester {
    sha256: Sha256,
    md5: Option<Md5>,
    sha384: Option<Sha384>,
    sha512: Option<Sha512>,
}

impl Digester {
    /// One that computes those of `algorithms` too.
    pub(crate) fn new(algorithms: &BTreeSet<Algorithm>) -> Self {
        Self {
            sha256: Sha256::new(),
            md5: algorithms.contains(&Algorithm::Md5).then(Md5::new),
            sha384: algorithms.contains(&Algorithm::Sha384).then(Sha384::new),
            sha512: algorithms.contains(&Algorithm::Sha512).then(Sha512::new),
        }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        if let Some(md5) = &mut self.md5 {
            md5.update(bytes);
        }
        if let Some(sha384) = &mut self.sha384 {
            sha384.update(bytes);
        }
        if let Some(sha512) = &mut self.sha512 {
            sha512.update(bytes);
        }
    }

    /// SHA-256, and every checksum (it among them).
    pub(crate) fn finish(self) -> (tm_protocol::ids::Sha256, Vec<Checksum>) {
        let sha256: [u8; 32] = self.sha256.finalize().into();
        let digests = [
            (Algorithm::Sha256, Some(sha256.to_vec())),
            (Algorithm::Md5, self.md5.map(|h| h.finalize().to_vec())),
            (Algorithm::Sha384, self.sha384.map(|h| h.finalize().to_vec())),
            (Algorithm::Sha512, self.sha512.map(|h| h.finalize().to_vec())),
        ];
        let checksums = digests
            .into_iter()
            .filter_map(|(algorithm, digest)| Some(Checksum { algorithm, digest: digest? }))
            .collect();
        (tm_protocol::ids::Sha256::new(sha256), checksums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_gives_every_checksum_asked_for() {
        let known = [
            (Algorithm::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (Algorithm::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                Algorithm::Sha384,
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed\
                 8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                Algorithm::Sha512,
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ];
        let mut digester = Digester::new(&known.iter().map(|(algorithm, _)| *algorithm).collect());
        digester.update(b"a");
        digester.update(b"bc");
        let (sha256, checksums) = digester.finish();
        assert_eq!(sha256, tm_protocol::ids::Sha256::of(b"abc"));
        assert_eq!(checksums.len(), 4);
        for (algorithm, digits) in known {
            let expected = Checksum::from_hex(algorithm, digits.as_bytes()).unwrap();
            assert!(checksums.contains(&expected), "{algorithm:?}");
            assert!(Checksum::from_hex(algorithm, digits.to_uppercase().as_bytes()).is_some());
            assert_eq!(Checksum::from_hex(algorithm, &digits.as_bytes()[2..]), None, "too short");
        }
        assert_eq!(Checksum::from_hex(Algorithm::Md5, b"zz0150983cd24fb0d6963f7d28e17f72"), None);
        assert_eq!(Digester::new(&BTreeSet::new()).finish().1.len(), 1, "SHA-256 alone");
    }
}
