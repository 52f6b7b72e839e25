//! Cleanup, restore, cancel, events, incidents and the overview, as a client sees them.

use tm_protocol::{
    ids::{EndpointId, TaskId, VaultId},
    message::{Outcome, Report, ReportBody},
    report::{Coverage, Detection, Failure, ItemReport, ItemVerdict, PathBytes, Tally},
};

use super::*;

/// What an agent says, one report after the other.
struct Agent<'a> {
    lab: &'a Lab,
    endpoint: EndpointId,
    sequence: u64,
}

impl Agent<'_> {
    async fn say(&mut self, body: ReportBody) {
        self.sequence += 1;
        let report = Report { sequence: self.sequence, at_ms: 1, body };
        self.lab.state.store.record_reports(&[(self.endpoint, report)], now_ms()).await.unwrap();
    }

    async fn begin(&mut self, task: &Value) -> TaskId {
        let task: TaskId = task["id"].as_str().unwrap().parse().unwrap();
        self.say(ReportBody::Accepted { task }).await;
        self.say(ReportBody::Started { task }).await;
        task
    }

    async fn treat(&mut self, task: &Value, items: Vec<ItemReport>) {
        let task = self.begin(task).await;
        let mut tally = Tally::default();
        items.iter().for_each(|item| tally.count(item));
        self.say(ReportBody::Items { task, items }).await;
        self.say(ReportBody::Finished { task, outcome: Outcome::Treated(tally) }).await;
    }
}

fn find(path: &[u8]) -> Detection {
    Detection {
        path: path.into(),
        member: vec![PathBytes(b"in\x1bner".to_vec())],
        pattern: Sha256::of(b"p"),
        rule: "evil".to_owned(),
        sha256: Sha256::of(path),
        size: 10,
    }
}

fn item(find: &Detection, verdict: ItemVerdict, vault: Option<u128>, code: Option<&str>) -> ItemReport {
    ItemReport {
        detections: vec![find.key()],
        vault: vault.map(|n| VaultId::new(Uuid::from_u128(n))),
        path: find.path.clone(),
        sha256: Some(find.sha256),
        size: find.size,
        verdict,
        failure: code.map(|code| Failure::new(code, "a reason")),
        notes: vec![Failure::new("other-links", "1 other name")],
    }
}

impl Lab {
    /// A lab with `web-07`, where a scan has found this, and `web-08`, which is away.
    async fn infected(found: &[Detection]) -> (Self, EndpointId) {
        let lab = Self::start().await;
        let endpoint = put(&lab.state.store, 1, "web-07", &["10.0.0.7"], true).await;
        put(&lab.state.store, 2, "web-08", &[], false).await;
        lab.pattern("p").await;
        let order = json!({ "to": { "targets": ["web-07"] }, "paths_b64": [STANDARD.encode("/")] });
        let scan = lab.ask(Method::POST, "/v1/scans", order).await.body[0].clone();
        let mut agent = Agent { lab: &lab, endpoint, sequence: 0 };
        let task = agent.begin(&scan).await;
        agent.say(ReportBody::Detections { task, detections: found.to_vec() }).await;
        let coverage = Coverage { files: 3, detections: found.len() as u64, ..Coverage::default() };
        agent.say(ReportBody::Finished { task, outcome: Outcome::Scanned(coverage) }).await;
        (lab, endpoint)
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.ask(Method::GET, path, Value::Null).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let answer = self.ask(Method::POST, path, body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body
    }

    /// The count of a query, what is ordered for it, and the hosts that its list has.
    async fn query(&self, name: &str) -> (Value, Value, Vec<String>) {
        let status = self.get("/v1/status").await;
        let line =
            status["queries"].as_array().unwrap().iter().find(|line| line["name"] == name).unwrap().clone();
        let list = self.get(&format!("/v1/endpoints?query={name}")).await;
        let hosts = list.as_array().unwrap().iter().map(|row| row["host"].as_str().unwrap().to_owned());
        (line["count"].clone(), line["queued_automatically"].clone(), hosts.collect())
    }
}

#[tokio::test]
async fn a_cleanup_is_ordered_followed_and_undone() {
    let (a, b) = (find(b"/srv/a\xff\n"), find(b"/srv/b"));
    let (lab, endpoint) = Lab::infected(&[a.clone(), b.clone()]).await;
    let mut agent = Agent { lab: &lab, endpoint, sequence: 4 };
    assert_eq!(lab.query("needs-cleanup").await, (json!(1), json!(0), vec!["web-07".to_owned()]));
    let why = lab.get("/v1/endpoints/web-07/why").await;
    assert_eq!(why["queries"], json!(["needs-cleanup", "connected"]));
    assert_eq!(why["incidents"][0]["state"], "awaiting-cleanup");
    assert_eq!(why["incidents"][0]["path"], "/srv/a\\xff\\n");
    assert!(why["advice"][0].as_str().unwrap().contains("`tmctl cleanup run web-07`"), "{}", why["advice"]);
    let scan = why["tasks"][0]["id"].as_str().unwrap();
    let found = lab.get(&format!("/v1/tasks/{scan}/detections")).await;
    assert_eq!(found["items"][0]["key"], a.key().to_string());
    assert_eq!(found["items"][0]["incident"], why["incidents"][0]["id"]);

    let order = json!({ "to": { "query": "needs-cleanup" }, "terms": { "reason": "ticket 7" } });
    let made = lab.post("/v1/cleanups", order.clone()).await;
    assert_eq!((made.as_array().map(Vec::len), &made[0]["kind"]), (Some(1), &json!("cleanup")));
    assert_eq!((&made[0]["reason"], &made[0]["dry_run"]), (&json!("ticket 7"), &json!(false)));
    assert_eq!(lab.query("needs-cleanup").await, (json!(0), json!(1), vec![]));
    let again = lab.ask(Method::POST, "/v1/cleanups", json!({ "to": { "targets": ["web-07"] } })).await;
    assert_eq!((again.status, &again.body["code"]), (409, &json!("conflict")));
    let id = made[0]["id"].as_str().unwrap();
    assert!(again.body["message"].as_str().unwrap().contains(id), "{}", again.body);
    assert_eq!(lab.ask(Method::POST, "/v1/cleanups", order).await.body["code"], "target-unknown");

    let items = vec![
        item(&a, ItemVerdict::Vaulted, Some(5), None),
        item(&b, ItemVerdict::Refused, None, Some("critical-file")),
    ];
    agent.treat(&made[0], items).await;
    let task = lab.get(&format!("/v1/tasks/{id}")).await;
    assert_eq!((&task["state"], &task["code"]), (&json!("failed"), &json!("incomplete")));
    assert_eq!(task["message"], "1 of 2 items were refused or failed");
    assert_eq!((&task["result"]["done"], &task["result"]["refused"]), (&json!(1), &json!(1)));
    let page = lab.get(&format!("/v1/tasks/{id}/items?limit=1")).await;
    assert_eq!((&page["items"][0]["verdict"], &page["next"]), (&json!("vaulted"), &json!(1)));
    assert_eq!(page["items"][0]["path_b64"], STANDARD.encode(b"/srv/a\xff\n"));
    let rest = lab.get(&format!("/v1/tasks/{id}/items?after=1")).await;
    assert_eq!(rest["items"][0]["failure"]["code"], "critical-file");
    assert_eq!((&rest["items"][0]["notes"][0]["code"], rest.get("next")), (&json!("other-links"), None));
    assert_eq!(lab.query("unresolved").await, (json!(1), json!(0), vec!["web-07".to_owned()]));
    let incidents = lab.get("/v1/incidents?endpoint=web-07&state=unresolved").await;
    assert_eq!((&incidents[0]["detections"], &incidents[0]["open_detections"]), (&json!(2), &json!(1)));
    assert_eq!(lab.get("/v1/incidents?state=resolved").await, json!([]));
    let why = lab.get("/v1/endpoints/web-07/why").await;
    assert!(why["advice"][0].as_str().unwrap().contains("(critical-file)"), "{}", why["advice"]);

    let vault = lab.get("/v1/vault?endpoint=10.0.0.7").await;
    assert_eq!((vault.as_array().map(Vec::len), &vault[0]["path"]), (Some(1), &json!("/srv/a\\xff\\n")));
    assert_eq!(lab.get("/v1/vault?endpoint=web-08").await, json!([]));
    assert_eq!(lab.get(&format!("/v1/vault?before={}", Uuid::from_u128(5))).await, json!([]));
    let restore = lab.post("/v1/restores", json!({ "items": [vault[0]["id"], vault[0]["id"]] })).await;
    let back = ItemReport { detections: vec![], ..item(&a, ItemVerdict::Restored, Some(5), None) };
    agent.treat(&restore[0], vec![back]).await;
    assert_eq!(lab.get("/v1/vault").await, json!([]));
    let status = lab.get("/v1/status").await;
    assert_eq!(
        (&status["endpoints"], &status["connected"], &status["agentless"]),
        (&json!(2), &json!(1), &json!(0))
    );

    let log = lab.get("/v1/events").await["items"].clone();
    let told: Vec<String> = log
        .as_array()
        .unwrap()
        .iter()
        .map(|e| format!("{} {} {}", e["kind"], e["status"], e["detail"]).replace('"', ""))
        .collect();
    assert_eq!(
        told,
        [
            "scan-administrator assessed manual-cleanup-needed",
            "cleanup in-progress ordered",
            "cleanup unsuccessful critical-file",
            "restore in-progress ordered",
            "restore rolled-back restored",
        ]
    );
    assert!(
        log.as_array()
            .unwrap()
            .iter()
            .all(|e| e["host"] == "web-07" && e["advice"].as_str().unwrap().contains("`tmctl "))
    );
    assert_eq!(lab.actions().await, ["pattern.import", "scan.start", "cleanup.run", "vault.restore"]);
}

#[tokio::test]
async fn orders_that_cannot_be_meant_are_refused_and_leave_nothing() {
    let a = find(b"/srv/a");
    let (lab, _) = Lab::infected(std::slice::from_ref(&a)).await;
    let one = json!({ "targets": ["web-07"] });
    let key = a.key().to_string();
    let text = |bytes: &[u8]| STANDARD.encode(bytes);
    let item = Uuid::from_u128(1).to_string();
    for (path, wish, status, code) in [
        ("/v1/cleanups", json!({ "to": {} }), 400, "invalid"),
        ("/v1/cleanups", json!({ "to": { "targets": ["web"] } }), 404, "target-unknown"),
        ("/v1/cleanups", json!({ "to": { "query": "unresolved" } }), 404, "target-unknown"),
        ("/v1/cleanups", json!({ "to": { "query": "all" } }), 400, "invalid"),
        ("/v1/cleanups", json!({ "to": { "targets": ["web-08"] } }), 409, "conflict"),
        ("/v1/cleanups", json!({ "to": { "search": "web-08" } }), 409, "conflict"),
        ("/v1/cleanups", json!({ "to": one, "detections": ["abc"] }), 400, "invalid"),
        ("/v1/cleanups", json!({ "to": one, "detections": ["/etc/passwd"] }), 400, "invalid"),
        ("/v1/cleanups", json!({ "to": one, "detections": ["00000000"] }), 404, "not-found"),
        ("/v1/cleanups", json!({ "to": { "targets": ["web-08"] }, "detections": [key] }), 404, "not-found"),
        ("/v1/cleanups", json!({ "to": one, "terms": { "deadline_s": 0 } }), 400, "invalid"),
        ("/v1/cleanups", json!({ "to": one, "terms": { "reason": "r".repeat(2000) } }), 400, "invalid"),
        ("/v1/cleanups", json!({ "to": one, "paths": ["/etc/passwd"] }), 400, "invalid"),
        ("/v1/restores", json!({ "items": [] }), 400, "invalid"),
        ("/v1/restores", json!({ "items": ["x"] }), 404, "not-found"),
        ("/v1/restores", json!({ "items": [item] }), 404, "not-found"),
        ("/v1/restores", json!({ "items": [item], "to_b64": text(b"etc") }), 400, "invalid"),
        ("/v1/restores", json!({ "items": [item], "to_b64": "?" }), 400, "invalid"),
        (
            "/v1/restores",
            json!({ "items": [item, Uuid::from_u128(2)], "to_b64": text(b"/x") }),
            400,
            "invalid",
        ),
        ("/v1/tasks/x/cancel", Value::Null, 404, "not-found"),
        (&format!("/v1/tasks/{item}/cancel"), Value::Null, 404, "not-found"),
    ] {
        let answer = lab.ask(Method::POST, path, wish.clone()).await;
        assert_eq!(
            (answer.status, &answer.body["code"]),
            (status, &json!(code)),
            "{path} {wish}: {}",
            answer.body
        );
    }
    for (path, status) in [
        ("/v1/events?since_ms=2&until_ms=1", 400),
        ("/v1/events?kind=none", 400),
        ("/v1/events?limit=1001", 400),
        ("/v1/events?endpoint=web-07&search=web", 400),
        ("/v1/events?endpoint=web", 404),
        ("/v1/incidents?state=open", 400),
        ("/v1/vault?before=x", 404),
        ("/v1/endpoints?query=none", 400),
        ("/v1/endpoints/web/why", 404),
        ("/v1/tasks/x/items", 404),
    ] {
        let answer = lab.ask(Method::GET, path, Value::Null).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
    }
    assert_eq!(lab.get("/v1/tasks").await.as_array().map(Vec::len), Some(1), "the scan");
    assert_eq!(lab.query("needs-cleanup").await.0, json!(1));
    assert_eq!(lab.actions().await, ["pattern.import", "scan.start"]);
}

#[tokio::test]
async fn a_task_is_called_off_once_and_says_how_it_ended() {
    let a = find(b"/srv/a");
    let (lab, endpoint) = Lab::infected(std::slice::from_ref(&a)).await;
    let mut agent = Agent { lab: &lab, endpoint, sequence: 4 };
    let order = json!({ "to": { "targets": ["web-07"] } });
    let task = lab.post("/v1/cleanups", order.clone()).await[0].clone();
    let path = format!("/v1/tasks/{}/cancel", task["id"].as_str().unwrap());
    for _ in 0..2 {
        let view = lab.post(&path, Value::Null).await;
        assert_eq!((&view["state"], &view["cancelling"]), (&json!("cancelled"), &json!(false)));
    }
    let task = lab.post("/v1/cleanups", order).await[0].clone();
    let id = agent.begin(&task).await;
    let path = format!("/v1/tasks/{id}/cancel");
    for _ in 0..2 {
        let view = lab.post(&path, Value::Null).await;
        assert_eq!((&view["state"], &view["cancelling"]), (&json!("running"), &json!(true)));
    }
    let why = lab.get("/v1/endpoints/web-07/why").await;
    assert!(why["advice"].to_string().contains("being called off"), "{}", why["advice"]);
    agent.say(ReportBody::Items { task: id, items: vec![item(&a, ItemVerdict::Gone, None, None)] }).await;
    let outcome = Outcome::Treated(Tally { gone: 1, ..Tally::default() });
    agent.say(ReportBody::Finished { task: id, outcome }).await;
    let late = lab.ask(Method::POST, &path, Value::Null).await;
    assert_eq!((late.status, &late.body["code"]), (409, &json!("conflict")));
    assert!(late.body["message"].as_str().unwrap().ends_with("has ended already: done"), "{}", late.body);
    let cancels = lab.actions().await.into_iter().filter(|action| action == "task.cancel").count();
    assert_eq!(cancels, 2);
}

#[tokio::test]
async fn a_dry_run_may_be_ordered_for_those_who_are_away_and_says_so() {
    let (lab, _) = Lab::infected(&[find(b"/srv/a")]).await;
    let mut tx = lab.state.store.begin().await.unwrap();
    crate::store::endpoints::tests::disconnect_all(&mut tx).await;
    Store::commit(tx).await.unwrap();
    let order = |when: bool| json!({ "to": { "targets": ["web-07"] }, "terms": { "dry_run": true, "when_connected": when } });
    let refused = lab.ask(Method::POST, "/v1/cleanups", order(false)).await;
    assert_eq!((refused.status, &refused.body["code"]), (409, &json!("not-connected")));
    assert_eq!(refused.body["message"], "not connected: `web-07`");
    let made = lab.post("/v1/cleanups", order(true)).await;
    assert_eq!((&made[0]["dry_run"], &made[0]["state"]), (&json!(true), &json!("queued")));
    assert_eq!(lab.query("needs-cleanup").await, (json!(1), json!(0), vec!["web-07".to_owned()]));
    assert_eq!(lab.get("/v1/status").await["tasks_queued"], json!(1));
    let why = lab.get("/v1/endpoints/web-07/why").await;
    assert!(why["advice"].to_string().contains("--when-connected"), "{}", why["advice"]);
    assert!(why["advice"].to_string().contains("1 task waits for the endpoint"), "{}", why["advice"]);
}

#[tokio::test]
async fn events_are_read_in_pages_and_from_the_end() {
    let (lab, endpoint) = Lab::infected(&[find(b"/srv/a")]).await;
    let mut agent = Agent { lab: &lab, endpoint, sequence: 4 };
    for count in 1..=4 {
        agent.say(ReportBody::Lost { count }).await;
    }
    let ids = async |query: &str| {
        let page = lab.get(&format!("/v1/events{query}")).await;
        let ids: Vec<i64> =
            page["items"].as_array().unwrap().iter().map(|e| e["id"].as_i64().unwrap()).collect();
        (ids, page["next"].as_i64())
    };
    assert_eq!(ids("?limit=2").await, (vec![1, 2], Some(2)));
    assert_eq!(ids("?limit=2&after=2").await, (vec![3, 4], Some(4)));
    assert_eq!(ids("?limit=2&after=4").await, (vec![5], None));
    assert_eq!(ids("?limit=2&newest=true").await, (vec![4, 5], None));
    assert_eq!(ids("?kind=agent&status=unsuccessful&search=web-07").await, (vec![2, 3, 4, 5], None));
    assert_eq!(ids("?kind=scan-administrator&endpoint=10.0.0.7").await, (vec![1], None));
    assert_eq!(ids("?search=web-08").await, (vec![], None));
    assert_eq!(ids("?search=nobody").await, (vec![], None));
    assert_eq!(ids("?until_ms=1000").await, (vec![], None));
    assert_eq!(ids("?since_ms=1000&limit=1").await, (vec![1], Some(1)));
}
