//! `/v1/coverage`: what nobody has looked at for how long.

use axum::{Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tm_api::coverage::{Counts, CoverageQuery, CoverageView, EndpointCoverage, Look, Standing};
use tm_protocol::{
    report::{PathBytes, SkipReason},
    text::escape,
};

use super::{AppState, endpoints, error::Error, input::Params, now_ms, orders, rfc3339};
use crate::store::{
    coverage::{CoverageRow, LookRow, normal},
    endpoints::Filter,
};

const DAY_MS: i64 = 86_400_000;
/// Skips that leave no gap.
const HARMLESS: [SkipReason; 3] = [SkipReason::Special, SkipReason::Symlink, SkipReason::Pseudo];

pub(crate) async fn show(
    State(state): State<AppState>,
    Params(query): Params<CoverageQuery>,
) -> Result<Json<CoverageView>, Error> {
    let days = query.days.unwrap_or(CoverageQuery::DAYS);
    if !(1..=CoverageQuery::MAX_DAYS).contains(&days) {
        return Err(Error::invalid(format!("the days are from 1 to {}", CoverageQuery::MAX_DAYS)));
    }
    let path = match &query.path_b64 {
        Some(text) => orders::absolute(text, STANDARD.decode(text).ok())?,
        None => PathBytes(b"/".to_vec()),
    };
    let path = normal(&path).ok_or_else(|| Error::invalid("the path leads upwards"))?;
    let only = match &query.targets {
        Some(targets) => {
            let targets: Vec<&str> = targets.split(',').collect();
            if targets.len() > CoverageQuery::MAX_TARGETS {
                let most = CoverageQuery::MAX_TARGETS;
                return Err(Error::invalid(format!("at most {most} targets can be named")));
            }
            let mut ids = Vec::with_capacity(targets.len());
            for target in targets {
                ids.push(endpoints::one(&state.store, target).await?.id);
            }
            Some(ids)
        }
        None => None,
    };
    let filter = Filter {
        terms: query.search.as_deref().map(endpoints::terms).transpose()?.unwrap_or_default(),
        group: query.group,
        connected: None,
        query: query.query,
    };
    let rows = state.store.coverage(&filter, only.as_deref(), &path).await?;
    let now = now_ms();
    let since = now.saturating_sub(i64::from(days) * DAY_MS);
    let mut counts = Counts::default();
    let endpoints = rows
        .into_iter()
        .map(|row| {
            let standing = standing(&row, since);
            let count = match standing {
                Standing::Covered => &mut counts.covered,
                Standing::Stale => &mut counts.stale,
                Standing::Incomplete => &mut counts.incomplete,
                Standing::Never => &mut counts.never,
            };
            *count += 1;
            EndpointCoverage {
                id: row.endpoint,
                host: row.host,
                standing,
                whole: row.whole.map(|look| view(look, now)),
                last: row.last.map(|look| view(look, now)),
            }
        })
        .collect();
    Ok(Json(CoverageView { path: escape(&path), path_b64: STANDARD.encode(&path), days, counts, endpoints }))
}

fn standing(row: &CoverageRow, since: i64) -> Standing {
    match (&row.whole, &row.last) {
        (Some(whole), _) if whole.looked_ms >= since => Standing::Covered,
        (Some(whole), Some(last)) if whole.task == last.task => Standing::Stale,
        (_, Some(_)) => Standing::Incomplete,
        (Some(_), None) => Standing::Stale,
        (None, None) => Standing::Never,
    }
}

fn view(row: LookRow, now: i64) -> Look {
    let leaves_a_gap = |reason: &str| !HARMLESS.iter().any(|harmless| harmless.word() == reason);
    Look {
        task: row.task,
        looked_at: rfc3339(row.looked_ms),
        age_s: u64::try_from(now.saturating_sub(row.looked_ms) / 1000).unwrap_or(0),
        state: row.state,
        code: row.code,
        verdict: row.verdict,
        patterns: row.patterns,
        gaps: row.skipped.into_iter().filter(|(reason, count)| *count > 0 && leaves_a_gap(reason)).collect(),
        verified: row.verified,
    }
}

#[cfg(test)]
mod tests {
    use tm_protocol::task::TaskState;

    use super::*;

    #[test]
    fn the_newest_whole_look_decides_and_a_later_gap_is_told() {
        let look = |task: &str, looked_ms| LookRow {
            task: task.to_owned(),
            looked_ms,
            verdict: None,
            patterns: vec![],
            skipped: std::collections::BTreeMap::new(),
            code: None,
            state: TaskState::Done,
            verified: true,
        };
        for (whole, last, expected) in [
            (None, None, Standing::Never),
            (Some(look("a", 10)), Some(look("a", 10)), Standing::Covered),
            (Some(look("a", 10)), Some(look("b", 11)), Standing::Covered),
            (Some(look("a", 9)), Some(look("a", 9)), Standing::Stale),
            (Some(look("a", 9)), Some(look("b", 11)), Standing::Incomplete),
            (None, Some(look("b", 1)), Standing::Incomplete),
        ] {
            let row = CoverageRow { endpoint: String::new(), host: String::new(), whole, last };
            assert_eq!(standing(&row, 10), expected, "{row:?}");
        }
        let mut gaps = look("a", 1000);
        gaps.skipped =
            [("symlink", 3), ("encrypted", 1), ("limit", 0)].map(|(r, n)| (r.to_owned(), n)).into();
        let view = view(gaps, 5000);
        assert_eq!(view.gaps.into_iter().collect::<Vec<_>>(), [("encrypted".to_owned(), 1)]);
        assert_eq!(view.age_s, 4);
    }
}
