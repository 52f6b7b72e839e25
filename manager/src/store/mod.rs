//! The only room that knows SQL. One SQL text serves SQLite and PostgreSQL; one method is one use case.
//!
//! Statements use `$1` placeholders and nothing that only one engine has; sums are cast to BIGINT (the
//! engines differ in the type of `SUM`). Reads go to a pool, writes through one transaction at a time on
//! SQLite (`BEGIN IMMEDIATE`, so that a reader never turns into a writer half-way) and through row locks
//! on PostgreSQL.
//!
//! **Invariant:** an order and its audit record are written in one transaction, or not at all.
//! **Invariant:** what is acknowledged to anybody has been committed with `synchronous=FULL`.

pub(crate) mod accounts;
pub(crate) mod audit;
mod brake;
pub(crate) mod calls;
pub(crate) mod cancels;
pub(crate) mod certificates;
pub(crate) mod cleanups;
pub(crate) mod conflicts;
pub(crate) mod coverage;
mod detections;
pub(crate) mod due;
pub(crate) mod endpoints;
mod ends;
pub(crate) mod enrollments;
pub(crate) mod events;
pub(crate) mod expiry;
pub(crate) mod export;
pub(crate) mod exporters;
mod figures;
pub(crate) mod groups;
pub(crate) mod incidents;
pub(crate) mod items;
pub(crate) mod managers;
mod notices;
mod outcomes;
pub(crate) mod overview;
pub(crate) mod patterns;
pub(crate) mod receipts;
pub(crate) mod reports;
pub(crate) mod restores;
pub(crate) mod rollouts;
pub(crate) mod schema;
pub(crate) mod sessions;
mod specs;
pub(crate) mod streams;
pub(crate) mod tasks;
pub(crate) mod tokens;
pub(crate) mod trust;
pub(crate) mod vault;

#[cfg(test)]
mod story;

use std::{
    str::FromStr as _,
    time::{Duration, Instant},
};

use sqlx::{
    Any, AnyConnection, AnyPool, AssertSqlSafe, Connection as _, Executor as _, PgPool, Transaction,
    any::{AnyConnectOptions, AnyPoolOptions},
};
use tm_api::event::EventKind;
use tm_protocol::report::Failure;

use crate::metrics::METRICS;

/// Connections for reading. SQLite's readers do not wait for its writer (WAL).
const READERS: u32 = 4;
/// How long a statement waits for another process's lock, then for a connection of the pool.
const PATIENCE: Duration = Duration::from_secs(10);

/// SQLite's codes that pass by themselves or when somebody makes room: busy (in its variants), full, and what a
/// full disk or quota looks like where the file system says it late.
const PASSING: [&str; 9] = ["5", "13", "261", "517", "773", "778", "1034", "4874", "5386"];

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("src/store/migrations");

/// The manager's memory.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    engine: Engine,
    read: AnyPool,
    write: AnyPool,
    /// For what only PostgreSQL has.
    calls: Option<PgPool>,
}

/// Which database is behind the pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    Sqlite,
    Postgres,
}

impl Engine {
    /// Rows that one statement may change where it names them. PostgreSQL locks the rows of one statement in an order
    /// of its own, and rows of endpoints are locked in one order everywhere: there each has its own statement.
    const fn rows_at_a_time(self) -> usize {
        match self {
            Self::Sqlite => PARTS[0],
            Self::Postgres => 1,
        }
    }

    /// A statement as this engine reads it best. The placeholders of `sql` stand in it in their order, each once. SQLite
    /// keeps the names of numbered ones in a list, and the driver looks each up from its beginning: a statement for
    /// hundreds of rows takes longer to bind than to carry out. Those without a name are counted.
    fn listed(self, sql: String) -> AssertSqlSafe<String> {
        let text = match self {
            Self::Sqlite => unnumbered(&sql),
            Self::Postgres => sql,
        };
        AssertSqlSafe(text)
    }
}

/// `$1`, `$2`, … as `?`.
fn unnumbered(sql: &str) -> String {
    let mut parts = sql.split('$');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for (index, part) in parts.enumerate() {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        debug_assert_eq!(part[..part.len() - rest.len()].parse(), Ok(index + 1), "{sql}");
        text.push('?');
        text.push_str(rest);
    }
    text
}

/// How many rows one statement is for: few different numbers, because each makes a statement of its own, and
/// connections remember a hundred of them.
const PARTS: [usize; 4] = [256, 32, 4, 1];

/// Cuts what is to be written into parts for one statement each, of at most `most`.
fn parts<T>(mut items: &[T], most: usize) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = PARTS.into_iter().find(|size| *size <= items.len().min(most))?;
        let (part, rest) = items.split_at(size);
        items = rest;
        Some(part)
    })
}

/// A transaction that may write. What is only added to is gathered in it and written at its end, many rows with one
/// statement.
#[derive(Debug)]
pub(crate) struct Tx {
    inner: Transaction<'static, Any>,
    engine: Engine,
    begun: Instant,
    events: Vec<events::Pending>,
    covered: Vec<coverage::Covered>,
    /// Ends of tasks; whoever reads tasks has them written before.
    ended: Vec<ends::Ended>,
    /// What is watched, once it was asked for.
    watched: Option<Vec<brake::Watched>>,
}

impl std::ops::Deref for Tx {
    type Target = AnyConnection;

    fn deref(&self) -> &AnyConnection {
        &self.inner
    }
}

impl std::ops::DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut AnyConnection {
        &mut self.inner
    }
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("cannot use the database address `{0}` (sqlite:… or postgres:… is expected)")]
    Address(String),
    #[error("cannot open the database")]
    Open(#[source] sqlx::Error),
    #[error("cannot bring the database up to this version's schema")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    #[error(
        "the database was made by a newer version of this program: its schema is `{found}`, and this version knows \
         them up to `{known}`"
    )]
    Newer { found: String, known: String },
    #[error("cannot {what}")]
    Query { what: &'static str, source: sqlx::Error },
    #[error("the database holds a {what} that this version cannot read: {value}")]
    Content { what: &'static str, value: String },
}

impl StoreError {
    /// For `map_err`: names what was tried.
    pub(crate) fn query(what: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Query { what, source }
    }

    /// A stored value that does not parse.
    pub(crate) fn content(what: &'static str, value: impl Into<String>) -> Self {
        Self::Content { what, value: value.into() }
    }

    /// Whether trying again later may help (locked, out of connections, connection lost).
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Open(source) | Self::Query { source, .. } => {
                // PostgreSQL: a deadlock's victim, out of resources, an operator's intervention.
                let code = source.as_database_error().and_then(sqlx::error::DatabaseError::code);
                matches!(source, sqlx::Error::PoolTimedOut | sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed)
                    || code.is_some_and(|code| {
                        PASSING.contains(&code.as_ref())
                            || ["40", "53", "57"]
                                .iter()
                                .any(|class| code.len() == 5 && code.starts_with(class))
                    })
            }
            Self::Address(_) | Self::Migrate(_) | Self::Newer { .. } | Self::Content { .. } => false,
        }
    }
}

impl Store {
    /// Opens the database at `url` (`sqlite:PATH` or `postgres://…`) and brings its schema up to this program's,
    /// creating an SQLite file where it is missing.
    ///
    /// # Errors
    /// If the address is not one, the database cannot be reached, or its schema is newer or cannot be brought up.
    pub(crate) async fn open(url: &str) -> Result<Self, StoreError> {
        let store = Self::connect(url).await?;
        store.migrate().await?;
        Ok(store)
    }

    /// Opens the database as it is. Until [`Store::migrate`] it may have an older schema.
    ///
    /// # Errors
    /// If the address is not one, or the database cannot be reached.
    pub(crate) async fn connect(url: &str) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let engine = match url.split(':').next() {
            Some("sqlite") => Engine::Sqlite,
            Some("postgres" | "postgresql") => Engine::Postgres,
            _ => return Err(StoreError::Address(url.split('@').next_back().unwrap_or_default().to_owned())),
        };
        let address = match engine {
            Engine::Sqlite if !url.contains('?') => format!("{url}?mode=rwc"),
            Engine::Sqlite | Engine::Postgres => url.to_owned(),
        };
        let options = AnyConnectOptions::from_str(&address).map_err(StoreError::Open)?;
        let pool = |size| {
            AnyPoolOptions::new()
                .max_connections(size)
                .acquire_timeout(PATIENCE)
                // On a full disk SQLite ends a transaction by itself, and the driver then takes the connection for
                // being in one for ever. Such a connection is closed and another one opened.
                .before_acquire(move |connection, _| {
                    let is_idle = engine != Engine::Sqlite || !connection.is_in_transaction();
                    Box::pin(async move { Ok(is_idle) })
                })
                .after_connect(move |connection, _| {
                    Box::pin(async move {
                        if engine == Engine::Sqlite {
                            connection.execute("PRAGMA busy_timeout = 10000").await?;
                            connection.execute("PRAGMA journal_mode = WAL").await?;
                            connection.execute("PRAGMA synchronous = FULL").await?;
                            connection.execute("PRAGMA foreign_keys = ON").await?;
                        }
                        Ok(())
                    })
                })
        };
        let write = match engine {
            Engine::Sqlite => pool(1).connect_with(options.clone()).await.map_err(StoreError::Open)?,
            Engine::Postgres => {
                pool(READERS).connect_with(options.clone()).await.map_err(StoreError::Open)?
            }
        };
        let read = match engine {
            Engine::Sqlite => pool(READERS).connect_with(options).await.map_err(StoreError::Open)?,
            Engine::Postgres => write.clone(),
        };
        let calls = match engine {
            Engine::Sqlite => None,
            Engine::Postgres => Some(calls::pool(url).map_err(StoreError::Open)?),
        };
        Ok(Self { engine, read, write, calls })
    }

    /// The pool for statements that only read.
    pub(crate) fn reader(&self) -> &AnyPool {
        &self.read
    }

    /// Begins a transaction that may write. On SQLite it is the only one until it ends.
    ///
    /// # Errors
    /// If the database is locked or out of reach for longer than ten seconds.
    pub(crate) async fn begin(&self) -> Result<Tx, StoreError> {
        let statement = match self.engine {
            Engine::Sqlite => "BEGIN IMMEDIATE",
            Engine::Postgres => "BEGIN",
        };
        let asked = Instant::now();
        let inner = self.write.begin_with(statement).await;
        if inner.is_err() {
            METRICS.transactions_failed.inc();
        }
        let inner = inner.map_err(StoreError::query("begin a transaction"))?;
        let begun = Instant::now();
        METRICS.transaction_wait.observe((begun - asked).as_secs_f64());
        let (engine, events, covered, ended) = (self.engine, Vec::new(), Vec::new(), Vec::new());
        Ok(Tx { inner, engine, begun, events, covered, ended, watched: None })
    }

    /// Begins a transaction that appends to the audit log. There is one at a time, on PostgreSQL too: it waits here,
    /// before it holds anything, so that no two of them wait for each other.
    ///
    /// # Errors
    /// As [`Store::begin`].
    pub(crate) async fn begin_audited(&self) -> Result<Tx, StoreError> {
        let mut tx = self.begin().await?;
        audit::hold(&mut tx).await?;
        Ok(tx)
    }

    /// Commits, durably.
    ///
    /// # Errors
    /// If the database cannot; nothing of the transaction has then happened.
    pub(crate) async fn commit(tx: Tx) -> Result<(), StoreError> {
        let begun = tx.begun;
        let committed = Self::write_all(tx).await;
        match &committed {
            Ok(_) => METRICS.transaction.observe(begun.elapsed().as_secs_f64()),
            Err(_) => METRICS.transactions_failed.inc(),
        }
        for kind in committed? {
            METRICS.event(kind);
        }
        Ok(())
    }

    /// Writes what was gathered and commits; the kinds of the events that were written.
    async fn write_all(mut tx: Tx) -> Result<Vec<EventKind>, StoreError> {
        ends::write(&mut tx).await?;
        coverage::write(&mut tx).await?;
        // Last: whoever numbers events holds the counter until the commit.
        let written = events::write(&mut tx).await?;
        tx.inner.commit().await.map_err(StoreError::query("commit"))?;
        Ok(written)
    }

    /// Lets running statements end and closes every connection.
    pub(crate) async fn close(&self) {
        if let Some(calls) = &self.calls {
            calls.close().await;
        }
        self.read.close().await;
        self.write.close().await;
    }
}

/// `($1, $2), ($3, $4)`: placeholders of so many rows with so many columns.
fn rows(count: usize, columns: usize) -> String {
    let rows: Vec<String> = (0..count).map(|row| places(1 + row * columns, columns)).collect();
    rows.join(", ")
}

/// `($3, $4, $5)`: `count` placeholders from the `first`th on.
fn places(first: usize, count: usize) -> String {
    let mut text = String::with_capacity(2 + count * 6);
    for number in first..first + count {
        text.push_str(if number == first { "($" } else { ", $" });
        text.push_str(&number.to_string());
    }
    text.push(')');
    text
}

/// A text that an agent supplied, as it is kept: at most `most` bytes, and without the one character that
/// PostgreSQL cannot store.
fn agent_text(text: &str, most: usize) -> String {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].replace('\0', "\u{fffd}")
}

/// A failure that an agent supplied, as it is kept.
fn agent_failure(failure: &Failure) -> Failure {
    const MAX_CODE: usize = 64;
    Failure {
        code: agent_text(&failure.code, MAX_CODE),
        message: agent_text(&failure.message, Failure::MAX_TEXT),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A store of its own. The folder lives as long as the guard.
    pub(crate) async fn scratch() -> (Store, tempfile::TempDir) {
        let (url, folder) = place().await;
        (Store::open(&url).await.expect("a fresh store opens"), folder)
    }

    /// A place for a store: a file, or with `TM_TEST_POSTGRES` (the address of a server, without a database) a new
    /// database there.
    pub(crate) async fn place() -> (String, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let url = match std::env::var("TM_TEST_POSTGRES") {
            Err(_) => format!("sqlite:{}", folder.path().join("store.db").display()),
            Ok(server) => {
                sqlx::any::install_default_drivers();
                let name = format!("t{}", uuid::Uuid::now_v7().simple());
                let admin = AnyPool::connect(&format!("{server}/postgres")).await.expect("a server");
                let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
                admin.execute(sqlx::query(create)).await.expect("a new database");
                admin.close().await;
                format!("{server}/{name}")
            }
        };
        (url, folder)
    }

    #[test]
    fn parts_have_few_sizes_and_leave_nothing_out() {
        let all: Vec<u32> = (0..999).collect();
        for most in [256, 100, 1] {
            for count in [0, 1, 3, 31, 257, 999] {
                let parts: Vec<&[u32]> = parts(&all[..count], most).collect();
                assert_eq!(parts.concat(), all[..count]);
                assert!(parts.iter().all(|part| part.len() <= most && PARTS.contains(&part.len())));
            }
        }
    }

    #[test]
    fn placeholders_are_numbered() {
        assert_eq!((places(1, 1), places(3, 3)), ("($1)".to_owned(), "($3, $4, $5)".to_owned()));
        assert_eq!(rows(2, 2), "($1, $2), ($3, $4)");
        assert_eq!(Engine::Sqlite.listed(rows(2, 6)).0, "(?, ?, ?, ?, ?, ?), (?, ?, ?, ?, ?, ?)");
        assert_eq!(Engine::Postgres.listed(rows(1, 2)).0, "($1, $2)");
    }

    /// Whether a test of what only SQLite has can run.
    pub(crate) fn is_sqlite(store: &Store) -> bool {
        store.engine == Engine::Sqlite
    }

    #[tokio::test]
    async fn a_store_opens_twice_and_refuses_other_addresses() {
        let (url, _folder) = place().await;
        for _ in 0..2 {
            Store::open(&url).await.unwrap().close().await;
        }
        assert!(
            matches!(Store::open("mysql://user:secret@host/db").await, Err(StoreError::Address(a)) if a == "host/db")
        );
    }

    /// SQLite on a full disk: what is asked is refused as passing, what is there is read, what was begun is void,
    /// and when there is room again work goes on without a restart.
    #[tokio::test]
    async fn a_full_disk_is_passing_and_costs_nothing_that_was_stored() {
        let (store, _folder) = scratch().await;
        if !is_sqlite(&store) {
            return;
        }
        let endpoint = endpoints::tests::put(&store, 1, "a", &[], true).await;
        let limit = async |pages: &str| {
            let sql = sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
            store.write.execute(sqlx::query(sql)).await.unwrap();
        };
        let message = "m".repeat(2000);
        let write = async |n: i64| {
            let mut tx = store.begin().await?;
            for _ in 0..50 {
                let event = events::NewEvent {
                    endpoint,
                    kind: tm_api::event::EventKind::Agent,
                    status: tm_api::event::EventStatus::Noted,
                    detail: "d",
                    message: &message,
                    task: None,
                    incident: None,
                    at_ms: n,
                };
                events::append(&mut tx, event).await?;
            }
            Store::commit(tx).await
        };
        let count = async || {
            let all = events::EventFilter::default();
            store.events(&all, false, 1000).await.unwrap().len()
        };
        write(1).await.unwrap();
        for _ in 0..3 {
            // No page more than there are now.
            limit("1").await;
            let error = write(2).await.unwrap_err();
            assert!(error.is_passing(), "{error:?}");
            assert_eq!(count().await, 50);
        }
        limit("1000000").await;
        write(3).await.unwrap();
        assert_eq!(count().await, 100);
    }

    /// The same on a real file system: a small one, filled by somebody else. Mounting needs root.
    #[tokio::test]
    async fn a_full_file_system_is_passing() {
        use std::process::Command;

        let folder = tempfile::tempdir().unwrap();
        let mount = |args: &[&str]| {
            let place = folder.path().to_str().unwrap();
            let mut command = Command::new(args[0]);
            command.args(&args[1..]).arg(place);
            command.status().is_ok_and(|status| status.success())
        };
        if std::env::var_os("TM_TEST_POSTGRES").is_some()
            || !mount(&["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=64", "tmpfs"])
        {
            eprintln!("not run: no small file system can be mounted here");
            return;
        }
        let outcome = fill_and_free(folder.path()).await;
        // Lazily: after a failure something may still be open.
        assert!(mount(&["umount", "-l"]));
        outcome.unwrap();
    }

    async fn fill_and_free(folder: &std::path::Path) -> Result<(), String> {
        let url = format!("sqlite:{}", folder.join("store.db").display());
        let store = Store::open(&url).await.map_err(|e| e.to_string())?;
        let endpoint = endpoints::tests::put(&store, 1, "a", &[], true).await;
        let message = "m".repeat(2000);
        let write = async || {
            let mut tx = store.begin().await?;
            let event = events::NewEvent {
                endpoint,
                kind: tm_api::event::EventKind::Agent,
                status: tm_api::event::EventStatus::Noted,
                detail: "d",
                message: &message,
                task: None,
                incident: None,
                at_ms: 1,
            };
            events::append(&mut tx, event).await?;
            Store::commit(tx).await
        };
        let count =
            async || store.events(&events::EventFilter::default(), false, 1000).await.map(|e| e.len());
        let mut stored = 0;
        for free_kib in [0_usize, 4, 64, 512] {
            let ballast = folder.join("ballast");
            let room = rustix::fs::statvfs(folder).map_err(|e| e.to_string())?;
            let free = usize::try_from(room.f_bavail * room.f_frsize).unwrap_or(0);
            std::fs::write(&ballast, vec![0; free.saturating_sub(free_kib * 1024)])
                .map_err(|e| e.to_string())?;
            let mut refused = 0;
            for _ in 0..200 {
                match write().await {
                    Ok(()) => stored += 1,
                    Err(error) if error.is_passing() => refused += 1,
                    Err(error) => return Err(format!("{free_kib} KiB free: {error:?}")),
                }
                if refused > 3 {
                    break;
                }
            }
            if refused == 0 {
                return Err(format!("{free_kib} KiB free: the disk was not full"));
            }
            if count().await.map_err(|e| format!("{free_kib} KiB free: {e:?}"))? != stored {
                return Err(format!("{free_kib} KiB free: {stored} were acknowledged"));
            }
            std::fs::remove_file(&ballast).map_err(|e| e.to_string())?;
            write().await.map_err(|e| format!("with room again after {free_kib} KiB: {e:?}"))?;
            stored += 1;
        }
        store.close().await;
        Ok(())
    }
}
