//! What monitoring asks.

use super::*;

async fn get(lab: &Lab, path: &str, token: Option<&str>) -> Answer {
    lab.send(&Method::GET, path, token, "").await
}

#[tokio::test]
async fn metrics_are_for_tokens_and_health_is_for_everybody() {
    let lab = Lab::start().await;
    let viewer = token(Role::Viewer);
    put(&lab.state.store, 1, "web-07", &[], true).await;
    let answer = get(&lab, "/metrics", Some(&viewer)).await;
    let text = answer.body.as_str().unwrap().to_owned();
    assert!(answer.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    for line in ["tm_endpoints 1", "tm_database_up 1", "tm_tasks{state=\"queued\"} 0"] {
        assert!(text.lines().any(|shown| shown == line), "{line}:\n{text}");
    }
    assert!(!text.contains("web-07"), "no endpoint has series of its own");
    assert_eq!(get(&lab, "/metrics", None).await.status, 401);
    let alive = get(&lab, "/healthz", None).await;
    assert_eq!((alive.status, &alive.body), (200, &json!({ "alive": true })));
    assert_eq!(alive.headers[header::CACHE_CONTROL], "no-store");
    assert_eq!(lab.send(&Method::POST, "/healthz", None, "").await.status, 404);
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let lab = Lab::start().await;
    crate::metrics::METRICS.agent_port_listening.set(1);
    let ready = get(&lab, "/readyz", None).await;
    assert_eq!((ready.status, &ready.body), (200, &json!({ "ready": true, "failing": [] })));

    let ending = CancellationToken::new();
    let gone = lab._folder.path().join("gone");
    let probes = Probes::new(lab.state.store.clone(), lab.state.manager, vec![gone], ending.clone());
    let router = router(AppState { probes, ..lab.state.clone() });
    let lab = Lab { router, ..lab };
    ending.cancel();
    crate::metrics::METRICS.agent_port_listening.set(0);
    lab.state.store.close().await;
    let ready = get(&lab, "/readyz", None).await;
    let failing = ready.body["failing"].as_array().unwrap();
    let checks: Vec<&str> = failing.iter().map(|failing| failing["check"].as_str().unwrap()).collect();
    assert_eq!((ready.status, checks), (503, vec!["database", "agent-port", "disk", "ending"]));
    // What was found holds for a moment, however often one asks.
    crate::metrics::METRICS.agent_port_listening.set(1);
    assert_eq!(get(&lab, "/readyz", None).await.body["failing"].as_array().unwrap().len(), 4);
    let metrics = get(&lab, "/metrics", Some("nobody")).await;
    assert_eq!(metrics.status, 401, "a token that cannot be one is not looked up");
}
