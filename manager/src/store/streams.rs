//! What agents hand in under numbers of their own: reports, and notices beside them.
//!
//! **Invariant:** what is handed in and its number are committed together, so that what comes again changes
//! nothing, and only for the session that stands: what an older one still had on its way is not counted,
//! because its numbers may be of another stream.

use std::collections::HashSet;

use sqlx::Row as _;
use tm_protocol::{
    ids::EndpointId,
    message::{Inventory, Notices, Report},
};

use super::{Store, StoreError, Tx, notices, parts, reports, rows, sessions};

/// The highest numbers of an agent's two streams; 0 if there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) reports: u64,
    pub(crate) notices: u64,
}

/// One numbered thing.
#[derive(Debug, Clone)]
pub(crate) enum HandedIn {
    Report(Report),
    Notices(Notices),
}

/// What one session hands in at a time, in order.
#[derive(Debug, Clone)]
pub(crate) struct Parcel {
    pub(crate) endpoint: EndpointId,
    pub(crate) epoch: i64,
    /// What is stored before it. Its reports go on from there without a gap.
    pub(crate) after: Counts,
    pub(crate) items: Vec<HandedIn>,
    pub(crate) inventory: Option<Box<Inventory>>,
}

/// What became of a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// All of it is stored.
    Stored,
    /// Nothing of it is: a newer session stands.
    Superseded,
}

impl Counts {
    /// The counts once `item` is stored too.
    pub(crate) fn after(mut self, item: &HandedIn) -> Self {
        match item {
            HandedIn::Report(report) => self.reports = self.reports.max(report.sequence),
            HandedIn::Notices(notices) => self.notices = self.notices.max(last(notices)),
        }
        self
    }
}

/// The number of the last notice.
pub(crate) fn last(notices: &Notices) -> u64 {
    let count = u64::try_from(notices.notices.len()).unwrap_or(u64::MAX);
    notices.first.saturating_add(count).saturating_sub(1)
}

impl HandedIn {
    /// How much there is to store, roughly.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Report(report) => report.weight(),
            Self::Notices(notices) => notices.notices.len().max(1),
        }
    }
}

impl Parcel {
    /// The same in parcels of one item each.
    pub(crate) fn singles(self) -> impl Iterator<Item = Self> {
        let Self { endpoint, epoch, mut after, items, inventory } = self;
        let facts =
            inventory.map(|facts| Self { endpoint, epoch, after, items: Vec::new(), inventory: Some(facts) });
        let items = items.into_iter().map(move |item| {
            let before = after;
            after = after.after(&item);
            Self { endpoint, epoch, after: before, items: vec![item], inventory: None }
        });
        facts.into_iter().chain(items)
    }
}

impl Store {
    /// Stores parcels of many sessions in one transaction; what became of each, in order. Items that are
    /// stored already are passed over. Of one scan, `most_detections` are stored.
    ///
    /// # Errors
    /// If the database cannot take one of them; then nothing is stored.
    pub(crate) async fn take_in(
        &self,
        parcels: &[Parcel],
        most_detections: i64,
        now_ms: i64,
    ) -> Result<Vec<Taken>, StoreError> {
        let mut tx = self.begin().await?;
        let counted = count_all(&mut tx, parcels, self.engine.rows_at_a_time()).await?;
        let standing = parcels.iter().zip(&counted).filter(|(_, before)| before.is_some());
        let mut last = reports::Last::read(&mut tx, standing.map(|(parcel, _)| parcel)).await?;
        let (mut taken, mut told) = (Vec::with_capacity(parcels.len()), Vec::new());
        for (parcel, before) in parcels.iter().zip(counted) {
            taken.push(match before {
                Some(before) => {
                    take(&mut tx, &mut last, parcel, before, most_detections, now_ms).await?;
                    told.extend(parcel.inventory.as_deref().map(|facts| (parcel.endpoint, facts)));
                    Taken::Stored
                }
                None => Taken::Superseded,
            });
        }
        sessions::replace_inventories(&mut tx, told.into_iter()).await?;
        Self::commit(tx).await?;
        Ok(taken)
    }
}

async fn take(
    tx: &mut Tx,
    last: &mut reports::Last,
    parcel: &Parcel,
    before: Counts,
    most_detections: i64,
    now_ms: i64,
) -> Result<(), StoreError> {
    for item in &parcel.items {
        match item {
            HandedIn::Report(report) if report.sequence > before.reports => {
                reports::apply(tx, last, parcel.endpoint, report, most_detections, now_ms).await?;
            }
            HandedIn::Report(_) => {}
            HandedIn::Notices(notices) => {
                for (number, notice) in (notices.first..).zip(&notices.notices) {
                    if number > before.notices {
                        notices::note(tx, parcel.endpoint, notice, now_ms).await?;
                    }
                }
            }
        }
    }
    last.settle(tx).await
}

/// [`count`] of every parcel, as many at once as one statement may change.
async fn count_all(
    tx: &mut Tx,
    parcels: &[Parcel],
    at_a_time: usize,
) -> Result<Vec<Option<Counts>>, StoreError> {
    let mut counted = Vec::with_capacity(parcels.len());
    for part in parts(parcels, at_a_time) {
        let moved = if part.len() > 1 { move_counts(tx, part).await? } else { HashSet::new() };
        for parcel in part {
            counted.push(if moved.contains(&(parcel.endpoint, parcel.epoch)) {
                Some(parcel.after)
            } else {
                count(tx, parcel).await?
            });
        }
    }
    Ok(counted)
}

/// Moves the counts of those parcels that find them where they should be; whose.
async fn move_counts(tx: &mut Tx, parcels: &[Parcel]) -> Result<HashSet<(EndpointId, i64)>, StoreError> {
    let sql = format!(
        "WITH parcel (whose, epoch, reports, notices, had_reports, had_notices) AS (VALUES {})
         UPDATE endpoint SET stored_through = parcel.reports, notices_through = parcel.notices FROM parcel
         WHERE endpoint.id = parcel.whose AND endpoint.session_epoch = parcel.epoch
           AND endpoint.stored_through = parcel.had_reports AND endpoint.notices_through = parcel.had_notices
         RETURNING id, session_epoch",
        rows(parcels.len(), 6)
    );
    let mut query = sqlx::query(tx.engine.listed(sql));
    for parcel in parcels {
        let end = parcel.items.iter().fold(parcel.after, |counts, item| counts.after(item));
        query = query
            .bind(parcel.endpoint.to_string())
            .bind(parcel.epoch)
            .bind(number(end.reports))
            .bind(number(end.notices))
            .bind(number(parcel.after.reports))
            .bind(number(parcel.after.notices));
    }
    let rows = query.fetch_all(&mut **tx).await;
    let rows = rows.map_err(StoreError::query("count what agents hand in"))?;
    rows.iter()
        .map(|row| {
            let id: String = row.get(0);
            Ok((id.parse().map_err(|_| StoreError::content("endpoint id", id))?, row.get(1)))
        })
        .collect()
}

/// Moves the counts to where the parcel ends; where they were, or `None` if a newer session stands. The row
/// is this transaction's from here on.
async fn count(tx: &mut Tx, parcel: &Parcel) -> Result<Option<Counts>, StoreError> {
    let mut before = parcel.after;
    loop {
        let end = parcel.items.iter().fold(before, |counts, item| counts.after(item));
        let moved = sqlx::query(
            "UPDATE endpoint SET stored_through = $3, notices_through = $4
             WHERE id = $1 AND session_epoch = $2 AND stored_through = $5 AND notices_through = $6",
        )
        .bind(parcel.endpoint.to_string())
        .bind(parcel.epoch)
        .bind(number(end.reports))
        .bind(number(end.notices))
        .bind(number(before.reports))
        .bind(number(before.notices))
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("count what an agent hands in"))?;
        if moved.rows_affected() > 0 {
            return Ok(Some(before));
        }
        // A commit whose answer got lost has moved them already; a newer session is another matter.
        let row = sqlx::query(
            "SELECT stored_through, notices_through FROM endpoint WHERE id = $1 AND session_epoch = $2",
        )
        .bind(parcel.endpoint.to_string())
        .bind(parcel.epoch)
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look an agent's numbers up"))?;
        let Some(row) = row else { return Ok(None) };
        let found = Counts { reports: unsigned(row.get(0)), notices: unsigned(row.get(1)) };
        if found == before {
            // The row is there and the statement does not find it: no store of ours does that.
            return Err(StoreError::content("number of an agent's reports", found.reports.to_string()));
        }
        before = found;
    }
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use tm_protocol::{
        ids::TaskId,
        message::{Hello, ReportBody},
        report::{Failure, Notice},
    };
    use uuid::Uuid;

    use super::*;
    use crate::store::tests::scratch;

    impl Store {
        /// Hands reports in as the session that stands, one parcel for each.
        pub(crate) async fn record_reports(
            &self,
            reports: &[(EndpointId, Report)],
            now_ms: i64,
        ) -> Result<(), StoreError> {
            for (endpoint, report) in reports {
                let row = sqlx::query(
                    "SELECT session_epoch, stored_through, notices_through FROM endpoint WHERE id = $1",
                )
                .bind(endpoint.to_string())
                .fetch_one(self.reader())
                .await
                .map_err(StoreError::query("look an endpoint up"))?;
                let parcel = Parcel {
                    endpoint: *endpoint,
                    epoch: row.get(0),
                    after: Counts { reports: unsigned(row.get(1)), notices: unsigned(row.get(2)) },
                    items: vec![HandedIn::Report(report.clone())],
                    inventory: None,
                };
                self.take_in(&[parcel], 1_000_000, now_ms).await?;
            }
            Ok(())
        }
    }

    /// Puts an endpoint in that has never connected.
    pub(crate) async fn endpoint(store: &Store, number: u128) -> EndpointId {
        let id = EndpointId::new(Uuid::from_u128(number));
        let mut tx = store.begin().await.unwrap();
        sqlx::query(
            "INSERT INTO endpoint (id, host, host_key, group_name, agent_version, enrolled_ms, token_id,
             session_epoch, task_kinds, stored_through) VALUES ($1, 'h', 'h', 'g', 'v', 0, 't', 0, '[]', 0)",
        )
        .bind(id.to_string())
        .execute(&mut *tx)
        .await
        .unwrap();
        Store::commit(tx).await.unwrap();
        id
    }

    /// The first message of an agent whose reports are numbered in `stream`.
    pub(crate) fn hello(stream: u128) -> Hello {
        Hello {
            min_version: 1,
            max_version: 1,
            agent_version: "0".into(),
            boot_id: "b".into(),
            process_nonce: 0,
            task_kinds: vec![],
            stream: tm_protocol::ids::StreamId::new(Uuid::from_u128(stream)),
            clock_ms: 0,
            last_failure: None,
        }
    }

    /// Carries out one statement.
    pub(crate) async fn run(store: &Store, sql: &'static str) {
        let mut tx = store.begin().await.unwrap();
        sqlx::query(sql).execute(&mut *tx).await.unwrap();
        Store::commit(tx).await.unwrap();
    }

    fn lost(sequence: u64, count: u64) -> HandedIn {
        HandedIn::Report(Report { sequence, at_ms: 0, body: ReportBody::Lost { count } })
    }

    fn notices(first: u64, codes: &[&str]) -> HandedIn {
        let notice = |code: &&str| Notice { at_ms: 7, code: (*code).into(), message: "m".into(), count: 0 };
        HandedIn::Notices(Notices { first, notices: codes.iter().map(notice).collect() })
    }

    async fn events(store: &Store) -> Vec<String> {
        sqlx::query("SELECT detail FROM event ORDER BY id")
            .fetch_all(store.reader())
            .await
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect()
    }

    #[tokio::test]
    async fn each_number_takes_effect_once_and_gaps_are_told() {
        let (store, _folder) = scratch().await;
        let id = endpoint(&store, 1).await;
        let manager = tm_protocol::ids::ManagerId::new(Uuid::nil());
        let opened = store.open_session(id, manager, &hello(1), 1).await.unwrap();
        assert_eq!(opened.stored, Counts::default());
        let parcel =
            |after, items| Parcel { endpoint: id, epoch: opened.epoch, after, items, inventory: None };

        let first = parcel(Counts::default(), vec![notices(1, &["a", "b"]), lost(6, 5), notices(5, &["c"])]);
        // A commit whose answer got lost is tried again.
        for _ in 0..2 {
            let taken = store.take_in(std::slice::from_ref(&first), 9, 2).await.unwrap();
            assert_eq!(taken, [Taken::Stored]);
        }
        assert_eq!(events(&store).await, ["a", "b", "reports-lost", "c"]);
        // Sent again together with new ones: only those are new.
        let after = Counts { reports: 6, notices: 5 };
        let again = parcel(after, vec![notices(4, &["b", "c", "d"]), lost(7, 0)]);
        store.take_in(&[again], 9, 3).await.unwrap();
        assert_eq!(events(&store).await, ["a", "b", "reports-lost", "c", "d", "reports-lost"]);

        let opened = store.open_session(id, manager, &hello(1), 4).await.unwrap();
        assert_eq!(opened.stored, Counts { reports: 7, notices: 6 });
        let opened = store.open_session(id, manager, &hello(2), 5).await.unwrap();
        assert_eq!(opened.stored, Counts::default(), "another stream begins anew");
    }

    #[tokio::test]
    async fn an_older_sessions_numbers_do_not_count_in_a_new_stream() {
        let (store, _folder) = scratch().await;
        let id = endpoint(&store, 1).await;
        let manager = tm_protocol::ids::ManagerId::new(Uuid::nil());
        let older = store.open_session(id, manager, &hello(1), 1).await.unwrap();
        let newer = store.open_session(id, manager, &hello(2), 2).await.unwrap();
        let parcel =
            |epoch, items| Parcel { endpoint: id, epoch, after: Counts::default(), items, inventory: None };
        let refused = Failure::new("x", "y");
        let body = ReportBody::Refused { task: TaskId::new(Uuid::nil()), failure: refused };
        let late = HandedIn::Report(Report { sequence: 1, at_ms: 0, body });
        let taken = store
            .take_in(
                &[
                    parcel(older.epoch, vec![late, notices(1, &["old"])]),
                    parcel(newer.epoch, vec![notices(1, &["new"])]),
                ],
                9,
                3,
            )
            .await
            .unwrap();
        assert_eq!(taken, [Taken::Superseded, Taken::Stored]);
        assert_eq!(events(&store).await, ["new"]);
        let again = store.open_session(id, manager, &hello(2), 4).await.unwrap();
        assert_eq!(again.stored, Counts { reports: 0, notices: 1 });
    }

    #[test]
    fn a_parcel_falls_into_items_that_go_on_from_each_other() {
        let parcel = Parcel {
            endpoint: EndpointId::new(Uuid::nil()),
            epoch: 1,
            after: Counts { reports: 3, notices: 3 },
            items: vec![lost(4, 0), notices(4, &["a", "b"]), lost(9, 4)],
            inventory: None,
        };
        let afters: Vec<_> =
            parcel.singles().map(|p| (p.items.len(), p.after.reports, p.after.notices)).collect();
        assert_eq!(afters, [(1, 3, 3), (1, 4, 3), (1, 4, 5)]);
    }
}
