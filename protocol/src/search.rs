//! The search box's grammar (product words, section 2), shared by the CLI and the manager.
//!
//! One or several terms, comma-separated; an endpoint is found if any of them fits. A term is a full IP
//! address, a whole-octet IPv4 prefix (`192.168.0` is that /24), a CIDR, or the start of a host name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// Any address of the endpoint lies in this range, both ends included.
    Addresses {
        /// Lowest, as [`address_key`].
        first: String,
        /// Highest, as [`address_key`].
        last: String,
    },
    /// The host name begins with this (lower case).
    HostPrefix(String),
}

/// A search that cannot mean anything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSearch {
    /// Nothing between two commas, or nothing at all.
    #[error("a search term is empty")]
    Empty,
    /// Too many terms.
    #[error("more than {max} search terms", max = MAX_TERMS)]
    TooMany,
    /// Neither an address nor the start of a host name.
    #[error("`{0}` is neither an address, an address range nor the start of a host name")]
    Term(String),
}

/// Most terms in one search.
pub const MAX_TERMS: usize = 64;

/// Reads a search.
///
/// # Errors
/// If a term is empty or cannot be an address, range or host name.
pub fn parse(search: &str) -> Result<Vec<Term>, InvalidSearch> {
    let terms: Vec<&str> = search.split(',').map(str::trim).collect();
    if terms.len() > MAX_TERMS {
        return Err(InvalidSearch::TooMany);
    }
    terms.into_iter().map(parse_term).collect()
}

/// Writes an address so that text order is address order: 32 hex digits, IPv4 as IPv4-mapped IPv6.
pub fn address_key(address: IpAddr) -> String {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    format!("{bits:032x}")
}

fn parse_term(term: &str) -> Result<Term, InvalidSearch> {
    if term.is_empty() {
        return Err(InvalidSearch::Empty);
    }
    let invalid = || InvalidSearch::Term(crate::text::escape(term.as_bytes()));
    if let Ok(address) = term.parse::<IpAddr>() {
        return Ok(range(address, address));
    }
    if let Some((base, length)) = term.split_once('/') {
        let base: IpAddr = base.parse().map_err(|_| invalid())?;
        let length: u32 = length.parse().map_err(|_| invalid())?;
        return cidr(base, length).ok_or_else(invalid);
    }
    if let Some(prefix) = octets(term) {
        return Ok(prefix);
    }
    // A trailing dot would make `web.` a fully qualified name; as the start of one it is a plain prefix.
    let is_name = term.len() <= 253
        && term.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '.' | '_'))
        && !term.chars().all(|c| c.is_ascii_digit() || c == '.');
    if is_name { Ok(Term::HostPrefix(term.to_lowercase())) } else { Err(invalid()) }
}

/// One to three whole octets (`10`, `192.168`, `192.168.0`, also with a dot behind).
fn octets(term: &str) -> Option<Term> {
    let parts: Vec<&str> = term.strip_suffix('.').unwrap_or(term).split('.').collect();
    if parts.len() > 3 {
        return None;
    }
    let mut bytes = [0; 4];
    for (byte, part) in bytes.iter_mut().zip(&parts) {
        if part.is_empty() || part.len() > 3 || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *byte = part.parse().ok()?;
    }
    let length = u32::try_from(parts.len() * 8).ok()?;
    cidr(IpAddr::V4(Ipv4Addr::from(bytes)), length)
}

fn cidr(base: IpAddr, length: u32) -> Option<Term> {
    match base {
        IpAddr::V4(v4) if length <= 32 => {
            let host = u32::MAX.checked_shr(length).unwrap_or(0);
            let first = v4.to_bits() & !host;
            Some(range(IpAddr::V4(Ipv4Addr::from_bits(first)), IpAddr::V4(Ipv4Addr::from_bits(first | host))))
        }
        IpAddr::V6(v6) if length <= 128 => {
            let host = u128::MAX.checked_shr(length).unwrap_or(0);
            let first = v6.to_bits() & !host;
            Some(range(IpAddr::V6(Ipv6Addr::from_bits(first)), IpAddr::V6(Ipv6Addr::from_bits(first | host))))
        }
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

fn range(first: IpAddr, last: IpAddr) -> Term {
    Term::Addresses { first: address_key(first), last: address_key(last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(search: &str, address: &str) -> bool {
        let key = address_key(address.parse().unwrap());
        parse(search).unwrap().iter().any(|term| match term {
            Term::Addresses { first, last } => *first <= key && key <= *last,
            Term::HostPrefix(_) => false,
        })
    }

    #[test]
    fn addresses_prefixes_and_ranges() {
        for (search, address, expected) in [
            ("192.168.0.7", "192.168.0.7", true),
            ("192.168.0.7", "192.168.0.70", false),
            ("192.168.0", "192.168.0.70", true),
            ("192.168.0", "192.168.1.0", false),
            ("192.168.", "192.168.255.255", true),
            ("10", "10.255.0.1", true),
            ("10", "100.0.0.1", false),
            ("10.1.2.3/8", "10.9.9.9", true),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("192.0.2.1/32", "192.0.2.2", false),
            ("2001:db8::/32", "2001:db8:1::5", true),
            ("2001:db8::/32", "2001:db9::", false),
            ("::/0", "::1", true),
            ("203.0.113.1, 192.168.0", "192.168.0.1", true),
        ] {
            assert_eq!(fits(search, address), expected, "{search} {address}");
        }
    }

    #[test]
    fn host_names_fit_by_their_start() {
        assert_eq!(parse("Endpoint"), Ok(vec![Term::HostPrefix("endpoint".into())]));
        assert_eq!(
            parse("web-1,db_2.example"),
            Ok(vec![Term::HostPrefix("web-1".into()), Term::HostPrefix("db_2.example".into())])
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "a,,b",
            "1.2.3.4/33",
            "1.2.3.4/x",
            "2001:db8::/129",
            "300.1",
            "1.2.3.4.5",
            "we b",
            "a%",
            "web/24",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(parse(&"a,".repeat(MAX_TERMS)), Err(InvalidSearch::TooMany));
    }
}
