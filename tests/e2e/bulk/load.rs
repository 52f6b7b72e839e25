//! Many at once: what they cost the manager, and what the others notice of it.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::ClientConfig;
use tm_protocol::ids::Sha256;
use tm_tests::{
    Lab, PATIENCE, bulk, bulk::BulkLink, samples, sim_agent, sim_agent::SimAgent, wait_for, wire::Persona,
};

use super::{enrolled, import, list, runtime};

/// A number of KiB in `/proc/PID/status`.
fn status_kib(lab: &Lab, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", lab.manager().pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|value| value.trim().strip_suffix(" kB")?.trim().parse().ok()).expect("it is there")
}

/// How often the manager has a pattern open.
fn open(lab: &Lab, digest: Sha256) -> usize {
    let path: PathBuf = lab.manager_data().join("patterns").join(digest.to_string());
    let links = fs::read_dir(format!("/proc/{}/fd", lab.manager().pid())).expect("it runs");
    links
        .filter(|link| link.as_ref().is_ok_and(|l| fs::read_link(l.path()).is_ok_and(|to| to == path)))
        .count()
}

/// Takes both places that an endpoint has, with transfers that nobody reads; they are free again when the links are
/// dropped. The pattern has to be larger than what the sockets on the way hold.
async fn take_both(lab: &Lab, config: &Arc<ClientConfig>, get: &str) -> Vec<BulkLink> {
    let connect = || BulkLink::connect(lab.agent_port, Arc::clone(config));
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut link = connect().await.expect("the port answers");
        link.send(format!("{get} HTTP/1.1\r\nHost: m\r\n\r\n").as_bytes()).await.expect("it listens");
        held.push(link);
    }
    let mut third = connect().await.expect("the port answers");
    let end = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < end, "a third transfer is never too much");
        let answer = third.ask(get, "Range: bytes=0-0\r\n", &[]).await.expect("it answers");
        if answer.status == 503 {
            assert_eq!(answer.number("retry-after"), Some(5));
            return held;
        }
    }
}

#[test]
fn whoever_takes_too_much_at_once_is_told_to_come_again() {
    let (lab, runtime) = (Lab::start(), runtime());
    let (digest, bytes) = import(&lab, &list(0..620_000));
    let other = enrolled(&lab, &runtime, 1).remove(0);
    let agent = lab.agent();
    let own = bulk::config(&agent.identity()).unwrap();
    let get = format!("GET /v1/patterns/{digest}");
    let dirty = lab.folder("dirty");
    fs::write(dirty.join("sample"), samples::eicar()).unwrap();
    let held = runtime.block_on(take_both(&lab, &own, &get));
    let served = runtime.block_on(async {
        let mut link = BulkLink::connect(lab.agent_port, other).await.unwrap();
        link.ask(&get, "Range: bytes=0-0\r\n", &[]).await.unwrap().status
    });
    assert_eq!(served, 206, "others are served");
    // The agent itself waits as it is told, and then goes on.
    let scan = lab.scan_in_background(&agent, &dirty);
    wait_for("the agent to be told", PATIENCE, || {
        agent.process().log().contains("the transfer waits").then_some(())
    });
    drop(held);
    scan.join().unwrap().expect(10);
    let kept = agent.data.join("patterns").join(digest.to_string());
    assert!(fs::read(kept).unwrap() == bytes);
}

#[test]
fn a_transfer_ends_when_its_certificate_is_revoked() {
    let (lab, runtime) = (Lab::start(), runtime());
    let (digest, bytes) = import(&lab, &list(0..620_000));
    let mut configs = enrolled(&lab, &runtime, 2);
    let (other, own) = (configs.remove(1), configs.remove(0));
    let get = format!("GET /v1/patterns/{digest}");
    let sql = |query: &str| {
        let database = lab.manager_data().join("manager.db");
        let ran = Command::new("sqlite3")
            .args(["-cmd", ".timeout 10000"])
            .arg(database)
            .arg(query)
            .output()
            .unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    };
    runtime.block_on(async {
        let connect = |config: &Arc<ClientConfig>| BulkLink::connect(lab.agent_port, Arc::clone(config));
        let mut link = connect(&own).await.unwrap();
        let mut idle = connect(&own).await.unwrap();
        assert_eq!(idle.ask(&get, "Range: bytes=0-0\r\n", &[]).await.unwrap().status, 206, "the control");
        while open(&lab, digest) > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        link.send(format!("{get} HTTP/1.1\r\nHost: m\r\n\r\n").as_bytes()).await.unwrap();
        while open(&lab, digest) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sql("UPDATE certificate SET revoked_ms = 1 WHERE endpoint_id IN (SELECT id FROM endpoint WHERE host = 'bulk-0')");
        assert_eq!(idle.ask(&get, "Range: bytes=0-0\r\n", &[]).await.map_or(403, |a| a.status), 403);
        // It takes what still comes once the manager has let go: less than the whole.
        let end = Instant::now() + PATIENCE;
        while open(&lab, digest) > 0 {
            assert!(Instant::now() < end, "the transfer does not end");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let answer = link.answer(true, false).await;
        assert!(answer.is_err() && link.received < bytes.len() as u64, "{} bytes came", link.received);
        let mut link = connect(&other).await.unwrap();
        assert_eq!(link.count(&get, "").await.unwrap().status, 200, "another is served");
    });
}

#[test]
fn while_50_agents_fetch_20_mb_heartbeats_come_in_time_and_memory_stays_small() {
    let (lab, runtime) = (Lab::start(), runtime());
    let (digest, bytes) = import(&lab, &list(0..620_000));
    assert!(bytes.len() > 20_000_000);
    let configs = enrolled(&lab, &runtime, 50);
    let token = lab.token(1);
    let persona = runtime.block_on(Persona::enroll(lab.agent_port, &token, "beating")).unwrap();
    let beating = {
        let _entered = runtime.enter();
        SimAgent::start(persona, lab.agent_port, sim_agent::done_at_once())
    };
    let before = status_kib(&lab, "VmRSS");
    let (mut waits, mut descriptors) = (Vec::new(), 0);
    let size = bytes.len() as u64;
    let most = runtime.block_on(async {
        let mut fetches = tokio::task::JoinSet::new();
        for (number, config) in (0..).zip(configs) {
            let at = lab.agent_port;
            let path = format!("/v1/patterns/{digest}");
            fetches.spawn(async move { bulk::fetch(at, config, &path, size, number).await });
        }
        let mut most = 0;
        while !fetches.is_empty() {
            waits.extend(beating.ping_timed().await);
            most = most.max(status_kib(&lab, "VmRSS"));
            descriptors = descriptors.max(open(&lab, digest));
            while let Some(fetched) = fetches.try_join_next() {
                fetched.unwrap().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        most
    });
    waits.sort_unstable();
    let p99 = waits[waits.len() * 99 / 100];
    println!(
        "{} heartbeats, p99 {p99:?}; memory {before} KiB, at most {most} KiB; opened {descriptors} times",
        waits.len()
    );
    assert!(waits.len() > 20 && p99 < Duration::from_secs(5), "{p99:?} of {}", waits.len());
    // Fifty copies would be a gigabyte.
    assert!(most < before + (96 << 10), "{before} KiB before, {most} KiB");
    assert!(
        (1..=4).contains(&descriptors),
        "it is opened once for all, or a few times by those who come first: {descriptors}"
    );
}
