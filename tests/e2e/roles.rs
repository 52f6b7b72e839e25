//! Who may do what.

use tm_tests::{Lab, output::objects, samples};

#[test]
fn a_viewer_looks_and_changes_nothing() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let viewer = lab.account("vera", "viewer");
    let operator = lab.account("otto", "operator");
    let folder = lab.folder("empty");
    let scan = ["scan", "start", &agent.id, "--path", folder.to_str().unwrap(), "--wait"];
    let looks = ["endpoint", "list", "-o", "json"];

    let seen = lab.tmctl_as(&viewer, looks).expect(0).json();
    assert_eq!(objects(&seen, &["id", "connectivity"]).len(), 1);
    lab.tmctl_as(&viewer, scan).expect(3);
    assert!(lab.newest_task(&agent).is_none(), "nothing was ordered");
    lab.tmctl_as(&viewer, ["token", "create"]).expect(3);

    lab.tmctl_as(&operator, scan).expect(0);
    assert_eq!(lab.newest_task(&agent).unwrap()["issuer"], "otto");
    lab.tmctl_as(&operator, ["token", "create"]).expect(3);
    lab.tmctl_as(&operator, ["account", "create", "eve", "--role", "administrator"]).expect(3);
}

#[test]
fn no_token_no_answer() {
    let lab = Lab::start();
    for path in ["/v1/version", "/v1/endpoints", "/v1/tasks", "/v1/tokens", "/v1/accounts", "/v1/audit"] {
        let (status, _) = tm_tests::raw::get(lab.admin_port, path, None, None);
        assert_eq!(status, 401, "{path}");
        lab.rest(path);
    }
}
