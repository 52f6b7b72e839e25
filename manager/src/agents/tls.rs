//! TLS on both ports: version 1.3 only, no resumption (a resumed session would skip the look at the
//! certificate, and with it revocation).

use std::sync::Arc;

use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::CertificateDer;
use tm_protocol::{
    ALPN_BULK, ALPN_CONTROL, ALPN_ENROLL,
    identity::Role,
    ids::{EndpointId, FleetId},
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::ca::Authority;

/// The configurations of the agent port, chosen by what the client names (ALPN).
#[derive(Debug, Clone)]
pub(crate) struct AgentTls {
    pub(crate) control: Arc<ServerConfig>,
    pub(crate) bulk: Arc<ServerConfig>,
    pub(crate) enroll: Arc<ServerConfig>,
}

/// Whom a verified client certificate names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) endpoint: EndpointId,
    /// Lower-case hex.
    pub(crate) serial: String,
}

/// Sets both ports up with a fresh certificate.
pub(crate) fn configure(
    authority: &Authority,
    names: &[String],
) -> anyhow::Result<(AgentTls, Arc<ServerConfig>)> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let (chain, key) = authority.server(names)?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone())?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let with = |client: bool, alpn: &[u8]| -> anyhow::Result<Arc<ServerConfig>> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = if client {
            builder.with_client_cert_verifier(Arc::clone(&verifier))
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_single_cert(chain.clone(), key.clone_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    };
    let agent = AgentTls {
        control: with(true, ALPN_CONTROL)?,
        bulk: with(true, ALPN_BULK)?,
        enroll: with(false, ALPN_ENROLL)?,
    };
    Ok((agent, with(false, b"http/1.1")?))
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
