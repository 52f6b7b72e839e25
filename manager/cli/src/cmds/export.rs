//! `tmctl export`.

use tm_api::export::ExportView;

use crate::{
    cli::Export,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Output},
};

const COLUMNS: [Column<ExportView>; 11] = [
    Column::narrow("name", |e| e.name.clone()),
    Column::narrow("kind", |e| e.kind.clone()),
    Column::narrow("last_event", |e| e.last_event.map_or_else(String::new, |id| id.to_string())),
    Column::time("last_sent_at", |e| e.last_sent_at.clone().unwrap_or_default()),
    Column::narrow("lag_events", |e| e.lag_events.to_string()),
    Column::narrow("lag", lag),
    Column::narrow("error", |e| e.error.clone().unwrap_or_default()),
    Column::wide_time("failing_since", |e| e.failing_since.clone().unwrap_or_default()),
    Column::wide("receiver", |e| e.receiver.clone()),
    Column::wide("manager", |e| e.manager.clone().unwrap_or_default()),
    Column::wide("done", |e| e.done.to_string()),
];

pub(crate) async fn run(command: Export, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Export::List => {
            let exports: Vec<ExportView> = client.get(&["exports"], &()).await?;
            out.list(&exports, &COLUMNS, "no exporters (`[[export]]` in manager.toml makes one)")?;
        }
    }
    Ok(Exit::Done)
}

/// The age of the oldest event that waits.
fn lag(export: &ExportView) -> String {
    let seconds = export.lag_ms / 1000;
    match seconds {
        0 => "0s".to_owned(),
        1..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        172_800.. => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lag_has_one_unit() {
        let with = |lag_ms| {
            lag(&ExportView {
                name: String::new(),
                kind: String::new(),
                receiver: String::new(),
                manager: None,
                last_event: None,
                last_sent_at: None,
                done: 0,
                lag_events: 0,
                lag_ms,
                failing_since: None,
                error: None,
            })
        };
        let shown = [0, 999, 119_999, 120_000, 7_199_999, 172_799_999, 864_000_000].map(with);
        assert_eq!(shown, ["0s", "0s", "119s", "2m", "119m", "47h", "10d"]);
    }
}
