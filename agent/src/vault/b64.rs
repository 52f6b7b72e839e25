//! Exact bytes in JSON, as base64 (`#[serde(with = "b64")]`).

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
use tm_protocol::report::PathBytes;

/// Bytes that a text stands for.
pub(super) trait Bytes: Sized {
    /// The bytes.
    fn get(&self) -> &[u8];
    /// The value of these bytes.
    fn of(bytes: Vec<u8>) -> Self;
}

impl Bytes for PathBytes {
    fn get(&self) -> &[u8] {
        &self.0
    }

    fn of(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// `Err` if it cannot be written.
pub(super) fn serialize<B: Bytes, S: Serializer>(value: &B, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&STANDARD.encode(value.get()))
}

/// `Err` if it is no base64.
pub(super) fn deserialize<'de, B: Bytes, D: Deserializer<'de>>(from: D) -> Result<B, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
    STANDARD.decode(text.as_bytes()).map(B::of).map_err(D::Error::custom)
}

/// A list of pairs of bytes.
pub(super) mod pairs {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    /// `Err` if it cannot be written.
    pub(in super::super) fn serialize<S: Serializer>(pairs: &Pairs, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(pairs.iter().map(|(a, b)| (STANDARD.encode(a), STANDARD.encode(b))))
    }

    /// `Err` if it is no base64.
    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pairs, D::Error> {
        let texts = Vec::<(String, String)>::deserialize(from)?;
        let decode = |text: String| STANDARD.decode(text).map_err(D::Error::custom);
        texts.into_iter().map(|(a, b)| Ok((decode(a)?, decode(b)?))).collect()
    }
}
