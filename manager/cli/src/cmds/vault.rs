//! `tmctl vault`: lists removed files and orders them back.

use std::os::unix::ffi::OsStrExt as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::task::{self, VaultItemView, VaultQuery};
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
    let tasks = ordered::send(client, &["restores"], &body(args)).await?;
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
    use serde_json::json;

    use super::*;
    use crate::{
        cli::{Cli, Command},
        output::Format,
        testing::Scripted,
    };

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

    fn view(number: u32) -> VaultItemView {
        VaultItemView {
            id: format!("v{number}"),
            endpoint: "e".into(),
            host: "web".into(),
            path: "/srv/x".into(),
            path_b64: String::new(),
            sha256: String::new(),
            size: 1,
            vaulted_at: String::new(),
        }
    }

    #[tokio::test]
    async fn a_list_goes_on_until_there_is_no_more_or_enough() {
        // 1500 items, newest first.
        let manager = Scripted::start(|asked| {
            let field = |name| asked.line.split(['?', '&']).find_map(|part| part.strip_prefix(name));
            let first: u32 = field("before=v").map_or(0, |last| last.parse::<u32>().unwrap() + 1);
            let limit: u32 = field("limit=").unwrap().parse().unwrap();
            assert!((1..=ROWS).contains(&limit) && asked.line.contains("endpoint=web"), "{}", asked.line);
            let page: Vec<VaultItemView> = (first..(first + limit).min(1500)).map(view).collect();
            Some((200, json!(page)))
        })
        .await;
        for (limit, count, more, requests) in
            [(10, 10, true, 1), (1200, 1200, true, 2), (5000, 1500, false, 2)]
        {
            let before = manager.lines().len();
            let (items, is_more) = list(Some("web".into()), limit, &manager.client).await.unwrap();
            let ids: std::collections::BTreeSet<&str> = items.iter().map(|item| item.id.as_str()).collect();
            assert_eq!((items.len(), ids.len(), is_more), (count, count, more), "{limit}");
            assert_eq!(manager.lines().len() - before, requests, "{limit}");
        }
    }

    #[tokio::test]
    async fn pages_that_lead_in_a_circle_end() {
        let page: Vec<VaultItemView> = (0..1000).map(view).collect();
        let manager = Scripted::start(move |_| Some((200, json!(page)))).await;
        let failure = list(None, 100_000, &manager.client).await.unwrap_err();
        assert!(matches!(failure, Failure::EndlessPages(_)), "{failure:?}");
        assert_eq!(manager.lines().len(), 2);
    }

    #[tokio::test]
    async fn another_place_is_for_one_file() {
        let manager = Scripted::start(|_| Some((500, json!({})))).await;
        let out = Output::kept(Format::Table);
        let command = Vault::Restore(Box::new(parse(&[ID.as_bytes(), b"--to", b"/x"])));
        let failure = run(command, &manager.client, &out).await.unwrap_err();
        assert_eq!(failure.exit().code(), 2);
        assert!(manager.lines().is_empty());
    }
}
