//! `tmctl group`.

use tm_api::group::{CreateGroup, GroupView};

use crate::{
    cli::Group,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Output},
};

const COLUMNS: [Column<GroupView>; 4] = [
    Column::narrow("name", |g| g.name.clone()),
    Column::narrow("endpoints", |g| g.endpoints.to_string()),
    Column::narrow("created_by", |g| g.created_by.clone().unwrap_or_default()),
    Column::time("created_at", |g| g.created_at.clone().unwrap_or_default()),
];

pub(crate) async fn run(command: Group, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Group::Create { name } => {
            let made: GroupView = client.post(&["groups"], &CreateGroup { name }).await?;
            out.list(&[made], &COLUMNS, "")?;
        }
        Group::List => {
            let groups: Vec<GroupView> = client.get(&["groups"], &()).await?;
            out.list(&groups, &COLUMNS, "no groups")?;
        }
    }
    Ok(Exit::Done)
}
