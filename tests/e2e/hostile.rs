//! Peers that are not who they say, or do not say what they should.
//!
//! The control of every test is a good agent beside: it stays connected and does its work.

use std::{fs, net::TcpStream, path::Path, process::Command, time::Duration};

use bytes::BytesMut;
use tm_protocol::{
    ALPN_CONTROL, ALPN_ENROLL, frame,
    message::{EnrollRequest, ToAgent, ToManager},
};
use tm_tests::{
    Agent, Lab,
    raw::{self, Identity},
    samples, wait_for,
};

/// How long a manager may put up with a peer that says nothing sensible.
const PATIENCE: Duration = Duration::from_secs(90);

/// Whether somebody with this certificate (or none) is given a session.
fn is_welcome(lab: &Lab, identity: Option<&Identity>) -> bool {
    let Ok(mut raw) = lab.raw(ALPN_CONTROL, identity) else { return false };
    raw.say(&raw::hello()).is_ok() && matches!(raw.hear(), Ok(Some(ToAgent::Welcome(_))))
}

/// A good agent is there and can still be made to find something.
#[track_caller]
fn still_works(lab: &Lab, good: &Agent, folder: &Path) {
    lab.wait_connected(good);
    lab.scan(good, folder).expect(10);
}

fn with_good_agent() -> (Lab, Agent, std::path::PathBuf) {
    let lab = Lab::start();
    let good = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("dirty");
    fs::write(folder.join("a.com"), samples::eicar()).expect("the folder is writable");
    (lab, good, folder)
}

/// A second agent's identity, its agent no longer running.
fn stolen(lab: &Lab) -> Identity {
    let mut victim = lab.agent();
    let identity = victim.identity();
    victim.stop();
    lab.wait_away(&victim);
    identity
}

#[test]
fn without_a_certificate_of_this_fleet_there_is_no_session() {
    let (lab, good, folder) = with_good_agent();
    let own = stolen(&lab);
    assert!(is_welcome(&lab, Some(&own)), "the control: a certificate of this fleet opens a session");

    assert!(!is_welcome(&lab, None), "none at all");
    let id = "01890000-0000-7000-8000-000000000002";
    for uri in [
        format!("tm://{id}/endpoint/{id}"),
        format!("tm://{id}/manager/{id}"),
        format!("tm://{id}/endpoint/{}", good.id),
    ] {
        assert!(!is_welcome(&lab, Some(&Identity::foreign(&uri))), "{uri} of a foreign CA");
    }
    still_works(&lab, &good, &folder);
}

#[test]
fn the_fleets_own_signature_does_not_excuse_an_expired_or_misused_certificate() {
    let (lab, good, folder) = with_good_agent();
    let mut victim = lab.agent();
    victim.stop();
    lab.wait_away(&victim);
    let ca = lab.manager_data().join("ca");
    let ids = fs::read_to_string(ca.join("ids.json")).expect("the authority has a name");
    let ids: serde_json::Value = serde_json::from_str(&ids).expect("names are JSON");
    let fleet = ids["fleet"].as_str().expect("a fleet has an id").to_owned();
    let manager = ids["manager"].as_str().expect("a manager has an id").to_owned();
    // The manager knows these serials as enrolled, so that only what the certificate says can be at fault.
    let store = lab.manager_data().join("manager.db");
    for serial in 0x41..0x46u8 {
        let sql = format!(
            "INSERT INTO certificate (serial, endpoint_id, issued_ms, not_after_ms, used_ms)
             VALUES ('{serial:02x}', '{}', 0, 0, 1)",
            victim.id
        );
        let done = Command::new("sqlite3").args(["-cmd", ".timeout 5000"]).arg(&store).arg(sql).status();
        assert!(done.expect("sqlite3 is installed").success());
    }
    let endpoint = format!("tm://{fleet}/endpoint/{}", victim.id);
    let sign = |uri: &str, client, serial, expired| Identity::signed(&ca, uri, client, &[serial], expired);
    for (what, identity, welcome) in [
        ("the control: good in every way", sign(&endpoint, true, 0x41, false), true),
        ("expired", sign(&endpoint, true, 0x42, true), false),
        ("for servers only", sign(&endpoint, false, 0x43, false), false),
        ("a manager's", sign(&format!("tm://{fleet}/manager/{manager}"), false, 0x44, false), false),
        (
            "a manager's, for clients",
            sign(&format!("tm://{fleet}/manager/{manager}"), true, 0x45, false),
            false,
        ),
        ("never enrolled", sign(&endpoint, true, 0x46, false), false),
        (
            "another endpoint's serial",
            sign(&format!("tm://{fleet}/endpoint/{}", good.id), true, 0x41, false),
            false,
        ),
    ] {
        assert_eq!(is_welcome(&lab, Some(&identity)), welcome, "{what}");
    }
    still_works(&lab, &good, &folder);
}

#[test]
fn an_agents_certificate_is_no_administrators_token() {
    let (lab, good, _folder) = with_good_agent();
    let path = "/v1/endpoints";
    let token = lab.admin_token();
    assert_eq!(raw::get(lab.admin_port, path, Some(&token), None).0, 200, "the control");
    let identity = good.identity();
    for (token, identity) in [(None, None), (None, Some(&identity)), (Some("guess"), Some(&identity))] {
        let (status, body) = raw::get(lab.admin_port, path, token, identity);
        assert_eq!(status, 401, "{}", String::from_utf8_lossy(&body));
        let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(error["code"], "not-authenticated");
    }
}

#[test]
fn an_enrollment_channel_is_good_for_nothing_else() {
    let (lab, good, folder) = with_good_agent();
    let mut raw = lab.raw(ALPN_ENROLL, None).expect("the enrollment channel needs no certificate");
    let _ = raw.say(&raw::hello());
    assert!(raw.is_closed_within(PATIENCE), "a session on the enrollment channel");

    let mut raw = lab.raw(ALPN_ENROLL, None).unwrap();
    let request = EnrollRequest {
        secret: [7; 32],
        csr: b"this is no request".to_vec(),
        host: "\u{1b}[31mevil\n".into(),
        agent_version: "0".into(),
    };
    raw.say(&ToManager::from(request)).unwrap();
    assert!(!matches!(
        raw.hear(),
        Ok(Some(ToAgent::EnrollReply(tm_protocol::message::EnrollReply::Enrolled { .. })))
    ));
    assert!(raw.is_closed_within(PATIENCE));
    assert!(!lab.manager().log().contains('\u{1b}'), "no stranger writes to the terminal through the log");
    still_works(&lab, &good, &folder);
}

#[test]
fn frames_that_are_none_end_the_connection_and_nothing_else() {
    let (lab, good, folder) = with_good_agent();
    let identity = stolen(&lab);
    let noise: Vec<u8> = (0..65_536_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let cases: [(&str, Vec<u8>); 6] = [
        ("another protocol", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("4 GiB", b"TM\x01\x00\x01\xff\xff\xff\xff".to_vec()),
        ("longer than its type", [b"TM\x01\x00\x03\x00\x00\x01\x00".as_slice(), &[0; 256]].concat()),
        ("another version", b"TM\x09\x00\x01\x00\x00\x00\x00".to_vec()),
        ("a body that lies", b"TM\x01\x00\x01\x00\x00\x00\x05\xff\xff\xff\xff\xff".to_vec()),
        ("noise", noise),
    ];
    for (what, bytes) in cases {
        for (alpn, identity) in [(ALPN_CONTROL, Some(&identity)), (ALPN_ENROLL, None)] {
            let mut raw = lab.raw(alpn, identity).expect("a connection is possible");
            let _ = raw.send(&bytes);
            assert!(raw.is_closed_within(PATIENCE), "{what} was put up with");
            assert!(lab.is_connected(&good), "{what} cost a good agent its session");
        }
        // Also after a proper beginning.
        let mut raw = lab.raw(ALPN_CONTROL, Some(&identity)).unwrap();
        raw.say(&raw::hello()).unwrap();
        assert!(matches!(raw.hear(), Ok(Some(ToAgent::Welcome(_)))), "the control");
        let _ = raw.send(&bytes);
        assert!(raw.is_closed_within(PATIENCE), "{what} was put up with in a session");
    }
    still_works(&lab, &good, &folder);
}

#[test]
fn a_frame_that_breaks_off_is_nothing() {
    let (lab, good, folder) = with_good_agent();
    let identity = stolen(&lab);
    let mut whole = BytesMut::new();
    raw::hello().encode(&mut whole).unwrap();
    for length in [1, frame::HEADER_LENGTH - 1, frame::HEADER_LENGTH, whole.len() - 1] {
        let mut raw = lab.raw(ALPN_CONTROL, Some(&identity)).unwrap();
        raw.send(&whole[..length]).unwrap();
        drop(raw);
    }
    still_works(&lab, &good, &folder);
}

#[test]
fn a_message_of_the_future_is_skipped() {
    let lab = Lab::start();
    let identity = stolen(&lab);
    let mut raw = lab.raw(ALPN_CONTROL, Some(&identity)).unwrap();
    raw.say(&raw::hello()).unwrap();
    assert!(matches!(raw.hear(), Ok(Some(ToAgent::Welcome(_)))), "the control");
    let mut unknown = BytesMut::new();
    frame::put(9_999, 1_000, &"news".to_owned(), &mut unknown).unwrap();
    raw.send(&unknown).unwrap();
    raw.say(&ToManager::from(tm_protocol::message::Ping { nonce: 4711 })).unwrap();
    let pong = wait_for("an answer after the unknown message", PATIENCE, || match raw.hear() {
        Ok(Some(ToAgent::Pong(pong))) => Some(pong.nonce),
        Ok(Some(_)) => None,
        other => panic!("the connection ended: {other:?}"),
    });
    assert_eq!(pong, 4711);
}

#[test]
fn whoever_dawdles_is_shown_out() {
    let (lab, good, folder) = with_good_agent();
    let identity = stolen(&lab);
    // Nothing at all; TLS and then nothing; the beginning of a frame and then nothing; one byte now and then.
    let mut silent = TcpStream::connect(lab.agent_port).unwrap();
    let mut idle = lab.raw(ALPN_CONTROL, Some(&identity)).unwrap();
    let mut enrolling = lab.raw(ALPN_ENROLL, None).unwrap();
    enrolling.send(b"TM").unwrap();
    let mut whole = BytesMut::new();
    raw::hello().encode(&mut whole).unwrap();
    let mut drip = lab.raw(ALPN_ENROLL, None).unwrap();
    let dripping = std::thread::spawn(move || {
        // Far too slow to be a message before the patience is over: the peer must end it.
        whole.iter().cycle().take(120).any(|byte| {
            std::thread::sleep(Duration::from_secs(1));
            drip.send(&[*byte]).is_err()
        })
    });
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    let end = std::io::Read::read(&mut silent, &mut [0; 64]);
    assert!(
        matches!(&end, Ok(0)) || end.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset),
        "a silent connection is kept for ever: {end:?}"
    );
    assert!(idle.is_closed_within(PATIENCE), "a session without a first message is kept for ever");
    assert!(enrolling.is_closed_within(PATIENCE), "half a frame is waited for for ever");
    assert!(dripping.join().unwrap(), "a byte a second is put up with for two minutes");
    still_works(&lab, &good, &folder);
}

#[test]
fn two_thousand_idle_strangers_do_not_keep_an_agent_from_its_work() {
    let (lab, good, folder) = with_good_agent();
    // Two thousand sockets are more than the usual soft limit of a shell.
    let maximum = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let raised = rustix::process::Rlimit { current: maximum, maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)
        .expect("the soft limit may be raised");
    let strangers: Vec<TcpStream> = (0..2_000)
        .map(|_| {
            TcpStream::connect_timeout(&lab.agent_port, Duration::from_secs(2))
                .expect("a stranger may connect")
        })
        .collect();
    assert!(lab.is_connected(&good));
    still_works(&lab, &good, &folder);
    // A new agent gets in as well, beside them.
    let late = lab.agent();
    still_works(&lab, &late, &folder);
    drop(strangers);
}
