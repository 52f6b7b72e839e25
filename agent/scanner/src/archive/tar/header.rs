//! A header block and the records of pax.

use crate::archive::field;

/// A header block whose checksum is right.
#[derive(Debug)]
pub(super) struct Header {
    /// The name, with its prefix.
    pub(super) name: Vec<u8>,
    /// The type flag; old archives leave it zero.
    pub(super) kind: u8,
    /// The size of the data.
    pub(super) size: Size,
}

/// The size field, as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// Octal digits.
    Octal(u64),
    /// A binary number, for what is above [`Size::MAX_OCTAL`] (GNU, star).
    Binary(u64),
    /// Neither.
    Invalid,
}

impl Size {
    /// The largest size that eleven octal digits hold.
    pub(super) const MAX_OCTAL: u64 = 0o77_777_777_777;

    pub(super) fn number(self) -> Option<u64> {
        match self {
            Self::Octal(size) | Self::Binary(size) => Some(size),
            Self::Invalid => None,
        }
    }
}

impl Header {
    /// Reads the first block of `bytes`; `None` unless its checksum is right.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let block = bytes.get(..512)?;
        let told = field::digits(block.get(148..156)?, 8)?;
        let (mut unsigned, mut signed) = (0u64, 0i64);
        for (at, byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { *byte };
            unsigned += u64::from(byte);
            // Old writers took bytes for signed ones.
            signed += i64::from(byte.cast_signed());
        }
        if told != unsigned && i64::try_from(told) != Ok(signed) {
            return None;
        }
        let mut name = field::until_zero(block.get(..100)?).to_vec();
        let prefix = field::until_zero(block.get(345..500)?);
        if block.get(257..263) == Some(b"ustar\0") && !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
        Some(Self { name, kind: *block.get(156)?, size: number(block.get(124..136)?) })
    }
}

/// A number of a header: octal, or binary if the highest bit is set.
pub(super) fn number(field: &[u8]) -> Size {
    match field.first() {
        Some(0x80) => {
            let (high, low) = field.split_at(field.len().saturating_sub(8));
            let fits = high.iter().skip(1).all(|byte| *byte == 0);
            match field::be(low, 0, 8) {
                Some(number) if fits => Size::Binary(number),
                _ => Size::Invalid,
            }
        }
        Some(0..0x80) => field::digits(field, 8).map_or(Size::Invalid, Size::Octal),
        Some(0x81..) | None => Size::Invalid,
    }
}

/// The records of an extended header that matter here.
#[derive(Debug, Default)]
pub(super) struct Pax {
    /// There is one.
    pub(super) present: bool,
    /// Every record is well formed, and none that matters stands twice.
    pub(super) sound: bool,
    /// `size`.
    pub(super) size: Option<u64>,
    path: Option<Vec<u8>>,
    /// `GNU.sparse.…`, without that prefix, in their order.
    pub(super) sparse: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Pax {
    /// Reads records of the form `LENGTH KEY=VALUE\n`.
    pub(super) fn parse(mut rest: &[u8]) -> Self {
        let mut pax = Self { present: true, sound: true, ..Self::default() };
        while !rest.is_empty() {
            let Some((key, value, after)) = record(rest) else {
                // Zeros pad the last block in some archives.
                pax.sound &= field::after_zeros(rest).is_empty();
                break;
            };
            rest = after;
            match key {
                b"size" => {
                    let size = field::digits(value, 10).filter(|_| !value.is_empty());
                    pax.sound &= size.is_some() && pax.size.is_none_or(|told| Some(told) == size);
                    pax.size = size;
                }
                b"path" => pax.path = Some(value.to_vec()),
                _ => {
                    if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                        pax.sparse.push((key.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        pax
    }

    /// `path`, or the name that a sparse member had before it was one.
    pub(super) fn path(&self) -> Option<&[u8]> {
        self.sparse("name").or(self.path.as_deref())
    }

    /// The last value of `GNU.sparse.KEY`.
    pub(super) fn sparse(&self, key: &str) -> Option<&[u8]> {
        self.sparse.iter().rev().find(|(name, _)| name == key.as_bytes()).map(|(_, value)| value.as_slice())
    }

    /// The same, as a number.
    pub(super) fn sparse_number(&self, key: &str) -> Option<u64> {
        field::digits(self.sparse(key)?, 10)
    }
}

/// The first record: key, value, what follows.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length = field::digits(bytes.get(..blank)?, 10)?;
    let record = field::piece(bytes, 0, length)?;
    let text = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|byte| *byte == b'=')?;
    Some((text.get(..equals)?, text.get(equals + 1..)?, bytes.get(record.len()..)?))
}
