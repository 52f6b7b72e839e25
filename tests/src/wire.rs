//! The agents' wire, asynchronous: for many agents in one process.

use std::{io, net::SocketAddr, sync::Arc};

use bytes::{Buf as _, BytesMut};
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tm_protocol::{
    ALPN_CONTROL, ALPN_ENROLL, VERSION, frame,
    ids::{EndpointId, StreamId},
    message::{EnrollReply, EnrollRequest, Hello, Inventory, ToAgent, ToManager, Welcome},
    task::TaskKind,
    token::EnrollmentToken,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::raw::{self, Identity};

/// An enrolled agent that is not a program.
#[derive(Debug, Clone)]
pub struct Persona {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Its host name.
    pub host: String,
    /// Its certificate (DER).
    pub certificate: Arc<[u8]>,
    /// Its private key (PKCS#8).
    pub key: Arc<[u8]>,
    config: Arc<ClientConfig>,
}

/// A control channel, read by one half and written by the other.
#[derive(Debug)]
pub struct Wire {
    /// What the manager says.
    pub ears: Ears,
    /// What the manager is told.
    pub mouth: Mouth,
}

/// The reading half.
#[derive(Debug)]
pub struct Ears {
    half: ReadHalf<TlsStream<TcpStream>>,
    buffer: BytesMut,
}

/// The writing half, with what waits to be written.
#[derive(Debug)]
pub struct Mouth {
    half: WriteHalf<TlsStream<TcpStream>>,
    waiting: BytesMut,
    unflushed: bool,
}

impl Persona {
    /// Makes a key and has it certified by the manager at `at`, with the secret of `token`.
    ///
    /// # Errors
    /// If there is no answer, or it is a refusal.
    pub async fn enroll(at: SocketAddr, token: &str, host: &str) -> io::Result<Self> {
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
        let ToAgent::EnrollReply(reply) = heard else {
            return Err(io::Error::other(format!("no answer to an enrollment: {heard:?}")));
        };
        match reply {
            EnrollReply::Enrolled { endpoint, certificate, .. } => {
                Self::known(endpoint, host, &certificate, &key.serialize_der())
            }
            EnrollReply::Refused(failure) => Err(io::Error::other(format!("refused: {failure}"))),
        }
    }

    /// One that was enrolled before, with its certificate (DER) and key (PKCS#8).
    ///
    /// # Errors
    /// If they are none, or not of each other.
    pub fn known(endpoint: EndpointId, host: &str, certificate: &[u8], key: &[u8]) -> io::Result<Self> {
        let private: PrivateKeyDer<'static> = PrivatePkcs8KeyDer::from(key.to_vec()).into();
        let identity = Identity { chain: vec![CertificateDer::from(certificate.to_vec())], key: private };
        let config = raw::client_config(ALPN_CONTROL, Some(&identity))?;
        Ok(Self { endpoint, host: host.to_owned(), certificate: certificate.into(), key: key.into(), config })
    }

    /// Opens a session.
    ///
    /// # Errors
    /// If there is none.
    pub async fn open(&self, at: SocketAddr, nonce: u64) -> io::Result<(Wire, Welcome)> {
        self.open_with(at, self.hello(nonce)).await
    }

    /// Opens a session with a first message of the caller's.
    ///
    /// # Errors
    /// If there is none.
    pub async fn open_with(&self, at: SocketAddr, hello: Hello) -> io::Result<(Wire, Welcome)> {
        let mut wire = Wire::with(at, Arc::clone(&self.config)).await?;
        wire.say(&hello.into()).await?;
        let heard = wire.ears.hear().await?;
        let ToAgent::Welcome(welcome) = heard else {
            return Err(io::Error::other(format!("no welcome: {heard:?}")));
        };
        Ok((wire, welcome))
    }

    /// Its first message. Its one stream is named like its endpoint.
    pub fn hello(&self, nonce: u64) -> Hello {
        Hello {
            min_version: VERSION,
            max_version: VERSION,
            agent_version: "0.0.0".into(),
            boot_id: "00000000-0000-4000-8000-000000000000".into(),
            process_nonce: nonce,
            task_kinds: TaskKind::ALL.iter().map(|kind| kind.number()).collect(),
            stream: StreamId::new(self.endpoint.uuid()),
            clock_ms: 1_750_000_000_000,
            last_failure: None,
        }
    }

    /// Its facts.
    pub fn inventory(&self) -> Inventory {
        Inventory {
            host: self.host.clone(),
            os: "Simulated".into(),
            kernel: "0".into(),
            arch: "x86_64".into(),
            cpu: "none".into(),
            cpus: 1,
            memory: 1 << 30,
            disks: vec![],
            addresses: vec!["192.0.2.1".into()],
            boot_id: "00000000-0000-4000-8000-000000000000".into(),
            agent_version: "0.0.0".into(),
        }
    }
}

impl Wire {
    /// Connects, believing every server.
    ///
    /// # Errors
    /// If there is no connection.
    pub async fn connect(at: SocketAddr, alpn: &[u8], identity: Option<&Identity>) -> io::Result<Self> {
        Self::with(at, raw::client_config(alpn, identity)?).await
    }

    async fn with(at: SocketAddr, config: Arc<ClientConfig>) -> io::Result<Self> {
        let stream = TcpStream::connect(at).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::from(at.ip());
        let link = TlsConnector::from(config).connect(name, stream).await?;
        let (read, write) = tokio::io::split(link);
        let ears = Ears { half: read, buffer: BytesMut::new() };
        let mouth = Mouth { half: write, waiting: BytesMut::new(), unflushed: false };
        Ok(Self { ears, mouth })
    }

    /// Says one message and waits until it is sent.
    ///
    /// # Errors
    /// If the link is gone.
    pub async fn say(&mut self, message: &ToManager) -> io::Result<()> {
        self.mouth.queue(message);
        while !self.mouth.is_empty() {
            self.mouth.push().await?;
        }
        Ok(())
    }
}

impl Ears {
    /// The next message. Safe to drop half-way.
    ///
    /// # Errors
    /// If the link has ended, or what comes is no message.
    pub async fn hear(&mut self) -> io::Result<ToAgent> {
        loop {
            while let Some(frame) = frame::take(&mut self.buffer, ToAgent::limit).map_err(io::Error::other)? {
                if let Some(message) = ToAgent::decode(&frame).map_err(io::Error::other)? {
                    return Ok(message);
                }
            }
            if self.half.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl Mouth {
    /// Puts a message behind those that wait to be sent.
    ///
    /// # Panics
    /// If it is too long for its type.
    pub fn queue(&mut self, message: &ToManager) {
        message.encode(&mut self.waiting).expect("a proper message fits");
    }

    /// Puts bytes as they are behind those that wait to be sent.
    pub fn queue_bytes(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
    }

    /// Bytes that wait to be sent.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether everything has been sent.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && !self.unflushed
    }

    /// Sends some of what waits. Safe to drop half-way: what was taken is counted at once.
    ///
    /// # Errors
    /// If the link is gone.
    pub async fn push(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            self.half.flush().await?;
            self.unflushed = false;
        } else {
            let n = self.half.write(&self.waiting).await?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.waiting.advance(n);
            self.unflushed = true;
        }
        Ok(())
    }
}
