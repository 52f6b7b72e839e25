//! Two managers on one PostgreSQL: what one is ordered the other's agents do, and when one dies the other goes on.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tm_protocol::{
    ids::Sha256,
    message::{Outcome, ReportBody},
    report::{Coverage, Detection},
};
use tm_tests::{
    Lab, Output, PATIENCE, bin,
    postgres::Postgres,
    samples,
    sim_agent::{Script, SimAgent},
    wait_for,
    wire::Persona,
};
use tokio::runtime::Runtime;

/// Two managers of one fleet. Fields are dropped in order: managers before what they share.
struct Pair {
    one: Lab,
    two: Lab,
    postgres: Postgres,
    shared: tempfile::TempDir,
}

impl Pair {
    fn start() -> Self {
        let postgres = Postgres::start();
        let shared = tempfile::tempdir().expect("temporary folders work");
        let (url, patterns) = (postgres.database("fleet"), shared.path().join("patterns"));
        let one = Lab::start_shared(&url, &patterns);
        let two = one.join(&url, &patterns);
        Self { one, two, postgres, shared }
    }

    fn sql(&self, query: &str) -> String {
        self.postgres.sql("fleet", query)
    }

    fn count(&self, query: &str) -> u64 {
        self.sql(query).parse().expect("a count")
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads can be made")
}

fn enroll(runtime: &Runtime, lab: &Lab, count: u32) -> Vec<Persona> {
    let token = lab.token(count);
    let one = async |number| {
        Persona::enroll(lab.agent_port, &token, &format!("sim-{number:03}")).await.expect("it is let in")
    };
    runtime.block_on(async {
        let mut all = Vec::new();
        for number in 1..=count {
            all.push(one(number).await);
        }
        all
    })
}

fn start(runtime: &Runtime, persona: Persona, at: Vec<SocketAddr>, script: Script) -> SimAgent {
    let _entered = runtime.enter();
    SimAgent::start_at(persona, at, script)
}

/// Takes every order, finds one thing and is done.
fn finds_one() -> Script {
    Arc::new(|assign| {
        let task = assign.task;
        let detection = Detection {
            path: format!("/{task}").as_bytes().into(),
            member: vec![],
            pattern: Sha256::of(b"pattern"),
            rule: "rule".into(),
            sha256: Sha256::of(b"bytes"),
            size: 1,
        };
        let coverage = Coverage { files: 1, detections: 1, ..Coverage::default() };
        vec![
            ReportBody::Accepted { task },
            ReportBody::Started { task },
            ReportBody::Detections { task, detections: vec![detection] },
            ReportBody::Finished { task, outcome: Outcome::Scanned(coverage) },
        ]
    })
}

fn order_for_all(lab: &Lab) -> Output {
    lab.tmctl(["scan", "start", "--group", "default", "--when-connected", "--path", "/nowhere"])
}

#[test]
fn a_manager_is_killed_in_the_middle_of_a_push_and_the_other_brings_every_task_to_its_one_end() {
    const AGENTS: u32 = 200;
    const ROUNDS: u64 = 5;
    let mut pair = Pair::start();
    pair.one.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let (at_one, at_two) = (pair.one.agent_port, pair.two.agent_port);
    let agents: Vec<SimAgent> = enroll(&runtime, &pair.one, AGENTS)
        .into_iter()
        .enumerate()
        .map(|(number, persona)| {
            let at = if number % 2 == 0 { vec![at_one, at_two] } else { vec![at_two, at_one] };
            start(&runtime, persona, at, finds_one())
        })
        .collect();
    let managers = "SELECT count(DISTINCT manager_id) FROM endpoint WHERE manager_id IS NOT NULL";
    let away = "SELECT count(*) FROM endpoint WHERE manager_id IS NULL";
    wait_for("all agents to be connected", PATIENCE, || (pair.count(away) == 0).then_some(()));
    assert_eq!(pair.count(managers), 2, "each manager has its share");

    // One manager is asked for everything, and the other is killed while it hands out its half.
    let ended = "SELECT count(*) FROM task WHERE state = 'done'";
    let ordering = {
        let orders = ROUNDS;
        let profile = pair.two.profile();
        thread::spawn(move || {
            for _ in 0..orders {
                let output = std::process::Command::new(bin("tmctl"))
                    .arg("--profile")
                    .arg(&profile)
                    .args(["scan", "start", "--group", "default", "--when-connected", "--path", "/nowhere"])
                    .output()
                    .unwrap();
                Output::from(output).expect(0);
            }
        })
    };
    let all = u64::from(AGENTS) * ROUNDS;
    wait_for("some tasks to be done", PATIENCE, || (pair.count(ended) >= all / 5).then_some(()));
    pair.one.kill9_manager_for_good();
    let at_kill = pair.count(ended);
    assert!(at_kill < all, "it was killed too late");
    ordering.join().unwrap();

    wait_for("every task to be done", PATIENCE * 2, || (pair.count(ended) == all).then_some(()));
    let states = pair.sql("SELECT state, count(*) FROM task GROUP BY state ORDER BY state");
    assert_eq!(states, format!("done|{all}"), "none is left, none is doubled");
    let ends = "SELECT count(*), count(DISTINCT task_id) FROM event WHERE kind = 'scan-administrator'";
    assert_eq!(pair.sql(ends), format!("{all}|{all}"), "each end is told once");
    assert_eq!(pair.count("SELECT count(*) FROM detection"), all, "each find is kept once");
    for agent in &agents {
        wait_for("an agent's reports to be stored", PATIENCE, || {
            let seen = agent.snapshot();
            (seen.reports == seen.reports_stored).then_some(())
        });
        let seen = agent.snapshot();
        assert_eq!((seen.assigned.len() as u64, seen.reports), (ROUNDS, ROUNDS * 4));
    }
    // All are connected to the one that is left, which says so, and the other is given up.
    wait_for("all agents to be connected again", PATIENCE, || (pair.count(away) == 0).then_some(()));
    assert_eq!(pair.count(managers), 1);
    let up = "SELECT count(*) FROM manager WHERE is_up = 1";
    wait_for("the dead manager to be given up", PATIENCE, || (pair.count(up) == 1).then_some(()));
    pair.two.tmctl(["audit", "verify"]).expect(0);

    // It comes back, and then it is the other's turn to end, in order.
    pair.one.start_manager();
    pair.two.stop_manager();
    order_for_all(&pair.one).expect(0);
    let all = all + u64::from(AGENTS);
    wait_for("one more round", PATIENCE * 2, || (pair.count(ended) == all).then_some(()));
    assert_eq!(pair.sql(ends), format!("{all}|{all}"));
    pair.one.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn an_agent_goes_to_the_other_manager_and_finds_its_patterns_there() {
    let mut pair = Pair::start();
    // Tokens name both managers as soon as they know of each other.
    let (one, two) = (pair.one.agent_port.to_string(), pair.two.agent_port.to_string());
    wait_for("the first manager to know of the second", PATIENCE, || {
        use tm_protocol::token::EnrollmentToken;
        let token: EnrollmentToken = pair.one.token(1).parse().unwrap();
        let addresses: Vec<String> = token.addresses.iter().map(ToString::to_string).collect();
        (addresses == [one.as_str(), two.as_str()]).then_some(())
    });
    let agent = pair.one.agent();
    pair.one.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = pair.one.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();

    // What is ordered at the one manager is done at the other at once: it is called, and does not wait for its
    // next look, which comes every five seconds.
    assert!(pair.two.is_connected(&agent), "the second manager sees who is connected to the first");
    let begin = Instant::now();
    for _ in 0..8 {
        pair.two.scan(&agent, &folder).expect(10);
    }
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?} for eight orders", begin.elapsed());

    pair.one.kill9_manager_for_good();
    let here = format!(
        "SELECT count(*) FROM endpoint JOIN manager ON manager.id = endpoint.manager_id
         WHERE manager.addresses LIKE '%{two}%' AND endpoint.id = '{}'",
        agent.id
    );
    wait_for("the agent to be connected to the other manager", PATIENCE, || {
        (pair.count(&here) == 1).then_some(())
    });
    // A pattern that this agent has not seen yet.
    let rule = "rule fresh { strings: $a = \"EICAR-STANDARD\" condition: $a }";
    pair.two.import("fresh.yar", rule).expect(0);
    pair.two.scan(&agent, &folder).expect(10);
    drop(agent);
    assert!(fs::read_dir(pair.shared.path().join("patterns")).unwrap().count() == 2);
}

#[test]
fn an_identity_that_is_used_twice_is_noticed_across_managers() {
    let pair = Pair::start();
    let runtime = runtime();
    let persona = enroll(&runtime, &pair.one, 1).remove(0);
    let first = start(&runtime, persona.clone(), vec![pair.one.agent_port], finds_one());
    wait_for("the first to be connected", PATIENCE, || first.snapshot().connected.then_some(()));
    let refused = runtime.block_on(persona.open(pair.two.agent_port, 99)).expect_err("the first answers");
    assert!(refused.to_string().contains("Held"), "{refused}");
    assert_eq!(first.snapshot().sessions, 1, "the first goes on");
    // The same process, which has lost its way to the one, is let in by the other, and the older link ends.
    drop(first);
    runtime.block_on(persona.open(pair.two.agent_port, 99)).expect("nobody else is there");
}

#[test]
fn a_manager_does_not_join_what_is_not_its_own() {
    let postgres = Postgres::start();
    let shared = tempfile::tempdir().unwrap();
    let patterns = shared.path().join("patterns");
    let (fleet, other) = (postgres.database("fleet"), postgres.database("other"));
    let one = Lab::start_shared(&fleet, &patterns);
    let two = Lab::start_shared(&other, &patterns);
    let join = |database: &str, ca: &std::path::Path| {
        let output = std::process::Command::new(bin("tm-manager"))
            .args(["init", "--public-name", "m", "--agent-listen", "127.0.0.1:1", "--admin-listen"])
            .args(["127.0.0.1:2", "--database", database, "--join"])
            .arg(ca)
            .arg("--patterns")
            .arg(&patterns)
            .arg("--data")
            .arg(shared.path().join("new"))
            .output()
            .unwrap();
        let output = Output::from(output).expect(1);
        assert!(!shared.path().join("new/manager.toml").exists());
        output.err()
    };
    let own = one.manager_data().join("ca");
    assert!(join(&other, &own).contains("belongs to the fleet"), "another fleet's database");
    assert!(join(&postgres.database("empty"), &own).contains("no fleet yet"), "nobody's database");
    let sqlite = format!("sqlite:{}", shared.path().join("s.db").display());
    assert!(join(&sqlite, &own).contains("PostgreSQL"), "one that cannot be shared");
    assert!(join(&fleet, shared.path()).contains("authority"), "no authority");
    // A key that is not the certificate's.
    let mixed = shared.path().join("mixed");
    fs::create_dir(&mixed).unwrap();
    for name in ["certificate.der", "ids.json"] {
        fs::copy(own.join(name), mixed.join(name)).unwrap();
    }
    fs::copy(two.manager_data().join("ca/key.der"), mixed.join("key.der")).unwrap();
    assert!(join(&fleet, &mixed).contains("authority"), "another authority's key");
}
