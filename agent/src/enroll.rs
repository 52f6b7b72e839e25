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
use zeroize::Zeroizing;

use crate::{
    config::{self, ConfigError},
    connection::{self, ConnectError, Dialler, proxy::Proxy},
    paths::{Paths, make_folder, replace, sync_folder},
    platform::facts,
    tls::{self, KnownTime, Pin},
};

/// How long the manager may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

/// In the folder of an identity: the endpoint that the state folder was copied from, until what is its is set aside.
const COPIED: &str = "copied-from";

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
    #[error(transparent)]
    Settings(#[from] ConfigError),
}

/// Who this endpoint is and whom it trusts.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) endpoint: EndpointId,
    pub(crate) fleet: FleetId,
    pub(crate) addresses: Vec<Address>,
    certificate: CertificateDer<'static>,
    /// The authorities that vouch for managers; never empty.
    roots: Vec<CertificateDer<'static>>,
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
        mend(paths).map_err(|source| EnrollError::Read { path: shown.clone(), source })?;
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
            roots: tls::roots_of(&read("ca.der")?).ok_or_else(|| EnrollError::Damaged(shown.clone()))?,
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(read("key.der")?)),
        })
    }

    /// The TLS configuration for talking to our managers.
    pub(crate) fn tls(&self, alpn: &[u8], time: &KnownTime) -> Result<rustls::ClientConfig, rustls::Error> {
        let pin = Pin::Certificates(self.roots.clone(), self.fleet, time.clone());
        tls::client(pin, Some((vec![self.certificate.clone()], self.key.clone_key())), alpn)
    }

    /// When the certificate begins and ends, in milliseconds since 1970.
    pub(crate) fn validity_ms(&self) -> (i64, i64) {
        parse_x509_certificate(&self.certificate).map_or((0, 0), |(_, parsed)| {
            let validity = parsed.validity();
            let ms = |time: x509_parser::time::ASN1Time| time.timestamp().saturating_mul(1000);
            (ms(validity.not_before), ms(validity.not_after))
        })
    }

    /// Writes the identity of `endpoint`, with the managers and authorities of this one, beside its place. If that is
    /// another endpoint than this one, it is marked as such ([`set_aside`]).
    pub(crate) fn write_as(
        &self,
        paths: &Paths,
        endpoint: EndpointId,
        certificate: &[u8],
        key: &[u8],
    ) -> io::Result<()> {
        let managers = Managers { fleet: self.fleet, endpoint, addresses: self.addresses.clone() };
        write_beside(paths, &managers, certificate, &tls::one_after_the_other(&self.roots), key)?;
        if endpoint == self.endpoint {
            return Ok(());
        }
        replace(&paths.new_identity().join(COPIED), self.endpoint.to_string().as_bytes())
    }

    /// The key of the certificate, to sign receipts with.
    ///
    /// # Errors
    /// If it is of a kind that cannot sign.
    pub(crate) fn signing_key(&self) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        rustls::crypto::aws_lc_rs::sign::any_supported_type(&self.key)
    }

    /// Trusts these authorities from now on, after the next start too. `false` if they are the ones it trusts.
    ///
    /// # Errors
    /// If the disk does not take it; the present ones then stay.
    pub(crate) fn keep_roots(
        &mut self,
        paths: &Paths,
        roots: Vec<CertificateDer<'static>>,
    ) -> io::Result<bool> {
        if roots == self.roots {
            return Ok(false);
        }
        replace(&paths.identity().join("ca.der"), &tls::one_after_the_other(&roots))?;
        self.roots = roots;
        Ok(true)
    }

    /// Whether the certificate comes from this authority.
    pub(crate) fn is_from(&self, authority: &CertificateDer<'_>) -> bool {
        tls::is_issued_by(&self.certificate, authority)
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

/// Sets aside what a copied folder holds of the endpoint that it was copied from, if this identity took the place of
/// that one's and it was not done yet: `journal` becomes `journal.of-<endpoint>`, `vault` becomes `vault.of-<endpoint>`.
/// Nothing of it is carried out, reported or removed. To be called before either is opened.
///
/// # Errors
/// If the disk does not let it; it is then tried again at the next start.
pub(crate) fn set_aside(paths: &Paths) -> io::Result<()> {
    let mark = paths.identity().join(COPIED);
    let of = match fs::read_to_string(&mark) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // A mark that cannot be read means the same.
    let of = of.trim().parse::<EndpointId>().map_or_else(|_| "another".to_owned(), |id| id.to_string());
    for folder in [paths.journal(), paths.vault()] {
        // Done before a crash, or never there.
        if !folder.exists() {
            continue;
        }
        // What was set aside of the same endpoint before stays.
        let places = std::iter::once(format!("of-{of}")).chain((2..).map(|n| format!("of-{of}.{n}")));
        if let Some(aside) = places.map(|end| folder.with_extension(end)).find(|aside| !aside.exists()) {
            fs::rename(&folder, &aside)?;
        }
    }
    sync_folder(paths.root())?;
    fs::remove_file(&mark)?;
    sync_folder(&paths.identity())
}

/// How the managers are reached while an endpoint is enrolled, and afterwards.
#[derive(Debug, Default)]
pub(crate) struct Way {
    /// The proxy, if there is one.
    pub(crate) proxy: Option<Arc<Proxy>>,
    /// Its setting, if it is to be kept for the agent.
    pub(crate) setting: Option<Zeroizing<String>>,
}

/// Makes a key, has it certified by the manager that `token` names, and keeps the result.
///
/// # Errors
/// If the endpoint is enrolled already, no manager lets it in, or the disk does not take it.
pub(crate) async fn enroll(
    paths: &Paths,
    token: &EnrollmentToken,
    way: &Way,
) -> Result<EndpointId, EnrollError> {
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
    let (reply, ca) = ask(token, request, way.proxy.clone()).await?;
    let (endpoint, certificate, addresses) = match reply {
        // Which authority is trusted is what the token says; the reply may name another one that issues now.
        EnrollReply::Enrolled { endpoint, certificate, ca: _, addresses } => {
            (endpoint, certificate, addresses)
        }
        EnrollReply::Refused(failure) => return Err(EnrollError::Refused(failure)),
    };
    let certificate = certified(certificate, &key)?;
    let identity =
        tls::identity_of(&certificate).ok_or(EnrollError::Answer("the certificate names nobody"))?;
    if identity.role != Role::Endpoint(endpoint) {
        return Err(EnrollError::Answer("the certificate is for somebody else"));
    }
    let addresses = if addresses.is_empty() { token.addresses.clone() } else { addresses };
    let managers = Managers { fleet: identity.fleet, endpoint, addresses };
    if let Some(setting) = &way.setting {
        make_folder(paths.root())
            .map_err(|source| EnrollError::Keep { path: paths.root().display().to_string(), source })?;
        config::keep_proxy(paths, setting)?;
    }
    // Before the identity: an endpoint that is enrolled knows whose patterns it may use.
    connection::trust::anchor(paths, token.root)
        .map_err(|source| EnrollError::Keep { path: paths.trust().display().to_string(), source })?;
    keep(paths, &managers, &certificate, &ca, &key.serialize_der())
        .map_err(|source| EnrollError::Keep { path: paths.identity().display().to_string(), source })?;
    Ok(endpoint)
}

/// A certificate that is one and for `key`.
///
/// # Errors
/// If it is not.
pub(crate) fn certified(der: Vec<u8>, key: &KeyPair) -> Result<CertificateDer<'static>, EnrollError> {
    let certificate = CertificateDer::from(der);
    let ours = parse_x509_certificate(&certificate).is_ok_and(|(_, parsed)| {
        parsed.public_key().raw == rcgen::PublicKeyData::subject_public_key_info(key).as_slice()
    });
    if ours { Ok(certificate) } else { Err(EnrollError::Answer("the certificate is for another key")) }
}

/// Asks each address in turn; the first manager that answers decides.
async fn ask(
    token: &EnrollmentToken,
    request: EnrollRequest,
    proxy: Option<Arc<Proxy>>,
) -> Result<(EnrollReply, CertificateDer<'static>), EnrollError> {
    let config = tls::client(Pin::Digest(token.ca), None, ALPN_ENROLL)
        .map_err(|_| EnrollError::Answer("TLS cannot be set up"))?;
    let dialler = Dialler::new(config, proxy);
    let mut buffer = BytesMut::new();
    ToManager::from(request)
        .encode(&mut buffer)
        .map_err(|_| EnrollError::Answer("the request is too large"))?;
    let mut failures = Vec::new();
    for address in &token.addresses {
        match timeout(ANSWER, exchange(address, &dialler, &buffer, token.ca)).await {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(error)) => failures.push(format!("{address}: {}", connection::chain(&error))),
            Err(_) => failures.push(format!("{address}: no answer in {} s", ANSWER.as_secs())),
        }
    }
    Err(EnrollError::Unreachable(failures.join("; ")))
}

async fn exchange(
    address: &Address,
    dialler: &Dialler,
    request: &[u8],
    authority: Sha256,
) -> Result<(EnrollReply, CertificateDer<'static>), ConnectError> {
    let mut stream = dialler.dial(address).await?;
    // The handshake was good, so that it is there.
    let ca = stream.get_ref().1.peer_certificates().unwrap_or_default().iter();
    let ca = ca.map(|certificate| certificate.clone().into_owned()).find(|c| Sha256::of(c) == authority);
    let ca = ca.ok_or(ConnectError::Protocol("a chain without the authority"))?;
    connection::write(&mut stream, request).await?;
    let mut buffer = BytesMut::new();
    match connection::read(&mut stream, &mut buffer).await? {
        ToAgent::EnrollReply(reply) => Ok((reply, ca)),
        ToAgent::Goodbye(goodbye) => Ok((EnrollReply::Refused(goodbye.failure), ca)),
        ToAgent::Welcome(_)
        | ToAgent::Ping(_)
        | ToAgent::Pong(_)
        | ToAgent::Assign(_)
        | ToAgent::ReportStored(_)
        | ToAgent::NoticesStored(_)
        | ToAgent::Renewed(_)
        | ToAgent::Authorities(_)
        | ToAgent::Held(_)
        | ToAgent::NewIdentity(_)
        | ToAgent::RenewNow(_)
        | ToAgent::Cancel(_) => Err(ConnectError::Protocol("an answer that was not asked for")),
    }
}

/// Puts an identity back that an exchange moved away before it was cut.
///
/// # Errors
/// If the disk does not let it.
pub(crate) fn mend(paths: &Paths) -> io::Result<()> {
    if paths.old_identity().exists() && !paths.identity().exists() {
        fs::rename(paths.old_identity(), paths.identity())?;
        sync_folder(paths.root())?;
    }
    Ok(())
}

fn keep(paths: &Paths, managers: &Managers, certificate: &[u8], ca: &[u8], key: &[u8]) -> io::Result<()> {
    make_folder(paths.root())?;
    write_beside(paths, managers, certificate, ca, key)?;
    fs::rename(paths.new_identity(), paths.identity())?;
    sync_folder(paths.root())
}

fn write_beside(
    paths: &Paths,
    managers: &Managers,
    certificate: &[u8],
    ca: &[u8],
    key: &[u8],
) -> io::Result<()> {
    let new = paths.new_identity();
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    make_folder(&new)?;
    replace(&new.join("key.der"), key)?;
    replace(&new.join("certificate.der"), certificate)?;
    replace(&new.join("ca.der"), ca)?;
    replace(&new.join("managers.json"), &serde_json::to_vec_pretty(managers)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_copied_is_set_aside_once_wherever_the_machine_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path().to_path_buf());
        let mark = paths.identity().join(COPIED);
        let of: EndpointId = "01890c5e-9f4b-7cc0-98ab-0123456789ab".parse().unwrap();
        let there = |name: &str| folder.path().join(name).exists();
        for path in [paths.identity(), paths.journal(), paths.vault()] {
            fs::create_dir(path).unwrap();
        }
        // Nothing was copied.
        set_aside(&paths).unwrap();
        assert!(there("journal") && there("vault"));
        // The machine stopped between the two, and before the mark went.
        fs::write(&mark, of.to_string()).unwrap();
        let (journal, vault) = (format!("journal.of-{of}"), format!("vault.of-{of}"));
        fs::rename(paths.journal(), folder.path().join(&journal)).unwrap();
        set_aside(&paths).unwrap();
        assert!(there(&journal) && there(&vault) && !mark.exists() && !there("journal") && !there("vault"));
        // What is made afterwards is its own.
        fs::create_dir(paths.journal()).unwrap();
        set_aside(&paths).unwrap();
        assert!(there("journal"));
        // A mark that is damaged is no reason to use what is not one's own.
        fs::write(&mark, "nonsense").unwrap();
        set_aside(&paths).unwrap();
        assert!(there("journal.of-another") && !there("journal") && !mark.exists());
        // What was set aside before stays what it is.
        fs::write(&mark, of.to_string()).unwrap();
        fs::create_dir(paths.journal()).unwrap();
        fs::write(folder.path().join(&journal).join("old"), "x").unwrap();
        set_aside(&paths).unwrap();
        assert!(there(&format!("{journal}/old")) && there(&format!("{journal}.2")) && !there("journal"));
    }
}
