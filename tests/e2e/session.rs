//! Links that break, programs that restart, folders that are used twice.

use std::fs;

use tm_tests::{Lab, PATIENCE, samples, wait_for};

#[test]
fn agents_come_back_when_the_manager_restarts() {
    let mut lab = Lab::start();
    let (one, two) = (lab.agent(), lab.agent());
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    lab.restart_manager();
    for agent in [&one, &two] {
        lab.wait_connected(agent);
        lab.scan(agent, &folder).expect(10);
    }
    // Without a goodbye, too.
    lab.kill9_manager();
    for agent in [&one, &two] {
        lab.wait_connected(agent);
        lab.scan(agent, &folder).expect(10);
    }
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn an_agent_that_is_killed_is_away_and_comes_back_as_itself() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    agent.kill9();
    lab.wait_away(&agent);
    agent.run();
    lab.wait_connected(&agent);
    assert_eq!(lab.endpoints().len(), 1, "it is the same endpoint");
}

#[test]
fn an_agent_that_hangs_is_noticed_and_welcomed_back() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    agent.freeze();
    lab.wait_away(&agent);
    agent.thaw();
    lab.wait_connected(&agent);
}

#[test]
fn an_order_for_an_agent_that_is_away_is_refused_unless_it_may_wait() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    agent.stop();
    lab.wait_away(&agent);
    lab.scan(&agent, &folder).expect(3);
    assert!(lab.newest_task(&agent).is_none());

    let args = ["scan", "start", &agent.id, "--when-connected", "--path", folder.to_str().unwrap()];
    lab.tmctl(args).expect(0);
    assert_eq!(lab.newest_task(&agent).unwrap()["state"], "queued");
    agent.run();
    wait_for("the order to be carried out", PATIENCE, || {
        lab.newest_task(&agent).filter(|task| task["state"] == "done")
    });
    assert_eq!(lab.detections(&agent).len(), 1);
}

#[test]
fn a_second_agent_on_the_same_folder_names_the_first() {
    let lab = Lab::start();
    let agent = lab.agent();
    let second = agent.command(&["run"]);
    assert_eq!(second.code(), 1, "{}", second.both());
    assert!(second.err().contains(&agent.pid().to_string()), "{}", second.both());
    assert!(lab.is_connected(&agent), "the first goes on");
    agent.command(&["status"]).expect(0);
}

#[test]
fn programs_end_in_order_when_they_are_asked_to() {
    let mut lab = Lab::start();
    let mut agent = lab.agent();
    // `stop` fails the test if SIGTERM is not enough.
    agent.stop();
    lab.wait_away(&agent);
    lab.restart_manager();
    agent.run();
    lab.wait_connected(&agent);
}
