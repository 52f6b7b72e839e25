//! The agents' bulk port, asynchronous: many agents in one process that fetch and hand in, and say what no agent of
//! ours would.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tm_protocol::{
    ALPN_BULK, ALPN_ENROLL,
    message::{EnrollReply, EnrollRequest, ToAgent},
    token::EnrollmentToken,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::sleep,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    raw::{self, Identity},
    wire::Wire,
};

/// What is read at a time.
const CHUNK: usize = 64 << 10;
/// Requests for one file.
const TRIES: u32 = 1000;

/// A link for bulk transfers.
#[derive(Debug)]
pub struct BulkLink {
    stream: BufReader<TlsStream<TcpStream>>,
    /// Bytes of bodies that have arrived.
    pub received: u64,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body; empty where it was only counted.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A header's value as a number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.parse().ok()
    }
}

/// Enrolls an agent that is not a program; its certificate and key.
///
/// # Errors
/// If it is refused.
pub async fn enroll(at: SocketAddr, token: &str, host: &str) -> io::Result<Identity> {
    let token: EnrollmentToken = token.parse().map_err(io::Error::other)?;
    let key = rcgen::KeyPair::generate().map_err(io::Error::other)?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key).map_err(io::Error::other)?;
    let request = EnrollRequest {
        secret: *token.secret,
        csr: csr.der().to_vec(),
        host: host.to_owned(),
        agent_version: "0.0.0".to_owned(),
    };
    let mut wire = Wire::connect(at, ALPN_ENROLL, None).await?;
    wire.say(&request.into()).await?;
    let heard = wire.ears.hear().await?;
    let ToAgent::EnrollReply(EnrollReply::Enrolled { certificate, .. }) = heard else {
        return Err(io::Error::other(format!("no enrollment: {heard:?}")));
    };
    let key: PrivateKeyDer<'static> = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    Ok(Identity { chain: vec![CertificateDer::from(certificate)], key })
}

/// What [`BulkLink::connect`] needs of an identity; made once for many links.
///
/// # Errors
/// If certificate and key do not belong together.
pub fn config(identity: &Identity) -> io::Result<Arc<ClientConfig>> {
    raw::client_config(ALPN_BULK, Some(identity))
}

/// Fetches a file of `size` bytes as agents do: told to come again, or cut, it goes on where it stood. Its bytes are
/// counted only. `number` spreads those who come again.
///
/// # Errors
/// If hardly anything comes.
pub async fn fetch(
    at: SocketAddr,
    config: Arc<ClientConfig>,
    path: &str,
    size: u64,
    number: u32,
) -> io::Result<()> {
    let mut link = BulkLink::connect(at, Arc::clone(&config)).await?;
    for _ in 0..TRIES {
        let have = link.received;
        if have >= size {
            return Ok(());
        }
        let range = if have > 0 { format!("Range: bytes={have}-\r\n") } else { String::new() };
        match link.count(&format!("GET {path}"), &range).await {
            Ok(answer) if answer.status == 503 => {
                let seconds = answer.number("retry-after").unwrap_or(5);
                sleep(Duration::from_millis(1000 * seconds + u64::from(number % 100) * 20 * seconds)).await;
            }
            Ok(answer) if matches!(answer.status, 200 | 206) => {}
            Ok(answer) => return Err(io::Error::other(format!("the answer is {}", answer.status))),
            Err(_) => {
                let received = link.received;
                link = BulkLink::connect(at, Arc::clone(&config)).await?;
                link.received = received;
            }
        }
    }
    Err(io::Error::other("too many tries"))
}

impl BulkLink {
    /// Connects.
    ///
    /// # Errors
    /// If there is no connection.
    pub async fn connect(at: SocketAddr, config: Arc<ClientConfig>) -> io::Result<Self> {
        let stream = TcpStream::connect(at).await?;
        stream.set_nodelay(true)?;
        let link = TlsConnector::from(config).connect(ServerName::from(at.ip()), stream).await?;
        Ok(Self { stream: BufReader::with_capacity(CHUNK, link), received: 0 })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the link is gone.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Sends a request with these header lines (each with its end) and this body, and reads the answer.
    ///
    /// # Errors
    /// If the link is gone.
    pub async fn ask(&mut self, line: &str, headers: &str, body: &[u8]) -> io::Result<Answer> {
        self.begin(line, headers, body).await?;
        self.answer(!line.starts_with("HEAD "), true).await
    }

    /// The same, but of the answer's body only the length is kept, in [`BulkLink::received`].
    ///
    /// # Errors
    /// If the link is gone.
    pub async fn count(&mut self, line: &str, headers: &str) -> io::Result<Answer> {
        self.begin(line, headers, &[]).await?;
        self.answer(true, false).await
    }

    async fn begin(&mut self, line: &str, headers: &str, body: &[u8]) -> io::Result<()> {
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        self.send(format!("{line} HTTP/1.1\r\nHost: manager\r\n{headers}{length}\r\n").as_bytes()).await?;
        if body.is_empty() { Ok(()) } else { self.send(body).await }
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// If it is none, or the link is gone before its end.
    pub async fn answer(&mut self, has_body: bool, is_kept: bool) -> io::Result<Answer> {
        let status = self.line().await?;
        let code = status.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let code = code.ok_or_else(|| io::Error::other(format!("no answer: {status}")))?;
        let mut answer = Answer { status: code, headers: Vec::new(), body: Vec::new() };
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { break };
            answer.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut left = answer.number("content-length").filter(|_| has_body).unwrap_or(0);
        let mut chunk = vec![0; CHUNK];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let read = self.stream.read(&mut chunk[..most]).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= read as u64;
            self.received += read as u64;
            if is_kept {
                answer.body.extend_from_slice(&chunk[..read]);
            }
        }
        Ok(answer)
    }

    async fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if (&mut self.stream).take(8192).read_line(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}
