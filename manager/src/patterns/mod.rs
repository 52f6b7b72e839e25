//! Patterns that come in: tried in a worker process, stored by digest, named.
//!
//! **Invariant:** a pattern that the store lists has compiled in a worker, and its bytes are in [`Blobs`].
//! **Invariant:** this process never parses a rule.

mod blobs;

use tm_patterns::{InvalidPattern, Pattern, Problem};
use tm_protocol::ids::Sha256;
use tm_scanner::{
    check::{self, CheckError},
    pool::WorkerProgram,
};
use tokio::sync::{Semaphore, SemaphorePermit};

pub(crate) use self::blobs::Blobs;
use crate::store::{
    Store, StoreError,
    patterns::{Import, NewPattern, PatternRow, ProblemRow},
};

/// Imports at once, each with up to 64 MiB of text here and a compiler process beside.
static IMPORTS: Semaphore = Semaphore::const_new(2);

/// The right to one import. When all are taken, the next waits until its request's time is up.
pub(crate) type Turn = SemaphorePermit<'static>;

/// Why a pattern was not imported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    #[error("the bytes are not a pattern")]
    Invalid(#[source] InvalidPattern),
    #[error("the pattern does not compile")]
    Refused(Vec<Problem>),
    #[error("the pattern {0}")]
    Hostile(&'static str),
    #[error("cannot try the pattern")]
    Check(#[source] std::io::Error),
    #[error("cannot store the pattern's bytes")]
    Blob(#[source] std::io::Error),
    #[error("the import ended abnormally")]
    Task(#[source] tokio::task::JoinError),
    #[error("the same bytes are already here under the name `{0}`")]
    OtherName(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Waits for a turn to import. To be taken before the bytes are read, which bounds the memory they take.
pub(crate) async fn turn() -> Turn {
    IMPORTS.acquire().await.expect("the semaphore is never closed")
}

/// Takes in `bytes` under `name`. The same bytes under the same name again change nothing, or make them
/// the ones that the name means again.
///
/// # Errors
/// If they are not a pattern, do not compile, are here under another name, or cannot be stored.
pub(crate) async fn import(
    turn: Turn,
    (store, blobs, worker): (&Store, &Blobs, &WorkerProgram),
    actor: &str,
    name: String,
    bytes: Vec<u8>,
    now_ms: i64,
) -> Result<PatternRow, ImportError> {
    let known = store.pattern(Sha256::of(&bytes)).await?;
    let (blobs, worker, program_name) = (blobs.clone(), worker.clone(), name.clone());
    // The permit goes along: a request that is given up does not free the worker that still runs.
    let new = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        prepare(&blobs, &worker, known, program_name, bytes)
    })
    .await
    .map_err(ImportError::Task)??;
    match store.import_pattern(&new, actor, now_ms).await? {
        Import::Stored(row) => Ok(row),
        Import::OtherName(name) => Err(ImportError::OtherName(name)),
    }
}

fn prepare(
    blobs: &Blobs,
    worker: &WorkerProgram,
    known: Option<PatternRow>,
    name: String,
    bytes: Vec<u8>,
) -> Result<NewPattern, ImportError> {
    let pattern = Pattern::new(name, bytes).map_err(ImportError::Invalid)?;
    let (rules, warnings) = match known {
        Some(row) => (row.rules, row.warnings),
        None => {
            let checked = check::check(worker, &pattern).map_err(|error| match error {
                CheckError::Refused(problems) => ImportError::Refused(problems),
                CheckError::Hostile(what) => ImportError::Hostile(what),
                CheckError::Start(source) => ImportError::Check(source),
            })?;
            (checked.rules, checked.warnings.into_iter().map(ProblemRow::from).collect())
        }
    };
    // Before the row: an order must never name bytes that no agent can fetch.
    let stored = pattern.to_bytes().and_then(|bytes| blobs.put(pattern.sha256(), &bytes));
    stored.map_err(ImportError::Blob)?;
    Ok(NewPattern { reference: pattern.reference(), rules, warnings })
}

#[cfg(test)]
mod tests {
    use tm_protocol::task::PatternRef;

    use super::*;
    use crate::store::tests::scratch;

    #[tokio::test]
    async fn known_bytes_are_not_tried_again_and_keep_their_name() {
        let (store, folder) = scratch().await;
        let blobs = Blobs::open(folder.path().join("patterns")).unwrap();
        // A worker that cannot start proves that none was needed.
        let worker = WorkerProgram { path: "/nonexistent/worker".into(), args: Vec::new() };
        let text = b"rule a { condition: true }".to_vec();
        let sha256 = Sha256::of(&text);
        let reference = PatternRef { sha256, size: 26, name: "a".to_owned() };
        let new = NewPattern { reference, rules: 1, warnings: Vec::new() };
        store.import_pattern(&new, "root", 1).await.unwrap();

        let rooms = (&store, &blobs, &worker);
        let again = import(turn().await, rooms, "root", "a".to_owned(), text.clone(), 2).await.unwrap();
        assert_eq!((again.reference.sha256, again.imported_ms), (sha256, 1));
        assert_eq!(std::fs::read(blobs.path(sha256)).unwrap(), text);

        let other = import(turn().await, rooms, "root", "b".to_owned(), text, 2).await;
        assert!(matches!(other, Err(ImportError::OtherName(name)) if name == "a"));
        let empty = import(turn().await, rooms, "root", "b".to_owned(), b" \n".to_vec(), 2).await;
        assert!(matches!(empty, Err(ImportError::Invalid(InvalidPattern::Empty))));
        assert!(store.pattern(Sha256::of(b" \n")).await.unwrap().is_none());
    }
}
