//! `tmctl version`.

use serde::Serialize;
use tm_api::VersionView;

use crate::{
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Output},
};

#[derive(Debug, Serialize)]
struct Versions {
    tmctl: &'static str,
    manager: VersionView,
}

const COLUMNS: [Column<Versions>; 6] = [
    Column::narrow("tmctl", |v| v.tmctl.to_owned()),
    Column::narrow("manager", |v| v.manager.version.clone()),
    Column::narrow("manager_id", |v| v.manager.manager.clone()),
    Column::narrow("fleet", |v| v.manager.fleet.clone()),
    Column::narrow("account", |v| v.manager.account.clone()),
    Column::narrow("role", |v| v.manager.role.to_string()),
];

pub(crate) async fn run(client: &Client, out: &Output) -> Result<Exit, Failure> {
    let manager = client.get(&["version"], &()).await?;
    out.one(&Versions { tmctl: env!("CARGO_PKG_VERSION"), manager }, &COLUMNS)?;
    Ok(Exit::Done)
}
