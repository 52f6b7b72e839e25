//! A thousand agents, and a manager that dies under them.

use std::{net::SocketAddr, time::Duration};

use tm_protocol::{
    ids::TaskId,
    message::{Outcome, ReportBody},
    report::Coverage,
};
use tm_tests::{
    Lab,
    fleet::{Fleet, Pace},
    personas, samples,
    sim_agent::{self, SimAgent},
    wait_for,
};

use crate::link::{runtime, sql};

const AGENTS: u64 = 1000;
/// Unoptimized programs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn a_thousand_agents_outlive_a_killed_manager_and_every_outcome_is_there_once() {
    let mut lab = Lab::start();
    lab.set("heartbeat", "\"20s\"");
    lab.restart_manager();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let runtime = runtime();
    let known = runtime
        .block_on(personas::enroll(
            &lab.path("personas.jsonl"),
            lab.agent_port,
            &lab.token(u32::try_from(AGENTS).unwrap()),
            0..AGENTS,
            |_| {},
        ))
        .expect("a good token lets agents in");
    let fleet = Fleet::new(Pace::Quick).opening(32);
    let (at, _entered) = (lab.agent_port, runtime.enter());
    // One half is done at once; the others say so only when the manager has been dead.
    let start = |at: SocketAddr, number: u64, persona| {
        let script = if number.is_multiple_of(2) { sim_agent::done_at_once() } else { sim_agent::begun() };
        SimAgent::start_in(&fleet, persona, vec![at], script)
    };
    let agents: Vec<SimAgent> =
        known.into_iter().map(|(number, persona)| start(at, number, persona)).collect();
    let all_connected = |sessions: u64| {
        wait_for("all to be connected", PATIENCE, || {
            let sums = fleet.totals.sums();
            (sums.connected == AGENTS && sums.sessions >= sessions).then_some(())
        });
    };
    all_connected(AGENTS);

    lab.tmctl(["scan", "start", "--query", "connected", "--path", "/nowhere"]).expect(0);
    let done = wait_for("the control: some outcomes to be acknowledged", PATIENCE, || {
        Some(fleet.totals.sums().done).filter(|done| *done > 0)
    });
    lab.kill9_manager();
    assert!(done < AGENTS, "it died in the middle");
    all_connected(2 * AGENTS);
    wait_for("everybody to have its task", PATIENCE, || (fleet.totals.sums().tasks == AGENTS).then_some(()));
    for agent in agents.iter().skip(1).step_by(2) {
        let task: TaskId = *agent.snapshot().assigned.keys().next().expect("each has one");
        let outcome = Outcome::Scanned(Coverage { files: 1, ..Coverage::default() });
        agent.report(ReportBody::Finished { task, outcome });
    }
    wait_for("every outcome to be acknowledged", PATIENCE, || {
        (fleet.totals.sums().done == AGENTS).then_some(())
    });
    assert_eq!(sql(&lab, "SELECT state, COUNT(*) FROM task GROUP BY state"), ["done|1000"]);
    assert_eq!(
        sql(
            &lab,
            "SELECT COUNT(*), COUNT(DISTINCT task_id), COUNT(DISTINCT endpoint_id) FROM event
             WHERE status = 'scanned'"
        ),
        ["1000|1000|1000"]
    );
    for agent in &agents {
        let seen = agent.snapshot();
        assert_eq!((seen.assigned.len(), seen.reports), (1, 3), "{seen:?}");
    }
}
