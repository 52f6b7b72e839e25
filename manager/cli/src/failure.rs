//! How a command ends: the exit codes, and what is said when it did not work.

use std::{
    error::Error as StdError,
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use tm_api::{
    error::{Code, ErrorView},
    pattern::Problem,
};
use tm_protocol::{audit::BrokenChain, text::escape_for_display};

use crate::{
    client::ClientError,
    desk::DeskError,
    output::{Column, table},
    profile::ProfileError,
};

/// The exit codes. 10 and 11 only come from scans that were waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done; for a scan: clean.
    Done,
    /// It did not work.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// The manager or an agent would not do it.
    Refused,
    /// It took too long.
    TimedOut,
    /// A scan detected something.
    Detected,
    /// A scan detected nothing and did not see everything.
    Incomplete,
    /// The person had enough of waiting (128 and the number of the signal, as shells have it).
    Interrupted,
}

impl Exit {
    /// The number that a shell sees.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::TimedOut => 4,
            Self::Detected => 10,
            Self::Incomplete => 11,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Why a command did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// What was asked makes no sense.
    #[error("{0}")]
    Usage(String),
    /// There is no usable profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The person was asked and did not say yes.
    #[error("not confirmed; nothing was ordered")]
    NotConfirmed,
    /// There is nothing that the order could be for.
    #[error("{0}")]
    NothingToDo(String),
    /// The person does not wait any longer: what goes on, and how to follow and to end it.
    #[error("{0}")]
    Interrupted(String),
    /// The manager refused, or could not be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The manager refused a pattern; problems are shown with the file's name.
    #[error("cannot import `{}`", file.display())]
    Import {
        /// The file.
        file: PathBuf,
        /// What the manager said.
        source: ClientError,
    },
    /// The trust folder, or what it is needed for.
    #[error(transparent)]
    Trust(#[from] DeskError),
    /// The manager made a token that is none.
    #[error("the manager made an enrollment token that this tmctl does not understand")]
    StrangeToken,
    /// A local file.
    #[error("cannot {verb} `{}`", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it did not work.
        source: io::Error,
    },
    /// A pattern that no manager takes.
    #[error("`{}` has more than the {max} bytes that a pattern may have", path.display(), max = tm_patterns::MAX_IMPORT)]
    PatternTooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The audit log was tampered with.
    #[error("the audit log is broken")]
    Audit(#[source] BrokenChain),
    /// A page does not lead on.
    #[error("the manager's pages of {0} do not end")]
    EndlessPages(&'static str),
    /// Nobody reads what is printed.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// The system gives no event loop.
    #[error("cannot start")]
    Runtime(#[source] io::Error),
}

impl Failure {
    /// The exit code that it means.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::NothingToDo(_) => Exit::Refused,
            Self::Trust(error) if error.is_refusal() => Exit::Refused,
            Self::Interrupted(_) => Exit::Interrupted,
            Self::Client(error) | Self::Import { source: error, .. } => match error {
                ClientError::Refused(view) => exit_of(view.code),
                ClientError::TimedOut { .. } => Exit::TimedOut,
                ClientError::Name(_) => Exit::Usage,
                ClientError::NotAuthenticated { .. }
                | ClientError::Unreachable { .. }
                | ClientError::NotTheManager { .. }
                | ClientError::Strange { .. }
                | ClientError::Setup(_) => Exit::Failed,
            },
            Self::NotConfirmed
            | Self::Trust(_)
            | Self::StrangeToken
            | Self::Profile(_)
            | Self::File { .. }
            | Self::PatternTooLarge { .. }
            | Self::Audit(_)
            | Self::EndlessPages(_)
            | Self::Output(_)
            | Self::Runtime(_) => Exit::Failed,
        }
    }

    /// The lines for standard error: what was tried, why it did not work, what to do next.
    pub(crate) fn report(&self) -> String {
        if let Self::Interrupted(text) = self {
            return text.lines().map(|line| escape_for_display(line) + "\n").collect();
        }
        let mut text = format!("error: {self}");
        let mut cause = self.source();
        while let Some(error) = cause {
            let _ = write!(text, ": {error}");
            cause = error.source();
        }
        // A mistake in the profile is shown in several lines; any other line end came from elsewhere.
        let mut lines: Vec<String> = match self {
            Self::Profile(_) => text.trim_end().lines().map(escape_for_display).collect(),
            Self::Usage(_)
            | Self::NotConfirmed
            | Self::Trust(_)
            | Self::StrangeToken
            | Self::NothingToDo(_)
            | Self::Interrupted(_)
            | Self::Client(_)
            | Self::Import { .. }
            | Self::File { .. }
            | Self::PatternTooLarge { .. }
            | Self::Audit(_)
            | Self::EndlessPages(_)
            | Self::Output(_)
            | Self::Runtime(_) => vec![escape_for_display(&text)],
        };
        let (view, file) = match self {
            Self::Client(ClientError::Refused(view)) => (Some(view), None),
            Self::Import { file, source: ClientError::Refused(view) } => (Some(view), Some(file.as_path())),
            Self::Usage(_)
            | Self::NotConfirmed
            | Self::Trust(_)
            | Self::StrangeToken
            | Self::NothingToDo(_)
            | Self::Interrupted(_)
            | Self::Profile(_)
            | Self::Client(_)
            | Self::Import { .. }
            | Self::File { .. }
            | Self::PatternTooLarge { .. }
            | Self::Audit(_)
            | Self::EndlessPages(_)
            | Self::Output(_)
            | Self::Runtime(_) => (None, None),
        };
        if let Some(view) = view {
            lines.extend(view.problems.iter().map(|problem| problem_line(file, problem)));
            lines.extend(candidates(view));
        }
        lines.extend(self.hint().map(|hint| format!("hint: {}", escape_for_display(&hint))));
        lines.join("\n") + "\n"
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Client(error) | Self::Import { source: error, .. } => error.hint(),
            Self::Profile(ProfileError::Nowhere | ProfileError::Read { .. }) => Some(
                "name one with --profile or TMCTL_PROFILE; `tm-manager init` writes the first as `admin.toml`"
                    .to_owned(),
            ),
            Self::Profile(ProfileError::Parse { .. } | ProfileError::Url { .. } | ProfileError::Token { .. }) => {
                Some("a profile holds exactly `url`, `ca_sha256` and `token`".to_owned())
            }
            Self::Audit(_) => Some(
                "keep a copy of the manager's database as it is now, and compare it with a backup".to_owned(),
            ),
            Self::NothingToDo(_) => {
                Some("see what is known: `tmctl status`, or `tmctl why` and an endpoint".to_owned())
            }
            Self::Trust(error) => error.hint(),
            Self::Usage(_)
            | Self::NotConfirmed
            | Self::StrangeToken
            | Self::Interrupted(_)
            | Self::File { .. }
            | Self::PatternTooLarge { .. }
            | Self::EndlessPages(_)
            | Self::Output(_)
            | Self::Runtime(_) => None,
        }
    }
}

/// What the manager's refusal means as an exit code.
const fn exit_of(code: Code) -> Exit {
    match code {
        Code::NotAllowed
        | Code::NotConnected
        | Code::Conflict
        | Code::AlreadyExists
        | Code::PatternRefused => Exit::Refused,
        Code::NotAuthenticated
        | Code::NotFound
        | Code::Invalid
        | Code::TooLarge
        | Code::TargetUnknown
        | Code::TargetAmbiguous
        | Code::TooMany
        | Code::Unavailable
        | Code::Internal
        | Code::Other => Exit::Failed,
    }
}

/// `FILE:LINE:COL: message`, as editors read it.
pub(crate) fn problem_line(file: Option<&Path>, problem: &Problem) -> String {
    let mut text = file.map_or_else(|| "pattern".to_owned(), |file| file.display().to_string());
    if problem.line > 0 {
        let _ = write!(text, ":{}", problem.line);
        if problem.column > 0 {
            let _ = write!(text, ":{}", problem.column);
        }
    }
    escape_for_display(&format!("{text}: {}", problem.message))
}

fn candidates(view: &ErrorView) -> Vec<String> {
    if view.candidates.is_empty() {
        return Vec::new();
    }
    let columns = [
        Column::narrow("id", |c: &tm_api::error::Candidate| c.id.clone()),
        Column::narrow("host", |c| c.host.clone()),
        Column::narrow("addresses", |c| c.addresses.join(" ")),
    ];
    table(&view.candidates, &columns, None).lines().map(|line| format!("  {line}")).collect()
}

#[cfg(test)]
mod tests {
    use tm_api::error::Candidate;

    use super::*;

    fn refused(code: Code) -> ErrorView {
        ErrorView {
            code,
            message: "`web` means two \u{1b}[31mendpoints".into(),
            hint: Some("use the id".into()),
            candidates: vec![Candidate {
                id: "id-1".into(),
                host: "web".into(),
                addresses: vec!["10.0.0.1".into()],
            }],
            problems: Vec::new(),
        }
    }

    #[test]
    fn a_refusal_lists_candidates_and_is_harmless() {
        let report = Failure::from(ClientError::Refused(Box::new(refused(Code::TargetAmbiguous)))).report();
        assert_eq!(
            report,
            "error: `web` means two \\u{1b}[31mendpoints\n  \
             ID    HOST  ADDRESSES\n  id-1  web   10.0.0.1\nhint: use the id\n"
        );
    }

    #[test]
    fn problems_are_shown_as_editors_read_them() {
        let mut view = refused(Code::PatternRefused);
        view.candidates.clear();
        view.hint = None;
        view.problems = [(3, 9), (4, 0), (0, 0)]
            .map(|(line, column)| Problem { line, column, message: "wrong".into() })
            .into();
        let failure = Failure::Import { file: "a.yar".into(), source: ClientError::Refused(Box::new(view)) };
        let report = failure.report();
        let lines: Vec<&str> = report.lines().skip(1).collect();
        assert_eq!(lines, ["a.yar:3:9: wrong", "a.yar:4: wrong", "a.yar: wrong"]);
        assert_eq!(failure.exit(), Exit::Refused);
    }

    #[test]
    fn refusals_and_faults_have_different_exit_codes() {
        for (code, number) in [
            (Code::NotAllowed, 3),
            (Code::NotConnected, 3),
            (Code::Conflict, 3),
            (Code::PatternRefused, 3),
            (Code::NotFound, 1),
            (Code::TargetAmbiguous, 1),
            (Code::Unavailable, 1),
        ] {
            let failure = Failure::from(ClientError::Refused(Box::new(refused(code))));
            assert_eq!(failure.exit().code(), number, "{code:?}");
        }
    }
}
