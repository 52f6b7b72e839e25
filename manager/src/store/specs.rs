//! What an endpoint is ordered to do, as the `spec` column holds it.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::Row as _;
use tm_protocol::{
    ids::{EndpointId, Sha256, TaskId, VaultId},
    report::PathBytes,
    task::{CleanupSpec, PatternRef, RestoreSpec, ScanLimits, ScanOptions, ScanSpec, TaskKind, TaskSpec},
};

use super::{
    StoreError, Tx,
    tasks::{bytes, json},
};

/// Orders of one kind for one endpoint that have not ended and are no dry runs.
///
/// # Errors
/// If the database cannot be read or holds a task that is not one.
pub(super) async fn under_way(
    tx: &mut Tx,
    endpoint: EndpointId,
    kind: TaskKind,
) -> Result<Vec<(TaskId, TaskSpec)>, StoreError> {
    let rows = sqlx::query(
        "SELECT id, spec FROM task WHERE endpoint_id = $1 AND state IN ('queued', 'delivered', 'running')
         AND kind = $2 AND dry_run = 0",
    )
    .bind(endpoint.to_string())
    .bind(kind.word())
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("look for orders that are under way"))?;
    let order = |row: &sqlx::any::AnyRow| {
        let id: String = row.get(0);
        let id = id.parse().map_err(|_| StoreError::content("task id", id))?;
        Ok((id, from_json(&row.get::<String, _>(1))?))
    };
    rows.iter().map(order).collect()
}

/// A spec as the `spec` column holds it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SpecRow {
    Scan {
        paths_b64: Vec<String>,
        patterns: Vec<PatternRef>,
        limits: ScanLimits,
        /// Missing in orders of before there were options.
        #[serde(default)]
        options: ScanOptions,
    },
    Cleanup {
        detections: Vec<Sha256>,
        dry_run: bool,
    },
    Restore {
        items: Vec<VaultId>,
        to_b64: Option<String>,
        set_id: bool,
        dry_run: bool,
    },
}

/// A spec for the `spec` column.
pub(super) fn to_json(spec: &TaskSpec) -> String {
    let row = match spec {
        TaskSpec::Scan(scan) => SpecRow::Scan {
            paths_b64: scan.paths.iter().map(|path| STANDARD.encode(&path.0)).collect(),
            patterns: scan.patterns.clone(),
            limits: scan.limits,
            options: scan.options,
        },
        TaskSpec::Cleanup(cleanup) => {
            SpecRow::Cleanup { detections: cleanup.detections.clone(), dry_run: cleanup.dry_run }
        }
        TaskSpec::Restore(restore) => SpecRow::Restore {
            items: restore.items.clone(),
            to_b64: restore.to.as_ref().map(|to| STANDARD.encode(&to.0)),
            set_id: restore.set_id,
            dry_run: restore.dry_run,
        },
    };
    serde_json::to_string(&row).expect("a spec is plain data")
}

/// Reads the `spec` column.
///
/// # Errors
/// If it was not written by this room.
pub(crate) fn from_json(text: &str) -> Result<TaskSpec, StoreError> {
    match json::<SpecRow>("task spec", text)? {
        SpecRow::Scan { paths_b64, patterns, limits, options } => {
            let paths = paths_b64.iter().map(|p| bytes(p).map(PathBytes)).collect::<Result<_, _>>()?;
            Ok(TaskSpec::Scan(ScanSpec { paths, patterns, limits, options }))
        }
        SpecRow::Cleanup { detections, dry_run } => {
            Ok(TaskSpec::Cleanup(CleanupSpec { detections, dry_run }))
        }
        SpecRow::Restore { items, to_b64, set_id, dry_run } => {
            let to = to_b64.map(|to| bytes(&to).map(PathBytes)).transpose()?;
            Ok(TaskSpec::Restore(RestoreSpec { items, to, set_id, dry_run }))
        }
    }
}

/// A spec for the audit log.
pub(super) fn what(spec: &TaskSpec) -> serde_json::Value {
    match spec {
        TaskSpec::Scan(scan) => json!({
            "paths": scan.paths.iter().map(PathBytes::to_string).collect::<Vec<_>>(),
            "patterns": scan.patterns.iter().map(|p| p.sha256.to_string()).collect::<Vec<_>>(),
            "limits": scan.limits,
            "options": scan.options,
        }),
        TaskSpec::Cleanup(cleanup) => json!({
            "detections": cleanup.detections.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "dry_run": cleanup.dry_run,
        }),
        TaskSpec::Restore(restore) => json!({
            "items": restore.items.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "to": restore.to.as_ref().map(PathBytes::to_string),
            "set_id": restore.set_id,
            "dry_run": restore.dry_run,
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use uuid::Uuid;

    use super::*;

    pub(crate) fn scan() -> TaskSpec {
        TaskSpec::Scan(ScanSpec {
            paths: vec![PathBytes(b"/srv/\xff\n".to_vec())],
            patterns: vec![PatternRef { sha256: Sha256::new([1; 32]), size: 3, name: "p".to_owned() }],
            limits: ScanLimits::default(),
            options: ScanOptions { all_local: true, cpu_percent: Some(10), ..ScanOptions::default() },
        })
    }

    #[test]
    fn a_spec_survives_the_column() {
        let to = Some(PathBytes(b"/x\xff".to_vec()));
        for spec in [
            scan(),
            TaskSpec::Cleanup(CleanupSpec { detections: vec![Sha256::new([7; 32])], dry_run: true }),
            TaskSpec::Restore(RestoreSpec {
                items: vec![VaultId::new(Uuid::from_u128(1))],
                to,
                set_id: true,
                dry_run: false,
            }),
        ] {
            assert_eq!(from_json(&to_json(&spec)).unwrap(), spec);
        }
        for text in ["", "{}", r#"{"scan":{}}"#, r#"{"run":{"command":"id"}}"#] {
            assert!(from_json(text).is_err(), "{text}");
        }
    }
}
