//! TLS on both ports: version 1.3 only, no resumption (a resumed session would skip the look at the
//! certificate, and with it revocation).

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    CipherSuite, DigitallySignedStruct, DistinguishedName, Error as TlsError, RootCertStore, ServerConfig,
    SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tm_protocol::{
    ALPN_BULK, ALPN_CONTROL, ALPN_ENROLL, ALPN_RENEW,
    identity::{Role, authority_hint},
    ids::{EndpointId, FleetId},
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::{
    authorities::{Authorities, Live},
    ca::Authority,
};

/// The configurations of the agent port, chosen by what the client names (ALPN).
#[derive(Debug, Clone)]
pub(crate) struct AgentTls {
    pub(crate) control: Arc<ServerConfig>,
    pub(crate) bulk: Arc<ServerConfig>,
    pub(crate) enroll: Arc<ServerConfig>,
    /// Also for certificates that ended at most [`LATE`] ago.
    pub(crate) renew: Arc<ServerConfig>,
}

/// Whom a verified client certificate names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) endpoint: EndpointId,
    /// Lower-case hex.
    pub(crate) serial: String,
}

/// How long after its end a certificate may still be renewed.
const LATE: Duration = Duration::from_secs(30 * 86_400);

/// The certificates that both ports show: one of each authority that is trusted. They are exchanged while the manager
/// runs, long before they end.
#[derive(Debug)]
pub(crate) struct Shown {
    live: Arc<Live>,
    names: Vec<String>,
    now: RwLock<Vec<One>>,
}

/// One of them.
#[derive(Debug, Clone)]
struct One {
    /// By which clients name its authority.
    hint: Vec<u8>,
    is_oldest: bool,
    certificate: Arc<CertifiedKey>,
}

impl Shown {
    /// Makes the first ones, for these names.
    pub(crate) fn new(live: Arc<Live>, names: Vec<String>) -> anyhow::Result<Self> {
        let now = RwLock::new(Self::fresh(&live.now(), &names)?);
        Ok(Self { live, names, now })
    }

    fn fresh(authorities: &Authorities, names: &[String]) -> anyhow::Result<Vec<One>> {
        let oldest = authorities.all().first().map(Authority::digest);
        authorities
            .preferred()
            .map(|authority| {
                let (chain, key) = authority.server(names)?;
                Ok(One {
                    hint: authority_hint(&authority.digest()),
                    is_oldest: Some(authority.digest()) == oldest,
                    certificate: Arc::new(CertifiedKey::from_der(
                        chain,
                        key,
                        &aws_lc_rs::default_provider(),
                    )?),
                })
            })
            .collect()
    }

    /// Makes all of them anew.
    pub(crate) fn renew(&self) -> anyhow::Result<()> {
        let fresh = Self::fresh(&self.live.now(), &self.names)?;
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// When the one that most clients see begins and ends, in milliseconds since 1970.
    pub(crate) fn validity_ms(&self) -> Option<(i64, i64)> {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let (_, parsed) = parse_x509_certificate(now.first()?.certificate.cert.first()?).ok()?;
        let ms = |time: x509_parser::time::ASN1Time| time.timestamp().saturating_mul(1000);
        Some((ms(parsed.validity().not_before), ms(parsed.validity().not_after)))
    }
}

impl ResolvesServerCert for Shown {
    /// The first in our order that the client can judge. A client that does not say which authorities it knows is one
    /// that has known the oldest from its beginning.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let known = hello.certificate_authorities().unwrap_or_default();
        let judged = now.iter().find(|one| known.iter().any(|name| name.as_ref() == one.hint));
        let chosen = judged.or_else(|| now.iter().find(|one| one.is_oldest));
        chosen.map(|one| Arc::clone(&one.certificate))
    }
}

/// What the agents' port works with now.
#[derive(Debug)]
pub(crate) struct Ports {
    now: RwLock<AgentTls>,
}

impl Ports {
    /// For these authorities.
    pub(crate) fn new(agent: AgentTls) -> Self {
        Self { now: RwLock::new(agent) }
    }

    /// Of this moment.
    pub(crate) fn now(&self) -> AgentTls {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How often the authorities' files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Exchanges the manager's certificates after each third of their life, and takes up the steps of a rotation, until the
/// manager ends. `changed` hears of every step that was taken up.
pub(crate) async fn keep_fresh(
    shown: Arc<Shown>,
    ports: Arc<Ports>,
    changed: impl Fn(&Authorities),
    ending: CancellationToken,
) {
    let third = shown.live.life() / 3;
    let mut renewed = Instant::now();
    loop {
        tokio::select! {
            () = sleep(LOOK) => {}
            () = ending.cancelled() => return,
        }
        let has_changed = match shown.live.look() {
            Ok(has_changed) => has_changed,
            Err(error) => {
                tracing::error!(%error, "Cannot read the certificate authorities; those of before stay.");
                false
            }
        };
        if !has_changed && renewed.elapsed() < third {
            continue;
        }
        renewed = Instant::now();
        // Two more tries are left before they end.
        if let Err(error) = shown.renew() {
            tracing::error!(%error, "Cannot renew the manager's certificates.");
        }
        if has_changed {
            let authorities = shown.live.now();
            match configure(&authorities, &shown) {
                Ok((agent, _)) => *ports.now.write().unwrap_or_else(PoisonError::into_inner) = agent,
                Err(error) => tracing::error!(%error, "Cannot trust the authorities of now."),
            }
            tracing::info!(issuing = %authorities.issuing().digest(), "The certificate authorities have changed.");
            changed(&authorities);
        }
    }
}

/// Judges as the verifier within, at the end of a certificate's life if that was not long ago.
#[derive(Debug)]
struct Lenient(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Lenient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        let end = parse_x509_certificate(end_entity)
            .ok()
            .and_then(|(_, parsed)| u64::try_from(parsed.validity().not_after.timestamp()).ok());
        let late = end.filter(|end| now.as_secs().checked_sub(*end).is_some_and(|by| by <= LATE.as_secs()));
        let judged = late.map_or(now, |end| UnixTime::since_unix_epoch(Duration::from_secs(end)));
        self.0.verify_client_cert(end_entity, intermediates, judged)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// AES-128-GCM with SHA-256 before the others, whatever a client would rather have: nobody breaks either, and a
/// handshake's many short digests cost several times as much with SHA-384, for which processors have no instructions.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// Sets both ports up.
pub(crate) fn configure(
    authorities: &Authorities,
    shown: &Arc<Shown>,
) -> anyhow::Result<(AgentTls, Arc<ServerConfig>)> {
    let provider = Arc::new(provider());
    let mut roots = RootCertStore::empty();
    for authority in authorities.all() {
        roots.add(authority.certificate().clone())?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let lenient: Arc<dyn ClientCertVerifier> = Arc::new(Lenient(Arc::clone(&verifier)));
    let with =
        |client: Option<&Arc<dyn ClientCertVerifier>>, alpn: &[u8]| -> anyhow::Result<Arc<ServerConfig>> {
            let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(&[&rustls::version::TLS13])?;
            let builder = match client {
                Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
                None => builder.with_no_client_auth(),
            };
            let mut config = builder.with_cert_resolver(Arc::<Shown>::clone(shown));
            config.alpn_protocols = vec![alpn.to_vec()];
            config.ignore_client_order = true;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok(Arc::new(config))
        };
    let agent = AgentTls {
        control: with(Some(&verifier), ALPN_CONTROL)?,
        bulk: with(Some(&verifier), ALPN_BULK)?,
        enroll: with(None, ALPN_ENROLL)?,
        renew: with(Some(&lenient), ALPN_RENEW)?,
    };
    Ok((agent, with(None, b"http/1.1")?))
}

/// Reads who a client is; `None` unless it is an agent of our fleet, named once, with a certificate for clients.
pub(crate) fn peer(certificate: &CertificateDer<'_>, fleet: FleetId) -> Option<Peer> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    if !parsed.extended_key_usage().ok()??.value.client_auth {
        return None;
    }
    let names = parsed.subject_alternative_name().ok()??;
    let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else { return None };
    let identity: tm_protocol::identity::Identity = uri.parse().ok()?;
    match identity.role {
        Role::Endpoint(endpoint) if identity.fleet == fleet => {
            Some(Peer { endpoint, serial: hex::encode(parsed.raw_serial()) })
        }
        Role::Endpoint(_) | Role::Manager(_) => None,
    }
}
