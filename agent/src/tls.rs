//! Who is at the other end: TLS 1.3 with the fleet's own certificate authority, and nothing else.
//!
//! **Invariant:** a manager is one whose certificate chains to the pinned CA, is good for servers, and names
//! a manager of our fleet. Its host name says nothing: names and addresses change.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use tm_protocol::{
    identity::{Identity, Role, authority_hint},
    ids::{FleetId, Sha256},
    message::Authorities,
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

/// How the authority is known.
#[derive(Debug, Clone)]
pub(crate) enum Pin {
    /// Before enrollment: by its digest; it must be in the chain that the manager shows.
    Digest(Sha256),
    /// Afterwards: the certificates themselves (one, or several while one follows another), and the fleet they
    /// speak for.
    Certificates(Vec<CertificateDer<'static>>, FleetId, KnownTime),
}

/// What a manager said that the time is: wall time less elapsed time, in milliseconds. A clock that stands wrong
/// must not cut an endpoint off; what judges certificates is therefore not the clock alone.
#[derive(Debug, Clone)]
pub(crate) struct KnownTime(Arc<AtomicI64>);

impl KnownTime {
    /// Nothing is known.
    pub(crate) fn unknown() -> Self {
        Self(Arc::new(AtomicI64::new(i64::MIN)))
    }

    /// Notes what is known, for every configuration that shares it.
    pub(crate) fn set(&self, offset_ms: i64) {
        self.0.store(offset_ms, Ordering::Relaxed);
    }

    /// The time by it, where something is known.
    fn now(&self) -> Option<UnixTime> {
        let offset_ms = self.0.load(Ordering::Relaxed);
        let elapsed = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let elapsed_ms = i64::try_from(Duration::try_from(elapsed).ok()?.as_millis()).ok()?;
        let now_ms = u64::try_from(offset_ms.checked_add(elapsed_ms)?).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_millis(now_ms)))
    }
}

#[derive(Debug)]
struct ManagerVerifier {
    pin: Pin,
    /// Names the authorities of the pin to the manager.
    hints: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// A configuration for one kind of connection.
///
/// # Errors
/// If our own certificate and key do not fit each other.
pub(crate) fn client(
    pin: Pin,
    own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    alpn: &[u8],
) -> Result<ClientConfig, TlsError> {
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let digests = match &pin {
        Pin::Digest(digest) => vec![*digest],
        Pin::Certificates(roots, ..) => roots.iter().map(|root| Sha256::of(root)).collect(),
    };
    let hints = digests.iter().map(|digest| DistinguishedName::from(authority_hint(digest))).collect();
    let verifier = ManagerVerifier { pin, hints, algorithms: provider.signature_verification_algorithms };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    // A resumed session would skip the verifier at the other end.
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

impl ServerCertVerifier for ManagerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let unknown = || TlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        let trusted = match &self.pin {
            Pin::Digest(digest) => intermediates
                .iter()
                .find(|c| Sha256::of(c.as_ref()) == *digest)
                .map(|ca| vec![ca.clone()])
                .ok_or_else(unknown)?,
            Pin::Certificates(roots, ..) => roots.clone(),
        };
        let mut roots = RootCertStore::empty();
        for root in trusted {
            roots.add(root).map_err(|_| unknown())?;
        }
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let known = match &self.pin {
            Pin::Digest(_) => None,
            Pin::Certificates(_, _, time) => time.now(),
        };
        let verify = |at: UnixTime| {
            verify_server_cert_signed_by_trust_anchor(&certificate, &roots, &[], at, self.algorithms.all)
        };
        judge(verify, now, known, begins(end_entity), built())?;
        let wrong = || TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let identity = identity_of(end_entity).ok_or_else(wrong)?;
        let ours = match &self.pin {
            Pin::Digest(_) => true,
            Pin::Certificates(_, fleet, _) => identity.fleet == *fleet,
        };
        match identity.role {
            Role::Manager(_) if ours => Ok(ServerCertVerified::assertion()),
            Role::Manager(_) | Role::Endpoint(_) => Err(wrong()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.hints)
    }
}

/// Reads authorities that were written one after the other (DER). `None` if there is none, too many, or one is no
/// authority.
pub(crate) fn roots_of(mut bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut roots = Vec::new();
    while !bytes.is_empty() {
        let (rest, parsed) = parse_x509_certificate(bytes).ok()?;
        if !parsed.is_ca() || roots.len() == Authorities::MAX {
            return None;
        }
        roots.push(CertificateDer::from(bytes[..bytes.len() - rest.len()].to_vec()));
        bytes = rest;
    }
    (!roots.is_empty()).then_some(roots)
}

/// Writes authorities as [`roots_of`] reads them.
pub(crate) fn one_after_the_other(roots: &[CertificateDer<'static>]) -> Vec<u8> {
    roots.iter().flat_map(|root| root.as_ref()).copied().collect()
}

/// Whether a certificate names `authority` as its issuer. (No two authorities of a fleet share a name.)
pub(crate) fn is_issued_by(certificate: &CertificateDer<'_>, authority: &CertificateDer<'_>) -> bool {
    match (parse_x509_certificate(certificate), parse_x509_certificate(authority)) {
        (Ok((_, certificate)), Ok((_, authority))) => {
            certificate.issuer().as_raw() == authority.subject().as_raw()
        }
        (Err(_), _) | (_, Err(_)) => false,
    }
}

/// Whether one of `roots` vouches for a manager's certificate, whatever the time is.
pub(crate) fn is_vouched_for(manager: &CertificateDer<'_>, roots: &[CertificateDer<'static>]) -> bool {
    let mut store = RootCertStore::empty();
    let (_, ignored) = store.add_parsable_certificates(roots.iter().cloned());
    let Ok(certificate) = ParsedCertificate::try_from(manager) else { return false };
    let Some(at) = begins(manager).filter(|_| ignored == 0) else { return false };
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    verify_server_cert_signed_by_trust_anchor(&certificate, &store, &[], at, algorithms.all).is_ok()
}

/// When a certificate begins.
fn begins(certificate: &CertificateDer<'_>) -> Option<UnixTime> {
    let (_, parsed) = parse_x509_certificate(certificate.as_ref()).ok()?;
    let seconds = u64::try_from(parsed.validity().not_before.timestamp()).ok()?;
    Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
}

/// When this program was built.
fn built() -> UnixTime {
    let seconds = env!("TM_BUILT_S").parse().unwrap_or(0);
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// Verifies at the system's time, which is at least when this program was `built`, what a manager said, and when the
/// certificate began: our authority signs nothing ahead of its time, so that its signature shows that that moment
/// has passed. If that makes it an ended one, what a manager said decides.
fn judge(
    verify: impl Fn(UnixTime) -> Result<(), TlsError>,
    system: UnixTime,
    known: Option<UnixTime>,
    begins: Option<UnixTime>,
    built: UnixTime,
) -> Result<(), TlsError> {
    let at_least = |a: UnixTime, b: Option<UnixTime>| {
        UnixTime::since_unix_epoch(Duration::from_secs(a.as_secs().max(b.map_or(0, |b| b.as_secs()))))
    };
    let first = at_least(at_least(at_least(system, Some(built)), known), begins);
    match verify(first) {
        Err(TlsError::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) if known.is_some_and(|known| known.as_secs() < first.as_secs()) => {
            let known = known.map_or(first, |known| at_least(known, begins));
            tracing::warn!(
                "By this machine's clock the manager's certificate has ended; by the manager's it has not."
            );
            verify(known)
        }
        done => done,
    }
}

/// The one URI in a certificate's subject alternative name; `None` if there is not exactly one of ours.
pub(crate) fn identity_of(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let (_, parsed) = parse_x509_certificate(certificate.as_ref()).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
    let identity = uris.next()?.parse().ok()?;
    uris.next().is_none().then_some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_clock_that_stands_wrong_makes_a_good_certificate_bad() {
        const DAY: u64 = 86_400;
        let (begin, end) = (1000 * DAY, 1090 * DAY);
        let verify = |at: UnixTime| match at.as_secs() {
            at if at < begin => Err(TlsError::InvalidCertificate(CertificateError::NotValidYet)),
            at if at > end => Err(TlsError::InvalidCertificate(CertificateError::Expired)),
            _ => Ok(()),
        };
        let day = |day: u64| UnixTime::since_unix_epoch(Duration::from_secs(day * DAY));
        for (system, known, good) in [
            (1010, None, true),
            (1010, Some(1009), true),
            // Behind: at the factory's date, or where the manager's time is all there is.
            (0, None, true),
            (0, Some(1030), true),
            // Ahead: only what a manager said helps.
            (1500, None, false),
            (1500, Some(1030), true),
            // It has ended by all there is.
            (1500, Some(1100), false),
            (1010, Some(1100), false),
        ] {
            let judged = judge(verify, day(system), known.map(day), Some(day(1000)), day(900));
            assert_eq!(judged.is_ok(), good, "{system} {known:?}");
        }
        // A clock that stands before this program was made cannot bring an ended certificate back.
        assert!(judge(verify, day(1050), None, Some(day(1000)), day(1100)).is_err());
        assert!(judge(verify, day(1050), None, Some(day(1000)), day(1080)).is_ok());
        assert!(built() > day(20_000), "the date of the build is known");
    }
}
