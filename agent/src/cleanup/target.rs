//! What an order comes to: the files to treat, each with the detections that it settles.

use std::collections::{BTreeSet, HashMap};

use tm_protocol::{ids::Sha256, report::PathBytes};

use crate::{cleanup::Found, platform::fs::Object};

/// A file with one content, as it was detected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) path: PathBytes,
    pub(super) sha256: Sha256,
    pub(super) size: u64,
    /// Which objects on disk it was detected as; empty if that is no longer known of all of them.
    pub(super) objects: Vec<Object>,
    /// The detections.
    pub(super) keys: Vec<Sha256>,
    /// Members that matched, if not only the file itself did.
    pub(super) members: BTreeSet<Vec<PathBytes>>,
}

/// The files that were detected, each with its detections. A file that was detected with several contents is
/// several targets, the newest content first: it is the one most likely there, and once it is taken the others
/// are found to be gone.
pub(super) fn group(found: Vec<Found>) -> Vec<Target> {
    let mut targets: Vec<(Target, bool)> = Vec::new();
    let mut places = HashMap::new();
    for Found { key, detection, object } in found.into_iter().rev() {
        let at = *places.entry((detection.path.clone(), detection.sha256)).or_insert_with(|| {
            let target = Target {
                path: detection.path.clone(),
                sha256: detection.sha256,
                size: detection.size,
                objects: vec![],
                keys: vec![],
                members: BTreeSet::new(),
            };
            targets.push((target, true));
            targets.len() - 1
        });
        let Some((target, is_known)) = targets.get_mut(at) else { continue };
        match object {
            Some(object) => target.objects.push(object),
            None => *is_known = false,
        }
        if !target.keys.contains(&key) {
            target.keys.push(key);
        }
        if !detection.member.is_empty() {
            target.members.insert(detection.member);
        }
    }
    targets
        .into_iter()
        .map(|(mut target, is_known)| {
            if !is_known {
                target.objects.clear();
            }
            target
        })
        .collect()
}
