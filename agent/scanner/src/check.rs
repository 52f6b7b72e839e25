//! Tries a pattern in a worker process: does it compile, what does the compiler remark, and which of its rules
//! are slow?

use std::time::Duration;

use tm_patterns::{Checked, Pattern, Problem};
use tm_protocol::task::ScanLimits;

use crate::{
    engine::lint::VERY_SLOW,
    pool::WorkerProgram,
    process::Worker,
    wire::{Answer, Setup},
};

/// How long a worker may take to compile patterns before it is killed.
pub(crate) const COMPILE_TIME: Duration = Duration::from_secs(60);

/// Why a pattern was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The rules are wrong; each problem has its place.
    #[error("the pattern does not compile")]
    Refused(Vec<Problem>),
    /// The worker died or hung on it.
    #[error("the pattern {0}")]
    Hostile(&'static str),
    /// No worker could be started.
    #[error("cannot start a scan worker")]
    Start(#[source] std::io::Error),
}

/// Compiles `pattern` in a worker of its own, which is then ended. A pattern with a rule that can hold up a
/// scan (a digest of the file in a long loop, a regular expression without a literal and without an end) is
/// refused; other slow rules are remarked on.
///
/// # Errors
/// [`CheckError::Refused`] with places for a rule that is wrong or too slow; [`CheckError::Hostile`] if the
/// worker dies or takes longer than a minute; [`CheckError::Start`] if there is none.
pub fn check(program: &WorkerProgram, pattern: &Pattern) -> Result<Checked, CheckError> {
    check_with(program, pattern, false)
}

/// As [`check`]; with `force`, rules that can hold up a scan are only remarked on.
///
/// # Errors
/// As [`check`].
pub fn check_with(program: &WorkerProgram, pattern: &Pattern, force: bool) -> Result<Checked, CheckError> {
    let setup = Setup { patterns: vec![pattern.clone()], limits: ScanLimits::default(), threads: 1, nice: 0 };
    let worker = Worker::start(program, &setup).map_err(CheckError::Start)?;
    let answer = worker.answers.recv_timeout(COMPILE_TIME);
    worker.kill();
    match answer {
        Ok(Answer::Ready { rules, warnings, .. }) => {
            let warnings: Vec<Problem> = warnings.into_iter().map(Into::into).collect();
            let too_slow: Vec<Problem> =
                warnings.iter().filter(|problem| problem.message.starts_with(VERY_SLOW)).cloned().collect();
            if force || too_slow.is_empty() {
                Ok(Checked { rules, warnings })
            } else {
                Err(CheckError::Refused(too_slow))
            }
        }
        Ok(Answer::Refused { problems, .. }) => {
            Err(CheckError::Refused(problems.into_iter().map(Into::into).collect()))
        }
        Ok(Answer::Done { .. }) => Err(CheckError::Hostile("made the compiler misbehave")),
        Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
            Err(CheckError::Hostile("takes too long to compile"))
        }
        Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
            Err(CheckError::Hostile("ends the compiler"))
        }
    }
}
