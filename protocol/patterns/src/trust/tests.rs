//! Attacks on a set of metadata, each beside the good set that it was made from.

use std::collections::BTreeMap;

use jiff::{Timestamp as Time, ToSpan as _};
use tm_protocol::ids::{EndpointId, Sha256};
use tough::schema::{Snapshot, Timestamp};
use uuid::Uuid;

use super::*;

const DAY: i64 = 24;

fn now() -> Time {
    Time::from_second(1_800_000_000).unwrap()
}

fn in_days(days: i64) -> Time {
    now() + (days * DAY).hours()
}

fn endpoint(n: u128) -> EndpointId {
    EndpointId::new(Uuid::from_u128(n))
}

fn key() -> SigningKey {
    SigningKey::generate().unwrap()
}

/// All keys of a fleet, those of the manager among them.
struct Fleet {
    root: Vec<SigningKey>,
    targets: SigningKey,
    roles: BTreeMap<Delegate, Vec<SigningKey>>,
    snapshot: SigningKey,
    timestamp: SigningKey,
    bundle: Bundle,
    version: u64,
}

fn holders_of(keys: &[SigningKey]) -> Holders {
    Holders {
        keys: keys.iter().map(SigningKey::public).collect(),
        threshold: u64::try_from(keys.len()).unwrap(),
    }
}

fn entry(text: &str, kind: Kind) -> Entry {
    let about = About { name: text.to_owned(), kind, endpoints: None };
    Entry { sha256: Sha256::of(text.as_bytes()), size: u64::try_from(text.len()).unwrap(), about }
}

impl Fleet {
    fn new() -> Self {
        Self::with_keys(1)
    }

    /// A fleet whose `detect` needs as many signatures as it has keys.
    fn with_keys(detect: usize) -> Self {
        let roles: BTreeMap<_, _> = Delegate::ALL
            .into_iter()
            .map(|role| {
                let count = if role == Delegate::Detect { detect } else { 1 };
                (role, (0..count).map(|_| key()).collect())
            })
            .collect();
        let empty = Bundle {
            roots: vec![],
            timestamp: String::new(),
            snapshot: String::new(),
            targets: String::new(),
            roles: BTreeMap::new(),
        };
        let mut fleet = Self {
            root: vec![key()],
            targets: key(),
            roles,
            snapshot: key(),
            timestamp: key(),
            bundle: empty,
            version: 0,
        };
        let root = fleet.make_root(1);
        fleet.bundle.roots.push(root);
        let named: Vec<_> = fleet.roles.iter().map(|(role, keys)| (*role, holders_of(keys))).collect();
        let mut file = unsigned(targets(1, &named, in_days(365)).unwrap());
        sign(&mut file, &fleet.targets).unwrap();
        fleet.bundle.targets = text(&file);
        for role in Delegate::ALL {
            fleet.list(role, 1, &[]);
        }
        fleet.list(Delegate::Detect, 2, &[entry("rule a", Kind::Detection)]);
        fleet.list(Delegate::Cleanup, 2, &[entry("cure c", Kind::Custom)]);
        fleet.seal(in_days(14));
        fleet
    }

    fn make_root(&self, version: u64) -> String {
        let roles = [
            (TopRole::Root, holders_of(&self.root)),
            (TopRole::Targets, Holders::one(self.targets.public())),
            (TopRole::Snapshot, Holders::one(self.snapshot.public())),
            (TopRole::Timestamp, Holders::one(self.timestamp.public())),
        ];
        let mut file = unsigned(root(version, &roles, in_days(365)).unwrap());
        self.root.iter().for_each(|key| sign(&mut file, key).unwrap());
        text(&file)
    }

    /// Lists patterns, signed by all keys of the role.
    fn list(&mut self, role: Delegate, version: u64, entries: &[Entry]) {
        let mut file = unsigned(super::role(role, version, entries, in_days(365)).unwrap());
        self.roles[&role].iter().for_each(|key| sign(&mut file, key).unwrap());
        self.bundle.roles.insert(role.to_string(), text(&file));
    }

    /// The manager's part: it always names what is there.
    fn seal(&mut self, expires: Time) {
        self.version += 1;
        online(&mut self.bundle, self.version, expires, (&self.snapshot, &self.timestamp)).unwrap();
    }

    fn anchor(&self) -> Sha256 {
        root_digest(&self.bundle.roots[0])
    }

    fn check(&self) -> Result<Verified, TrustError> {
        Verified::check(Start::Anchor(self.anchor()), self.bundle.clone(), now())
    }

    fn check_after(&self, before: &Verified) -> Result<Verified, TrustError> {
        Verified::check(Start::After(before), self.bundle.clone(), now())
    }
}

fn code<T>(result: Result<T, TrustError>) -> &'static str {
    result.err().map_or("accepted", |error| error.code())
}

#[test]
fn a_good_set_is_accepted_kept_and_admits_what_was_signed() {
    let mut fleet = Fleet::new();
    let set = fleet.check().unwrap();
    let rule = Sha256::of(b"rule a");
    let (about, size) = set.admit(rule, Use::Look, endpoint(1)).unwrap();
    assert_eq!((about.name.as_str(), size), ("rule a", 6));
    assert_eq!(code(set.admit(Sha256::of(b"rule b"), Use::Look, endpoint(1))), "pattern-unsigned");

    let kept = Bundle::parse(&set.bundle().to_bytes()).unwrap();
    let restored = Verified::restore(kept).unwrap();
    assert!(restored.lists(rule));
    assert_eq!(restored.versions(), set.versions());

    fleet.list(Delegate::Detect, 3, &[entry("rule b", Kind::Detection)]);
    fleet.seal(in_days(14));
    let next = fleet.check_after(&restored).unwrap();
    assert!(next.lists(Sha256::of(b"rule b")) && !next.lists(rule), "what is no longer listed is withdrawn");
    assert_eq!(entries(Delegate::Detect, &next.role(Delegate::Detect).signed).unwrap().len(), 1);
    assert_eq!(role_holders(&next.targets().signed, Delegate::Detect).unwrap().threshold, 1);
    assert_eq!(holders(&next.root().signed, TopRole::Root), Some(holders_of(&fleet.root)));
}

#[test]
fn nothing_goes_back() {
    let mut fleet = Fleet::new();
    let old = fleet.bundle.clone();
    fleet.list(Delegate::Detect, 3, &[entry("rule b", Kind::Detection)]);
    fleet.seal(in_days(14));
    let set = fleet.check().unwrap();
    let replay = Verified::check(Start::After(&set), old.clone(), now());
    assert_eq!(code(replay), "trust-rollback");
    // The thief of the manager's keys signs the old list anew, with higher numbers.
    fleet.bundle.roles.clone_from(&old.roles);
    fleet.seal(in_days(14));
    assert!(
        matches!(fleet.check_after(&set), Err(TrustError::Rollback { role, found: 2, seen: 3 }) if role == "detect")
    );
    assert_eq!(code(fleet.check()), "accepted", "the control: who has seen nothing newer takes it");
}

#[test]
fn what_is_held_back_is_noticed_and_what_is_in_force_stays_usable() {
    let mut fleet = Fleet::new();
    fleet.seal(in_days(14));
    let set = fleet.check().unwrap();
    let later = in_days(15);
    let frozen = Verified::check(Start::After(&set), fleet.bundle.clone(), later);
    assert_eq!(code(frozen), "trust-expired");
    assert_eq!(set.expired(later).unwrap().what, "snapshot");
    assert_eq!(set.expired(now()), None);
    assert!(set.admit(Sha256::of(b"rule a"), Use::Look, endpoint(1)).is_ok());
    fleet.seal(in_days(28));
    assert!(Verified::check(Start::After(&set), fleet.bundle.clone(), later).is_ok());
    // The manager cannot prolong what the desk signed.
    fleet.seal(in_days(4000));
    let ended = Verified::check(Start::After(&set), fleet.bundle.clone(), in_days(366));
    assert_eq!(code(ended), "trust-expired");
}

#[test]
fn files_of_different_sets_do_not_go_together() {
    let mut fleet = Fleet::new();
    let first = fleet.bundle.clone();
    fleet.list(Delegate::Detect, 3, &[]);
    fleet.list(Delegate::Cleanup, 3, &[]);
    fleet.seal(in_days(14));
    let good = fleet.bundle.clone();
    assert_eq!(code(fleet.check()), "accepted");
    let mixes: [fn(&mut Bundle, &Bundle); 4] = [
        |to, from| to.snapshot.clone_from(&from.snapshot),
        |to, from| to.timestamp.clone_from(&from.timestamp),
        |to, from| drop(to.roles.insert("detect".into(), from.roles["detect"].clone())),
        |to, _| drop(to.roles.remove("expert")),
    ];
    for mix in mixes {
        fleet.bundle = good.clone();
        mix(&mut fleet.bundle, &first);
        assert_eq!(code(fleet.check()), "trust-mixed");
    }
    // One version never has two texts.
    fleet.bundle = good;
    let set = fleet.check().unwrap();
    fleet.list(Delegate::Detect, 3, &[entry("rule x", Kind::Detection)]);
    fleet.seal(in_days(14));
    assert_eq!(code(fleet.check_after(&set)), "trust-mixed");
}

#[test]
fn a_role_signs_only_its_own() {
    let mut fleet = Fleet::new();
    let good = fleet.bundle.clone();
    // A detect key signs a cure as the role `cleanup`, and the other way round.
    for (signer, role, kind) in [
        (Delegate::Detect, Delegate::Cleanup, Kind::Custom),
        (Delegate::Cleanup, Delegate::Detect, Kind::Detection),
    ] {
        fleet.bundle = good.clone();
        let mut file = unsigned(super::role(role, 9, &[entry("x", kind)], in_days(365)).unwrap());
        fleet.roles[&signer].iter().for_each(|key| sign(&mut file, key).unwrap());
        fleet.bundle.roles.insert(role.to_string(), text(&file));
        fleet.seal(in_days(14));
        assert_eq!(fleet.check().err(), Some(TrustError::WrongRole(role.to_string())));
    }
    // A detect key signs a cure in its own file: it cannot be made, and forged it is refused.
    assert_eq!(
        code(super::role(Delegate::Detect, 9, &[entry("x", Kind::Custom)], in_days(1))),
        "trust-wrong-role"
    );
    for (from, to) in [("\"detection\"", "\"custom\""), ("detect/", "cleanup/")] {
        fleet.bundle = good.clone();
        let forged = good.roles["detect"].replace(from, to);
        let mut file: Signed<Targets> = parse("detect", &forged).unwrap();
        sign(&mut file, &fleet.roles[&Delegate::Detect][0]).unwrap();
        fleet.bundle.roles.insert("detect".into(), text(&file));
        fleet.seal(in_days(14));
        assert_eq!(code(fleet.check()), "trust-wrong-role", "{to}");
    }
    // A good cure is not something to look for, nor a rule a cure.
    fleet.bundle = good;
    let set = fleet.check().unwrap();
    let (rule, cure) = (Sha256::of(b"rule a"), Sha256::of(b"cure c"));
    assert_eq!(code(set.admit(cure, Use::Look, endpoint(1))), "pattern-wrong-role");
    assert_eq!(code(set.admit(rule, Use::Clean, endpoint(1))), "pattern-wrong-role");
    assert!(set.admit(cure, Use::Clean, endpoint(1)).is_ok());
}

#[test]
fn a_pattern_for_others_is_not_ours() {
    let mut fleet = Fleet::new();
    let mut named = entry("rule n", Kind::Detection);
    named.about.endpoints = Some(vec![endpoint(2), endpoint(3)]);
    fleet.list(Delegate::Detect, 3, &[named]);
    fleet.seal(in_days(14));
    let set = fleet.check().unwrap();
    let admit = |n| code(set.admit(Sha256::of(b"rule n"), Use::Look, endpoint(n)));
    assert_eq!((admit(2), admit(3), admit(1)), ("accepted", "accepted", "pattern-not-for-endpoint"));
}

#[test]
fn the_manager_alone_signs_no_pattern() {
    let mut fleet = Fleet::new();
    let own = [key()];
    for signers in [&own[..], std::slice::from_ref(&fleet.snapshot), &[]] {
        let mut file = unsigned(
            super::role(Delegate::Detect, 9, &[entry("evil", Kind::Detection)], in_days(9)).unwrap(),
        );
        signers.iter().for_each(|key| sign(&mut file, key).unwrap());
        fleet.bundle.roles.insert("detect".into(), text(&file));
        online(&mut fleet.bundle, 99, in_days(14), (&fleet.snapshot, &fleet.timestamp)).unwrap();
        assert!(matches!(code(fleet.check()), "trust-bad-signature" | "trust-wrong-role"));
    }
    // Nor does it name other keys for the role, or another root.
    let thief = Fleet::new();
    fleet.bundle.targets.clone_from(&thief.bundle.targets);
    fleet.bundle.roles.clone_from(&thief.bundle.roles);
    online(&mut fleet.bundle, 100, in_days(14), (&fleet.snapshot, &fleet.timestamp)).unwrap();
    assert_eq!(code(fleet.check()), "trust-bad-signature");
    let swapped = Verified::check(Start::Anchor(fleet.anchor()), thief.bundle.clone(), now());
    assert_eq!(code(swapped), "trust-unknown-root");
    let mut appended = thief.bundle.clone();
    appended.roots = vec![fleet.bundle.roots[0].clone(), thief.make_root(2)];
    assert_eq!(code(Verified::check(Start::Anchor(fleet.anchor()), appended, now())), "trust-bad-root");
}

#[test]
fn a_threshold_is_of_different_keys() {
    let mut fleet = Fleet::with_keys(2);
    assert!(fleet.check().is_ok(), "the control");
    let mut file = unsigned(super::role(Delegate::Detect, 3, &[], in_days(9)).unwrap());
    sign(&mut file, &fleet.roles[&Delegate::Detect][0]).unwrap();
    let once = file.signatures[0].clone();
    for signatures in [vec![once.clone()], vec![once.clone(), once]] {
        file.signatures = signatures;
        fleet.bundle.roles.insert("detect".into(), text(&file));
        fleet.seal(in_days(14));
        assert_eq!(code(fleet.check()), "trust-bad-signature");
    }
    file.signatures.truncate(1);
    sign(&mut file, &fleet.roles[&Delegate::Detect][1]).unwrap();
    fleet.bundle.roles.insert("detect".into(), text(&file));
    fleet.seal(in_days(14));
    assert!(fleet.check().is_ok());
    let holders = Holders { keys: vec![fleet.targets.public()], threshold: 2 };
    assert_eq!(code(targets(1, &[(Delegate::Detect, holders)], in_days(1))), "trust-malformed");
}

#[test]
fn one_changed_byte_anywhere_is_refused() {
    let fleet = Fleet::new();
    let bytes = fleet.bundle.to_bytes();
    for at in (0..bytes.len()).step_by(3) {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        let outcome = Bundle::parse(&changed)
            .and_then(|bundle| Verified::check(Start::Anchor(fleet.anchor()), bundle, now()));
        assert!(
            outcome.is_err(),
            "byte {at}: {}",
            String::from_utf8_lossy(&changed[at.saturating_sub(20)..])
        );
    }
}

#[test]
fn a_root_follows_only_from_the_one_before() {
    let mut fleet = Fleet::new();
    let set = fleet.check().unwrap();
    let anchor = fleet.anchor();
    // New keys for everything online and for the root, signed by old and new.
    let old_root = std::mem::replace(&mut fleet.root, vec![key()]);
    fleet.timestamp = key();
    fleet.snapshot = key();
    let mut second: Signed<Root> = parse("root", &fleet.make_root(2)).unwrap();
    let by_new_alone = text(&second);
    old_root.iter().for_each(|key| sign(&mut second, key).unwrap());
    fleet.bundle.roots.push(text(&second));
    // Numbers begin anew with other keys.
    fleet.version = 0;
    fleet.seal(in_days(14));
    let next = fleet.check_after(&set).unwrap();
    assert_eq!(next.versions().root, 2);
    assert_eq!(code(Verified::check(Start::Anchor(anchor), fleet.bundle.clone(), now())), "accepted");
    // Who was enrolled with the second needs not know the first.
    let of_second = root_digest(&fleet.bundle.roots[1]);
    assert!(Verified::check(Start::Anchor(of_second), fleet.bundle.clone(), now()).is_ok());

    let mut forged = fleet.bundle.clone();
    forged.roots[1] = by_new_alone;
    assert_eq!(code(Verified::check(Start::After(&set), forged.clone(), now())), "trust-bad-root");
    forged.roots.truncate(1);
    assert_eq!(code(Verified::check(Start::After(&next), forged, now())), "trust-rollback");
    let mut gap = fleet.bundle.clone();
    gap.roots.remove(1);
    fleet.root.extend(old_root);
    gap.roots.push(fleet.make_root(3));
    assert_eq!(code(Verified::check(Start::After(&set), gap, now())), "trust-bad-root");
}

#[test]
fn junk_is_refused_without_a_panic() {
    let fleet = Fleet::new();
    for junk in [&b""[..], b"{}", b"[]", b"\xff", &[b'['; 100_000]] {
        assert_eq!(code(Bundle::parse(junk)), "trust-malformed");
    }
    let parts: [fn(&mut Bundle) -> &mut String; 4] =
        [|b| &mut b.timestamp, |b| &mut b.snapshot, |b| &mut b.targets, |b| &mut b.roots[0]];
    for part in parts {
        for junk in ["", "{}", "null", "{\"signed\":{},\"signatures\":[]}"] {
            let mut bundle = fleet.bundle.clone();
            *part(&mut bundle) = junk.to_owned();
            let result = Verified::check(Start::Anchor(root_digest(&bundle.roots[0])), bundle, now());
            assert_eq!(code(result), "trust-malformed");
        }
    }
    // A file of another kind in a file's place.
    let mut bundle = fleet.bundle.clone();
    bundle.snapshot.clone_from(&fleet.bundle.timestamp);
    assert!(parse::<Snapshot>("snapshot", &bundle.snapshot).is_err());
    assert!(parse::<Timestamp>("timestamp", &bundle.snapshot).is_ok());
    assert_eq!(code(Verified::check(Start::Anchor(fleet.anchor()), bundle, now())), "trust-malformed");
}
