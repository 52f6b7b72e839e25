//! The link between agents and manager when networks cut, managers die and agents overdo it.
//!
//! The agents here are simulated: the real wire, real certificates, and a journal that a test can read.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tm_protocol::{
    ids::{Sha256, TaskId},
    message::{Notices, Outcome, Progress, Report, ReportBody, ToAgent, ToManager},
    report::{Coverage, Detection, Notice},
};
use tm_tests::{
    Lab, PATIENCE,
    fault_proxy::Way,
    is_long, samples,
    sim_agent::{self, SimAgent},
    wait_for,
    wire::{Mouth, Persona, Wire},
};
use tokio::{runtime::Runtime, time::timeout};

/// Runs simulated agents.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads can be made")
}

/// Enrolls so many that do not run yet.
pub(crate) fn enroll(lab: &Lab, runtime: &Runtime, at: SocketAddr, count: u32) -> Vec<Persona> {
    let token = lab.token(count);
    runtime.block_on(async {
        let mut personas = Vec::new();
        for number in 1..=count {
            personas.push(
                Persona::enroll(at, &token, &format!("sim-{number:03}"))
                    .await
                    .expect("a good token lets agents in"),
            );
        }
        personas
    })
}

pub(crate) fn start(
    runtime: &Runtime,
    persona: Persona,
    at: SocketAddr,
    script: sim_agent::Script,
) -> SimAgent {
    let _entered = runtime.enter();
    SimAgent::start(persona, at, script)
}

/// Orders a scan of everybody, whether they are connected or not.
pub(crate) fn order_scan(lab: &Lab) {
    lab.tmctl(["scan", "start", "--group", "default", "--when-connected", "--path", "/nowhere"]).expect(0);
}

/// What the manager's database says, row by row, read beside it.
pub(crate) fn sql(lab: &Lab, query: &str) -> Vec<String> {
    let output = Command::new("sqlite3")
        .args(["-readonly", "-cmd", ".timeout 10000"])
        .arg(lab.manager_data().join("manager.db"))
        .arg(query)
        .output()
        .expect("sqlite3 is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

pub(crate) fn found(task: TaskId, path: String) -> ReportBody {
    let detection = Detection {
        path: path.as_bytes().into(),
        member: vec![],
        pattern: Sha256::of(b"pattern"),
        rule: "rule".into(),
        sha256: Sha256::of(path.as_bytes()),
        size: 1,
    };
    ReportBody::Detections { task, detections: vec![detection] }
}

/// The one task of an agent, when it has come.
pub(crate) fn task_of(agent: &SimAgent) -> TaskId {
    wait_for("the order to arrive", PATIENCE, || agent.snapshot().assigned.keys().next().copied())
}

#[test]
fn what_is_numbered_arrives_once_and_in_order_through_a_network_that_cuts_and_a_manager_that_dies() {
    let count: u64 = if is_long() { 50_000 } else { 10_000 };
    let kills = if is_long() { 50 } else { 5 };
    let (mut lab, proxy) = Lab::start_behind_proxy();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let persona = enroll(&lab, &runtime, proxy.address(), 1).remove(0);
    let agent = start(&runtime, persona, proxy.address(), sim_agent::begun());
    order_scan(&lab);
    let task = task_of(&agent);

    for way in [Way::Up, Way::Down] {
        proxy.cut_every(way, Some(50_000));
    }
    for number in 1..=count {
        agent.notice("numbered", &format!("n-{number}"));
        agent.report(found(task, format!("/r-{number}")));
    }
    let stored = || {
        let seen = agent.snapshot();
        seen.reports_stored.saturating_sub(2) + seen.notices_stored
    };
    for kill in 1..=kills {
        let mark = count * 2 * kill / (kills + 1);
        wait_for("reports to be stored", PATIENCE * 5, || (stored() >= mark).then_some(()));
        lab.kill9_manager();
    }
    agent.report(ReportBody::Finished { task, outcome: Outcome::Scanned(Coverage::default()) });
    wait_for("everything to be stored", PATIENCE * 5, || {
        let seen = agent.snapshot();
        (seen.reports_stored == count + 3 && seen.notices_stored == count).then_some(())
    });

    let seen = agent.snapshot();
    assert!(proxy.cuts() > 10 && seen.sessions > 10, "the network did cut: {} cuts", proxy.cuts());
    let numbers = |from: char| (1..=count).map(|n| format!("{from}-{n}")).collect::<Vec<_>>();
    let events = sql(
        &lab,
        "SELECT substr(message, 1, instr(message || ' ', ' ') - 1) FROM event WHERE detail = 'numbered' ORDER BY id",
    );
    assert!(events == numbers('n'), "notices: {} stored, {count} sent", events.len());
    let paths = sql(&lab, "SELECT substr(CAST(path AS TEXT), 2) FROM detection ORDER BY task_id, ordinal");
    assert!(paths == numbers('r'), "detections: {} stored, {count} sent", paths.len());
    assert_eq!(sql(&lab, "SELECT state FROM task"), ["done"]);
}

#[test]
fn a_manager_that_dies_while_fifty_agents_report_loses_and_doubles_nothing() {
    const AGENTS: u32 = 50;
    const ROUNDS: usize = 4;
    const DETECTIONS: usize = 12;
    let mut lab = Lab::start();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let personas = enroll(&lab, &runtime, lab.agent_port, AGENTS);
    for _ in 0..ROUNDS {
        order_scan(&lab);
    }
    let script: sim_agent::Script = std::sync::Arc::new(|assign| {
        let task = assign.task;
        let coverage = Coverage { files: 1, detections: DETECTIONS as u64, ..Coverage::default() };
        let mut bodies = vec![ReportBody::Accepted { task }, ReportBody::Started { task }];
        bodies.extend((0..DETECTIONS).map(|n| found(task, format!("/{n}"))));
        bodies.push(ReportBody::Finished { task, outcome: Outcome::Scanned(coverage) });
        bodies
    });
    let agents: Vec<SimAgent> = personas
        .into_iter()
        .map(|persona| start(&runtime, persona, lab.agent_port, script.clone()))
        .collect();
    let per_agent = (ROUNDS * (DETECTIONS + 3)) as u64;
    let total = per_agent * u64::from(AGENTS);
    let stored = || agents.iter().map(|agent| agent.snapshot().reports_stored).sum::<u64>();
    for kill in 1..=4 {
        wait_for("reports to be stored", PATIENCE, || (stored() >= total * kill / 6).then_some(()));
        assert!(stored() < total, "the manager dies while they report");
        lab.kill9_manager();
    }
    wait_for("everything to be stored", PATIENCE * 2, || (stored() == total).then_some(()));

    let tasks = AGENTS as usize * ROUNDS;
    assert_eq!(sql(&lab, "SELECT state, COUNT(*) FROM task GROUP BY state"), [format!("done|{tasks}")]);
    let counts = sql(&lab, "SELECT COUNT(*), COUNT(DISTINCT path) FROM detection GROUP BY task_id");
    assert_eq!(counts.len(), tasks);
    assert!(counts.iter().all(|row| *row == format!("{DETECTIONS}|{DETECTIONS}")), "{counts:?}");
    for agent in &agents {
        let seen = agent.snapshot();
        assert_eq!((seen.assigned.len(), seen.reports), (ROUNDS, per_agent), "{seen:?}");
    }
}

#[test]
fn a_locked_store_makes_agents_wait_and_costs_no_session() {
    let lab = Lab::start();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let personas = enroll(&lab, &runtime, lab.agent_port, 5);
    order_scan(&lab);
    let agents: Vec<SimAgent> = personas
        .into_iter()
        .map(|persona| start(&runtime, persona, lab.agent_port, sim_agent::begun()))
        .collect();
    let stored = || agents.iter().map(|agent| agent.snapshot().reports_stored).sum::<u64>();
    let tasks: Vec<TaskId> = agents.iter().map(task_of).collect();
    wait_for("the control: reports to be stored", PATIENCE, || (stored() == 10).then_some(()));

    let mut locker = Command::new("sqlite3")
        .args(["-cmd", ".timeout 10000"])
        .arg(lab.manager_data().join("manager.db"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sqlite3 is installed");
    let mut say = locker.stdin.take().unwrap();
    say.write_all(b"BEGIN IMMEDIATE;\nSELECT 'locked';\n").unwrap();
    let mut lines = BufReader::new(locker.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "locked");
    for (agent, task) in agents.iter().zip(&tasks) {
        for number in 0..100 {
            agent.report(found(*task, format!("/{number}")));
        }
    }
    // Longer than the manager waits for a lock, and many heartbeats.
    wait_for("the manager to say that it waits", PATIENCE, || {
        lab.manager().log().contains("The store cannot be written").then_some(())
    });
    for agent in &agents {
        assert!(agent.snapshot().connected, "the manager asks after those that it does not listen to");
    }
    assert_eq!(stored(), 10, "nothing is acknowledged that is not stored");
    drop(say);
    locker.wait().unwrap();
    wait_for("everything to be stored", PATIENCE, || (stored() == 510).then_some(()));
    assert_eq!(sql(&lab, "SELECT COUNT(*), COUNT(DISTINCT endpoint_id) FROM detection"), ["500|5"]);
    for agent in &agents {
        assert_eq!(agent.snapshot().sessions, 1, "{:?}", agent.snapshot());
    }
}

pub(crate) fn descriptors(lab: &Lab) -> usize {
    fs::read_dir(format!("/proc/{}/fd", lab.manager().pid())).expect("it runs").count()
}

#[test]
fn a_black_hole_is_noticed_within_two_heartbeats_and_heals_without_a_trace() {
    let (lab, proxy) = Lab::start_behind_proxy();
    let runtime = runtime();
    let personas = enroll(&lab, &runtime, proxy.address(), 5);
    let agents: Vec<SimAgent> = personas
        .into_iter()
        .map(|persona| start(&runtime, persona, proxy.address(), sim_agent::begun()))
        .collect();
    let connected = || lab.endpoints().iter().filter(|row| row["connectivity"] == "connected").count();
    let all_back = || {
        wait_for("all to be connected", PATIENCE, || {
            (connected() == 5 && agents.iter().all(|agent| agent.snapshot().connected)).then_some(())
        });
    };
    all_back();
    let mut before = None;
    for (round, ways) in
        [&[Way::Up, Way::Down][..], &[Way::Up], &[Way::Down], &[Way::Up, Way::Down]].into_iter().enumerate()
    {
        let begin = Instant::now();
        ways.iter().for_each(|way| proxy.hold(*way));
        // The heartbeat is one second. Only a manager that hears nothing notices by itself; one that is heard
        // and not understood is left by its agents.
        wait_for("agents to notice", PATIENCE, || {
            agents.iter().all(|agent| !agent.snapshot().connected).then_some(())
        });
        let noticed = begin.elapsed();
        if ways.contains(&Way::Up) {
            wait_for("the manager to notice", PATIENCE, || (connected() == 0).then_some(()));
            let noticed = begin.elapsed();
            assert!(noticed < Duration::from_secs(5), "round {round}: the manager took {noticed:?}");
        }
        assert!(noticed < Duration::from_secs(5), "round {round}: agents took {noticed:?}");
        while begin.elapsed() < Duration::from_secs(5) {
            assert!(agents.iter().all(|agent| !agent.snapshot().connected), "nothing comes through");
            std::thread::sleep(Duration::from_millis(100));
        }
        proxy.heal();
        all_back();
        // The first round opens what the manager opens once.
        let before = *before.get_or_insert_with(|| {
            wait_for("half-dead links to end", PATIENCE, || (proxy.open() == 5).then(|| descriptors(&lab)))
        });
        wait_for("descriptors to come back", PATIENCE, || (descriptors(&lab) <= before + 2).then_some(()));
    }
}

/// How a peer is treated that says this in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treated {
    Closed,
    Ignored,
}

#[test]
fn numbers_and_sizes_that_make_no_sense_end_the_session_or_change_nothing() {
    let lab = Lab::start();
    let runtime = runtime();
    let mut personas = enroll(&lab, &runtime, lab.agent_port, 2);
    let good = start(&runtime, personas.remove(0), lab.agent_port, sim_agent::begun());
    let bad = personas.remove(0);
    let pid = lab.manager().pid();

    let lost = |sequence, count| ToManager::from(report(sequence, ReportBody::Lost { count }));
    let notices = |first, codes: Vec<String>| {
        let notice = |code| Notice { at_ms: i64::MIN, code, message: "m".into(), count: u64::MAX };
        ToManager::from(Notices { first, notices: codes.into_iter().map(notice).collect() })
    };
    let few = |n: usize| vec!["c".to_owned(); n];
    let heavy = {
        let detection = |n: u64| Detection {
            path: n.to_string().as_bytes().into(),
            member: vec![],
            pattern: Sha256::of(b""),
            rule: String::new(),
            sha256: Sha256::of(b""),
            size: 0,
        };
        let detections = (0..600).map(detection).collect();
        report(1, ReportBody::Detections { task: any_task(), detections })
    };
    let cases: Vec<(&str, ToManager, Treated)> = vec![
        ("a report that skips one", lost(3, 0), Treated::Closed),
        ("a report without a number", lost(0, 0), Treated::Closed),
        ("the last of all numbers", lost(u64::MAX, u64::MAX - 1), Treated::Closed),
        ("more numbers lost than there are", lost(u64::MAX, u64::MAX), Treated::Closed),
        ("lost reports that do not fit the number", lost(7, 3), Treated::Closed),
        ("a report of 600 detections", heavy.into(), Treated::Closed),
        ("seventeen notices", notices(1, few(17)), Treated::Closed),
        ("no notices", notices(1, vec![]), Treated::Closed),
        ("notices from zero", notices(0, few(2)), Treated::Closed),
        ("notices beyond all numbers", notices(u64::MAX - 1, few(5)), Treated::Closed),
        ("a report", lost(1, 0), Treated::Ignored),
        ("a report again", lost(1, 0), Treated::Ignored),
        ("notices", notices(1, few(16)), Treated::Ignored),
        ("notices that go back", notices(3, few(2)), Treated::Ignored),
        ("codes as long as they get", notices(17, vec!["\u{1b}[31m".repeat(600); 16]), Treated::Ignored),
        ("half of all reports lost", lost(1 << 62, (1 << 62) - 2), Treated::Ignored),
        ("the report before", lost((1 << 62) - 1, 0), Treated::Ignored),
        ("the last number that can be stored", lost((1 << 63) - 1, (1 << 62) - 2), Treated::Ignored),
        ("and nothing after it", lost(1 << 63, 0), Treated::Closed),
    ];
    for (what, message, treated) in cases {
        runtime.block_on(async {
            let (mut wire, _) = bad.open(lab.agent_port, 7).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            wire.say(&message).await.unwrap();
            let ping = tm_protocol::message::Ping { nonce: 99 };
            let _ = wire.say(&ping.into()).await;
            // The answer to a ping shows that the session lives, the acknowledgement that the store has it.
            let answered = timeout(PATIENCE, async {
                let (mut pong, mut stored) = (false, false);
                while !(pong && stored) {
                    match wire.ears.hear().await {
                        Ok(ToAgent::Pong(_)) => pong = true,
                        Ok(ToAgent::ReportStored(_) | ToAgent::NoticesStored(_)) => stored = true,
                        // Every session begins with them.
                        Ok(ToAgent::Authorities(_)) => {}
                        Ok(other) => panic!("{what}: {other:?}"),
                        Err(_) => return false,
                    }
                }
                true
            });
            let expected = treated == Treated::Ignored;
            assert_eq!(answered.await, Ok(expected), "{what}");
        });
    }
    // A megabyte of codes is no message at all.
    runtime.block_on(async {
        let (mut wire, _) = bad.open(lab.agent_port, 7).await.unwrap();
        let mut frame = b"TM\x01\x00\x08".to_vec();
        frame.extend_from_slice(&(1_u32 << 20).to_be_bytes());
        frame.resize(1 << 20, b'x');
        wire.mouth.queue_bytes(&frame);
        while !wire.mouth.is_empty() && wire.mouth.push().await.is_ok() {}
        let ended = timeout(PATIENCE, async { while wire.ears.hear().await.is_ok() {} });
        assert!(ended.await.is_ok(), "it is closed");
    });

    let details = sql(&lab, "SELECT detail, COUNT(*) FROM event GROUP BY detail ORDER BY detail");
    assert_eq!(details, ["c|16", "reports-lost|3", "unreadable|16"], "each once");
    let wild =
        "SELECT COUNT(*) FROM event WHERE message GLOB '*' || char(27) || '*' OR detail GLOB '*[^a-z-]*'";
    assert_eq!(sql(&lab, wild), ["0"], "nothing unprintable is stored");
    assert_eq!(lab.manager().pid(), pid);
    assert!(runtime.block_on(good.ping_timed()).is_some(), "the good agent beside is served");
    assert_eq!(good.snapshot().sessions, 1, "in the session it had");
    assert!(!lab.manager().log().contains('\u{1b}'));
}

fn any_task() -> TaskId {
    "01890000-0000-7000-8000-00000000000a".parse().expect("this is an id")
}

fn report(sequence: u64, body: ReportBody) -> Report {
    Report { sequence, at_ms: 0, body }
}

/// Latencies of one phase, in order.
fn p99(mut latencies: Vec<Duration>) -> Duration {
    latencies.sort_unstable();
    latencies[latencies.len() * 99 / 100]
}

/// Every agent pings and reports five times a second; the 99th percentiles of answer and acknowledgement.
pub(crate) async fn measure(
    agents: &[SimAgent],
    tasks: &[TaskId],
    phase: &str,
    lasts: Duration,
) -> (Duration, Duration) {
    let end = Instant::now() + lasts;
    let of_each = agents.iter().zip(tasks).enumerate().map(|(number, (agent, task))| async move {
        let (mut pings, mut reports) = (Vec::new(), Vec::new());
        // Not in step: agents are not.
        tokio::time::sleep(Duration::from_millis(4 * number as u64)).await;
        while Instant::now() < end {
            pings.push(agent.ping_timed().await.expect("a good agent keeps its session"));
            let path = format!("/{phase}/{}", reports.len());
            reports.push(agent.report_timed(found(*task, path)).await);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        (pings, reports)
    });
    let (pings, reports): (Vec<_>, Vec<_>) =
        futures_util::future::join_all(of_each).await.into_iter().unzip();
    (p99(pings.concat()), p99(reports.concat()))
}

pub(crate) fn resident_mib(lab: &Lab) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", lab.manager().pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    line.and_then(|kib| kib.parse::<u64>().ok()).expect("the kernel says how much memory it holds") / 1024
}

#[test]
fn a_renegade_at_full_speed_does_not_slow_fifty_good_agents() {
    let lab = Lab::start();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let mut personas = enroll(&lab, &runtime, lab.agent_port, 51);
    let renegade = personas.pop().unwrap();
    order_scan(&lab);
    let agents: Vec<SimAgent> = personas
        .into_iter()
        .map(|persona| start(&runtime, persona, lab.agent_port, sim_agent::begun()))
        .collect();
    let tasks: Vec<TaskId> = agents.iter().map(task_of).collect();
    let lasts = Duration::from_secs(if is_long() { 20 } else { 5 });

    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let memory = resident_mib(&lab);
    let mut sent = 0;
    for round in 0..3 {
        alone.push(runtime.block_on(measure(&agents, &tasks, &format!("alone-{round}"), lasts)));
        let ending = tokio_util::sync::CancellationToken::new();
        let rampage = {
            let (persona, at, ending) = (renegade.clone(), lab.agent_port, ending.clone());
            runtime.spawn(async move { rage(persona, at, ending).await })
        };
        beside.push(runtime.block_on(measure(&agents, &tasks, &format!("beside-{round}"), lasts)));
        ending.cancel();
        sent += runtime.block_on(rampage).unwrap();
    }
    let after = resident_mib(&lab);
    // What else the machine does only ever adds to a phase, so the best phase of each kind says most.
    let best = |of: &[(Duration, Duration)], which: fn(&(Duration, Duration)) -> Duration| {
        of.iter().map(which).min().expect("there were phases")
    };
    eprintln!(
        "p99 ping and report alone {alone:?}, beside {beside:?}; {} KiB sent by the renegade; memory {memory} then {after} MiB",
        sent / 1024
    );
    assert!(sent > 10 << 20, "the renegade did rage: {sent} bytes");
    for (what, which) in [
        ("ping", (|p| p.0) as fn(&(Duration, Duration)) -> Duration),
        ("report", |p: &(Duration, Duration)| p.1),
    ] {
        let (alone, beside) = (best(&alone, which), best(&beside, which));
        let most = (alone * 2).max(alone + Duration::from_millis(50));
        assert!(beside <= most, "{what}: p99 {beside:?} beside the renegade, {alone:?} alone");
    }
    assert!(after < memory + 100, "the manager grew from {memory} to {after} MiB");
    for agent in &agents {
        assert_eq!(agent.snapshot().sessions, 1, "no good agent lost its session");
    }
    assert!(lab.manager().log().contains("read more slowly"), "the administrator can see it");
    let renegade = renegade.endpoint.to_string();
    let hosts: BTreeSet<String> = sql(&lab, "SELECT id FROM endpoint").into_iter().collect();
    assert!(hosts.contains(&renegade) && hosts.len() == 51);
}

/// Sends everything an agent may send as fast as it goes, in as many sessions as it takes; bytes sent.
async fn rage(persona: Persona, at: SocketAddr, ending: tokio_util::sync::CancellationToken) -> usize {
    let mut sent = 0;
    while !ending.is_cancelled() {
        let Ok((wire, welcome)) = persona.open(at, 7).await else { continue };
        tokio::select! {
            () = flood(wire, &persona, welcome.stored_through, welcome.notices_through, &mut sent) => {}
            () = ending.cancelled() => {}
        }
    }
    sent
}

async fn flood(wire: Wire, persona: &Persona, mut reports: u64, mut notices: u64, sent: &mut usize) {
    let Wire { mut ears, mut mouth } = wire;
    let mut task = any_task();
    let mut round = 0_u64;
    loop {
        if mouth.len() < 256 * 1024 {
            let before = mouth.len();
            round += 1;
            assault(&mut mouth, persona, task, round, &mut reports, &mut notices);
            *sent += mouth.len() - before;
        }
        tokio::select! {
            heard = ears.hear() => match heard {
                Ok(ToAgent::Assign(assign)) => {
                    task = assign.task;
                    for body in [ReportBody::Accepted { task }, ReportBody::Started { task }] {
                        reports += 1;
                        mouth.queue(&report(reports, body).into());
                    }
                }
                Ok(_) => {}
                Err(_) => return,
            },
            pushed = mouth.push() => if pushed.is_err() { return },
        }
    }
}

/// One of each: the heaviest that are allowed.
fn assault(
    mouth: &mut Mouth,
    persona: &Persona,
    task: TaskId,
    round: u64,
    reports: &mut u64,
    notices: &mut u64,
) {
    let mut facts = persona.inventory();
    facts.addresses = (0..250).map(|n| format!("10.0.{}.{n}", round % 250)).collect();
    mouth.queue(&facts.into());
    *reports += 1;
    let detection = |n: u64| Detection {
        path: format!("/renegade/{round}/{n}").as_bytes().into(),
        member: vec![],
        pattern: Sha256::of(b"pattern"),
        rule: "rule".into(),
        sha256: Sha256::of(b"content"),
        size: 1,
    };
    let detections = (0..500).map(detection).collect();
    mouth.queue(&report(*reports, ReportBody::Detections { task, detections }).into());
    let notice = Notice { at_ms: 0, code: "noise".into(), message: "x".repeat(3000), count: 1 };
    mouth.queue(&Notices { first: *notices + 1, notices: vec![notice; Notices::MAX] }.into());
    *notices += Notices::MAX as u64;
    for n in 0..20_u64 {
        let task =
            format!("01890000-0000-7000-8000-{:012x}", round * 100 + n).parse().expect("this is an id");
        let progress = Progress { task, files: 1, bytes: 1, detections: 1, skipped: 1 };
        mouth.queue(&progress.into());
    }
}
