//! Tries a pattern on the desk, in a scan worker of its own that has given up its rights, before anything of it is
//! sent or signed: whoever signs does not have to take the manager's word for what it does.

use tm_api::{
    error::{Code, ErrorView},
    pattern::Problem,
};
use tm_patterns::Pattern;
use tm_scanner::{
    check::{self, CheckError},
    pool::WorkerProgram,
};

/// Compiles the pattern and measures its rules, here. What an importing manager would refuse is refused in the same
/// words.
///
/// # Errors
/// If it does not compile, has rules that can hold up a scan (unless `force`), ends the worker, or there is no worker.
pub(super) async fn of(pattern: Pattern, force: bool) -> Result<(), ErrorView> {
    let tried =
        tokio::task::spawn_blocking(move || check::check_with(&WorkerProgram::this(), &pattern, force)).await;
    match tried {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(view(error)),
        Err(error) => {
            Err(refusal(Code::Internal, format!("the trial of the pattern ended abnormally: {error}")))
        }
    }
}

fn view(error: CheckError) -> ErrorView {
    let message = error.to_string();
    match error {
        CheckError::Refused(problems) => {
            ErrorView { problems: places(problems), ..refusal(Code::PatternRefused, message) }
        }
        CheckError::TooSlow(problems) => ErrorView {
            problems: places(problems),
            hint: Some("mend these rules, or take them all the same: import it with --force".to_owned()),
            ..refusal(Code::PatternRefused, message)
        },
        CheckError::Hostile(_) => ErrorView {
            hint: Some("a pattern that a compiler cannot bear is not used".to_owned()),
            ..refusal(Code::PatternRefused, message)
        },
        CheckError::Start(source) => refusal(Code::Internal, format!("{message}: {source}")),
    }
}

fn refusal(code: Code, message: String) -> ErrorView {
    ErrorView { code, message, hint: None, candidates: Vec::new(), problems: Vec::new() }
}

fn places(problems: Vec<tm_patterns::Problem>) -> Vec<Problem> {
    let place = |problem: tm_patterns::Problem| Problem {
        line: problem.line,
        column: problem.column,
        message: problem.message,
    };
    problems.into_iter().map(place).collect()
}
