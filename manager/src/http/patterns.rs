//! `/v1/patterns`.

use axum::{
    Extension, Json, RequestExt as _,
    extract::{Request, State},
};
use tm_api::{
    error::Code,
    pattern::{Digests, ImportQuery, PatternView, Problem},
};
use tm_patterns::{InvalidPattern, digests::Algorithm};

use super::{
    Actor, AppState,
    error::{Error, quoted},
    input::{self, Named, Params},
    now_ms, rfc3339,
};
use crate::{
    patterns::{self, ImportError},
    store::{
        Store,
        patterns::{PatternRow, ProblemRow},
        rollouts::Versions,
    },
};

pub(crate) async fn import(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Params(ImportQuery { name, force }): Params<ImportQuery>,
    request: Request,
) -> Result<Json<PatternView>, Error> {
    input::pattern_name(&name)?;
    let turn = patterns::turn().await;
    let body = request.into_limited_body().into_data_stream();
    let rooms = (&state.store, &state.blobs, &state.worker);
    let row = patterns::import(turn, rooms, &actor.name, name, body, force, now_ms()).await?;
    Ok(Json(view(row, &state.store.versions().await?)))
}

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<PatternView>>, Error> {
    let versions = state.store.versions().await?;
    let rows = state.store.patterns().await?;
    Ok(Json(rows.into_iter().map(|row| view(row, &versions)).collect()))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    Named(pattern): Named,
) -> Result<Json<PatternView>, Error> {
    let row = one(&state.store, &pattern).await?;
    Ok(Json(view(row, &state.store.versions().await?)))
}

/// The one pattern that `text` (digest, its start, or name) means.
pub(crate) async fn one(store: &Store, text: &str) -> Result<PatternRow, Error> {
    let mut meant = store.patterns_meant(text).await?;
    match (meant.pop(), meant.len()) {
        (Some(row), 0) => Ok(row),
        (None, _) => Err(Error::not_found("pattern", text)),
        (Some(_), others) => Err(Error::new(
            Code::Conflict,
            format!("the digests of {} patterns begin with {}", others + 1, quoted(text)),
        )
        .hint("give more digits, or the name")),
    }
}

fn view(row: PatternRow, versions: &Versions) -> PatternView {
    PatternView {
        reach: versions.reach(row.reference.sha256),
        sha256: row.reference.sha256.to_string(),
        name: row.reference.name,
        state: if row.published_ms.is_some() { "published" } else { "draft" }.to_owned(),
        kind: row.kind,
        size: row.reference.size,
        rules: row.rules,
        digests: (row.digests.total() > 0).then(|| Digests {
            md5: row.digests.of(Algorithm::Md5),
            sha1: row.digests.of(Algorithm::Sha1),
            sha256: row.digests.of(Algorithm::Sha256),
        }),
        imported_by: row.imported_by,
        imported_at: rfc3339(row.imported_ms),
        warnings: row
            .warnings
            .into_iter()
            .map(|ProblemRow { line, column, message }| Problem { line, column, message })
            .collect(),
    }
}

fn places(problems: Vec<tm_patterns::Problem>) -> Vec<Problem> {
    problems
        .into_iter()
        .map(|tm_patterns::Problem { line, column, message }| Problem { line, column, message })
        .collect()
}

impl From<ImportError> for Error {
    fn from(error: ImportError) -> Self {
        let refused = |message: String| Self::new(Code::PatternRefused, message);
        match error {
            ImportError::Invalid(invalid) => {
                let message = invalid.to_string();
                match invalid {
                    InvalidPattern::TooLarge { .. } | InvalidPattern::LongList => {
                        Self::new(Code::TooLarge, message)
                    }
                    InvalidPattern::NotText { line } => {
                        let line = u32::try_from(line).unwrap_or(u32::MAX);
                        let problem = Problem { line, column: 0, message: "not UTF-8 text".to_owned() };
                        refused(message).problems(vec![problem])
                    }
                    InvalidPattern::Empty
                    | InvalidPattern::Compiled
                    | InvalidPattern::List(_)
                    | InvalidPattern::Digests(_)
                    | InvalidPattern::Memory(_)
                    | InvalidPattern::Digest { .. } => refused(message),
                }
            }
            ImportError::Incomplete(_) => Self::invalid("the pattern did not arrive whole"),
            ImportError::Refused(problems) => {
                refused("the pattern does not compile".to_owned()).problems(places(problems))
            }
            ImportError::TooSlow(problems) => {
                refused("the pattern has rules that can hold up a scan".to_owned())
                    .problems(places(problems))
                    .hint("mend these rules, or take them all the same: import it with --force")
            }
            ImportError::Hostile(what) => refused(format!("the pattern {what}"))
                .hint("a pattern that a compiler cannot bear is not used"),
            ImportError::OtherName(name) => Self::new(
                Code::AlreadyExists,
                format!("the same bytes are already here under the name {}", quoted(&name)),
            )
            .hint("use that name"),
            ImportError::Store(error) => error.into(),
            internal @ (ImportError::Check(_) | ImportError::Blob(_) | ImportError::Task(_)) => {
                Self::new(Code::Internal, internal.to_string())
                    .hint("the manager's log says more")
                    .cause(internal)
            }
        }
    }
}
