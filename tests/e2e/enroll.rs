//! Who is let in.

use std::fs;

use tm_protocol::token::EnrollmentToken;
use tm_tests::{Lab, bin};

/// Tries to enroll; it must not work, nothing must be left that could run, and no endpoint may appear.
#[track_caller]
fn is_refused(lab: &Lab, token: &str) -> String {
    let before = lab.endpoints().len();
    let (data, output) = lab.enroll(token);
    assert!(output.code() > 0, "it was let in\n{}", output.both());
    assert_eq!(lab.endpoints().len(), before, "an endpoint appeared");
    let run = std::process::Command::new(bin("tm-agent"))
        .args(["run", "--data"])
        .arg(&data)
        .output()
        .expect("programs can be run");
    assert!(!run.status.success(), "an agent that was not let in has nothing to run with");
    assert!(!output.err().contains("panicked"), "{}", output.err());
    output.err()
}

#[test]
fn a_token_lets_in_as_many_as_it_says() {
    let lab = Lab::start();
    let token = lab.token(2);
    for _ in 0..2 {
        lab.enroll(&token).1.expect(0);
    }
    is_refused(&lab, &token);
    assert_eq!(lab.endpoints().len(), 2);
}

#[test]
fn a_revoked_token_lets_nobody_in() {
    let lab = Lab::start();
    let made = lab.tmctl(["token", "create", "--uses", "5", "-o", "json"]).expect(0).json();
    let (id, token) = (made["id"].as_str().unwrap(), made["token"].as_str().unwrap());
    lab.enroll(token).1.expect(0);
    lab.tmctl(["token", "revoke", id]).expect(0);
    is_refused(&lab, token);
}

#[test]
fn an_expired_token_lets_nobody_in() {
    let lab = Lab::start();
    let made =
        lab.tmctl(["token", "create", "--uses", "5", "--expires", "60s", "-o", "json"]).expect(0).json();
    let (id, token) = (made["id"].as_str().unwrap(), made["token"].as_str().unwrap());
    lab.enroll(token).1.expect(0);
    // A token lives for a minute at least: its end is put into the past instead of being waited for.
    let done = std::process::Command::new("sqlite3")
        .args(["-cmd", ".timeout 5000"])
        .arg(lab.manager_data().join("manager.db"))
        .arg(format!("UPDATE enrollment_token SET expires_ms = 1 WHERE id = '{id}'"))
        .status();
    assert!(done.expect("sqlite3 is installed").success());
    let said = is_refused(&lab, token);
    assert!(said.contains("expired"), "{said}");
}

#[test]
fn wrong_cut_off_and_guessed_tokens_let_nobody_in() {
    let lab = Lab::start();
    let token = lab.token(1);
    let parsed: EnrollmentToken = token.parse().expect("a token is what it should be");

    let cut = is_refused(&lab, &token[..token.len() - 3]);
    assert!(cut.contains("incomplete or altered"), "{cut}");
    is_refused(&lab, "swordfish");
    is_refused(&lab, "");

    // Well made, with a secret that nobody gave out.
    let mut guessed = parsed.clone();
    guessed.secret[0] ^= 1;
    is_refused(&lab, &guessed.to_string());

    // The right secret, for a manager whose CA is another: the agent must not give the secret away.
    let mut other_ca = parsed;
    other_ca.ca = "00".repeat(32).parse().expect("64 digits are a digest");
    is_refused(&lab, &other_ca.to_string());

    // The control, last: the token itself is still good, so nothing above used it up.
    lab.enroll(&token).1.expect(0);
}

#[test]
fn a_key_is_made_on_the_endpoint_and_kept_from_others() {
    use std::os::unix::fs::PermissionsExt as _;
    let lab = Lab::start();
    let (data, output) = lab.enroll(&lab.token(1));
    output.expect(0);
    let mode = fs::metadata(&data).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let profile = fs::metadata(lab.profile()).unwrap().permissions().mode();
    assert_eq!(profile & 0o077, 0, "{profile:o}");
    for entry in fs::read_dir(&data).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", entry.path().display());
    }
}

#[test]
fn an_agent_that_is_enrolled_is_not_enrolled_again_by_accident() {
    let lab = Lab::start();
    let agent = lab.agent();
    let again = agent.command(&["enroll", "--token", &lab.token(1)]);
    assert_eq!(again.code(), 1, "{}", again.both());
    assert_eq!(lab.endpoints().len(), 1);
    assert!(lab.is_connected(&agent));
}
