//! The only byte-level parser on the wire.
//!
//! ```text
//! 0      2         3            5                9
//! ┌──────┬─────────┬────────────┬────────────────┬───────── … ─┐
//! │ "TM" │ version │ type (u16) │ length (u32)   │ body        │   all numbers big-endian
//! └──────┴─────────┴────────────┴────────────────┴───────── … ─┘
//! ```
//!
//! **Invariant:** a length is compared with the limit of its type before a byte is allocated for it; a body
//! that is not used up by its message is an error; a type number this build does not know is skipped by its
//! length, so that either side may be the newer one.

use bincode::{Decode, Encode, config};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Bytes of a frame before its body.
pub const HEADER_LENGTH: usize = 9;
/// No body is longer than this, whatever its type (bytes).
pub const MAX_BODY: usize = 256 * 1024;

const MAGIC: [u8; 2] = *b"TM";

/// Why bytes are not a frame. Each of them ends the connection: there is no way to find the next frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first two bytes are not ours.
    #[error("the peer does not speak this protocol")]
    Magic,
    /// The frame layout is of another version.
    #[error("the peer uses frame version {0}, this build {version}", version = crate::VERSION)]
    Version(u8),
    /// The body would be longer than its type allows.
    #[error("a frame of type {kind} claims {length} bytes, {limit} are allowed")]
    TooLong {
        /// The type number.
        kind: u16,
        /// What the header claims.
        length: u32,
        /// What the type allows.
        limit: usize,
    },
    /// The body is not a message of its type.
    #[error("the body of a frame of type {0} is malformed")]
    Body(u16),
    /// A message of ours does not fit its own type's limit.
    #[error("a message of type {kind} needs {length} bytes, {limit} are allowed")]
    Oversized {
        /// The type number.
        kind: u16,
        /// What it would need.
        length: usize,
        /// What the type allows.
        limit: usize,
    },
}

/// A frame whose body has not been looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The type number.
    pub kind: u16,
    /// The encoded message.
    pub body: Bytes,
}

/// Takes one whole frame off the front of `buffer`; `Ok(None)` while it is incomplete.
///
/// `limit_of` gives the longest body of a type number (0 for types that have none here: their bodies up to
/// [`MAX_BODY`] are read and handed over, to be skipped by the caller).
///
/// # Errors
/// If the bytes cannot be the beginning of a frame; the connection is then of no further use.
pub fn take(
    buffer: &mut BytesMut,
    limit_of: impl Fn(u16) -> Option<usize>,
) -> Result<Option<Frame>, FrameError> {
    // What has arrived is judged at once, so that a stranger is not kept waiting for nine bytes.
    if buffer.iter().zip(MAGIC).any(|(have, want)| *have != want) {
        return Err(FrameError::Magic);
    }
    if let Some(&version) = buffer.get(2)
        && version != crate::VERSION
    {
        return Err(FrameError::Version(version));
    }
    let Some(header) = buffer.first_chunk::<HEADER_LENGTH>() else { return Ok(None) };
    let [_, _, _, k0, k1, l0, l1, l2, l3] = *header;
    let kind = u16::from_be_bytes([k0, k1]);
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    let limit = limit_of(kind).unwrap_or(MAX_BODY).min(MAX_BODY);
    let body_length = usize::try_from(length).unwrap_or(usize::MAX);
    if body_length > limit {
        return Err(FrameError::TooLong { kind, length, limit });
    }
    if buffer.len() < HEADER_LENGTH + body_length {
        buffer.reserve(HEADER_LENGTH + body_length - buffer.len());
        return Ok(None);
    }
    buffer.advance(HEADER_LENGTH);
    Ok(Some(Frame { kind, body: buffer.split_to(body_length).freeze() }))
}

/// Appends one frame to `buffer`.
///
/// # Errors
/// [`FrameError::Oversized`] if the message does not fit `limit`; `buffer` is then as before.
pub fn put<M: Encode>(kind: u16, limit: usize, message: &M, buffer: &mut BytesMut) -> Result<(), FrameError> {
    let body = bincode::encode_to_vec(message, config::standard()).map_err(|_| FrameError::Body(kind))?;
    let limit = limit.min(MAX_BODY);
    let oversized = FrameError::Oversized { kind, length: body.len(), limit };
    if body.len() > limit {
        return Err(oversized);
    }
    let length = u32::try_from(body.len()).map_err(|_| oversized)?;
    buffer.reserve(HEADER_LENGTH + body.len());
    buffer.put_slice(&MAGIC);
    buffer.put_u8(crate::VERSION);
    buffer.put_u16(kind);
    buffer.put_u32(length);
    buffer.put_slice(&body);
    Ok(())
}

/// Decodes a body, using it up.
///
/// # Errors
/// [`FrameError::Body`] if it is malformed or longer than its message.
pub fn decode<M: Decode<()>>(kind: u16, body: &[u8]) -> Result<M, FrameError> {
    let (message, used) = bincode::decode_from_slice(body, config::standard().with_limit::<MAX_BODY>())
        .map_err(|_| FrameError::Body(kind))?;
    if used == body.len() { Ok(message) } else { Err(FrameError::Body(kind)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn no_limit(_: u16) -> Option<usize> {
        None
    }

    #[test]
    fn a_frame_comes_back_byte_by_byte() {
        let mut wire = BytesMut::new();
        put(7, 100, &"hello".to_owned(), &mut wire).unwrap();
        let mut buffer = BytesMut::new();
        for byte in wire.iter().take(wire.len() - 1) {
            buffer.put_u8(*byte);
            assert_eq!(take(&mut buffer, no_limit), Ok(None));
        }
        buffer.put_u8(*wire.last().unwrap());
        let frame = take(&mut buffer, no_limit).unwrap().unwrap();
        assert_eq!((frame.kind, decode::<String>(7, &frame.body).unwrap().as_str()), (7, "hello"));
        assert!(buffer.is_empty());
    }

    #[test]
    fn bad_headers_are_told_apart_before_their_bodies_arrive() {
        let header = |bytes: &[u8]| take(&mut BytesMut::from(bytes), |kind| (kind == 1).then_some(10));
        assert_eq!(header(b"G"), Err(FrameError::Magic));
        assert_eq!(header(b"TM\x09"), Err(FrameError::Version(9)));
        assert_eq!(
            header(b"TM\x01\x00\x01\x00\x00\x00\x0b"),
            Err(FrameError::TooLong { kind: 1, length: 11, limit: 10 })
        );
        assert_eq!(
            header(b"TM\x01\x00\x02\xff\xff\xff\xff"),
            Err(FrameError::TooLong { kind: 2, length: u32::MAX, limit: MAX_BODY })
        );
    }

    #[test]
    fn bodies_that_lie_are_refused_without_allocating() {
        // A vector that claims 16 GiB, and one byte too many.
        assert_eq!(decode::<Vec<u8>>(1, &[253, 0, 0, 0, 0, 4, 0, 0, 0]), Err(FrameError::Body(1)));
        assert_eq!(decode::<u8>(1, &[1, 2]), Err(FrameError::Body(1)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = take(&mut buffer, no_limit) {
                let _ = crate::message::ToAgent::decode(&frame);
                let _ = crate::message::ToManager::decode(&frame);
            }
        }
    }
}
