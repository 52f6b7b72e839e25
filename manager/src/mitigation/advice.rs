//! What a person should do next: one sentence, and the command for it in backquotes.
//!
//! **Invariant:** a command holds only ids, host names of harmless letters and fixed words, so that it can be
//! copied into a shell whatever an endpoint calls itself.

use tm_api::{
    event::{EventKind, EventStatus, IncidentState},
    task::TaskView,
};

/// What an event's advice is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) kind: EventKind,
    pub(crate) status: EventStatus,
    pub(crate) detail: &'a str,
    /// The endpoint's id and its host name as it was.
    pub(crate) endpoint: &'a str,
    pub(crate) host: &'a str,
    pub(crate) task: Option<&'a str>,
}

/// What to do about an event; empty if nothing.
pub(crate) fn of_event(subject: &Subject<'_>) -> String {
    let target = target(subject.host, subject.endpoint);
    match subject.status {
        EventStatus::InProgress => match subject.task {
            Some(task) => format!("Wait for it, or watch it: `tmctl task follow {task}`."),
            None => format!("Wait for it, or see how far it is: `tmctl why {target}`."),
        },
        EventStatus::NoMitigation => {
            format!("The endpoint is excepted and nothing is done on it; see it with `tmctl why {target}`.")
        }
        EventStatus::Assessed => {
            format!("See what would be removed, then remove it: `tmctl cleanup run {target} --dry-run`.")
        }
        EventStatus::Scanned if subject.detail == INCOMPLETE => match subject.task {
            Some(task) => format!("See what was not looked at: `tmctl task show {task}`."),
            None => String::new(),
        },
        EventStatus::Resolved | EventStatus::Scanned | EventStatus::Noted => String::new(),
        EventStatus::RolledBack => {
            format!(
                "If that file is not wanted after all, scan again and clean: `tmctl scan start {target} --path /`."
            )
        }
        EventStatus::RollbackFailed => match subject.task {
            Some(task) => format!(
                "The file is still in the vault; see why with `tmctl task show {task}`, then restore it elsewhere \
                 with `--to`."
            ),
            None => format!("The file is still in the vault: `tmctl vault list --endpoint {target}`."),
        },
        EventStatus::Unsuccessful => unsuccessful(subject, &target),
    }
}

/// The detail of a scan that saw no threat and did not see everything.
pub(crate) const INCOMPLETE: &str = "incomplete";

fn unsuccessful(subject: &Subject<'_>, target: &str) -> String {
    match (subject.detail, subject.kind) {
        ("cannot-connect", _) => format!(
            "See why the endpoint is away, then order again with `--when-connected` and a longer `--expires`: \
             `tmctl why {target}`."
        ),
        ("unsupported", _) => {
            format!(
                "Update the agent, which does not know this kind of task: `tmctl endpoint show {target}`."
            )
        }
        ("likely-false-positive", _) => show(
            subject,
            target,
            "The package manager knows the file as it is; correct the pattern rather than the endpoint",
        ),
        ("critical-file", _) => {
            show(subject, target, "The system needs the file; reinstall the package that is named for it")
        }
        ("changed", _) => {
            format!(
                "The file is not the one that was detected; look again: `tmctl scan start {target} --path /`."
            )
        }
        ("cancelled", EventKind::ScanAdministrator) => {
            format!("Order it again when it suits: `tmctl scan start {target} --path /`.")
        }
        ("cancelled" | "deadline" | "timeout" | "interrupted", EventKind::Cleanup) => {
            format!("Run it again; what was removed stays removed: `tmctl cleanup run {target}`.")
        }
        ("deadline" | "timeout" | "interrupted", EventKind::ScanAdministrator) => {
            format!(
                "Scan less at a time, or allow more time with `--deadline`: `tmctl scan start {target} --path /`."
            )
        }
        ("identity-conflict", EventKind::Agent) => {
            format!(
                "A machine or folder was copied. See who is held with `tmctl endpoint conflicts`, and make it an endpoint of \
                 its own: `tmctl endpoint approve {target}`. If you do not know it, shut both out: `tmctl endpoint \
                 revoke {target}`."
            )
        }
        (_, EventKind::PatternDeployment) => {
            "See which pattern it is and why it was stopped: `tmctl pattern rollout list`. Correct it and publish it anew; \
             if what it hit was right, resume its rollout with --force."
                .to_owned()
        }
        (_, EventKind::Certificate) => {
            format!(
                "See that the agent comes back before the end (up to 30 days after it, it renews by itself), or enroll \
                 it anew: `tmctl why {target}`."
            )
        }
        (_, EventKind::Agent) => {
            format!("See what the endpoint told and whether work was lost: `tmctl endpoint events {target}`.")
        }
        (_, EventKind::Cleanup | EventKind::Restore | EventKind::ScanAdministrator) => {
            show(subject, target, "See what went wrong, item by item")
        }
    }
}

fn show(subject: &Subject<'_>, target: &str, what: &str) -> String {
    match subject.task {
        Some(task) => format!("{what}: `tmctl task show {task}`."),
        None => format!("{what}: `tmctl why {target}`."),
    }
}

/// What an endpoint's advice is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing<'a> {
    pub(crate) endpoint: &'a str,
    pub(crate) host: &'a str,
    pub(crate) connected: bool,
    /// Of each of its incidents: the state, and why it is unresolved.
    pub(crate) incidents: &'a [(IncidentState, String)],
    /// Its tasks that have not ended.
    pub(crate) tasks: &'a [TaskView],
}

/// What to do about an endpoint, most urgent first; empty if nothing waits.
pub(crate) fn of_endpoint(standing: &Standing<'_>) -> Vec<String> {
    let target = target(standing.host, standing.endpoint);
    let count = |state: IncidentState| standing.incidents.iter().filter(|(s, _)| *s == state).count();
    let (unresolved, waiting) = (count(IncidentState::Unresolved), count(IncidentState::AwaitingCleanup));
    let away = if standing.connected { "" } else { " --when-connected" };
    let mut advice = Vec::new();
    if unresolved > 0 {
        let mut codes: Vec<&str> = standing
            .incidents
            .iter()
            .filter(|(state, detail)| *state == IncidentState::Unresolved && is_plain(detail))
            .map(|(_, detail)| detail.as_str())
            .collect();
        codes.sort_unstable();
        codes.dedup();
        codes.truncate(5);
        let why = if codes.is_empty() { String::new() } else { format!(" ({})", codes.join(", ")) };
        advice.push(format!(
            "{} left unresolved by a cleanup{why}: see each with `tmctl event list --endpoint {target}`, then try \
             again with `tmctl cleanup run {target}{away}`.",
            incidents(unresolved)
        ));
    }
    if waiting > 0 {
        advice.push(format!(
            "{} waiting for cleanup: `tmctl cleanup run {target}{away}` (first with `--dry-run` to see what would \
             be removed).",
            incidents(waiting)
        ));
    }
    let failed = count(IncidentState::RollbackFailed);
    if failed > 0 {
        advice.push(format!(
            "{} whose file could not be put back: `tmctl vault list --endpoint {target}`.",
            incidents(failed)
        ));
    }
    for task in standing.tasks.iter().filter(|task| task.cancelling).take(3) {
        advice.push(format!(
            "A {} is being called off and its agent has not answered yet: `tmctl task follow {}`.",
            task.kind, task.id
        ));
    }
    let queued = standing.tasks.iter().filter(|task| !standing.connected && !task.cancelling).count();
    if queued > 0 {
        advice.push(format!(
            "{queued} task{} for the endpoint, which is away: bring it back, or see them with \
             `tmctl task list --endpoint {target}`.",
            if queued == 1 { " waits" } else { "s wait" }
        ));
    } else if !standing.connected {
        advice.push(format!(
            "The endpoint is away: check that it runs and reaches the manager; when it was last heard of and why \
             it failed to connect is in `tmctl endpoint show {target}`."
        ));
    }
    advice
}

fn incidents(count: usize) -> String {
    if count == 1 { "1 incident".to_owned() } else { format!("{count} incidents") }
}

/// How a command names an endpoint: by its host name where that is harmless, else by its id.
fn target(host: &str, endpoint: &str) -> String {
    if is_plain(host) { host.to_owned() } else { endpoint.to_owned() }
}

/// Whether a shell, a terminal and a reader take a word for what it is.
fn is_plain(word: &str) -> bool {
    (1..=253).contains(&word.len())
        && !word.starts_with('-')
        && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What tmctl can do (product words, section 6).
    const COMMANDS: [&str; 12] = [
        "tmctl why ",
        "tmctl cleanup run ",
        "tmctl task follow ",
        "tmctl task show ",
        "tmctl task list ",
        "tmctl vault list ",
        "tmctl endpoint show ",
        "tmctl endpoint events ",
        "tmctl event list ",
        "tmctl scan start ",
        "tmctl vault restore ",
        "tmctl pattern rollout list",
    ];

    /// Every command in backquotes is one of [`COMMANDS`], and there is at least one.
    fn has_commands(advice: &str) -> bool {
        let quoted: Vec<&str> =
            advice.split('`').skip(1).step_by(2).filter(|q| !q.starts_with("--")).collect();
        !quoted.is_empty() && quoted.iter().all(|q| COMMANDS.iter().any(|known| q.starts_with(known)))
    }

    #[test]
    fn every_status_says_what_to_do_next() {
        let details = [
            "",
            "ordered",
            INCOMPLETE,
            "cancelled",
            "cannot-connect",
            "deadline",
            "timeout",
            "interrupted",
            "unsupported",
            "likely-false-positive",
            "critical-file",
            "changed",
            "journal-damaged",
            "something-new",
        ];
        for kind in EventKind::ALL {
            for status in EventStatus::ALL {
                for (detail, task) in details.iter().flat_map(|d| [(*d, None), (*d, Some("T"))]) {
                    let subject =
                        Subject { kind: *kind, status: *status, detail, endpoint: "E", host: "web-07", task };
                    let advice = of_event(&subject);
                    let quiet =
                        matches!(status, EventStatus::Resolved | EventStatus::Scanned | EventStatus::Noted);
                    assert!(quiet || has_commands(&advice), "{kind} {status} {detail}: {advice}");
                    assert!(advice.is_empty() || has_commands(&advice), "{kind} {status} {detail}: {advice}");
                }
            }
        }
    }

    #[test]
    fn a_command_never_holds_what_an_endpoint_calls_itself() {
        for host in ["$(reboot)", "-rf", "a b", "", "x`id`", "w\u{1b}[31m", "a;b", "naïve"] {
            let subject = Subject {
                kind: EventKind::Cleanup,
                status: EventStatus::Assessed,
                detail: "",
                endpoint: "018f3c1e-6b5a-7000-8000-0123456789ab",
                host,
                task: None,
            };
            let advice = of_event(&subject);
            assert!(advice.contains("run 018f3c1e-6b5a-7000-8000-0123456789ab"), "{host:?}: {advice}");
            let incidents = [(IncidentState::Unresolved, "$(reboot)".to_owned())];
            let standing =
                Standing { endpoint: "E", host, connected: true, incidents: &incidents, tasks: &[] };
            let advice = of_endpoint(&standing).join(" ");
            assert!(!advice.contains("reboot") && advice.contains("cleanup run E"), "{host:?}: {advice}");
        }
    }

    #[test]
    fn what_is_most_urgent_comes_first() {
        let incidents = [
            (IncidentState::AwaitingCleanup, String::new()),
            (IncidentState::Unresolved, "critical-file".to_owned()),
            (IncidentState::Resolved, String::new()),
            (IncidentState::AwaitingCleanup, String::new()),
        ];
        let standing =
            Standing { endpoint: "E", host: "web", connected: false, incidents: &incidents, tasks: &[] };
        let advice = of_endpoint(&standing);
        assert_eq!(advice.len(), 3, "{advice:#?}");
        assert!(
            advice[0].starts_with("1 incident left unresolved by a cleanup (critical-file)"),
            "{advice:#?}"
        );
        assert!(advice[1].starts_with("2 incidents waiting"), "{advice:#?}");
        assert!(advice[1].contains("`tmctl cleanup run web --when-connected`"), "{advice:#?}");
        assert!(advice[2].starts_with("The endpoint is away"), "{advice:#?}");
        assert!(advice.iter().all(|a| has_commands(a)), "{advice:#?}");
        let quiet = Standing { connected: true, incidents: &[], ..standing };
        assert_eq!(of_endpoint(&quiet), [""; 0]);
    }
}
