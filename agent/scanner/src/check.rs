//! Tries a pattern in a worker process: does it compile, what does the compiler remark, which of its rules are
//! slow, and what do they cost on sample data?
//!
//! **Invariant:** a try ends, within [`CPU_MS`] of CPU time and [`MEMORY`] of memory, whatever the pattern holds.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use crossbeam_channel::RecvTimeoutError;
use rustix::fs::{MemfdFlags, memfd_create};
use tm_patterns::{Checked, Pattern, Problem};
use tm_protocol::task::ScanLimits;

use crate::{
    engine::lint::{SLOW, VERY_SLOW},
    pool::WorkerProgram,
    process::Worker,
    sandbox::Frame,
    wire::{Answer, Order, Setup},
};

/// How long a worker may take to compile patterns before it is killed.
pub(crate) const COMPILE_TIME: Duration = Duration::from_secs(60);
/// CPU time that a pattern may take to compile when it is tried, in milliseconds.
const COMPILE_CPU_MS: u64 = 10_000;
/// CPU time of a whole try, with the measure of costs, in milliseconds.
const CPU_MS: u64 = 19_000;
/// Memory of a try, in bytes. Scans have more: what compiles here compiles there.
const MEMORY: u64 = 448 << 20;
/// How often the CPU time is looked at.
const WATCH: Duration = Duration::from_millis(50);

/// Why a pattern was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The rules are wrong; each problem has its place.
    #[error("the pattern does not compile")]
    Refused(Vec<Problem>),
    /// Rules can hold up a scan; each with its cost and the reason. Not with `force`.
    #[error("the pattern has rules that can hold up a scan")]
    TooSlow(Vec<Problem>),
    /// The worker died or hung on it.
    #[error("the pattern {0}")]
    Hostile(&'static str),
    /// No worker could be started.
    #[error("cannot start a scan worker")]
    Start(#[source] std::io::Error),
}

/// Compiles `pattern` in a worker of its own, measures its rules there on sample data, and ends it. A pattern
/// with a rule that can hold up a scan (a digest of the file in a long loop, a regular expression without a
/// literal and without an end, or whatever else takes very long on the samples) is refused; other slow rules are
/// remarked on.
///
/// # Errors
/// [`CheckError::Refused`] with places for a rule that is wrong, [`CheckError::TooSlow`] for one that is too slow;
/// [`CheckError::Hostile`] if the worker dies or takes too long; [`CheckError::Start`] if there is none.
pub fn check(program: &WorkerProgram, pattern: &Pattern) -> Result<Checked, CheckError> {
    check_with(program, pattern, false)
}

/// As [`check`]; with `force`, rules that can hold up a scan are only remarked on.
///
/// # Errors
/// As [`check`], but not [`CheckError::TooSlow`].
pub fn check_with(program: &WorkerProgram, pattern: &Pattern, force: bool) -> Result<Checked, CheckError> {
    let setup = Setup { patterns: vec![pattern.clone()], limits: ScanLimits::default(), threads: 1, nice: 0 };
    let mut frame = Frame::new(setup.threads, setup.nice, &setup.limits);
    frame.data_bytes = frame.data_bytes.min(MEMORY);
    let worker = Worker::start_within(program, &setup, frame).map_err(CheckError::Start)?;
    // A look-up costs what it costs, whatever list it is in.
    let has_costs = pattern.digests().is_none();
    let measured = |checked: Checked| match measure(&worker, pattern) {
        Ok(measured) => Ok(with_costs(checked, measured)),
        // Only what holds up a scan is passed over; what is known of the rules is said all the same.
        Err(_) if force || too_slow(&checked).next().is_some() => {
            let mut checked = checked;
            checked.warnings.push(whole("what its rules cost could not be measured".to_owned()));
            Ok(checked)
        }
        Err(error) => Err(error),
    };
    let checked =
        compile(&worker).and_then(|checked| if has_costs { measured(checked) } else { Ok(checked) });
    worker.kill();
    let checked = checked?;
    let slow: Vec<Problem> = too_slow(&checked).cloned().collect();
    if force || slow.is_empty() { Ok(checked) } else { Err(CheckError::TooSlow(slow)) }
}

fn too_slow(checked: &Checked) -> impl Iterator<Item = &Problem> {
    checked.warnings.iter().filter(|problem| problem.message.starts_with(VERY_SLOW))
}

fn whole(message: String) -> Problem {
    Problem { line: 0, column: 0, message }
}

fn compile(worker: &Worker) -> Result<Checked, CheckError> {
    match wait(worker, COMPILE_CPU_MS) {
        Ok(Answer::Ready { rules, warnings, .. }) => {
            Ok(Checked { rules, warnings: warnings.into_iter().map(Into::into).collect() })
        }
        Ok(Answer::Refused { problems, .. }) => {
            Err(CheckError::Refused(problems.into_iter().map(Into::into).collect()))
        }
        Ok(Answer::Done { .. } | Answer::Measured { .. }) => {
            Err(CheckError::Hostile("made the compiler misbehave"))
        }
        Err(RecvTimeoutError::Timeout) => Err(CheckError::Hostile("takes too long to compile")),
        Err(RecvTimeoutError::Disconnected) => Err(CheckError::Hostile("ends the compiler")),
    }
}

/// What the worker says of the costs: remarks, and how many rules were not measured.
fn measure(worker: &Worker, pattern: &Pattern) -> Result<(Vec<Problem>, usize), CheckError> {
    let order = || -> io::Result<()> {
        let mut text = File::from(memfd_create("tm-scan-text", MemfdFlags::CLOEXEC)?);
        text.write_all(pattern.text().as_bytes())?;
        worker.send(&Order::Measure, &[text.as_fd()])
    };
    order().map_err(|_| CheckError::Hostile("ends the compiler"))?;
    match wait(worker, CPU_MS) {
        Ok(Answer::Measured { remarks, unmeasured }) => {
            Ok((remarks.into_iter().map(Into::into).collect(), unmeasured))
        }
        Ok(Answer::Done { .. } | Answer::Ready { .. } | Answer::Refused { .. }) => {
            Err(CheckError::Hostile("makes the scan of a sample misbehave"))
        }
        Err(RecvTimeoutError::Timeout) => Err(CheckError::Hostile("takes too long on sample data")),
        Err(RecvTimeoutError::Disconnected) => Err(CheckError::Hostile("ends the scan of a sample")),
    }
}

fn with_costs(checked: Checked, (remarks, unmeasured): (Vec<Problem>, usize)) -> Checked {
    let Checked { rules, mut warnings } = checked;
    // The measured remarks are these with costs, and more.
    warnings.retain(|problem| !problem.message.starts_with(SLOW) && !problem.message.starts_with(VERY_SLOW));
    warnings.extend(remarks);
    if unmeasured > 0 {
        warnings.push(whole(format!(
            "the cost of {unmeasured} rules was not measured: the others took too long"
        )));
    }
    Checked { rules, warnings }
}

/// The next answer, unless the worker ends first or has taken `cpu_ms` of CPU time in all. A worker that does
/// nothing is given [`COMPILE_TIME`].
fn wait(worker: &Worker, cpu_ms: u64) -> Result<Answer, RecvTimeoutError> {
    let started = Instant::now();
    loop {
        match worker.answers.recv_timeout(WATCH) {
            Err(RecvTimeoutError::Timeout)
                if started.elapsed() < COMPILE_TIME && worker.cpu_ms() < cpu_ms => {}
            end => return end,
        }
    }
}
