//! Signed patterns: what a desk can do, and what a manager cannot, even one that a thief took whole.

use std::{fs, path::PathBuf, process::Command};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tm_patterns::trust::{self, About, Bundle, Delegate, Entry, Holders, SigningKey, TopRole};
use tm_protocol::ids::Sha256;
use tm_tests::{Agent, Lab, Output, PATIENCE, output::rows, samples, wait_for};

const EVIL: &str = "rule everything { condition: filesize > 0 }";
const OTHER: &str = "rule other { strings: $a = \"another thing\" condition: $a }";

/// Everything that a manager has, in other hands.
struct Thief<'l> {
    lab: &'l Lab,
    snapshot: SigningKey,
    timestamp: SigningKey,
    own: SigningKey,
}

impl<'l> Thief<'l> {
    fn new(lab: &'l Lab) -> Self {
        let key = |name: &str| {
            let text = fs::read_to_string(lab.manager_data().join("trust").join(name))
                .expect("the lab is as a manager and a desk leave it");
            SigningKey::from_text(&text, None).expect("the lab is as a manager and a desk leave it")
        };
        let own = SigningKey::generate().expect("the lab is as a manager and a desk leave it");
        Self { lab, snapshot: key("snapshot.key"), timestamp: key("timestamp.key"), own }
    }

    fn sql(&self, sql: &str) -> String {
        let store = fs::read_dir(self.lab.manager_data())
            .expect("the lab is as a manager and a desk leave it")
            .flatten()
            .map(|entry| entry.path());
        let store = store
            .into_iter()
            .find(|path| path.extension().is_some_and(|ext| ext == "db"))
            .expect("the lab is as a manager and a desk leave it");
        let output = Command::new("sqlite3")
            .args(["-cmd", ".timeout 5000"])
            .arg(store)
            .arg(sql)
            .output()
            .expect("sqlite3 is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("the lab is as a manager and a desk leave it")
    }

    fn bundle(&self) -> Bundle {
        Bundle::parse(self.sql("SELECT bundle FROM trust").trim_end().as_bytes())
            .expect("the lab is as a manager and a desk leave it")
    }

    /// Puts metadata in the store, under the feet of the running manager.
    fn put(&self, bundle: &Bundle) {
        let text = String::from_utf8(bundle.to_bytes())
            .expect("the lab is as a manager and a desk leave it")
            .replace('\'', "''");
        self.sql(&format!("UPDATE trust SET generation = generation + 1, bundle = '{text}'"));
    }

    /// Signs anew what the manager signs, above everything that was seen.
    fn seal(&self, bundle: &mut Bundle, good_for: SignedDuration) {
        let version = u64::try_from(Timestamp::now().as_second())
            .expect("the lab is as a manager and a desk leave it")
            + 1000;
        let expires = Timestamp::now() + good_for;
        trust::online(bundle, version, expires, (&self.snapshot, &self.timestamp))
            .expect("the lab is as a manager and a desk leave it");
    }

    /// Puts a rule where the manager keeps patterns, as if it had been published.
    fn plant(&self, name: &str, rule: &str) -> Sha256 {
        let sha256 = Sha256::of(rule.as_bytes());
        fs::write(self.lab.manager_data().join("patterns").join(sha256.to_string()), rule)
            .expect("the lab is as a manager and a desk leave it");
        self.sql(&format!(
            "INSERT INTO pattern (sha256, name, kind, size, rules, warnings, imported_by, imported_ms,
                 import_number, published_ms)
             VALUES ('{sha256}', '{name}', 'detection', {}, 1, '[]', 'admin', 1, 1000, 1)",
            rule.len()
        ));
        sha256
    }

    /// A list of the role `detect` that names the rule, signed with keys that a thief has.
    fn list(&self, sha256: Sha256, size: usize, keys: &[&SigningKey]) -> String {
        let about = About { name: "evil".into(), kind: Delegate::Detect.kind(), endpoints: None };
        let entry = Entry {
            sha256,
            size: u64::try_from(size).expect("the lab is as a manager and a desk leave it"),
            about,
        };
        let until = Timestamp::now() + SignedDuration::from_hours(1000);
        let mut file = trust::unsigned(
            trust::role(Delegate::Detect, 900, &[entry], until)
                .expect("the lab is as a manager and a desk leave it"),
        );
        keys.iter().for_each(|key| {
            trust::sign(&mut file, key).expect("the lab is as a manager and a desk leave it")
        });
        trust::text(&file)
    }
}

fn in_good_time() -> SignedDuration {
    SignedDuration::from_hours(24)
}

/// Scans with one pattern; the exit code, and the code of the task.
fn scan(lab: &Lab, agent: &Agent, folder: &std::path::Path, pattern: &str) -> (i32, Option<String>) {
    let output = lab.scan_with(agent, folder, &["--pattern", pattern, "-o", "json"]);
    let code = output.code();
    (
        code,
        lab.newest_task(agent).expect("the lab is as a manager and a desk leave it")["code"]
            .as_str()
            .map(str::to_owned),
    )
}

/// The codes of what the agent told unasked.
fn notices(lab: &Lab) -> Vec<String> {
    let events = rows(&lab.tmctl(["event", "list", "--all", "-o", "json"]).expect(0).json());
    events.iter().filter_map(|event| Some(event["detail"].as_str()?.to_owned())).collect()
}

fn refused(code: &str) -> (i32, Option<String>) {
    (1, Some(code.to_owned()))
}

fn dirty(lab: &Lab) -> PathBuf {
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).expect("the lab is as a manager and a desk leave it");
    fs::write(folder.join("good.txt"), "a good file").expect("the lab is as a manager and a desk leave it");
    folder
}

fn kept_patterns(agent: &Agent) -> usize {
    fs::read_dir(agent.data.join("patterns")).map_or(0, Iterator::count)
}

#[test]
fn a_stolen_manager_makes_no_agent_load_a_rule() {
    let lab = Lab::start();
    let agent = lab.agent();
    let folder = dirty(&lab);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None), "the control");
    let thief = Thief::new(&lab);
    let first = thief.bundle();
    lab.import("other.yar", OTHER).expect(0);
    let good = thief.bundle();
    assert_eq!(scan(&lab, &agent, &folder, "other.yar"), (0, None));
    let kept = kept_patterns(&agent);
    let evil = thief.plant("evil", EVIL);

    // He just orders it.
    assert_eq!(scan(&lab, &agent, &folder, "evil"), refused("pattern-unsigned"));
    // He signs it with all that he has: his own key, the manager's, no key.
    for keys in [&[&thief.own][..], &[&thief.snapshot, &thief.timestamp], &[]] {
        let mut forged = good.clone();
        forged.roles.insert("detect".into(), thief.list(evil, EVIL.len(), keys));
        thief.seal(&mut forged, in_good_time());
        thief.put(&forged);
        let (exit, code) = scan(&lab, &agent, &folder, "evil");
        assert!(matches!(code.as_deref(), Some("trust-bad-signature" | "trust-wrong-role")), "{code:?}");
        assert_eq!(exit, 1);
    }
    // He makes himself the root.
    let own = || Holders::one(thief.own.public());
    let tops = [TopRole::Root, TopRole::Targets, TopRole::Snapshot, TopRole::Timestamp];
    let until = Timestamp::now() + in_good_time();
    let mut root = trust::unsigned(trust::root(2, &tops.map(|top| (top, own())), until).unwrap());
    trust::sign(&mut root, &thief.own).unwrap();
    let mut forged = good.clone();
    forged.roots.push(trust::text(&root));
    thief.put(&forged);
    assert_eq!(scan(&lab, &agent, &folder, "evil"), refused("trust-bad-root"));
    // He gives back what was in force before.
    thief.put(&first);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), refused("trust-rollback"));
    let mut back = good.clone();
    back.roles.clone_from(&first.roles);
    thief.seal(&mut back, in_good_time());
    thief.put(&back);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), refused("trust-rollback"));
    // He mixes.
    let mut mixed = good.clone();
    mixed.roles.insert("detect".into(), first.roles["detect"].clone());
    thief.put(&mixed);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), refused("trust-mixed"));
    // He lets time stand still: it is said, and detecting goes on with what is in force.
    let mut frozen = good.clone();
    thief.seal(&mut frozen, SignedDuration::from_secs(-1));
    thief.put(&frozen);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None));
    assert_eq!(scan(&lab, &agent, &folder, "evil"), refused("pattern-unsigned"));
    // Nothing of his was kept, and every refusal is an event.
    assert_eq!(kept_patterns(&agent), kept);
    let expected =
        ["trust-bad-signature", "trust-bad-root", "trust-rollback", "trust-mixed", "trust-expired"];
    wait_for("the events", PATIENCE, || {
        let seen = notices(&lab);
        expected.iter().all(|code| seen.iter().any(|detail| detail.contains(code))).then_some(())
    });
    // Whole again, all is as before.
    thief.put(&good);
    assert_eq!(scan(&lab, &agent, &folder, "other.yar"), (0, None));
    // A new agent, which has seen nothing, gets the root from its token alone.
    let mut own_root = trust::unsigned(trust::root(1, &tops.map(|top| (top, own())), until).unwrap());
    trust::sign(&mut own_root, &thief.own).unwrap();
    let mut replaced = good.clone();
    replaced.roots = vec![trust::text(&own_root)];
    thief.put(&replaced);
    let (data, output) = lab.enroll(&lab.token(1));
    output.expect(0);
    let anchor = fs::read_to_string(data.join("trust/anchor")).unwrap();
    assert_eq!(anchor.trim(), trust::root_digest(&good.roots[0]).to_string());
}

#[test]
fn one_changed_byte_and_a_pattern_for_others_are_refused() {
    let lab = Lab::start();
    let agent = lab.agent();
    let folder = dirty(&lab);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let sha256 = Sha256::of(samples::EICAR_RULE.as_bytes()).to_string();
    let blob = lab.manager_data().join("patterns").join(sha256);
    let good = fs::read(&blob).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&blob, bad).unwrap();
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), refused("pattern-altered"));
    fs::write(&blob, good).unwrap();
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None), "the control");

    let other = lab.path("for-others.yar");
    fs::write(&other, OTHER).unwrap();
    let other = other.to_str().unwrap();
    let nobody = "01a20cc0-8ad4-7176-b7c2-6ed43395768c";
    lab.tmctl(["pattern", "import", other, "--endpoint", nobody]).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "for-others.yar"), refused("pattern-not-for-endpoint"));
    lab.tmctl(["pattern", "import", other, "--endpoint", nobody, "--endpoint", &agent.id]).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "for-others.yar"), (0, None));
    // A cure is not something to scan with, and a withdrawn rule is none any more.
    let cure = lab.path("cure.yar");
    fs::write(&cure, "rule cure { condition: false }").unwrap();
    lab.tmctl(["pattern", "import", cure.to_str().unwrap(), "--role", "cleanup"]).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "cure.yar"), refused("pattern-wrong-role"));
    lab.tmctl(["pattern", "retire", "eicar.yar"]).expect(0);
    lab.scan_with(&agent, &folder, &["--pattern", "eicar.yar"]).expect(3);
}

#[test]
fn a_pattern_is_tried_on_the_desk_before_anything_is_sent() {
    let mut lab = Lab::start();
    let (bad, good) = (lab.path("bad.yar"), lab.path("good.yar"));
    fs::write(&bad, "rule bad {\n  condition: nothing\n}").unwrap();
    fs::write(&good, OTHER).unwrap();
    lab.stop_manager();
    let output = lab.tmctl(["pattern", "import", bad.to_str().unwrap()]).expect(3);
    assert!(output.err().contains("does not compile") && output.err().contains(":2:"), "{}", output.err());
    let draft = lab.path("draft.json");
    let args = ["pattern", "draft", bad.to_str().unwrap(), "--out", draft.to_str().unwrap()];
    let output = lab.tmctl(args).expect(3);
    assert!(output.err().contains(":2:"), "{}", output.err());
    assert!(!draft.exists());
    // The control: what is good gets as far as the manager, who is away.
    let output = lab.tmctl(["pattern", "import", good.to_str().unwrap()]);
    assert!(output.code() != 3 && !output.err().contains("compile"), "{}", output.err());
}

#[test]
fn a_stolen_manager_removes_no_file_that_no_signed_pattern_detected() {
    let lab = Lab::start();
    let agent = lab.agent();
    let folder = dirty(&lab);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None));
    let thief = Thief::new(&lab);
    let good_file = folder.join("good.txt");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02X}")).collect::<String>();
    let path = hex(good_file.to_str().unwrap().as_bytes());
    let digest = Sha256::of(b"a good file");
    // The detection that the agent reported becomes one of the good file, and a second one is made up.
    thief.sql(&format!(
        "UPDATE incident SET state = 'awaiting-cleanup';
         INSERT INTO detection (task_id, ordinal, endpoint_id, path, member, pattern_sha256, rule, sha256, size,
                 found_ms, identity, incident_id)
             SELECT task_id, 900, endpoint_id, X'{path}', member, pattern_sha256, rule, '{digest}', 11, found_ms,
                 '{}', incident_id FROM detection WHERE ordinal = 1;
         UPDATE detection SET path = X'{path}', sha256 = '{digest}', size = 11 WHERE ordinal = 1;",
        Sha256::of(b"made up")
    ));
    let report = lab.tmctl(["cleanup", "run", agent.id.as_str(), "--wait", "-o", "json"]);
    let items = items(&report);
    assert!(good_file.exists(), "{}", report.both());
    let codes: Vec<&str> = items.iter().filter_map(|item| item["failure"]["code"].as_str()).collect();
    assert_eq!(codes, ["not-detected-here"], "{}", report.both());
    // What the agent itself detected with a signed pattern is all that it removes, whatever the manager says of it.
    assert!(!folder.join("a.com").exists(), "the control: {}", report.both());
}

fn items(output: &Output) -> Vec<Value> {
    let report = output.json();
    let tasks = report["tasks"].as_array().expect("a report has tasks").clone();
    tasks.iter().flat_map(|task| rows(&task["items"])).collect()
}

#[test]
fn two_desks_that_publish_at_once_are_told_and_nothing_is_half_published() {
    let lab = Lab::start();
    let write = |name: &str, text: &str| {
        let path = lab.path(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (one, two) = (write("one.yar", OTHER), write("two.yar", samples::EICAR_RULE));
    let (first, second) = (write("first.draft", ""), write("second.draft", ""));
    lab.tmctl(["pattern", "draft", &one, "--out", &first]).expect(0);
    lab.tmctl(["pattern", "draft", &two, "--out", &second]).expect(0);
    // Unsigned it is refused before anything is sent.
    lab.tmctl(["pattern", "publish", &first]).expect(3);
    for draft in [&first, &second] {
        lab.tmctl(["pattern", "sign", draft]).expect(0);
    }
    lab.tmctl(["pattern", "publish", &first]).expect(0);
    let late = lab.tmctl(["pattern", "publish", &second]).expect(3);
    assert!(late.err().contains("somebody else published meanwhile"), "{}", late.err());
    let states = || {
        let listed = rows(&lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json());
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        listed.iter().map(|row| (text(row, "name"), text(row, "state"))).collect::<Vec<_>>()
    };
    let pair = |name: &str, state: &str| (name.to_owned(), state.to_owned());
    assert_eq!(states(), [pair("two.yar", "draft"), pair("one.yar", "published")]);
    // Done again from what is there now, both are in force.
    lab.tmctl(["pattern", "import", &two]).expect(0);
    assert!(states().iter().all(|(_, state)| state == "published"));
}

#[test]
fn roles_get_other_keys_and_thresholds_and_agents_follow() {
    let lab = Lab::start();
    let agent = lab.agent();
    let folder = dirty(&lab);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None));
    let trust = |args: &[&str], code| lab.tmctl([&["pattern", "trust"], args].concat()).expect(code);
    for role in ["root", "targets", "detect"] {
        trust(&["rotate", "--role", role], 0);
    }
    trust(&["add-key", "--role", "detect"], 0);
    trust(&["threshold", "--role", "detect", "2"], 0);
    // More than there are keys.
    trust(&["threshold", "--role", "detect", "3"], 3);
    let rows = rows(&trust(&["status", "-o", "json"], 0).json());
    let detect = rows.iter().find(|row| row["role"] == "detect").unwrap();
    assert_eq!((&detect["threshold"], &detect["keys_here"]), (&2.into(), &2.into()));
    assert_eq!(rows.iter().find(|row| row["role"] == "root").unwrap()["version"], 3);
    lab.import("other.yar", OTHER).expect(0);
    assert_eq!(scan(&lab, &agent, &folder, "other.yar"), (0, None));
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None));
    // One key of two is missing: refused, and nothing changes.
    let key = fs::read_dir(lab.trust().join("keys")).unwrap().flatten().map(|entry| entry.path());
    let key = key.into_iter().find(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with("detect-") && name.ends_with(".key")
    });
    fs::remove_file(key.unwrap()).unwrap();
    lab.import("more.yar", "rule more { condition: false }").expect(3);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), (10, None));
}

#[test]
fn who_has_no_root_of_trust_makes_no_token_by_mistake_and_such_an_agent_loads_nothing() {
    let lab = Lab::start();
    let folder = dirty(&lab);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let elsewhere = lab.path("no-trust");
    let elsewhere = elsewhere.to_str().unwrap();
    lab.tmctl(["token", "create", "--trust", elsewhere]).expect(3);
    lab.tmctl(["pattern", "trust", "init", "--trust", elsewhere]).expect(3);
    let made = lab.tmctl(["token", "create", "--trust", elsewhere, "--without-trust", "-o", "json"]);
    let token = made.expect(0).json()["token"].as_str().unwrap().to_owned();
    let agent = lab.agent_with(&token);
    assert_eq!(scan(&lab, &agent, &folder, "eicar.yar"), refused("trust-missing"));
    // Init again on the same desk changes nothing.
    lab.tmctl(["pattern", "trust", "init"]).expect(0);
}
