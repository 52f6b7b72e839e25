//! `cargo xtask test`: what is missing is installed, the programs are built, every test is run.
//!
//! The runner's own summary stays the last thing but one line that is printed.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus},
    time::Instant,
};

use anyhow::Context as _;

use crate::programs;

/// A program that tests need, the package it comes in, and what cannot run without it.
const NEEDED: [(&str, &str, &str); 17] = [
    ("strace", "strace", "tests that watch or fail single system calls"),
    ("nft", "nftables", "tests of network rules"),
    ("faketime", "faketime", "tests with a wrong clock"),
    ("rpmbuild", "rpm", "tests that ask a package database of the other kind"),
    ("ip", "iproute2", "tests in network namespaces"),
    ("yara", "yara", "the test that compares hits with those of yara"),
    ("sqlite3", "sqlite3", "the test that tampers with the audit log"),
    ("initdb", "postgresql", "tests of the manager on PostgreSQL"),
    ("python3", "python3-venv", "the test that compares hits with those of other engines"),
    ("7z", "p7zip-full", "tests of archives that 7-Zip makes"),
    ("gcab", "gcab", "tests of cabinets that gcab makes"),
    ("zip", "zip", "tests of archives that zip makes"),
    ("cpio", "cpio", "tests of archives that cpio makes"),
    ("ar", "binutils", "tests of archives that ar makes"),
    ("lzip", "lzip", "tests of files that lzip makes"),
    ("zstd", "zstd", "tests of files that zstd makes"),
    ("promtool", "prometheus", "the test that has the manager's metrics checked"),
];

/// Other YARA engines that hits are compared with, as packages of Python.
const ORACLES: [&str; 2] = ["yara-python", "yara-x"];

/// Packages whose tests are run: all.
const EVERYTHING: &str = "*";

/// Runs everything; the code is the test runner's.
pub(crate) fn run(long: bool) -> ExitCode {
    let begin = Instant::now();
    let ended = install_missing().and_then(|()| build()).and_then(|()| {
        let parts = [compare(long, oracles()?.as_deref())?, on_postgres(long)?, tests(long)?];
        Ok(parts.into_iter().find(|part| !part.success()).unwrap_or_default())
    });
    let elapsed = begin.elapsed().as_secs();
    match ended {
        Ok(status) if status.success() => {
            eprintln!("xtask test: passed in {elapsed} s");
            ExitCode::SUCCESS
        }
        Ok(status) => {
            eprintln!("xtask test: FAILED in {elapsed} s ({status})");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}\nxtask test: FAILED in {elapsed} s");
            ExitCode::FAILURE
        }
    }
}

/// Installs missing tools where that is possible, and says what cannot run where it is not.
fn install_missing() -> anyhow::Result<()> {
    let missing: Vec<_> = NEEDED.iter().filter(|(program, ..)| !programs::is_installed(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    let root = rustix::process::geteuid().is_root();
    let sudo = !root && succeeds(Command::new("sudo").args(["-n", "true"]));
    if programs::is_installed("apt-get") && (root || sudo) {
        eprintln!("Installing what tests need and is not here: apt-get install {}", packages.join(" "));
        let apt = |args: &[&str]| {
            let mut command = if root { Command::new("apt-get") } else { Command::new("sudo") };
            if !root {
                command.args(["-n", "apt-get"]);
            }
            command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
            succeeds(&mut command)
        };
        let install = [&["install", "-y", "-q", "--no-install-recommends"], packages.as_slice()].concat();
        if !apt(&install) && apt(&["update", "-q"]) {
            apt(&install);
        }
    }
    for (program, package, what) in NEEDED {
        if !programs::is_installed(program) {
            eprintln!("warning: `{program}` (package {package}) is missing: {what} cannot run");
        }
    }
    Ok(())
}

fn succeeds(command: &mut Command) -> bool {
    command.status().is_ok_and(|status| status.success())
}

/// The programs: end-to-end tests run them, and a test crate does not build other crates' programs.
fn build() -> anyhow::Result<()> {
    let args = ["build", "--locked", "--workspace", "--bins"];
    eprintln!("Building the programs: cargo {}", args.join(" "));
    let status = programs::cargo()?.args(args).status().context("cannot run cargo")?;
    anyhow::ensure!(status.success(), "the programs could not be built");
    Ok(())
}

/// The Python that has the oracles, in the target folder; made and filled once. `None`, and said, where that
/// does not work.
fn oracles() -> anyhow::Result<Option<PathBuf>> {
    let here = std::env::current_exe().context("cannot tell where this program is")?;
    let target = here.parent().and_then(Path::parent).context("this program lies in a target folder")?;
    let folder = target.join("oracles");
    let python = folder.join("bin").join("python");
    let has_all = || {
        let wanted = Command::new(&python).args(["-c", "import yara, yara_x"]).output();
        wanted.is_ok_and(|out| out.status.success())
    };
    if !has_all() {
        eprintln!(
            "Installing what hits are compared with, into `{}`: {}",
            folder.display(),
            ORACLES.join(" ")
        );
        let made = succeeds(Command::new("python3").args(["-m", "venv"]).arg(&folder));
        let filled =
            made && succeeds(Command::new(&python).args(["-m", "pip", "install", "-q"]).args(ORACLES));
        if !filled || !has_all() {
            eprintln!(
                "warning: {} cannot be installed (python3 with venv and pip, and a package index, are needed): \
                 the test that compares hits with theirs fails",
                ORACLES.join(" and ")
            );
            return Ok(None);
        }
    }
    Ok(Some(python))
}

/// Compares hits with those of other engines. This is apart from the other tests, which nothing needs to be
/// installed for beside the packages above.
fn compare(long: bool, python: Option<&Path>) -> anyhow::Result<ExitStatus> {
    let mut cargo = runner(EVERYTHING)?;
    if has_nextest()? {
        cargo.args(["--run-ignored", "only", "-E", "test(hits_are_those_of_other_engines)"]);
    } else {
        cargo.args(["hits_are_those_of_other_engines", "--", "--ignored"]);
    }
    if let Some(python) = python {
        cargo.env("TM_ORACLES", python);
    }
    if long {
        cargo.env("TM_TEST_LONG", "1");
    }
    cargo.status().context("cannot run the tests")
}

/// Runs the manager's own tests, which the whole run tries on SQLite, on a throwaway PostgreSQL. Where there is
/// none, and where no test asked for it, this fails.
fn on_postgres(long: bool) -> anyhow::Result<ExitStatus> {
    eprintln!("The manager's tests on PostgreSQL:");
    let mut command = Command::new(programs::path("tm-postgres")?);
    command.current_dir(programs::root()?);
    let cargo = runner("tm-manager")?;
    command.arg(cargo.get_program()).args(cargo.get_args());
    if long {
        command.env("TM_TEST_LONG", "1");
    }
    command.status().context("cannot run the tests")
}

fn tests(long: bool) -> anyhow::Result<ExitStatus> {
    let mut cargo = runner(EVERYTHING)?;
    if long {
        cargo.env("TM_TEST_LONG", "1");
    }
    cargo.status().context("cannot run the tests")
}

fn has_nextest() -> anyhow::Result<bool> {
    Ok(programs::is_installed("cargo-nextest")
        || programs::cargo()?.args(["nextest", "--version"]).output().is_ok_and(|out| out.status.success()))
}

/// What runs the tests of the packages whose names fit a pattern.
fn runner(packages: &str) -> anyhow::Result<Command> {
    let mut cargo = programs::cargo()?;
    if has_nextest()? {
        cargo.args(["nextest", "run", "--locked"]);
    } else {
        eprintln!("cargo-nextest is not here; using cargo test");
        cargo.args(["test", "--locked", "--all-targets", "--no-fail-fast"]);
    }
    cargo.args(if packages == EVERYTHING { vec!["--workspace"] } else { vec!["-p", packages] });
    Ok(cargo)
}
