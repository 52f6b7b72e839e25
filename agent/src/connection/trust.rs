//! Whose patterns this endpoint uses: the fleet's signed metadata, fetched, judged and kept.
//!
//! On disk, in the folder `trust`: `anchor`, the digest of a root of trust in hex, from the enrollment token;
//! `set.json`, the set in force (JSON of `tm_patterns::trust::Bundle`).
//!
//! **Invariant:** a set is in force only after it was judged whole; whatever is refused leaves the one before in
//! force.
//! **Invariant:** without an anchor no pattern is used. A manager never supplies it.

use std::{fs, io, time::Duration};

use jiff::Timestamp;
use tm_patterns::trust::{Bundle, MAX_BUNDLE, Start, TrustError, Use, Verified};
use tm_protocol::{
    address::Address,
    ids::{EndpointId, Sha256},
    report::Failure,
    task::PatternRef,
};
use tokio::{sync::Mutex, time::timeout};

use super::{
    Dialler,
    fetch::{aside, small},
};
use crate::paths::{Paths, make_folder, replace};

/// How long the metadata may take.
const TRANSFER: Duration = Duration::from_secs(60);
/// Longest anchor that is read, in bytes.
const MAX_ANCHOR: u64 = 256;

/// One at a time: two scans must not each put a set in force.
static TURN: Mutex<()> = Mutex::const_new(());

/// The set to go by, and what the manager should know about it.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) set: Result<Verified, Failure>,
    pub(crate) remarks: Vec<Remark>,
}

/// A code for programs and a sentence for people.
pub(crate) type Remark = (&'static str, String);

/// Notes whose patterns an endpoint that is being enrolled will use. What an enrollment before it left goes.
pub(crate) fn anchor(paths: &Paths, root: Option<Sha256>) -> io::Result<()> {
    let folder = paths.trust();
    make_folder(&folder)?;
    for name in ["set.json", "anchor"] {
        match fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    root.map_or(Ok(()), |root| replace(&folder.join("anchor"), format!("{root}\n").as_bytes()))
}

/// The set in force, as it was kept; `None` if there is none or it is damaged. Blocks.
pub(crate) fn in_force(paths: &Paths) -> Option<Verified> {
    kept(paths).ok().flatten()
}

/// The newest good set that can be had.
pub(crate) async fn current(
    paths: &Paths,
    manager: Option<&Address>,
    dialler: &Dialler,
    now: Timestamp,
) -> Judged {
    let _turn = TURN.lock().await;
    let set = paths.trust().join("set.json");
    let known = aside(move || fs::read(set).ok().map(|bytes| Sha256::of(&bytes))).await.flatten();
    let fetched = match manager {
        Some(address) => fetch(address, dialler, known).await,
        None => Err("no manager's address is known".to_owned()),
    };
    let paths = paths.clone();
    let fault = || Failure::new("internal", "the signed metadata could not be judged");
    aside(move || judge(&paths, fetched, now))
        .await
        .unwrap_or_else(|| Judged { set: Err(fault()), remarks: Vec::new() })
}

/// Whether this endpoint may look with the pattern that an order names.
pub(crate) fn admit(set: &Verified, wanted: &PatternRef, endpoint: EndpointId) -> Result<(), Failure> {
    match set.admit(wanted.sha256, Use::Look, endpoint) {
        Ok((_, size)) if size == wanted.size => Ok(()),
        Ok((_, size)) => {
            let message = format!("pattern {} has {size} bytes, not {}", wanted.sha256, wanted.size);
            Err(Failure::new("pattern-altered", message))
        }
        Err(error) => Err(refusal(&error)),
    }
}

/// What the manager has; nothing if that is what is `known`.
type Fetched = Option<Vec<u8>>;

async fn fetch(address: &Address, dialler: &Dialler, known: Option<Sha256>) -> Result<Fetched, String> {
    let most = u64::try_from(MAX_BUNDLE).unwrap_or(u64::MAX);
    let whole = small(address, dialler, "/v1/trust", most, known);
    let fetched = timeout(TRANSFER, whole).await;
    fetched.map_err(|_| format!("not complete after {} s", TRANSFER.as_secs()))?
}

fn judge(paths: &Paths, fetched: Result<Fetched, String>, now: Timestamp) -> Judged {
    let mut remarks = Vec::new();
    let set = decide(paths, fetched, now, &mut remarks);
    Judged { set, remarks }
}

fn decide(
    paths: &Paths,
    fetched: Result<Fetched, String>,
    now: Timestamp,
    remarks: &mut Vec<Remark>,
) -> Result<Verified, Failure> {
    let Some(anchor) = read_anchor(paths) else {
        return Err(Failure::new(
            "trust-missing",
            "this endpoint was enrolled without a root of trust, and uses no pattern that a manager sends; \
             enroll it with a token that `tmctl token create` made on a desk with one",
        ));
    };
    let before = kept(paths).unwrap_or_else(|error| {
        let message = format!("the kept metadata are damaged and begin anew: {error}");
        remarks.push(("trust-damaged", message));
        None
    });
    let start = before.as_ref().map_or(Start::Anchor(anchor), Start::After);
    let bytes = match (fetched, &before) {
        (Ok(Some(bytes)), _) => bytes,
        // A task that goes on while no manager is in reach goes on with what is known. That nothing has changed makes
        // what is known no fresher.
        (Ok(None) | Err(_), Some(before)) => return Ok(with_remark(before.clone(), now, remarks)),
        (Ok(None), None) => {
            let message = "the manager says that nothing has changed, and there is nothing yet".to_owned();
            return Err(Failure::new("trust-fetch-failed", message));
        }
        (Err(why), None) => {
            let message = format!("cannot fetch the signed metadata: {why}");
            return Err(Failure::new("trust-fetch-failed", message));
        }
    };
    match Bundle::parse(&bytes).and_then(|bundle| Verified::check(start, bundle, now)) {
        Ok(set) => {
            if before.as_ref().is_none_or(|before| before.bundle() != set.bundle()) {
                // What was seen must not be forgotten, or it could be undone.
                keep(paths, &set).map_err(|error| {
                    Failure::new("trust-not-kept", format!("cannot keep the signed metadata: {error}"))
                })?;
            }
            Ok(set)
        }
        Err(error) => {
            remarks.push((error.code(), error.to_string()));
            match (error, before) {
                // Detecting goes on with what is in force.
                (TrustError::Expired { .. }, Some(before)) => Ok(before),
                (error, _) => Err(refusal(&error)),
            }
        }
    }
}

fn with_remark(set: Verified, now: Timestamp, remarks: &mut Vec<Remark>) -> Verified {
    if let Some(expired) = set.expired(now) {
        let error = TrustError::Expired { what: expired.what, at: expired.at };
        remarks.push((error.code(), error.to_string()));
    }
    set
}

fn refusal(error: &TrustError) -> Failure {
    Failure::new(error.code(), error.to_string())
}

fn read_anchor(paths: &Paths) -> Option<Sha256> {
    let path = paths.trust().join("anchor");
    let is_short = fs::metadata(&path).is_ok_and(|file| file.len() <= MAX_ANCHOR);
    is_short.then(|| fs::read_to_string(path).ok()?.trim().parse().ok()).flatten()
}

/// The set that was kept; `Ok(None)` if there never was one.
fn kept(paths: &Paths) -> Result<Option<Verified>, TrustError> {
    match fs::read(paths.trust().join("set.json")) {
        Ok(bytes) => Bundle::parse(&bytes).and_then(Verified::restore).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrustError::Malformed(error.to_string())),
    }
}

fn keep(paths: &Paths, set: &Verified) -> io::Result<()> {
    make_folder(&paths.trust())?;
    replace(&paths.trust().join("set.json"), &set.bundle().to_bytes())
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan as _;
    use tm_patterns::trust::{
        About, Delegate, Entry, Holders, Role, SigningKey, TopRole, online, role, root, root_digest, sign,
        targets, text, unsigned,
    };
    use uuid::Uuid;

    use super::*;

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn signed<T: Role>(file: T, key: &SigningKey) -> String {
        let mut file = unsigned(file);
        sign(&mut file, key).unwrap();
        text(&file)
    }

    /// A fleet in which one key does everything.
    struct Fleet(SigningKey, Bundle);

    impl Fleet {
        fn new() -> Self {
            let key = SigningKey::generate().unwrap();
            let own = || Holders::one(key.public());
            let tops = [TopRole::Root, TopRole::Targets, TopRole::Snapshot, TopRole::Timestamp];
            let until = now() + 8760.hours();
            let bundle = Bundle {
                roots: vec![signed(root(1, &tops.map(|top| (top, own())), until).unwrap(), &key)],
                timestamp: String::new(),
                snapshot: String::new(),
                targets: signed(targets(1, &Delegate::ALL.map(|role| (role, own())), until).unwrap(), &key),
                roles: Delegate::ALL
                    .map(|name| (name.to_string(), signed(role(name, 1, &[], until).unwrap(), &key)))
                    .into(),
            };
            let mut fleet = Self(key, bundle);
            fleet.list(2, "rule a");
            fleet
        }

        fn list(&mut self, version: u64, rule: &str) {
            let about = About { name: "p".into(), kind: Delegate::Detect.kind(), endpoints: None };
            let entry = Entry { sha256: Sha256::of(rule.as_bytes()), size: 6, about };
            let file = role(Delegate::Detect, version, &[entry], now() + 8760.hours()).unwrap();
            self.1.roles.insert("detect".into(), signed(file, &self.0));
            online(&mut self.1, version, now() + 336.hours(), (&self.0, &self.0)).unwrap();
        }

        fn bytes(&self) -> Result<Fetched, String> {
            Ok(Some(self.1.to_bytes()))
        }
    }

    fn paths() -> (Paths, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        (Paths::new(folder.path().to_path_buf()), folder)
    }

    fn code(judged: &Judged) -> (&str, Vec<&str>) {
        let code = judged.set.as_ref().err().map_or("good", |failure| failure.code.as_str());
        (code, judged.remarks.iter().map(|(code, _)| *code).collect())
    }

    #[test]
    fn without_an_anchor_nothing_is_used_and_no_manager_gives_one() {
        let (paths, _folder) = paths();
        let fleet = Fleet::new();
        assert_eq!(code(&judge(&paths, fleet.bytes(), now())), ("trust-missing", vec![]));
        anchor(&paths, Some(root_digest(&fleet.1.roots[0]))).unwrap();
        assert_eq!(code(&judge(&paths, fleet.bytes(), now())), ("good", vec![]));
        assert!(in_force(&paths).unwrap().lists(Sha256::of(b"rule a")));
        // Enrolled anew, elsewhere, without one.
        anchor(&paths, None).unwrap();
        assert!(in_force(&paths).is_none());
        assert_eq!(code(&judge(&paths, fleet.bytes(), now())), ("trust-missing", vec![]));
    }

    #[test]
    fn what_is_refused_leaves_the_set_in_force() {
        let (paths, _folder) = paths();
        let mut fleet = Fleet::new();
        anchor(&paths, Some(root_digest(&fleet.1.roots[0]))).unwrap();
        let old = fleet.bytes();
        fleet.list(3, "rule b");
        let new = fleet.bytes();
        assert_eq!(code(&judge(&paths, new.clone(), now())), ("good", vec![]));
        let stranger = Fleet::new();
        for (bytes, expected) in [
            (old, "trust-rollback"),
            (stranger.bytes(), "trust-bad-signature"),
            (Ok(Some(b"junk".to_vec())), "trust-malformed"),
        ] {
            assert_eq!(code(&judge(&paths, bytes, now())), (expected, vec![expected]));
            assert!(in_force(&paths).unwrap().lists(Sha256::of(b"rule b")));
        }
        // Held back, or out of reach, after its end: it is said, and detecting goes on.
        let later = now() + 400.hours();
        assert_eq!(code(&judge(&paths, Ok(None), now())), ("good", vec![]), "nothing new");
        for fetched in [new.clone(), Err("away".to_owned()), Ok(None)] {
            assert_eq!(code(&judge(&paths, fetched, later)), ("good", vec!["trust-expired"]));
        }
        // Damage is said, however often nothing has changed, and does not stop it for ever.
        fs::write(paths.trust().join("set.json"), "{").unwrap();
        assert_eq!(
            code(&judge(&paths, Err("away".to_owned()), now())),
            ("trust-fetch-failed", vec!["trust-damaged"])
        );
        assert_eq!(code(&judge(&paths, Ok(None), now())), ("trust-fetch-failed", vec!["trust-damaged"]));
        assert_eq!(code(&judge(&paths, new, now())), ("good", vec!["trust-damaged"]));
    }

    #[test]
    fn only_what_is_listed_with_its_length_is_admitted() {
        let (paths, _folder) = paths();
        let fleet = Fleet::new();
        anchor(&paths, Some(root_digest(&fleet.1.roots[0]))).unwrap();
        let set = judge(&paths, fleet.bytes(), now()).set.unwrap();
        let admitted = |text: &str, size| {
            let wanted = PatternRef { sha256: Sha256::of(text.as_bytes()), size, name: "p".into() };
            admit(&set, &wanted, EndpointId::new(Uuid::from_u128(1))).err().map(|failure| failure.code)
        };
        assert_eq!(admitted("rule a", 6), None);
        assert_eq!(admitted("rule a", 7).as_deref(), Some("pattern-altered"));
        assert_eq!(admitted("rule b", 6).as_deref(), Some("pattern-unsigned"));
    }
}
