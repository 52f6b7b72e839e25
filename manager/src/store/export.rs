//! Every row out of a database, in one snapshot, and into an empty one: the same text for both engines.
//!
//! Tables are those that the migrations make, in their order: what a row refers to comes before it.
//!
//! **Invariant:** what is put in is all of it or nothing, and only into a database that had no schema.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::TryStreamExt as _;
use serde_json::{Value, json};
use sqlx::{
    AssertSqlSafe, Column as _, Row as _, ValueRef as _,
    any::{AnyRow, AnyTypeInfoKind},
};

use super::{Engine, MIGRATIONS, Store, StoreError, Tx, schema::Version};

/// A table's row on its way.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) table: String,
    pub(crate) columns: Vec<String>,
    /// Null, a number, a text, or `{"b64": …}`.
    pub(crate) values: Vec<Value>,
}

/// Why rows did not come out or in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the database has the schema `{found}`, this version `{known}`: `tm-manager migrate` comes first"
    )]
    OtherSchema { found: String, known: String },
    #[error(
        "the copy is of a newer version of this program: its schema is {found:04}, and this version's `{known}`"
    )]
    Newer { found: i64, known: String },
    #[error("the database is not empty")]
    NotEmpty,
    #[error("the copy has a row that does not fit its table `{0}`")]
    Row(String),
    #[error("cannot write the copy")]
    Write(#[source] std::io::Error),
}

/// The tables that the migrations make, in order.
fn tables() -> impl Iterator<Item = &'static str> {
    MIGRATIONS.iter().flat_map(|migration| {
        let lines = migration.sql.as_str().lines();
        lines.filter_map(|line| line.strip_prefix("CREATE TABLE ")?.strip_suffix(" ("))
    })
}

impl Store {
    /// Hands every row to `take`, as they all were at one moment; whoever works on the database is not held up.
    ///
    /// # Errors
    /// If the database cannot be read, its schema is not this program's, or `take` fails.
    pub(crate) async fn export(
        &self,
        mut take: impl FnMut(&Line) -> std::io::Result<()>,
    ) -> Result<(), ExportError> {
        let (found, known) = (self.known_schema().await?, Version::of_this_program());
        if found != known {
            return Err(ExportError::OtherSchema { found: found.to_string(), known: known.to_string() });
        }
        let begin = match self.engine {
            Engine::Sqlite => "BEGIN",
            Engine::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        let failed = || StoreError::query("read a table");
        let mut tx = self.read.begin_with(begin).await.map_err(failed())?;
        for table in tables() {
            let sql = format!("SELECT * FROM {table}");
            let mut rows = sqlx::query(AssertSqlSafe(sql)).fetch(&mut *tx);
            while let Some(row) = rows.try_next().await.map_err(failed())? {
                take(&line(table, &row)?).map_err(ExportError::Write)?;
            }
        }
        Ok(())
    }

    /// Begins to fill an empty database with rows of the schema of number `schema`.
    ///
    /// # Errors
    /// If the database has a schema already, or cannot be given this one.
    pub(crate) async fn begin_filling(&self, schema: i64) -> Result<Filling, ExportError> {
        if self.schema().await?.number != 0 {
            return Err(ExportError::NotEmpty);
        }
        let known = Version::of_this_program();
        if schema > known.number {
            return Err(ExportError::Newer { found: schema, known: known.to_string() });
        }
        self.migrate_to(schema).await?;
        let mut tx = self.begin().await?;
        // What migrations put in themselves comes back with the rows.
        for table in ["counter", "meta"] {
            let sql = format!("DELETE FROM {table}");
            sqlx::query(AssertSqlSafe(sql))
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("empty a table"))?;
        }
        Ok(Filling { tx })
    }
}

/// A database that is being filled; dropped, it stays empty.
pub(crate) struct Filling {
    tx: Tx,
}

impl Filling {
    /// Puts one row in.
    ///
    /// # Errors
    /// If it is none of its table's.
    pub(crate) async fn put(&mut self, row: &Line) -> Result<(), ExportError> {
        let wrong = || ExportError::Row(row.table.chars().take(64).collect());
        let is_name = |name: &String| {
            !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if !tables().any(|table| table == row.table)
            || row.columns.len() != row.values.len()
            || row.columns.is_empty()
            || !row.columns.iter().all(is_name)
        {
            return Err(wrong());
        }
        // A null has no type of its own, which PostgreSQL would want to know: it stands in the text.
        let mut places = Vec::new();
        let mut number = 0;
        for value in &row.values {
            if value.is_null() {
                places.push("NULL".to_owned());
            } else {
                number += 1;
                places.push(format!("${number}"));
            }
        }
        let (columns, places) = (row.columns.join(", "), places.join(", "));
        let sql = format!("INSERT INTO {} ({columns}) VALUES ({places})", row.table);
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in &row.values {
            query = match value {
                Value::Null => query,
                Value::Number(number) => query.bind(number.as_i64().ok_or_else(wrong)?),
                Value::String(text) => query.bind(text.clone()),
                Value::Object(_) => {
                    let bytes = value.get("b64").and_then(Value::as_str);
                    query.bind(bytes.and_then(|b64| STANDARD.decode(b64).ok()).ok_or_else(wrong)?)
                }
                Value::Bool(_) | Value::Array(_) => return Err(wrong()),
            };
        }
        query.execute(&mut *self.tx).await.map_err(StoreError::query("put a row in"))?;
        Ok(())
    }

    /// Nobody is connected to a restored manager, and no other runs on its database.
    ///
    /// # Errors
    /// If the database refuses; it then stays empty.
    pub(crate) async fn finish(mut self, store: &Store) -> Result<(), ExportError> {
        for sql in ["UPDATE endpoint SET manager_id = NULL", "UPDATE manager SET is_up = 0"] {
            sqlx::query(sql)
                .execute(&mut *self.tx)
                .await
                .map_err(StoreError::query("end the sessions of before"))?;
        }
        Store::commit(self.tx).await?;
        store.migrate().await?;
        Ok(())
    }
}

fn line(table: &str, row: &AnyRow) -> Result<Line, ExportError> {
    let columns: Vec<String> = row.columns().iter().map(|column| column.name().to_owned()).collect();
    let values = (0..columns.len()).map(|at| value(table, row, at)).collect::<Result<_, _>>()?;
    Ok(Line { table: table.to_owned(), columns, values })
}

fn value(table: &str, row: &AnyRow, at: usize) -> Result<Value, ExportError> {
    let failed = || StoreError::query("read a value");
    let raw = row.try_get_raw(at).map_err(failed())?;
    if raw.is_null() {
        return Ok(Value::Null);
    }
    Ok(match raw.type_info().kind() {
        AnyTypeInfoKind::Null => Value::Null,
        AnyTypeInfoKind::SmallInt | AnyTypeInfoKind::Integer | AnyTypeInfoKind::BigInt => {
            json!(row.try_get::<i64, _>(at).map_err(failed())?)
        }
        AnyTypeInfoKind::Text => json!(row.try_get::<String, _>(at).map_err(failed())?),
        AnyTypeInfoKind::Blob => {
            json!({ "b64": STANDARD.encode(row.try_get::<Vec<u8>, _>(at).map_err(failed())?) })
        }
        AnyTypeInfoKind::Bool | AnyTypeInfoKind::Real | AnyTypeInfoKind::Double => {
            return Err(StoreError::content("value of another type", table).into());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        endpoints::{Filter, tests::put},
        tests::{place, scratch},
    };

    async fn rows(store: &Store) -> Vec<Line> {
        let mut rows = Vec::new();
        let take = |line: &Line| {
            rows.push(Line {
                table: line.table.clone(),
                columns: line.columns.clone(),
                values: line.values.clone(),
            });
            Ok(())
        };
        store.export(take).await.unwrap();
        rows
    }

    #[test]
    fn every_table_of_the_migrations_is_known_and_none_goes() {
        let all: Vec<&str> = tables().collect();
        assert!(all.contains(&"endpoint") && all.contains(&"event") && all.contains(&"manager"), "{all:?}");
        let made =
            |text: &str| text.lines().filter(|line| line.trim_start().starts_with("CREATE TABLE")).count();
        assert_eq!(MIGRATIONS.iter().map(|m| made(m.sql.as_str())).sum::<usize>(), all.len());
        for migration in MIGRATIONS.iter() {
            assert!(
                !migration.sql.as_str().contains("DROP TABLE") && !migration.sql.as_str().contains("RENAME")
            );
        }
    }

    #[tokio::test]
    async fn rows_come_out_and_go_in_as_they_were() {
        let (store, _folder) = scratch().await;
        put(&store, 1, "ä'; DROP TABLE endpoint; --", &["192.0.2.1"], true).await;
        put(&store, 2, "b", &[], false).await;
        crate::store::streams::tests::run(
            &store,
            "INSERT INTO vault_item (id, endpoint_id, path, sha256, size, vaulted_ms)
             SELECT 'v', id, CAST('/a' AS BYTEA), 'd', 9223372036854775807, -1 FROM endpoint WHERE host = 'b'",
        )
        .await;
        let before = rows(&store).await;
        let (url, _other) = place().await;
        let copy = Store::connect(&url).await.unwrap();
        let mut filling = copy.begin_filling(Version::of_this_program().number).await.unwrap();
        for row in &before {
            filling.put(row).await.unwrap();
        }
        filling.finish(&copy).await.unwrap();
        let after = rows(&copy).await;
        let host = before.iter().position(|row| row.table == "endpoint").unwrap();
        let connected = before[host].columns.iter().position(|column| column == "manager_id").unwrap();
        let text = |rows: &[Line]| {
            let mut all: Vec<String> = rows
                .iter()
                .map(|row| {
                    let mut values = row.values.clone();
                    if row.table == "endpoint" {
                        values[connected] = Value::Null;
                    }
                    format!("{} {:?} {values:?}", row.table, row.columns)
                })
                .collect();
            all.sort();
            all
        };
        assert_eq!(text(&before), text(&after));
        let hosts = copy.endpoints(&Filter::default()).await.unwrap();
        assert!(hosts.iter().all(|row| !row.connected) && hosts.len() == 2);
        assert!(matches!(copy.begin_filling(1).await, Err(ExportError::NotEmpty)));
    }

    #[tokio::test]
    async fn what_is_no_row_is_refused_and_leaves_nothing() {
        let (url, _folder) = place().await;
        let store = Store::connect(&url).await.unwrap();
        assert!(matches!(store.begin_filling(9999).await, Err(ExportError::Newer { found: 9999, .. })));
        let mut filling = store.begin_filling(Version::of_this_program().number).await.unwrap();
        let row = |table: &str, columns: &[&str], values: Vec<Value>| Line {
            table: table.to_owned(),
            columns: columns.iter().map(ToString::to_string).collect(),
            values,
        };
        filling.put(&row("meta", &["key", "value"], vec![json!("k"), json!("v")])).await.unwrap();
        for wrong in [
            row("_sqlx_migrations", &["version"], vec![json!(1)]),
            row("meta; DROP TABLE meta", &["key"], vec![json!("x")]),
            row("meta", &["key) VALUES ('a'); --"], vec![json!("x")]),
            row("meta", &["key", "value"], vec![json!("x")]),
            row("meta", &[], vec![]),
            row("meta", &["key", "value"], vec![json!(true), json!("v")]),
            row("meta", &["key", "value"], vec![json!({ "b64": "%" }), json!("v")]),
            row("counter", &["name", "value"], vec![json!("x"), json!(1.5)]),
        ] {
            assert!(matches!(filling.put(&wrong).await, Err(ExportError::Row(_))), "{wrong:?}");
        }
        drop(filling);
        assert_eq!(store.fleet().await.unwrap(), None);
    }
}
