//! What the system promises, tried on the real programs.
//!
//! Every test has a control: it shows first that what it will find missing would have been seen.

mod archives;
mod attack;
mod backup;
mod bulk;
mod certificates;
mod churn;
mod cleanup;
mod clones;
mod cost;
mod coverage;
mod digests;
mod enroll;
mod export;
mod fleet;
mod hostile;
mod hostile_rules;
mod known;
mod link;
mod local;
mod lost;
mod managers;
mod memory;
mod migrate;
mod names;
mod observe;
mod paths;
mod progress;
mod quick;
mod roles;
mod rules;
mod sandbox;
mod scan;
mod session;
mod skeleton;
mod standalone;
mod tasks;
mod tmctl;
mod trust;
mod vault;
mod walk;
mod waves;

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

/// What a detection says, as exact bytes of the path and the names of the member.
fn path_and_member(detection: &Value) -> (Vec<u8>, Vec<String>) {
    let path = detection["path_b64"].as_str().expect("every detection has its exact path");
    let path = STANDARD.decode(path).expect("it is base64");
    let member = detection["member"].as_array().into_iter().flatten();
    (path, member.filter_map(|name| name.as_str().map(str::to_owned)).collect())
}

/// The paths of detections, without members.
fn paths(detections: &[Value]) -> BTreeSet<Vec<u8>> {
    detections.iter().map(|detection| path_and_member(detection).0).collect()
}
