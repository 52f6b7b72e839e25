//! Receivers of threat events, in threads: real TLS, and the bad manners that a test asks for.

use std::{
    io::{self, Read, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned, crypto::aws_lc_rs,
    server::WebPkiClientVerifier,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;

type Link = StreamOwned<ServerConnection, TcpStream>;

/// An authority for receivers and their clients.
pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(super) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("keys can be made");
        Self(CertifiedIssuer::self_signed(params, key).expect("certificates can be made"))
    }

    /// Writes its certificate where an exporter finds it.
    pub(super) fn write(&self, path: &Path) -> PathBuf {
        std::fs::write(path, self.0.as_ref().pem()).expect("the folder is writable");
        path.to_path_buf()
    }

    fn leaf(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("keys can be made");
        (params.signed_by(&key, &self.0).expect("certificates can be made"), key)
    }

    /// Writes a client's certificate and key.
    pub(super) fn client(&self, folder: &Path) -> (PathBuf, PathBuf) {
        let (certificate, key) = self.leaf("manager.example", ExtendedKeyUsagePurpose::ClientAuth);
        let paths = (folder.join("client.pem"), folder.join("client.key"));
        std::fs::write(&paths.0, certificate.pem()).expect("the folder is writable");
        std::fs::write(&paths.1, key.serialize_pem()).expect("the folder is writable");
        paths
    }

    /// What a server called `name` needs; with `clients`, only for those that this authority vouches for.
    pub(super) fn server(&self, name: &str, clients: bool) -> Arc<ServerConfig> {
        let (certificate, key) = self.leaf(name, ExtendedKeyUsagePurpose::ServerAuth);
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3 is there");
        let builder = if clients {
            let mut roots = RootCertStore::empty();
            roots.add(self.0.as_ref().der().clone()).expect("an authority");
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
        } else {
            builder.with_no_client_auth()
        };
        Arc::new(
            builder.with_single_cert(vec![certificate.der().clone()], key).expect("they belong together"),
        )
    }
}

/// Requests as they came: head and body.
pub(super) type Requests = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// What a receiver has taken in, one list a connection (syslog) or request (webhook).
#[derive(Debug, Clone, Default)]
pub(super) struct Heard(Arc<Mutex<Vec<Vec<Got>>>>);

/// One event as it came.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Got {
    pub(super) id: u64,
    /// The whole message, or the JSON of the event.
    pub(super) text: String,
}

impl Heard {
    pub(super) fn all(&self) -> Vec<Vec<Got>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn count(&self) -> usize {
        self.all().iter().map(Vec::len).sum()
    }

    /// Every number, in the order in which each was first heard. Within a connection numbers must grow.
    pub(super) fn in_order(&self) -> Vec<u64> {
        let mut first = Vec::new();
        for connection in self.all() {
            assert!(connection.is_sorted_by(|a, b| a.id < b.id), "out of order: {connection:?}");
            for got in connection {
                if !first.contains(&got.id) {
                    first.push(got.id);
                }
            }
        }
        first
    }

    fn begin(&self) -> usize {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Vec::new());
        all.len() - 1
    }

    fn put(&self, at: usize, got: Got) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[at].push(got);
    }
}

/// A listening thread; dropped, it ends.
pub(super) struct Receiver {
    pub(super) at: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    fn start(at: SocketAddr, mut serve: impl FnMut(TcpStream, &AtomicBool) -> bool + Send + 'static) -> Self {
        let listener = TcpListener::bind(at).expect("the port is free");
        listener.set_nonblocking(true).expect("a listener can be set up");
        let at = listener.local_addr().expect("a listener has an address");
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((tcp, _)) => {
                        tcp.set_nonblocking(false).expect("a socket can be set up");
                        tcp.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket can be set up");
                        if !serve(tcp, &stopping) {
                            return;
                        }
                    }
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        Self { at, stop, thread: Some(thread) }
    }

    /// Syslog: hears frames and answers `close_notify` with the same, unless `confirms` is false. After `most` events it
    /// is gone, in the middle of whatever there was.
    pub(super) fn syslog(
        at: SocketAddr,
        tls: Arc<ServerConfig>,
        heard: Heard,
        most: Option<usize>,
        confirms: bool,
    ) -> Self {
        Self::start(at, move |tcp, _| {
            let place = heard.begin();
            let Ok(connection) = ServerConnection::new(Arc::clone(&tls)) else { return true };
            let mut link = StreamOwned::new(connection, tcp);
            loop {
                if most.is_some_and(|most| heard.count() >= most) {
                    return false;
                }
                match frame(&mut link) {
                    Ok(Some(message)) => heard.put(place, Got { id: number(&message), text: message }),
                    Ok(None) => break,
                    Err(_) => return true,
                }
            }
            if confirms {
                link.conn.send_close_notify();
                let _ = link.conn.complete_io(&mut link.sock);
            }
            true
        })
    }

    /// A webhook that answers with `statuses`, one after the other, then 200; 0 is never to answer.
    pub(super) fn webhook(
        at: SocketAddr,
        tls: Arc<ServerConfig>,
        heard: Heard,
        requests: Requests,
        mut statuses: Vec<u16>,
    ) -> Self {
        Self::start(at, move |tcp, stop| {
            let Ok(connection) = ServerConnection::new(Arc::clone(&tls)) else { return true };
            let mut link = StreamOwned::new(connection, tcp);
            let Ok((head, body)) = request(&mut link) else { return true };
            let status = if statuses.is_empty() { 200 } else { statuses.remove(0) };
            let batch: Value = serde_json::from_slice(&body).expect("a batch is JSON");
            let events = batch["events"].as_array().expect("a batch has events").clone();
            requests.lock().unwrap_or_else(PoisonError::into_inner).push((head, body));
            if status == 0 {
                // Until the other side has had enough.
                while !stop.load(Ordering::Relaxed) && !matches!(link.read(&mut [0; 64]), Ok(0) | Err(_)) {}
                return true;
            }
            if status == 200 {
                let place = heard.begin();
                for event in events {
                    let id = event["id"].as_u64().expect("an event has a number");
                    heard.put(place, Got { id, text: event.to_string() });
                }
            }
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            let _ = link.write_all(answer.as_bytes());
            link.conn.send_close_notify();
            let _ = link.flush();
            true
        })
    }

    /// Whether it has ended by itself.
    pub(super) fn is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "a receiver failed");
        }
    }
}

/// One message by octet counting; `None` after the other side's `close_notify`.
fn frame(link: &mut Link) -> io::Result<Option<String>> {
    let mut length = 0_usize;
    let mut is_first = true;
    loop {
        let mut byte = [0];
        if link.read(&mut byte)? == 0 {
            return if is_first { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        is_first = false;
        match byte[0] {
            digit @ b'0'..=b'9' => length = length * 10 + usize::from(digit - b'0'),
            b' ' => break,
            other => panic!("no octet count: {other}"),
        }
    }
    assert!((1..=8192).contains(&length), "a message of {length} bytes");
    let mut message = vec![0; length];
    link.read_exact(&mut message)?;
    let message = String::from_utf8(message).expect("a message is UTF-8");
    assert!(message.starts_with('<') && !message.contains(|c: char| c.is_control()), "{message:?}");
    Ok(Some(message))
}

fn number(message: &str) -> u64 {
    let (_, rest) = message.split_once("[event@32473 id=\"").expect("it has structured data");
    rest.split('"').next().and_then(|id| id.parse().ok()).expect("an event has a number")
}

/// The head and the body of a request.
fn request(link: &mut Link) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        link.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.expect("a body has a length")];
    link.read_exact(&mut body)?;
    Ok((String::from_utf8_lossy(&bytes).into_owned(), body))
}
