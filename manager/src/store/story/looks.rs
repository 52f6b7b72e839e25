//! What was looked at: which scans cover a path, and what is made of receipts that are not the endpoint's.

use tm_protocol::{
    receipt::Receipt,
    report::{SkipReason, Verdict},
    task::ScanSpec,
};

use super::*;
use crate::store::coverage::CoverageRow;

impl Lab {
    /// A scan of these paths that came to this; when it began, in milliseconds.
    async fn look(&self, paths: &[&str], outcome: Outcome, now_ms: i64) -> TaskId {
        let TaskSpec::Scan(spec) = scan_spec() else { panic!("a scan") };
        let paths = paths.iter().map(|path| PathBytes(path.as_bytes().to_vec())).collect();
        let spec = TaskSpec::Scan(ScanSpec { paths, ..spec });
        let order =
            Order { spec: &spec, issuer: "root", reason: "", expires_in_ms: HOUR_MS, deadline_ms: HOUR_MS };
        let task = TaskId::new(Uuid::now_v7());
        let recipient =
            Recipient { task, endpoint: self.endpoint, host: "web-07".to_owned(), is_unsupported: false };
        self.store.create_tasks(&order, vec![recipient], now_ms).await.unwrap();
        self.begin(task, now_ms).await;
        self.end(task, outcome, now_ms + 1).await;
        task
    }

    async fn standing_of(&self, path: &str) -> CoverageRow {
        let rows = self.store.coverage(&Filter::default(), Some(&[self.endpoint]), path.as_bytes()).await;
        let mut rows = rows.unwrap();
        assert_eq!(rows.len(), 1);
        rows.remove(0)
    }
}

fn clean() -> Coverage {
    Coverage { files: 9, ..Coverage::default() }
}

/// The task of the newest whole look, of the newest of any kind, and the latter's verdict.
fn looks(row: &CoverageRow) -> (Option<String>, Option<String>, Option<Verdict>) {
    let task =
        |look: &Option<_>| look.as_ref().map(|look: &crate::store::coverage::LookRow| look.task.clone());
    (task(&row.whole), task(&row.last), row.last.as_ref().and_then(|look| look.verdict))
}

#[tokio::test]
async fn a_path_is_covered_by_whole_scans_of_it_or_above_and_the_newest_counts() {
    let lab = Lab::start().await;
    put(&lab.store, 2, "other", &[], true).await;
    assert_eq!(looks(&lab.standing_of("/srv").await), (None, None, None));
    let first = lab.look(&["/srv//", "/./home"], Outcome::Scanned(clean()), 100).await.to_string();
    for path in ["/srv", "/srv/a/b", "/home"] {
        let row = lab.standing_of(path).await;
        assert_eq!(looks(&row), (Some(first.clone()), Some(first.clone()), Some(Verdict::Clean)), "{path}");
        let look = row.whole.unwrap();
        assert_eq!((look.looked_ms, look.verified, &*look.patterns), (100, false, &["p".to_owned()][..]));
    }
    for path in ["/", "/srvx", "/sr"] {
        assert_eq!(looks(&lab.standing_of(path).await), (None, None, None), "{path}");
    }
    // A gap covers nothing and takes nothing away; what is skipped on purpose is no gap.
    let mut gap = clean();
    gap.skipped.insert(SkipReason::Limit, 2);
    let second = lab.look(&["/srv"], Outcome::Scanned(gap), 200).await.to_string();
    let row = lab.standing_of("/srv/a").await;
    assert_eq!(looks(&row), (Some(first.clone()), Some(second), Some(Verdict::Incomplete)));
    assert_eq!(row.last.unwrap().skipped.values().sum::<u64>(), 2);
    let mut on_purpose = clean();
    on_purpose.skipped.insert(SkipReason::Symlink, 2);
    assert!(!SkipReason::Symlink.leaves_a_gap() && SkipReason::Limit.leaves_a_gap());
    let third = lab.look(&["/"], Outcome::Scanned(on_purpose), 300).await.to_string();
    for path in ["/", "/srv/a", "/elsewhere"] {
        assert_eq!(looks(&lab.standing_of(path).await).0, Some(third.clone()), "{path}");
    }
    // A list of all has everybody, by name.
    let rows = lab.store.coverage(&Filter::default(), None, b"/srv").await.unwrap();
    let hosts: Vec<(&str, bool)> = rows.iter().map(|row| (row.host.as_str(), row.whole.is_some())).collect();
    assert_eq!(hosts, [("other", false), ("web-07", true)]);
}

#[tokio::test]
async fn a_scan_that_was_cut_short_tells_what_it_saw_and_covers_nothing() {
    let lab = Lab::start().await;
    let found = Coverage { detections: 1, ..clean() };
    for (outcome, state, code, verdict) in [
        (
            Outcome::ScannedUntilDeadline(clean()),
            TaskState::Failed,
            Some("deadline"),
            Some(Verdict::Incomplete),
        ),
        (Outcome::ScannedUntilDeadline(found), TaskState::Failed, Some("deadline"), Some(Verdict::Detected)),
        (Outcome::Cancelled(Some(clean())), TaskState::Cancelled, None, Some(Verdict::Incomplete)),
        (Outcome::Failed(Failure::new("worker-failed", "x")), TaskState::Failed, Some("worker-failed"), None),
    ] {
        let told = format!("{outcome:?}");
        let task = lab.look(&["/srv"], outcome, 100).await;
        let row = lab.task(task).await;
        assert_eq!((row.state, row.code.as_deref()), (state, code), "{told}");
        assert_eq!(
            matches!(&row.result, Some(ResultRow::Scan(scan)) if scan.files == 9),
            verdict.is_some(),
            "{told}"
        );
        assert_eq!(looks(&lab.standing_of("/srv").await), (None, Some(task.to_string()), verdict), "{told}");
    }
    // The sums of another kind of order are not a scan's.
    lab.scan(&[find("/a", "evil")], 100).await;
    let task = lab.clean(vec![], |_| Outcome::ScannedUntilDeadline(clean())).await;
    assert_eq!(lab.task(task).await.code.as_deref(), Some("wrong-outcome"));
}

#[tokio::test]
async fn a_receipt_with_a_wrong_signature_is_kept_marked_and_an_event() {
    let lab = Lab::start().await;
    let refusals = async || {
        let events = lab.store.events(&EventFilter::default(), false, 1000).await.unwrap();
        events.into_iter().filter(|event| event.detail == "receipt-refused").collect::<Vec<_>>()
    };
    // Without a signature it is only unsigned.
    lab.look(&["/srv"], Outcome::Scanned(clean()), 100).await;
    assert_eq!(refusals().await.len(), 0);
    for (n, signature) in [vec![], vec![7; 64], vec![7; 100_000]].into_iter().enumerate() {
        let receipt = Receipt { started_ms: 1, ended_ms: 2, whole: true, signature };
        let coverage = Coverage { receipt: Some(receipt), ..clean() };
        let task = lab.look(&["/srv"], Outcome::Scanned(coverage), 200).await;
        let row = lab.task(task).await;
        let Some(ResultRow::Scan(scan)) = &row.result else { panic!("it is kept: {row:?}") };
        let receipt = scan.receipt.as_ref().unwrap();
        assert_eq!((receipt.verified, receipt.problem.as_deref()), (false, Some("bad-signature")));
        let look = lab.standing_of("/srv").await.whole.unwrap();
        // What it says of its time is nobody's word.
        assert_eq!((look.task, look.verified, look.looked_ms), (task.to_string(), false, 200));
        let events = refusals().await;
        assert_eq!(events.len(), n + 1);
        assert!(events.iter().any(|event| event.task == Some(task.to_string())), "{events:?}");
        assert!(events.iter().all(|event| event.status == EventStatus::Unsuccessful), "{events:?}");
    }
}
