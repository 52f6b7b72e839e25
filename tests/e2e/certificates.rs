//! Certificates after enrollment: revoked ones, renewed ones.

use std::{
    fs,
    time::{Duration, Instant},
};

use tm_protocol::{ALPN_BULK, ALPN_CONTROL, ALPN_RENEW, message::ToAgent};
use tm_tests::{Lab, PATIENCE, raw, samples, wait_for};

#[test]
fn a_revoked_agent_is_cut_off_at_once_and_never_let_in_again() {
    let mut lab = Lab::start();
    let (mut stolen, stays) = (lab.agent(), lab.agent());
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("empty");
    let identity = stolen.identity();
    // The control: this certificate does open a link.
    let mut link = lab.raw(ALPN_BULK, Some(&identity)).expect("the certificate is good");
    assert!(!link.is_closed_within(Duration::from_millis(200)));
    let mut others = lab.raw(ALPN_BULK, Some(&stays.identity())).expect("the certificate is good");

    let begin = Instant::now();
    lab.tmctl(["endpoint", "revoke", &stolen.id, "--reason", "disk sold"]).expect(0);
    lab.wait_away(&stolen);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert!(link.is_closed_within(Duration::from_secs(2)), "a bulk link is cut, too");
    assert!(!others.is_closed_within(Duration::from_millis(200)), "nobody else's is");
    drop(others);
    wait_for("the agent to say why", PATIENCE, || {
        let status = stolen.command(&["status"]);
        status.both().contains("revoked").then_some(())
    });
    assert!(lab.is_connected(&stays), "nobody else is concerned");

    // By hand, after restarts on both sides, and on the other protocols: never again.
    for round in 0..2 {
        let mut link = lab.raw(ALPN_CONTROL, Some(&identity)).expect("TLS itself knows nothing of it");
        let _ = link.say(&raw::hello());
        match link.hear().expect("a goodbye is said properly") {
            Some(ToAgent::Goodbye(goodbye)) => assert_eq!(goodbye.failure.code, "revoked"),
            other => panic!("round {round}: {other:?}"),
        }
        assert!(link.is_closed_within(PATIENCE));
        let mut link = lab.raw(ALPN_BULK, Some(&identity)).expect("TLS itself knows nothing of it");
        assert!(link.is_closed_within(PATIENCE), "no pattern either");
        lab.restart_manager();
        lab.wait_connected(&stays);
        stolen.stop();
        stolen.run();
        wait_for("the agent to be told again", PATIENCE, || {
            stolen.command(&["status"]).both().contains("revoked").then_some(())
        });
        assert!(!lab.is_connected(&stolen));
    }

    // It is no target, and stands where such endpoints are counted.
    let scan = lab.scan(&stolen, &folder);
    assert_eq!(scan.code(), 3, "{}", scan.both());
    assert!(scan.err().contains("revoked"), "{}", scan.err());
    lab.scan(&stays, &folder).expect(0);
    let group = ["scan", "start", "--group", "default", "--path", "/nowhere", "--when-connected"];
    lab.tmctl(group).expect(0);
    assert_eq!(lab.newest_task(&stolen), None, "a group's order leaves it out");
    let status = lab.tmctl(["status", "-o", "json"]).expect(0).json();
    assert_eq!((&status["agentless"], &status["connected"]), (&1.into(), &1.into()), "{status}");
    let listed = lab.tmctl(["endpoint", "list", "--query", "agentless", "-o", "json"]).expect(0).json();
    assert_eq!(listed[0]["id"], stolen.id.as_str());
    assert!(listed[0]["revoked_at"].is_string(), "{listed}");
    // Twice is no error; an audit record says who did it and why, once.
    lab.tmctl(["endpoint", "revoke", &stolen.id]).expect(0);
    let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json().to_string();
    assert_eq!(audit.matches("endpoint.revoke").count(), 1);
    assert!(audit.contains("disk sold"));
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn only_a_revoked_endpoint_is_forgotten_and_only_by_an_administrator() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    lab.scan(&agent, &folder).expect(10);
    let (viewer, operator) = (lab.account("vera", "viewer"), lab.account("otto", "operator"));
    lab.tmctl_as(&viewer, ["endpoint", "revoke", &agent.id]).expect(3);
    let kept = lab.tmctl(["endpoint", "forget", &agent.id]);
    assert_eq!(kept.code(), 3, "{}", kept.both());
    assert!(kept.err().contains("revoke it first"), "{}", kept.err());
    agent.stop();
    lab.wait_away(&agent);
    assert_eq!(lab.tmctl(["endpoint", "forget", &agent.id]).code(), 3, "it could still connect");

    lab.tmctl_as(&operator, ["endpoint", "revoke", &agent.id]).expect(0);
    lab.tmctl_as(&operator, ["endpoint", "forget", &agent.id]).expect(3);
    lab.tmctl(["endpoint", "forget", &agent.id]).expect(0);
    assert_eq!(lab.endpoints().len(), 0);
    let events = lab.tmctl(["event", "list", "-o", "json"]).expect(0).json();
    assert!(events.to_string().contains("1 detection in 1 file"), "what happened stays known: {events}");
    // Who is not known is not let in, either.
    let mut link = lab.raw(ALPN_CONTROL, Some(&agent.identity())).expect("TLS itself knows nothing of it");
    assert!(link.is_closed_within(PATIENCE));
    lab.tmctl(["endpoint", "forget", &agent.id]).expect(1);
}

/// When the running agent's certificate ends, as it says.
fn ends(agent: &tm_tests::Agent) -> Option<String> {
    let status = agent.command(&["status", "-o", "json"]);
    if status.code() != 0 {
        return None;
    }
    Some(status.json()["certificate_ends"].as_str()?.to_owned()).filter(|text| !text.is_empty())
}

fn short_lived(life: &str) -> Lab {
    let mut lab = Lab::start();
    lab.set("certificate_life", &format!("{life:?}"));
    lab.restart_manager();
    lab
}

#[test]
fn a_certificate_is_renewed_with_a_new_key_and_the_old_one_is_worth_nothing() {
    let mut lab = short_lived("20s");
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("empty");
    let copied = agent.identity();
    let first = wait_for("the agent to say when its certificate ends", PATIENCE, || ends(&agent));
    // The manager's own certificate ends meanwhile, too.
    wait_for("two renewals", PATIENCE * 2, || {
        ends(&agent).filter(|now| *now != first)?;
        let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json().to_string();
        (audit.matches("endpoint.renew").count() >= 2).then_some(())
    });
    lab.wait_connected(&agent);
    assert_eq!(lab.endpoints().len(), 1, "it is the same endpoint");
    let mut link = lab.raw(ALPN_BULK, Some(&copied));
    assert!(
        link.as_mut().map_or(true, |link| link.is_closed_within(PATIENCE)),
        "the copied key opens a link"
    );

    let done = lab.scan_with(&agent, &folder, &["-o", "json"]).expect(0);
    let task = lab.newest_task(&agent).expect("a scan was ordered");
    assert_eq!(task["result"]["receipt"]["verified"], true, "{task}\n{}", done.both());

    // A revocation is of the whole line, however new its last certificate.
    agent.stop();
    lab.wait_away(&agent);
    lab.tmctl(["endpoint", "revoke", &agent.id]).expect(0);
    for identity in [agent.identity(), agent.identity()] {
        let mut link = lab.raw(ALPN_RENEW, Some(&identity)).expect("TLS itself knows nothing of it");
        match link.hear().expect("a goodbye is said properly") {
            Some(ToAgent::Goodbye(goodbye)) => assert_eq!(goodbye.failure.code, "revoked"),
            other => panic!("{other:?}"),
        }
        lab.restart_manager();
    }
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn an_agent_that_slept_through_its_certificates_end_comes_back_as_itself() {
    let lab = short_lived("10s");
    let mut agent = lab.agent();
    let identity = agent.identity();
    agent.stop();
    lab.wait_away(&agent);
    wait_for("its certificate to end", PATIENCE, || {
        // On one that is good nothing is said before a request.
        let why = lab.raw(ALPN_BULK, Some(&identity)).and_then(|mut link| link.ending());
        why.is_ok_and(|why| why.contains("CertificateExpired")).then_some(())
    });
    // What has ended is good for a renewal, and for nothing else.
    let mut link =
        lab.raw(ALPN_RENEW, Some(&identity)).expect("a certificate that has just ended may be renewed");
    link.say(&raw::hello()).expect("it can be said");
    assert!(link.is_closed_within(PATIENCE), "no session comes of it");
    let ca = lab.manager_data().join("ca");
    let ids = fs::read_to_string(ca.join("ids.json")).expect("the authority has a name");
    let ids: serde_json::Value = serde_json::from_str(&ids).expect("names are JSON");
    let uri = format!("tm://{}/endpoint/{}", ids["fleet"].as_str().unwrap(), agent.id);
    let long_ago = raw::Identity::signed(&ca, &uri, true, &[0x42], true);
    let why = lab.raw(ALPN_RENEW, Some(&long_ago)).and_then(|mut link| link.ending());
    assert!(why.as_ref().is_ok_and(|why| why.contains("CertificateExpired")), "years are too late: {why:?}");
    agent.run();
    lab.wait_connected(&agent);
    assert_eq!(lab.endpoints().len(), 1, "it was not enrolled anew");
    // Revoked is revoked, however late.
    agent.stop();
    lab.wait_away(&agent);
    lab.tmctl(["endpoint", "revoke", &agent.id]).expect(0);
    let mut link = lab.raw(ALPN_RENEW, Some(&agent.identity())).expect("TLS itself knows nothing of it");
    match link.hear().expect("a goodbye is said properly") {
        Some(ToAgent::Goodbye(goodbye)) => assert_eq!(goodbye.failure.code, "revoked"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_clock_that_stands_wrong_does_not_cut_an_endpoint_off() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let control = lab.path("clock");
    for (offset, is_behind) in [("+400d", false), ("-400d", true), ("-9000d", true), ("+4000d", false)] {
        agent.stop();
        lab.wait_away(&agent);
        fs::write(&control, offset).unwrap();
        agent.run_with_clock(&control);
        lab.wait_connected(&agent);
        let ahead = wait_for("the agent to say that its clock is wrong", PATIENCE, || {
            let status = agent.command(&["status", "-o", "json"]);
            (status.code() == 0).then(|| status.json())?["clock_ahead_s"].as_i64()
        });
        assert_eq!(ahead < -86_400, is_behind, "{offset}: {ahead}");
    }
    assert_eq!(lab.endpoints().len(), 1, "it never enrolls anew");
    let events = lab.tmctl(["event", "list", "-o", "json"]).expect(0).json().to_string();
    assert!(events.contains("clock-skew"), "{events}");
}

/// The details of a machine's certificate events.
fn warnings(lab: &Lab, endpoint: &str) -> Vec<String> {
    let events = lab.tmctl(["event", "list", "--kind", "certificate", "-o", "json"]).expect(0).json();
    let events = events.as_array().into_iter().flatten();
    let of = events.filter(|event| event["endpoint"] == endpoint);
    of.filter_map(|event| event["detail"].as_str().map(str::to_owned)).collect()
}

#[test]
fn who_does_not_renew_is_listed_and_warned_of_twice() {
    let lab = short_lived("30s");
    let (mut away, stays) = (lab.agent(), lab.agent());
    away.stop();
    lab.wait_away(&away);
    assert_eq!(warnings(&lab, &away.id), [""; 0], "its certificate is new");
    wait_for("both warnings", PATIENCE, || {
        (warnings(&lab, &away.id) == ["ends-in-30-days", "ends-in-7-days"]).then_some(())
    });
    let listed = wait_for("the certificate to end", PATIENCE, || {
        let args = ["endpoint", "certificates", "--expiring", "0", "-o", "json"];
        let listed = lab.tmctl(args).expect(0).json();
        (listed[0]["state"] == "ended").then_some(listed)
    });
    assert_eq!((&listed[0]["endpoint"], &listed[1]), (&away.id.as_str().into(), &serde_json::Value::Null));
    let all = lab.tmctl(["endpoint", "certificates", "-o", "json"]).expect(0).json();
    assert_eq!(all[1]["endpoint"], stays.id.as_str(), "the first to end comes first: {all}");
    assert_eq!(all[1]["state"], "good", "who renews is none that is warned of: {all}");
    let status = lab.tmctl(["status", "-o", "json"]).expect(0).json();
    assert_eq!(status["certificates"]["ending"], 1, "{status}");
    assert_eq!(status["certificates"]["own"][0]["what"], "authority", "{status}");
    let told = lab.tmctl(["status"]).expect(0);
    assert!(told.out().contains("! 1 certificate of agents"), "{}", told.both());
    assert_eq!(warnings(&lab, &away.id).len(), 2, "twice is all");
    assert_eq!(warnings(&lab, &stays.id), [""; 0]);
    lab.tmctl(["endpoint", "certificates", "--expiring", "nine"]).expect(2);
    lab.tmctl(["endpoint", "certificates", "--expiring", "36501"]).expect(2);
}

/// The agents on each authority, the oldest first, as `tm-manager ca list` counts them.
fn on_each(lab: &Lab) -> Vec<u32> {
    let listed = lab.manager_command(&["ca", "list"]).expect(0);
    let text = listed.out();
    text.lines()
        .map(|line| line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a count ends it"))
        .collect()
}

/// The authorities that the manager trusts, as the agent's folder has them.
fn knows(agent: &tm_tests::Agent) -> Vec<u8> {
    fs::read(agent.data.join("identity/ca.der")).expect("an agent knows authorities")
}

#[test]
fn one_authority_follows_another_and_agents_follow_by_themselves() {
    let mut lab = Lab::start();
    let (mut first, mut second, mut sleeper) = (lab.agent(), lab.agent(), lab.agent());
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("empty");
    let old_token = lab.token(1);
    let copied = first.identity();
    assert_eq!(on_each(&lab), [3]);
    lab.manager_command(&["ca", "switch"]).expect(1);
    lab.manager_command(&["ca", "retire"]).expect(1);
    sleeper.stop();
    lab.wait_away(&sleeper);
    let one = knows(&first);

    lab.manager_command(&["ca", "add"]).expect(0);
    lab.manager_command(&["ca", "add"]).expect(1);
    wait_for("both agents to learn the second authority", PATIENCE, || {
        [&first, &second].iter().all(|agent| knows(agent).len() > one.len() * 3 / 2).then_some(())
    });
    assert_eq!(knows(&sleeper), one, "who is away learns nothing");
    assert_eq!(on_each(&lab), [3, 0], "it issues nothing yet");

    lab.manager_command(&["ca", "switch"]).expect(0);
    wait_for("both agents to renew under it", PATIENCE, || (on_each(&lab) == [1, 2]).then_some(()));
    lab.wait_connected(&first);
    lab.wait_connected(&second);
    lab.scan(&first, &folder).expect(0);
    // A token from before and one from now both let an agent in, and both get the new authority's certificate.
    let (_, enrolled) = lab.enroll(&old_token);
    enrolled.expect(0);
    let mut newcomer = lab.agent();
    assert_eq!(on_each(&lab), [1, 4]);

    let refused = lab.manager_command(&["ca", "retire"]).expect(1);
    assert!(refused.err().contains(&sleeper.id), "who would be cut off is named: {}", refused.both());
    assert!(!refused.err().contains(&first.id), "{}", refused.both());
    // Everything anew, with both trusted.
    lab.restart_manager();
    for agent in [&mut first, &mut second, &mut newcomer] {
        agent.stop();
        agent.run();
        lab.wait_connected(agent);
    }
    // It knows nothing of all this, and follows.
    sleeper.run();
    lab.wait_connected(&sleeper);
    wait_for("the sleeper to renew", PATIENCE, || (on_each(&lab) == [0, 5]).then_some(()));

    lab.manager_command(&["ca", "retire"]).expect(0);
    assert_eq!(on_each(&lab), [5]);
    wait_for("the first authority to be forgotten", PATIENCE, || {
        let agents = [&first, &second, &newcomer, &sleeper];
        agents.iter().all(|agent| knows(agent).len() < one.len() * 3 / 2 && knows(agent) != one).then_some(())
    });
    lab.restart_manager();
    for agent in [&mut first, &mut second, &mut newcomer, &mut sleeper] {
        agent.stop();
        agent.run();
        lab.wait_connected(agent);
        lab.scan(agent, &folder).expect(0);
    }
    assert_eq!(lab.endpoints().len(), 5, "nobody was enrolled anew");
    let why = lab.raw(ALPN_BULK, Some(&copied)).and_then(|mut link| link.ending());
    assert!(
        why.as_ref().is_ok_and(|why| !why.is_empty()),
        "what the first one signed is worth nothing: {why:?}"
    );
    let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json().to_string();
    for step in ["ca.add", "ca.switch", "ca.retire"] {
        assert_eq!(audit.matches(step).count(), 1, "{step}");
    }
    lab.tmctl(["audit", "verify"]).expect(0);
}

#[test]
fn who_sleeps_through_a_rotation_and_its_own_certificates_end_comes_back_unless_it_was_forced_out() {
    let lab = short_lived("10s");
    let (mut sleeper, mut lost) = (lab.agent(), lab.agent());
    let identity = sleeper.identity();
    for agent in [&mut sleeper, &mut lost] {
        agent.stop();
        lab.wait_away(agent);
    }
    lab.manager_command(&["ca", "add"]).expect(0);
    lab.manager_command(&["ca", "switch"]).expect(0);
    wait_for("the certificate to end", PATIENCE, || {
        let why = lab.raw(ALPN_BULK, Some(&identity)).and_then(|mut link| link.ending());
        why.is_ok_and(|why| why.contains("CertificateExpired")).then_some(())
    });
    sleeper.run();
    lab.wait_connected(&sleeper);
    wait_for("only the other to hang on the first authority", PATIENCE, || {
        (on_each(&lab) == [1, 1]).then_some(())
    });

    let refused = lab.manager_command(&["ca", "retire"]).expect(1);
    assert!(refused.err().contains(&lost.id) && !refused.err().contains(&sleeper.id), "{}", refused.both());
    let done = lab.manager_command(&["ca", "retire", "--force"]).expect(0);
    assert!(done.out().contains(&lost.id), "who has to be enrolled anew is named: {}", done.both());
    lost.run();
    wait_for("the other to say that it knows nobody here", PATIENCE, || {
        lost.command(&["status"]).both().contains("UnknownIssuer").then_some(())
    });
    assert!(!lab.is_connected(&lost));
    lab.wait_connected(&sleeper);
    assert_eq!(lab.endpoints().len(), 2, "and it does not enroll by itself");
}

#[test]
fn a_copied_identity_is_reported_and_the_first_agent_keeps_its_session() {
    let lab = Lab::start();
    let (agent, other) = (lab.agent(), lab.agent());
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    let conflicts = || {
        let events = lab.tmctl(["event", "list", "--kind", "agent", "-o", "json"]).expect(0).json();
        let events = events.as_array().into_iter().flatten().cloned();
        events.filter(|event| event["detail"] == "identity-conflict").collect::<Vec<_>>()
    };
    assert_eq!(conflicts().len(), 0);
    let copy = lab.clone_of(&agent);
    let reported = wait_for("the conflict to be reported", PATIENCE, || conflicts().pop());
    assert_eq!(reported["endpoint"], agent.id.as_str());
    assert!(
        reported["advice"].as_str().is_some_and(|advice| advice.contains("endpoint revoke")),
        "{reported}"
    );
    wait_for("the copy to say why it is held", PATIENCE, || {
        copy.command(&["status"]).both().contains("identity-held").then_some(())
    });
    assert!(lab.is_connected(&agent));
    lab.scan(&agent, &folder).expect(10);
    assert_eq!(lab.newest_task(&agent).expect("a scan was ordered")["state"], "done");
    assert_eq!(conflicts().len(), 1, "once");
    // Revoked, both are out, and nobody else is.
    lab.tmctl(["endpoint", "revoke", &agent.id]).expect(0);
    lab.wait_away(&agent);
    assert!(lab.is_connected(&other));
}
