//! `tm-agent scan --standalone` and `tm-agent pattern check`: the scan for a person at the endpoint, without
//! daemon or manager.
//!
//! **Invariant:** results go to standard output and nothing else does; the exit code says the verdict
//! (0 clean, 1 detected, 2 incomplete or error, 64 usage).

mod paths;
mod report;
mod units;

use std::{
    fs::File,
    io::{self, IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::AtomicBool,
};

use tm_patterns::{InvalidPattern, Pattern};
use tm_protocol::{
    report::{PathBytes, Verdict},
    task::{ScanLimits, ScanOptions},
};
use tm_scanner::{
    check::{CheckError, check_with as try_pattern},
    pool::{StartError, WorkerProgram},
};

use self::{
    paths::PatternsAndPaths,
    report::{Format, Report},
    units::{parse_duration_ms, parse_percent, parse_size},
};
use crate::scan::{
    Error, Order, all_cores, chain, memory, missing_line, problem_line, run_with, seen::check_place,
};

/// Incomplete, or an error stood in the way.
const EXIT_INCOMPLETE: u8 = 2;

/// What `tm-agent scan` is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Scan in this process, without the running agent and without a manager
    #[arg(long)]
    standalone: bool,
    #[command(flatten)]
    what: PatternsAndPaths,
    /// How to print results
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    output: Format,
    /// Scanning threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Go on into other file systems of this machine (without it they are skipped: other-filesystem)
    #[arg(long)]
    all_local: bool,
    /// Most CPU time, on average, in percent of one core (1 to 100; files are then looked at one by one)
    #[arg(long, value_name = "N%", value_parser = parse_percent, conflicts_with = "threads")]
    cpu: Option<u8>,
    /// Look at what runs, what starts by itself, and where things are dropped
    ///
    /// Running programs, autostart places, /tmp, /var/tmp, /dev/shm, and in home folders what is executable or was
    /// changed within two weeks. PATHs are looked at besides.
    #[arg(long)]
    quick: bool,
    /// Look at every local file system
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Look at the memory of running processes, too
    #[arg(long)]
    processes: bool,
    /// Remember in FILE which files are clean, and do not read them again until they or the patterns change
    #[arg(long, value_name = "FILE")]
    cache: Option<PathBuf>,
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

/// Scans, prints, and says the verdict by the exit code.
pub(crate) fn run(args: &Args) -> ExitCode {
    if !args.standalone {
        complain("scanning through the running agent comes later; add --standalone");
        return ExitCode::from(EXIT_INCOMPLETE);
    }
    match scan(args) {
        Ok(Verdict::Clean) => ExitCode::SUCCESS,
        Ok(Verdict::Detected) => ExitCode::from(1),
        Ok(Verdict::Incomplete) => ExitCode::from(EXIT_INCOMPLETE),
        Err(lines) => {
            lines.iter().for_each(|line| complain(line));
            ExitCode::from(EXIT_INCOMPLETE)
        }
    }
}

/// The scan; on error, the lines to complain with.
fn scan(args: &Args) -> Result<Verdict, Vec<String>> {
    let patterns = args
        .what
        .patterns
        .iter()
        .map(|file| read_pattern(file))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| vec![chain(&error)])?;
    let names = patterns.iter().map(|pattern| (pattern.sha256(), pattern.name().to_owned())).collect();
    let paths = args.what.paths.iter().map(|path| bytes(path)).collect();
    let mut order = Order::new(paths, patterns, args.limits.limits());
    order.threads = args.threads.map_or_else(all_cores, usize::from);
    order.options = ScanOptions { all_local: args.all_local, cpu_percent: args.cpu };
    if args.full {
        order.paths = vec![PathBytes::from(&b"/"[..])];
        order.options.all_local = true;
    }
    order.quick = args.quick;
    order.memory = args.processes.then_some(memory::MOST_BYTES);
    if let Some(cache) = &args.cache {
        check_place(cache).map_err(|error| vec![format!("cannot keep `{}`: {error}", bytes(cache))])?;
        order.seen = Some(cache.clone());
    }
    // Somebody sits and waits for it.
    order.nice = 0;
    order.sandboxed = |parts| {
        if let Some(line) = missing_line(parts) {
            complain_as("warning", &format!("the scan worker runs with a part of its sandbox only: {line}"));
        }
    };

    let cancel = AtomicBool::new(false);
    let progress = io::stderr().is_terminal().then(io::stderr);
    let mut report = Report::new(io::BufWriter::new(io::stdout()), progress, args.output, names, &cancel);
    let coverage =
        run_with(&order, &mut |event| report.event(&event), &cancel).map_err(|error| match error {
            Error::Start(StartError::Refused { name, problems }) if !problems.is_empty() => {
                problems.iter().map(|problem| format!("{name}:{}", problem_line(problem))).collect()
            }
            Error::Start(_) | Error::Path(_) | Error::Lethal(_) | Error::Pool => vec![chain(&error)],
        });
    match coverage {
        Ok(coverage) => {
            report.finish(&coverage).map_err(|error| vec![format!("cannot write the results: {error}")])?;
            Ok(coverage.verdict())
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
    let pattern = match read_pattern(file) {
        Ok(pattern) => pattern,
        Err(error) => {
            complain(&chain(&error));
            return (vec![], ExitCode::FAILURE);
        }
    };
    let name = pattern.name();
    match try_pattern(&WorkerProgram::this(), &pattern, force) {
        Ok(checked) => {
            let warnings = checked
                .warnings
                .iter()
                .map(|problem| format!("{name}:{}", warning_line(&problem_line(problem))));
            let count = match checked.rules {
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
enum ReadError {
    #[error("cannot read pattern `{0}`")]
    Read(PathBytes, #[source] io::Error),
    #[error("cannot use pattern `{0}`")]
    Invalid(PathBytes, #[source] InvalidPattern),
}

fn read_pattern(path: &Path) -> Result<Pattern, ReadError> {
    // One byte more than allowed is enough to see that it is too large.
    let most = u64::try_from(tm_patterns::MAX_SIZE).unwrap_or(u64::MAX).saturating_add(1);
    let mut content = Vec::new();
    File::open(path)
        .and_then(|file| file.take(most).read_to_end(&mut content))
        .map_err(|source| ReadError::Read(bytes(path), source))?;
    Pattern::new(bytes(path).to_string(), content).map_err(|source| ReadError::Invalid(bytes(path), source))
}

fn bytes(path: &Path) -> PathBytes {
    use std::os::unix::ffi::OsStrExt as _;
    PathBytes::from(path.as_os_str().as_bytes())
}

fn complain(message: &str) {
    complain_as("error", message);
}

/// One line to standard error, harmless whatever is in it.
fn complain_as(level: &str, message: &str) {
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
