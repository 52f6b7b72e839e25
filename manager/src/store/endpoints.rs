//! Endpoints as administrators look for them. What agents change is `sessions` and `enrollments`.
//!
//! Every list, look-up and selection of targets is one [`Condition`] put into the same two statements, so
//! that a list and what is ordered for it cannot disagree.

use std::{collections::HashMap, net::IpAddr};

use serde::Deserialize;
use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_api::status::Query;
use tm_protocol::{
    ids::EndpointId,
    message::Disk,
    search::{Term, address_key},
    task::TaskKind,
};

use super::{
    Store, StoreError,
    audit::{self, Entry},
    overview,
    tasks::json,
};

/// Most endpoints named where a target means none or several.
const MAX_CANDIDATES: usize = 10;

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EndpointRow {
    pub(crate) id: EndpointId,
    pub(crate) host: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) group: String,
    pub(crate) connected: bool,
    /// Numbers of the kinds of task that its agent knows; empty until it has connected once.
    pub(crate) task_kinds: Vec<u16>,
    pub(crate) agent_version: String,
    pub(crate) enrolled_ms: i64,
    /// When its agent was shut out for ever.
    pub(crate) revoked_ms: Option<i64>,
    pub(crate) last_seen_ms: Option<i64>,
    pub(crate) failure: Option<FailureRow>,
    pub(crate) inventory: Option<InventoryRow>,
}

impl EndpointRow {
    /// Whether its agent can be ordered tasks of this kind. One that never connected may yet say so.
    pub(crate) fn knows(&self, kind: TaskKind) -> bool {
        self.task_kinds.is_empty() || self.task_kinds.contains(&kind.number())
    }
}

/// Why an agent last failed to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FailureRow {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) at_ms: i64,
}

/// An endpoint's facts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct InventoryRow {
    pub(crate) os: String,
    pub(crate) kernel: String,
    pub(crate) arch: String,
    pub(crate) cpu: String,
    pub(crate) cpus: u32,
    pub(crate) memory: u64,
    pub(crate) disks: Vec<Disk>,
    pub(crate) boot_id: String,
}

/// Which endpoints; all by default.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Any of these fits; empty means no search.
    pub(crate) terms: Vec<Term>,
    pub(crate) group: Option<String>,
    pub(crate) connected: Option<bool>,
    /// Those that this query of the overview counts.
    pub(crate) query: Option<Query>,
}

/// What a target means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meaning {
    One(Box<EndpointRow>),
    /// None; these have host names that begin so.
    Unknown(Vec<EndpointRow>),
    /// Several, of which these are the first.
    Ambiguous(Vec<EndpointRow>),
}

impl Store {
    /// The endpoints that fit, by host name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn endpoints(&self, filter: &Filter) -> Result<Vec<EndpointRow>, StoreError> {
        self.endpoints_where(&Condition::of(filter)).await
    }

    /// The endpoints that fit, by host name, as far as an order for them has to know them: without their inventories,
    /// and addresses only of those that are away. An order for a whole fleet reads little of each.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn addressees(&self, filter: &Filter) -> Result<Vec<EndpointRow>, StoreError> {
        self.endpoints_with(&Condition::of(filter), "CAST(NULL AS TEXT)", "manager_id IS NULL").await
    }

    /// The one endpoint that `target` (id, full host name or address) means.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn endpoint_meant(&self, target: &str) -> Result<Meaning, StoreError> {
        let mut found = self.endpoints_where(&Condition::target(target)).await?;
        match found.len() {
            0 if target.is_empty() => Ok(Meaning::Unknown(found)),
            0 => {
                let mut condition = Condition::default();
                condition.sql = condition.host_prefix(&target.to_lowercase());
                let mut near = self.endpoints_where(&condition).await?;
                near.truncate(MAX_CANDIDATES);
                Ok(Meaning::Unknown(near))
            }
            1 => Ok(Meaning::One(Box::new(found.remove(0)))),
            _ => {
                found.truncate(MAX_CANDIDATES);
                Ok(Meaning::Ambiguous(found))
            }
        }
    }

    /// One endpoint.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn endpoint(&self, id: EndpointId) -> Result<Option<EndpointRow>, StoreError> {
        Ok(self.endpoints_where(&Condition::target(&id.to_string())).await?.pop())
    }

    /// Moves an endpoint to another group.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn set_group(
        &self,
        endpoint: &EndpointRow,
        group: &str,
        actor: &str,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin_audited().await?;
        sqlx::query("UPDATE endpoint SET group_name = $1 WHERE id = $2")
            .bind(group.to_owned())
            .bind(endpoint.id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("set an endpoint's group"))?;
        let entry = Entry {
            actor,
            action: "endpoint.set-group",
            subject: &endpoint.id.to_string(),
            detail: serde_json::json!({ "host": endpoint.host, "from": endpoint.group, "to": group }),
            at_ms: now_ms,
        };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await
    }

    /// The ids of at most `limit` endpoints that fit, in no order.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(super) async fn endpoint_ids(
        &self,
        filter: &Filter,
        limit: usize,
    ) -> Result<Vec<EndpointId>, StoreError> {
        let condition = Condition::of(filter);
        let sql = format!("SELECT id FROM endpoint WHERE {} LIMIT {limit}", condition.sql);
        let rows = condition.fetch(self, sql).await.map_err(StoreError::query("find endpoints"))?;
        rows.iter()
            .map(|row| {
                let id: String = row.get(0);
                id.parse().map_err(|_| StoreError::content("endpoint id", id))
            })
            .collect()
    }

    async fn endpoints_where(&self, condition: &Condition) -> Result<Vec<EndpointRow>, StoreError> {
        self.endpoints_with(condition, "inventory", "1 = 1").await
    }

    async fn endpoints_with(
        &self,
        condition: &Condition,
        inventory: &'static str,
        with_addresses: &'static str,
    ) -> Result<Vec<EndpointRow>, StoreError> {
        let Condition { sql, .. } = condition;
        let rows = condition
            .fetch(
                self,
                format!(
                    "SELECT id, host, group_name, manager_id, agent_version, enrolled_ms, last_seen_ms,
                            failure_code, failure_message, failure_ms, {inventory}, task_kinds, revoked_ms
                     FROM endpoint WHERE {sql} ORDER BY host_key, id"
                ),
            )
            .await
            .map_err(StoreError::query("list the endpoints"))?;
        let mut addresses: HashMap<String, Vec<String>> = HashMap::new();
        let address_rows = condition
            .fetch(
                self,
                format!(
                    "SELECT endpoint_id, address FROM endpoint_address
                     WHERE endpoint_id IN (SELECT id FROM endpoint WHERE {sql} AND {with_addresses})
                     ORDER BY endpoint_id, address_key"
                ),
            )
            .await
            .map_err(StoreError::query("list the endpoints' addresses"))?;
        for row in address_rows {
            addresses.entry(row.get(0)).or_default().push(row.get(1));
        }
        rows.iter().map(|row| endpoint(row, &mut addresses)).collect()
    }
}

/// A condition on `endpoint` and the values for its placeholders.
///
/// **Invariant:** whatever comes from outside is a value, never part of the text.
#[derive(Debug, Default)]
pub(super) struct Condition {
    pub(super) sql: String,
    /// For `$1`, `$2`, …
    pub(super) values: Vec<String>,
}

impl Condition {
    pub(super) fn of(filter: &Filter) -> Self {
        let mut condition = Self::default();
        let mut all = vec!["1 = 1".to_owned()];
        if !filter.terms.is_empty() {
            let any: Vec<String> = filter.terms.iter().map(|term| condition.term(term)).collect();
            all.push(format!("({})", any.join(" OR ")));
        }
        if let Some(group) = &filter.group {
            all.push(format!("group_name = {}", condition.value(group.clone())));
        }
        match filter.connected {
            Some(true) => all.push("manager_id IS NOT NULL".to_owned()),
            Some(false) => all.push("manager_id IS NULL".to_owned()),
            None => {}
        }
        if let Some(query) = filter.query {
            all.push(overview::condition(query).to_owned());
        }
        condition.sql = all.join(" AND ");
        condition
    }

    fn target(target: &str) -> Self {
        let mut condition = Self::default();
        condition.sql = if let Ok(id) = target.parse::<EndpointId>() {
            format!("id = {}", condition.value(id.to_string()))
        } else if let Ok(address) = target.parse::<IpAddr>() {
            let key = address_key(address);
            condition.term(&Term::Addresses { first: key.clone(), last: key })
        } else {
            format!("host_key = {}", condition.value(target.to_lowercase()))
        };
        condition
    }

    fn term(&mut self, term: &Term) -> String {
        match term {
            Term::Addresses { first, last } => {
                let (first, last) = (self.value(first.clone()), self.value(last.clone()));
                format!(
                    "id IN (SELECT endpoint_id FROM endpoint_address
                            WHERE address_key BETWEEN {first} AND {last})"
                )
            }
            Term::HostPrefix(prefix) => self.host_prefix(prefix),
        }
    }

    fn host_prefix(&mut self, prefix: &str) -> String {
        let mut pattern = String::with_capacity(prefix.len() + 1);
        for c in prefix.chars() {
            if matches!(c, '%' | '_' | '!') {
                pattern.push('!');
            }
            pattern.push(c);
        }
        pattern.push('%');
        format!("host_key LIKE {} ESCAPE '!'", self.value(pattern))
    }

    /// Keeps a value and gives its placeholder.
    pub(super) fn value(&mut self, value: String) -> String {
        self.values.push(value);
        format!("${}", self.values.len())
    }

    pub(super) async fn fetch(&self, store: &Store, sql: String) -> Result<Vec<AnyRow>, sqlx::Error> {
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in &self.values {
            query = query.bind(value.clone());
        }
        query.fetch_all(store.reader()).await
    }
}

fn endpoint(row: &AnyRow, addresses: &mut HashMap<String, Vec<String>>) -> Result<EndpointRow, StoreError> {
    let id: String = row.get(0);
    let code: Option<String> = row.get(7);
    let inventory: Option<String> = row.get(10);
    Ok(EndpointRow {
        addresses: addresses.remove(&id).unwrap_or_default(),
        id: id.parse().map_err(|_| StoreError::content("endpoint id", id))?,
        host: row.get(1),
        group: row.get(2),
        connected: row.get::<Option<String>, _>(3).is_some(),
        task_kinds: json("task kinds", &row.get::<String, _>(11))?,
        agent_version: row.get(4),
        enrolled_ms: row.get(5),
        revoked_ms: row.get(12),
        last_seen_ms: row.get(6),
        failure: code.map(|code| FailureRow {
            code,
            message: row.get::<Option<String>, _>(8).unwrap_or_default(),
            at_ms: row.get::<Option<i64>, _>(9).unwrap_or_default(),
        }),
        inventory: inventory
            .map(|text| serde_json::from_str(&text).map_err(|_| StoreError::content("inventory", text)))
            .transpose()?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;
    use tm_protocol::search::parse;
    use uuid::Uuid;

    use super::*;
    use crate::store::tests::scratch;

    /// Puts an endpoint into the store as enrollment and a session would.
    pub(crate) async fn put(
        store: &Store,
        n: u128,
        host: &str,
        addresses: &[&str],
        connected: bool,
    ) -> EndpointId {
        let id = EndpointId::new(Uuid::from_u128(n));
        let mut tx = store.begin().await.unwrap();
        sqlx::query(
            "INSERT INTO endpoint (id, host, host_key, group_name, agent_version, enrolled_ms, token_id,
                manager_id, session_epoch, task_kinds, inventory, stored_through)
             VALUES ($1, $2, $3, 'default', '0.1.0', 7, 't', $4, 0, '[1,2,3]', $5, 0)",
        )
        .bind(id.to_string())
        .bind(host.to_owned())
        .bind(host.to_lowercase())
        .bind(connected.then(|| "m".to_owned()))
        .bind(
            json!({ "os": "o", "kernel": "k", "arch": "a", "cpu": "c", "cpus": 1, "memory": 2, "boot_id": "b",
                    "disks": [{ "mount": "/", "filesystem": "ext4", "total": 3 }] })
            .to_string(),
        )
        .execute(&mut *tx)
        .await
        .unwrap();
        for address in addresses {
            sqlx::query(
                "INSERT INTO endpoint_address (endpoint_id, address_key, address) VALUES ($1, $2, $3)",
            )
            .bind(id.to_string())
            .bind(address_key(address.parse().unwrap()))
            .bind((*address).to_owned())
            .execute(&mut *tx)
            .await
            .unwrap();
        }
        Store::commit(tx).await.unwrap();
        id
    }

    /// Ends every session, as the sessions would.
    pub(crate) async fn disconnect_all(tx: &mut super::super::Tx) {
        sqlx::query("UPDATE endpoint SET manager_id = NULL").execute(&mut **tx).await.unwrap();
    }

    async fn five() -> (Store, tempfile::TempDir) {
        let (store, folder) = scratch().await;
        put(&store, 1, "endpoint_001", &["192.168.0.5", "2001:db8::1"], true).await;
        put(&store, 2, "endpointX001", &["192.168.1.5"], false).await;
        put(&store, 3, "jp_endpoint", &["10.0.0.1"], true).await;
        put(&store, 4, "Web-07.example", &["10.0.0.1", "192.168.0.77"], true).await;
        put(&store, 5, "twin", &[], false).await;
        put(&store, 6, "TWIN", &[], false).await;
        (store, folder)
    }

    fn hosts(rows: &[EndpointRow]) -> Vec<&str> {
        rows.iter().map(|row| row.host.as_str()).collect()
    }

    #[tokio::test]
    async fn a_search_finds_what_its_grammar_says() {
        let (store, _folder) = five().await;
        let cases: [(&str, &[&str]); 8] = [
            ("endpoint", &["endpoint_001", "endpointX001"]),
            // `_` is a letter here, not "any letter".
            ("endpoint_", &["endpoint_001"]),
            ("WEB", &["Web-07.example"]),
            ("192.168.0", &["endpoint_001", "Web-07.example"]),
            ("192.168.0.0/16", &["endpoint_001", "endpointX001", "Web-07.example"]),
            ("2001:db8::/32", &["endpoint_001"]),
            ("10.0.0.1, jp", &["jp_endpoint", "Web-07.example"]),
            ("172.16.0.0/12", &[]),
        ];
        for (search, expected) in cases {
            let filter = Filter { terms: parse(search).unwrap(), ..Filter::default() };
            assert_eq!(hosts(&store.endpoints(&filter).await.unwrap()), expected, "{search}");
        }
        let all = store.endpoints(&Filter::default()).await.unwrap();
        assert_eq!(all.len(), 6);
        assert_eq!(all[0].addresses, ["192.168.0.5", "2001:db8::1"]);
        assert_eq!(all[0].inventory.as_ref().unwrap().disks[0].total, 3);
        let away = Filter {
            connected: Some(false),
            terms: parse("endpoint").unwrap(),
            group: Some("default".to_owned()),
            query: None,
        };
        assert_eq!(hosts(&store.endpoints(&away).await.unwrap()), ["endpointX001"]);
        let elsewhere = Filter { group: Some("' OR 1=1 --".to_owned()), ..Filter::default() };
        assert_eq!(store.endpoints(&elsewhere).await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_target_means_exactly_one_or_says_which_were_near() {
        let (store, _folder) = five().await;
        let id = EndpointId::new(Uuid::from_u128(2)).to_string();
        for (target, host) in [
            (&*id, "endpointX001"),
            ("ENDPOINT_001", "endpoint_001"),
            ("192.168.0.77", "Web-07.example"),
            ("2001:0db8:0::1", "endpoint_001"),
        ] {
            let meaning = store.endpoint_meant(target).await.unwrap();
            assert!(matches!(&meaning, Meaning::One(row) if row.host == host), "{target}: {meaning:?}");
        }
        for (target, near) in
            [("end", &["endpoint_001", "endpointX001"][..]), ("%", &[]), ("", &[]), ("10.0.0", &[])]
        {
            let meaning = store.endpoint_meant(target).await.unwrap();
            assert!(
                matches!(&meaning, Meaning::Unknown(rows) if hosts(rows) == near),
                "{target}: {meaning:?}"
            );
        }
        for (target, which) in [("10.0.0.1", ["jp_endpoint", "Web-07.example"]), ("Twin", ["twin", "TWIN"])] {
            let meaning = store.endpoint_meant(target).await.unwrap();
            assert!(
                matches!(&meaning, Meaning::Ambiguous(rows) if hosts(rows) == which),
                "{target}: {meaning:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_change_of_group_is_seen_and_logged() {
        let (store, _folder) = five().await;
        let Meaning::One(row) = store.endpoint_meant("jp_endpoint").await.unwrap() else { panic!("one") };
        store.set_group(&row, "lab", "root", 9).await.unwrap();
        let lab = Filter { group: Some("lab".to_owned()), ..Filter::default() };
        assert_eq!(hosts(&store.endpoints(&lab).await.unwrap()), ["jp_endpoint"]);
        let log = store.audit_after(0, 9).await.unwrap();
        assert_eq!((log.len(), log[0].action.as_str()), (1, "endpoint.set-group"));
    }
}
