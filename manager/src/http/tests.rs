//! Requests through the real router.

use axum::body::Body as HttpBody;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tm_patterns::digests::Counts;
use tm_protocol::{ids::Sha256, task::PatternRef, token::EnrollmentToken};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use uuid::Uuid;

use super::*;
use crate::store::{endpoints::tests::put, patterns::NewPattern, tests::scratch};

mod mitigation;
mod probes;

struct Lab {
    state: AppState,
    router: Router,
    _folder: tempfile::TempDir,
}

struct Answer {
    status: u16,
    headers: axum::http::HeaderMap,
    body: Value,
}

fn token(role: Role) -> String {
    access::bearer_token([role as u8; 32])
}

fn probes(store: &Store, folder: &std::path::Path) -> Arc<Probes> {
    let manager = ManagerId::new(Uuid::from_u128(1));
    Probes::new(store.clone(), manager, vec![folder.to_owned()], CancellationToken::new())
}

/// JSON, or a text as it is.
fn body_of(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned().into())
}

impl Lab {
    async fn start() -> Self {
        let (store, folder) = scratch().await;
        for role in Role::ALL {
            let digest = Sha256::of(token(role).as_bytes());
            store.create_account(role.word(), role, digest, "system", 1).await.unwrap().unwrap();
        }
        let state = AppState {
            blobs: Blobs::open(
                folder.path().join("patterns"),
                tm_protocol::ids::ManagerId::new(uuid::Uuid::nil()),
            )
            .unwrap(),
            nudge: Arc::default(),
            addresses: Addresses::new(vec!["manager.example:4711".parse().unwrap()]),
            ca_sha256: tokio::sync::watch::channel(Sha256::new([9; 32])).1,
            manager: ManagerId::new(Uuid::from_u128(1)),
            fleet: FleetId::new(Uuid::from_u128(2)),
            trust: Arc::new(OnlineKeys::open(&folder.path().join("trust")).unwrap()),
            probes: probes(&store, folder.path()),
            store,
            worker: WorkerProgram { path: "/nonexistent/worker".into(), args: Vec::new() },
        };
        Self { router: router(state.clone()), state, _folder: folder }
    }

    async fn send(&self, method: &Method, path: &str, token: Option<&str>, body: &str) -> Answer {
        let mut request = Request::builder().method(method.clone()).uri(path);
        request = request.header(header::CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(HttpBody::from(body.to_owned())).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: if bytes.is_empty() { Value::Null } else { body_of(&bytes) },
        }
    }

    /// As the administrator.
    async fn ask(&self, method: Method, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(&method, path, Some(&token(Role::Administrator)), &body).await
    }

    async fn actions(&self) -> Vec<String> {
        let log = self.state.store.audit_after(0, 1000).await.unwrap();
        // The first three are the lab's accounts.
        log.into_iter().skip(3).map(|record| record.action).collect()
    }

    async fn pattern(&self, name: &str) {
        let reference = PatternRef { sha256: Sha256::of(name.as_bytes()), size: 3, name: name.to_owned() };
        let new = NewPattern {
            reference,
            rules: 1,
            digests: Counts::default(),
            warnings: Vec::new(),
            forced: false,
        };
        self.state.store.import_pattern(&new, "x", 1).await.unwrap();
        self.state.store.mark_published(&[Sha256::of(name.as_bytes())]).await;
    }
}

#[tokio::test]
async fn every_route_is_open_to_exactly_the_roles_of_the_table() {
    let lab = Lab::start().await;
    for route in ROUTES {
        let path = route.path.replace("{name}", "nobody").replace(['{', '}'], "");
        let ask = async |token: Option<&str>| lab.send(&route.method, &path, token, "").await;
        let place = format!("{} {}", route.method, route.path);
        let stranger = access::bearer_token([77; 32]);
        for bad in [None, Some(""), Some("tma_"), Some(&*stranger), Some(&token(Role::Administrator)[1..])] {
            let answer = ask(bad).await;
            assert_eq!((answer.status, &answer.body["code"]), (401, &json!("not-authenticated")), "{place}");
            assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
        }
        for role in Role::ALL {
            let answer = ask(Some(&token(role))).await;
            let refused = (answer.status, &answer.body["code"]) == (403, &json!("not-allowed"));
            assert_eq!(
                refused,
                !access::allows(role, route.permission),
                "{place} as {role}: {}",
                answer.body
            );
            assert!(answer.status != 401 && answer.status < 500, "{place} as {role}: {}", answer.body);
        }
    }
}

#[tokio::test]
async fn what_is_not_in_the_table_is_not_there() {
    let lab = Lab::start().await;
    for (method, path) in [
        (Method::GET, "/"),
        (Method::GET, "/v1"),
        (Method::GET, "/v1/nothing"),
        (Method::GET, "/v2/version"),
        (Method::DELETE, "/v1/version"),
        (Method::POST, "/v1/tasks"),
    ] {
        let answer = lab.ask(method.clone(), path, Value::Null).await;
        assert_eq!((answer.status, &answer.body["code"]), (404, &json!("not-found")), "{method} {path}");
        assert_eq!(answer.headers[header::CACHE_CONTROL], "no-store");
        assert_eq!(answer.headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
    }
    let version = lab.ask(Method::GET, "/v1/version", Value::Null).await;
    assert_eq!((version.status, &version.body["role"]), (200, &json!("administrator")));
    assert_eq!(version.headers[header::CACHE_CONTROL], "no-store");
}

#[tokio::test]
async fn unreadable_requests_are_refused_in_one_shape() {
    let lab = Lab::start().await;
    let big = format!("{{\"name\":\"{}\"}}", "a".repeat(MIB));
    for (method, path, body, status, code) in [
        (Method::POST, "/v1/accounts", "{", 400, "invalid"),
        (Method::POST, "/v1/accounts", r#"{"name":"a","role":"king"}"#, 400, "invalid"),
        (Method::POST, "/v1/accounts", r#"{"name":"a","role":"viewer","x":1}"#, 400, "invalid"),
        (Method::POST, "/v1/accounts", r#"{"name":"a b","role":"viewer"}"#, 400, "invalid"),
        (Method::POST, "/v1/accounts", &*big, 413, "too-large"),
        (Method::GET, "/v1/endpoints?serach=a", "", 400, "invalid"),
        (Method::GET, "/v1/endpoints?search=,", "", 400, "invalid"),
        (Method::GET, "/v1/tasks?limit=0", "", 400, "invalid"),
        (Method::GET, "/v1/tasks?state=lost", "", 400, "invalid"),
        (Method::GET, "/v1/tasks/%ff", "", 400, "invalid"),
        (Method::POST, "/v1/patterns?name=a/b", "rule", 400, "invalid"),
        (Method::POST, "/v1/patterns?name=a", " ", 422, "pattern-refused"),
    ] {
        let answer = lab.send(&method, path, Some(&token(Role::Administrator)), body).await;
        assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)), "{path}: {}", answer.body);
    }
    assert_eq!(lab.actions().await, [""; 0]);
}

#[tokio::test]
async fn an_import_that_cannot_be_tried_is_not_accepted() {
    let lab = Lab::start().await;
    let administrator = token(Role::Administrator);
    let body = "rule a { condition: true }";
    let answer = lab.send(&Method::POST, "/v1/patterns?name=a", Some(&administrator), body).await;
    assert_eq!((answer.status, &answer.body["code"]), (500, &json!("internal")), "{}", answer.body);
    assert!(!lab.state.blobs.path(Sha256::of(body.as_bytes())).exists());
    assert_eq!(lab.ask(Method::GET, "/v1/patterns", Value::Null).await.body, json!([]));
}

#[tokio::test]
async fn accounts_come_and_go_and_one_administrator_stays() {
    let lab = Lab::start().await;
    let new = json!({ "name": "ann", "role": "viewer" });
    let made = lab.ask(Method::POST, "/v1/accounts", new.clone()).await;
    let token = made.body["token"].as_str().unwrap().to_owned();
    assert_eq!(made.body["account"]["name"], "ann");
    assert_eq!(lab.ask(Method::POST, "/v1/accounts", new).await.body["code"], "already-exists");
    let version = async |token: &str| lab.send(&Method::GET, "/v1/version", Some(token), "").await.status;
    assert_eq!(version(&token).await, 200);
    let renewed = lab.ask(Method::POST, "/v1/accounts/ann/token", Value::Null).await;
    assert_eq!(version(&token).await, 401);
    let token = renewed.body["token"].as_str().unwrap();
    assert_eq!(version(token).await, 200);
    let listed = lab.ask(Method::GET, "/v1/accounts", Value::Null).await.body;
    let ann = listed.as_array().unwrap().iter().find(|row| row["name"] == "ann").unwrap();
    assert!(ann["last_used_at"].is_string(), "{ann}");
    assert_eq!(lab.ask(Method::DELETE, "/v1/accounts/ann", Value::Null).await.status, 204);
    assert_eq!(version(token).await, 401);
    assert_eq!(lab.ask(Method::DELETE, "/v1/accounts/ann", Value::Null).await.status, 404);
    let last = lab.ask(Method::DELETE, "/v1/accounts/administrator", Value::Null).await;
    assert_eq!((last.status, &last.body["code"]), (409, &json!("conflict")));
    assert_eq!(lab.actions().await, ["account.create", "account.token", "account.delete"]);
}

#[tokio::test]
async fn an_enrollment_token_says_where_and_whom_to_trust() {
    let lab = Lab::start().await;
    let wish = |uses, expires_in_s| json!({ "uses": uses, "expires_in_s": expires_in_s, "group": "lab" });
    let unknown = lab.ask(Method::POST, "/v1/tokens", wish(3, 60)).await;
    assert_eq!((unknown.status, &unknown.body["code"]), (404, &json!("not-found")));
    assert_eq!(lab.ask(Method::POST, "/v1/groups", json!({ "name": "lab" })).await.status, 200);
    for (uses, seconds) in [(0, 60), (100_001, 60), (1, 59), (1, 31_536_001)] {
        assert_eq!(lab.ask(Method::POST, "/v1/tokens", wish(uses, seconds)).await.status, 400);
    }
    let made = lab.ask(Method::POST, "/v1/tokens", wish(3, 60)).await;
    let token: EnrollmentToken = made.body["token"].as_str().unwrap().parse().unwrap();
    assert_eq!((token.addresses, token.ca), (lab.state.addresses.get(), *lab.state.ca_sha256.borrow()));
    let stored = lab.state.store.tokens().await.unwrap();
    assert_eq!((stored.len(), stored[0].uses), (1, 3));
    let path = format!("/v1/tokens/{}", stored[0].id);
    let state = async || lab.ask(Method::GET, "/v1/tokens", Value::Null).await.body[0]["state"].clone();
    assert_eq!(state().await, "active");
    assert_eq!(lab.ask(Method::DELETE, &path, Value::Null).await.status, 204);
    assert_eq!(state().await, "revoked");
    assert_eq!(lab.ask(Method::DELETE, "/v1/tokens/x", Value::Null).await.status, 404);
    assert_eq!(lab.actions().await, ["group.create", "token.create", "token.revoke"]);
}

#[tokio::test]
async fn endpoints_are_found_and_moved() {
    let lab = Lab::start().await;
    put(&lab.state.store, 1, "web-01", &["10.0.0.1"], true).await;
    put(&lab.state.store, 2, "web-02", &["10.0.0.1"], false).await;
    let count = async |query: &str| {
        let answer = lab.ask(Method::GET, &format!("/v1/endpoints{query}"), Value::Null).await;
        answer.body.as_array().map(Vec::len)
    };
    assert_eq!(count("").await, Some(2));
    assert_eq!(count("?connectivity=disconnected").await, Some(1));
    assert_eq!(count("?search=WEB-0&group=default&connectivity=connected").await, Some(1));
    assert_eq!(count("?search=db").await, Some(0));

    let one = lab.ask(Method::GET, "/v1/endpoints/WEB-01", Value::Null).await;
    assert_eq!((one.status, &one.body["inventory"]["memory"]), (200, &json!(2)));
    assert_eq!(one.body["enrolled_at"], "1970-01-01T00:00:00.007Z");
    for (target, status, code) in [("web", 404, "target-unknown"), ("10.0.0.1", 409, "target-ambiguous")] {
        let answer = lab.ask(Method::GET, &format!("/v1/endpoints/{target}"), Value::Null).await;
        assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)));
        assert_eq!(answer.body["candidates"].as_array().map(Vec::len), Some(2), "{}", answer.body);
    }
    let hostile = lab.ask(Method::GET, "/v1/endpoints/%1b%5b31m", Value::Null).await;
    assert!(hostile.body["message"].as_str().unwrap().contains(r"`\u{1b}[31m`"), "{}", hostile.body);

    let made = async |name: &str| lab.ask(Method::POST, "/v1/groups", json!({ "name": name })).await.status;
    let unknown = lab.ask(Method::PUT, "/v1/endpoints/web-02/group", json!({ "group": "dmz" })).await;
    assert_eq!((unknown.status, &unknown.body["code"]), (404, &json!("not-found")));
    assert_eq!((made("dmz").await, made("dmz").await, made("../x").await), (200, 409, 400));
    for _ in 0..2 {
        let moved = lab.ask(Method::PUT, "/v1/endpoints/web-02/group", json!({ "group": "dmz" })).await;
        assert_eq!((moved.status, &moved.body["group"]), (200, &json!("dmz")));
    }
    assert_eq!(count("?group=dmz").await, Some(1));
    assert_eq!(lab.actions().await, ["group.create", "endpoint.set-group"]);
    let groups = lab.ask(Method::GET, "/v1/groups", Value::Null).await.body;
    assert_eq!((&groups[0]["name"], &groups[1]["endpoints"]), (&json!("default"), &json!(1)), "{groups}");
}

#[tokio::test]
async fn a_scan_is_ordered_for_whom_it_is_meant_or_for_nobody() {
    let lab = Lab::start().await;
    put(&lab.state.store, 1, "web-01", &["10.0.0.1"], true).await;
    put(&lab.state.store, 2, "web-02", &[], false).await;
    let paths = |paths: &[&[u8]]| json!(paths.iter().map(|p| STANDARD.encode(p)).collect::<Vec<_>>());
    let srv = paths(&[b"/srv"]);
    let order = |to: Value| json!({ "to": to, "paths_b64": srv });
    let one = json!({ "targets": ["web-01"] });

    let bare = lab.ask(Method::POST, "/v1/scans", order(one.clone())).await;
    assert_eq!((bare.status, &bare.body["code"]), (409, &json!("conflict")), "{}", bare.body);
    lab.pattern("p").await;

    let long = vec![b'a'; 4000];
    let long = [b"/".as_slice(), &long].concat();
    let many: Vec<&[u8]> = vec![&long; 200];
    for (wish, status, code) in [
        (order(json!({})), 400, "invalid"),
        (order(json!({ "targets": ["web"] })), 404, "target-unknown"),
        (order(json!({ "group": "none" })), 404, "target-unknown"),
        (order(json!({ "search": "web" })), 409, "not-connected"),
        (json!({ "to": one, "paths_b64": [] }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": paths(&[b"srv"]) }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": paths(&[b"/s\0"]) }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": ["?"] }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": paths(&many) }), 413, "too-large"),
        (json!({ "to": one, "paths_b64": srv, "patterns": ["q"] }), 404, "not-found"),
        (json!({ "to": one, "paths_b64": srv, "deadline_s": 0 }), 400, "invalid"),
        (json!({ "to": one }), 400, "invalid"),
        (json!({ "to": one, "options": { "fresh": true } }), 400, "invalid"),
        (json!({ "to": one, "options": { "full": true, "quick": true } }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": srv, "options": { "full": true } }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": srv, "options": { "cpu_percent": 101 } }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": srv, "options": { "slowly": true } }), 400, "invalid"),
        (json!({ "to": one, "paths_b64": srv, "expires_in_s": 9_000_000 }), 400, "invalid"),
    ] {
        let answer = lab.ask(Method::POST, "/v1/scans", wish.clone()).await;
        let shown = wish.to_string().chars().take(200).collect::<String>();
        assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)), "{shown}: {}", answer.body);
    }
    let away = lab.ask(Method::POST, "/v1/scans", order(json!({ "search": "web" }))).await;
    assert_eq!(away.body["message"], "not connected: `web-02`");
    assert_eq!(lab.ask(Method::GET, "/v1/tasks", Value::Null).await.body, json!([]));
    // Nobody was nudged for nothing.
    let nudged =
        async || tokio::time::timeout(Duration::from_millis(50), lab.state.nudge.notified()).await.is_ok();
    assert!(!nudged().await);

    // Named three times over, each gets it once.
    let all = json!({ "targets": ["web-01", "10.0.0.1"], "search": "web", "group": "default" });
    let wish = json!({ "to": all, "paths_b64": srv, "when_connected": true, "reason": "why" });
    let made = lab.ask(Method::POST, "/v1/scans", wish).await;
    assert_eq!(made.status, 200, "{}", made.body);
    let hosts: Vec<_> = made.body.as_array().unwrap().iter().map(|task| task["host"].clone()).collect();
    assert_eq!(hosts, ["web-01", "web-02"]);
    assert!(nudged().await);
    assert_eq!(lab.actions().await, ["pattern.import", "scan.start", "scan.start"]);

    let list = lab.ask(Method::GET, "/v1/tasks?endpoint=web-02&state=queued", Value::Null).await.body;
    assert_eq!((list.as_array().map(Vec::len), &list[0]["reason"]), (Some(1), &json!("why")));
    let path = format!("/v1/tasks/{}", made.body[0]["id"].as_str().unwrap());
    let mut shown = lab.ask(Method::GET, &path, Value::Null).await.body;
    let whole = shown.as_object_mut().unwrap();
    assert_eq!(whole.remove("paths"), Some(json!(["/srv"])));
    assert_eq!(whole.remove("options").unwrap()["quick"], false);
    assert_eq!(shown, made.body[0]);
    let quick = json!({ "to": one, "options": { "quick": true, "processes": true } });
    let made = lab.ask(Method::POST, "/v1/scans", quick).await;
    assert_eq!(made.status, 200, "no path is needed: {}", made.body);
    let detections = lab.ask(Method::GET, &format!("{path}/detections"), Value::Null).await;
    assert_eq!(detections.body, json!({ "items": [] }));
}

#[tokio::test]
async fn the_audit_log_is_read_in_pages() {
    let lab = Lab::start().await;
    let first = lab.ask(Method::GET, "/v1/audit?limit=2", Value::Null).await.body;
    assert_eq!((first["items"].as_array().map(Vec::len), &first["next"]), (Some(2), &json!(2)));
    let rest = lab.ask(Method::GET, "/v1/audit?after=2&limit=2", Value::Null).await.body;
    assert_eq!((rest["items"].as_array().map(Vec::len), rest.get("next")), (Some(1), None));
}
