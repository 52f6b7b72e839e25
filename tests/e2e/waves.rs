//! Patterns in waves and by group: who gets a new version when, and that a bad one stops by itself.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::Value;
use tm_protocol::{
    ids::Sha256,
    message::{Outcome, ReportBody},
    report::{Coverage, Detection},
    task::TaskSpec,
};
use tm_tests::{
    Lab, Output, PATIENCE,
    bulk::{self, BulkLink},
    output::rows,
    postgres::Postgres,
    sim_agent::{Script, SimAgent},
    wait_for,
    wire::Persona,
};
use tokio::runtime::Runtime;

const ONE: &str = "rule one { condition: filesize > 0 }";
const TWO: &str = "rule two { condition: filesize > 0 }";
const THREE: &str = "rule three { condition: filesize > 0 }";

/// With which versions simulated agents were told to look: who, and the rules' text.
type Looks = Arc<Mutex<Vec<(String, &'static str)>>>;

fn text_of(sha256: Sha256) -> &'static str {
    let known = [ONE, TWO, THREE].into_iter().find(|text| Sha256::of(text.as_bytes()) == sha256);
    known.expect("only these were published")
}

/// Looks as it is told and notes with what; with one version it finds something.
fn looks(notes: &Looks, finds_with: Option<&'static str>) -> Script {
    let notes = Arc::clone(notes);
    Arc::new(move |assign| {
        let TaskSpec::Scan(scan) = &assign.spec else { panic!("only scans are ordered") };
        let task = assign.task;
        let mut reports = vec![ReportBody::Accepted { task }, ReportBody::Started { task }];
        for pattern in &scan.patterns {
            let text = text_of(pattern.sha256);
            notes.lock().expect("no test panics with it").push((assign.endpoint.to_string(), text));
            if finds_with == Some(text) {
                let detection = Detection {
                    path: b"/srv/x".as_slice().into(),
                    member: vec![],
                    pattern: pattern.sha256,
                    rule: "r".into(),
                    sha256: Sha256::of(b"x"),
                    size: 1,
                };
                reports.push(ReportBody::Detections { task, detections: vec![detection] });
            }
        }
        let outcome = Outcome::Scanned(Coverage { files: 1, ..Coverage::default() });
        reports.push(ReportBody::Finished { task, outcome });
        reports
    })
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads can be made")
}

/// So many agents; each goes to one of these managers, in turn.
fn agents(runtime: &Runtime, lab: &Lab, at: &[SocketAddr], count: u32, script: &Script) -> Vec<SimAgent> {
    let token = lab.token(count);
    let mut agents = Vec::new();
    for number in 0..count {
        let host = format!("sim-{number:03}");
        let enrolled = Persona::enroll(lab.agent_port, &token, &host);
        let persona = runtime.block_on(enrolled).expect("it is let in");
        let _entered = runtime.enter();
        let own = at[usize::try_from(number).expect("few") % at.len()];
        let all = [vec![own], at.to_vec()].concat();
        agents.push(SimAgent::start_at(persona, all, Arc::clone(script)));
    }
    wait_connected(lab, count);
    agents
}

fn wait_connected(lab: &Lab, count: u32) {
    wait_for("all agents to be connected", PATIENCE, || {
        let all = lab.endpoints();
        let connected = all.iter().filter(|endpoint| endpoint["connectivity"] == "connected").count();
        (connected == usize::try_from(count).expect("few")).then_some(())
    });
}

fn file(lab: &Lab, rule: &str) -> PathBuf {
    let path = lab.path("p.yar");
    fs::write(&path, rule).expect("the lab's folder is writable");
    path
}

/// Imports a rule as the next version of `p`.
fn import(lab: &Lab, rule: &str, more: &[&str]) -> Output {
    let path = file(lab, rule);
    let path = path.to_str().expect("it is text");
    lab.tmctl([&["pattern", "import", path, "--name", "p"], more].concat())
}

fn rollout(lab: &Lab) -> Value {
    lab.tmctl(["pattern", "rollout", "show", "p", "-o", "json"]).expect(0).json()
}

/// Has everybody look; with which version each then did.
fn look(lab: &Lab, notes: &Looks, more: &[&str], code: i32) -> Vec<(String, &'static str)> {
    notes.lock().expect("no test panics with it").clear();
    let args = ["scan", "start", "--group", "default", "--path", "/nowhere", "--wait"];
    lab.tmctl([&args, more].concat()).expect(code);
    let mut seen = notes.lock().expect("no test panics with it").clone();
    seen.sort_unstable();
    seen
}

fn with(seen: &[(String, &'static str)], text: &str) -> Vec<String> {
    seen.iter().filter(|(_, known)| *known == text).map(|(who, _)| who.clone()).collect()
}

fn events(lab: &Lab) -> Vec<Value> {
    let args = ["event", "list", "--kind", "pattern-deployment", "-o", "json"];
    rows(&lab.tmctl(args).expect(0).json())
}

#[test]
fn only_endpoints_in_reach_get_a_new_version_until_it_is_advanced() {
    let mut lab = Lab::start();
    let (runtime, notes) = (runtime(), Looks::default());
    let _agents = agents(&runtime, &lab, &[lab.agent_port], 40, &looks(&notes, None));
    import(&lab, ONE, &[]).expect(0);
    assert_eq!(with(&look(&lab, &notes, &[], 0), ONE).len(), 40, "the control");

    let imported = import(&lab, TWO, &["--wave", "25%,100%", "-o", "json"]).expect(0).json();
    assert_eq!(rows(&imported)[0]["reach"], "25%");
    let seen = look(&lab, &notes, &[], 0);
    let first = with(&seen, TWO);
    assert_eq!((seen.len(), first.len() + with(&seen, ONE).len()), (40, 40));
    assert!((1..40).contains(&first.len()), "{}", first.len());
    let row = rollout(&lab);
    assert_eq!(
        (row["endpoints"].as_u64(), row["looked"].as_u64()),
        (Some(first.len() as u64), Some(first.len() as u64))
    );
    assert_eq!((&row["state"], &row["reach"], &row["hits"]), (&"running".into(), &"25%".into(), &0.into()));

    // The name means the same as all patterns do, and a version that is named reaches nobody else.
    assert_eq!(look(&lab, &notes, &["--pattern", "p"], 0), seen);
    let digest = Sha256::of(TWO.as_bytes()).to_string();
    let refused = lab.tmctl(["scan", "start", "--group", "default", "--path", "/x", "--pattern", &digest]);
    assert!(refused.expect(3).err().contains("does not reach"));
    // Another manager's start, and a desk that sends the older version again, change nothing.
    lab.restart_manager();
    wait_connected(&lab, 40);
    assert_eq!(look(&lab, &notes, &[], 0), seen);
    for rule in [TWO, THREE] {
        import(&lab, rule, &[]).expect(3);
        import(&lab, rule, &["--wave", "100%"]).expect(3);
    }
    assert_eq!(look(&lab, &notes, &[], 0), seen);

    lab.tmctl(["pattern", "rollout", "advance", "p"]).expect(0);
    assert_eq!(with(&look(&lab, &notes, &[], 0), TWO).len(), 40);
    let ended = lab.tmctl(["pattern", "rollout", "advance", "p", "-o", "json"]).expect(0).json();
    assert_eq!(rows(&ended)[0]["state"], "complete");
    lab.tmctl(["pattern", "rollout", "advance", "p"]).expect(3);
    import(&lab, THREE, &[]).expect(0);
    assert_eq!(with(&look(&lab, &notes, &[], 0), THREE).len(), 40);
    let log = lab.tmctl(["audit", "list", "-o", "csv"]).expect(0).out();
    for (action, count) in [("rollout.start", 1), ("rollout.advance", 2)] {
        assert_eq!(log.matches(action).count(), count, "{action}");
    }
    lab.tmctl(["audit", "verify"]).expect(0);
}

/// A file of a package of this machine that has content.
fn packaged() -> Option<String> {
    let lists = fs::read_dir("/var/lib/dpkg/info").ok()?.flatten().map(|entry| entry.path());
    let mut lists: Vec<PathBuf> =
        lists.filter(|path| path.extension().is_some_and(|ext| ext == "list")).collect();
    lists.sort();
    let is_good = |path: &&str| {
        let meta = fs::symlink_metadata(path);
        meta.is_ok_and(|meta| meta.is_file() && (1..100_000).contains(&meta.len()))
            && fs::canonicalize(path).is_ok_and(|real| real == Path::new(path))
    };
    lists.iter().find_map(|list| {
        let text = fs::read_to_string(list).ok()?;
        text.lines().find(|line| line.starts_with("/usr/") && is_good(line)).map(str::to_owned)
    })
}

#[test]
fn a_version_that_hits_a_file_of_a_package_stops_and_who_had_it_goes_back() {
    let packaged = packaged().expect("the machine that tests has dpkg and a file of a package");
    let lab = Lab::start();
    lab.tmctl(["group", "create", "canary"]).expect(0);
    let (early, late) = (lab.agent(), lab.agent());
    lab.tmctl(["endpoint", "set-group", &early.id, "canary"]).expect(0);
    import(&lab, ONE, &[]).expect(0);
    import(&lab, TWO, &["--group", "canary", "--wave", "100%"]).expect(0);
    let own = lab.folder("own");
    fs::write(own.join("x"), "content").expect("the lab's folder is writable");
    let rules = |agent, path: &Path| {
        lab.scan(agent, path).expect(10);
        let found = lab.detections(agent);
        let mut rules: Vec<String> =
            found.iter().map(|one| one["rule"].as_str().expect("a rule").to_owned()).collect();
        // It may be an archive, whose members are found too.
        rules.dedup();
        rules
    };
    assert_eq!((rules(&early, &own), rules(&late, &own)), (vec!["two".to_owned()], vec!["one".to_owned()]));
    assert_eq!(rules(&late, Path::new(&packaged)), ["one"], "what is not watched may hit what it will");
    assert_eq!(rollout(&lab)["state"], "running", "the control");

    assert_eq!(rules(&early, Path::new(&packaged)), ["two"]);
    let row = rollout(&lab);
    assert_eq!((&row["state"], &row["code"]), (&"stopped".into(), &"brake-package".into()));
    let reason = row["reason"].as_str().expect("it says why");
    assert!(reason.contains(&packaged) && reason.contains("package"), "{reason}");
    let told = events(&lab);
    assert_eq!(told.len(), 1);
    assert_eq!((&told[0]["status"], &told[0]["detail"]), (&"unsuccessful".into(), &"brake-package".into()));
    assert!(told[0]["advice"].as_str().is_some_and(|advice| advice.contains("--force")));
    for agent in [&early, &late] {
        assert_eq!(rules(agent, &own), ["one"]);
    }
    // Not even one that has an order with it from before is given it.
    let config = bulk::config(&late.identity()).expect("they belong together");
    runtime().block_on(async {
        let mut link = BulkLink::connect(lab.agent_port, config).await.expect("an enrolled agent is let in");
        for (rule, status) in [(ONE, 200), (TWO, 410)] {
            let path = format!("GET /v1/patterns/{}", Sha256::of(rule.as_bytes()));
            assert_eq!(link.ask(&path, "", &[]).await.expect("it answers").status, status, "{rule}");
        }
    });
    // What it found is not cleaned with the rest any more; what the older version found is.
    let dry = lab.tmctl(["cleanup", "run", &early.id, "--dry-run", "-o", "json"]).expect(0);
    assert_eq!(dry.out().matches("would-vault").count(), 1, "{}", dry.out());

    let refused = lab.tmctl(["pattern", "rollout", "resume", "p"]).expect(3);
    assert!(refused.err().contains("--force"), "{}", refused.err());
    lab.tmctl(["pattern", "rollout", "resume", "p", "--force"]).expect(0);
    assert_eq!(rules(&early, Path::new(&packaged)), ["two"]);
    assert_eq!(rollout(&lab)["state"], "running", "its brake is off");
    assert_eq!(rules(&late, &own), ["one"]);
    let log = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json();
    let resumed = rows(&log).into_iter().find(|record| record["action"] == "rollout.resume");
    assert!(resumed.expect("it is recorded")["detail"].to_string().contains("force"));
}

#[test]
fn a_version_that_finds_something_on_too_many_stops() {
    let lab = Lab::start();
    let (runtime, notes) = (runtime(), Looks::default());
    import(&lab, ONE, &[]).expect(0);
    let quiet = agents(&runtime, &lab, &[lab.agent_port], 8, &looks(&notes, None));
    import(&lab, TWO, &["--wave", "100%", "--brake-share", "20%"]).expect(0);
    assert_eq!(with(&look(&lab, &notes, &[], 0), TWO).len(), 8);
    let token = lab.token(4);
    let mut loud = Vec::new();
    for number in 0..4 {
        let host = format!("loud-{number}");
        let enrolled = Persona::enroll(lab.agent_port, &token, &host);
        let persona = runtime.block_on(enrolled).expect("it is let in");
        let _entered = runtime.enter();
        loud.push(SimAgent::start(persona, lab.agent_port, looks(&notes, Some(TWO))));
        wait_connected(&lab, 9 + number);
        let is_tipped = number >= 2;
        look(&lab, &notes, &[], 10);
        let row = rollout(&lab);
        let expected = if is_tipped { "stopped" } else { "running" };
        assert_eq!(row["state"], expected, "{row}");
        if is_tipped {
            assert_eq!(
                (&row["code"], &row["hits"], &row["looked"]),
                (&"brake-share".into(), &3.into(), &11.into())
            );
            break;
        }
    }
    assert_eq!(with(&look(&lab, &notes, &[], 0), ONE).len(), 11, "nobody has it any more");
    assert_eq!(events(&lab).len(), 1);
    drop(quiet);
}

#[test]
fn two_managers_count_together_and_neither_loses_nor_repeats() {
    let postgres = Postgres::start();
    let shared = tempfile::tempdir().expect("temporary folders work");
    let (url, patterns) = (postgres.database("fleet"), shared.path().join("patterns"));
    let mut one = Lab::start_shared(&url, &patterns);
    let two = one.join(&url, &patterns);
    let (runtime, notes) = (runtime(), Looks::default());
    import(&one, ONE, &[]).expect(0);
    let at = [one.agent_port, two.agent_port];
    let _agents = agents(&runtime, &one, &at, 12, &looks(&notes, Some(THREE)));
    import(&one, TWO, &["--wave", "20%,40%,60%,80%,100%"]).expect(0);

    // Both are told to go on at the same moment: each time it goes on once for each.
    for _ in 0..2 {
        thread::scope(|scope| {
            for lab in [&one, &two] {
                scope.spawn(|| lab.tmctl(["pattern", "rollout", "advance", "p"]).expect(0));
            }
        });
    }
    assert_eq!((&rollout(&one)["wave"], &rollout(&two)["wave"]), (&5.into(), &5.into()));
    assert_eq!(with(&look(&two, &notes, &[], 0), TWO).len(), 12);
    import(&one, THREE, &["--wave", "100%"]).expect(0);
    one.kill9_manager();
    wait_connected(&two, 12);
    let row = rollout(&one);
    assert_eq!((&row["state"], &row["looked"]), (&"running".into(), &0.into()));

    // Twelve finds come in at two managers at once.
    assert_eq!(with(&look(&one, &notes, &[], 10), THREE).len(), 12);
    assert_eq!((&rollout(&one)["state"], &rollout(&two)["state"]), (&"stopped".into(), &"stopped".into()));
    assert_eq!(events(&two).len(), 1, "it is told once");
    assert_eq!(with(&look(&two, &notes, &[], 0), TWO).len(), 12);
    one.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let lab = Lab::start();
    import(&lab, ONE, &[]).expect(0);
    for (more, code) in [
        (vec!["--wave", "0%"], 2),
        (vec!["--wave", "100%,1%"], 2),
        (vec!["--wave", "abc"], 2),
        (vec!["--wave", "101%"], 2),
        (vec!["--wave", "1%,10%"], 2),
        (vec!["--wave", "1%,1%,100%"], 2),
        (vec!["--wave", "1%,100%", "--brake-share", "0%"], 2),
        (vec!["--wave", "1%,100%", "--every", "0s"], 2),
        (vec!["--wave", "1%,100%", "--every", "1s"], 1),
        (vec!["--wave", "1%,100%", "--group", "nobody"], 1),
        (vec!["--group", "../x"], 1),
        (vec!["--group", "a\u{1b}[2Jb"], 1),
        (vec!["--group", ""], 1),
    ] {
        let output = import(&lab, TWO, &more).expect(code);
        assert!(!output.both().contains('\u{1b}'), "{more:?}");
    }
    assert_eq!(import(&lab, ONE, &["--wave", "1%,100%"]).code(), 3, "it is in force already");
    let long = "a".repeat(65);
    for name in ["", " ", "../x", "a b", "a\nb", "\u{202e}x", "a\u{1b}[2Jb", "=1+1", &long] {
        let output = lab.tmctl(["group", "create", name]).expect(1);
        assert!(!output.both().contains(['\u{1b}', '\u{202e}']), "{name:?}");
    }
    lab.tmctl(["group", "create", "servers"]).expect(0);
    for name in ["servers", "default"] {
        lab.tmctl(["group", "create", name]).expect(3);
    }
    let groups = rows(&lab.tmctl(["group", "list", "-o", "json"]).expect(0).json());
    let names: Vec<&str> = groups.iter().filter_map(|group| group["name"].as_str()).collect();
    assert_eq!(names, ["default", "servers"]);
    for wrong in [
        &["token", "create", "--group", "nobody"][..],
        &["scan", "start", "--group", "nobody", "--path", "/x"],
        &["pattern", "rollout", "show", "p"],
        &["pattern", "rollout", "advance", "p"],
        &["pattern", "rollout", "stop", "\u{1b}[2J"],
        &["pattern", "rollout", "resume", "nothing", "--force"],
    ] {
        let output = lab.tmctl(wrong).expect(1);
        assert!(!output.both().contains('\u{1b}'), "{wrong:?}");
    }
    assert_eq!(rows(&lab.tmctl(["pattern", "rollout", "list", "-o", "json"]).expect(0).json()).len(), 0);

    // In steps: the draft carries how it goes on, and who publishes may say otherwise.
    let draft = lab.path("p.draft");
    let draft = draft.to_str().expect("it is text");
    let path = file(&lab, TWO);
    let path = path.to_str().expect("it is text");
    let write = ["pattern", "draft", path, "--name", "p", "--out", draft];
    lab.tmctl(write).expect(0);
    lab.tmctl(["pattern", "sign", draft]).expect(0);
    let stranded = lab.tmctl(["pattern", "publish", draft, "--wave", "1%,100%"]).expect(3);
    assert!(stranded.err().contains("left without one"), "{}", stranded.err());
    lab.tmctl([&write[..], &["--wave", "1%,100%", "--brake-share", "5%"]].concat()).expect(0);
    lab.tmctl(["pattern", "sign", draft]).expect(0);
    lab.tmctl(["pattern", "publish", draft]).expect(0);
    let row = rollout(&lab);
    assert_eq!((&row["reach"], &row["brake_share"]), (&"1%".into(), &"5%".into()));
    lab.tmctl(["pattern", "rollout", "stop", "p", "--reason", "a reason"]).expect(0);
    assert_eq!((&rollout(&lab)["code"], &rollout(&lab)["reason"]), (&"by-hand".into(), &"a reason".into()));
    lab.tmctl(["pattern", "rollout", "resume", "p"]).expect(0);
    let viewer = lab.account("vic", "viewer");
    lab.tmctl_as(&viewer, ["pattern", "rollout", "list"]).expect(0);
    for verb in ["advance", "stop", "resume"] {
        lab.tmctl_as(&viewer, ["pattern", "rollout", verb, "p"]).expect(3);
    }
    lab.tmctl_as(&viewer, ["group", "create", "x"]).expect(3);
}
