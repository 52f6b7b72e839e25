//! Files to be found, and rules that find them.
//!
//! **Invariant:** the EICAR test file stands nowhere in the repository as one piece.

use std::io::{Cursor, Write as _};

use flate2::{Compression, write::GzEncoder};
use zip::{ZipWriter, write::SimpleFileOptions};

/// Finds [`eicar`] at the beginning of a file or member.
pub const EICAR_RULE: &str = include_str!("../../packaging/demo/eicar.yar");
/// The name of the rule in [`EICAR_RULE`].
pub const EICAR_RULE_NAME: &str = "eicar_test_file";

/// The 68 bytes that every scanner knows.
pub fn eicar() -> Vec<u8> {
    [r"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-", "STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"].concat().into_bytes()
}

/// Looks like [`eicar`], and is not.
pub fn look_alike() -> Vec<u8> {
    let mut bytes = eicar();
    bytes[0] = b'x';
    bytes
}

/// A zip archive of one deflated member.
///
/// # Panics
/// Never: memory can be written to.
pub fn zip(name: &str, content: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file(name, SimpleFileOptions::default()).expect("memory can be written to");
    zip.write_all(content).expect("memory can be written to");
    zip.finish().expect("memory can be written to").into_inner()
}

/// A gzipped tar archive of one member.
///
/// # Panics
/// Never: memory can be written to.
pub fn tar_gz(name: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content).expect("memory can be written to");
    tar.into_inner().and_then(GzEncoder::finish).expect("memory can be written to")
}

/// [`eicar`] in `inner.zip` in a tar.gz.
pub fn nested() -> Vec<u8> {
    tar_gz("inner.zip", &zip("eicar.com", &eicar()))
}

/// A zip archive whose one member is marked as encrypted, in both of its headers.
///
/// # Panics
/// Never: the archive is of our own making.
pub fn encrypted_zip() -> Vec<u8> {
    let mut bytes = zip("secret.bin", b"nobody can read this without the password");
    for (signature, flags) in [(b"PK\x03\x04", 6), (b"PK\x01\x02", 8)] {
        let at = bytes.windows(4).position(|window| window == signature).expect("an archive has headers");
        bytes[at + flags] |= 1;
    }
    bytes
}

/// A rule that does not end by itself in a lifetime.
pub const ENDLESS_RULE: &str = "rule endless { condition: for all i in (0..100000000000) : \
     (for all j in (0..100000000000) : (i + j >= 0 and filesize > 0)) }";

/// A rule with a mistake at the end of its third line.
pub const BROKEN_RULE: &str = "rule broken {\n    condition:\n        $nowhere\n}\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samples_are_what_they_say() {
        assert_eq!(eicar().len(), 68);
        assert_ne!(eicar(), look_alike());
        let holds = |bytes: &[u8]| bytes.windows(68).any(|window| window == eicar());
        assert!(!holds(&nested()) && !holds(EICAR_RULE.as_bytes()), "it is found only by unpacking");
        let mut archive = ::zip::ZipArchive::new(Cursor::new(encrypted_zip())).unwrap();
        assert!(archive.by_index(0).is_err() && archive.len() == 1);
        assert!(EICAR_RULE.contains(EICAR_RULE_NAME));
    }
}
