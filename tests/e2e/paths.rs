//! The ways between agents and managers: through an HTTP proxy, over IPv6 alone, to the next manager.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;
use tm_protocol::ALPN_BULK;
use tm_tests::{
    Agent, ConnectProxy, Lab, Namespace, Output, PATIENCE, connect_proxy::Manner, postgres::Postgres,
    samples, wait_for,
};

/// The user and password of the proxy as they stand in its address, and as they are sent.
const USER: &str = "scan%20ner:ge%3Aheim%40";
const SECRETS: [&str; 3] = ["ge%3Aheim", "ge:heim", "c2NhbiBuZXI6Z2U6aGVpbUA="];

fn listen(ip: &str) -> TcpListener {
    TcpListener::bind((ip, 0)).expect("loopback can be listened on")
}

fn contains(whole: &[u8], part: &[u8]) -> bool {
    whole.windows(part.len()).any(|window| window == part)
}

/// What `tm-agent status -o json` says, once the agent runs.
fn status(agent: &Agent) -> Value {
    wait_for("the agent to say how it is", PATIENCE, || {
        let status = agent.command(&["status", "-o", "json"]);
        (status.code() == 0).then(|| status.json())
    })
}

/// Waits until the last failure that the agent knows of has this code; its message.
fn failure(agent: &Agent, code: &str) -> String {
    wait_for(code, PATIENCE, || {
        let status = status(agent);
        let failure = &status["last_failure"];
        (failure["code"] == code).then(|| failure["message"].as_str().unwrap_or_default().to_owned())
    })
}

fn doctor(agent: &Agent) -> (String, String) {
    let report = agent.command(&["doctor", "-o", "json"]).json();
    let parts = report["parts"].as_array().cloned().unwrap_or_default();
    let proxy = parts.iter().find(|part| part["part"] == "proxy").expect("the proxy is a part");
    let text = |key: &str| proxy[key].as_str().expect("every part has it").to_owned();
    (text("state"), text("detail"))
}

#[test]
fn an_agent_that_reaches_no_manager_does_everything_through_a_proxy() {
    let mut lab = Lab::start();
    lab.set("certificate_life", "\"24s\"");
    lab.restart_manager();
    let island = Namespace::start("true");
    let proxy = ConnectProxy::start(island.inside(|| listen("127.0.0.1")));
    proxy.set(Manner::Demand(STANDARD.encode("scan ner:ge:heim@")));
    let url = format!("http://{USER}@{}", proxy.address());

    let token = lab.token(1);
    let (_, alone) = island.inside(|| lab.enroll(&token));
    let alone = alone.expect(1);
    assert!(alone.err().contains("no manager could be reached"), "the control: {}", alone.both());
    let enrolled = island.inside(|| {
        lab.enroll_with(&token, |command| {
            command.args(["--proxy", &url]);
        })
    });
    let mut agent = lab.enrolled(enrolled);
    let settings = agent.data.join("agent.toml");
    assert_eq!(fs::metadata(&settings).unwrap().permissions().mode() & 0o777, 0o600);
    island.inside(|| agent.run());
    lab.wait_connected(&agent);

    // Bulk and session.
    let rule = "rule secret_name { strings: $a = \"EICAR-STANDARD\" condition: $a }";
    lab.import("secret_name.yar", rule).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    let before = proxy.tunnels();
    lab.scan(&agent, &folder).expect(10);
    assert!(proxy.tunnels() > before, "patterns come through the proxy, too");
    // Renewal in a session, and after the end of a certificate.
    let renewals = || {
        let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json().to_string();
        audit.matches("endpoint.renew").count()
    };
    wait_for("a renewal", PATIENCE, || (renewals() >= 1).then_some(()));
    lab.wait_connected(&agent);
    let shown = [agent.command(&["status"]).both(), status(&agent).to_string()];
    assert!(shown[0].contains(&format!("through the proxy {}", proxy.address())), "{}", shown[0]);
    let (state, detail) = island.inside(|| doctor(&agent));
    assert_eq!(state, "ok", "{detail}");
    assert!(detail.contains(&lab.agent_port.to_string()), "{detail}");
    agent.stop();
    lab.wait_away(&agent);
    let identity = agent.identity();
    wait_for("its certificate to end", PATIENCE, || {
        let why = lab.raw(ALPN_BULK, Some(&identity)).and_then(|mut link| link.ending());
        why.is_ok_and(|why| why.contains("CertificateExpired")).then_some(())
    });
    let renewed = renewals();
    island.inside(|| agent.run());
    lab.wait_connected(&agent);
    assert!(renewals() > renewed, "a late renewal is a way of its own");

    // What the proxy was asked, and what it saw.
    let line = format!("CONNECT {} HTTP/1.1", lab.agent_port);
    assert!(proxy.asked().iter().all(|asked| *asked == line), "{:?}", proxy.asked());
    assert!(proxy.credentials().iter().flatten().all(|sent| sent == SECRETS[2]));
    let carried = proxy.carried();
    assert!(carried.len() > 10_000 && carried.starts_with(b"\x16\x03"), "{} bytes", carried.len());
    for plain in ["secret_name", "EICAR", "dirty", token.as_str(), agent.id.as_str()] {
        assert!(!contains(&carried, plain.as_bytes()), "`{plain}` went in the open");
    }
    let log = fs::read_to_string(agent.data.with_extension("log")).unwrap();
    for text in shown.into_iter().chain([log, detail, status(&agent).to_string()]) {
        assert!(SECRETS.iter().all(|secret| !text.contains(secret)), "{text}");
    }
}

#[test]
fn every_bad_answer_of_a_proxy_is_named_and_no_proxy_becomes_a_manager() {
    let (lab, stranger) = (Lab::start(), Lab::start());
    let proxy = ConnectProxy::start(listen("127.0.0.1"));
    let url = format!("http://{USER}@{}", proxy.address());
    let bare = format!("http://{}", proxy.address());
    let closed = listen("127.0.0.1").local_addr().unwrap();
    let token = lab.token(1);
    let refused = |url: &str, says: &str| {
        let (data, output) = lab.enroll_with(&token, |command| {
            command.args(["--proxy", url]);
        });
        let output = output.expect(1);
        let text = output.both();
        assert!(text.contains(says), "{says}: {text}");
        assert!(SECRETS.iter().all(|secret| !text.contains(secret)), "{text}");
        assert!(!data.join("agent.toml").exists() && !data.join("identity").exists(), "nothing is kept");
    };
    let answer = |text: &str| Manner::Answer(text.as_bytes().to_vec());
    for (manner, url, says) in [
        (Manner::Demand("x".into()), &bare, "demands a user and a password (407), and none are set"),
        (Manner::Demand("x".into()), &url, "does not accept the user and password that are set (407)"),
        (answer("HTTP/1.1 403 Forbidden\x1b[1m\r\n\r\n"), &url, "it answers 403 Forbidden"),
        (answer("HTTP/1.0 502 Bad Gateway\r\nX: y\r\n\r\n<html>"), &url, "it answers 502 Bad Gateway"),
        (answer("SSH-2.0-OpenSSH_9.2p1\r\n"), &url, "is no HTTP"),
        (answer("HTTP/1.1 2"), &url, "broke before it answered"),
        (answer(""), &url, "broke before it answered"),
        (answer(&format!("HTTP/1.1 200 OK\r\nA: {}\r\n\r\n", "b".repeat(99_999))), &url, "8 KiB"),
        (answer("HTTP/1.1 200 OK\r\n\r\n"), &url, "did not prove who it is"),
        (Manner::Mislead(stranger.agent_port), &url, "did not prove who it is"),
        (Manner::Silence, &url, "gives no answer in 15 s"),
    ] {
        proxy.set(manner);
        refused(url, says);
    }
    refused(&format!("http://{USER}@{closed}"), "cannot be reached");
    for bad in ["https://p:1", "p:1", "http://p", "http://ge%3Aheim%zz@p:1", "http://u:ge:heim@p:0"] {
        refused(bad, "--proxy");
    }

    // A running agent says what is wrong, and goes on when it is put right.
    proxy.set(Manner::Serve);
    let enrolled = lab.enroll_with(&token, |command| {
        command.args(["--proxy", &url]);
    });
    let mut agent = lab.enrolled(enrolled);
    agent.run();
    lab.wait_connected(&agent);
    for (manner, code) in [
        (Manner::Demand("x".into()), "proxy-authentication"),
        (answer("HTTP/1.1 403 Forbidden\r\n\r\n"), "proxy-refused"),
        (Manner::Mislead(stranger.agent_port), "handshake-failed"),
    ] {
        let is_tls = code == "handshake-failed";
        proxy.set(manner);
        let message = failure(&agent, code);
        assert!(is_tls || message.contains(&proxy.address().to_string()), "{message}");
        // The doctor asks for the way; who is at its end shows only in the handshake.
        assert_eq!(doctor(&agent).0, if is_tls { "ok" } else { "missing" });
        proxy.set(Manner::Serve);
        lab.wait_connected(&agent);
    }
    assert_eq!(stranger.endpoints().len(), 0);

    // Where the proxy is gone, nothing goes around it.
    agent.stop();
    let settings = agent.data.join("agent.toml");
    fs::write(&settings, format!("proxy = \"http://{USER}@{closed}\"\n")).unwrap();
    agent.run();
    assert!(failure(&agent, "proxy-unreachable").contains(&closed.to_string()));
    let (state, detail) = doctor(&agent);
    assert!(state == "missing" && detail.contains("cannot be reached"), "{detail}");
    assert!(!lab.is_connected(&agent));
    // A password that others may read is not used, which is said.
    agent.stop();
    fs::set_permissions(&settings, fs::Permissions::from_mode(0o644)).unwrap();
    agent.run();
    let told = wait_for("the agent to say that its settings are not used", PATIENCE, || {
        let told = agent.command(&["status"]).both();
        told.contains("settings:").then_some(told)
    });
    assert!(told.contains("chmod 600") && !told.contains("heim"), "{told}");
    assert_eq!(doctor(&agent).0, "missing");
}

#[test]
fn no_variable_of_the_environment_leads_an_agent_anywhere() {
    let lab = Lab::start();
    let proxy = ConnectProxy::start(listen("127.0.0.1"));
    let url = format!("http://{}", proxy.address());
    let enrolled = lab.enroll_with(&lab.token(1), |command| {
        for name in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            command.env(name, &url);
        }
    });
    let agent = lab.enrolled(enrolled);
    assert!(!agent.data.join("agent.toml").exists());
    assert_eq!(proxy.asked(), [""; 0]);
    // The control: it is there.
    let other = lab.enroll_with(&lab.token(1), |command| {
        command.args(["--proxy", &url]);
    });
    lab.enrolled(other);
    assert_eq!(proxy.tunnels(), 1);
}

#[test]
fn a_fleet_lives_where_there_is_no_ipv4() {
    let island = Namespace::start("ip -4 addr flush dev lo; ip -6 addr add 2001:db8::1/128 dev lo nodad");
    island.inside(|| {
        assert!(TcpListener::bind("127.0.0.1:0").is_err() || ipv4_is_dead(), "the control: no IPv4");
        for ip in [Ipv6Addr::LOCALHOST, "2001:db8::1".parse().unwrap()] {
            one_fleet(ip);
        }
        addresses_of_one_link();
    });
}

/// Whether nothing is reached by IPv4 although it can be bound.
fn ipv4_is_dead() -> bool {
    let Ok(listener) = TcpListener::bind("127.0.0.1:0") else { return true };
    let at = listener.local_addr().expect("a listener has an address");
    std::net::TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_err()
}

fn one_fleet(ip: Ipv6Addr) {
    let lab = Lab::start_at(ip.into());
    assert_eq!(lab.agent_port.ip(), IpAddr::V6(ip));
    let token = lab.token(2);
    let named: tm_protocol::token::EnrollmentToken = token.parse().expect("it is a token");
    assert_eq!(named.addresses[0].to_string(), format!("[{ip}]:{}", lab.agent_port.port()));
    let agent = lab.agent_with(&token);
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).expect("the lab is writable");
    lab.scan(&agent, &folder).expect(10);
    // The proxy, too, may be an address in brackets.
    let proxy = ConnectProxy::start(listen(&ip.to_string()));
    let enrolled = lab.enroll_with(&token, |command| {
        command.args(["--proxy", &format!("http://{}", proxy.address())]);
    });
    let mut second = lab.enrolled(enrolled);
    second.run();
    lab.wait_connected(&second);
    assert_eq!(proxy.asked()[0], format!("CONNECT [{ip}]:{} HTTP/1.1", lab.agent_port.port()));
    // The certificate names the address.
    let shown = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!(
            "openssl s_client -connect '[{ip}]:{}' -showcerts </dev/null 2>/dev/null | openssl x509 -noout \
             -ext subjectAltName",
            lab.admin_port.port()
        ))
        .output()
        .expect("there is openssl");
    let shown = Output::from(shown).expect(0).out();
    let full = if ip == Ipv6Addr::LOCALHOST { "0:0:0:0:0:0:0:1" } else { "2001:DB8:0:0:0:0:0:1" };
    assert!(shown.contains(&format!("IP Address:{full}")), "{shown}");
}

/// An address that means another machine wherever it is heard is refused before anybody is told it.
fn addresses_of_one_link() {
    let folder = tempfile::tempdir().expect("temporary folders work");
    for name in ["fe80::1", "fe80::1%lo", "[fe80::1%lo]:4433"] {
        let output = std::process::Command::new(tm_tests::bin("tm-manager"))
            .args([
                "init",
                "--public-name",
                name,
                "--agent-listen",
                "[::1]:4433",
                "--admin-listen",
                "[::1]:4434",
            ])
            .arg("--data")
            .arg(folder.path().join("manager"))
            .output()
            .expect("programs can be run");
        let output = Output::from(output).expect(1);
        assert!(output.err().contains("fe80::/10"), "{}", output.both());
        assert!(!folder.path().join("manager/manager.toml").exists());
    }
}

/// The managers' addresses as an agent keeps them, in its order.
fn kept(agent: &Agent) -> Vec<String> {
    let text = fs::read(agent.data.join("identity/managers.json")).expect("an agent knows managers");
    let kept: Value = serde_json::from_slice(&text).expect("it is JSON");
    let addresses = kept["addresses"].as_array().into_iter().flatten();
    addresses.filter_map(|address| Some(address.as_str()?.to_owned())).collect()
}

/// Puts other addresses into an agent's folder.
fn keep(agent: &Agent, addresses: &[SocketAddr]) {
    let path = agent.data.join("identity/managers.json");
    let mut kept: Value =
        serde_json::from_slice(&fs::read(&path).expect("an agent knows managers")).expect("it is JSON");
    kept["addresses"] = addresses.iter().map(ToString::to_string).collect();
    fs::write(&path, kept.to_string()).expect("the lab is writable");
}

#[test]
fn an_address_where_nobody_answers_costs_ten_seconds_and_not_the_session() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    agent.stop();
    lab.wait_away(&agent);
    // Takes connections, and never says a word.
    let silent = listen("127.0.0.1");
    let gone = listen("127.0.0.1").local_addr().unwrap();
    keep(&agent, &[silent.local_addr().unwrap(), gone, lab.agent_port]);
    let begin = Instant::now();
    agent.run();
    lab.wait_connected(&agent);
    assert!(begin.elapsed() >= Duration::from_secs(9), "it was tried: {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
    assert_eq!(kept(&agent), [lab.agent_port.to_string()], "what the manager says counts from now on");
}

fn order(lab: &Lab, agent: &Agent, folder: &Path) {
    let path = folder.to_str().expect("our paths are texts");
    lab.tmctl(["scan", "start", agent.id.as_str(), "--when-connected", "--path", path]).expect(0);
}

#[test]
fn when_a_manager_is_killed_its_agent_goes_on_at_the_other_and_nothing_is_done_twice_or_lost() {
    let postgres = Postgres::start();
    let shared = tempfile::tempdir().unwrap();
    let (url, patterns) = (postgres.database("fleet"), shared.path().join("patterns"));
    let mut one = Lab::start_shared(&url, &patterns);
    let mut two = one.join(&url, &patterns);
    let (first, second) = (one.agent_port.to_string(), two.agent_port.to_string());
    one.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = one.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).unwrap();
    wait_for("the first manager to know of the second", PATIENCE, || {
        let token: tm_protocol::token::EnrollmentToken = one.token(1).parse().unwrap();
        (token.addresses.len() == 2).then_some(())
    });
    let agent = one.agent();
    wait_for("the agent to know both", PATIENCE, || {
        (kept(&agent) == [first.as_str(), second.as_str()]).then_some(())
    });
    let count = |query: &str| -> u64 { postgres.sql("fleet", query).parse().expect("a count") };
    let at = |port: &str| {
        count(&format!(
            "SELECT count(*) FROM endpoint JOIN manager ON manager.id = endpoint.manager_id
             WHERE manager.addresses LIKE '%{port}%'"
        )) == 1
    };
    let all_done = |orders: u64| {
        let done = "SELECT count(*) FROM task WHERE state = 'done'";
        wait_for("every task to be done", PATIENCE, || (count(done) == orders).then_some(()));
        assert_eq!(count("SELECT count(*) FROM task"), orders);
        let ends = "SELECT count(*), count(DISTINCT task_id) FROM event WHERE kind = 'scan-administrator'";
        assert_eq!(postgres.sql("fleet", ends), format!("{orders}|{orders}"), "each end is told once");
        assert_eq!(count("SELECT count(*) FROM detection"), orders, "each find is kept once");
    };
    assert!(at(&first));

    // Each manager is given orders, and the one with the session is killed in the middle of them.
    for _ in 0..3 {
        order(&two, &agent, &folder);
        order(&one, &agent, &folder);
    }
    one.kill9_manager_for_good();
    let killed = Instant::now();
    order(&two, &agent, &folder);
    wait_for("the agent to be connected to the other", PATIENCE, || at(&second).then_some(()));
    // A manager that dies with its machine up is missed at once; there is no wait before the next address.
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
    all_done(7);
    assert_eq!(kept(&agent)[0], second, "where it is comes first from now on");

    // The first comes back: the agent stays, and what the first is ordered is done.
    one.start_manager();
    order(&one, &agent, &folder);
    all_done(8);
    assert!(at(&second));
    wait_for("the agent to know both again", PATIENCE, || (kept(&agent).len() == 2).then_some(()));
    // And the other way round.
    for _ in 0..3 {
        order(&one, &agent, &folder);
        order(&two, &agent, &folder);
    }
    two.kill9_manager_for_good();
    let killed = Instant::now();
    wait_for("the agent to be back at the first", PATIENCE, || at(&first).then_some(()));
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
    all_done(14);
    one.tmctl(["audit", "verify"]).expect(0);
}
