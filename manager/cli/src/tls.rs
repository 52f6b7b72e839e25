//! Who answers: TLS 1.3, and only the manager that the profile's authority vouches for.
//!
//! **Invariant:** the authority whose digest the profile names is the only trust anchor; no certificate of
//! the system counts. Host names are not checked: a manager may move, its identity does not.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError, OtherError,
    RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use tm_protocol::{
    identity::{Identity, Role, authority_hint},
    ids::Sha256,
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

/// Why a certificate is not one of our manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Distrust {
    /// The authority is another one.
    #[error("its certificates come from another authority than the profile names")]
    OtherAuthority,
    /// It is good for something else.
    #[error("its certificate is not made for servers")]
    NotForServers,
    /// It speaks for somebody else.
    #[error("its certificate does not speak for a manager")]
    NotAManager,
}

/// The configuration for every connection to a manager.
///
/// # Errors
/// If the crypto provider cannot do TLS 1.3.
pub(crate) fn config(ca: Sha256) -> Result<ClientConfig, TlsError> {
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let hints = vec![DistinguishedName::from(authority_hint(&ca))];
    let verifier = ManagerVerifier { ca, hints, algorithms: provider.signature_verification_algorithms };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

#[derive(Debug)]
struct ManagerVerifier {
    ca: Sha256,
    /// Names the authority to the manager, which may answer for several.
    hints: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
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
        let ca = intermediates
            .iter()
            .find(|certificate| Sha256::of(certificate.as_ref()) == self.ca)
            .ok_or_else(|| Distrust::OtherAuthority.into_tls())?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).map_err(|_| Distrust::OtherAuthority.into_tls())?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(|error| {
            // An authority of the same name and another key shows as a bad signature.
            if let TlsError::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            ) = error
            {
                Distrust::OtherAuthority.into_tls()
            } else {
                error
            }
        })?;
        if !is_for_servers(end_entity) {
            return Err(Distrust::NotForServers.into_tls());
        }
        match identity_of(end_entity).map(|identity| identity.role) {
            Some(Role::Manager(_)) => Ok(ServerCertVerified::assertion()),
            Some(Role::Endpoint(_)) | None => Err(Distrust::NotAManager.into_tls()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.hints)
    }
}

impl Distrust {
    fn into_tls(self) -> TlsError {
        TlsError::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(self))))
    }
}

/// webpki takes a certificate without the extension for one that may do anything; ours always have it.
fn is_for_servers(certificate: &CertificateDer<'_>) -> bool {
    parse_x509_certificate(certificate.as_ref()).is_ok_and(
        |(_, parsed)| matches!(parsed.extended_key_usage(), Ok(Some(usage)) if usage.value.server_auth),
    )
}

/// The one URI in a certificate's subject alternative name; `None` if there is not exactly one of ours.
fn identity_of(certificate: &CertificateDer<'_>) -> Option<Identity> {
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
pub(crate) mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
    };
    use rustls::pki_types::PrivateKeyDer;

    use super::*;

    const FLEET: &str = "018f3c1e-6b5a-7000-8000-0123456789ab";
    const ID: &str = "018f3c1e-6b5a-7000-8000-0123456789ac";

    pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        pub(crate) fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        pub(crate) fn der(&self) -> CertificateDer<'static> {
            self.0.as_ref().der().clone()
        }

        pub(crate) fn digest(&self) -> Sha256 {
            Sha256::of(self.der().as_ref())
        }

        fn leaf(
            &self,
            uris: &[String],
            usage: &[ExtendedKeyUsagePurpose],
        ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
            let mut params = CertificateParams::default();
            params.subject_alt_names =
                uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap())).collect();
            params.extended_key_usages = usage.to_vec();
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &self.0).unwrap().der().clone();
            (certificate, PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        }

        /// A certificate as a manager has it.
        pub(crate) fn manager(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
            self.leaf(&[format!("tm://{FLEET}/manager/{ID}")], &[ExtendedKeyUsagePurpose::ServerAuth])
        }
    }

    fn verify(ca: Sha256, leaf: &CertificateDer<'_>, chain: &[CertificateDer<'_>]) -> Result<(), String> {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        let name = ServerName::try_from("whatever.example").unwrap();
        ManagerVerifier { ca, hints: Vec::new(), algorithms }
            .verify_server_cert(leaf, chain, &name, &[], UnixTime::now())
            .map(drop)
            .map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn only_a_manager_of_the_pinned_authority_is_believed() {
        let (ours, other) = (Authority::new(), Authority::new());
        let uri = |role: &str| format!("tm://{FLEET}/{role}/{ID}");
        let server = [ExtendedKeyUsagePurpose::ServerAuth];
        let (good, _) = ours.manager();
        let chain = [ours.der()];
        assert_eq!(verify(ours.digest(), &good, &chain), Ok(()), "the control");

        let (foreign, _) = other.manager();
        let cases = [
            ("a chain without the authority", good.clone(), vec![], "OtherAuthority"),
            ("another authority", foreign.clone(), vec![other.der()], "OtherAuthority"),
            ("ours shown, signed by another", foreign.clone(), vec![ours.der()], "OtherAuthority"),
            ("both shown", foreign, vec![other.der(), ours.der()], "OtherAuthority"),
            ("the authority itself", ours.der(), vec![ours.der()], "CaUsedAsEndEntity"),
            ("an endpoint", ours.leaf(&[uri("endpoint")], &server).0, chain.to_vec(), "NotAManager"),
            ("nobody", ours.leaf(&[], &server).0, chain.to_vec(), "NotAManager"),
            (
                "two at once",
                ours.leaf(&[uri("manager"), uri("endpoint")], &server).0,
                chain.to_vec(),
                "NotAManager",
            ),
            (
                "a client's certificate",
                ours.leaf(&[uri("manager")], &[ExtendedKeyUsagePurpose::ClientAuth]).0,
                chain.to_vec(),
                "InvalidPurpose",
            ),
            (
                "a certificate for nothing special",
                ours.leaf(&[uri("manager")], &[]).0,
                chain.to_vec(),
                "NotForServers",
            ),
        ];
        for (what, leaf, chain, reason) in cases {
            let refusal = verify(ours.digest(), &leaf, &chain).expect_err(what);
            assert!(refusal.contains(reason), "{what}: {refusal}");
        }
    }
}
