//! `tmctl coverage`: what nobody has looked at for how long.

use std::os::unix::ffi::OsStrExt as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::coverage::{CoverageQuery, CoverageView, EndpointCoverage, Look, Standing};
use tm_protocol::text::escape_for_display;

use crate::{
    cli::Coverage,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Format, Output, plural, say},
};

const COLUMNS: [Column<EndpointCoverage>; 11] = [
    Column::narrow("host", |e| e.host.clone()),
    Column::narrow("standing", |e| word(e.standing).to_owned()),
    Column::narrow("looked_at_whole", |e| e.whole.as_ref().map_or("never".to_owned(), |l| age(l.age_s))),
    Column::narrow("verdict", |e| e.whole.as_ref().map(verdict).unwrap_or_default()),
    Column::narrow("last_scan", |e| e.last.as_ref().map_or("never".to_owned(), |l| age(l.age_s))),
    Column::narrow("gaps", |e| e.last.as_ref().map(gaps).unwrap_or_default()),
    Column::narrow("patterns", |e| newest(e).map(|l| l.patterns.join(" ")).unwrap_or_default()),
    Column::wide("endpoint", |e| e.id.clone()),
    Column::wide("task", |e| newest(e).map(|l| l.task.clone()).unwrap_or_default()),
    Column::wide("receipt", |e| {
        let word = |l: &Look| if l.verified { "verified" } else { "unverified" };
        newest(e).map(word).unwrap_or_default().to_owned()
    }),
    Column::wide("looked_at", |e| newest(e).map(|l| l.looked_at.clone()).unwrap_or_default()),
];

pub(crate) async fn run(args: Coverage, client: &Client, out: &Output) -> Result<Exit, Failure> {
    if args.targets.iter().any(|target| target.contains(',')) {
        return Err(Failure::Usage("a TARGET holds no comma; separate several with spaces".to_owned()));
    }
    let query = CoverageQuery {
        targets: (!args.targets.is_empty()).then(|| args.targets.join(",")),
        search: args.search,
        group: args.group,
        query: args.query,
        days: Some(args.days),
        path_b64: Some(STANDARD.encode(args.path.as_bytes())),
    };
    let view: CoverageView = client.get(&["coverage"], &query).await?;
    if out.format() == Format::Json {
        out.json(&view)?;
        return Ok(Exit::Done);
    }
    let summary = summary(&view);
    let rows: Vec<EndpointCoverage> =
        view.endpoints.into_iter().filter(|e| args.all || e.standing != Standing::Covered).collect();
    out.list(&rows, &COLUMNS, "no endpoint is left out")?;
    say(&summary);
    Ok(Exit::Done)
}

/// How many stand how, in a line.
fn summary(view: &CoverageView) -> String {
    let counts = view.counts;
    format!(
        "{} of {} looked at as a whole within {}: {} covered, {} stale, {} incomplete, {} never\n",
        escape_for_display(&view.path),
        plural(u64::try_from(view.endpoints.len()).unwrap_or(u64::MAX), "endpoint"),
        plural(u64::from(view.days), "day"),
        counts.covered,
        counts.stale,
        counts.incomplete,
        counts.never,
    )
}

/// The look that the row is mostly about.
const fn newest(endpoint: &EndpointCoverage) -> Option<&Look> {
    match (endpoint.standing, &endpoint.whole) {
        (Standing::Covered | Standing::Stale, Some(whole)) => Some(whole),
        (Standing::Covered | Standing::Stale | Standing::Incomplete | Standing::Never, _) => {
            endpoint.last.as_ref()
        }
    }
}

const fn word(standing: Standing) -> &'static str {
    match standing {
        Standing::Covered => "covered",
        Standing::Stale => "stale",
        Standing::Incomplete => "incomplete",
        Standing::Never => "never",
    }
}

fn verdict(look: &Look) -> String {
    look.verdict.map(|verdict| verdict.to_string()).unwrap_or_default()
}

/// Why the whole was not seen: skips by reason, or how the task ended.
fn gaps(look: &Look) -> String {
    let ended = match &look.code {
        Some(code) => vec![code.clone()],
        None if look.state != tm_protocol::task::TaskState::Done => vec![look.state.to_string()],
        None => vec![],
    };
    let skipped = look.gaps.iter().map(|(reason, count)| format!("{reason} {count}"));
    ended.into_iter().chain(skipped).collect::<Vec<_>>().join(", ")
}

/// `3 d`, `5 h`, `7 min`, `8 s`: how long ago.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        86_400.. => format!("{} d ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_rounded_down() {
        for (seconds, expected) in
            [(0, "0 s ago"), (59, "59 s ago"), (60, "1 min ago"), (7199, "1 h ago"), (86_400 * 9, "9 d ago")]
        {
            assert_eq!(age(seconds), expected);
        }
    }

    #[test]
    fn gaps_name_reasons_and_ends() {
        let look = Look {
            task: "t".into(),
            looked_at: String::new(),
            age_s: 0,
            state: tm_protocol::task::TaskState::Cancelled,
            code: None,
            verdict: None,
            patterns: vec![],
            gaps: [("encrypted".to_owned(), 2), ("remote".to_owned(), 1)].into(),
            verified: false,
        };
        assert_eq!(gaps(&look), "cancelled, encrypted 2, remote 1");
        let failed = Look { code: Some("deadline".into()), gaps: [].into(), ..look };
        assert_eq!(gaps(&failed), "deadline");
    }
}
