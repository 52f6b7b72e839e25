//! Who is at the other end: TLS 1.3 with the fleet's own certificate authority, and nothing else.
//!
//! **Invariant:** a manager is one whose certificate chains to the pinned CA, is good for servers, and names
//! a manager of our fleet. Its host name says nothing: names and addresses change.

use std::sync::Arc;

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
    identity::{Identity, Role},
    ids::{FleetId, Sha256},
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

/// How the authority is known.
#[derive(Debug, Clone)]
pub(crate) enum Pin {
    /// Before enrollment: by its digest; it must be in the chain that the manager shows.
    Digest(Sha256),
    /// Afterwards: the certificate itself, and the fleet it speaks for.
    Certificate(CertificateDer<'static>, FleetId),
}

#[derive(Debug)]
struct ManagerVerifier {
    pin: Pin,
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
    let verifier = ManagerVerifier { pin, algorithms: provider.signature_verification_algorithms };
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
        let ca = match &self.pin {
            Pin::Digest(digest) => intermediates
                .iter()
                .find(|c| Sha256::of(c.as_ref()) == *digest)
                .cloned()
                .ok_or_else(unknown)?,
            Pin::Certificate(ca, _) => ca.clone(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(|_| unknown())?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&certificate, &roots, &[], now, self.algorithms.all)?;
        let wrong = || TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let identity = identity_of(end_entity).ok_or_else(wrong)?;
        let ours = match &self.pin {
            Pin::Digest(_) => true,
            Pin::Certificate(_, fleet) => identity.fleet == *fleet,
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
        None
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
