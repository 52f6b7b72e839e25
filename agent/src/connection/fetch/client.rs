//! HTTP as the manager's bulk transfers speak it: one request at a time, over a link that is kept for the next.
//!
//! **Invariant:** whatever an answer says, its head takes at most [`MAX_LINES`] lines of [`MAX_LINE`] bytes, and its
//! body is read only as far as whoever asked wants it.

use std::time::Duration;

use tm_protocol::address::Address;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    time::timeout,
};

use crate::connection::{self, Dialler};

/// Longest header line and most lines of an answer.
const MAX_LINE: u64 = 8192;
const MAX_LINES: usize = 64;
/// How long an answer may take to begin: the manager may have others to serve first, or something to prepare.
const ANSWER: Duration = Duration::from_secs(90);
/// How long nothing may come of a body.
const STALL: Duration = Duration::from_secs(60);
/// What is read of an answer at a time, in bytes.
const BUFFER: usize = 64 << 10;

/// A manager, and the link to it if one is open.
#[derive(Debug)]
pub(super) struct Client<'a> {
    address: &'a Address,
    dialler: &'a Dialler,
    link: Option<BufReader<connection::Link>>,
}

/// The head of an answer.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) status: u16,
    /// Length of the body, in bytes.
    pub(super) length: Option<u64>,
    /// Which bytes of how many these are: the first, and the whole length.
    pub(super) part: Option<(u64, u64)>,
    /// In seconds.
    pub(super) retry_after: Option<u64>,
    closes: bool,
}

impl<'a> Client<'a> {
    pub(super) fn new(address: &'a Address, dialler: &'a Dialler) -> Self {
        Self { address, dialler, link: None }
    }

    /// Asks for `path` with more header lines, each with its line's end.
    ///
    /// # Errors
    /// If no answer begins.
    pub(super) async fn get(&mut self, path: &str, headers: &str) -> Result<Head, String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", self.address);
        // A link that was kept may have been closed meanwhile.
        if self.link.is_some() {
            if let Ok(head) = self.ask(&request).await {
                return Ok(head);
            }
            self.link = None;
        }
        let link = self.dialler.dial(self.address).await.map_err(|e| connection::chain(&e))?;
        self.link = Some(BufReader::with_capacity(BUFFER, link));
        let asked = self.ask(&request).await;
        if asked.is_err() {
            self.link = None;
        }
        asked
    }

    async fn ask(&mut self, request: &str) -> Result<Head, String> {
        let link = self.link.as_mut().ok_or("there is no link")?;
        let asked = async {
            link.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
            link.flush().await.map_err(|e| e.to_string())?;
            head(link).await
        };
        timeout(ANSWER, asked).await.map_err(|_| format!("no answer after {} s", ANSWER.as_secs()))?
    }

    /// The next bytes of the body, which has `left`; none only if there are none left.
    ///
    /// # Errors
    /// If the link breaks, or nothing comes for long.
    pub(super) async fn next(&mut self, left: u64) -> Result<Vec<u8>, String> {
        let link = self.link.as_mut().ok_or("there is no link")?;
        let most = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
        let mut bytes = Vec::with_capacity(most);
        let mut body = link.take(u64::try_from(most).unwrap_or_default());
        let read = timeout(STALL, body.read_buf(&mut bytes)).await;
        match read {
            Ok(Ok(0)) if left > 0 => Err("the answer breaks off".to_owned()),
            Ok(Ok(_)) => Ok(bytes),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("nothing came for {} s", STALL.as_secs())),
        }
    }

    /// Reads a short body to its end, or gives the link up.
    pub(super) async fn rest(&mut self, head: &Head, most: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let length = head.length.filter(|length| *length <= most);
        let Some(mut left) = length else {
            self.link = None;
            return bytes;
        };
        while left > 0 {
            let Ok(more) = self.next(left).await else {
                self.link = None;
                return bytes;
            };
            left -= u64::try_from(more.len()).unwrap_or(left).min(left);
            bytes.extend_from_slice(&more);
        }
        self.end(head);
        bytes
    }

    /// After a whole body: keeps the link, if the manager does.
    pub(super) fn end(&mut self, head: &Head) {
        if head.closes {
            self.link = None;
        }
    }

    /// After half a body, or an answer that makes no sense: the link is of no use any more.
    pub(super) fn drop_link(&mut self) {
        self.link = None;
    }
}

async fn head(link: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> Result<Head, String> {
    let status = line(link).await?;
    let code = status.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let Some(code) = code else {
        return Err(format!("the manager answers `{}`", tm_protocol::text::escape_for_display(&status)));
    };
    let mut head = Head { status: code, ..Head::default() };
    for _ in 0..MAX_LINES {
        let header = line(link).await?;
        if header.is_empty() {
            return Ok(head);
        }
        let Some((name, value)) = header.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => head.length = value.parse().ok(),
            "content-range" => head.part = part(value),
            "retry-after" => head.retry_after = value.parse().ok(),
            "connection" => head.closes = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    Err("the answer's header does not end".to_owned())
}

/// `bytes FIRST-LAST/WHOLE`.
fn part(value: &str) -> Option<(u64, u64)> {
    let (range, whole) = value.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, whole.parse().ok()?))
}

async fn line(link: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> Result<String, String> {
    let mut line = Vec::new();
    link.take(MAX_LINE).read_until(b'\n', &mut line).await.map_err(|e| e.to_string())?;
    let text = line.strip_suffix(b"\n").ok_or("the answer breaks off")?;
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8]) -> Result<Head, String> {
        head(&mut BufReader::new(bytes)).await
    }

    #[tokio::test]
    async fn heads_are_read_and_bad_ones_are_not() {
        let text = "HTTP/1.1 206 Partial Content\r\nContent-Length: 7\r\ncontent-range: bytes 3-9/10\r\nConnection: close\r\n\r\n";
        let expected =
            Head { status: 206, length: Some(7), part: Some((3, 10)), retry_after: None, closes: true };
        assert_eq!(read(text.as_bytes()).await, Ok(expected));
        let busy =
            read(b"HTTP/1.1 503 x\r\nRetry-After: 5\r\nContent-Length: nonsense\r\n\r\n").await.unwrap();
        assert_eq!((busy.status, busy.retry_after, busy.length), (503, Some(5), None));
        let endless = format!("HTTP/1.1 200 OK\r\n{}", "a: b\r\n".repeat(100));
        let long = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "b".repeat(9000));
        for bad in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 2\r\n\r\n",
            endless.as_bytes(),
            long.as_bytes(),
        ] {
            assert!(read(bad).await.is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
