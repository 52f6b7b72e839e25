//! `tmctl vault`: lists removed files and orders them back.

use std::os::unix::ffi::OsStrExt as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::task::{self, TaskView, VaultItemView, VaultQuery};
use tokio::time::Instant;

use crate::{
    cli::{RunRestore, Vault},
    client::Client,
    cmds::ordered,
    failure::{Exit, Failure},
    output::{Column, Output, say},
};

const COLUMNS: [Column<VaultItemView>; 8] = [
    Column::id("id", |v| v.id.clone()),
    Column::narrow("host", |v| v.host.clone()),
    Column::narrow("path", |v| v.path.clone()),
    Column::time("vaulted_at", |v| v.vaulted_at.clone()),
    Column::wide("size", |v| v.size.to_string()),
    Column::wide("sha256", |v| v.sha256.clone()),
    Column::wide("endpoint", |v| v.endpoint.clone()),
    Column::wide("path_b64", |v| v.path_b64.clone()),
];

/// Most rows in one answer.
const ROWS: u32 = 1000;

pub(crate) async fn run(command: Vault, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Vault::List { endpoint, limit } => {
            let (items, more) = list(endpoint, limit, client).await?;
            out.list(&items, &COLUMNS, "no removed files")?;
            if more {
                say(&format!("these are the newest {limit}; --limit shows more\n"));
            }
            Ok(Exit::Done)
        }
        Vault::Restore(args) => restore(*args, client, out).await,
    }
}

/// The newest items, and whether there may be more.
async fn list(
    endpoint: Option<String>,
    limit: u32,
    client: &Client,
) -> Result<(Vec<VaultItemView>, bool), Failure> {
    let mut items: Vec<VaultItemView> = Vec::new();
    let mut left = limit;
    let mut query = VaultQuery { endpoint, before: None, limit: None };
    loop {
        let rows = left.min(ROWS);
        query.limit = Some(rows);
        let page: Vec<VaultItemView> = client.get(&["vault"], &query).await?;
        let count = u32::try_from(page.len()).unwrap_or(u32::MAX);
        let last = page.last().map(|item| item.id.clone());
        if last.is_some() && last == query.before {
            return Err(Failure::EndlessPages("the vault"));
        }
        query.before = last;
        items.extend(page);
        left = left.saturating_sub(count);
        if count < rows || left == 0 {
            return Ok((items, count >= rows));
        }
    }
}

async fn restore(args: RunRestore, client: &Client, out: &Output) -> Result<Exit, Failure> {
    ordered::check(&args.terms)?;
    if args.to.is_some() && args.items.len() != 1 {
        return Err(Failure::Usage("--to is for exactly one ITEM".to_owned()));
    }
    let until = Instant::now() + args.patience();
    let waits = args.terms.waits();
    let tasks: Vec<TaskView> = client.post(&["restores"], &body(args)).await?;
    ordered::finish(tasks, waits.then_some(until), client, out).await
}

fn body(args: RunRestore) -> task::RunRestore {
    task::RunRestore {
        items: args.items.iter().map(ToString::to_string).collect(),
        to_b64: args.to.map(|path| STANDARD.encode(path.as_bytes())),
        set_id: args.set_id,
        terms: args.terms.into_terms(),
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, os::unix::ffi::OsStringExt as _};

    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    const ID: &str = "018f3c1e-6b5a-7000-8000-0123456789ab";

    fn parse(more: &[&[u8]]) -> RunRestore {
        let args = ["tmctl", "vault", "restore", ID].map(OsString::from);
        let more = more.iter().map(|word| OsString::from_vec(word.to_vec()));
        let Command::Vault(Vault::Restore(args)) =
            Cli::try_parse_from(args.into_iter().chain(more)).unwrap().command
        else {
            panic!("another command")
        };
        *args
    }

    #[test]
    fn the_order_says_exactly_what_was_typed() {
        let order = body(parse(&[b"--to", b"/r\xff", b"--set-id", b"--wait"]));
        assert_eq!(order.items, [ID]);
        assert_eq!(order.to_b64.as_deref(), Some("L3L/"));
        assert!(order.set_id && !order.terms.dry_run);
        let order = body(parse(&[b"--dry-run"]));
        assert!(order.to_b64.is_none() && !order.set_id && order.terms.dry_run);
    }
}
