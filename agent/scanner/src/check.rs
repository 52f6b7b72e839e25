//! Tries a pattern in a worker process: does it compile, and what does the compiler remark?

use tm_patterns::{Checked, Pattern, Problem};

use crate::pool::WorkerProgram;

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
pub fn check(_program: &WorkerProgram, _pattern: &Pattern) -> Result<Checked, CheckError> {
    unimplemented!("written by the scanner room")
}
