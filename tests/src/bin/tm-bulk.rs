//! `tm-bulk`: many agents in one process that fetch what they are told to, for benches.
//!
//! `tm-bulk ADDRESS TOKEN-FILE AGENTS` enrolls so many agents and says `ready`. Then, for each line of its input:
//! `get PATH SIZE`: all fetch it at once; it says `got BYTES LOST MILLISECONDS`, of all together, when the last is
//! done. `delta NEW OLD`: one asks for the delta between two patterns and fetches it; it says `delta BYTES`, or
//! `delta none`. It ends with its input.

use std::{
    env, fs,
    io::{self, BufRead as _, Write as _},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use rustls::ClientConfig;
use tm_protocol::ids::Sha256;
use tm_tests::bulk::{self, BulkLink};
use tokio::task::JoinSet;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.context("cannot start threads").and_then(|runtime| runtime.block_on(run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [at, token, agents] = args.as_slice() else { bail!("usage: tm-bulk ADDRESS TOKEN-FILE AGENTS") };
    let at: SocketAddr = at.parse().context("the first argument is no address with a port")?;
    let token = fs::read_to_string(token).context("cannot read the token's file")?;
    let agents: u32 = agents.parse().context("the third argument is no number")?;
    ensure!(agents > 0, "there is nothing to do");
    let mut fleet = Vec::new();
    for number in 0..agents {
        let identity = bulk::enroll(at, token.trim(), &format!("bulk-{number:05}")).await?;
        fleet.push(bulk::config(&identity)?);
    }
    say("ready")?;
    for line in io::stdin().lock().lines() {
        let line = line.context("cannot read what to do")?;
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["get", path, size] => {
                say(&get(at, &fleet, path, size.parse().context("no size")?).await)?;
            }
            ["delta", new, old] => {
                let one = fleet.first().context("there is an agent")?;
                say(&delta(at, Arc::clone(one), new, old).await?)?;
            }
            _ => bail!("`{line}` is nothing that can be done"),
        }
    }
    Ok(())
}

async fn get(at: SocketAddr, fleet: &[Arc<ClientConfig>], path: &str, size: u64) -> String {
    let (begin, mut fetches, mut bytes, mut lost) = (Instant::now(), JoinSet::new(), 0, 0);
    for (number, config) in (0..).zip(fleet) {
        let (config, path) = (Arc::clone(config), path.to_owned());
        fetches.spawn(async move { bulk::fetch(at, config, &path, size, number).await });
    }
    while let Some(fetched) = fetches.join_next().await {
        match fetched {
            Ok(Ok(())) => bytes += size,
            Ok(Err(_)) | Err(_) => lost += 1,
        }
    }
    format!("got {bytes} {lost} {}", begin.elapsed().as_millis())
}

async fn delta(at: SocketAddr, config: Arc<ClientConfig>, new: &str, old: &str) -> anyhow::Result<String> {
    let mut link = BulkLink::connect(at, config).await?;
    let offer = link.ask(&format!("GET /v1/patterns/{new}/deltas?from={old}"), "", &[]).await?;
    if offer.status == 404 {
        return Ok("delta none".to_owned());
    }
    let text = String::from_utf8(offer.body).context("an offer is text")?;
    let digest: Sha256 = text.split(' ').nth(1).context("an offer names a delta")?.parse()?;
    let delta = link.ask(&format!("GET /v1/deltas/{digest}"), "", &[]).await?;
    ensure!(delta.status == 200 && Sha256::of(&delta.body) == digest, "the delta is not what was offered");
    Ok(format!("delta {}", delta.body.len()))
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").context("cannot print")
}
