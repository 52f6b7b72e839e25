//! The next certificate, for a key that is made here: asked for over a session, or, once the present one has ended,
//! over a link that is good for nothing else.
//!
//! On disk: the new identity is written beside the present one (`identity.new`), the present one becomes
//! `identity.old`, the new one takes its place, and the old one goes once a manager has welcomed the new.
//!
//! **Invariant:** at every moment of an exchange one whole identity is on the disk, and [`Enrolled::load`] finds it.

use std::{fs, io, time::Duration};

use bytes::BytesMut;
use rcgen::{CertificateParams, KeyPair};
use tm_protocol::{
    address::Address,
    identity::{Identity, Role},
    ids::EndpointId,
    message::{Renew, Renewed, ToAgent, ToManager},
};
use tokio::time::timeout;

use crate::{
    connection::{self, ConnectError, Dialler},
    enroll::{EnrollError, Enrolled, certified},
    paths::{Paths, sync_folder},
};

/// How long the manager may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

/// A key for which a certificate was asked.
#[derive(Debug)]
pub(crate) struct Asked {
    key: KeyPair,
}

impl Asked {
    /// Makes a key, and the request for its certificate.
    ///
    /// # Errors
    /// If no key can be made.
    pub(crate) fn new() -> Result<(Self, Renew), EnrollError> {
        let asked = Self { key: KeyPair::generate().map_err(EnrollError::Key)? };
        let request = asked.request()?;
        Ok((asked, request))
    }

    /// The request for the certificate of this key.
    ///
    /// # Errors
    /// If the key cannot sign it.
    pub(crate) fn request(&self) -> Result<Renew, EnrollError> {
        let csr = CertificateParams::default().serialize_request(&self.key).map_err(EnrollError::Key)?;
        Ok(Renew { csr: csr.der().to_vec() })
    }

    /// Puts the identity of `endpoint` with this `certificate` in the place of the present one: the present endpoint's
    /// next, or that of another endpoint which this one is from now on. Waits for the disk.
    ///
    /// # Errors
    /// If the certificate is not this endpoint's, in our fleet and for our key, or the disk does not take it. The present
    /// one then stays.
    pub(crate) fn install(
        &self,
        paths: &Paths,
        present: &Enrolled,
        endpoint: EndpointId,
        certificate: Vec<u8>,
    ) -> Result<Enrolled, EnrollError> {
        let certificate = certified(certificate, &self.key)?;
        let named = Identity { role: Role::Endpoint(endpoint), fleet: present.fleet };
        if crate::tls::identity_of(&certificate) != Some(named) {
            return Err(EnrollError::Answer("the certificate is for somebody else"));
        }
        let keep = |source| EnrollError::Keep { path: paths.identity().display().to_string(), source };
        present.write_as(paths, endpoint, &certificate, &self.key.serialize_der()).map_err(keep)?;
        exchange(paths).map_err(keep)?;
        Enrolled::load(paths)
    }
}

/// Moves `identity.new` into its place.
fn exchange(paths: &Paths) -> io::Result<()> {
    let old = paths.old_identity();
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    fs::rename(paths.identity(), &old)?;
    if let Err(error) = fs::rename(paths.new_identity(), paths.identity()) {
        fs::rename(&old, paths.identity())?;
        return Err(error);
    }
    sync_folder(paths.root())
}

/// Removes the identity that was replaced, once the new one has been welcomed.
///
/// # Errors
/// If the disk does not let it go.
pub(crate) fn forget_old(paths: &Paths) -> io::Result<()> {
    match fs::remove_dir_all(paths.old_identity()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Asks for a certificate over a link of its own; `dialler` is for renewals.
///
/// # Errors
/// If there is no such link, or no answer.
pub(crate) async fn ask_late(
    address: Address,
    dialler: Dialler,
    request: Renew,
) -> Result<Renewed, ConnectError> {
    let asked = async {
        let mut link = dialler.dial(&address).await?;
        let mut bytes = BytesMut::new();
        ToManager::from(request).encode(&mut bytes).map_err(ConnectError::Frame)?;
        connection::write(&mut link, &bytes).await?;
        bytes.clear();
        match connection::read(&mut link, &mut bytes).await? {
            ToAgent::Renewed(renewed) => Ok(renewed),
            ToAgent::Goodbye(goodbye) => Ok(Renewed::Refused(goodbye.failure)),
            ToAgent::Welcome(_)
            | ToAgent::Ping(_)
            | ToAgent::Pong(_)
            | ToAgent::Assign(_)
            | ToAgent::ReportStored(_)
            | ToAgent::NoticesStored(_)
            | ToAgent::EnrollReply(_)
            | ToAgent::Authorities(_)
            | ToAgent::Held(_)
            | ToAgent::NewIdentity(_)
            | ToAgent::RenewNow(_)
            | ToAgent::Cancel(_) => Err(ConnectError::Protocol("an answer that was not asked for")),
        }
    };
    timeout(ANSWER, asked).await.map_err(|_| ConnectError::Timeout)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_that_was_cut_leaves_an_identity() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path().to_path_buf());
        let whole = |path: &std::path::Path, mark: &str| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("mark"), mark).unwrap();
        };
        let mark = || fs::read_to_string(paths.identity().join("mark")).unwrap();
        whole(&paths.identity(), "one");
        whole(&paths.new_identity(), "two");
        exchange(&paths).unwrap();
        assert_eq!(mark(), "two");
        assert!(paths.old_identity().exists());
        // Nothing to move: the present one stays.
        assert!(exchange(&paths).is_err());
        assert_eq!(mark(), "two");
        // Cut between the two moves.
        fs::rename(paths.identity(), paths.old_identity()).unwrap();
        crate::enroll::mend(&paths).unwrap();
        assert_eq!(mark(), "two");
        forget_old(&paths).unwrap();
        forget_old(&paths).unwrap();
    }
}
