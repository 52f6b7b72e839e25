//! `tm-agent doctor`: tries what this endpoint offers, and says what is missing.
//!
//! **Invariant:** nothing is taken from configuration or documentation: a real worker is started, looks at a
//! real file and reports what is in force around it; a proxy that is set is asked for a way to a manager.
//!
//! With `-o json` it prints one object: `{"ok":BOOL,"parts":[{"part","state":"ok|not-needed|missing",
//! "detail"}]}`. Exit code: 0 if nothing is missing, 1 otherwise.

use std::{
    fs::File,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Serialize;
use tm_patterns::Pattern;
use tm_protocol::{task::ScanLimits, text::escape_for_display};
use tm_scanner::{
    item::Item,
    pool::{PoolOptions, ScanPool, WorkerProgram},
    sandbox::{PartState, State},
};

use crate::{
    config::{Config, ConfigError},
    connection::{self, proxy::Proxy},
    enroll::{EnrollError, Enrolled},
    paths::Paths,
};

/// Something that the rule of the trial finds, and its rule.
const MARK: &[u8] = b"tm-agent doctor looks at this";
const RULE: &[u8] =
    b"rule doctor { strings: $mark = \"tm-agent doctor looks at this\" condition: $mark and filesize < 100 }";
/// How long the worker may take over the file of the trial.
const PATIENCE: Duration = Duration::from_secs(30);

/// How to print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A line for each part
    Text,
    /// One JSON object
    Json,
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    parts: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    part: &'static str,
    state: &'static str,
    detail: String,
}

impl From<&PartState> for Line {
    fn from(part: &PartState) -> Self {
        let (state, detail) = match &part.state {
            State::InForce(how) => ("ok", how),
            State::NotNeeded(why) => ("not-needed", why),
            State::Missing(why) => ("missing", why),
        };
        Self { part: part.part.name(), state, detail: detail.clone() }
    }
}

/// Tries everything and prints it.
pub(crate) fn run(paths: &Paths, format: Format) -> ExitCode {
    let mut parts = Vec::new();
    match trial() {
        Ok(sandbox) => {
            let detail = "started, and found its test file".to_owned();
            parts.push(Line { part: "worker", state: "ok", detail });
            parts.extend(sandbox.iter().map(Line::from));
        }
        Err(error) => parts.push(Line { part: "worker", state: "missing", detail: format!("{error:#}") }),
    }
    parts.push(proxy(paths));
    let report = Report { ok: parts.iter().all(|line| line.state != "missing"), parts };
    let mut out = io::stdout().lock();
    match print(&mut out, &report, format).and_then(|()| out.flush()) {
        Ok(()) if report.ok => ExitCode::SUCCESS,
        // What could not be printed has not been told.
        Ok(()) | Err(_) => ExitCode::FAILURE,
    }
}

fn print(out: &mut impl io::Write, report: &Report, format: Format) -> io::Result<()> {
    match format {
        Format::Json => writeln!(out, "{}", serde_json::to_string(report).map_err(io::Error::other)?),
        Format::Text => report.parts.iter().try_for_each(|Line { part, state, detail }| {
            writeln!(out, "{part:<17} {state:<11} {}", escape_for_display(detail))
        }),
    }
}

/// Asks the proxy, if one is set, for a way to a manager. Nothing is said to the manager.
fn proxy(paths: &Paths) -> Line {
    let (state, detail) = match Config::load(paths) {
        Ok(Config { proxy: None, .. }) => ("not-needed", "none is set".to_owned()),
        Ok(Config { proxy: Some(proxy), .. }) => match way(paths, &proxy) {
            Ok(detail) => ("ok", detail),
            Err(error) => ("missing", format!("{}: {error:#}", proxy.address())),
        },
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            ("not-needed", "the settings are for root to read; only root can try it".to_owned())
        }
        Err(error) => ("missing", connection::chain(&error)),
    };
    Line { part: "proxy", state, detail }
}

fn way(paths: &Paths, proxy: &Proxy) -> anyhow::Result<String> {
    let managers = match Enrolled::load(paths) {
        Ok(enrolled) => enrolled.addresses,
        Err(EnrollError::NotEnrolled) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ask = |manager| runtime.block_on(connection::try_proxy(proxy, manager));
    if managers.is_empty() {
        ask(None)?;
        return Ok(format!("{} is there; no manager is known yet", proxy.address()));
    }
    let mut failure = None;
    for manager in &managers {
        match ask(Some(manager)) {
            Ok(()) => return Ok(format!("{} opens a way to {manager}", proxy.address())),
            Err(error) => failure = Some(anyhow::Error::from(error).context(format!("no way to {manager}"))),
        }
    }
    Err(failure.context("no manager is known")?)
}

/// Starts a worker and has it find something; what is in force around it, or what went wrong.
fn trial() -> anyhow::Result<Vec<PartState>> {
    let pattern = Pattern::new("doctor", RULE.to_vec())?;
    let mut file = File::from(memfd_create("tm-doctor", MemfdFlags::CLOEXEC)?);
    file.write_all(MARK)?;
    let options = PoolOptions { threads: 1, limits: ScanLimits::default(), nice: 0 };
    let (pool, results) = ScanPool::start(&WorkerProgram::this(), &[pattern], options)?;
    pool.submit(Item { id: 0, file: file.into() });
    pool.finish();
    let found = results.recv_timeout(PATIENCE).context("it gave no answer about its test file")?;
    if found.findings.matches.is_empty() {
        anyhow::bail!("it did not find anything in its test file");
    }
    Ok(pool.sandbox().to_vec())
}

#[cfg(test)]
mod tests {
    use tm_scanner::sandbox::Part;

    use super::*;

    #[test]
    fn every_state_has_its_word_and_hostile_text_is_harmless() {
        let part = |part, state| Line::from(&PartState { part, state });
        let report = Report {
            ok: false,
            parts: vec![
                part(Part::Calls, State::InForce("45 system calls".to_owned())),
                part(Part::Identity, State::NotNeeded("not root".to_owned())),
                part(Part::Files, State::Missing("landlock\x1b[1m".to_owned())),
            ],
        };
        let printed = |format| {
            let mut out = Vec::new();
            print(&mut out, &report, format).unwrap();
            String::from_utf8(out).unwrap()
        };
        let text = printed(Format::Text);
        assert!(
            text.starts_with("seccomp           ok          45 system calls\nuser              not-needed")
        );
        assert!(!text.contains('\x1b') && text.contains("landlock-files    missing     landlock"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&printed(Format::Json)).unwrap();
        assert_eq!(json["ok"], false);
        assert_eq!(json["parts"][2]["state"], "missing");
        assert_eq!(json["parts"][2]["detail"], "landlock\x1b[1m");
    }
}
