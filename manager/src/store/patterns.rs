//! What is known about patterns; their bytes are files (`crate::patterns::Blobs`).

use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_patterns::digests::{Algorithm, Counts};
use tm_protocol::{ids::Sha256, task::PatternRef};

use super::{
    Store, StoreError,
    audit::{self, Entry},
};

const SELECT: &str =
    "SELECT sha256, name, kind, size, rules, warnings, imported_by, imported_ms, import_number, md5, sha1, sha256s,
            published_ms
     FROM pattern";
/// The only kind there is.
const KIND: &str = "detection";
/// Fewest digits of a digest that stand for it.
const MIN_DIGITS: usize = 8;

/// A pattern that was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PatternRow {
    pub(crate) reference: PatternRef,
    pub(crate) kind: String,
    pub(crate) rules: u32,
    pub(crate) digests: Counts,
    pub(crate) warnings: Vec<ProblemRow>,
    pub(crate) imported_by: String,
    pub(crate) imported_ms: i64,
    /// When a role of the fleet listed it; `None` for a draft.
    pub(crate) published_ms: Option<i64>,
    import_number: i64,
}

/// A remark of the compiler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProblemRow {
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) message: String,
}

impl From<tm_patterns::Problem> for ProblemRow {
    fn from(problem: tm_patterns::Problem) -> Self {
        Self { line: problem.line, column: problem.column, message: problem.message }
    }
}

/// A pattern that has compiled and is to be noted.
#[derive(Debug, Clone)]
pub(crate) struct NewPattern {
    pub(crate) reference: PatternRef,
    pub(crate) rules: u32,
    pub(crate) digests: Counts,
    pub(crate) warnings: Vec<ProblemRow>,
    /// Whoever imports it takes rules that can hold up a scan.
    pub(crate) forced: bool,
}

/// What came of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Import {
    Stored(PatternRow),
    /// The same bytes have another name here; nothing was changed.
    OtherName(String),
}

impl Store {
    /// Notes a pattern, as a draft if nobody lists it yet. What is so already stays untouched.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn import_pattern(
        &self,
        new: &NewPattern,
        actor: &str,
        now_ms: i64,
    ) -> Result<Import, StoreError> {
        let PatternRef { sha256, size, name } = &new.reference;
        let mut tx = self.begin_audited().await?;
        let known = sqlx::query(AssertSqlSafe(format!("{SELECT} WHERE sha256 = $1")))
            .bind(sha256.to_string())
            .fetch_optional(&mut *tx)
            .await
            .map_err(StoreError::query("read a pattern"))?
            .map(|row| pattern(&row))
            .transpose()?;
        let newest = |row: &AnyRow| row.get::<Option<i64>, _>(0).unwrap_or(0);
        let newest_of_name = sqlx::query("SELECT MAX(import_number) FROM pattern WHERE name = $1")
            .bind(name.clone())
            .fetch_one(&mut *tx)
            .await
            .map(|row| newest(&row))
            .map_err(StoreError::query("read the imports"))?;
        match &known {
            Some(row) if row.reference.name != *name => {
                return Ok(Import::OtherName(row.reference.name.clone()));
            }
            // What is listed is not moved by whoever sends it again: that would choose for endpoints.
            Some(row) if row.import_number == newest_of_name || row.published_ms.is_some() => {
                return Ok(Import::Stored(row.clone()));
            }
            Some(_) | None => {}
        }
        let import_number = 1 + sqlx::query("SELECT MAX(import_number) FROM pattern")
            .fetch_one(&mut *tx)
            .await
            .map(|row| newest(&row))
            .map_err(StoreError::query("read the imports"))?;
        let warnings = serde_json::to_string(&new.warnings).expect("problems are plain data");
        let count = |algorithm| i64::try_from(new.digests.of(algorithm)).unwrap_or(i64::MAX);
        sqlx::query(
            "INSERT INTO pattern
                (sha256, name, kind, size, rules, warnings, imported_by, imported_ms, import_number,
                 md5, sha1, sha256s)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
             ON CONFLICT (sha256) DO UPDATE SET imported_by = excluded.imported_by,
                imported_ms = excluded.imported_ms, import_number = excluded.import_number",
        )
        .bind(sha256.to_string())
        .bind(name.clone())
        .bind(KIND)
        .bind(i64::try_from(*size).unwrap_or(i64::MAX))
        .bind(i64::from(new.rules))
        .bind(warnings)
        .bind(actor.to_owned())
        .bind(now_ms)
        .bind(import_number)
        .bind(count(Algorithm::Md5))
        .bind(count(Algorithm::Sha1))
        .bind(count(Algorithm::Sha256))
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("note a pattern"))?;
        let mut detail =
            json!({ "name": name, "size": size, "rules": new.rules, "digests": new.digests.total() });
        if new.forced {
            detail["forced"] = json!(true);
        }
        let subject = sha256.to_string();
        let entry = Entry { actor, action: "pattern.import", subject: &subject, detail, at_ms: now_ms };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(Import::Stored(PatternRow {
            reference: new.reference.clone(),
            kind: KIND.to_owned(),
            rules: new.rules,
            digests: new.digests,
            warnings: new.warnings.clone(),
            imported_by: actor.to_owned(),
            imported_ms: now_ms,
            published_ms: known.and_then(|row| row.published_ms),
            import_number,
        }))
    }

    /// Every pattern, oldest import first.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn patterns(&self) -> Result<Vec<PatternRow>, StoreError> {
        self.patterns_where("1 = 1", None).await
    }

    /// The pattern with this digest.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn pattern(&self, digest: Sha256) -> Result<Option<PatternRow>, StoreError> {
        Ok(self.patterns_where("sha256 = $1", Some(digest.to_string())).await?.pop())
    }

    /// The patterns that `text` may mean: one by digest, the newest by name (a draft only where the name means
    /// nothing else), or those whose digest begins so
    /// (at least 8 digits). One is an answer, none or several are not.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn patterns_meant(&self, text: &str) -> Result<Vec<PatternRow>, StoreError> {
        if let Ok(digest) = text.parse::<Sha256>()
            && let Some(row) = self.pattern(digest).await?
        {
            return Ok(vec![row]);
        }
        let named = self.patterns_where("name = $1", Some(text.to_owned())).await?;
        let published = named.iter().rfind(|row| row.published_ms.is_some());
        if let Some(newest) = published.or(named.last()).cloned() {
            return Ok(vec![newest]);
        }
        let is_start = text.len() >= MIN_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_start {
            return Ok(Vec::new());
        }
        self.patterns_where("sha256 LIKE $1", Some(format!("{}%", text.to_ascii_lowercase()))).await
    }

    /// As if roles listed these, for tests of what scans choose.
    #[cfg(test)]
    pub(crate) async fn mark_published(&self, digests: &[Sha256]) {
        let mut tx = self.begin().await.expect("a store");
        for digest in digests {
            sqlx::query("UPDATE pattern SET published_ms = 1 WHERE sha256 = $1")
                .bind(digest.to_string())
                .execute(&mut *tx)
                .await
                .expect("a column");
        }
        Self::commit(tx).await.expect("a store");
    }

    async fn patterns_where(
        &self,
        condition: &'static str,
        value: Option<String>,
    ) -> Result<Vec<PatternRow>, StoreError> {
        // Safe: both parts are texts of this file.
        let sql = AssertSqlSafe(format!("{SELECT} WHERE {condition} ORDER BY import_number"));
        let query = match value {
            Some(value) => sqlx::query(sql).bind(value),
            None => sqlx::query(sql),
        };
        query
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("read the patterns"))?
            .iter()
            .map(pattern)
            .collect()
    }
}

fn pattern(row: &AnyRow) -> Result<PatternRow, StoreError> {
    let sha256: String = row.get(0);
    let (size, rules): (i64, i64) = (row.get(3), row.get(4));
    let warnings: String = row.get(5);
    let count = |column| {
        let count: i64 = row.get(column);
        u64::try_from(count).map_err(|_| StoreError::content("number of digests", count.to_string()))
    };
    let digests = Counts::new(count(9)?, count(10)?, count(11)?);
    Ok(PatternRow {
        reference: PatternRef {
            sha256: sha256.parse().map_err(|_| StoreError::content("digest", sha256))?,
            size: u64::try_from(size).map_err(|_| StoreError::content("size", size.to_string()))?,
            name: row.get(1),
        },
        kind: row.get(2),
        rules: u32::try_from(rules).map_err(|_| StoreError::content("number of rules", rules.to_string()))?,
        warnings: serde_json::from_str(&warnings)
            .map_err(|_| StoreError::content("list of warnings", warnings))?,
        digests,
        imported_by: row.get(6),
        imported_ms: row.get(7),
        import_number: row.get(8),
        published_ms: row.get(12),
    })
}

#[cfg(test)]
mod tests {
    use tm_protocol::ids::EndpointId;

    use super::*;
    use crate::store::tests::scratch;

    fn new(name: &str, text: &str) -> NewPattern {
        let reference = PatternRef { sha256: Sha256::of(text.as_bytes()), size: 1, name: name.to_owned() };
        let warnings = vec![ProblemRow { line: 1, column: 2, message: "slow".to_owned() }];
        NewPattern { reference, rules: 1, digests: Counts::new(1, 2, 3), warnings, forced: false }
    }

    /// As if a role listed all.
    async fn publish_all(store: &Store) {
        let all: Vec<Sha256> =
            store.patterns().await.unwrap().iter().map(|row| row.reference.sha256).collect();
        store.mark_published(&all).await;
    }

    #[tokio::test]
    async fn a_name_means_the_newest_import() {
        let (store, _folder) = scratch().await;
        let texts = async || {
            let versions = store.versions().await.unwrap();
            let rows = versions.of(EndpointId::new(uuid::Uuid::nil()), "default");
            rows.into_iter().map(|row| row.reference.sha256).collect::<Vec<_>>()
        };
        let [a, b, c] = ["a", "b", "c"].map(|t| Sha256::of(t.as_bytes()));
        for (name, text) in [("x", "a"), ("x", "b"), ("y", "c"), ("y", "c")] {
            store.import_pattern(&new(name, text), "root", 1).await.unwrap();
        }
        assert_eq!(texts().await, [], "nothing is listed yet");
        publish_all(&store).await;
        assert_eq!(texts().await, [b, c]);
        store.import_pattern(&new("x", "a"), "root", 2).await.unwrap();
        assert_eq!(texts().await, [b, c], "what is listed stays where it is");
        let other = store.import_pattern(&new("z", "a"), "root", 3).await.unwrap();
        assert_eq!(other, Import::OtherName("x".to_owned()));
        assert_eq!(store.patterns().await.unwrap().len(), 3);
        let row = store.pattern(b).await.unwrap().unwrap();
        assert_eq!((row.warnings, row.digests), (new("x", "b").warnings, Counts::new(1, 2, 3)));
        // Of the five successful imports two changed nothing.
        assert_eq!(store.audit_after(0, 99).await.unwrap().len(), 3);

        let digits = a.to_string();
        for (text, meant) in
            [("x", Some(b)), (&*digits, Some(a)), (&digits[..8], Some(a)), (&digits[..7], None), ("%", None)]
        {
            let rows = store.patterns_meant(text).await.unwrap();
            assert_eq!(rows.first().map(|row| row.reference.sha256), meant, "{text}");
        }
    }
}
