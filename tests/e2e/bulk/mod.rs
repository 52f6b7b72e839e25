//! Bulk transfers: patterns down, in parts and as what has changed, and files up.

mod down;
mod load;
mod up;

use std::fs;

use tm_protocol::ids::Sha256;
use tm_tests::{Lab, bulk, samples};
use tokio::runtime::Runtime;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads can be made")
}

/// The text of a digest list with these entries, and the one of the sample that scans are to find.
fn list(numbers: impl Iterator<Item = u32>) -> String {
    let mut text = format!("{}\n", Sha256::of(&samples::eicar()));
    for number in numbers {
        text += &Sha256::of(&number.to_le_bytes()).to_string();
        text.push('\n');
    }
    text
}

/// Imports it as `list`; its digest and its bytes as agents get them.
fn import(lab: &Lab, text: &str) -> (Sha256, Vec<u8>) {
    let before = blobs(lab);
    lab.import("list.txt", text).expect(0);
    let new: Vec<Sha256> = blobs(lab).into_iter().filter(|digest| !before.contains(digest)).collect();
    assert_eq!(new.len(), 1, "one came in");
    let bytes = fs::read(lab.manager_data().join("patterns").join(new[0].to_string())).expect("it is there");
    (new[0], bytes)
}

fn blobs(lab: &Lab) -> Vec<Sha256> {
    let entries = fs::read_dir(lab.manager_data().join("patterns")).expect("it is there");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// So many enrolled agents that are no programs.
fn enrolled(lab: &Lab, runtime: &Runtime, count: u32) -> Vec<std::sync::Arc<rustls::ClientConfig>> {
    let token = lab.token(count);
    runtime.block_on(async {
        let mut all = Vec::new();
        for number in 0..count {
            let identity = bulk::enroll(lab.agent_port, &token, &format!("bulk-{number}"))
                .await
                .expect("a good token lets agents in");
            all.push(bulk::config(&identity).expect("they belong together"));
        }
        all
    })
}
