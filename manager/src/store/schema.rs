//! The schema: which one a database has, and how it comes to this program's.
//!
//! Each migration is one transaction that also notes its number: whatever ends the program, the database has one
//! schema or the next, never something between. Two managers that migrate at once wait for each other.
//!
//! **Invariant:** a database whose schema this program does not know is not touched.

use std::fmt;

use sqlx::Row as _;

use super::{MIGRATIONS, Store, StoreError};

/// A schema, by its number and what brought it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// From 1; 0 is an empty database.
    pub(crate) number: i64,
    name: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04} {}", self.number, self.name)
    }
}

impl Version {
    /// The schema of this program.
    pub(crate) fn of_this_program() -> Self {
        let newest = MIGRATIONS.iter().max_by_key(|migration| migration.version);
        newest.map_or_else(Self::none, |migration| Self {
            number: migration.version,
            name: migration.description.to_string(),
        })
    }

    fn none() -> Self {
        Self { number: 0, name: "nothing".to_owned() }
    }
}

impl Store {
    /// The schema that the database has.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn schema(&self) -> Result<Version, StoreError> {
        let newest = sqlx::query(
            "SELECT version, description FROM _sqlx_migrations WHERE success ORDER BY version DESC LIMIT 1",
        )
        .fetch_optional(&self.write)
        .await;
        match newest {
            Ok(Some(row)) => Ok(Version { number: row.get(0), name: row.get(1) }),
            Ok(None) => Ok(Version::none()),
            Err(error) if is_no_table(&error) => Ok(Version::none()),
            Err(error) => Err(StoreError::query("ask for the database's schema")(error)),
        }
    }

    /// Brings the database to this program's schema; the one that it had.
    ///
    /// # Errors
    /// If a step fails; the database then has the schema of the step before. If its schema is newer than this
    /// program's; it is then not touched.
    pub(crate) async fn migrate(&self) -> Result<Version, StoreError> {
        let before = self.known_schema().await?;
        MIGRATIONS.run(&self.write).await.map_err(StoreError::Migrate)?;
        Ok(before)
    }

    /// Brings the database to an older schema than this program's, for what is to be filled into it.
    ///
    /// # Errors
    /// As [`Store::migrate`].
    pub(super) async fn migrate_to(&self, number: i64) -> Result<(), StoreError> {
        MIGRATIONS.run_to(number, &self.write).await.map_err(StoreError::Migrate)
    }

    /// The schema that the database has, if it is not newer than this program's.
    ///
    /// # Errors
    /// If it is, or the database cannot be read.
    pub(crate) async fn known_schema(&self) -> Result<Version, StoreError> {
        let (found, known) = (self.schema().await?, Version::of_this_program());
        if found.number > known.number {
            return Err(StoreError::Newer { found: found.to_string(), known: known.to_string() });
        }
        Ok(found)
    }
}

/// Whether a statement failed because the schema is older than what it asks for.
pub(super) fn is_no_table(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| {
        // PostgreSQL has a code for it, SQLite a sentence.
        error.code().as_deref() == Some("42P01") || error.message().starts_with("no such table")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        streams::tests::run,
        tests::{place, scratch},
    };

    #[tokio::test]
    async fn a_schema_is_named_and_brought_up_step_by_step() {
        let (url, _folder) = place().await;
        let store = Store::connect(&url).await.unwrap();
        assert_eq!(store.schema().await.unwrap(), Version::none());
        let numbers: Vec<i64> = MIGRATIONS.iter().map(|migration| migration.version).collect();
        for number in numbers {
            store.migrate_to(number).await.unwrap();
            assert_eq!(store.schema().await.unwrap().number, number);
        }
        let newest = Version::of_this_program();
        assert_eq!(store.migrate().await.unwrap(), newest, "nothing is left to do");
        assert!(newest.to_string().starts_with("00"), "{newest}");
    }

    #[tokio::test]
    async fn an_older_program_refuses_a_newer_database_by_name_and_leaves_it_alone() {
        let (url, _folder) = place().await;
        let store = Store::open(&url).await.unwrap();
        run(
            &store,
            "INSERT INTO _sqlx_migrations (version, description, installed_on, success, checksum, execution_time)
             SELECT 9999, 'tomorrow', installed_on, success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
        )
        .await;
        store.close().await;
        let error = Store::open(&url).await.unwrap_err();
        assert!(error.to_string().contains("9999 tomorrow"), "{error}");
        assert!(matches!(error, StoreError::Newer { .. }) && !error.is_passing());
        let store = Store::connect(&url).await.unwrap();
        assert!(store.migrate().await.is_err());
        assert_eq!(store.schema().await.unwrap().number, 9999);
    }

    #[tokio::test]
    async fn a_changed_migration_is_not_taken_for_the_one_that_was_carried_out() {
        let (store, _folder) = scratch().await;
        run(&store, "UPDATE _sqlx_migrations SET checksum = checksum || checksum WHERE version = 2").await;
        assert!(matches!(store.migrate().await, Err(StoreError::Migrate(_))));
    }
}
