//! The command line: bootstrap only, never a second way to the data.

mod rotation;

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::{Context as _, bail};
use clap::{CommandFactory as _, Parser, Subcommand};
use tm_api::account::Role;
use tm_protocol::{
    ids::{FleetId, Sha256},
    log::{Format, Lines},
};

use crate::{
    access,
    agents::{
        authorities::{self, Authorities},
        ca::{Authority, DEFAULT_LIFE},
    },
    backup::{self, Places, Verified},
    config::{self, Config},
    forward::Exporter,
    patterns::trust::OnlineKeys,
    server,
    store::{Store, schema::Version},
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
        /// The folder for the bytes of patterns [default: `patterns` in the folder]
        #[arg(long, value_name = "DIR")]
        patterns: Option<PathBuf>,
        /// Become another manager of a fleet: its authority, the folder `ca` of a manager that there is, copied here
        /// over a channel that nobody listens to. Needs the fleet's PostgreSQL and patterns' folder
        #[arg(long, value_name = "CA-DIR", requires = "database", requires = "patterns")]
        join: Option<PathBuf>,
    },
    /// Run
    Serve {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Bring the database to this version's schema
    ///
    /// `serve` does so too, unless another manager works on the database.
    Migrate {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Copy everything that a manager is into one file, while it runs: database, patterns, keys, configuration
    ///
    /// The file holds the fleet's keys: only its owner can read it, and so it should stay.
    Backup {
        /// The file, which must not exist
        file: PathBuf,
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Make a manager of a copy, in a new folder and an empty database
    ///
    /// Agents that went on since tell again what they have done, and do nothing twice. What was enrolled since is not
    /// known, and enrolls again; what enrollment tokens were used for since is forgotten: revoke those that are open.
    Restore {
        /// The file that `backup` made
        file: PathBuf,
        /// The new folder
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
        /// Another database than the copy's configuration names
        #[arg(long, value_name = "URL")]
        database: Option<String>,
    },
    /// Say whether the configuration is right
    CheckConfig {
        /// The folder that `init` made
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tm-manager")]
        data: PathBuf,
    },
    /// Let one certificate authority follow another, step by step
    #[command(subcommand)]
    Ca(rotation::Ca),
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
        Command::Init { data, agent_listen, admin_listen, public_name, database, patterns, join } => {
            let new = New {
                data,
                agent: agent_listen,
                admin: admin_listen,
                names: public_name,
                database,
                patterns,
            };
            init(new, join.as_deref())
        }
        Command::Serve { data } => return serve(&data),
        Command::Backup { file, data } => backup(&file, &data),
        Command::Restore { file, data, database } => restore(&file, &data, database.as_deref()),
        Command::Migrate { data } => migrate(&data),
        Command::CheckConfig { data } => check(&data),
        Command::Ca(step) => rotation::run(step),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tm-manager", &mut io::stdout());
            Ok(())
        }
        Command::Man { dir } => {
            clap_mangen::generate_to(Cli::command(), dir).context("cannot write manual pages")
        }
    };
    finish(done)
}

fn finish(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What a new manager is to be.
struct New {
    data: PathBuf,
    agent: SocketAddr,
    admin: SocketAddr,
    names: Vec<String>,
    database: Option<String>,
    patterns: Option<PathBuf>,
}

fn init(mut new: New, join: Option<&Path>) -> anyhow::Result<()> {
    new.check()?;
    let data = new.data.as_path();
    DirBuilder::new().recursive(true).mode(0o700).create(data).context("cannot make the data folder")?;
    let url = new.database.clone().unwrap_or_else(|| default_database(data));
    let shown = data.display();
    match join {
        None => {
            let authority =
                Authority::create(&data.join("ca")).context("cannot make the certificate authority")?;
            let token = first_account(&url, &authority)?;
            let profile = format!(
                "url = \"https://{}\"\nca_sha256 = \"{}\"\ntoken = \"{token}\"\n",
                new.reach(),
                authority.digest()
            );
            write_secret(&data.join("admin.toml"), &profile)?;
        }
        Some(from) => {
            let existing =
                Authorities::load(from, DEFAULT_LIFE).context("there is no authority to join with")?;
            let fleet = existing.fleet();
            joinable(&url, fleet)?;
            authorities::join(&data.join("ca"), from)
                .context("cannot take the certificate authority over")?;
            // It lies beside `ca`, and managers of one fleet sign as one.
            if let Some(keys) = from.parent().map(|folder| folder.join("trust")).filter(|keys| keys.is_dir())
            {
                OnlineKeys::join(&data.join("trust"), &keys)?;
            }
        }
    }
    // The configuration comes last: a folder with one is complete.
    let config =
        config::render(new.agent, new.admin, &new.names, new.database.as_deref(), new.patterns.as_deref());
    write_secret(&data.join("manager.toml"), &config)?;
    let next = match join {
        None => format!(
            "Then, to talk to it: export TMCTL_PROFILE={shown}/admin.toml\n                     \
             tmctl pattern trust init      (on a desk: it makes the keys that sign patterns)\n                     \
             tmctl token create --uses 10"
        ),
        Some(_) if !data.join("trust").is_dir() => format!(
            "First, copy the folder `trust` of the manager that there is to {shown}/trust: managers of a fleet sign as one."
        ),
        Some(_) => format!(
            "Administrators are those of the fleet: a profile for it is another manager's with\n                     \
             url = \"https://{}\"",
            new.reach()
        ),
    };
    let _ = writeln!(
        io::stderr(),
        "A new manager is in {shown}.\n\nStart it:           tm-manager serve --data {shown}\n{next}"
    );
    Ok(())
}

impl New {
    fn check(&mut self) -> anyhow::Result<()> {
        if self.data.join("manager.toml").exists() {
            let shown = self.data.display();
            bail!("`{shown}` already holds a manager; start it with `tm-manager serve`");
        }
        if self.agent.port() == 0 || self.admin.port() == 0 {
            bail!("port 0 is not an address that agents could be told");
        }
        if let Some(wrong) = self.names.iter().find(|name| config::public_name(name).is_none()) {
            bail!("`{}` is not {}", wrong.escape_debug(), config::expected_name(wrong));
        }
        if self.patterns.as_ref().is_some_and(|folder| !folder.is_absolute()) {
            bail!("the folder for patterns is to be named from the root (`/…`)");
        }
        if self.names.is_empty() {
            self.names.push(if self.agent.ip().is_loopback() {
                self.agent.ip().to_string()
            } else {
                hostname().context("cannot tell the host name; give --public-name")?
            });
        }
        Ok(())
    }

    /// Where administrators on this machine reach it.
    fn reach(&self) -> SocketAddr {
        match self.admin.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => {
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.admin.port())
            }
            // Such a socket takes IPv4 too, unless the system says otherwise; IPv6 it takes always.
            IpAddr::V6(ip) if ip.is_unspecified() => {
                SocketAddr::new(Ipv6Addr::LOCALHOST.into(), self.admin.port())
            }
            IpAddr::V4(_) | IpAddr::V6(_) => self.admin,
        }
    }
}

/// Makes the database and the first account of a new fleet; the account's token.
fn first_account(url: &str, authority: &Authority) -> anyhow::Result<String> {
    let bytes: [u8; 32] = rand::random();
    let token = access::bearer_token(bytes);
    let digest = Sha256::of(token.as_bytes());
    let created = runtime()?.block_on(async {
        let store = Store::open(url).await?;
        let created = match store.create_first_account("admin", Role::Administrator, digest, now_ms()).await {
            Ok(true) => store.claim_fleet(authority.fleet).await,
            other => other,
        };
        store.close().await;
        created
    })?;
    if !created {
        bail!("the database already belongs to a manager");
    }
    Ok(token)
}

/// Whether another manager of `fleet` may work on a database.
fn joinable(url: &str, fleet: FleetId) -> anyhow::Result<()> {
    let (is_shared, found) = runtime()?.block_on(async {
        let store = Store::open(url).await?;
        let found = store.fleet().await;
        store.close().await;
        Ok::<_, anyhow::Error>((store.is_shared(), found?))
    })?;
    if !is_shared {
        bail!("several managers need PostgreSQL; SQLite has one");
    }
    match found {
        Some(found) if found == fleet.to_string() => Ok(()),
        Some(found) => bail!("the database belongs to the fleet {found}, the authority to {fleet}"),
        None => bail!("the database belongs to no fleet yet: start its first manager first"),
    }
}

fn serve(data: &Path) -> ExitCode {
    let config = match load(data) {
        Ok(config) => config,
        Err(error) => return finish(Err(error)),
    };
    let format = config.log_format;
    if let Err(error) = log(&config.log, format) {
        return finish(Err(error));
    }
    let done = runtime().and_then(|runtime| runtime.block_on(server::run(data, config)));
    match (done, format) {
        (Err(error), Format::Json) => {
            // Whoever reads objects gets the last word as one, too.
            tracing::error!(error = %format!("{error:#}"), "The manager fails.");
            ExitCode::FAILURE
        }
        (done, _) => finish(done),
    }
}

/// Logs what passes `filter` (or, if it is set, the environment's) on standard error.
fn log(filter: &str, format: Format) -> anyhow::Result<()> {
    let filter = std::env::var("TM_LOG").unwrap_or_else(|_| filter.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(filter).context("the log filter makes no sense")?;
    let lines = move || Lines::new(io::stderr(), format);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines).with_ansi(false);
    match format {
        Format::Text => builder.init(),
        Format::Json => {
            builder.json().with_current_span(false).with_span_list(false).init();
            std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "A thread panicked.")));
        }
    }
    Ok(())
}

fn migrate(data: &Path) -> anyhow::Result<()> {
    let config = load(data)?;
    let url = config.database.unwrap_or_else(|| default_database(data));
    // One thread: there is one thing to do after the other.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let before = runtime.context("cannot start")?.block_on(async {
        let store = Store::connect(&url).await?;
        let before = store.migrate().await;
        store.close().await;
        before
    })?;
    let _ = writeln!(
        io::stdout(),
        "The database has the schema {} (before: {before}).",
        Version::of_this_program()
    );
    Ok(())
}

fn backup(file: &Path, data: &Path) -> anyhow::Result<()> {
    let config = load(data)?;
    let url = config.database.clone().unwrap_or_else(|| default_database(data));
    let patterns = config.patterns(data);
    let sum = runtime()?.block_on(async {
        let store = Store::connect(&url).await?;
        let sum = backup::write(&store, Places { data, patterns: &patterns }, file, now_ms()).await;
        store.close().await;
        anyhow::Ok(sum?)
    })?;
    let _ = writeln!(
        io::stdout(),
        "{} holds {} rows, {} patterns, the keys and the configuration. Whoever has it has the fleet: keep it so.",
        file.display(),
        sum.rows,
        sum.patterns
    );
    Ok(())
}

fn restore(file: &Path, data: &Path, database: Option<&str>) -> anyhow::Result<()> {
    if data.join("manager.toml").exists() {
        bail!("`{}` holds a manager; a copy is restored into a new folder", data.display());
    }
    let copy = Verified::open(file)?;
    let text = match database {
        Some(url) => config::with_database(&copy.config, url),
        None => copy.config.clone(),
    };
    let config = Config::parse(&text).context("the copy's configuration is not one of this version")?;
    let url = config.database.clone().unwrap_or_else(|| default_database(data));
    let patterns = config.patterns(data);
    DirBuilder::new().recursive(true).mode(0o700).create(data).context("cannot make the data folder")?;
    let sum = runtime()?.block_on(async {
        let store = Store::connect(&url).await?;
        let sum = copy.restore(&store, Places { data, patterns: &patterns }, &text).await;
        store.close().await;
        anyhow::Ok(sum?)
    })?;
    let at =
        jiff::Timestamp::from_millisecond(sum.at_ms).map_or_else(|_| "?".to_owned(), |at| at.to_string());
    let _ = writeln!(
        io::stdout(),
        "{} is a manager as it was at {at}: {} rows, {} patterns.\nStart it: tm-manager serve --data {}",
        data.display(),
        sum.rows,
        sum.patterns,
        data.display()
    );
    Ok(())
}

fn check(data: &Path) -> anyhow::Result<()> {
    let config = load(data)?;
    let authorities = Authorities::load(&data.join("ca"), config.certificate_life)
        .context("the certificate authority cannot be used")?;
    for export in &config.exports {
        Exporter::open(export, authorities.fleet())?;
    }
    let _ = writeln!(
        io::stdout(),
        "The configuration is right: agents connect to {}, administrators to {}.\n{}",
        config.agent_listen,
        config.admin_listen,
        config.limits.explain()
    );
    Ok(())
}

/// Reads the configuration of the manager in `data`.
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

/// Threads for the store.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")
}

/// Writes a file that does not exist and that only its owner reads.
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
