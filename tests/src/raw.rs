//! TLS connections made by hand, for saying what no program of ours would say.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject as _,
};
use tm_protocol::{
    frame,
    message::{Hello, ToAgent, ToManager},
};

/// How long a hand-made connection waits for bytes.
const READ: Duration = Duration::from_secs(30);

/// A client certificate with its key.
#[derive(Debug)]
pub struct Identity {
    /// The chain, its own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key.
    pub key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Takes the certificate and the key that lie in an agent's folder.
    ///
    /// # Panics
    /// If there is not exactly one key, or no certificate that belongs to it.
    pub fn steal(folder: &Path) -> Self {
        let (mut certificates, mut keys) = (Vec::new(), Vec::new());
        let mut open = vec![folder.to_path_buf()];
        let mut names = Vec::new();
        while let Some(path) = open.pop() {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                let entries = fs::read_dir(&path).into_iter().flatten().flatten();
                open.extend(entries.map(|entry| entry.path()));
            } else if meta.is_file() {
                names.push(path.display().to_string());
                let Ok(bytes) = fs::read(&path) else { continue };
                certificates.extend(CertificateDer::pem_slice_iter(&bytes).flatten());
                keys.extend(PrivateKeyDer::from_pem_slice(&bytes).ok());
                // Or DER as it is: both begin a sequence with a long length.
                if bytes.starts_with(&[0x30]) && path.extension().is_some_and(|extension| extension == "der")
                {
                    match PrivateKeyDer::try_from(bytes.clone()) {
                        Ok(key) => keys.push(key),
                        Err(_) => certificates.push(CertificateDer::from(bytes)),
                    }
                }
            }
        }
        assert_eq!(keys.len(), 1, "one private key lies in {}: {names:?}", folder.display());
        let key = keys.remove(0);
        let own = certificates.into_iter().find(|certificate| belongs(certificate, &key));
        let own = own.unwrap_or_else(|| panic!("no certificate of that key among {names:?}"));
        Self { chain: vec![own], key }
    }

    /// An identity as an agent would have it, vouched for by a CA that nobody knows.
    ///
    /// # Panics
    /// If `uri` cannot stand in a certificate.
    pub fn foreign(uri: &str) -> Self {
        use rcgen::{
            BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
        };
        let ca_key = KeyPair::generate().expect("keys can be made");
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().expect("keys can be made");
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(uri.try_into().expect("a URI is ASCII"))];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = leaf.signed_by(&key, &issuer).expect("certificates can be made");
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Self { chain: vec![certificate.der().clone()], key: key.into() }
    }

    /// A certificate that the fleet's own authority (its folder is `ca`) signs, whatever it says: only a test
    /// that has the authority's key in its hands can make one.
    ///
    /// # Panics
    /// If the authority's files cannot be used.
    #[must_use]
    pub fn signed(ca: &Path, uri: &str, client: bool, serial: &[u8], expired: bool) -> Self {
        use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType, SerialNumber};
        let read = |name| fs::read(ca.join(name)).expect("the manager has an authority");
        let ca_key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(read("key.der")));
        let ca_key = KeyPair::try_from(&ca_key).expect("the authority's key can be read");
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(read("certificate.der")), ca_key)
            .expect("the authority's certificate can be read");
        let key = KeyPair::generate().expect("keys can be made");
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(uri.try_into().expect("a URI is ASCII"))];
        leaf.serial_number = Some(SerialNumber::from_slice(serial));
        leaf.extended_key_usages = vec![if client {
            ExtendedKeyUsagePurpose::ClientAuth
        } else {
            ExtendedKeyUsagePurpose::ServerAuth
        }];
        if expired {
            leaf.not_before = rcgen::date_time_ymd(2020, 1, 1);
            leaf.not_after = rcgen::date_time_ymd(2021, 1, 1);
        }
        let certificate = leaf.signed_by(&key, &issuer).expect("certificates can be made");
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Self { chain: vec![certificate.der().clone()], key: key.into() }
    }

    /// A copy.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

fn belongs(certificate: &CertificateDer<'static>, key: &PrivateKeyDer<'static>) -> bool {
    let Ok(signer) = aws_lc_rs::sign::any_supported_type(key) else { return false };
    let certified = rustls::sign::CertifiedKey::new(vec![certificate.clone()], signer);
    certified.keys_match().is_ok()
}

/// A TLS connection made by hand.
#[derive(Debug)]
pub struct Raw {
    stream: StreamOwned<ClientConnection, TcpStream>,
    buffer: BytesMut,
}

impl Raw {
    /// Connects and completes this side's handshake. (In TLS 1.3 a refused client certificate shows only at
    /// the first read.)
    ///
    /// # Errors
    /// If there is no connection, or the handshake is refused while it lasts.
    pub fn connect(address: SocketAddr, alpn: &[u8], identity: Option<&Identity>) -> io::Result<Self> {
        let config = client_config(alpn, identity)?;
        let tcp = TcpStream::connect(address)?;
        tcp.set_read_timeout(Some(READ))?;
        tcp.set_write_timeout(Some(READ))?;
        let name = ServerName::from(address.ip());
        let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self { stream, buffer: BytesMut::new() })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the peer has closed.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Sends a message as it should be sent.
    ///
    /// # Errors
    /// If the peer has closed.
    ///
    /// # Panics
    /// If the message is too long for its type.
    pub fn say(&mut self, message: &ToManager) -> io::Result<()> {
        let mut buffer = BytesMut::new();
        message.encode(&mut buffer).expect("a proper message fits");
        self.send(&buffer)
    }

    /// The next message; `None` when the peer has closed.
    ///
    /// # Errors
    /// If nothing comes in time.
    pub fn hear(&mut self) -> io::Result<Option<ToAgent>> {
        loop {
            while let Some(frame) = frame::take(&mut self.buffer, ToAgent::limit).map_err(io::Error::other)? {
                if let Some(message) = ToAgent::decode(&frame).map_err(io::Error::other)? {
                    return Ok(Some(message));
                }
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(error) if is_patience(&error) => return Err(error),
                // Reset, alert, cut off: closed, however impolitely.
                Err(_) => return Ok(None),
            }
        }
    }

    /// Why the peer closes: the error's text, empty if it was closed politely.
    ///
    /// # Errors
    /// If nothing comes in time.
    pub fn ending(&mut self) -> io::Result<String> {
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(String::new()),
                Ok(_) => {}
                Err(error) if is_patience(&error) => return Err(error),
                Err(error) => return Ok(error.to_string()),
            }
        }
    }

    /// Whether the peer closes (politely or not) before `patience` is over, whatever it still says.
    ///
    /// # Panics
    /// If the socket cannot be set up.
    pub fn is_closed_within(&mut self, patience: Duration) -> bool {
        let end = std::time::Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return false;
            }
            self.stream.sock.set_read_timeout(Some(left)).expect("time is left");
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return !is_patience(&error),
            }
        }
    }
}

fn is_patience(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// TLS that believes every server.
///
/// # Errors
/// If the identity's certificate and key do not belong together.
pub fn client_config(alpn: &[u8], identity: Option<&Identity>) -> io::Result<Arc<ClientConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut config = match identity.map(Identity::copy) {
        Some(Identity { chain, key }) => {
            builder.with_client_auth_cert(chain, key).map_err(io::Error::other)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

/// A proper first message.
pub fn hello() -> ToManager {
    Hello {
        min_version: tm_protocol::VERSION,
        max_version: tm_protocol::VERSION,
        agent_version: "0.0.0".into(),
        boot_id: "00000000-0000-4000-8000-000000000000".into(),
        process_nonce: 42,
        task_kinds: vec![],
        stream: "01890000-0000-7000-8000-000000000001".parse().expect("this is an id"),
        clock_ms: 1_750_000_000_000,
        last_failure: None,
    }
    .into()
}

/// A `GET` by hand: status and body.
///
/// # Panics
/// If there is no answer.
pub fn get(
    address: SocketAddr,
    path: &str,
    token: Option<&str>,
    identity: Option<&Identity>,
) -> (u16, Vec<u8>) {
    let mut raw = Raw::connect(address, b"http/1.1", identity).expect("the administrators' port answers");
    let bearer = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let host = format!("Host: {address}\r\n");
    raw.send(format!("GET {path} HTTP/1.1\r\n{host}{bearer}Connection: close\r\n\r\n").as_bytes())
        .expect("a request can be sent");
    let mut answer = Vec::new();
    // An end without TLS's own goodbye is still an end; the length is checked below.
    let _ = raw.stream.read_to_end(&mut answer);
    let split = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("an answer has a head");
    let head = String::from_utf8_lossy(&answer[..split]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("an answer has a status");
    let body = answer[split + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        return (status, unchunk(&body));
    }
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
    assert_eq!(length, Some(body.len()), "the whole body arrived\n{head}");
    (status, body)
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = body.windows(2).position(|w| w == b"\r\n") {
        let length = usize::from_str_radix(&String::from_utf8_lossy(&body[..end]), 16).unwrap_or(0);
        let Some(chunk) = body.get(end + 2..end + 2 + length).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        out.extend_from_slice(chunk);
        body = body.get(end + 2 + length + 2..).unwrap_or_default();
    }
    out
}

/// Believes every server: what a test connects to is what it has started.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
