//! The authorities that a manager answers for: one, or several while one follows another.
//!
//! On disk, below `ca/`: the first one's files; each further one's in a folder `ca/NAME/`; and `authorities.json`,
//! which names those that are trusted, the oldest first, and the one that issues. Without that file there is the first
//! alone. A running manager looks at it every second.
//!
//! A rotation is four steps, none of which touches an endpoint: `add` makes another authority, and agents learn it over
//! their sessions; `switch` lets it issue, and agents renew under it; when none hangs on the older one any more,
//! `retire` ends the trust in it. Each client names the authorities that it knows, and is shown a certificate of one
//! of these, so that an agent that slept through everything but the last step finds its way by itself.
//!
//! **Invariant:** what issues is trusted.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tm_protocol::{
    ids::{EndpointId, FleetId, ManagerId, Sha256},
    message,
};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    ca::{Authority, CaError, DEFAULT_LIFE, Issued, write},
    registry::Registry,
};
use crate::store::Store;

/// The folder of the first authority in the index.
const FIRST: &str = "first";
/// Most at a time; agents take no more.
const MOST: usize = message::Authorities::MAX;

/// `authorities.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    /// Names of folders, the oldest first.
    trusted: Vec<String>,
    issuing: String,
}

/// Why a step of a rotation was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RotationError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("cannot write `{path}`")]
    Write { path: String, source: io::Error },
    #[error(
        "another authority than the one that issues is there already: `tm-manager ca switch` lets it issue"
    )]
    Waiting,
    #[error("there is no other authority: `tm-manager ca add` makes one")]
    None,
    #[error("no older authority is trusted any more")]
    NothingToRetire,
    #[error("{MOST} authorities are trusted; `tm-manager ca retire` ends the trust in the oldest")]
    TooMany,
}

/// Every authority that is trusted.
#[derive(Debug)]
pub(crate) struct Authorities {
    index: Index,
    /// In the order of the index.
    all: Vec<Authority>,
    issuing: usize,
}

impl Authorities {
    /// Reads them. What they sign is good for `life`.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub(crate) fn load(folder: &Path, life: Duration) -> Result<Self, CaError> {
        let index = read_index(folder)?;
        let all = index
            .trusted
            .iter()
            .map(|name| Authority::load(folder, &home(folder, name), life))
            .collect::<Result<Vec<_>, _>>()?;
        let issuing = index.trusted.iter().position(|name| *name == index.issuing);
        let issuing = issuing.filter(|_| all.len() <= MOST).ok_or(CaError::Damaged)?;
        Ok(Self { index, all, issuing })
    }

    /// The one that issues.
    pub(crate) fn issuing(&self) -> &Authority {
        // `load` has looked.
        &self.all[self.issuing]
    }

    /// Every one, the oldest first.
    pub(crate) fn all(&self) -> &[Authority] {
        &self.all
    }

    /// Every one, in the order in which a client that knows several is served: the one that issues, then the newer.
    pub(crate) fn preferred(&self) -> impl Iterator<Item = &Authority> {
        let issuing = self.issuing().digest();
        let others = self.all.iter().rev().filter(move |authority| authority.digest() != issuing);
        std::iter::once(self.issuing()).chain(others)
    }

    /// Whose fleet it is.
    pub(crate) fn fleet(&self) -> FleetId {
        self.issuing().fleet
    }

    /// Which manager this is.
    pub(crate) fn manager(&self) -> ManagerId {
        self.issuing().manager
    }

    /// Certifies the key of `request` (PKCS #10, DER) for `endpoint`.
    ///
    /// # Errors
    /// If the request is not one.
    pub(crate) fn certify(&self, endpoint: EndpointId, request: &[u8]) -> Result<Issued, CaError> {
        self.issuing().certify(endpoint, request)
    }

    /// What agents are told. `sessions` agents take part in the renewal that may follow.
    pub(crate) fn message(&self, sessions: usize) -> message::Authorities {
        // Some fifty renewals a second.
        let within = u32::try_from(sessions).unwrap_or(u32::MAX).saturating_mul(20);
        message::Authorities {
            certificates: self.preferred().map(|authority| authority.certificate().to_vec()).collect(),
            renew_within_ms: within,
        }
    }
}

/// The present authorities of a running manager.
#[derive(Debug)]
pub(crate) struct Live {
    folder: PathBuf,
    life: Duration,
    now: RwLock<Arc<Authorities>>,
}

impl Live {
    /// Reads them for the first time.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub(crate) fn load(folder: &Path, life: Duration) -> Result<Self, CaError> {
        let now = RwLock::new(Arc::new(Authorities::load(folder, life)?));
        Ok(Self { folder: folder.to_path_buf(), life, now })
    }

    /// Those of this moment.
    pub(crate) fn now(&self) -> Arc<Authorities> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How long what they sign is good for.
    pub(crate) const fn life(&self) -> Duration {
        self.life
    }

    /// Looks whether a step of a rotation was taken. `true` if so; they have then been read anew.
    ///
    /// # Errors
    /// If a file is missing or damaged; those of before then stay.
    pub(crate) fn look(&self) -> Result<bool, CaError> {
        if read_index(&self.folder)? == self.now().index {
            return Ok(false);
        }
        let fresh = Arc::new(Authorities::load(&self.folder, self.life)?);
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(true)
    }
}

/// Ends, after every step of a rotation, the sessions of agents whose certificates went with their authority.
pub(crate) async fn cut(
    store: Store,
    registry: Registry,
    manager: ManagerId,
    mut changed: watch::Receiver<Sha256>,
    ending: CancellationToken,
) {
    loop {
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            () = ending.cancelled() => return,
        }
        // Once more for sessions that were being opened.
        for _ in 0..2 {
            match store.sessions_without_certificate(manager).await {
                Ok(endpoints) => {
                    for endpoint in endpoints {
                        registry.cut_bulk(endpoint);
                        registry.shut_out(endpoint);
                    }
                }
                Err(error) => tracing::warn!(%error, "Cannot look for sessions without a certificate."),
            }
            sleep(Duration::from_secs(2)).await;
        }
    }
}

fn home(folder: &Path, name: &str) -> PathBuf {
    if name == FIRST { folder.to_path_buf() } else { folder.join(name) }
}

fn read_index(folder: &Path) -> Result<Index, CaError> {
    let path = folder.join("authorities.json");
    match fs::read(&path) {
        Ok(bytes) => {
            let index: Index = serde_json::from_slice(&bytes).map_err(|_| CaError::Damaged)?;
            // Names become paths.
            let named = |name: &String| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric());
            if index.trusted.iter().all(named) { Ok(index) } else { Err(CaError::Damaged) }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(Index { trusted: vec![FIRST.to_owned()], issuing: FIRST.to_owned() })
        }
        Err(source) => Err(CaError::File { path: path.display().to_string(), source }),
    }
}

fn write_index(folder: &Path, index: &Index) -> Result<(), RotationError> {
    let (path, new) = (folder.join("authorities.json"), folder.join("authorities.json.new"));
    let put = || {
        if new.exists() {
            fs::remove_file(&new)?;
        }
        write(folder, "authorities.json.new", serde_json::to_string_pretty(index)?.as_bytes())?;
        fs::rename(&new, &path)?;
        fs::File::open(folder)?.sync_all()
    };
    put().map_err(|source| RotationError::Write { path: path.display().to_string(), source })
}

/// Makes a place for another manager of a fleet in `folder`, which must not exist, with the authorities of `from`.
///
/// # Errors
/// If those cannot be used, or the disk refuses.
pub(crate) fn join(folder: &Path, from: &Path) -> Result<(), CaError> {
    let (existing, index) = (Authorities::load(from, DEFAULT_LIFE)?, read_index(from)?);
    let file = |path: &Path| {
        let path = path.display().to_string();
        move |source| CaError::File { path, source }
    };
    let make = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path).map_err(file(path));
    make(folder)?;
    for name in &index.trusted {
        let (old, new) = (home(from, name), home(folder, name));
        if name != FIRST {
            make(&new)?;
        }
        for part in ["key.der", "certificate.der"] {
            let bytes = fs::read(old.join(part)).map_err(file(&old.join(part)))?;
            write(&new, part, &bytes).map_err(file(&new))?;
        }
    }
    let ids = serde_json::json!({ "fleet": existing.fleet(), "manager": ManagerId::new(Uuid::now_v7()) });
    write(folder, "ids.json", ids.to_string().as_bytes()).map_err(file(folder))?;
    let index = serde_json::to_vec_pretty(&index).map_err(|_| CaError::Damaged)?;
    write(folder, "authorities.json", &index).map_err(file(folder))
}

/// Makes another authority, which issues nothing yet. Its digest.
///
/// # Errors
/// If one waits already, or the disk refuses.
pub(crate) fn add(folder: &Path, life: Duration) -> Result<Sha256, RotationError> {
    let present = Authorities::load(folder, life)?;
    if present.issuing + 1 != present.all.len() {
        return Err(RotationError::Waiting);
    }
    if present.all.len() == MOST {
        return Err(RotationError::TooMany);
    }
    let name = hex::encode(rand::random::<[u8; 8]>());
    let path = folder.join(&name);
    let failed = |source| RotationError::Write { path: path.display().to_string(), source };
    fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
    let made = Authority::make(&path, present.fleet(), Some(&name))?;
    let mut index = present.index;
    index.trusted.push(name);
    write_index(folder, &index)?;
    Ok(made)
}

/// Lets the newest authority issue. Its digest.
///
/// # Errors
/// If it does already, or the disk refuses.
pub(crate) fn switch(folder: &Path, life: Duration) -> Result<Sha256, RotationError> {
    let present = Authorities::load(folder, life)?;
    let Some(newest) = present.index.trusted.last().filter(|name| **name != present.index.issuing) else {
        return Err(RotationError::None);
    };
    let index = Index { issuing: newest.clone(), trusted: present.index.trusted.clone() };
    write_index(folder, &index)?;
    Ok(present.all.last().map(Authority::digest).unwrap_or_else(|| present.issuing().digest()))
}

/// The oldest authority, if it is one that has been followed.
///
/// # Errors
/// If there is no such one.
pub(crate) fn retirable(folder: &Path, life: Duration) -> Result<Sha256, RotationError> {
    let present = Authorities::load(folder, life)?;
    if present.issuing == 0 {
        return Err(RotationError::NothingToRetire);
    }
    Ok(present.all[0].digest())
}

/// Ends the trust in the oldest authority, and removes its key. The digest of the one that issues.
///
/// # Errors
/// If it is the one that issues, or the disk refuses.
pub(crate) fn retire(folder: &Path, life: Duration) -> Result<Sha256, RotationError> {
    let present = Authorities::load(folder, life)?;
    if present.issuing == 0 {
        return Err(RotationError::NothingToRetire);
    }
    let mut index = present.index.clone();
    let oldest = index.trusted.remove(0);
    // Nobody is to need the files when they go.
    write_index(folder, &index)?;
    for file in ["key.der", "certificate.der"] {
        let path = home(folder, &oldest).join(file);
        fs::remove_file(&path)
            .map_err(|source| RotationError::Write { path: path.display().to_string(), source })?;
    }
    Ok(present.issuing().digest())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::ca::DEFAULT_LIFE;

    #[test]
    fn one_authority_follows_another_step_by_step() {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("ca");
        Authority::create(&folder).unwrap();
        let live = Live::load(&folder, DEFAULT_LIFE).unwrap();
        let first = live.now().issuing().digest();
        let digests = |live: &Live| live.now().preferred().map(Authority::digest).collect::<Vec<_>>();
        assert!(!live.look().unwrap());
        assert!(matches!(switch(&folder, DEFAULT_LIFE), Err(RotationError::None)));
        assert!(matches!(retirable(&folder, DEFAULT_LIFE), Err(RotationError::NothingToRetire)));

        let second = add(&folder, DEFAULT_LIFE).unwrap();
        assert!(live.look().unwrap());
        assert_eq!(digests(&live), [first, second], "the first one issues");
        assert!(matches!(add(&folder, DEFAULT_LIFE), Err(RotationError::Waiting)));
        assert!(matches!(retire(&folder, DEFAULT_LIFE), Err(RotationError::NothingToRetire)));

        assert_eq!(switch(&folder, DEFAULT_LIFE).unwrap(), second);
        assert!(live.look().unwrap());
        assert_eq!(digests(&live), [second, first]);
        assert_eq!(retirable(&folder, DEFAULT_LIFE).unwrap(), first);
        assert_eq!(live.now().message(100).renew_within_ms, 2000);

        assert_eq!(retire(&folder, DEFAULT_LIFE).unwrap(), second);
        assert!(live.look().unwrap());
        assert_eq!(digests(&live), [second]);
        assert!(!folder.join("key.der").exists(), "its key is gone");
        let third = add(&folder, DEFAULT_LIFE).unwrap();
        switch(&folder, DEFAULT_LIFE).unwrap();
        retire(&folder, DEFAULT_LIFE).unwrap();
        assert!(live.look().unwrap());
        assert_eq!(digests(&live), [third]);

        fs::write(folder.join("authorities.json"), r#"{"trusted":["../x"],"issuing":"../x"}"#).unwrap();
        assert!(matches!(live.look(), Err(CaError::Damaged)));
        assert_eq!(digests(&live), [third], "a damaged file changes nothing");
    }
}
