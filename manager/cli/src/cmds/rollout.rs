//! `tmctl pattern rollout`.

use tm_api::rollout::{ResumeRollout, RolloutState, RolloutView, StopRollout};

use crate::{
    cli::Rollout,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Output, say},
};

const COLUMNS: [Column<RolloutView>; 20] = [
    Column::narrow("name", |r| r.name.clone()),
    Column::narrow("state", |r| r.state.to_string()),
    Column::narrow("group", |r| r.group.clone().unwrap_or_else(|| "all".to_owned())),
    Column::narrow("wave", |r| format!("{} of {}", r.wave, r.waves.shares().len())),
    Column::narrow("reach", |r| r.reach.map_or_else(|| "none".to_owned(), |share| share.to_string())),
    Column::narrow("endpoints", |r| r.endpoints.to_string()),
    Column::narrow("looked", |r| r.looked.to_string()),
    Column::narrow("hits", |r| r.hits.to_string()),
    Column::time("next_at", |r| r.next_at.clone().unwrap_or_default()),
    Column::wide("waves", |r| r.waves.to_string()),
    Column::wide("brake_share", |r| r.brake_share.to_string()),
    Column::wide("brake", |r| if r.brake { "on" } else { "off" }.to_owned()),
    Column::wide("every_s", |r| r.every_s.map(|s| s.to_string()).unwrap_or_default()),
    Column::wide("code", |r| r.code.clone().unwrap_or_default()),
    Column::wide("reason", |r| r.reason.clone().unwrap_or_default()),
    Column::wide("sha256", |r| r.sha256.clone()),
    Column::wide("previous", |r| r.previous.clone().unwrap_or_default()),
    Column::wide("started_by", |r| r.started_by.clone()),
    Column::wide_time("changed_at", |r| r.changed_at.clone()),
    Column::wide("id", |r| r.id.clone()),
];

pub(super) async fn run(command: Rollout, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Rollout::List => {
            let rows: Vec<RolloutView> = client.get(&["rollouts"], &()).await?;
            out.list(
                &rows,
                &COLUMNS,
                "no rollouts; begin one: tmctl pattern import FILE --wave 1%,10%,100%",
            )?;
        }
        Rollout::Show { rollout } => {
            let row: RolloutView = client.get(&["rollouts", &rollout], &()).await?;
            out.one(&row, &COLUMNS)?;
        }
        Rollout::Advance { rollout } => {
            let row: RolloutView = client.post(&["rollouts", &rollout, "advance"], &()).await?;
            out.list(std::slice::from_ref(&row), &COLUMNS, "")?;
            say(match row.state {
                RolloutState::Complete => "the rollout has ended; its brake is off\n",
                RolloutState::Running | RolloutState::Stopped | RolloutState::Withdrawn => {
                    "endpoints that it reaches now use the version from their next scan on\n"
                }
            });
        }
        Rollout::Stop { rollout, reason } => {
            let path = &["rollouts", rollout.as_str(), "stop"];
            let row: RolloutView = client.post(path, &StopRollout { reason }).await?;
            out.list(std::slice::from_ref(&row), &COLUMNS, "")?;
            say("nobody is sent the version any more; endpoints go back with their next scan\n");
        }
        Rollout::Resume { rollout, force } => {
            let path = &["rollouts", rollout.as_str(), "resume"];
            let row: RolloutView = client.post(path, &ResumeRollout { force }).await?;
            out.list(std::slice::from_ref(&row), &COLUMNS, "")?;
            say(if row.brake {
                "it goes on where it was\n"
            } else {
                "it goes on where it was, and its brake is off\n"
            });
        }
    }
    Ok(Exit::Done)
}
