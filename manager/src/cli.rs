//! The command line: bootstrap only, never a second way to the data.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::{Context as _, bail};
use clap::{CommandFactory as _, Parser, Subcommand};
use tm_api::account::Role;
use tm_protocol::ids::Sha256;

use crate::{
    access,
    agents::ca::Authority,
    config::{self, Config},
    server,
    store::Store,
};

/// Decides, queues, stores and shows; agents and tmctl connect to it.
#[derive(Debug, Parser)]
#[command(name = "tm-manager", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new manager: certificate authority, configuration, first administrator
    Init {
        /// The folder for everything this manager keeps
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
        /// Where agents connect
        #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:4433")]
        agent_listen: SocketAddr,
        /// Where administrators connect
        #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:4434")]
        admin_listen: SocketAddr,
        /// A name or IP under which agents reach this manager, with a port if another than it listens on (may
        /// be given several times)
        #[arg(long, value_name = "NAME[:PORT]")]
        public_name: Vec<String>,
        /// The database [default: sqlite in the folder]
        #[arg(long, value_name = "URL")]
        database: Option<String>,
    },
    /// Run
    Serve {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Say whether the configuration is right
    CheckConfig {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    #[command(hide = true)]
    ScanWorker,
    /// Print a completion script for a shell
    Completions {
        /// The shell to complete in
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: PathBuf,
    },
}

/// Reads the command line and does what it says.
pub(crate) fn run() -> ExitCode {
    let done = match Cli::parse().command {
        Command::ScanWorker => return tm_scanner::worker::main(),
        Command::Init { data, agent_listen, admin_listen, public_name, database } => {
            init(&data, agent_listen, admin_listen, public_name, database.as_deref())
        }
        Command::Serve { data } => serve(&data),
        Command::CheckConfig { data } => check(&data),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tm-manager", &mut io::stdout());
            Ok(())
        }
        Command::Man { dir } => {
            clap_mangen::generate_to(Cli::command(), dir).context("cannot write manual pages")
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn init(
    data: &Path,
    agent: SocketAddr,
    admin: SocketAddr,
    mut names: Vec<String>,
    database: Option<&str>,
) -> anyhow::Result<()> {
    if data.join("manager.toml").exists() {
        bail!("`{}` already holds a manager; start it with `tm-manager serve`", data.display());
    }
    if agent.port() == 0 || admin.port() == 0 {
        bail!("port 0 is not an address that agents could be told");
    }
    if let Some(wrong) = names.iter().find(|name| config::public_name(name).is_none()) {
        bail!("`{}` is not a host name or an IP address, with or without a port", wrong.escape_debug());
    }
    if names.is_empty() {
        names.push(if agent.ip().is_loopback() {
            agent.ip().to_string()
        } else {
            hostname().context("cannot tell the host name; give --public-name")?
        });
    }
    DirBuilder::new().recursive(true).mode(0o700).create(data).context("cannot make the data folder")?;
    let authority = Authority::create(&data.join("ca")).context("cannot make the certificate authority")?;
    let bytes: [u8; 32] = rand::random();
    let token = access::bearer_token(bytes);
    let url = database.map_or_else(|| default_database(data), ToOwned::to_owned);
    let created = runtime()?.block_on(async {
        let store = Store::open(&url).await?;
        let created = store
            .create_first_account("admin", Role::Administrator, Sha256::of(token.as_bytes()), now_ms())
            .await;
        store.close().await;
        created
    })?;
    if !created {
        bail!("the database already belongs to a manager");
    }
    let reach = if admin.ip().is_unspecified() {
        SocketAddr::new([127, 0, 0, 1].into(), admin.port())
    } else {
        admin
    };
    let profile =
        format!("url = \"https://{reach}\"\nca_sha256 = \"{}\"\ntoken = \"{token}\"\n", authority.digest());
    write_secret(&data.join("admin.toml"), &profile)?;
    // The configuration comes last: a folder with one is complete.
    write_secret(&data.join("manager.toml"), &config::render(agent, admin, &names, database))?;
    let mut out = io::stderr();
    let shown = data.display();
    let _ = writeln!(
        out,
        "A new manager is in {shown}.\n\nStart it:           tm-manager serve --data {shown}\n\
         Then, to talk to it: export TMCTL_PROFILE={shown}/admin.toml\n                     \
         tmctl pattern trust init      (on a desk: it makes the keys that sign patterns)\n                     \
         tmctl token create --uses 10"
    );
    Ok(())
}

fn serve(data: &Path) -> anyhow::Result<()> {
    let config = load(data)?;
    let filter =
        tracing_subscriber::EnvFilter::try_new(std::env::var("TM_LOG").as_deref().unwrap_or(&config.log))
            .context("the log filter makes no sense")?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    runtime()?.block_on(server::run(data, config))
}

fn check(data: &Path) -> anyhow::Result<()> {
    let config = load(data)?;
    Authority::load(&data.join("ca")).context("the certificate authority cannot be used")?;
    let _ = writeln!(
        io::stdout(),
        "The configuration is right: agents connect to {}, administrators to {}.\n{}",
        config.agent_listen,
        config.admin_listen,
        config.limits.explain()
    );
    Ok(())
}

fn load(data: &Path) -> anyhow::Result<Config> {
    let path = data.join("manager.toml");
    if !path.exists() {
        bail!("there is no manager in `{}`; `tm-manager init` makes one", data.display());
    }
    Ok(Config::load(&path)?)
}

/// The database where the configuration names none.
pub(crate) fn default_database(data: &Path) -> String {
    format!("sqlite:{}", data.join("manager.db").display())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot create `{}`", path.display()))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write `{}`", path.display()))
}

fn hostname() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/hostname").ok()?.trim().to_owned())
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
