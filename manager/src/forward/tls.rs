//! TLS towards receivers: TLS 1.3, and only a server that the named authorities vouch for under the expected name.

use std::{path::Path, sync::Arc};

use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::settings::ExportError;

/// Trusts the authorities in `ca_file` (PEM) and, if asked to, shows a certificate.
///
/// # Errors
/// If a file cannot be read or used, by the key that names it.
pub(super) fn config(
    name: &str,
    ca_file: &Path,
    client: Option<(&Path, &Path)>,
) -> Result<ClientConfig, ExportError> {
    let mut roots = RootCertStore::empty();
    // One authority of a long list that is not understood does not make the others unknown.
    let (added, _) = roots.add_parsable_certificates(certificates(name, "ca_file", ca_file)?);
    if added == 0 {
        return Err(ExportError::new(name, "ca_file", "no certificate of an authority in it can be used"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| ExportError::new(name, "ca_file", error.to_string()))?
        .with_root_certificates(roots);
    let Some((certificate, key)) = client else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(name, "client_certificate", certificate)?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| ExportError::new(name, "client_key", format!("cannot be read: {error}")))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| ExportError::new(name, "client_key", error.to_string()))
}

fn certificates(
    name: &str,
    key: &'static str,
    file: &Path,
) -> Result<Vec<CertificateDer<'static>>, ExportError> {
    let unreadable =
        |error: rustls_pki_types::pem::Error| ExportError::new(name, key, format!("cannot be read: {error}"));
    let found: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(file)
        .map_err(unreadable)?
        .collect::<Result<_, _>>()
        .map_err(unreadable)?;
    if found.is_empty() {
        return Err(ExportError::new(name, key, "there is no certificate (PEM) in it"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    #[test]
    fn files_that_cannot_be_used_are_named_by_their_keys() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| -> PathBuf {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let ca = put("ca.pem", &certificate.pem());
        let (key, other) = (put("key.pem", &key.serialize_pem()), put("other.pem", &other.serialize_pem()));
        let (empty, junk) = (put("empty.pem", ""), put("junk.pem", "-----BEGIN CERTIFICATE-----\n!\n"));
        let gone = folder.path().join("gone.pem");
        config("x", &ca, Some((&ca, &key))).unwrap();
        for (ca_file, client, named) in [
            (&gone, None, "ca_file"),
            (&empty, None, "ca_file"),
            (&junk, None, "ca_file"),
            (&key, None, "ca_file"),
            (&ca, Some((&gone, &key)), "client_certificate"),
            (&ca, Some((&ca, &gone)), "client_key"),
            (&ca, Some((&ca, &ca)), "client_key"),
            (&ca, Some((&ca, &other)), "client_key"),
        ] {
            let client = client.map(|(certificate, key)| (certificate.as_path(), key.as_path()));
            let refused = config("x", ca_file, client).unwrap_err().to_string();
            assert!(refused.contains(&format!("`x`: `{named}`")), "{refused}");
        }
    }
}
