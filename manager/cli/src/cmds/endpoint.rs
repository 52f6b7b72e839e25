//! `tmctl endpoint`.

use tm_api::{
    certificate::{CertificateQuery, CertificateView},
    conflict::{Approve, ConflictView},
    endpoint::{Connectivity, EndpointQuery, EndpointView, InventoryView, Revoke, SetGroup},
    event::{IncidentQuery, IncidentView},
};

use crate::{
    cli::Endpoint,
    client::Client,
    cmds::event,
    failure::{Exit, Failure},
    output::{Column, Output, bytes, say},
};

const COLUMNS: [Column<EndpointView>; 21] = [
    Column::id("id", |e| e.id.clone()),
    Column::narrow("host", |e| e.host.clone()),
    Column::narrow("addresses", |e| e.addresses.join(" ")),
    Column::narrow("group", |e| e.group.clone()),
    Column::narrow("connectivity", |e| e.connectivity.to_string()),
    Column::wide("quarantine", |e| e.quarantine.clone()),
    Column::wide("restart_reasons", |e| e.restart_reasons.join(" ")),
    Column::narrow("agent_version", |e| e.agent_version.clone()),
    Column::time("last_seen_at", |e| e.last_seen_at.clone().unwrap_or_default()),
    Column::wide_time("enrolled_at", |e| e.enrolled_at.clone()),
    Column::wide_time("revoked_at", |e| e.revoked_at.clone().unwrap_or_default()),
    Column::wide("patterns", |e| e.patterns.join(" ")),
    Column::wide("last_failure", |e| {
        e.last_failure.as_ref().map(|f| format!("{} {}: {}", f.at, f.code, f.message)).unwrap_or_default()
    }),
    Column::wide("os", |e| fact(e, |i| i.os.clone())),
    Column::wide("kernel", |e| fact(e, |i| i.kernel.clone())),
    Column::wide("arch", |e| fact(e, |i| i.arch.clone())),
    Column::wide("cpu", |e| fact(e, |i| i.cpu.clone())),
    Column::wide("cpus", |e| fact(e, |i| i.cpus.to_string())),
    Column::wide("memory", |e| fact(e, |i| bytes(i.memory))),
    Column::wide("disks", |e| fact(e, disks)),
    Column::wide("boot_id", |e| fact(e, |i| i.boot_id.clone())),
];

const INCIDENTS: [Column<IncidentView>; 13] = [
    Column::id("id", |i| i.id.clone()),
    Column::narrow("state", |i| i.state.to_string()),
    Column::narrow("rule", |i| i.rule.clone()),
    Column::narrow("open", |i| format!("{} of {}", i.open_detections, i.detections)),
    Column::narrow("path", |i| i.path.clone()),
    Column::time("changed_at", |i| i.changed_at.clone()),
    Column::wide("pattern", |i| i.pattern.clone()),
    Column::wide("host", |i| i.host.clone()),
    Column::wide("endpoint", |i| i.endpoint.clone()),
    Column::wide("detections", |i| i.detections.to_string()),
    Column::wide("open_detections", |i| i.open_detections.to_string()),
    Column::wide_time("opened_at", |i| i.opened_at.clone()),
    Column::wide("task", |i| i.task.clone().unwrap_or_default()),
];

const CERTIFICATES: [Column<CertificateView>; 10] = [
    Column::id("endpoint", |c| c.endpoint.clone()),
    Column::narrow("host", |c| c.host.clone()),
    Column::narrow("state", |c| c.state.to_string()),
    Column::time("ends_at", |c| c.ends_at.clone()),
    Column::narrow("connectivity", |c| c.connectivity.to_string()),
    Column::time("last_seen_at", |c| c.last_seen_at.clone().unwrap_or_default()),
    Column::wide("group", |c| c.group.clone()),
    Column::wide_time("issued_at", |c| c.issued_at.clone()),
    Column::wide("serial", |c| c.serial.clone()),
    Column::wide("authority", |c| c.authority.clone()),
];

const CONFLICTS: [Column<ConflictView>; 11] = [
    Column::id("id", |c| c.id.clone()),
    Column::narrow("state", |c| c.state.to_string()),
    Column::narrow("endpoint_host", |c| c.endpoint_host.clone()),
    Column::narrow("host", |c| c.host.clone()),
    Column::narrow("addresses", |c| c.addresses.join(" ")),
    Column::time("last_seen_at", |c| c.last_seen_at.clone()),
    Column::wide("endpoint", |c| c.endpoint.clone()),
    Column::wide("boot_id", |c| c.boot_id.clone()),
    Column::wide("agent_version", |c| c.agent_version.clone()),
    Column::wide_time("first_seen_at", |c| c.first_seen_at.clone()),
    Column::wide("approved_as", |c| c.approved_as.clone().unwrap_or_default()),
];

pub(crate) async fn run(command: Endpoint, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Endpoint::List { search, group, query, connected, disconnected } => {
            let connectivity = match (connected, disconnected) {
                (true, _) => Some(Connectivity::Connected),
                (false, true) => Some(Connectivity::Disconnected),
                (false, false) => None,
            };
            let query = EndpointQuery { search, group, connectivity, query };
            let found: Vec<EndpointView> = client.get(&["endpoints"], &query).await?;
            out.list(&found, &COLUMNS, "no endpoints")?;
        }
        Endpoint::Show { target } => {
            let endpoint: EndpointView = client.get(&["endpoints", &target], &()).await?;
            out.one(&endpoint, &COLUMNS)?;
        }
        Endpoint::Events { target, limit } => return event::of_endpoint(target, limit, client, out).await,
        Endpoint::Incidents { target, state, limit } => {
            let query = IncidentQuery { endpoint: Some(target), state, limit: Some(limit) };
            let found: Vec<IncidentView> = client.get(&["incidents"], &query).await?;
            out.list(&found, &INCIDENTS, "no incidents")?;
            if u32::try_from(found.len()).is_ok_and(|count| count >= limit) {
                say(&format!("these are the newest {limit}; --limit shows more, up to 1000\n"));
            }
        }
        Endpoint::Certificates { expiring } => {
            let query = CertificateQuery { expiring_days: expiring };
            let found: Vec<CertificateView> = client.get(&["certificates"], &query).await?;
            out.list(&found, &CERTIFICATES, "no certificates")?;
        }
        Endpoint::Conflicts => {
            let found: Vec<ConflictView> = client.get(&["conflicts"], &()).await?;
            out.list(&found, &CONFLICTS, "no conflicts")?;
        }
        Endpoint::Approve { target, conflict } => {
            let body = Approve { conflict };
            let new: EndpointView = client.post(&["endpoints", &target, "approve"], &body).await?;
            out.list(&[new], &COLUMNS, "")?;
            say(
                "the held agent is this endpoint from now on; the first one makes a new key as soon as no task runs\n",
            );
        }
        Endpoint::Revoke { target, reason } => {
            let body = Revoke { reason };
            let changed: EndpointView = client.post(&["endpoints", &target, "revoke"], &body).await?;
            out.list(&[changed], &COLUMNS, "")?;
            say("its certificates are refused from now on; a session ends within two seconds\n");
        }
        Endpoint::Forget { target } => {
            client.delete(&["endpoints", &target]).await?;
            say("the endpoint is forgotten; its events and audit records stay\n");
        }
        Endpoint::SetGroup { target, group } => {
            let body = SetGroup { group };
            let changed: EndpointView = client.put(&["endpoints", &target, "group"], &body).await?;
            out.list(&[changed], &COLUMNS, "")?;
            say("the endpoint is in its new group\n");
        }
    }
    Ok(Exit::Done)
}

fn fact(endpoint: &EndpointView, get: impl Fn(&InventoryView) -> String) -> String {
    endpoint.inventory.as_ref().map(get).unwrap_or_default()
}

fn disks(inventory: &InventoryView) -> String {
    let one = |disk: &tm_protocol::message::Disk| {
        format!("{} ({}, {})", disk.mount, disk.filesystem, bytes(disk.total))
    };
    inventory.disks.iter().map(one).collect::<Vec<_>>().join(", ")
}
