//! Made-up sequences: whatever happens in whatever order, what must hold holds after each step. `TM_LONG=1` runs
//! many more. A failure names its seed.

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;

/// Numbers that must be 0 at all times.
const NEVER: [(&str, &str); 6] = [
    (
        "cleaning, and nobody does",
        "SELECT COUNT(*) FROM incident WHERE state = 'cleaning' AND NOT EXISTS (
            SELECT 1 FROM task_incident JOIN task ON task.id = task_incident.task_id
            WHERE task_incident.incident_id = incident.id AND task.kind = 'cleanup' AND task.dry_run = 0
              AND task.state IN ('queued', 'delivered', 'running'))",
    ),
    (
        "two open incidents for one rule",
        "SELECT COUNT(*) FROM incident a JOIN incident b ON a.endpoint_id = b.endpoint_id AND a.rule = b.rule
            AND a.id < b.id
         WHERE a.state IN ('awaiting-cleanup', 'cleaning', 'unresolved')
           AND b.state IN ('awaiting-cleanup', 'cleaning', 'unresolved')",
    ),
    (
        "resolved with something left",
        "SELECT COUNT(DISTINCT incident.id) FROM incident JOIN detection ON detection.incident_id = incident.id
         WHERE incident.state = 'resolved' AND detection.settled_ms IS NULL",
    ),
    (
        "unresolved without a reason",
        "SELECT COUNT(*) FROM incident WHERE state = 'unresolved' AND detail = ''",
    ),
    ("an event's number left out", "SELECT COALESCE(MAX(id), 0) - COUNT(*) FROM event"),
    (
        "ended without an event",
        "SELECT COUNT(*) FROM task WHERE finished_ms IS NOT NULL AND dry_run = 0 AND NOT EXISTS (
            SELECT 1 FROM event WHERE event.task_id = task.id AND event.status <> 'in-progress')",
    ),
];

async fn run(seed: u64) {
    let lab = Lab::start().await;
    let mut rng = StdRng::seed_from_u64(seed);
    let finds: Vec<Detection> =
        (0..6).map(|n| find(&format!("/{}", n / 2), if n % 2 == 0 { "evil" } else { "other" })).collect();
    let mut tasks: Vec<TaskId> = Vec::new();
    let mut vaulted: u128 = 0;
    let mut trail = Vec::new();
    for now in 1..80_i64 {
        let pick = rng.random_range(0..12);
        let one = |rng: &mut StdRng, tasks: &[TaskId]| {
            if tasks.is_empty() { None } else { Some(tasks[rng.random_range(0..tasks.len())]) }
        };
        let some: Vec<Detection> = finds.iter().filter(|_| rng.random_bool(0.5)).cloned().collect();
        trail.push(pick);
        match pick {
            0 | 1 => {
                tasks.push(lab.scan(&some, now).await);
            }
            2 | 3 => {
                let keys: Vec<String> = some.iter().take(2).map(|find| find.key().to_string()).collect();
                let keys = if rng.random_bool(0.5) { Vec::new() } else { keys };
                let me = [(lab.me().await, rng.random_bool(0.5))];
                if let Ok(rows) = lab.cleanup_of(&me, &keys, rng.random_bool(0.2), now).await {
                    tasks.extend(rows.iter().map(|row| row.id));
                }
            }
            4 if vaulted > 0 => {
                let item = rng.random_range(1..=vaulted);
                if let Ok(rows) = lab.restore(&[item], None).await {
                    tasks.extend(rows.iter().map(|row| row.id));
                }
            }
            5 => {
                let live = lab.live(now).await;
                for due in lab.store.claim(&live, now).await.unwrap() {
                    if rng.random_bool(0.7) {
                        lab.say(ReportBody::Accepted { task: due.task }, now).await;
                    }
                }
            }
            6 => {
                if let Some(task) = one(&mut rng, &tasks) {
                    lab.say(ReportBody::Started { task }, now).await;
                }
            }
            7 | 8 => {
                let Some(task) = one(&mut rng, &tasks) else { continue };
                let items = some
                    .iter()
                    .map(|find| match rng.random_range(0..5) {
                        0 | 1 => {
                            vaulted += 1;
                            item(find, ItemVerdict::Vaulted, Some(vaulted), None)
                        }
                        2 => item(find, ItemVerdict::Gone, None, None),
                        3 => item(find, ItemVerdict::Refused, None, Some("critical-file")),
                        _ if vaulted > 0 => {
                            item(find, ItemVerdict::Restored, Some(rng.random_range(1..=vaulted)), None)
                        }
                        _ => item(find, ItemVerdict::Failed, None, None),
                    })
                    .collect();
                lab.say(ReportBody::Items { task, items }, now).await;
            }
            9 | 10 => {
                let Some(task) = one(&mut rng, &tasks) else { continue };
                let sum = Tally { refused: rng.random_range(0..2), done: 1, ..Tally::default() };
                let outcome = match rng.random_range(0..6) {
                    0 | 1 => Outcome::Treated(sum),
                    2 => Outcome::TreatedUntilCancelled(sum),
                    3 => Outcome::TreatedUntilDeadline(sum),
                    4 => Outcome::Failed(Failure::new("interrupted", "x")),
                    _ => Outcome::Cancelled(None),
                };
                lab.end(task, outcome, now).await;
            }
            _ => {
                if let Some(task) = one(&mut rng, &tasks) {
                    lab.store.cancel_task(task, "root", now).await.unwrap();
                } else {
                    lab.store.expire_tasks(now).await.unwrap();
                }
            }
        }
        for (what, sql) in NEVER {
            assert_eq!(lab.count(sql).await, 0, "{what}: seed {seed}, {trail:?}");
        }
    }
    // In the end nothing is left under way.
    lab.store.expire_tasks(10 * HOUR_MS).await.unwrap();
    for (what, sql) in NEVER {
        assert_eq!(lab.count(sql).await, 0, "{what}: seed {seed}, {trail:?}");
    }
    assert_eq!(lab.count("SELECT COUNT(*) FROM incident WHERE state = 'cleaning'").await, 0, "seed {seed}");
    assert_eq!(lab.live(20 * HOUR_MS).await, [], "seed {seed}");
}

#[tokio::test]
async fn whatever_happens_what_must_hold_holds() {
    let seeds = if std::env::var_os("TM_LONG").is_some() { 0..300 } else { 0..12 };
    for seed in seeds {
        run(seed).await;
    }
}
