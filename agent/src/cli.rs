//! The command line: what is asked for, and which room answers.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::Arc,
};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum, error::ErrorKind};
use tm_protocol::{
    log::{Format, Lines},
    text::escape_for_display,
    token::EnrollmentToken,
};
use zeroize::Zeroizing;

use crate::{
    config::Config,
    connection::{fetch, trust},
    daemon::{self, Status},
    doctor, enroll, local,
    paths::Paths,
    scan::standalone,
    vault,
};

/// Finds malicious software on this endpoint.
#[derive(Debug, Parser)]
#[command(name = "tm-agent", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct DataFolder {
    /// The agent's state folder
    #[arg(long, value_name = "DIR", default_value = local::DATA)]
    data: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a fleet: make a key here and have a manager certify it
    #[command(long_about = "Join a fleet: make a key here and have a manager certify it.\n\n\
            An administrator makes the token with `tmctl token create`. It names the manager, how to know it, \
            and the secret that lets this endpoint in.\n\n\
            Example:\n  tm-agent enroll --token-file token.txt")]
    Enroll {
        #[command(flatten)]
        folder: DataFolder,
        /// The enrollment token (visible to other users of this machine while the command runs)
        #[arg(long, value_name = "TOKEN", conflicts_with = "token_file")]
        token: Option<String>,
        /// A file that holds the token; `-` or nothing at all reads standard input
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// The HTTP proxy to reach the managers through, now and afterwards (`http://[user:password@]host:port`;
        /// visible to other users of this machine while the command runs). It is kept in the state folder's
        /// agent.toml as `proxy`; without this option what stands there counts, and no environment variable does
        #[arg(long, value_name = "URL")]
        proxy: Option<String>,
    },
    /// Run the agent
    Run {
        #[command(flatten)]
        folder: DataFolder,
        /// Where users' scans come in [default: /run/tm-agent/scan.sock, or DIR/scan.sock with another --data DIR]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Show whether the agent runs, and its link to the manager
    Status {
        #[command(flatten)]
        folder: DataFolder,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = StatusFormat::Text)]
        output: StatusFormat,
    },
    /// Look at files with patterns
    #[command(long_about = "Look at files with patterns.\n\n\
            Every user may scan what he can read. The running agent looks at the files, with all patterns that it \
            holds; this command opens them, so the agent sees nothing that the user could not. What is found is \
            told here and nowhere else, and nothing is done about it.\n\n\
            With --standalone neither the running agent nor a manager is needed: the patterns are named by \
            --pattern.\n\n\
            Exit code: 0 clean, 1 something was detected, 2 not everything could be looked at (or an error), \
            64 the call makes no sense.\n\n\
            Examples:\n  \
            tm-agent scan ~/Downloads\n  \
            tm-agent scan -o json /srv > found.json\n  \
            tm-agent scan --standalone --pattern rules.yar /srv")]
    Scan(Box<standalone::Args>),
    /// Try patterns without using them
    #[command(subcommand)]
    Pattern(PatternCommand),
    /// Keep removed files, and put them back
    #[command(subcommand)]
    Vault(vault::standalone::Command),
    /// Try what this machine offers, and say what is missing
    #[command(long_about = "Try what this machine offers, and say what is missing.\n\n\
            Starts a scan worker, as this user, and prints every part of its sandbox. As root it shows what \
            the running agent has. If a proxy is set, it asks the proxy for a way to a manager.\n\n\
            Exit code: 0 nothing is missing, 1 something is.\n\n\
            Example:\n  tm-agent doctor -o json")]
    Doctor {
        #[command(flatten)]
        folder: DataFolder,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = doctor::Format::Text)]
        output: doctor::Format,
    },
    #[command(hide = true)]
    ScanWorker {
        /// Tells whose worker it is; it means nothing to the worker
        #[arg(long)]
        mark: Option<String>,
    },
    #[command(hide = true)]
    ScanSession {
        #[command(flatten)]
        folder: DataFolder,
    },
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

#[derive(Debug, Subcommand)]
enum PatternCommand {
    /// Say what a pattern would load, or where it is wrong
    Check(standalone::CheckArgs),
}

/// Reads the command line and does what it says.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
                ExitCode::SUCCESS
            } else if std::env::args_os().nth(1).is_some_and(|verb| verb == "scan") {
                ExitCode::from(standalone::EXIT_USAGE)
            } else {
                ExitCode::from(2)
            };
        }
    };
    match cli.command {
        Command::Scan(args) if args.standalone => standalone::run(&args),
        Command::Scan(args) => local::scan(&args),
        Command::Pattern(PatternCommand::Check(args)) => standalone::check(&args),
        Command::Vault(command) => vault::standalone::run(&command),
        Command::Enroll { folder, token, token_file, proxy } => {
            finish(enroll_here(folder.data, token, token_file.as_deref(), proxy))
        }
        Command::Run { folder, socket } => {
            let socket = socket.unwrap_or_else(|| local::socket_of(&folder.data));
            finish(run_daemon(folder.data, &socket))
        }
        Command::Status { folder, output } => match status(&Paths::new(folder.data), output) {
            Ok(code) => code,
            Err(error) => finish(Err(error)),
        },
        Command::Doctor { folder, output } => doctor::run(&Paths::new(folder.data), output),
        Command::ScanWorker { mark: _ } => tm_scanner::worker::main(),
        Command::ScanSession { folder } => finish(serve_user(folder.data)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tm-agent", &mut io::stdout());
            ExitCode::SUCCESS
        }
        Command::Man { dir } => {
            finish(clap_mangen::generate_to(Cli::command(), dir).context("cannot write manual pages"))
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StatusFormat {
    Text,
    Json,
}

fn finish(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {}", escape_for_display(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn enroll_here(
    data: PathBuf,
    token: Option<String>,
    file: Option<&Path>,
    proxy: Option<String>,
) -> anyhow::Result<()> {
    let text = match (token, file) {
        (Some(token), _) => token,
        (None, Some(file)) if file != Path::new("-") => fs::read_to_string(file)
            .with_context(|| format!("cannot read the token from `{}`", file.display()))?,
        (None, _) => {
            let mut text = String::new();
            io::stdin()
                .take(64 << 10)
                .read_to_string(&mut text)
                .context("cannot read the token from standard input")?;
            text
        }
    };
    let token: EnrollmentToken = text.parse()?;
    let paths = Paths::new(data);
    let way = match proxy.map(Zeroizing::new) {
        Some(setting) => {
            let proxy = setting.parse().context("--proxy")?;
            enroll::Way { proxy: Some(Arc::new(proxy)), setting: Some(setting) }
        }
        None => enroll::Way { proxy: Config::load(&paths)?.proxy, setting: None },
    };
    let endpoint = runtime()?.block_on(enroll::enroll(&paths, &token, &way))?;
    let _ = writeln!(io::stdout(), "{endpoint}");
    let shown = paths.root().display();
    let _ = writeln!(io::stderr(), "Enrolled as endpoint {endpoint}. Start it: tm-agent run --data {shown}");
    Ok(())
}

/// The scan of one user, in a process that the running agent starts.
fn serve_user(data: PathBuf) -> anyhow::Result<()> {
    let paths = Paths::new(data);
    log(&paths)?;
    local::serve(|| {
        let (mut patterns, left_out) = fetch::all_kept(&paths, local::MOST_PATTERN_BYTES);
        // What was fetched once and is no longer listed is withdrawn.
        let listed = trust::in_force(&paths);
        patterns.retain(|pattern| listed.as_ref().is_some_and(|set| set.lists(pattern.sha256())));
        local::Held { patterns, left_out }
    });
    Ok(())
}

/// Logs on standard error, as the settings say. Whether those are right is the daemon's business.
fn log(paths: &Paths) -> anyhow::Result<()> {
    let format = Config::load(paths).unwrap_or_default().log_format;
    let filter = std::env::var("TM_LOG").unwrap_or_else(|_| "info".to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(filter).context("TM_LOG is not a log filter")?;
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

fn run_daemon(data: PathBuf, socket: &Path) -> anyhow::Result<()> {
    let paths = Paths::new(data);
    log(&paths)?;
    let runtime = runtime()?;
    let done = runtime.block_on(daemon::run(paths, socket));
    // A scan that is being called off may take a moment; the agent's end does not wait for it.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    match done? {
        daemon::End::Told => Ok(()),
        daemon::End::Another => Err(begin_anew()).context("cannot begin anew"),
    }
}

/// Runs this program from its beginning, as the same process and as it was called. It returns only if it cannot.
fn begin_anew() -> io::Error {
    // The file may have been replaced meanwhile; what runs is then still there, under another name.
    let program = std::env::current_exe().ok().filter(|path| path.is_file());
    let program = program.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    process::Command::new(program).args(std::env::args_os().skip(1)).exec()
}

/// Prints what the running agent last wrote about itself.
fn status(paths: &Paths, format: StatusFormat) -> anyhow::Result<ExitCode> {
    let status: Option<Status> = if daemon::is_running(paths) {
        fs::read(paths.status()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok())
    } else {
        None
    };
    let Some(status) = status else {
        anyhow::bail!(
            "the agent is not running in `{}`; start it with `tm-agent run`",
            paths.root().display()
        );
    };
    let text = match format {
        StatusFormat::Json => serde_json::to_string_pretty(&status)?,
        StatusFormat::Text => {
            let link = match &status.manager {
                Some(manager) => format!("connected to {manager} since {}", status.since),
                None => format!("disconnected since {}", status.since),
            };
            let link = match &status.proxy {
                Some(proxy) => format!("{link}, through the proxy {proxy}"),
                None => link,
            };
            let failure = status.last_failure.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
            escape_for_display(&format!(
                "endpoint {} (tm-agent {}, pid {})",
                status.endpoint, status.version, status.pid
            )) + "\nlink:         "
                + &escape_for_display(&link)
                + "\nlast failure: "
                + &escape_for_display(&failure)
                + "\nrunning task: "
                + status.running_task.as_deref().unwrap_or("none")
                + "\ncertificate:  until "
                + &escape_for_display(&status.certificate_ends)
                + &status.renewal_failure.as_ref().map_or_else(String::new, |why| {
                    format!("\n              not renewed: {}", escape_for_display(why))
                })
                + &status.settings_fault.as_ref().map_or_else(String::new, |why| {
                    format!("\nsettings:     not used: {}", escape_for_display(why))
                })
                + &status.clock_ahead_s.map_or_else(String::new, |ahead| {
                    format!("\nclock:        {ahead} s ahead of the manager's")
                })
        }
    };
    let _ = writeln!(io::stdout(), "{text}");
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")
}
