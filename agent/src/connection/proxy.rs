//! The way through an HTTP proxy, where an endpoint does not reach its managers by itself: `CONNECT` (RFC 9110
//! section 9.3.6), with a user and a password (RFC 7617) if the proxy demands them.
//!
//! The proxy is told a manager's name and port, resolves the name, and from then on carries what it cannot read: TLS
//! is spoken through it with the manager, which is judged as without a proxy.
//!
//! **Invariant:** nothing of the environment (`HTTPS_PROXY` and its like) is looked at: only what root wrote counts.
//! **Invariant:** the password is in no text that is shown, logged or told to a manager.
//! **Invariant:** an answer takes at most [`MAX_HEAD`] bytes and [`ANSWER`], whatever the proxy sends.

use std::{fmt, io, str::FromStr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Buf as _, BytesMut};
use tm_protocol::{address::Address, text::escape_for_display};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};
use zeroize::Zeroizing;

/// Longest head of an answer, in bytes.
const MAX_HEAD: usize = 8 << 10;
/// How long the proxy may take to answer: it has to resolve a name and connect.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest setting, in bytes.
const MAX_URL: usize = 2048;

/// A proxy as `http://[user:password@]host:port`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Proxy {
    address: Address,
    /// What goes after `Basic `.
    credentials: Option<Zeroizing<String>>,
}

/// Why a text names no proxy. It never repeats the text, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidProxy {
    #[error("a proxy is written `http://[user:password@]host:port`")]
    Form,
    #[error(
        "a proxy is spoken to by plain HTTP (`http://…`); what goes through it is encrypted between agent and manager"
    )]
    Scheme,
    #[error(
        "the user or password has a `%` without two hex digits, a control character, or a `:` in the user \
         (write `@` as %40, `:` as %3A, `/` as %2F, `%` as %25)"
    )]
    Credentials,
}

/// Why a proxy gives no way to a manager.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("its name cannot be resolved")]
    Resolve(#[source] io::Error),
    #[error("it cannot be reached")]
    Unreachable(#[source] io::Error),
    #[error("it demands a user and a password (407), and none are set")]
    Demands,
    #[error("it does not accept the user and password that are set (407)")]
    Denied,
    #[error("it answers {0}")]
    Refused(String),
    #[error("it gives no answer in {} s", ANSWER.as_secs())]
    Silent,
    #[error("the connection to it broke before it answered")]
    Broken(#[source] io::Error),
    #[error("what it answers is no HTTP: {0}")]
    Protocol(&'static str),
}

impl ProxyError {
    /// What programs compare.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Resolve(_) => "proxy-unresolved",
            Self::Unreachable(_) => "proxy-unreachable",
            Self::Demands | Self::Denied => "proxy-authentication",
            Self::Refused(_) => "proxy-refused",
            Self::Silent => "proxy-silent",
            Self::Broken(_) => "proxy-broken",
            Self::Protocol(_) => "proxy-protocol",
        }
    }
}

impl Proxy {
    /// Where it is.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Whether its setting holds what others must not read.
    pub(crate) fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// Has the proxy connect `stream` to `target`; afterwards the stream leads there.
    ///
    /// # Errors
    /// If it does not.
    pub(crate) async fn open<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        target: &Address,
    ) -> Result<(), ProxyError> {
        self.open_within(ANSWER, stream, target).await
    }

    async fn open_within<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        patience: Duration,
        stream: &mut S,
        target: &Address,
    ) -> Result<(), ProxyError> {
        let mut request = Zeroizing::new(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"));
        if let Some(credentials) = &self.credentials {
            request.push_str("Proxy-Authorization: Basic ");
            request.push_str(credentials);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        let exchange = async {
            stream.write_all(request.as_bytes()).await.map_err(ProxyError::Broken)?;
            stream.flush().await.map_err(ProxyError::Broken)?;
            answer(stream).await
        };
        let (code, reason) = timeout(patience, exchange).await.map_err(|_| ProxyError::Silent)??;
        match code {
            200..=299 => Ok(()),
            407 if self.credentials.is_some() => Err(ProxyError::Denied),
            407 => Err(ProxyError::Demands),
            _ => Err(ProxyError::Refused(format!("{code}{reason}"))),
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("address", &self.address).finish_non_exhaustive()
    }
}

impl FromStr for Proxy {
    type Err = InvalidProxy;

    fn from_str(text: &str) -> Result<Self, InvalidProxy> {
        let (scheme, rest) =
            text.split_once("://").filter(|_| text.len() <= MAX_URL).ok_or(InvalidProxy::Form)?;
        if !scheme.eq_ignore_ascii_case("http") {
            return Err(InvalidProxy::Scheme);
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, host) = match rest.rsplit_once('@') {
            Some((user, host)) => (Some(basic(user)?), host),
            None => (None, rest),
        };
        let address = host.parse().map_err(|_| InvalidProxy::Form)?;
        Ok(Self { address, credentials })
    }
}

/// The credentials of `user[:password]`, in which `%` and two hex digits stand for a byte.
fn basic(text: &str) -> Result<Zeroizing<String>, InvalidProxy> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let (user, password) = (decoded(user)?, decoded(password)?);
    // The first colon ends the user.
    if user.is_empty() || user.contains(&b':') {
        return Err(InvalidProxy::Credentials);
    }
    let mut both = Zeroizing::new(Vec::with_capacity(user.len() + 1 + password.len()));
    both.extend_from_slice(&user);
    both.push(b':');
    both.extend_from_slice(&password);
    Ok(Zeroizing::new(STANDARD.encode(&*both)))
}

fn decoded(text: &str) -> Result<Zeroizing<Vec<u8>>, InvalidProxy> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let byte = if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2).ok_or(InvalidProxy::Credentials)?;
            rest = after;
            let mut decoded = [0];
            hex::decode_to_slice(digits, &mut decoded).map_err(|_| InvalidProxy::Credentials)?;
            decoded[0]
        } else {
            byte
        };
        // RFC 7617: control characters cannot be sent.
        if byte.is_ascii_control() {
            return Err(InvalidProxy::Credentials);
        }
        bytes.push(byte);
    }
    Ok(bytes)
}

/// The status of the answer, and its reason with a space before it.
async fn answer<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(u16, String), ProxyError> {
    let mut buffer = BytesMut::with_capacity(1024);
    let mut read = 0;
    loop {
        let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
            if buffer.len() >= 5 && !buffer.starts_with(b"HTTP/") {
                return Err(ProxyError::Protocol("it does not begin like an answer"));
            }
            if read >= MAX_HEAD {
                return Err(ProxyError::Protocol("its head is longer than 8 KiB"));
            }
            let mut room = (&mut *stream).take(u64::try_from(MAX_HEAD - read).unwrap_or_default());
            let more = room.read_buf(&mut buffer).await.map_err(ProxyError::Broken)?;
            if more == 0 {
                return Err(ProxyError::Broken(io::ErrorKind::UnexpectedEof.into()));
            }
            read += more;
            continue;
        };
        let (code, reason) = status(&buffer[..end])?;
        buffer.advance(end + 4);
        match code {
            // Interim: the answer proper follows.
            100..=199 => {}
            // The manager speaks second: whatever is here already is not its word.
            200..=299 if !buffer.is_empty() => {
                return Err(ProxyError::Protocol("it says more than that the way is open"));
            }
            _ => return Ok((code, reason)),
        }
    }
}

/// Reads the first line of a head.
fn status(head: &[u8]) -> Result<(u16, String), ProxyError> {
    let malformed = || ProxyError::Protocol("its first line has no status");
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let rest =
        line.strip_prefix(b"HTTP/1.").and_then(|rest| rest.split_at_checked(2)).ok_or_else(malformed)?;
    if !matches!(rest.0, [b'0'..=b'9', b' ']) {
        return Err(malformed());
    }
    let (code, reason) = rest.1.split_at_checked(3).ok_or_else(malformed)?;
    let code = std::str::from_utf8(code).ok().filter(|code| code.bytes().all(|b| b.is_ascii_digit()));
    let code: u16 = code.and_then(|code| code.parse().ok()).ok_or_else(malformed)?;
    if code < 100 || !(reason.is_empty() || reason.starts_with(b" ")) {
        return Err(malformed());
    }
    // The proxy's own words end up in a log, a file and the next hello.
    let reason: String = String::from_utf8_lossy(reason).trim_end().chars().take(100).collect();
    Ok((code, escape_for_display(&reason)))
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[test]
    fn proxies_are_read_and_what_is_none_is_refused_without_being_repeated() {
        let proxy: Proxy = "http://proxy.example:3128".parse().unwrap();
        assert_eq!(
            (proxy.address().to_string().as_str(), proxy.has_credentials()),
            ("proxy.example:3128", false)
        );
        // RFC 7617 section 2.
        let proxy: Proxy = "HTTP://Aladdin:open%20sesame@[2001:db8::1]:80/".parse().unwrap();
        assert_eq!(proxy.address().to_string(), "[2001:db8::1]:80");
        assert_eq!(proxy.credentials.as_ref().unwrap().as_str(), "QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        // RFC 7617 section 2.1: a pound sign in UTF-8.
        let proxy: Proxy = "http://test:123%C2%A3@p:1".parse().unwrap();
        assert_eq!(proxy.credentials.as_ref().unwrap().as_str(), "dGVzdDoxMjPCow==");
        let proxy: Proxy = "http://a:p@ss:w@p:1".parse().unwrap();
        assert_eq!(proxy.credentials.as_ref().unwrap().as_str(), STANDARD.encode("a:p@ss:w"));
        assert!(!format!("{proxy:?}").contains(&STANDARD.encode("a:p@ss:w")), "{proxy:?}");
        for (text, error) in [
            ("", InvalidProxy::Form),
            ("proxy:3128", InvalidProxy::Form),
            ("http://proxy", InvalidProxy::Form),
            ("http://proxy:0", InvalidProxy::Form),
            ("http://2001:db8::1:80", InvalidProxy::Form),
            ("http://proxy:1/path", InvalidProxy::Form),
            ("http://geheim@", InvalidProxy::Form),
            ("https://u:geheim@proxy:1", InvalidProxy::Scheme),
            ("socks5://proxy:1", InvalidProxy::Scheme),
            ("http://u:geheim%2@proxy:1", InvalidProxy::Credentials),
            ("http://u:geheim%zz@proxy:1", InvalidProxy::Credentials),
            ("http://u:geheim%0d%0aX:y@proxy:1", InvalidProxy::Credentials),
            ("http://u%3Av:geheim@proxy:1", InvalidProxy::Credentials),
            ("http://:geheim@proxy:1", InvalidProxy::Credentials),
        ] {
            let refused = text.parse::<Proxy>().unwrap_err();
            assert_eq!(refused, error, "{text}");
            assert!(!refused.to_string().contains("geheim"), "{refused}");
        }
        assert_eq!(format!("http://{}:1", "a".repeat(3000)).parse::<Proxy>(), Err(InvalidProxy::Form));
    }

    /// What comes of an answer, and what the proxy was asked.
    async fn asked(proxy: &str, answer: &[u8]) -> (Result<(), ProxyError>, String) {
        let (mut ours, mut theirs) = duplex(64 << 10);
        theirs.write_all(answer).await.unwrap();
        theirs.shutdown().await.unwrap();
        let proxy: Proxy = proxy.parse().unwrap();
        let opened = proxy.open(&mut ours, &"[2001:db8::7]:4433".parse().unwrap()).await;
        drop(ours);
        let mut request = String::new();
        theirs.read_to_string(&mut request).await.unwrap();
        (opened, request)
    }

    #[tokio::test]
    async fn the_way_is_open_after_any_2xx_and_never_otherwise() {
        let (opened, request) = asked("http://p:1", b"HTTP/1.1 200 Connection established\r\n\r\n").await;
        assert!(opened.is_ok());
        assert_eq!(request, "CONNECT [2001:db8::7]:4433 HTTP/1.1\r\nHost: [2001:db8::7]:4433\r\n\r\n");
        let (opened, request) = asked("http://u:w@p:1", b"HTTP/1.0 299\r\nVia: x\r\n\r\n").await;
        assert!(opened.is_ok());
        assert!(request.ends_with("\r\nProxy-Authorization: Basic dTp3\r\n\r\n"), "{request}");
        let interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 x\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n";
        assert!(asked("http://p:1", interim).await.0.is_ok());

        let long = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "b".repeat(9000));
        let endless = "HTTP/1.1 100 Continue\r\n\r\n".repeat(1000);
        let cases: &[(&str, &[u8], &str, &str)] = &[
            ("http://p:1", b"HTTP/1.1 407 x\r\n\r\n", "proxy-authentication", "none are set"),
            ("http://u:geheim@p:1", b"HTTP/1.1 407 x\r\n\r\n", "proxy-authentication", "not accept"),
            ("http://u:geheim@p:1", b"HTTP/1.1 403 No\x1b[1m\r\n\r\n", "proxy-refused", "403 No"),
            ("http://p:1", b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>", "proxy-refused", "502 Bad Gateway"),
            ("http://p:1", b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\n\r\n", "proxy-refused", "302"),
            ("http://p:1", b"", "proxy-broken", "broke"),
            ("http://p:1", b"HTTP/1.1 200 OK\r\n", "proxy-broken", "broke"),
            ("http://p:1", b"SSH-2.0-OpenSSH_9.2\r\n", "proxy-protocol", "begin"),
            ("http://p:1", b"HTTP/2 200 OK\r\n\r\n", "proxy-protocol", "status"),
            ("http://p:1", b"HTTP/1.1 20\r\n\r\n", "proxy-protocol", "status"),
            ("http://p:1", b"HTTP/1.1 2000\r\n\r\n", "proxy-protocol", "status"),
            ("http://p:1", b"HTTP/1.1 +20 OK\r\n\r\n", "proxy-protocol", "status"),
            ("http://p:1", b"HTTP/1.1 000 OK\r\n\r\n", "proxy-protocol", "status"),
            ("http://p:1", b"HTTP/1.1 200 OK\r\n\r\nhello", "proxy-protocol", "more"),
            ("http://p:1", long.as_bytes(), "proxy-protocol", "8 KiB"),
            ("http://p:1", endless.as_bytes(), "proxy-protocol", "8 KiB"),
        ];
        for (proxy, answer, code, says) in cases {
            let error = asked(proxy, answer).await.0.expect_err(says);
            let text = error.to_string();
            assert_eq!(error.code(), *code, "{text}");
            assert!(text.contains(says) && !text.contains("geheim") && !text.contains('\x1b'), "{text}");
        }
    }

    #[tokio::test]
    async fn a_proxy_that_says_nothing_is_given_up() {
        let (mut ours, _theirs) = duplex(1024);
        let proxy: Proxy = "http://p:1".parse().unwrap();
        let soon = Duration::from_millis(50);
        let error = proxy.open_within(soon, &mut ours, &"m:1".parse().unwrap()).await.unwrap_err();
        assert_eq!(error.code(), "proxy-silent");
    }
}
