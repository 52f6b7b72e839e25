//! One item's file: a removed file with all that belongs to it, readable only with the vault's key.
//!
//! On disk (`vault/items/<id>`, mode 0600): a header of 32 bytes – the magic `TMVAULT`, the format's version
//! (one byte, 1), the key's name (8), the item's id (16) – and behind it a sealed stream ([`super::seal`])
//! under the item's own key, bound to the header. In the stream: the length of the metadata (`u32`,
//! little-endian), the metadata (JSON, bytes in base64), the content, and its SHA-256 digest.
//!
//! **Invariant:** an item says by itself what it is: the index can be made anew from items.
//! **Invariant:** what was altered, cut off or comes from another vault is not given out as content.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tm_protocol::{
    ids::{Sha256, TaskId, VaultId},
    report::PathBytes,
};

use super::{
    b64,
    key::VaultKey,
    seal::{self, Opener, Sealer},
};
use crate::platform::{attributes::Time, fs::Object};

const MAGIC: &[u8; 7] = b"TMVAULT";
const VERSION: u8 = 1;
const HEADER: usize = 7 + 1 + 8 + 16;
const DIGEST: usize = 32;
/// Longest metadata that is believed, in bytes: a path, a mebibyte of attributes in base64, and more.
const MOST_METADATA: usize = 4 << 20;

/// What is kept of a file beside its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Metadata {
    /// Where it was.
    #[serde(with = "b64")]
    pub(super) path: PathBytes,
    /// In bytes.
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) accessed: Time,
    pub(super) modified: Time,
    /// Inode flags ([`crate::platform::attributes::flags`]).
    pub(super) flags: u32,
    /// Extended attributes: ACLs, capabilities and labels among them.
    #[serde(with = "b64::pairs")]
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// How many more there were.
    pub(super) xattrs_left_out: u32,
    /// How many names the file had, this one included.
    pub(super) links: u64,
    /// Device and inode of the file.
    pub(super) object: (u64, u64),
    /// Owner of the folder it was in.
    pub(super) parent_uid: u32,
    /// When it was vaulted, in milliseconds since 1970.
    pub(super) vaulted_ms: i64,
    /// By which task; none if by hand.
    pub(super) task: Option<TaskId>,
}

impl Metadata {
    /// Which object on disk the file was.
    pub(super) fn object(&self) -> Object {
        Object { device: self.object.0, inode: self.object.1 }
    }
}

/// Why an item gives nothing.
#[derive(Debug)]
pub(super) enum ItemFault {
    Damaged(&'static str),
    Foreign,
    Read(io::Error),
    /// What takes the content failed.
    Sink(io::Error),
}

/// How long the item of a file with this metadata is, in bytes.
pub(super) fn item_len(metadata: &Metadata) -> io::Result<u64> {
    let text = serde_json::to_vec(metadata)?;
    let plain = wide(4 + text.len() + DIGEST).saturating_add(metadata.size);
    Ok(seal::sealed_len(plain).saturating_add(wide(HEADER)))
}

/// An item that is being written.
pub(super) struct ItemWriter<'a> {
    sealer: Sealer<&'a File>,
    hasher: sha2::Sha256,
}

impl<'a> ItemWriter<'a> {
    /// Begins an item in an empty file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn begin(
        mut file: &'a File,
        key: &VaultKey,
        id: VaultId,
        metadata: &Metadata,
    ) -> io::Result<Self> {
        let header = header(key, id);
        file.write_all(&header)?;
        let mut sealer = Sealer::new(file, &key.of_item(id), &header);
        let text = serde_json::to_vec(metadata)?;
        let len = u32::try_from(text.len()).map_err(io::Error::other)?;
        sealer.push(&len.to_le_bytes())?;
        sealer.push(&text)?;
        Ok(Self { sealer, hasher: sha2::Sha256::new() })
    }

    /// Takes more of the content.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.sealer.push(bytes)
    }

    /// Ends the content, of which there must have been as much as the metadata says. The digest of it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn finish(self) -> io::Result<Sha256> {
        let digest: [u8; DIGEST] = self.hasher.finalize().into();
        let mut sealer = self.sealer;
        sealer.push(&digest)?;
        sealer.finish()?;
        Ok(Sha256::new(digest))
    }
}

/// An item that is being read.
pub(super) struct ItemReader {
    stream: Opener<File>,
    metadata: Metadata,
}

impl ItemReader {
    /// Opens an item and reads its metadata.
    ///
    /// # Errors
    /// If it is damaged, foreign, or cannot be read.
    pub(super) fn open(mut file: File, key: &VaultKey, id: VaultId) -> Result<Self, ItemFault> {
        let facts = file.metadata().map_err(ItemFault::Read)?;
        if !facts.is_file() {
            return Err(ItemFault::Damaged("it is no file"));
        }
        let sealed = facts.len().checked_sub(wide(HEADER)).ok_or(ItemFault::Damaged("it was cut off"))?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(fault)?;
        check_header(&header, key, id)?;
        let mut stream = Opener::new(file, sealed, &key.of_item(id), &header);
        let mut len = [0; 4];
        stream.read_exact(&mut len).map_err(fault)?;
        let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
        if len > MOST_METADATA {
            return Err(ItemFault::Damaged("its metadata is too long"));
        }
        let mut text = vec![0; len];
        stream.read_exact(&mut text).map_err(fault)?;
        let metadata = serde_json::from_slice(&text)
            .map_err(|_| ItemFault::Damaged("its metadata is of another kind"))?;
        Ok(Self { stream, metadata })
    }

    /// What is kept beside the content.
    pub(super) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Gives the content to `sink`, piece by piece, and its digest at the end. Only after that it is known to
    /// be whole.
    ///
    /// # Errors
    /// If the item is damaged or cannot be read, or `sink` fails.
    pub(super) fn content(
        &mut self,
        mut sink: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Sha256, ItemFault> {
        let mut hasher = sha2::Sha256::new();
        let mut piece = vec![0; seal::CHUNK];
        let mut left = self.metadata.size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
            let n = self.stream.read(piece.get_mut(..most).unwrap_or_default()).map_err(fault)?;
            if n == 0 {
                return Err(ItemFault::Damaged("its content is too short"));
            }
            let got = piece.get(..n).unwrap_or_default();
            hasher.update(got);
            sink(got).map_err(ItemFault::Sink)?;
            left = left.saturating_sub(wide(n));
        }
        let digest: [u8; DIGEST] = hasher.finalize().into();
        let mut kept = [0; DIGEST];
        self.stream.read_exact(&mut kept).map_err(fault)?;
        if self.stream.read(&mut [0; 1]).map_err(fault)? != 0 {
            return Err(ItemFault::Damaged("it is too long"));
        }
        if kept == digest { Ok(Sha256::new(digest)) } else { Err(ItemFault::Damaged("its digest differs")) }
    }
}

fn header(key: &VaultKey, id: VaultId) -> [u8; HEADER] {
    let parts = [&MAGIC[..], &[VERSION], &key.name(), id.uuid().as_bytes()].concat();
    parts.try_into().expect("the parts have this length")
}

fn check_header(found: &[u8; HEADER], key: &VaultKey, id: VaultId) -> Result<(), ItemFault> {
    let expected = header(key, id);
    if *found == expected {
        return Ok(());
    }
    let magic = MAGIC.len();
    if found.get(..magic) != expected.get(..magic) {
        return Err(ItemFault::Damaged("it does not begin like an item"));
    }
    if found.get(magic) != Some(&VERSION) {
        return Err(ItemFault::Damaged("its format is of another version"));
    }
    Err(ItemFault::Foreign)
}

fn fault(error: io::Error) -> ItemFault {
    if error.kind() == io::ErrorKind::InvalidData {
        ItemFault::Damaged("it was altered or cut off")
    } else if error.kind() == io::ErrorKind::UnexpectedEof {
        ItemFault::Damaged("it was cut off")
    } else {
        ItemFault::Read(error)
    }
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;

    use super::*;

    fn metadata(size: usize) -> Metadata {
        Metadata {
            path: PathBytes(b"/a\n\xff".to_vec()),
            size: wide(size),
            mode: 0o4755,
            uid: 1,
            gid: 2,
            accessed: (3, 4),
            modified: (-5, 6),
            flags: 16,
            xattrs: vec![(b"user.x".to_vec(), vec![0, 255])],
            xattrs_left_out: 0,
            links: 2,
            object: (7, 8),
            parent_uid: 9,
            vaulted_ms: 10,
            task: None,
        }
    }

    fn key(folder: &tempfile::TempDir, name: &str) -> VaultKey {
        VaultKey::load(&folder.path().join(name), true).unwrap()
    }

    fn write(key: &VaultKey, id: VaultId, content: &[u8]) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        let metadata = metadata(content.len());
        let mut writer = ItemWriter::begin(&file, key, id, &metadata).unwrap();
        writer.push(content).unwrap();
        assert_eq!(writer.finish().unwrap(), Sha256::of(content));
        assert_eq!(file.metadata().unwrap().len(), item_len(&metadata).unwrap());
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn read(bytes: &[u8], key: &VaultKey, id: VaultId) -> Result<(Metadata, Vec<u8>), ItemFault> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        let mut reader = ItemReader::open(file, key, id)?;
        let mut content = Vec::new();
        reader.content(|piece| {
            content.extend_from_slice(piece);
            Ok(())
        })?;
        Ok((reader.metadata().clone(), content))
    }

    #[test]
    fn an_item_gives_back_what_it_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let (key, other) = (key(&folder, "a"), key(&folder, "b"));
        let id = VaultId::new(uuid::Uuid::now_v7());
        for len in [0, 1, seal::CHUNK, 200_000] {
            let content = vec![b'x'; len];
            let bytes = write(&key, id, &content);
            assert!(!bytes.windows(16).any(|part| part == [b'x'; 16]), "it is not readable");
            let (found, out) = read(&bytes, &key, id).unwrap();
            assert_eq!((found, out), (metadata(len), content));
            assert!(matches!(read(&bytes, &other, id), Err(ItemFault::Foreign)));
            let another = VaultId::new(uuid::Uuid::now_v7());
            assert!(matches!(read(&bytes, &key, another), Err(ItemFault::Foreign)));
        }
    }

    #[test]
    fn every_flip_and_every_cut_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let key = key(&folder, "a");
        let id = VaultId::new(uuid::Uuid::now_v7());
        let bytes = write(&key, id, b"content");
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert!(read(&bad, &key, id).is_err(), "flip at {at}");
            assert!(read(&bytes[..at], &key, id).is_err(), "cut at {at}");
        }
        assert!(read(&[&bytes[..], b"\0"].concat(), &key, id).is_err(), "longer");
    }
}
