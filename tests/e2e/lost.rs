//! Links that are lost, and networks that lie: how soon it is seen, and that nothing is lost or done twice for it.
//!
//! The constants are what is promised; the figures are printed.

use std::{
    thread,
    time::{Duration, Instant},
};

use tm_protocol::{
    message::{Outcome, ReportBody},
    report::Coverage,
};
use tm_tests::{
    Agent, FaultProxy, Lab, PATIENCE,
    fault_proxy::Way,
    fleet::{Fleet, Pace},
    is_long,
    output::rows,
    raw, samples,
    sim_agent::{self, SimAgent},
    wait_for,
};

use crate::link::{descriptors, enroll, found, order_scan, runtime, sql, start, task_of};

/// How soon a link that ends with a reset or a goodbye is seen.
const ENDED: Duration = Duration::from_secs(1);
/// How soon one is that falls silent.
const SILENT: Duration = Duration::from_secs(60);

/// Watches an endpoint's connectivity closely; when it is first seen not to be connected.
fn seen_away(lab: &Lab, id: &str) -> Instant {
    let (token, path) = (lab.admin_token(), format!("/v1/endpoints/{id}"));
    let end = Instant::now() + SILENT + PATIENCE;
    loop {
        let (status, body) = raw::get(lab.admin_port, &path, Some(&token), None);
        let now = Instant::now();
        let body: serde_json::Value = serde_json::from_slice(&body).expect("answers are JSON");
        assert_eq!(status, 200, "{body}");
        if body["connectivity"] != "connected" {
            return now;
        }
        assert!(now < end, "{id} is still shown as connected: {body}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// How many sessions an agent has had, by its manager's count.
fn sessions(lab: &Lab, agent: &Agent) -> i64 {
    let epoch = sql(lab, &format!("SELECT session_epoch FROM endpoint WHERE id = '{}'", agent.id));
    epoch[0].parse().expect("a number")
}

#[test]
fn a_link_that_is_reset_or_ended_is_seen_within_a_second() {
    let (lab, proxy) = Lab::start_behind_proxy();
    let (one, mut two) = (lab.agent(), lab.agent());
    let mut took = Vec::new();
    for _ in 0..3 {
        // Who comes back is kept waiting, so that what is seen is the end and not the next session.
        let before = sessions(&lab, &one);
        proxy.hold(Way::Up);
        let begin = Instant::now();
        proxy.cut_now();
        let seen = seen_away(&lab, &one.id).duration_since(begin);
        proxy.heal();
        took.push(("reset", seen));
        for agent in [&one, &two] {
            lab.wait_connected(agent);
        }
        assert!(sessions(&lab, &one) > before, "the agent has seen it as well");
    }
    for _ in 0..3 {
        let begin = Instant::now();
        // The kernel says the end of a process's links.
        two.kill9();
        took.push(("end", seen_away(&lab, &two.id).duration_since(begin)));
        assert!(lab.is_connected(&one), "the control: nobody else's");
        two.run();
        lab.wait_connected(&two);
    }
    eprintln!("LOST {took:?}");
    assert!(took.iter().all(|(_, took)| *took <= ENDED), "{took:?}");
}

#[test]
fn a_link_that_falls_silent_is_seen_by_both_ends_within_a_minute() {
    let lab = Lab::start();
    // The heartbeat that a manager has unless it is told otherwise.
    lab.set("heartbeat", "\"25s\"");
    let proxy = FaultProxy::start(lab.agent_port);
    lab.set("public_names", &format!("[\"{}\"]", proxy.address()));
    let mut lab = lab;
    lab.restart_manager();
    let (mut frozen, one) = (lab.agent(), lab.agent());
    let open = descriptors(&lab);
    let before = sessions(&lab, &one);

    let begin = Instant::now();
    // Neither end hears of the other again. One agent could come back by a new link; the other one cannot, so that
    // the manager has to see by itself that it is away.
    frozen.freeze();
    proxy.half_open();
    assert!(lab.is_connected(&frozen), "the control: it is not seen at once");
    let (manager, agent) = thread::scope(|scope| {
        let manager = scope.spawn(|| seen_away(&lab, &frozen.id).duration_since(begin));
        wait_for("the agent to come back by itself", SILENT + PATIENCE, || {
            (sessions(&lab, &one) > before).then_some(())
        });
        let agent = begin.elapsed();
        (manager.join().expect("it does not panic"), agent)
    });
    eprintln!("LOST silent: the manager sees it after {manager:?}, the agent is back after {agent:?}");
    // The agent first waits for one to two seconds, and then shakes hands.
    assert!(manager <= SILENT && agent <= SILENT + Duration::from_secs(3), "{manager:?} {agent:?}");
    assert!(lab.is_connected(&one));
    frozen.thaw();
    lab.wait_connected(&frozen);
    wait_for("descriptors to come back", PATIENCE, || (descriptors(&lab) <= open + 4).then_some(()));
}

#[test]
fn three_hundred_agents_come_back_to_a_restarted_manager_spread_over_time() {
    const AGENTS: usize = 300;
    let (mut lab, proxy) = Lab::start_behind_proxy();
    lab.set("heartbeat", "\"5s\"");
    lab.restart_manager();
    let runtime = runtime();
    let personas = enroll(&lab, &runtime, lab.agent_port, 300);
    let fleet = Fleet::new(Pace::Agent);
    let _entered = runtime.enter();
    let agents: Vec<SimAgent> = personas
        .into_iter()
        .map(|persona| SimAgent::start_in(&fleet, persona, vec![proxy.address()], sim_agent::begun()))
        .collect();
    let all = || agents.iter().all(|agent| agent.snapshot().connected);
    wait_for("all to be connected", PATIENCE, || all().then_some(()));

    lab.kill9_manager_for_good();
    wait_for("all to be away", PATIENCE, || {
        agents.iter().all(|agent| !agent.snapshot().connected).then_some(())
    });
    let begin = Instant::now();
    lab.start_manager();
    // Attempts in each quarter of a second, until all are back.
    let (mut counts, mut last) = (Vec::new(), proxy.accepted());
    while !all() {
        assert!(begin.elapsed() < Duration::from_secs(60), "all are back within a minute");
        thread::sleep(Duration::from_millis(250));
        let now = proxy.accepted();
        counts.push(now - last);
        last = now;
    }
    let took = begin.elapsed();
    let busy: Vec<u64> = counts.into_iter().skip_while(|count| *count == 0).collect();
    let total: u64 = busy.iter().sum();
    let (peak, mean) = (busy.iter().max().copied().unwrap_or(0), total / busy.len().max(1) as u64);
    eprintln!("LOST {AGENTS} agents back after {took:?}; connects in each quarter of a second {busy:?}");
    assert!(total >= AGENTS as u64 / 2, "the control: they connected anew: {busy:?}");
    assert!(busy.len() >= 4 && peak <= 3 * mean, "peak {peak}, mean {mean}: {busy:?}");
}

#[test]
fn a_network_that_flips_bits_costs_links_and_no_report() {
    const REPORTS: u64 = 3_000;
    let (lab, proxy) = Lab::start_behind_proxy();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let persona = enroll(&lab, &runtime, lab.agent_port, 1).remove(0);
    let agent = start(&runtime, persona, proxy.address(), sim_agent::begun());
    order_scan(&lab);
    let task = task_of(&agent);
    for number in 1..=REPORTS {
        agent.report(found(task, format!("/r-{number}")));
    }
    // In a handshake, in a hello, among reports and among what acknowledges them.
    for (way, at) in
        [(Way::Up, 100), (Way::Down, 50), (Way::Up, 2_500), (Way::Up, 40_000), (Way::Down, 4_000)]
    {
        let (flips, sessions) = (proxy.flips(), agent.snapshot().sessions);
        proxy.flip(way, Some(at));
        // A link that is beyond that byte already has none flipped.
        proxy.cut_now();
        for number in 1..=200 {
            agent.notice("flipped", &format!("{way:?}-{at}-{number}"));
        }
        wait_for("a bit to be flipped", PATIENCE, || (proxy.flips() > flips).then_some(()));
        proxy.flip(way, None);
        wait_for("a new session after it", PATIENCE, || {
            let seen = agent.snapshot();
            (seen.connected && seen.sessions > sessions).then_some(())
        });
    }
    let outcome = Outcome::Scanned(Coverage::default());
    agent.report(ReportBody::Finished { task, outcome });
    wait_for("everything to be stored", PATIENCE, || {
        let seen = agent.snapshot();
        (seen.reports_stored == REPORTS + 3 && seen.notices_stored == 1_000).then_some(())
    });
    eprintln!("LOST {} bits flipped, {} sessions", proxy.flips(), agent.snapshot().sessions);
    let expected: Vec<String> = (1..=REPORTS).map(|n| format!("/r-{n}")).collect();
    assert!(sql(&lab, "SELECT CAST(path AS TEXT) FROM detection ORDER BY task_id, ordinal") == expected);
    assert_eq!(
        sql(&lab, "SELECT COUNT(*), COUNT(DISTINCT message) FROM event WHERE detail = 'flipped'"),
        ["1000|1000"]
    );
    assert_eq!(sql(&lab, "SELECT state FROM task"), ["done"]);
}

#[test]
fn after_a_partition_what_was_queued_is_done_or_expired_and_all_was_reported_once() {
    const AGENTS: usize = 10;
    let lasts = Duration::from_secs(if is_long() { 600 } else { 15 });
    let (lab, proxy) = Lab::start_behind_proxy();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let personas = enroll(&lab, &runtime, lab.agent_port, 10);
    let agents: Vec<SimAgent> = personas
        .into_iter()
        .map(|persona| start(&runtime, persona, proxy.address(), sim_agent::done_at_once()))
        .collect();
    let connected = |count: usize| {
        wait_for("agents to come or go", PATIENCE, || {
            let rows = rows(&lab.rest("/v1/endpoints"));
            (rows.iter().filter(|row| row["connectivity"] == "connected").count() == count).then_some(())
        });
    };
    connected(AGENTS);
    let begin = Instant::now();
    proxy.black_hole();
    connected(0);
    // One order that waits, and one that does not outlive the partition.
    order_scan(&lab);
    let group = ["scan", "start", "--group", "default", "--when-connected", "--path", "/nowhere"];
    lab.tmctl(group.iter().chain(&["--expires", "2s"])).expect(0);
    for agent in &agents {
        (1..=500).for_each(|number| agent.notice("parted", &format!("n-{number:03}")));
    }
    wait_for("the short one to expire", PATIENCE, || {
        (sql(&lab, "SELECT COUNT(*) FROM task WHERE state = 'expired'") == ["10"]).then_some(())
    });
    while begin.elapsed() < lasts {
        assert!(agents.iter().all(|agent| agent.snapshot().notices_stored == 0), "nothing comes through");
        thread::sleep(Duration::from_millis(100));
    }
    let healed = Instant::now();
    proxy.heal();
    wait_for("everything to be stored", PATIENCE, || {
        agents
            .iter()
            .all(|agent| agent.snapshot().notices_stored == 500 && agent.snapshot().reports_stored == 3)
            .then_some(())
    });
    eprintln!("LOST a partition of {lasts:?}: drained {:?} after it", healed.elapsed());
    let states = sql(&lab, "SELECT state, COUNT(*) FROM task GROUP BY state ORDER BY state");
    assert_eq!(states, ["done|10", "expired|10"]);
    for agent in &agents {
        let seen = agent.snapshot();
        assert_eq!(seen.assigned.values().copied().collect::<Vec<u64>>().len(), 1, "{seen:?}");
        let id = agent.persona.endpoint;
        let order = sql(
            &lab,
            &format!(
                "SELECT substr(message, 1, 5) FROM event WHERE detail = 'parted' AND endpoint_id = '{id}' ORDER BY id"
            ),
        );
        assert!(order == (1..=500).map(|n| format!("n-{n:03}")).collect::<Vec<_>>(), "in order, each once");
    }
}

#[test]
fn over_a_slow_network_orders_and_reports_take_their_time_and_nothing_breaks() {
    let (lab, proxy) = Lab::start_behind_proxy();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    // 300 ms each way.
    let delay = Duration::from_millis(300);
    for way in [Way::Up, Way::Down] {
        proxy.delay(way, delay);
    }
    let agent = lab.agent();
    let folder = lab.folder("dirty");
    std::fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    let before = sessions(&lab, &agent);
    for _ in 0..3 {
        let begin = Instant::now();
        lab.scan(&agent, &folder).expect(10);
        assert!(begin.elapsed() >= 2 * delay, "the control: it is slow");
    }
    assert_eq!(sessions(&lab, &agent), before, "it kept its session");
}
