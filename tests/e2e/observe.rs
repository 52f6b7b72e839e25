//! How a manager is watched: metrics, health, readiness, logs.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tm_tests::{Lab, PATIENCE, bin, raw, tmpfs::Tmpfs, wait_for, wire::Persona};

/// A `GET` without TLS: status and body.
fn plain(at: SocketAddr, path: &str) -> (u16, String) {
    let mut link = TcpStream::connect(at).expect("somebody listens");
    link.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket has a time-out");
    write!(link, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")
        .expect("a request can be sent");
    let mut answer = String::new();
    link.read_to_string(&mut answer).expect("an answer is text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("an answer has a status");
    (status, body.to_owned())
}

/// The value of a series in an exposition.
fn value(text: &str, series: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
}

/// A loopback port that was free a moment ago.
fn free_port() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback can be listened on");
    listener.local_addr().expect("a listener has an address")
}

fn promtool(text: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (`cargo xtask test` installs it)");
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("promtool ends");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn metrics_pass_promtool_and_follow_what_happens() {
    let mut lab = Lab::start();
    let port = free_port();
    assert!(TcpStream::connect(port).is_err(), "off by default");
    lab.set("metrics_listen", &format!("\"{port}\""));
    lab.restart_manager();
    let metrics = || {
        let (status, text) = plain(port, "/metrics");
        assert_eq!(status, 200, "{text}");
        text
    };
    let before = metrics();
    assert_eq!(value(&before, "tm_agents_connected"), 0.0);
    assert_eq!(value(&before, "tm_database_up"), 1.0);
    let mut agent = lab.agent();
    let folder = lab.folder("clean");
    lab.import("none.yar", "rule none { condition: false }").expect(0);
    lab.scan(&agent, &folder).expect(0);
    let text = wait_for("a heartbeat to be counted", PATIENCE, || {
        let text = metrics();
        let is_new =
            value(&text, "tm_agent_heartbeats_total") > 0.0 && value(&text, "tm_tasks{state=\"done\"}") > 0.0;
        is_new.then_some(text)
    });
    assert_eq!(value(&text, "tm_agents_connected"), 1.0);
    assert_eq!(value(&text, "tm_endpoints"), 1.0);
    assert_eq!(value(&text, "tm_enrollments_total{outcome=\"enrolled\"}"), 1.0);
    assert!(value(&text, "tm_agent_handshakes_total{outcome=\"completed\"}") >= 2.0);
    assert!(value(&text, "tm_bulk_bytes_total{direction=\"down\"}") > 0.0);
    assert!(value(&text, "tm_database_transaction_seconds_count") > 1.0);
    assert!(value(&text, "tm_agent_messages_total{kind=\"report\"}") > 0.0);
    assert!(value(&text, "tm_events_total{kind=\"scan-administrator\"}") > 0.0);
    assert!(value(&text, "tm_certificate_expiry_timestamp_seconds{certificate=\"authority\"}") > 1.7e9);
    assert!(!text.contains(&agent.id), "no endpoint has series of its own");

    let (is_clean, said) = promtool(&text);
    assert!(is_clean && !said.contains("tm_"), "{said}");
    let (is_clean, said) = promtool(&text.replace("# HELP tm_endpoints ", "# HELP tm_other "));
    assert!(!is_clean && said.contains("tm_endpoints"), "the control: {said}");

    // A stranger's link fails before it has shown anything.
    let mut stranger = TcpStream::connect(lab.agent_port).expect("the port is open");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("a link takes bytes");
    wait_for("the failed handshake", PATIENCE, || {
        (value(&metrics(), "tm_agent_handshakes_total{outcome=\"failed\"}") > 0.0).then_some(())
    });
    agent.stop();
    wait_for("the agent to be gone", PATIENCE, || {
        (value(&metrics(), "tm_agents_connected") == 0.0).then_some(())
    });

    // On the administrators' port a token is asked for.
    assert_eq!(raw::get(lab.admin_port, "/metrics", None, None).0, 401);
    let (status, body) = raw::get(lab.admin_port, "/metrics", Some(&lab.admin_token()), None);
    assert_eq!(status, 200);
    assert!(value(&String::from_utf8_lossy(&body), "tm_api_requests_total{status=\"4xx\"}") >= 1.0);
    for (path, wanted) in [("/healthz", 200), ("/readyz", 200), ("/v1/version", 404)] {
        assert_eq!(plain(port, path).0, wanted, "{path}");
    }

    lab.stop_manager();
    lab.set("metrics_listen", "\"0.0.0.0:9433\"");
    let refused = lab.manager_command(&["check-config"]).expect(1);
    assert!(refused.err().contains("metrics_listen"), "{}", refused.err());
}

#[test]
fn a_manager_with_a_full_disk_is_alive_and_not_ready() {
    let mut lab = Lab::start();
    lab.stop_manager();
    let disk = Tmpfs::over(&lab.manager_data(), 200 << 10, 20_000);
    lab.start_manager();
    let ready = || {
        let (status, body) = raw::get(lab.admin_port, "/readyz", None, None);
        (status, serde_json::from_slice::<Value>(&body).expect("JSON"))
    };
    let (status, said) = ready();
    assert_eq!((status, &said["ready"]), (200, &Value::Bool(true)), "{said}");
    let filler = disk.path().join("filler");
    fs::write(&filler, vec![1; 100 << 20]).expect("there is room");
    let said = wait_for("the manager not to be ready", PATIENCE, || {
        let (status, said) = ready();
        (status == 503).then_some(said)
    });
    assert_eq!(said["failing"][0]["check"], "disk", "{said}");
    assert_eq!(raw::get(lab.admin_port, "/healthz", None, None).0, 200);
    fs::remove_file(&filler).expect("it is there");
    wait_for("the manager to be ready", PATIENCE, || (ready().0 == 200).then_some(()));
    lab.stop_manager();
}

/// Would be a line of its own in a log that writes what it is told.
const HOSTILE: &str = "web\n{\"timestamp\":\"now\",\"level\":\"ERROR\"}\r\u{1b}[2J\u{2028}\u{202e}\"\\]é";

#[test]
fn a_hostile_host_name_breaks_no_line_of_the_log() {
    let mut lab = Lab::start();
    let token = lab.token(2);
    let enroll = |lab: &Lab| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(Persona::enroll(lab.agent_port, &token, HOSTILE)).expect("it is let in");
    };
    enroll(&lab);
    let text = wait_for("the log to tell of it", PATIENCE, || {
        let log = lab.manager().log();
        log.contains("is enrolled").then_some(log)
    });
    assert!(text.lines().all(|line| !line.starts_with(['{', '\u{1b}'])), "{text}");
    assert!(!text.contains(['\u{1b}', '\r', '\u{2028}', '\u{202e}']), "{text}");

    lab.stop_manager();
    let before = fs::read_to_string(lab.path("manager.log")).expect("the log is UTF-8").len();
    lab.set("log_format", "\"json\"");
    lab.start_manager();
    enroll(&lab);
    let log = wait_for("the log to tell of it", PATIENCE, || {
        let log = lab.manager().log()[before..].to_owned();
        log.contains("is enrolled").then_some(log)
    });
    let mut hosts = Vec::new();
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
        for key in ["timestamp", "level", "target"] {
            assert!(event[key].is_string(), "{line}");
        }
        assert!(event["fields"]["message"].is_string(), "{line}");
        hosts.extend(event["fields"]["host"].as_str().map(str::to_owned));
    }
    assert_eq!(hosts, [HOSTILE]);
    assert!(log.lines().count() >= 2 && !log.contains(['\u{1b}', '\r', '\u{2028}', '\u{202e}']), "{log}");

    // It cannot listen: its last word is an object, too.
    let before = lab.manager().log().len();
    let second = Command::new(bin("tm-manager")).args(["serve", "--data"]).arg(lab.manager_data()).output();
    let second = second.expect("programs can be run");
    let said = String::from_utf8(second.stderr).expect("UTF-8");
    let last: Value = serde_json::from_str(said.lines().last().expect("it says why")).expect("JSON");
    assert!(!second.status.success() && last["level"] == "ERROR", "{said}");
    assert!(lab.manager().log().len() >= before);

    lab.stop_manager();
    lab.set("log_format", "\"xml\"");
    let refused = lab.manager_command(&["check-config"]).expect(1);
    assert!(refused.err().contains("log_format"), "{}", refused.err());
}

#[test]
fn an_agent_logs_objects_when_it_is_told_to() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    agent.stop();
    let log = agent.data.with_extension("log");
    let before = fs::read_to_string(&log).expect("there is a log").len();
    fs::write(agent.data.join("agent.toml"), "log_format = \"json\"\n").expect("the folder is writable");
    agent.run();
    lab.wait_connected(&agent);
    agent.stop();
    let text = fs::read_to_string(&log).expect("there is a log")[before..].to_owned();
    assert!(text.lines().count() > 0, "it says something");
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
        assert!(event["timestamp"].is_string() && event["fields"].is_object(), "{line}");
    }
}
