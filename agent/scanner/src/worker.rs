//! The worker process: compiles patterns, reads files it is handed, answers.

use std::process::ExitCode;

/// Runs the worker on the socket that stands at standard input. Ends when the parent does.
pub fn main() -> ExitCode {
    unimplemented!("written by the scanner room")
}
