//! `tm-manager ca`: one certificate authority follows another, step by step, beside a running manager.
//!
//! **Invariant:** an authority that an agent still hangs on is not retired, unless that is asked for; whoever is cut off
//! by it is named.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use tm_protocol::{ids::Sha256, text::escape_for_display};

use super::{default_database, load, runtime, write_secret};
use crate::{
    agents::{
        authorities::{self, Authorities},
        now_ms,
    },
    config::Config,
    store::{Store, expiry::ExpiryRow},
};

/// Names that are shown at most.
const SHOWN: usize = 50;

/// Steps of a rotation.
#[derive(Debug, Subcommand)]
pub(crate) enum Ca {
    /// List the authorities that are trusted, the oldest first, and how many agents hang on each
    List {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// First step: make another authority. Agents learn it over their sessions; it issues nothing yet
    Add {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Second step: let the newest authority issue. Connected agents renew under it by themselves
    Switch {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Last step: end the trust in the oldest authority. Refused while agents hang on it; they are named
    Retire {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
        /// Cut off the agents that still hang on it; they have to be enrolled anew
        #[arg(long)]
        force: bool,
    },
}

/// Takes a step.
pub(crate) fn run(step: Ca) -> anyhow::Result<()> {
    match step {
        Ca::List { data } => list(&data),
        Ca::Add { data } => {
            let config = load(&data)?;
            let made = authorities::add(&data.join("ca"), config.certificate_life)?;
            record(&data, &config, "ca.add", made, false)?;
            say(&format!(
                "The authority {made} is made; connected agents trust it within seconds, others when they come back.\n\
                 Next: tm-manager ca switch"
            ))
        }
        Ca::Switch { data } => {
            let config = load(&data)?;
            let issuing = authorities::switch(&data.join("ca"), config.certificate_life)?;
            record(&data, &config, "ca.switch", issuing, false)?;
            say(&format!(
                "The authority {issuing} issues now; connected agents renew under it, others when they come back.\n\
                 New profiles of tmctl need: ca_sha256 = \"{issuing}\" (older ones work until the older authority is \
                 retired)\nNext, when `tm-manager ca list` shows no agent on the older one: tm-manager ca retire"
            ))
        }
        Ca::Retire { data, force } => retire(&data, force),
    }
}

fn list(data: &Path) -> anyhow::Result<()> {
    let config = load(data)?;
    let present = Authorities::load(&data.join("ca"), config.certificate_life)?;
    let mut text = String::new();
    for authority in present.all() {
        let agents = hanging(data, &config, authority.digest())?.len();
        let issues = if authority.digest() == present.issuing().digest() { "issues " } else { "trusted" };
        let ends = jiff::Timestamp::from_millisecond(authority.validity_ms.1)
            .map(|at| format!("{at:.0}"))
            .unwrap_or_default();
        text.push_str(&format!("{}  {issues}  ends {ends}  agents: {agents}\n", authority.digest()));
    }
    say(text.trim_end())
}

fn retire(data: &Path, force: bool) -> anyhow::Result<()> {
    let config = load(data)?;
    let folder = data.join("ca");
    let oldest = authorities::retirable(&folder, config.certificate_life)?;
    let rows = hanging(data, &config, oldest)?;
    let mut names = String::new();
    for row in rows.iter().take(SHOWN) {
        let seen = row
            .last_seen_ms
            .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
            .map_or_else(|| "never".to_owned(), |at| format!("{at:.0}"));
        let away = if row.connected { "connected" } else { "away" };
        let host = escape_for_display(&row.host);
        names.push_str(&format!("  {host} ({}), {away}, last seen {seen}\n", row.endpoint));
    }
    if rows.len() > SHOWN {
        names.push_str(&format!("  and {} more\n", rows.len() - SHOWN));
    }
    if !rows.is_empty() && !force {
        bail!(
            "{} agents still hang on the authority {oldest}:\n{names}wait until they have come back, or cut them off \
             with --force; they then have to be enrolled anew",
            rows.len()
        );
    }
    // First nothing of it is good any more, then it is no longer trusted: if this is cut between, it is done again.
    record(data, &config, "ca.retire", oldest, true)?;
    let issuing = authorities::retire(&folder, config.certificate_life)?;
    update_profile(&data.join("admin.toml"), oldest, issuing)?;
    let mut text = format!(
        "The authority {oldest} is trusted no more, and its key is removed. Enrollment tokens from before the switch are \
         good for nothing now.\nProfiles of tmctl need: ca_sha256 = \"{issuing}\""
    );
    if !rows.is_empty() {
        text.push_str(&format!("\nThese have to be enrolled anew:\n{}", names.trim_end()));
    }
    say(&text)
}

/// The profile that `init` wrote follows, if it still is what it was.
fn update_profile(path: &Path, from: Sha256, to: Sha256) -> anyhow::Result<()> {
    let Ok(text) = fs::read_to_string(path) else { return Ok(()) };
    let (from, to) = (from.to_string(), to.to_string());
    if !text.contains(&from) {
        return Ok(());
    }
    let new = path.with_extension("toml.new");
    let _ = fs::remove_file(&new);
    write_secret(&new, &text.replace(&from, &to))?;
    fs::rename(&new, path).with_context(|| format!("cannot write `{}`", path.display()))
}

fn hanging(data: &Path, config: &Config, authority: Sha256) -> anyhow::Result<Vec<ExpiryRow>> {
    let first = Authorities::load(&data.join("ca"), config.certificate_life)?;
    let oldest = first.all().first().map(|authority| authority.digest());
    with_store(data, config, async |store| {
        if let Some(oldest) = oldest {
            store.attribute_certificates(oldest).await?;
        }
        Ok(store.hanging_on(authority, now_ms()).await?)
    })
}

fn record(
    data: &Path,
    config: &Config,
    action: &'static str,
    authority: Sha256,
    retired: bool,
) -> anyhow::Result<()> {
    with_store(data, config, async |store| Ok(store.rotated(action, authority, retired, now_ms()).await?))
}

fn with_store<T>(
    data: &Path,
    config: &Config,
    work: impl AsyncFnOnce(&Store) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let url = config.database.clone().unwrap_or_else(|| default_database(data));
    runtime()?.block_on(async {
        let store = Store::open(&url).await?;
        let done = work(&store).await;
        store.close().await;
        done
    })
}

fn say(text: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{text}").context("cannot write")
}
