//! A manager for tests: real TLS and HTTP on a loopback port, with answers that a test writes down.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use serde_json::Value;
use tm_protocol::ids::Sha256;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use crate::{client::Client, profile::Profile, tls::tests::Authority};

/// A client whose profile names this address and authority.
pub(crate) fn client(address: SocketAddr, ca: Sha256) -> Client {
    let text = format!("url = \"https://{address}\"\nca_sha256 = \"{ca}\"\ntoken = \"t0ken\"\n");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("profile.toml");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    Client::new(Profile::load(Some(&path)).unwrap()).unwrap()
}

/// A manager's side of TLS.
pub(crate) fn acceptor(authority: &Authority) -> TlsAcceptor {
    let (leaf, key) = authority.manager();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf, authority.der()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// What was asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// `GET /v1/tasks?limit=50`.
    pub(crate) line: String,
    /// The body; null if there is none.
    pub(crate) body: Value,
}

/// A manager that says what a test wants it to say.
pub(crate) struct Scripted {
    pub(crate) client: Client,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Scripted {
    /// Answers with a status and JSON; where `answer` gives nothing, the connection breaks.
    pub(crate) async fn start(
        answer: impl Fn(&Asked) -> Option<(u16, Value)> + Send + Sync + 'static,
    ) -> Self {
        let authority = Authority::new();
        let acceptor = acceptor(&authority);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap(), authority.digest());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), Arc::clone(&asked));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, answer, log) = (acceptor.clone(), Arc::clone(&answer), Arc::clone(&log));
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    while let Some(asked) = read(&mut stream).await {
                        log.lock().unwrap().push(asked.clone());
                        let Some((status, body)) = answer(&asked) else { return };
                        let body = body.to_string();
                        let head =
                            format!("HTTP/1.1 {status} Said\r\ncontent-length: {}\r\n\r\n", body.len());
                        if stream.write_all((head + &body).as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { client, asked }
    }

    /// Everything asked so far, in order.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The request lines of it.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.asked().into_iter().map(|asked| asked.line).collect()
    }
}

/// Reads one request; `None` at the end.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.ok()?;
    let line = head.lines().next()?.trim_end_matches(" http/1.1");
    let (method, path) = line.split_once(' ')?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    Some(Asked { line: format!("{} {path}", method.to_uppercase()), body })
}
