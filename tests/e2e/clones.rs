//! A copied machine: two agents with one identity. The newer is held until an administrator makes it an endpoint of its own.

use std::{fs, path::Path};

use serde_json::Value;
use tm_protocol::{ALPN_CONTROL, message::ToAgent};
use tm_tests::{Agent, Lab, PATIENCE, output::rows, raw, samples, wait_for};

fn conflicts(lab: &Lab) -> Vec<Value> {
    rows(&lab.tmctl(["endpoint", "conflicts", "-o", "json"]).expect(0).json())
}

/// Waits until the copy of an agent is held, and says so.
fn wait_held(lab: &Lab, copy: &Agent) -> Value {
    wait_for("the copy to say that it is held", PATIENCE, || {
        copy.command(&["status"]).both().contains("identity-held").then_some(())
    });
    wait_for("the copy to be listed", PATIENCE, || {
        conflicts(lab).into_iter().find(|row| row["state"] == "held")
    })
}

/// Whether a folder of an agent has an entry.
fn has(agent: &Agent, name: &str) -> bool {
    agent.data.join(name).exists()
}

fn is_connected(lab: &Lab, id: &str) -> bool {
    lab.endpoints().iter().any(|row| row["id"] == id && row["connectivity"] == "connected")
}

/// Whether an agent has a session, as it says itself: its identity may be another's, too.
fn has_session(agent: &Agent) -> bool {
    let status = agent.command(&["status", "-o", "json"]);
    status.code() == 0 && status.json()["manager"].is_string()
}

fn tasks(lab: &Lab, id: &str) -> Vec<Value> {
    rows(&lab.rest(&format!("/v1/tasks?endpoint={id}&limit=1000")))
}

fn approve(lab: &Lab, copy: &mut Agent) {
    let made = rows(&lab.tmctl(["endpoint", "approve", &copy.id, "-o", "json"]).expect(0).json());
    let new = made[0]["id"].as_str().expect("the new endpoint is shown").to_owned();
    assert_ne!(new, copy.id);
    wait_for("the copy to be connected as itself", PATIENCE, || is_connected(lab, &new).then_some(()));
    assert!(copy.is_running(), "it went on by itself");
    copy.id = new;
}

/// Waits until the key that an agent had is refused.
fn wait_worthless(lab: &Lab, identity: &raw::Identity) {
    wait_for("the copied key to be refused", PATIENCE, || {
        let mut link = lab.raw(ALPN_CONTROL, Some(identity)).ok()?;
        let _ = link.say(&raw::hello());
        match link.hear().ok()? {
            Some(ToAgent::Goodbye(goodbye)) => (goodbye.failure.code == "revoked").then_some(()),
            _ => None,
        }
    });
}

#[test]
fn a_copied_agent_is_held_and_becomes_an_endpoint_of_its_own() {
    let mut lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    let put = || fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    put();
    lab.scan(&agent, &folder).expect(10);
    lab.tmctl(["cleanup", "run", &agent.id, "--wait"]).expect(0);
    assert!(has(&agent, "vault"), "the control: there is a vault to be copied");
    let copied = agent.identity();
    let mut copy = lab.clone_of(&agent);

    let held = wait_held(&lab, &copy);
    assert_eq!((&held["endpoint"], conflicts(&lab).len()), (&agent.id.as_str().into(), 1), "{held}");
    assert!(held["host"].as_str().is_some_and(|host| !host.is_empty()), "{held}");
    assert!(lab.is_connected(&agent), "the first one keeps its session");
    put();
    let before = tasks(&lab, &agent.id).len();
    lab.scan(&agent, &folder).expect(10);
    assert_eq!(tasks(&lab, &agent.id).len(), before + 1);
    let status = lab.tmctl(["endpoint", "conflicts"]).expect(0);
    assert!(status.out().contains("held"), "{}", status.both());
    // Who may not decide does not, and what is not held is not approved.
    for role in ["viewer", "operator"] {
        let profile = lab.account(role, role);
        lab.tmctl_as(&profile, ["endpoint", "approve", &agent.id]).expect(3);
    }
    let none = "00000000-0000-7000-8000-000000000000";
    let refused = lab.tmctl(["endpoint", "approve", &agent.id, "--conflict", none]).expect(3);
    assert!(refused.err().contains("is held"), "{}", refused.both());
    assert_ne!(lab.tmctl(["endpoint", "approve", &agent.id, "--conflict", "x"]).code(), 0);
    assert_eq!(lab.endpoints().len(), 1);
    // It stays held through restarts of the manager.
    for _ in 0..3 {
        lab.restart_manager();
        wait_for("the first one to have its session", PATIENCE, || has_session(&agent).then_some(()));
        wait_held(&lab, &copy);
        assert!(!has_session(&copy), "whoever comes first");
    }

    approve(&lab, &mut copy);
    lab.wait_connected(&agent);
    let aside = format!("of-{}", agent.id);
    assert!(has(&copy, &format!("journal.{aside}")) && has(&copy, &format!("vault.{aside}")));
    assert!(!has(&copy, "identity/copied-from"));
    assert_eq!(tasks(&lab, &copy.id), [Value::Null; 0], "nothing of the first one's is told as its own");
    wait_worthless(&lab, &copied);
    wait_for("the conflict to be settled", PATIENCE, || {
        (conflicts(&lab)[0]["state"] == "settled").then_some(())
    });
    assert_eq!(conflicts(&lab)[0]["approved_as"], copy.id.as_str());

    // Two endpoints, each with its own orders; also after they have been started anew.
    for round in 0..2 {
        for one in [&agent, &copy] {
            put();
            wait_for("it to be connected", PATIENCE, || is_connected(&lab, &one.id).then_some(()));
            lab.scan(one, &folder).expect(10);
        }
        assert_eq!(tasks(&lab, &copy.id).len(), round + 1);
        for one in [&mut agent, &mut copy] {
            one.stop();
            one.run();
        }
    }
    lab.tmctl(["endpoint", "approve", &agent.id]).expect(3);
    assert_eq!(lab.endpoints().len(), 2);
    let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json().to_string();
    assert_eq!(audit.matches("endpoint.approve").count(), 1);
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn a_copy_that_was_taken_in_the_middle_of_a_task_does_not_carry_it_out_or_report_it() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let args = ["scan", "start", &agent.id, "--when-connected", "-o", "json", "--path", "/usr"];
    let made = rows(&lab.tmctl(args).expect(0).json());
    let id = made[0]["id"].as_str().expect("a task has an id").to_owned();
    let state = || lab.rest(&format!("/v1/tasks/{id}"))["state"].clone();
    wait_for("the scan to begin", PATIENCE, || (state() == "running").then_some(()));
    let mut copy = lab.clone_of(&agent);
    let journal = |folder: &Path| fs::read_dir(folder).map_or(0, Iterator::count);
    assert!(journal(&copy.data.join("journal")) > 0, "the control: the order was copied");
    wait_held(&lab, &copy);
    wait_for("the copy to leave the task alone", PATIENCE, || {
        let status = copy.command(&["status", "-o", "json"]);
        (status.code() == 0 && status.json()["running_task"].is_null()).then_some(())
    });
    assert_eq!(state(), "running", "the first one goes on with it");
    approve(&lab, &mut copy);
    // The key is not taken away from under the task that may still need it.
    lab.tmctl(["task", "cancel", &id]).expect(0);
    wait_for("the task to end", PATIENCE, || (state() == "cancelled").then_some(()));
    wait_for("the copied key to be replaced", PATIENCE, || {
        (conflicts(&lab)[0]["state"] == "settled").then_some(())
    });
    assert_eq!(tasks(&lab, &copy.id), [Value::Null; 0]);
    let events = lab.tmctl(["event", "list", "-o", "json"]).expect(0).json();
    let ends = rows(&events).into_iter().filter(|event| event["kind"] == "scan-administrator");
    let ends: Vec<Value> = ends.map(|event| event["endpoint"].clone()).collect();
    assert_eq!(ends, [Value::from(agent.id.as_str())], "one end, of the first one's");
}

#[test]
fn who_revokes_a_copied_identity_shuts_both_out_and_a_lone_copy_is_no_conflict() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let mut copies = [lab.clone_of(&agent), lab.clone_of(&agent)];
    wait_for("both copies to be held", PATIENCE, || {
        (conflicts(&lab).iter().filter(|row| row["state"] == "held").count() == 2).then_some(())
    });
    let refused = lab.tmctl(["endpoint", "approve", &agent.id]).expect(3);
    assert!(refused.err().contains("--conflict"), "several are held: {}", refused.both());
    // One of them is named.
    let named = conflicts(&lab)[0]["id"].as_str().expect("it has an id").to_owned();
    lab.tmctl(["endpoint", "approve", &agent.id, "--conflict", &named]).expect(0);
    wait_for("two endpoints to be connected", PATIENCE, || {
        let endpoints = lab.endpoints();
        (endpoints.iter().filter(|row| row["connectivity"] == "connected").count() == 2).then_some(())
    });
    lab.tmctl(["endpoint", "revoke", &agent.id]).expect(0);
    lab.wait_away(&agent);
    // The approved one is no longer concerned; the other copy is out.
    wait_for("the copy to be shut out", PATIENCE, || {
        let out = copies.iter().filter(|copy| copy.command(&["status"]).both().contains("revoked"));
        (out.count() == 1).then_some(())
    });
    assert_eq!(lab.endpoints().iter().filter(|row| row["connectivity"] == "connected").count(), 1);
    for copy in &mut copies {
        copy.stop();
    }
    agent.stop();
    // A machine that has moved is itself, as before: nobody answers for it.
    let mut moved = lab.agent();
    moved.stop();
    lab.wait_away(&moved);
    let copy = lab.clone_of(&moved);
    lab.wait_connected(&copy);
}
