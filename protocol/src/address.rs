//! A manager's address as people write it: `name:port`, `192.0.2.1:port`, `[2001:db8::1]:port`.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// A host (name or IP) and a port. Names stay names: they are resolved anew at each attempt.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    host: String,
    port: u16,
}

/// A text that is not an address with a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an address (`host:port` or `[v6]:port` is expected)")]
pub struct InvalidAddress;

impl Address {
    /// Joins a host (name, v4, or v6 without brackets) and a port.
    ///
    /// # Errors
    /// If `host` is neither an IP address nor a host name, or `port` is 0.
    pub fn new(host: &str, port: u16) -> Result<Self, InvalidAddress> {
        let named = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if port == 0 || !(named || host.parse::<Ipv6Addr>().is_ok()) {
            return Err(InvalidAddress);
        }
        Ok(Self { host: host.to_owned(), port })
    }

    /// The host without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let (host, port) = text.rsplit_once(':').ok_or(InvalidAddress)?;
        let port = port.parse().map_err(|_| InvalidAddress)?;
        match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) if v6.parse::<Ipv6Addr>().is_ok() => Self::new(v6, port),
            Some(_) => Err(InvalidAddress),
            None if host.contains(':') => Err(InvalidAddress),
            None => Self::new(host, port),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = InvalidAddress;

    fn try_from(text: String) -> Result<Self, InvalidAddress> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_written() {
        for good in ["manager.example:4433", "192.0.2.7:1", "[2001:db8::1]:65535", "localhost:4433"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "manager",
            "manager:",
            "manager:0",
            "manager:70000",
            "2001:db8::1:443",
            "[x]:1",
            "a b:1",
            ":1",
        ] {
            assert_eq!(bad.parse::<Address>(), Err(InvalidAddress), "{bad}");
        }
    }
}
