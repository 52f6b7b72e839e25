//! cpio: the new form (`070701`, `070702`), the portable one (`070707`) and the old binary one of either byte
//! order. An initial RAM disk is several of them in a row, the last one mostly compressed.

use tm_protocol::report::SkipReason;

use super::{
    Walk,
    field::{self, index, until_zero},
};

/// The name that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";

/// How headers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// 110 characters, hexadecimal; names and contents padded to four bytes.
    New,
    /// 76 characters, octal; nothing padded.
    Portable,
    /// 26 bytes of 16-bit numbers, the lower byte first; padded to two.
    BinaryLittle,
    /// The same, the higher byte first.
    BinaryBig,
}

/// What a header says.
struct Header {
    mode: u64,
    name_length: u64,
    size: u64,
    header_length: u64,
    padding: u64,
}

/// Whether an archive may begin here.
pub(super) fn begins(bytes: &[u8]) -> bool {
    form(bytes).is_some_and(|form| match form {
        Form::New | Form::Portable => true,
        // Two bytes are a weak sign: the first name must be one as well.
        Form::BinaryLittle | Form::BinaryBig => header(bytes, form).is_some_and(|header| {
            let name = field::piece(bytes, header.header_length, header.name_length);
            (2..=1024).contains(&header.name_length)
                && name.is_some_and(|name| name.iter().position(|byte| *byte == 0) == Some(name.len() - 1))
        }),
    })
}

fn form(bytes: &[u8]) -> Option<Form> {
    match bytes {
        [b'0', b'7', b'0', b'7', b'0', b'1' | b'2', ..] => Some(Form::New),
        [b'0', b'7', b'0', b'7', b'0', b'7', ..] => Some(Form::Portable),
        [0xc7, 0x71, ..] => Some(Form::BinaryLittle),
        [0x71, 0xc7, ..] => Some(Form::BinaryBig),
        _ => None,
    }
}

fn header(bytes: &[u8], form: Form) -> Option<Header> {
    let text = |at: usize, width: usize, radix| {
        let field = bytes.get(at..at + width)?;
        // `digits` takes an empty field for 0.
        field.iter().all(|byte| byte.is_ascii_hexdigit()).then(|| field::digits(field, radix))?
    };
    let word = |at| match form {
        Form::BinaryBig => field::be(bytes, at, 2),
        Form::BinaryLittle | Form::New | Form::Portable => field::le(bytes, at, 2),
    };
    Some(match form {
        Form::New => Header {
            mode: text(14, 8, 16)?,
            name_length: text(94, 8, 16)?,
            size: text(54, 8, 16)?,
            header_length: 110,
            padding: 4,
        },
        Form::Portable => Header {
            mode: text(18, 6, 8)?,
            name_length: text(59, 6, 8)?,
            size: text(65, 11, 8)?,
            header_length: 76,
            padding: 1,
        },
        Form::BinaryLittle | Form::BinaryBig => Header {
            mode: word(6)?,
            name_length: word(20)?,
            size: word(22)? << 16 | word(24)?,
            header_length: 26,
            padding: 2,
        },
    })
}

/// Judges the members of an archive.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let mut at = 0;
    loop {
        let rest = bytes.get(index(at)..).unwrap_or_default();
        let form = form(rest).ok_or(SkipReason::Malformed)?;
        let header = header(rest, form).ok_or(SkipReason::Malformed)?;
        let name = field::piece(rest, header.header_length, header.name_length);
        let name = until_zero(name.ok_or(SkipReason::Malformed)?);
        let content_at = padded(header.header_length + header.name_length, header.padding);
        let (content, whole) = field::part(rest, content_at, header.size);
        if name == TRAILER {
            return end(walk, rest.get(index(content_at)..).unwrap_or_default(), header.size == 0);
        }
        if is_file(header.mode) {
            // Of several links of the new form only the last has the content; the others are empty.
            walk.member(name, content)?;
        }
        if !whole {
            return Err(SkipReason::Malformed);
        }
        at += padded(content_at.saturating_add(header.size), header.padding);
    }
}

/// Behind the trailer: zeros, and perhaps another archive, which a kernel unpacks as well.
fn end(walk: &mut Walk<'_>, rest: &[u8], well_formed: bool) -> Result<(), SkipReason> {
    walk.behind(rest)?;
    if well_formed { Ok(()) } else { Err(SkipReason::Malformed) }
}

/// All but folders, devices, fifos and sockets; a link's content is its target.
fn is_file(mode: u64) -> bool {
    !matches!(mode & 0o170_000, 0o040_000 | 0o020_000 | 0o060_000 | 0o010_000 | 0o140_000)
}

fn padded(length: u64, padding: u64) -> u64 {
    length.checked_next_multiple_of(padding).unwrap_or(u64::MAX)
}
