//! Versions of patterns on their way to endpoints: what there is, whom each reaches, and how a person moves it.
//! What stops one by itself is `brake`.
//!
//! **Invariant:** which version of a name an endpoint gets is the newest listed one that reaches it. Nothing here makes
//! a version listed: the choice is among those that desks signed.
//! **Invariant:** of one digest at most one rollout is not withdrawn.
//! **Invariant:** whoever moves a rollout holds [`hold`] until he commits.

use std::collections::{HashMap, HashSet};

use serde_json::json;
use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_api::rollout::{RolloutState, Share, StartRollout, Waves};
use tm_protocol::ids::{EndpointId, Sha256};
use uuid::Uuid;

use super::{
    Store, StoreError, Tx,
    audit::{self, Entry},
    patterns::PatternRow,
};

const SELECT: &str = "SELECT id, name, sha256, previous_sha256, group_name, waves, wave, state, brake_share,
        is_brake_off, every_ms, next_ms, started_by, started_ms, changed_ms, stopped_code, stopped_reason
    FROM rollout";

/// A rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RolloutRow {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) sha256: Sha256,
    pub(crate) previous: Option<String>,
    pub(crate) group: Option<String>,
    pub(crate) waves: Waves,
    /// From 1.
    pub(crate) wave: u32,
    pub(crate) state: RolloutState,
    pub(crate) brake_share: Share,
    pub(crate) is_brake_off: bool,
    pub(crate) every_ms: Option<i64>,
    pub(crate) next_ms: Option<i64>,
    pub(crate) started_by: String,
    pub(crate) started_ms: i64,
    pub(crate) changed_ms: i64,
    pub(crate) stopped_code: Option<String>,
    pub(crate) stopped_reason: Option<String>,
}

/// How many endpoints have to do with a rollout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RolloutCounts {
    pub(crate) looked: u64,
    pub(crate) hits: u64,
}

/// What a person wants of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move<'a> {
    /// On to the next wave; from the last one to its end.
    Advance,
    /// Nobody gets it any more.
    Stop { reason: &'a str },
    /// On with a stopped one, where it was.
    Resume { force: bool },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Moved {
    Done(Box<RolloutRow>),
    Unknown,
    /// Its state does not allow it.
    Not(RolloutState),
    /// Its brake stopped it, for this reason, and nobody said that this is not to count.
    Braked(String),
}

impl RolloutRow {
    /// The share of its endpoints that has the version.
    pub(crate) fn reach(&self) -> Option<Share> {
        match self.state {
            RolloutState::Running | RolloutState::Complete => self.share(),
            RolloutState::Stopped | RolloutState::Withdrawn => None,
        }
    }

    fn share(&self) -> Option<Share> {
        let index = usize::try_from(self.wave).unwrap_or(usize::MAX).checked_sub(1)?;
        self.waves.shares().get(index).copied()
    }

    /// Whether there is no wave after the one that it has come to.
    pub(crate) fn is_last(&self) -> bool {
        usize::try_from(self.wave).is_ok_and(|wave| wave >= self.waves.shares().len())
    }

    /// Whether every endpoint has the version.
    pub(crate) fn reaches_all(&self) -> bool {
        self.group.is_none() && self.reach() == Some(Share::ALL)
    }

    /// Whether this endpoint, of this group, has the version.
    pub(crate) fn reaches(&self, endpoint: EndpointId, group: &str) -> bool {
        self.reach().is_some_and(|share| bucket(self.id, endpoint) < share.hundredths())
            && self.group.as_deref().is_none_or(|own| own == group)
    }

    /// Whether anything would stop it still.
    pub(crate) fn is_watched(&self) -> bool {
        self.state == RolloutState::Running && !self.is_brake_off
    }
}

/// Where an endpoint stands in a rollout, from 0 to 9999: the same whoever asks, and other for each rollout, so that
/// it is not always the same endpoints that go first.
fn bucket(rollout: Uuid, endpoint: EndpointId) -> u16 {
    let text = [rollout.into_bytes(), endpoint.uuid().into_bytes()].concat();
    let digest = Sha256::of(&text);
    let number =
        digest.as_bytes().iter().take(8).fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
    u16::try_from(number % u64::from(Share::PARTS)).unwrap_or(0)
}

/// Every listed version, newest first, with the rollout that says whom it reaches.
#[derive(Debug, Default)]
pub(crate) struct Versions(Vec<(PatternRow, Option<RolloutRow>)>);

impl Versions {
    fn reaches((_, rollout): &(PatternRow, Option<RolloutRow>), endpoint: EndpointId, group: &str) -> bool {
        rollout.as_ref().is_none_or(|rollout| rollout.reaches(endpoint, group))
    }

    /// Of each name the version that this endpoint, of this group, gets; oldest first.
    pub(crate) fn of(&self, endpoint: EndpointId, group: &str) -> Vec<&PatternRow> {
        let mut names = HashSet::new();
        let reaching = self.0.iter().filter(|version| Self::reaches(version, endpoint, group));
        let newest = reaching.filter(|(row, _)| names.insert(row.reference.name.as_str()));
        let mut chosen: Vec<&PatternRow> = newest.map(|(row, _)| row).collect();
        chosen.reverse();
        chosen
    }

    /// Of one name.
    pub(crate) fn named(&self, name: &str, endpoint: EndpointId, group: &str) -> Option<&PatternRow> {
        let mut of_name = self.0.iter().filter(|(row, _)| row.reference.name == name);
        of_name.find(|version| Self::reaches(version, endpoint, group)).map(|(row, _)| row)
    }

    /// Whether this very version reaches an endpoint, whatever newer ones do.
    pub(crate) fn has(&self, sha256: Sha256, endpoint: EndpointId, group: &str) -> bool {
        let found = self.0.iter().find(|(row, _)| row.reference.sha256 == sha256);
        found.is_some_and(|version| Self::reaches(version, endpoint, group))
    }

    /// Whether every endpoint gets the same.
    pub(crate) fn are_for_all(&self) -> bool {
        self.0.iter().all(|(_, rollout)| rollout.is_none())
    }

    /// Who gets a version where its name is meant: `all`, `none`, or a share.
    pub(crate) fn reach(&self, sha256: Sha256) -> String {
        let none = || "none".to_owned();
        let Some((row, rollout)) = self.0.iter().find(|(row, _)| row.reference.sha256 == sha256) else {
            return none();
        };
        let newer = self.0.iter().take_while(|(other, _)| other.reference.sha256 != sha256);
        let mut newer = newer.filter(|(other, _)| other.reference.name == row.reference.name);
        if newer.any(|(_, rollout)| rollout.as_ref().is_none_or(RolloutRow::reaches_all)) {
            return none();
        }
        match rollout {
            None => "all".to_owned(),
            Some(rollout) => match (rollout.reach(), &rollout.group) {
                (None, _) => none(),
                (Some(Share::ALL), None) => "all".to_owned(),
                (Some(share), None) => share.to_string(),
                (Some(share), Some(group)) => format!("{share} of {group}"),
            },
        }
    }
}

impl Store {
    /// Every listed version and whom it reaches.
    ///
    /// # Errors
    /// If the database cannot be read or holds a rollout that is not one.
    pub(crate) async fn versions(&self) -> Result<Versions, StoreError> {
        let mut rows = self.patterns().await?;
        rows.retain(|row| row.published_ms.is_some());
        rows.reverse();
        let mut rollouts: HashMap<Sha256, RolloutRow> = HashMap::new();
        let sql = format!("{SELECT} WHERE state <> 'withdrawn'");
        let found = sqlx::query(AssertSqlSafe(sql)).fetch_all(self.reader()).await;
        for row in found.map_err(StoreError::query("read the rollouts"))? {
            let rollout = rollout(&row)?;
            rollouts.insert(rollout.sha256, rollout);
        }
        Ok(Versions(
            rows.into_iter()
                .map(|row| {
                    let rollout = rollouts.remove(&row.reference.sha256);
                    (row, rollout)
                })
                .collect(),
        ))
    }

    /// Every rollout, newest first, at most `limit`.
    ///
    /// # Errors
    /// As [`Store::versions`].
    pub(crate) async fn rollouts(&self, limit: u32) -> Result<Vec<RolloutRow>, StoreError> {
        let sql = format!("{SELECT} ORDER BY started_ms DESC, id DESC LIMIT {limit}");
        sqlx::query(AssertSqlSafe(sql))
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list the rollouts"))?
            .iter()
            .map(rollout)
            .collect()
    }

    /// The rollout that `text` means: its id, or the pattern's name for the newest of that name.
    ///
    /// # Errors
    /// As [`Store::versions`].
    pub(crate) async fn rollout(&self, text: &str) -> Result<Option<RolloutRow>, StoreError> {
        let sql = format!("{SELECT} WHERE id = $1 OR name = $1 ORDER BY started_ms DESC, id DESC LIMIT 1");
        sqlx::query(AssertSqlSafe(sql))
            .bind(text.to_owned())
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("read a rollout"))?
            .as_ref()
            .map(rollout)
            .transpose()
    }

    /// How many endpoints have looked with a rollout's version, and found something.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn rollout_counts(&self, id: Uuid) -> Result<RolloutCounts, StoreError> {
        let row = sqlx::query(
            "SELECT COUNT(*), CAST(COALESCE(SUM(is_hit), 0) AS BIGINT) FROM rollout_endpoint WHERE rollout_id = $1",
        )
        .bind(id.to_string())
        .fetch_one(self.reader())
        .await
        .map_err(StoreError::query("count a rollout's endpoints"))?;
        let count = |column| u64::try_from(row.get::<i64, _>(column)).unwrap_or(0);
        Ok(RolloutCounts { looked: count(0), hits: count(1) })
    }

    /// Moves a rollout as a person wants it, with a record in the audit log; `id` is as [`Store::rollout`] gave it.
    ///
    /// # Errors
    /// If the database refuses; nothing is then moved.
    pub(crate) async fn move_rollout(
        &self,
        id: Uuid,
        wish: Move<'_>,
        actor: &str,
        now_ms: i64,
    ) -> Result<Moved, StoreError> {
        let mut tx = self.begin_audited().await?;
        hold(&mut tx).await?;
        let Some(mut row) = read(&mut tx, id).await? else { return Ok(Moved::Unknown) };
        let before = (row.state, row.wave);
        let action = match wish {
            Move::Advance if row.state != RolloutState::Running => return Ok(Moved::Not(row.state)),
            Move::Advance => {
                step(&mut row, now_ms);
                "rollout.advance"
            }
            Move::Stop { reason } => {
                match row.state {
                    RolloutState::Running | RolloutState::Complete => {}
                    RolloutState::Stopped | RolloutState::Withdrawn => return Ok(Moved::Not(row.state)),
                }
                row.state = RolloutState::Stopped;
                row.next_ms = None;
                row.stopped_code = Some(BY_HAND.to_owned());
                row.stopped_reason =
                    Some(if reason.is_empty() { "stopped by hand" } else { reason }.to_owned());
                "rollout.stop"
            }
            Move::Resume { force } => {
                if row.state != RolloutState::Stopped {
                    return Ok(Moved::Not(row.state));
                }
                if row.stopped_code.as_deref() != Some(BY_HAND) {
                    if !force {
                        return Ok(Moved::Braked(row.stopped_reason.unwrap_or_default()));
                    }
                    row.is_brake_off = true;
                }
                row.state = RolloutState::Running;
                row.next_ms = row.every_ms.map(|every| now_ms.saturating_add(every));
                (row.stopped_code, row.stopped_reason) = (None, None);
                "rollout.resume"
            }
        };
        row.changed_ms = now_ms;
        write(&mut tx, &row).await?;
        let mut detail = json!({
            "name": row.name,
            "sha256": row.sha256.to_string(),
            "from": { "state": before.0.word(), "wave": before.1 },
            "to": { "state": row.state.word(), "wave": row.wave, "reach": row.reach().map(|s| s.to_string()) },
        });
        match wish {
            Move::Advance => {}
            Move::Stop { reason } => detail["reason"] = json!(reason),
            Move::Resume { force } => detail["force"] = json!(force),
        }
        let subject = row.id.to_string();
        audit::append(&mut tx, Entry { actor, action, subject: &subject, detail, at_ms: now_ms }).await?;
        Self::commit(tx).await?;
        Ok(Moved::Done(Box::new(row)))
    }

    /// Begins the next wave of what is due for it by itself: while its brake is quiet, and only once somebody has
    /// looked with the version. How many began one.
    ///
    /// # Errors
    /// If the database refuses; what began before that has begun.
    pub(crate) async fn advance_rollouts(&self, now_ms: i64) -> Result<usize, StoreError> {
        const DUE: &str = "state = 'running' AND next_ms <= $1
             AND EXISTS (SELECT 1 FROM rollout_endpoint WHERE rollout_id = rollout.id)";
        let due = sqlx::query(AssertSqlSafe(format!("SELECT id FROM rollout WHERE {DUE}")))
            .bind(now_ms)
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("find rollouts that are due"))?;
        if due.is_empty() {
            return Ok(0);
        }
        let mut tx = self.begin_audited().await?;
        hold(&mut tx).await?;
        // As they are now that nobody else can move one.
        let sql = format!("{SELECT} WHERE {DUE} ORDER BY id");
        let rows = sqlx::query(AssertSqlSafe(sql)).bind(now_ms).fetch_all(&mut *tx).await;
        let rows = rows.map_err(StoreError::query("find rollouts that are due"))?;
        for row in &rows {
            let mut row = rollout(row)?;
            let from = row.wave;
            step(&mut row, now_ms);
            row.changed_ms = now_ms;
            write(&mut tx, &row).await?;
            let subject = row.id.to_string();
            let detail = json!({
                "name": row.name,
                "sha256": row.sha256.to_string(),
                "from": { "state": RolloutState::Running.word(), "wave": from },
                "to": { "state": row.state.word(), "wave": row.wave, "reach": row.reach().map(|s| s.to_string()) },
            });
            // The manager does what whoever published it ordered.
            let entry = Entry {
                actor: "manager",
                action: "rollout.advance",
                subject: &subject,
                detail,
                at_ms: now_ms,
            };
            audit::append(&mut tx, entry).await?;
        }
        Self::commit(tx).await?;
        Ok(rows.len())
    }
}

const BY_HAND: &str = "by-hand";

fn step(row: &mut RolloutRow, now_ms: i64) {
    if row.is_last() {
        row.state = RolloutState::Complete;
        row.next_ms = None;
    } else {
        row.wave += 1;
        row.next_ms = row.every_ms.map(|every| now_ms.saturating_add(every));
    }
}

/// Makes everybody else who counts for a brake or moves a rollout wait for this transaction. Taken after rows of
/// endpoints and the audit log, and before the event log's counter.
///
/// # Errors
/// If the database refuses.
pub(super) async fn hold(tx: &mut Tx) -> Result<(), StoreError> {
    sqlx::query("UPDATE counter SET value = value + 1 WHERE name = 'rollout'")
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("hold the rollouts"))?;
    Ok(())
}

/// Begins a rollout of a version that is being listed.
///
/// # Errors
/// If the database refuses.
pub(super) async fn begin(
    tx: &mut Tx,
    (sha256, name): (Sha256, &str),
    terms: &StartRollout,
    previous: Option<String>,
    actor: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    let row = RolloutRow {
        id: Uuid::now_v7(),
        name: name.to_owned(),
        sha256,
        previous,
        group: terms.group.clone(),
        waves: terms.waves.clone(),
        wave: 1,
        state: RolloutState::Running,
        brake_share: terms.brake_share,
        is_brake_off: false,
        every_ms: terms.every_s.and_then(|s| i64::try_from(s).ok()).map(|s| s.saturating_mul(1000)),
        next_ms: None,
        started_by: actor.to_owned(),
        started_ms: now_ms,
        changed_ms: now_ms,
        stopped_code: None,
        stopped_reason: None,
    };
    let next_ms = row.every_ms.map(|every| now_ms.saturating_add(every));
    sqlx::query(
        "INSERT INTO rollout (id, name, sha256, previous_sha256, group_name, waves, wave, state, brake_share,
            is_brake_off, every_ms, next_ms, started_by, started_ms, changed_ms)
         VALUES ($1, $2, $3, $4, $5, $6, 1, $7, $8, 0, $9, $10, $11, $12, $12)",
    )
    .bind(row.id.to_string())
    .bind(row.name.clone())
    .bind(row.sha256.to_string())
    .bind(row.previous.clone())
    .bind(row.group.clone())
    .bind(serde_json::to_string(&row.waves).expect("shares are texts"))
    .bind(row.state.word())
    .bind(i64::from(row.brake_share.hundredths()))
    .bind(row.every_ms)
    .bind(next_ms)
    .bind(row.started_by.clone())
    .bind(now_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("begin a rollout"))?;
    let subject = row.id.to_string();
    let detail = json!({
        "name": row.name,
        "sha256": row.sha256.to_string(),
        "group": row.group,
        "waves": row.waves.to_string(),
        "brake_share": row.brake_share.to_string(),
        "every_s": terms.every_s,
    });
    audit::append(tx, Entry { actor, action: "rollout.start", subject: &subject, detail, at_ms: now_ms })
        .await
}

/// Ends the rollout of a version that is no longer listed.
///
/// # Errors
/// If the database refuses.
pub(super) async fn withdraw(tx: &mut Tx, sha256: &str, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE rollout SET state = 'withdrawn', next_ms = NULL, changed_ms = $2
         WHERE sha256 = $1 AND state <> 'withdrawn'",
    )
    .bind(sha256.to_owned())
    .bind(now_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("end a rollout"))?;
    Ok(())
}

/// The rollouts that are not withdrawn, by digest.
///
/// # Errors
/// If the database refuses or holds a rollout that is not one.
pub(super) async fn standing(tx: &mut Tx) -> Result<HashMap<Sha256, RolloutRow>, StoreError> {
    let sql = format!("{SELECT} WHERE state <> 'withdrawn'");
    let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut **tx).await;
    let rows = rows.map_err(StoreError::query("read the rollouts"))?;
    rows.iter().map(|row| rollout(row).map(|row| (row.sha256, row))).collect()
}

/// One rollout, within a transaction.
///
/// # Errors
/// As [`standing`].
pub(super) async fn read(tx: &mut Tx, id: Uuid) -> Result<Option<RolloutRow>, StoreError> {
    let sql = format!("{SELECT} WHERE id = $1");
    let row = sqlx::query(AssertSqlSafe(sql)).bind(id.to_string()).fetch_optional(&mut **tx).await;
    row.map_err(StoreError::query("read a rollout"))?.as_ref().map(rollout).transpose()
}

/// Writes what can change of a rollout.
///
/// # Errors
/// If the database refuses.
pub(super) async fn write(tx: &mut Tx, row: &RolloutRow) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE rollout SET wave = $2, state = $3, is_brake_off = $4, next_ms = $5, changed_ms = $6,
            stopped_code = $7, stopped_reason = $8
         WHERE id = $1",
    )
    .bind(row.id.to_string())
    .bind(i64::from(row.wave))
    .bind(row.state.word())
    .bind(i64::from(row.is_brake_off))
    .bind(row.next_ms)
    .bind(row.changed_ms)
    .bind(row.stopped_code.clone())
    .bind(row.stopped_reason.clone())
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("move a rollout"))?;
    Ok(())
}

/// Reads a row of [`SELECT`].
fn rollout(row: &AnyRow) -> Result<RolloutRow, StoreError> {
    let (id, sha256, waves, state): (String, String, String, String) =
        (row.get(0), row.get(2), row.get(5), row.get(7));
    let (wave, share): (i64, i64) = (row.get(6), row.get(8));
    let brake_share = u16::try_from(share).ok().and_then(Share::new);
    Ok(RolloutRow {
        id: id.parse().map_err(|_| StoreError::content("rollout id", id))?,
        name: row.get(1),
        sha256: sha256.parse().map_err(|_| StoreError::content("digest", sha256))?,
        previous: row.get(3),
        group: row.get(4),
        waves: serde_json::from_str(&waves).map_err(|_| StoreError::content("list of waves", waves))?,
        wave: u32::try_from(wave).map_err(|_| StoreError::content("wave", wave.to_string()))?,
        state: RolloutState::from_word(&state).ok_or_else(|| StoreError::content("rollout state", state))?,
        brake_share: brake_share.ok_or_else(|| StoreError::content("share", share.to_string()))?,
        is_brake_off: row.get::<i64, _>(9) != 0,
        every_ms: row.get(10),
        next_ms: row.get(11),
        started_by: row.get(12),
        started_ms: row.get(13),
        changed_ms: row.get(14),
        stopped_code: row.get(15),
        stopped_reason: row.get(16),
    })
}
