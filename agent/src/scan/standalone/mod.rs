//! `tm-agent scan` and `tm-agent pattern check`: the scan for a person at the endpoint. With `--standalone` neither
//! daemon nor manager is needed; without it, the files are looked at by somebody else ([`scan_with`]).
//!
//! **Invariant:** results go to standard output and nothing else does; the exit code says the verdict
//! (0 clean, 1 detected, 2 incomplete or error, 64 usage).

mod ahead;
mod paths;
mod progress;
mod report;
mod units;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tm_patterns::{Imported, InvalidPattern, Pattern, ReadError};
use tm_protocol::{
    ids::Sha256,
    report::{PathBytes, Verdict},
    task::{ScanLimits, ScanOptions},
};
use tm_scanner::{
    check::{CheckError, check_with as try_pattern},
    pool::{StartError, WorkerProgram},
};

use self::{
    ahead::Ahead,
    paths::PatternsAndPaths,
    progress::{Progress, Style, When, terminal_width},
    report::{Format, Report},
    units::{parse_duration_ms, parse_percent, parse_size},
};
use crate::scan::{
    Error, Order, all_cores, chain,
    hire::{Hire, OwnWorker},
    missing_line,
    past::{self, Past},
    problem_line, quote, run_with,
    seen::check_place,
};

/// Incomplete, or an error stood in the way.
pub(crate) const EXIT_INCOMPLETE: u8 = 2;
/// Where the agent of this machine keeps what its scans have cost.
const AGENT_COSTS: &str = "/var/lib/tm-agent/costs";
/// A call that makes no sense (sysexits.h, `EX_USAGE`).
pub(crate) const EXIT_USAGE: u8 = 64;
/// Where the agent with the usual data folder is spoken to.
pub(crate) const SOCKET: &str = "/run/tm-agent/scan.sock";

/// How often a terminal shows how far the scan is.
const LIVELY: Duration = Duration::from_millis(200);

/// What `tm-agent scan` is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Scan in this process, without the running agent and without a manager
    #[arg(long)]
    pub(crate) standalone: bool,
    /// Where the running agent is spoken to
    #[arg(long, value_name = "PATH", default_value = SOCKET, conflicts_with = "standalone")]
    pub(crate) socket: PathBuf,
    #[command(flatten)]
    what: PatternsAndPaths,
    /// How to print results
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    output: Format,
    /// Show how far it is: always (also without a value), never, or where somebody looks
    ///
    /// Where somebody looks: on a terminal one line, with the rate, and the time left once it is known how much
    /// there is; elsewhere a line every few seconds on standard error, but none beside -o json.
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        default_value_t = When::Auto,
        default_missing_value = "always",
        num_args = 0..=1,
        require_equals = true
    )]
    progress: When,
    /// Scanning threads, at most 4 by the running agent [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Go on into other file systems of this machine (without it they are skipped: other-filesystem)
    #[arg(long)]
    all_local: bool,
    /// Most CPU time, on average, in percent of one core (1 to 100)
    ///
    /// The scan then looks at files one by one, reads only what nobody else wants to read, and takes less while
    /// others wait for CPU, disk or memory (down to a quarter of N%). The time limit of one file grows with it.
    #[arg(long, value_name = "N%", value_parser = parse_percent, conflicts_with = "threads")]
    cpu: Option<u8>,
    /// Stay in the background: --cpu 10%
    #[arg(long, conflicts_with_all = ["cpu", "threads"])]
    background: bool,
    /// Look at what runs, what starts by itself, and where things are dropped
    ///
    /// Running programs, autostart places, /tmp, /var/tmp, /dev/shm, and in home folders what is executable or was
    /// changed within two weeks. PATHs are looked at besides.
    #[arg(long)]
    quick: bool,
    /// Look at every local file system; no PATH stands beside it
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// With --standalone: look at the memory of running processes, too
    #[arg(long)]
    processes: bool,
    /// With --standalone: remember in FILE which files are clean, and do not read them again until they or the patterns
    /// change
    ///
    /// What scans cost is remembered beside it, in FILE-costs, for --dry-run.
    #[arg(long, value_name = "FILE")]
    cache: Option<PathBuf>,
    /// Read nothing; say what the scan would look at and what that is likely to cost
    ///
    /// The cost is estimated from the scans that --cache remembers, or else from those of the agent of this machine.
    #[arg(long)]
    dry_run: bool,
    /// Read everything again, also what the cache knows clean
    #[arg(long, requires = "cache")]
    fresh: bool,
    #[command(flatten)]
    limits: LimitArgs,
}

/// How far to go with one file. What a limit cuts off is counted as skipped.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Read containers raw only; each one counts as skipped (limit)
    #[arg(long, conflicts_with = "max_depth")]
    no_archives: bool,
    /// Largest file to look at, for example 1GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_file_size: Option<u64>,
    /// How many containers deep to look
    #[arg(long, value_name = "N")]
    max_depth: Option<u32>,
    /// Most members in the whole tree of one file
    #[arg(long, value_name = "N")]
    max_members: Option<u32>,
    /// Largest unpacked member, for example 256MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_member_size: Option<u64>,
    /// Most unpacked bytes in the whole tree of one file, for example 1GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_total_size: Option<u64>,
    /// Largest unpacked size of one member, as a multiple of its packed size
    #[arg(long, value_name = "N")]
    max_ratio: Option<u32>,
    /// Longest time for one file, for example 120s
    #[arg(long, value_name = "TIME", value_parser = parse_duration_ms)]
    file_timeout: Option<u64>,
}

impl LimitArgs {
    fn limits(&self) -> ScanLimits {
        let default = ScanLimits::default();
        let depth = self.max_depth.unwrap_or(default.depth);
        ScanLimits {
            file_bytes: self.max_file_size.unwrap_or(default.file_bytes),
            depth: if self.no_archives { 0 } else { depth },
            members: self.max_members.unwrap_or(default.members),
            member_bytes: self.max_member_size.unwrap_or(default.member_bytes),
            total_bytes: self.max_total_size.unwrap_or(default.total_bytes),
            ratio: self.max_ratio.unwrap_or(default.ratio),
            file_ms: self.file_timeout.unwrap_or(default.file_ms),
        }
    }
}

/// What `tm-agent pattern check` is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// The pattern to try
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Accept rules that can hold up a scan (they are still named)
    #[arg(long)]
    force: bool,
}

impl Args {
    /// How far to go with one file.
    pub(crate) fn limits(&self) -> ScanLimits {
        self.limits.limits()
    }

    /// Scanning threads, at least 1.
    pub(crate) fn threads(&self) -> usize {
        match self.cpu {
            Some(_) => 1,
            None => self.threads.map_or_else(all_cores, usize::from),
        }
    }

    /// Whether the running agent can do it.
    ///
    /// # Errors
    /// What speaks against it.
    pub(crate) fn fit_for_agent(&self) -> Result<(), &'static str> {
        if !self.what.patterns.is_empty() {
            return Err(
                "the running agent looks with the patterns that it holds; --pattern needs --standalone",
            );
        }
        if self.processes {
            return Err("the running agent looks at files only; --processes needs --standalone");
        }
        if self.dry_run {
            return Err("only a scan of this process is quoted; --dry-run needs --standalone");
        }
        if self.cache.is_some() {
            return Err("with the running agent nothing is remembered; --cache needs --standalone");
        }
        self.options().contradiction(self.what.paths.len()).map_or(Ok(()), Err)
    }
}

/// Scans with the patterns that are named, prints, and says the verdict by the exit code.
pub(crate) fn run(args: &Args) -> ExitCode {
    if let Some(why) = args.options().contradiction(args.what.paths.len()) {
        complain(why);
        return ExitCode::from(EXIT_USAGE);
    }
    if args.what.patterns.is_empty() {
        complain("--standalone needs --pattern FILE");
        return ExitCode::from(EXIT_USAGE);
    }
    let patterns = args.what.patterns.iter().map(|file| {
        let Imported { pattern, list } = read_pattern(file)?;
        for remark in list.map(|summary| summary.remarks()).unwrap_or_default() {
            complain_as("warning", &format!("{}:{}", pattern.name(), problem_line(&remark)));
        }
        Ok(pattern)
    });
    let patterns = patterns.collect::<Result<Vec<_>, PatternError>>();
    exit_code(match patterns {
        Ok(patterns) => {
            let names =
                patterns.iter().map(|pattern| (pattern.sha256(), pattern.name().to_owned())).collect();
            scan_with(args, patterns, names, Arc::new(OwnWorker))
        }
        Err(error) => Err(vec![chain(&error)]),
    })
}

/// The exit code for a verdict (a quote has none), or for an error, which is told line by line.
pub(crate) fn exit_code(done: Result<Option<Verdict>, Vec<String>>) -> ExitCode {
    match done {
        Ok(Some(Verdict::Clean) | None) => ExitCode::SUCCESS,
        Ok(Some(Verdict::Detected)) => ExitCode::from(1),
        Ok(Some(Verdict::Incomplete)) => ExitCode::from(EXIT_INCOMPLETE),
        Err(lines) => {
            lines.iter().for_each(|line| complain(line));
            ExitCode::from(EXIT_INCOMPLETE)
        }
    }
}

impl Args {
    /// How to go about it.
    pub(crate) fn options(&self) -> ScanOptions {
        ScanOptions {
            all_local: self.all_local,
            cpu_percent: self.cpu.or(self.background.then_some(ScanOptions::BACKGROUND_PERCENT)),
            quick: self.quick,
            full: self.full,
            processes: self.processes,
            fresh: self.fresh,
            dry_run: self.dry_run,
        }
    }
}

/// The scan, or its quote, which has no verdict, with whatever workers are hired; `names` are what people call the patterns.
///
/// # Errors
/// The lines to complain with.
pub(crate) fn scan_with(
    args: &Args,
    patterns: Vec<Pattern>,
    names: BTreeMap<Sha256, String>,
    hire: Arc<dyn Hire>,
) -> Result<Option<Verdict>, Vec<String>> {
    let paths = args.what.paths.iter().map(|path| bytes(path)).collect();
    let mut order = Order::new(paths, patterns, args.limits());
    order.threads = args.threads();
    order.hire = hire;
    order.options = args.options();
    if let Some(cache) = &args.cache {
        check_place(cache).map_err(|error| vec![format!("cannot keep `{}`: {error}", bytes(cache))])?;
        order.seen = Some(cache.clone());
        order.past = Some(past::beside(cache));
    }
    if order.options.cpu_percent.is_none() {
        // Somebody sits and waits for it.
        order.nice = 0;
    }
    order.sandboxed = |parts| {
        if let Some(line) = missing_line(parts) {
            complain_as("warning", &format!("the scan worker runs with a part of its sandbox only: {line}"));
        }
    };
    order.remark = |remark| complain_as("note", remark);

    let cancel = AtomicBool::new(false);
    let style = args.progress.style(args.output);
    if style == Some(Style::Terminal) {
        order.tick = LIVELY;
    }
    // What is found on the way is not known before; what may take little CPU is not spent on a count, and neither
    // where perhaps nobody looks.
    let is_watched = style == Some(Style::Terminal) || args.progress == When::Always;
    let is_countable = is_watched && !args.quick && !args.processes && args.cpu.is_none();
    let progress = style.map(|style| {
        let walked = || Ahead::start(order.paths(), order.walk(), order.limits.file_bytes);
        Progress::new(io::stderr(), style, terminal_width, is_countable.then(walked))
    });
    let (out, is_shared) = (io::BufWriter::new(io::stdout()), io::stdout().is_terminal());
    let mut report = Report::new(out, progress, is_shared, args.output, names, &cancel);
    let past = Past::read(order.past.as_deref().unwrap_or(Path::new(AGENT_COSTS)));
    let done = run_with(&order, &mut |event| report.event(&event), &cancel).map_err(|error| match error {
        Error::Start(StartError::Refused { name, problems }) if !problems.is_empty() => {
            problems.iter().map(|problem| format!("{name}:{}", problem_line(problem))).collect()
        }
        Error::Start(_) | Error::Path(_) | Error::Lethal(_) | Error::Pool => vec![chain(&error)],
    });
    match done {
        Ok(done) if args.dry_run => {
            let quote = quote::of(&order, &done, &past);
            if let Some(path) = &order.past {
                Past::add_quote(path, quote::quoted_of(&order, &quote))
                    .map_err(|error| vec![format!("cannot remember the quote: {error}")])?;
            }
            report.quote(&quote).map_err(|error| vec![format!("cannot write the results: {error}")])?;
            Ok(None)
        }
        Ok(done) => {
            let quoted = past.quoted(quote::name(&order));
            report
                .finish(&done.coverage, quoted)
                .map_err(|error| vec![format!("cannot write the results: {error}")])?;
            Ok(Some(done.coverage.verdict()))
        }
        Err(lines) => {
            // What was found before the error is still worth its lines.
            report.abandon();
            Err(lines)
        }
    }
}

/// Tries a pattern and prints what it would load, or what is wrong with it.
pub(crate) fn check(args: &CheckArgs) -> ExitCode {
    let (lines, code) = check_lines(&args.file, args.force);
    let mut out = io::stdout().lock();
    // Rules and what the compiler quotes of them are whatever somebody wrote.
    let mut lines = lines.iter().map(|line| tm_protocol::text::escape_for_display(line));
    match lines.try_for_each(|line| writeln!(out, "{line}")).and_then(|()| out.flush()) {
        Ok(()) => code,
        Err(error) => {
            complain(&format!("cannot write the results: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn check_lines(file: &Path, force: bool) -> (Vec<String>, ExitCode) {
    let imported = read_pattern(file).and_then(|imported| {
        // What was compiled elsewhere is not believed.
        let checked = if imported.list.is_none() { imported.pattern.check_digests() } else { Ok(()) };
        checked.map_err(|error| PatternError::Invalid(bytes(file), error)).map(|()| imported)
    });
    let (pattern, remarks) = match imported {
        Ok(Imported { pattern, list }) => {
            (pattern, list.map(|summary| summary.remarks()).unwrap_or_default())
        }
        Err(error) => {
            complain(&chain(&error));
            return (vec![], ExitCode::FAILURE);
        }
    };
    let name = pattern.name();
    match try_pattern(&WorkerProgram::this(), &pattern, force) {
        Ok(checked) => {
            let warnings = remarks
                .iter()
                .chain(&checked.warnings)
                .map(|problem| format!("{name}:{}", warning_line(&problem_line(problem))));
            let count = match checked.rules {
                _ if pattern.digests().is_some() => {
                    let counts = pattern.digests().map(|list| list.counts()).unwrap_or_default();
                    format!("{name}: digest list, {counts}")
                }
                1 => format!("{name}: 1 rule"),
                rules => format!("{name}: {rules} rules"),
            };
            (warnings.chain([count]).collect(), ExitCode::SUCCESS)
        }
        Err(CheckError::TooSlow(problems)) => {
            let lines = problems.iter().map(|problem| format!("{name}:{}", problem_line(problem))).collect();
            complain("the pattern has rules that can hold up a scan; --force accepts them");
            (lines, ExitCode::FAILURE)
        }
        Err(CheckError::Refused(problems)) if !problems.is_empty() => {
            let lines = problems.iter().map(|problem| format!("{name}:{}", problem_line(problem))).collect();
            (lines, ExitCode::FAILURE)
        }
        Err(error @ (CheckError::Refused(_) | CheckError::Hostile(_) | CheckError::Start(_))) => {
            complain(&format!("{name}: {}", chain(&error)));
            (vec![], ExitCode::FAILURE)
        }
    }
}

/// Marks `line:column: message` as a remark that does not stand in the way.
fn warning_line(problem: &str) -> String {
    let places = problem.find(|c: char| !c.is_ascii_digit() && c != ':').unwrap_or(0);
    let (place, message) = problem.split_at_checked(places).unwrap_or(("", problem));
    format!("{place} warning: {}", message.trim_start())
}

#[derive(Debug, thiserror::Error)]
enum PatternError {
    #[error("cannot read pattern `{0}`")]
    Read(PathBytes, #[source] io::Error),
    #[error("cannot use pattern `{0}`")]
    Invalid(PathBytes, #[source] InvalidPattern),
}

fn read_pattern(path: &Path) -> Result<Imported, PatternError> {
    let file = File::open(path).map_err(|source| PatternError::Read(bytes(path), source))?;
    Pattern::read(bytes(path).to_string(), file).map_err(|error| match error {
        ReadError::Read(source) => PatternError::Read(bytes(path), source),
        ReadError::Invalid(source) => PatternError::Invalid(bytes(path), source),
    })
}

/// The path's exact bytes.
pub(crate) fn bytes(path: &Path) -> PathBytes {
    use std::os::unix::ffi::OsStrExt as _;
    PathBytes::from(path.as_os_str().as_bytes())
}

/// An error, to standard error.
pub(crate) fn complain(message: &str) {
    complain_as("error", message);
}

/// One line to standard error, harmless whatever is in it.
pub(crate) fn complain_as(level: &str, message: &str) {
    let message = tm_protocol::text::escape_for_display(message);
    // Nobody is left to tell if standard error is closed.
    let _ = writeln!(io::stderr(), "{level}: {message}");
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        let words = std::iter::once("scan").chain(line.split_ascii_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args)
    }

    #[test]
    fn limits_are_the_defaults_but_for_what_is_said() {
        let default = ScanLimits::default();
        for (line, expected) in [
            ("--pattern a /x", default),
            ("--no-archives --pattern a /x", ScanLimits { depth: 0, ..default }),
            ("--max-depth 3 --pattern a /x", ScanLimits { depth: 3, ..default }),
            ("--max-file-size 2GiB --pattern a /x", ScanLimits { file_bytes: 2 << 30, ..default }),
            (
                "--max-members 5 --max-ratio 10 --max-member-size 1MiB --max-total-size 1024 --pattern a /x",
                ScanLimits { members: 5, ratio: 10, member_bytes: 1 << 20, total_bytes: 1024, ..default },
            ),
            ("--file-timeout 500ms --pattern a /x", ScanLimits { file_ms: 500, ..default }),
        ] {
            assert_eq!(parse(line).unwrap().limits.limits(), expected, "{line}");
        }
        for line in [
            "--max-file-size 1XB --pattern a /x",
            "--file-timeout 5 --pattern a /x",
            "--threads 0 --pattern a /x",
            "--cpu 0% --pattern a /x",
            "--cpu 101% --pattern a /x",
            "--cpu 5.5% --pattern a /x",
            "--cpu 256 --pattern a /x",
            "--cpu 10% --threads 2 --pattern a /x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_pattern_that_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        for (path, expected) in [
            (folder.path().join("none"), "cannot read pattern"),
            (folder.path().to_owned(), "cannot read pattern"),
            (empty, "cannot use pattern"),
        ] {
            let error = read_pattern(&path).unwrap_err();
            assert_eq!(error.to_string(), format!("{expected} `{}`", bytes(&path)));
        }
    }

    #[test]
    fn warnings_keep_their_place() {
        for (problem, expected) in [
            ("3:4: odd", "3:4: warning: odd"),
            ("3: odd: yes", "3: warning: odd: yes"),
            ("odd", " warning: odd"),
        ] {
            assert_eq!(warning_line(problem), expected);
        }
    }
}
