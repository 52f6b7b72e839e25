//! Patterns that come in: tried in a worker process, stored by digest, named.
//!
//! **Invariant:** a pattern that the store lists has compiled in a worker, and its bytes are in [`Blobs`].
//! **Invariant:** this process never parses a rule. It reads digest lists, which are data, and compiles them.

mod blobs;
mod incoming;
pub(crate) mod trust;

use axum::body::Bytes;
use futures_util::Stream;
use tm_patterns::{Imported, InvalidPattern, Pattern, Problem, ReadError};
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

/// Imports at once, each with up to 64 MiB of rule text here and a compiler process beside, or with the entries of a
/// digest list.
static IMPORTS: Semaphore = Semaphore::const_new(2);

/// The right to one import. When all are taken, the next waits until its request's time is up.
pub(crate) type Turn = SemaphorePermit<'static>;

/// Why a pattern was not imported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    #[error("the bytes are not a pattern")]
    Invalid(#[source] InvalidPattern),
    #[error("the pattern did not arrive whole")]
    Incomplete(#[source] std::io::Error),
    #[error("the pattern does not compile")]
    Refused(Vec<Problem>),
    #[error("the pattern has rules that can hold up a scan")]
    TooSlow(Vec<Problem>),
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

/// Takes in what `body` brings under `name`. The same bytes under the same name again change nothing, or make them
/// the ones that the name means again; those of a digest list are its compiled ones. With `force`, rules that can
/// hold up a scan are taken too.
///
/// # Errors
/// If they are not a pattern, do not compile, have such rules, are here under another name, or cannot be stored.
pub(crate) async fn import<E>(
    turn: Turn,
    (store, blobs, worker): (&Store, &Blobs, &WorkerProgram),
    actor: &str,
    name: String,
    body: impl Stream<Item = Result<Bytes, E>>,
    force: bool,
    now_ms: i64,
) -> Result<PatternRow, ImportError> {
    let (feeder, incoming) = incoming::pipe();
    // The permit goes along: a request that is given up does not free what still runs.
    let reading = tokio::task::spawn_blocking(move || (turn, Pattern::read(name, incoming)));
    feeder.feed(body).await;
    let (turn, imported) = reading.await.map_err(ImportError::Task)?;
    let imported = imported.map_err(|error| match error {
        ReadError::Invalid(invalid) => ImportError::Invalid(invalid),
        ReadError::Read(error) => ImportError::Incomplete(error),
    })?;
    let known = store.pattern(imported.pattern.sha256()).await?;
    let (blobs, worker) = (blobs.clone(), worker.clone());
    let new = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        prepare(&blobs, &worker, known, imported, force)
    })
    .await
    .map_err(ImportError::Task)??;
    match store.import_pattern(&new, actor, now_ms).await? {
        Import::Stored(mut row) => {
            // The same entries may come in a text with other junk in it.
            if row.digests.total() > 0 {
                row.warnings = new.warnings;
            }
            Ok(row)
        }
        Import::OtherName(name) => Err(ImportError::OtherName(name)),
    }
}

fn prepare(
    blobs: &Blobs,
    worker: &WorkerProgram,
    known: Option<PatternRow>,
    Imported { pattern, list }: Imported,
    forced: bool,
) -> Result<NewPattern, ImportError> {
    let (rules, warnings) = match (pattern.digests(), known) {
        (Some(_), _) => {
            // What was compiled elsewhere is not believed.
            if list.is_none() {
                pattern.check_digests().map_err(ImportError::Invalid)?;
            }
            let remarks = list.map(|summary| summary.remarks()).unwrap_or_default();
            (0, remarks.into_iter().map(ProblemRow::from).collect())
        }
        (None, Some(row)) => (row.rules, row.warnings),
        (None, None) => {
            let checked = check::check_with(worker, &pattern, forced).map_err(|error| match error {
                CheckError::Refused(problems) => ImportError::Refused(problems),
                CheckError::TooSlow(problems) => ImportError::TooSlow(problems),
                CheckError::Hostile(what) => ImportError::Hostile(what),
                CheckError::Start(source) => ImportError::Check(source),
            })?;
            (checked.rules, checked.warnings.into_iter().map(ProblemRow::from).collect())
        }
    };
    // Before the row: an order must never name bytes that no agent can fetch.
    let stored = pattern.to_bytes().and_then(|bytes| blobs.put(pattern.sha256(), &bytes));
    stored.map_err(ImportError::Blob)?;
    let digests = pattern.digests().map(|list| list.counts()).unwrap_or_default();
    Ok(NewPattern { reference: pattern.reference(), rules, digests, warnings, forced })
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tm_patterns::digests::Counts;
    use tm_protocol::{ids::Sha256, task::PatternRef};

    use super::*;
    use crate::store::tests::scratch;

    fn body(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, ()>> {
        stream::iter(bytes.chunks(7).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect::<Vec<_>>())
    }

    #[tokio::test]
    async fn known_bytes_are_not_tried_again_and_keep_their_name() {
        let (store, folder) = scratch().await;
        let blobs =
            Blobs::open(folder.path().join("patterns"), tm_protocol::ids::ManagerId::new(uuid::Uuid::nil()))
                .unwrap();
        // A worker that cannot start proves that none was needed.
        let worker = WorkerProgram { path: "/nonexistent/worker".into(), args: Vec::new() };
        let text = b"rule a { condition: true }".to_vec();
        let sha256 = Sha256::of(&text);
        let reference = PatternRef { sha256, size: 26, name: "a".to_owned() };
        let new = NewPattern {
            reference,
            rules: 1,
            digests: Counts::default(),
            warnings: Vec::new(),
            forced: false,
        };
        store.import_pattern(&new, "root", 1).await.unwrap();

        let rooms = (&store, &blobs, &worker);
        let again = import(turn().await, rooms, "root", "a".to_owned(), body(&text), false, 2).await.unwrap();
        assert_eq!((again.reference.sha256, again.imported_ms), (sha256, 1));
        assert_eq!(std::fs::read(blobs.path(sha256)).unwrap(), text);

        let other = import(turn().await, rooms, "root", "b".to_owned(), body(&text), false, 2).await;
        assert!(matches!(other, Err(ImportError::OtherName(name)) if name == "a"));
        let empty = import(turn().await, rooms, "root", "b".to_owned(), body(b" \n"), false, 2).await;
        assert!(matches!(empty, Err(ImportError::Invalid(InvalidPattern::Empty))));
        assert!(store.pattern(Sha256::of(b" \n")).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_list_is_known_by_its_entries() {
        let (store, folder) = scratch().await;
        let blobs =
            Blobs::open(folder.path().join("patterns"), tm_protocol::ids::ManagerId::new(uuid::Uuid::nil()))
                .unwrap();
        let worker = WorkerProgram { path: "/nonexistent/worker".into(), args: Vec::new() };
        let rooms = (&store, &blobs, &worker);
        let (a, b) = ("0a".repeat(32), "0b".repeat(16));
        let first = format!("# list\n{a} Bad\n{b}\nnonsense\n");
        let row = import(turn().await, rooms, "root", "l".to_owned(), body(first.as_bytes()), false, 1)
            .await
            .unwrap();
        assert_eq!((row.rules, row.digests.to_string().as_str()), (0, "1 SHA-256, 1 MD5"));
        assert_eq!(row.warnings.iter().map(|warning| warning.line).collect::<Vec<_>>(), [4]);
        let bytes = std::fs::read(blobs.path(row.reference.sha256)).unwrap();
        assert_eq!((Sha256::of(&bytes), bytes.len() as u64), (row.reference.sha256, row.reference.size));

        let other_text = format!("{b}\r\n{a},Bad\r\n");
        for (text, warnings) in [(other_text.as_bytes(), 0), (&bytes, 0), (first.as_bytes(), 1)] {
            let again =
                import(turn().await, rooms, "root", "l".to_owned(), body(text), false, 2).await.unwrap();
            assert_eq!((again.reference.sha256, again.imported_ms), (row.reference.sha256, 1));
            assert_eq!((again.digests, again.warnings.len()), (row.digests, warnings));
        }
        assert_eq!(store.patterns().await.unwrap().len(), 1);

        let mut hostile = bytes;
        let body_length = hostile.len() - 32;
        hostile[body_length - 30] ^= 1;
        let refused = import(turn().await, rooms, "root", "h".to_owned(), body(&hostile), false, 3).await;
        assert!(matches!(refused, Err(ImportError::Invalid(InvalidPattern::Digests(_)))));
        let broken = stream::iter([Ok(Bytes::from(a.clone())), Err(())]);
        let refused = import(turn().await, rooms, "root", "i".to_owned(), broken, false, 3).await;
        assert!(matches!(refused, Err(ImportError::Incomplete(_))), "half a list is not a list");
        assert_eq!(store.patterns().await.unwrap().len(), 1);
    }
}
