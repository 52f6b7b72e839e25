//! The overview: saved queries over endpoints, their counts and what else is counted beside.
//!
//! **Invariant:** a query's count, its list and the targets it stands for come from one condition,
//! [`condition`].

use sqlx::{AssertSqlSafe, Row as _};
use tm_api::status::Query;
use tm_protocol::ids::EndpointId;

use super::{Store, StoreError};

/// The condition on `endpoint` that a query is.
pub(super) const fn condition(query: Query) -> &'static str {
    match query {
        Query::NeedsCleanup => "id IN (SELECT endpoint_id FROM incident WHERE state = 'awaiting-cleanup')",
        Query::Unresolved => "id IN (SELECT endpoint_id FROM incident WHERE state = 'unresolved')",
        Query::Connected => "manager_id IS NOT NULL",
        Query::Disconnected => "manager_id IS NULL",
        Query::AgentInstalled => "manager_id IS NULL AND revoked_ms IS NULL",
        // An agent that was shut out is none of ours any more.
        Query::Agentless => "manager_id IS NULL AND revoked_ms IS NOT NULL",
    }
}

/// The condition on `endpoint` for which a query's work is ordered already and waits or runs.
const fn ordered(query: Query) -> &'static str {
    match query {
        Query::NeedsCleanup => {
            "id IN (SELECT endpoint_id FROM incident WHERE state = 'cleaning' AND before <> 'unresolved')"
        }
        Query::Unresolved => {
            "id IN (SELECT endpoint_id FROM incident WHERE state = 'cleaning' AND before = 'unresolved')"
        }
        Query::Connected | Query::Disconnected | Query::AgentInstalled | Query::Agentless => "1 = 0",
    }
}

/// What is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Overview {
    /// Each query with its count and how many have the work ordered already.
    pub(crate) queries: Vec<(Query, u64, u64)>,
    pub(crate) endpoints: u64,
    pub(crate) tasks_queued: u64,
    pub(crate) tasks_running: u64,
    pub(crate) incidents_open: u64,
}

impl Store {
    /// Counts everything at one moment.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn overview(&self) -> Result<Overview, StoreError> {
        let mut parts: Vec<String> = vec![
            "SELECT COUNT(*) FROM endpoint".to_owned(),
            "SELECT COUNT(*) FROM task WHERE state = 'queued'".to_owned(),
            "SELECT COUNT(*) FROM task WHERE state IN ('delivered', 'running')".to_owned(),
            "SELECT COUNT(*) FROM incident WHERE state IN ('awaiting-cleanup', 'cleaning', 'unresolved')"
                .to_owned(),
        ];
        for query in Query::ALL {
            for condition in [condition(query), ordered(query)] {
                parts.push(format!("SELECT COUNT(*) FROM endpoint WHERE {condition}"));
            }
        }
        let parts: Vec<String> = parts.into_iter().map(|part| format!("({part})")).collect();
        let row = sqlx::query(AssertSqlSafe(format!("SELECT {}", parts.join(", "))))
            .fetch_one(self.reader())
            .await
            .map_err(StoreError::query("count the overview"))?;
        let count = |column: usize| u64::try_from(row.get::<i64, _>(column)).unwrap_or(0);
        Ok(Overview {
            queries: (4..)
                .step_by(2)
                .zip(Query::ALL)
                .map(|(at, query)| (query, count(at), count(at + 1)))
                .collect(),
            endpoints: count(0),
            tasks_queued: count(1),
            tasks_running: count(2),
            incidents_open: count(3),
        })
    }

    /// The queries that count an endpoint.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn queries_of(&self, endpoint: EndpointId) -> Result<Vec<Query>, StoreError> {
        let columns: Vec<String> = Query::ALL
            .iter()
            .map(|query| format!("CAST(CASE WHEN {} THEN 1 ELSE 0 END AS BIGINT)", condition(*query)))
            .collect();
        let row =
            sqlx::query(AssertSqlSafe(format!("SELECT {} FROM endpoint WHERE id = $1", columns.join(", "))))
                .bind(endpoint.to_string())
                .fetch_optional(self.reader())
                .await
                .map_err(StoreError::query("ask which queries count an endpoint"))?;
        let Some(row) = row else { return Ok(Vec::new()) };
        Ok((0..).zip(Query::ALL).filter(|(at, _)| row.get::<i64, usize>(*at) != 0).map(|(_, q)| q).collect())
    }
}
