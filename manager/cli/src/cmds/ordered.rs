//! What happens after work is ordered.

use std::time::Duration;

use serde::Serialize;
use tm_api::task::TaskView;
use tm_protocol::text::escape_for_display;
use tokio::time::Instant;

use crate::{
    cli::Terms,
    client::Client,
    cmds::{
        task::TASKS,
        treatment,
        wait::{self, Patience},
    },
    failure::{Exit, Failure},
    output::{Output, say},
};

/// For reading what came of it, however the waiting ended.
pub(super) const READING: Duration = Duration::from_secs(30);

/// Refuses what the command line alone cannot see.
///
/// # Errors
/// If the terms contradict each other.
pub(super) fn check(terms: &Terms) -> Result<(), Failure> {
    if terms.timeout.is_some() && !terms.waits() {
        return Err(Failure::Usage("--timeout needs --wait or --dry-run".to_owned()));
    }
    Ok(())
}

/// Gives an order, once.
///
/// # Errors
/// If the manager refuses or cannot be asked, or the person does not wait for the answer.
pub(super) async fn send(
    client: &Client,
    path: &[&str],
    body: &impl Serialize,
) -> Result<Vec<TaskView>, Failure> {
    wait::unless_interrupted(async { Ok(client.post(path, body).await?) }, || {
        "it may have been ordered all the same; see: tmctl task list".to_owned()
    })
    .await
}

/// Prints the tasks and how to follow them, or stays until they have ended (until that time at the longest)
/// and prints what came of them.
///
/// # Errors
/// If the manager refuses or cannot be asked, or the person does not wait any longer.
pub(super) async fn finish(
    tasks: Vec<TaskView>,
    until: Option<Instant>,
    client: &Client,
    out: &Output,
) -> Result<Exit, Failure> {
    let Some(until) = until else { return print(&tasks, out) };
    let patience = Patience::new(until);
    let begun = tasks.clone();
    let treated = wait::unless_interrupted(
        async {
            let ended = wait::until_ended(client, tasks, &patience).await?;
            patience.extend(READING);
            treatment::with_items(client, ended, &patience).await
        },
        || wait::goes_on(&begun),
    )
    .await?;
    treatment::print(&treated, out)?;
    Ok(treatment::outcome(treated.iter().map(|one| &one.task)).exit())
}

/// Prints tasks that nobody waits for, and how to follow them.
///
/// # Errors
/// If they cannot be written.
pub(super) fn print(tasks: &[TaskView], out: &Output) -> Result<Exit, Failure> {
    out.list(tasks, &TASKS, "no tasks")?;
    for line in wait::goes_on(tasks).lines() {
        say(&(escape_for_display(line) + "\n"));
    }
    Ok(Exit::Done)
}
