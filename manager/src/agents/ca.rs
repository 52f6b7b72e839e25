//! The embedded certificate authority.
//!
//! **Invariant:** of a request only the public key is taken (and its proof checked); every name in it is
//! replaced by exactly one URI. No certificate of ours may sign another (path length 0).

use std::{
    fmt, fs,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
    SerialNumber, SigningKey,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tm_protocol::{
    identity::{Identity, Role},
    ids::{EndpointId, FleetId, ManagerId, Sha256},
};
use uuid::Uuid;
use x509_parser::{parse_x509_certificate, time::ASN1Time};

use crate::store::certificates::NewCertificate;

/// How long a certificate is good for, unless the configuration says otherwise.
pub(crate) const DEFAULT_LIFE: Duration = Duration::from_secs(90 * 86_400);
/// How long the authority itself is.
const ROOT: Duration = Duration::from_secs(3650 * 86_400);
/// Certificates begin this long before now, for endpoints whose clocks are behind, or a tenth of their life if
/// that is less.
const BACKDATED: Duration = Duration::from_secs(3600);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error("cannot use `{path}`")]
    File { path: String, source: io::Error },
    #[error("the authority's files are damaged")]
    Damaged,
    #[error("cannot sign")]
    Sign(#[source] rcgen::Error),
    #[error("the certificate request is not one")]
    Request(#[source] rcgen::Error),
}

/// The fleet's authority and this manager's place in it.
pub(crate) struct Authority {
    pub(crate) fleet: FleetId,
    pub(crate) manager: ManagerId,
    /// How long the certificates that it signs are good for.
    life: Duration,
    /// When it begins and ends, in milliseconds since 1970.
    pub(crate) validity_ms: (i64, i64),
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate for an agent.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) der: Vec<u8>,
    /// Lower-case hex.
    pub(crate) serial: String,
    pub(crate) not_after_ms: i64,
    /// Whose it is.
    pub(crate) authority: Sha256,
    /// SubjectPublicKeyInfo (DER).
    pub(crate) public_key: Vec<u8>,
}

impl Issued {
    /// What the store keeps of it.
    pub(crate) fn row(&self) -> NewCertificate<'_> {
        NewCertificate {
            serial: &self.serial,
            not_after_ms: self.not_after_ms,
            authority: self.authority,
            public_key: &self.public_key,
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("fleet", &self.fleet).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority in `folder`, which must not exist.
    pub(crate) fn create(folder: &Path) -> Result<Self, CaError> {
        let file = |source| CaError::File { path: folder.display().to_string(), source };
        fs::DirBuilder::new().mode(0o700).create(folder).map_err(file)?;
        let fleet = FleetId::new(Uuid::now_v7());
        let manager = ManagerId::new(Uuid::now_v7());
        Self::make(folder, fleet, None)?;
        write(
            folder,
            "ids.json",
            serde_json::json!({ "fleet": fleet, "manager": manager }).to_string().as_bytes(),
        )
        .map_err(file)?;
        Self::load(folder, folder, DEFAULT_LIFE)
    }

    /// Makes the key and the certificate of an authority in `folder`, which holds none. One that follows another is
    /// told from it by `mark`. Its digest.
    pub(super) fn make(folder: &Path, fleet: FleetId, mark: Option<&str>) -> Result<Sha256, CaError> {
        let file = |source| CaError::File { path: folder.display().to_string(), source };
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let mark = mark.map(|mark| format!(" {mark}")).unwrap_or_default();
        params.distinguished_name = name(&format!("Threat Management CA {fleet}{mark}"));
        set_times(&mut params, SystemTime::now() + ROOT, ROOT);
        let certificate: Certificate = params.self_signed(&key).map_err(CaError::Sign)?;
        write(folder, "key.der", &key.serialize_der()).map_err(file)?;
        write(folder, "certificate.der", certificate.der()).map_err(file)?;
        Ok(Sha256::of(certificate.der()))
    }

    /// Reads the authority that [`Authority::make`] made in `home`; the names of fleet and manager are in `folder`.
    /// What it signs is good for `life`, and not longer than itself.
    pub(super) fn load(folder: &Path, home: &Path, life: Duration) -> Result<Self, CaError> {
        #[derive(serde::Deserialize)]
        struct Ids {
            fleet: FleetId,
            manager: ManagerId,
        }
        let read = |path: PathBuf| {
            fs::read(&path).map_err(|source| CaError::File { path: path.display().to_string(), source })
        };
        let ids = read(folder.join("ids.json"))?;
        let ids: Ids = serde_json::from_slice(&ids).map_err(|_| CaError::Damaged)?;
        let certificate = CertificateDer::from(read(home.join("certificate.der"))?);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(read(home.join("key.der"))?));
        let key = KeyPair::try_from(&key).map_err(|_| CaError::Damaged)?;
        let (_, parsed) = parse_x509_certificate(&certificate).map_err(|_| CaError::Damaged)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(CaError::Damaged);
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| CaError::Damaged)?;
        let time = |time: ASN1Time| time.timestamp().saturating_mul(1000);
        let validity_ms = (time(parsed.validity().not_before), time(parsed.validity().not_after));
        Ok(Self { validity_ms, fleet: ids.fleet, manager: ids.manager, life, certificate, issuer })
    }

    /// The authority's certificate.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// When something that it signs now ends: after its life, and not after the authority itself.
    fn end(&self) -> SystemTime {
        let own = Duration::from_millis(u64::try_from(self.validity_ms.1).unwrap_or(0));
        (SystemTime::now() + self.life).min(SystemTime::UNIX_EPOCH + own)
    }

    /// Its digest, as tokens and profiles name it.
    pub(crate) fn digest(&self) -> Sha256 {
        Sha256::of(&self.certificate)
    }

    /// A fresh key and certificate for this manager's two listeners.
    pub(crate) fn server(
        &self,
        names: &[String],
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CaError> {
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let mut params = self.leaf(Role::Manager(self.manager), ExtendedKeyUsagePurpose::ServerAuth)?;
        for name in names.iter().map(String::as_str).chain(["localhost", "127.0.0.1", "::1"]) {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.try_into().map_err(CaError::Sign)?),
            });
        }
        let certificate = params.signed_by(&key, &self.issuer).map_err(CaError::Sign)?;
        let chain = vec![certificate.der().clone(), self.certificate.clone()];
        Ok((chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))))
    }

    /// Certifies the key of `request` (PKCS #10, DER) for `endpoint`.
    pub(crate) fn certify(&self, endpoint: EndpointId, request: &[u8]) -> Result<Issued, CaError> {
        let request = CertificateSigningRequestDer::from(request);
        let mut request = CertificateSigningRequestParams::from_der(&request).map_err(CaError::Request)?;
        request.params = self.leaf(Role::Endpoint(endpoint), ExtendedKeyUsagePurpose::ClientAuth)?;
        let serial =
            request.params.serial_number.as_ref().map(|s| hex::encode(s.to_bytes())).unwrap_or_default();
        let certificate = request.signed_by(&self.issuer).map_err(CaError::Sign)?;
        let not_after = self.end().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(Issued {
            authority: self.digest(),
            public_key: request.public_key.subject_public_key_info(),
            der: certificate.der().to_vec(),
            serial,
            not_after_ms: i64::try_from(not_after.as_millis()).unwrap_or(i64::MAX),
        })
    }

    fn leaf(&self, role: Role, purpose: ExtendedKeyUsagePurpose) -> Result<CertificateParams, CaError> {
        let identity = Identity { fleet: self.fleet, role }.to_string();
        let mut params = CertificateParams::default();
        // The first bit is clear and the second set: positive, and always of the same length (RFC 5280, 4.1.2.2).
        let mut serial: [u8; 16] = rand::random();
        serial[0] = serial[0] & 0x7f | 0x40;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.distinguished_name = name(match role {
            Role::Endpoint(_) => "Threat Management agent",
            Role::Manager(_) => "Threat Management manager",
        });
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().map_err(CaError::Sign)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.is_ca = IsCa::ExplicitNoCa;
        set_times(&mut params, self.end(), self.life);
        Ok(params)
    }
}

fn set_times(params: &mut CertificateParams, end: SystemTime, length: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATED.min(length / 10)).into();
    params.not_after = end.into();
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

pub(super) fn write(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join(name))?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Only here so that the key type of requests and authority is one.
const _: fn(&KeyPair) -> &dyn SigningKey = |key| key;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::tls::peer;

    #[test]
    fn names_asked_for_do_not_survive() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(&folder.path().join("ca")).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut asked = CertificateParams::new(vec!["manager.example".to_owned()]).unwrap();
        asked.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        asked.subject_alt_names.push(SanType::URI("tm://x/manager/y".try_into().unwrap()));
        let csr = asked.serialize_request(&key);
        let endpoint = EndpointId::new(Uuid::now_v7());
        // rcgen refuses to make some hostile requests; the plain one must come out clean too.
        let csr = csr.or_else(|_| {
            CertificateParams::new(vec!["manager.example".to_owned()]).unwrap().serialize_request(&key)
        });
        let issued = authority.certify(endpoint, csr.unwrap().der()).unwrap();
        let peer = peer(&CertificateDer::from(issued.der.clone()), authority.fleet).unwrap();
        assert_eq!((peer.endpoint, peer.serial), (endpoint, issued.serial));
        assert!(!String::from_utf8_lossy(&issued.der).contains("manager.example"));
        assert!(authority.certify(endpoint, b"nonsense").is_err());
    }
}
