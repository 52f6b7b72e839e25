//! How an endpoint gets its identity, and how a running agent reads it back.
//!
//! **Invariant:** the key is made here and never leaves; an identity is there whole or not at all.

use std::{fs, io, sync::Arc, time::Duration};

use bytes::BytesMut;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::SigningKey,
};
use serde::{Deserialize, Serialize};
use tm_protocol::{
    ALPN_ENROLL,
    address::Address,
    identity::Role,
    ids::{EndpointId, FleetId, Sha256},
    message::{EnrollReply, EnrollRequest, ToAgent, ToManager},
    token::EnrollmentToken,
};
use tokio::time::timeout;
use x509_parser::parse_x509_certificate;

use crate::{
    connection::{self, ConnectError},
    paths::{Paths, make_folder, replace, sync_folder},
    platform::facts,
    tls::{self, Pin},
};

/// How long the manager may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

/// Why an endpoint was not enrolled, or its identity cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrollError {
    #[error("this folder already holds the identity of endpoint {0}")]
    AlreadyEnrolled(EndpointId),
    #[error("this endpoint is not enrolled")]
    NotEnrolled,
    #[error("cannot keep the identity in `{path}`")]
    Keep { path: String, source: io::Error },
    #[error("cannot read the identity in `{path}`")]
    Read { path: String, source: io::Error },
    #[error("the identity in `{0}` is damaged")]
    Damaged(String),
    #[error("cannot make a key")]
    Key(#[source] rcgen::Error),
    #[error("no manager could be reached: {0}")]
    Unreachable(String),
    #[error("the manager refused: {0}")]
    Refused(tm_protocol::report::Failure),
    #[error("the manager's answer makes no sense: {0}")]
    Answer(&'static str),
}

/// Who this endpoint is and whom it trusts.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) endpoint: EndpointId,
    pub(crate) fleet: FleetId,
    pub(crate) addresses: Vec<Address>,
    certificate: CertificateDer<'static>,
    ca: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Managers {
    fleet: FleetId,
    endpoint: EndpointId,
    addresses: Vec<Address>,
}

impl Enrolled {
    /// Reads the identity that [`enroll`] wrote.
    pub(crate) fn load(paths: &Paths) -> Result<Self, EnrollError> {
        let folder = paths.identity();
        let shown = folder.display().to_string();
        let read = |name: &str| match fs::read(folder.join(name)) {
            Ok(bytes) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.exists() => {
                Err(EnrollError::NotEnrolled)
            }
            Err(source) => Err(EnrollError::Read { path: shown.clone(), source }),
        };
        let managers: Managers = serde_json::from_slice(&read("managers.json")?)
            .map_err(|_| EnrollError::Damaged(shown.clone()))?;
        let certificate = CertificateDer::from(read("certificate.der")?);
        let says = tls::identity_of(&certificate).ok_or_else(|| EnrollError::Damaged(shown.clone()))?;
        if says.role != Role::Endpoint(managers.endpoint) || says.fleet != managers.fleet {
            return Err(EnrollError::Damaged(shown));
        }
        Ok(Self {
            endpoint: managers.endpoint,
            fleet: managers.fleet,
            addresses: managers.addresses,
            certificate,
            ca: CertificateDer::from(read("ca.der")?),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(read("key.der")?)),
        })
    }

    /// The TLS configuration for talking to our managers.
    pub(crate) fn tls(&self, alpn: &[u8]) -> Result<rustls::ClientConfig, rustls::Error> {
        let pin = Pin::Certificate(self.ca.clone(), self.fleet);
        tls::client(pin, Some((vec![self.certificate.clone()], self.key.clone_key())), alpn)
    }

    /// The key of the certificate, to sign receipts with.
    ///
    /// # Errors
    /// If it is of a kind that cannot sign.
    pub(crate) fn signing_key(&self) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        rustls::crypto::aws_lc_rs::sign::any_supported_type(&self.key)
    }

    /// Keeps the managers' addresses for the next start.
    pub(crate) fn keep_addresses(&mut self, paths: &Paths, addresses: Vec<Address>) -> io::Result<()> {
        if addresses.is_empty() || addresses == self.addresses {
            return Ok(());
        }
        self.addresses.clone_from(&addresses);
        let managers = Managers { fleet: self.fleet, endpoint: self.endpoint, addresses };
        replace(&paths.identity().join("managers.json"), &serde_json::to_vec_pretty(&managers)?)
    }
}

/// Makes a key, has it certified by the manager that `token` names, and keeps the result.
pub(crate) async fn enroll(paths: &Paths, token: &EnrollmentToken) -> Result<EndpointId, EnrollError> {
    // A damaged identity is said before the token is spent: it could not be replaced afterwards.
    match Enrolled::load(paths) {
        Ok(enrolled) => return Err(EnrollError::AlreadyEnrolled(enrolled.endpoint)),
        Err(EnrollError::NotEnrolled) => {}
        Err(error) => return Err(error),
    }
    let key = KeyPair::generate().map_err(EnrollError::Key)?;
    let csr = CertificateParams::default().serialize_request(&key).map_err(EnrollError::Key)?;
    let request = EnrollRequest {
        secret: *token.secret,
        csr: csr.der().to_vec(),
        host: facts::host_name(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let (endpoint, certificate, ca, addresses) = match ask(token, request).await? {
        EnrollReply::Enrolled { endpoint, certificate, ca, addresses } => {
            (endpoint, certificate, ca, addresses)
        }
        EnrollReply::Refused(failure) => return Err(EnrollError::Refused(failure)),
    };
    let certificate = CertificateDer::from(certificate);
    let identity =
        tls::identity_of(&certificate).ok_or(EnrollError::Answer("the certificate names nobody"))?;
    if Sha256::of(&ca) != token.ca {
        return Err(EnrollError::Answer("it sends another authority than the token names"));
    }
    if identity.role != Role::Endpoint(endpoint) {
        return Err(EnrollError::Answer("the certificate is for somebody else"));
    }
    let ours = parse_x509_certificate(&certificate).is_ok_and(|(_, parsed)| {
        parsed.public_key().raw == rcgen::PublicKeyData::subject_public_key_info(&key).as_slice()
    });
    if !ours {
        return Err(EnrollError::Answer("the certificate is for another key"));
    }
    let addresses = if addresses.is_empty() { token.addresses.clone() } else { addresses };
    let managers = Managers { fleet: identity.fleet, endpoint, addresses };
    // Before the identity: an endpoint that is enrolled knows whose patterns it may use.
    connection::trust::anchor(paths, token.root)
        .map_err(|source| EnrollError::Keep { path: paths.trust().display().to_string(), source })?;
    keep(paths, &managers, &certificate, &ca, &key.serialize_der())
        .map_err(|source| EnrollError::Keep { path: paths.identity().display().to_string(), source })?;
    Ok(endpoint)
}

/// Asks each address in turn; the first manager that answers decides.
async fn ask(token: &EnrollmentToken, request: EnrollRequest) -> Result<EnrollReply, EnrollError> {
    let config = tls::client(Pin::Digest(token.ca), None, ALPN_ENROLL)
        .map_err(|_| EnrollError::Answer("TLS cannot be set up"))?;
    let config = std::sync::Arc::new(config);
    let mut buffer = BytesMut::new();
    ToManager::from(request)
        .encode(&mut buffer)
        .map_err(|_| EnrollError::Answer("the request is too large"))?;
    let mut failures = Vec::new();
    for address in &token.addresses {
        match timeout(ANSWER, exchange(address, &config, &buffer)).await {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(error)) => failures.push(format!("{address}: {}", connection::chain(&error))),
            Err(_) => failures.push(format!("{address}: no answer in {} s", ANSWER.as_secs())),
        }
    }
    Err(EnrollError::Unreachable(failures.join("; ")))
}

async fn exchange(
    address: &Address,
    config: &std::sync::Arc<rustls::ClientConfig>,
    request: &[u8],
) -> Result<EnrollReply, ConnectError> {
    let mut stream = connection::dial(address, config).await?;
    connection::write(&mut stream, request).await?;
    let mut buffer = BytesMut::new();
    match connection::read(&mut stream, &mut buffer).await? {
        ToAgent::EnrollReply(reply) => Ok(reply),
        ToAgent::Goodbye(goodbye) => Ok(EnrollReply::Refused(goodbye.failure)),
        ToAgent::Welcome(_)
        | ToAgent::Ping(_)
        | ToAgent::Pong(_)
        | ToAgent::Assign(_)
        | ToAgent::ReportStored(_)
        | ToAgent::NoticesStored(_)
        | ToAgent::Cancel(_) => Err(ConnectError::Protocol("an answer that was not asked for")),
    }
}

fn keep(paths: &Paths, managers: &Managers, certificate: &[u8], ca: &[u8], key: &[u8]) -> io::Result<()> {
    make_folder(paths.root())?;
    let new = paths.new_identity();
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    make_folder(&new)?;
    replace(&new.join("key.der"), key)?;
    replace(&new.join("certificate.der"), certificate)?;
    replace(&new.join("ca.der"), ca)?;
    replace(&new.join("managers.json"), &serde_json::to_vec_pretty(managers)?)?;
    fs::rename(&new, paths.identity())?;
    sync_folder(paths.root())
}
