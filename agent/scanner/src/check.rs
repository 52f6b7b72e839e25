//! Tries a pattern in a worker process: does it compile, and what does the compiler remark?

use std::time::Duration;

use tm_patterns::{Checked, Pattern, Problem};
use tm_protocol::task::ScanLimits;

use crate::{
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

/// Compiles `pattern` in a worker of its own, which is then ended.
///
/// # Errors
/// [`CheckError::Refused`] with places for a rule that is wrong; [`CheckError::Hostile`] if the worker dies
/// or takes longer than a minute; [`CheckError::Start`] if there is none.
pub fn check(program: &WorkerProgram, pattern: &Pattern) -> Result<Checked, CheckError> {
    let setup = Setup {
        patterns: vec![(pattern.sha256(), pattern.text().to_owned())],
        limits: ScanLimits::default(),
        threads: 1,
        nice: 0,
    };
    let worker = Worker::start(program, &setup).map_err(CheckError::Start)?;
    let answer = worker.answers.recv_timeout(COMPILE_TIME);
    worker.kill();
    match answer {
        Ok(Answer::Ready { rules, warnings, .. }) => {
            Ok(Checked { rules, warnings: warnings.into_iter().map(Into::into).collect() })
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
