//! Threat events to syslog and webhooks: every one at least once, in order, whoever dies meanwhile.

mod receiver;

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use serde_json::Value;
use tm_tests::{
    Lab, PATIENCE,
    output::rows,
    postgres::Postgres,
    sim_agent::{SimAgent, done_at_once},
    wait_for,
    wire::Persona,
};
use tokio::runtime::Runtime;

use self::receiver::{Authority, Heard, Receiver};

/// Ends a value, a line and a message, where it is believed.
const HOSTILE: &str = "a\"]\\\n<0>1 - x\r\u{1b}[2J\u{202e}é";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads can be made")
}

fn free_port() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback can be listened on");
    listener.local_addr().expect("a listener has an address")
}

/// Adds tables to `manager.toml`.
fn configure(lab: &Lab, tables: &str) {
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(lab.manager_data().join("manager.toml"))
        .expect("init writes it");
    file.write_all(tables.as_bytes()).expect("the folder is writable");
}

fn syslog(name: &str, at: SocketAddr, ca: &std::path::Path, more: &str) -> String {
    format!(
        "\n[[export]]\nname = \"{name}\"\nkind = \"syslog\"\naddress = \"{at}\"\nca_file = \"{}\"\n{more}\n",
        ca.display()
    )
}

fn agent(runtime: &Runtime, lab: &Lab, at: Vec<SocketAddr>) -> SimAgent {
    let token = lab.token(1);
    let persona = runtime.block_on(Persona::enroll(lab.agent_port, &token, HOSTILE)).expect("it is let in");
    let _entered = runtime.enter();
    SimAgent::start_at(persona, at, done_at_once())
}

/// Lets so many events happen and waits until they are stored.
fn happen(agent: &SimAgent, count: u64) {
    let before = agent.snapshot().notices;
    for number in before + 1..=before + count {
        agent.notice("journal-lost", &format!("number {number}\n{HOSTILE}"));
    }
    wait_for("the events to be stored", PATIENCE, || {
        (agent.snapshot().notices_stored >= before + count).then_some(())
    });
}

/// The numbers of all events after `after`, by the REST interface.
fn events(lab: &Lab, after: u64) -> Vec<u64> {
    let mut found = Vec::new();
    loop {
        let from = found.last().copied().unwrap_or(after);
        let page = lab.rest(&format!("/v1/events?after={from}&limit=1000"));
        let ids: Vec<u64> = rows(&page).iter().filter_map(|event| event["id"].as_u64()).collect();
        if ids.is_empty() {
            return found;
        }
        found.extend(ids);
    }
}

/// The row of `tmctl export list`.
fn export(lab: &Lab, name: &str) -> Value {
    let all = rows(&lab.tmctl(["export", "list", "-o", "json"]).expect(0).json());
    all.into_iter().find(|row| row["name"] == name).expect("the exporter is listed")
}

fn wait_for_all(lab: &Lab, heard: &Heard, after: u64) -> Vec<u64> {
    let wanted = events(lab, after);
    wait_for("every event to arrive", PATIENCE * 2, || {
        let got = heard.in_order();
        wanted.iter().all(|id| got.contains(id)).then_some(())
    });
    assert_eq!(heard.in_order(), wanted, "in order, and nothing else");
    wanted
}

#[test]
fn syslog_has_every_event_in_order_whoever_is_killed_in_the_middle() {
    let mut lab = Lab::start();
    let authority = Authority::new("one");
    let (ca, at) = (authority.write(&lab.path("ca.pem")), free_port());
    let tls = authority.server("127.0.0.1", false);
    let runtime = runtime();
    // What was there before the exporter is not sent.
    let agent = agent(&runtime, &lab, vec![lab.agent_port]);
    happen(&agent, 3);
    configure(&lab, &syslog("siem", at, &ca, ""));
    lab.restart_manager();
    let before = events(&lab, 0).last().copied().unwrap_or(0);
    assert!(before >= 3);

    // The receiver dies within a batch; then nobody listens.
    let heard = Heard::default();
    let receiver = Receiver::syslog(at, Arc::clone(&tls), heard.clone(), Some(20), true);
    happen(&agent, 60);
    wait_for("the receiver to be gone", PATIENCE, || receiver.is_gone().then_some(()));
    drop(receiver);
    let behind = wait_for("the exporter to say so", PATIENCE, || {
        let row = export(&lab, "siem");
        row["error"].is_string().then_some(row)
    });
    assert!(behind["lag_events"].as_u64() > Some(0) && behind["failing_since"].is_string(), "{behind}");
    assert_eq!(
        (behind["kind"].as_str(), behind["receiver"].as_str()),
        (Some("syslog"), Some(&*at.to_string()))
    );
    let (status, text) = tm_tests::raw::get(lab.admin_port, "/metrics", Some(&lab.admin_token()), None);
    let text = String::from_utf8(text).expect("metrics are text");
    assert_eq!(status, 200);
    for series in ["tm_export_failures_total", "tm_export_lag_events", "tm_export_lag_seconds"] {
        let line =
            text.lines().find_map(|line| line.strip_prefix(&format!("{series}{{exporter=\"siem\"}} ")));
        assert!(line.is_some_and(|value| value != "0"), "{series}:\n{text}");
    }

    // It comes back.
    let receiver = Receiver::syslog(at, Arc::clone(&tls), heard.clone(), None, true);
    wait_for_all(&lab, &heard, before);

    // The manager is killed while it exports.
    let so_far = heard.count();
    for number in 0..1500 {
        agent.notice("journal-lost", &format!("burst {number}"));
    }
    wait_for("the burst to be on its way", PATIENCE, || (heard.count() > so_far).then_some(()));
    lab.kill9_manager_for_good();
    assert!(heard.in_order().len() < 1560, "it had more to send");
    lab.start_manager();
    wait_for("the burst to be stored", PATIENCE, || {
        let snapshot = agent.snapshot();
        (snapshot.notices_stored == snapshot.notices).then_some(())
    });
    let all = wait_for_all(&lab, &heard, before);
    assert!(all.len() >= 1560, "{}", all.len());
    let row = wait_for("the mark to be at the end", PATIENCE, || {
        let row = export(&lab, "siem");
        (row["lag_events"] == 0).then_some(row)
    });
    assert_eq!((row["last_event"].as_u64(), &row["error"]), (all.last().copied(), &Value::Null));
    // Hostile text is a value among others.
    let told = heard.all().into_iter().flatten().find(|got| got.text.contains("number 4")).expect("it came");
    assert!(told.text.starts_with("<131>1 ") && told.text.contains(" tm-manager - agent [event@32473 id=\""));
    assert!(told.text.contains("host=\"a\\\"\\]\\\\\\\\\\\\n<0>1 - x"), "{}", told.text);
    drop(receiver);
}

#[test]
fn a_webhook_that_fails_and_hangs_has_every_event_it_wants_in_order() {
    let mut lab = Lab::start();
    let authority = Authority::new("one");
    let ca = authority.write(&lab.path("ca.pem"));
    let (heard, heads) = (Heard::default(), Arc::new(Mutex::new(Vec::new())));
    let tls = authority.server("127.0.0.1", false);
    let hook = Receiver::webhook(free_port(), tls, heard.clone(), Arc::clone(&heads), vec![500, 200, 0, 302]);
    configure(
        &lab,
        &format!(
            "\n[[export]]\nname = \"hook\"\nkind = \"webhook\"\nurl = \"https://{}/in?secret=path\"\nca_file = \"{}\"\n\
             hmac_secret = \"0123456789abcdef\"\nmin_severity = \"error\"\nkinds = [\"agent\"]\n",
            hook.at,
            ca.display()
        ),
    );
    lab.restart_manager();
    let before = events(&lab, 0).last().copied().unwrap_or(0);
    let runtime = runtime();
    let agent = agent(&runtime, &lab, vec![lab.agent_port]);
    happen(&agent, 5);
    agent.notice("hello", "only for the record: of too little weight");
    // 500, then 200.
    wait_for("the first events", PATIENCE, || (heard.count() >= 5).then_some(()));
    // It hangs, then sends elsewhere, then takes them.
    happen(&agent, 150);
    let wanted: Vec<u64> = events(&lab, before);
    wait_for("every event that is wanted", PATIENCE * 2, || (heard.in_order().len() >= 155).then_some(()));
    let got = heard.in_order();
    assert_eq!(got.len(), 155, "each once, and none that is not wanted");
    assert!(got.is_sorted() && wanted.len() > got.len() && got.iter().all(|id| wanted.contains(id)));
    let row = wait_for("the mark to be at the end", PATIENCE, || {
        let row = export(&lab, "hook");
        (row["lag_events"] == 0).then_some(row)
    });
    assert_eq!(row["receiver"], format!("https://{}", hook.at), "without what may be secret");
    assert!(!lab.manager().log().contains("secret=path"), "{}", lab.manager().log());
    assert_eq!(row["last_event"].as_u64(), got.last().copied());

    // Who shares the secret can check whose words they are.
    let (head, body) = heads.lock().unwrap().last().cloned().expect("there were requests");
    let signature = head.lines().find_map(|line| line.strip_prefix("tm-signature: ")).expect("it is signed");
    let (seconds, hex) = signature
        .strip_prefix("t=")
        .and_then(|rest| rest.split_once(",v1="))
        .expect("a time and a signature");
    let script = "import hmac,sys; b=sys.stdin.buffer.read(); print(hmac.new(b'0123456789abcdef',b,'sha256').hexdigest())";
    let mut python = Command::new("python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let signed = [seconds.as_bytes(), b".", &body].concat();
    python.stdin.take().expect("a pipe").write_all(&signed).expect("it reads");
    let told = String::from_utf8(python.wait_with_output().expect("it ends").stdout).expect("text");
    assert_eq!(told.trim(), hex);
    let event: Value = serde_json::from_str(&heard.all()[0][0].text).expect("JSON");
    assert_eq!((event["severity"].as_str(), event["host"].as_str()), (Some("error"), Some(HOSTILE)));
}

#[test]
fn nothing_goes_to_a_receiver_that_cannot_show_who_it_is() {
    let mut lab = Lab::start();
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let (ca, folder) = (authority.write(&lab.path("ca.pem")), lab.folder("client"));
    let (certificate, key) = authority.client(&folder);
    let client =
        format!("client_certificate = \"{}\"\nclient_key = \"{}\"", certificate.display(), key.display());
    let heard: [Heard; 6] = std::array::from_fn(|_| Heard::default());
    let start = |number: usize, tls, confirms| {
        Receiver::syslog(free_port(), tls, heard[number].clone(), None, confirms)
    };
    let receivers = [
        start(0, other.server("127.0.0.1", false), true),
        start(1, authority.server("elsewhere.example", false), true),
        start(2, authority.server("127.0.0.1", true), true),
        start(3, authority.server("127.0.0.1", true), true),
        start(4, authority.server("siem.example", false), false),
        start(5, authority.server("siem.example", false), false),
    ];
    let named = "server_name = \"siem.example\"";
    let tables = [
        syslog("other-authority", receivers[0].at, &ca, ""),
        syslog("other-name", receivers[1].at, &ca, ""),
        syslog("unknown-client", receivers[2].at, &ca, ""),
        syslog("known-client", receivers[3].at, &ca, &client),
        syslog("silent", receivers[4].at, &ca, named),
        syslog("lenient", receivers[5].at, &ca, &format!("{named}\nconfirm = false")),
    ];
    configure(&lab, &tables.concat());
    lab.restart_manager();
    let before = events(&lab, 0).last().copied().unwrap_or(0);
    let runtime = runtime();
    let agent = agent(&runtime, &lab, vec![lab.agent_port]);
    happen(&agent, 3);
    for good in [3, 5] {
        wait_for_all(&lab, &heard[good], before);
    }
    for (name, why) in [
        ("other-authority", "UnknownIssuer"),
        ("other-name", "not valid for name"),
        ("unknown-client", "the connection broke"),
        ("silent", "close_notify"),
    ] {
        let row = wait_for("the exporter to say why", PATIENCE, || {
            let row = export(&lab, name);
            row["error"].is_string().then_some(row)
        });
        assert!(row["error"].as_str().is_some_and(|error| error.contains(why)), "{name}: {row}");
        assert!(row["last_event"].is_null() && row["lag_events"].as_u64() > Some(0), "{row}");
    }
    for refused in [0, 1, 2] {
        assert_eq!(heard[refused].count(), 0, "receiver {refused}");
    }
    drop(receivers);

    // What cannot work is refused at the start, by its key.
    lab.stop_manager();
    configure(&lab, &syslog("typo", free_port(), &lab.path("nowhere.pem"), ""));
    let refused = lab.manager_command(&["check-config"]).expect(1);
    assert!(refused.err().contains("`typo`: `ca_file`"), "{}", refused.err());
    let refused = lab.manager_command(&["serve"]).expect(1);
    assert!(refused.err().contains("`typo`: `ca_file`"), "{}", refused.err());
}

#[test]
fn of_two_managers_one_exports_and_the_other_goes_on_when_it_is_killed() {
    let postgres = Postgres::start();
    let shared = tempfile::tempdir().expect("temporary folders work");
    let (url, patterns) = (postgres.database("fleet"), shared.path().join("patterns"));
    let mut one = Lab::start_shared(&url, &patterns);
    let mut two = one.join(&url, &patterns);
    let authority = Authority::new("one");
    let (ca, heard) = (authority.write(&shared.path().join("ca.pem")), Heard::default());
    let tls = authority.server("127.0.0.1", false);
    let receiver = Receiver::syslog(free_port(), tls, heard.clone(), None, true);
    for lab in [&mut one, &mut two] {
        configure(lab, &syslog("siem", receiver.at, &ca, ""));
        lab.restart_manager();
    }
    let before = events(&two, 0).last().copied().unwrap_or(0);
    let runtime = runtime();
    let agent = agent(&runtime, &one, vec![two.agent_port, one.agent_port]);
    happen(&agent, 40);
    wait_for_all(&two, &heard, before);
    assert_eq!(heard.count(), heard.in_order().len(), "one of them exports: each event came once");
    let holder = export(&two, "siem")["manager"].as_str().expect("one holds it").to_owned();
    let id_of = |lab: &Lab| lab.rest("/v1/version")["manager"].as_str().expect("it has an id").to_owned();
    let (first, second) = if id_of(&one) == holder { (&mut one, &mut two) } else { (&mut two, &mut one) };
    first.kill9_manager_for_good();
    happen(&agent, 40);
    wait_for_all(second, &heard, before);
    assert_eq!(export(second, "siem")["manager"].as_str(), Some(&*id_of(second)));
}
