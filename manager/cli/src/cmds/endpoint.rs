//! `tmctl endpoint`.

use tm_api::endpoint::{Connectivity, EndpointQuery, EndpointView, InventoryView, SetGroup};

use crate::{
    cli::Endpoint,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Output, bytes, say},
};

const COLUMNS: [Column<EndpointView>; 20] = [
    Column::narrow("id", |e| e.id.clone()),
    Column::narrow("host", |e| e.host.clone()),
    Column::narrow("addresses", |e| e.addresses.join(" ")),
    Column::narrow("group", |e| e.group.clone()),
    Column::narrow("connectivity", |e| e.connectivity.to_string()),
    Column::wide("quarantine", |e| e.quarantine.clone()),
    Column::wide("restart_reasons", |e| e.restart_reasons.join(" ")),
    Column::narrow("agent_version", |e| e.agent_version.clone()),
    Column::narrow("last_seen_at", |e| e.last_seen_at.clone().unwrap_or_default()),
    Column::wide("enrolled_at", |e| e.enrolled_at.clone()),
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

pub(crate) async fn run(command: Endpoint, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Endpoint::List { search, group, connected, disconnected } => {
            let connectivity = match (connected, disconnected) {
                (true, _) => Some(Connectivity::Connected),
                (false, true) => Some(Connectivity::Disconnected),
                (false, false) => None,
            };
            let query = EndpointQuery { search, group, connectivity, query: None };
            let found: Vec<EndpointView> = client.get(&["endpoints"], &query).await?;
            out.list(&found, &COLUMNS, "no endpoints")?;
        }
        Endpoint::Show { target } => {
            let endpoint: EndpointView = client.get(&["endpoints", &target], &()).await?;
            out.one(&endpoint, &COLUMNS)?;
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
