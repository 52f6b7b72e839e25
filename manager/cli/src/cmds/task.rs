//! `tmctl task`, and how a task and a detection look as rows.

use tm_api::task::{DetectionView, TaskQuery, TaskView};

use crate::{
    cli::Task,
    client::Client,
    cmds::receipt,
    failure::{Exit, Failure},
    output::{Column, Format, Output},
};

/// How a task looks.
pub(crate) const TASKS: [Column<TaskView>; 16] = [
    Column::narrow("id", |t| t.id.clone()),
    Column::narrow("kind", |t| t.kind.clone()),
    Column::narrow("host", |t| t.host.clone()),
    Column::wide("endpoint", |t| t.endpoint.clone()),
    Column::narrow("state", |t| t.state.to_string()),
    Column::narrow("verdict", |t| t.scan().map(|r| r.verdict.to_string()).unwrap_or_default()),
    Column::narrow("detections", |t| receipt::detections_of(t).map(|n| n.to_string()).unwrap_or_default()),
    Column::wide("files", |t| t.scan().map(|r| r.files.to_string()).unwrap_or_default()),
    Column::narrow("issuer", |t| t.issuer.clone()),
    Column::narrow("created_at", |t| t.created_at.clone()),
    Column::wide("started_at", |t| t.started_at.clone().unwrap_or_default()),
    Column::wide("finished_at", |t| t.finished_at.clone().unwrap_or_default()),
    Column::wide("expires_at", |t| t.expires_at.clone()),
    Column::wide("code", |t| t.code.clone().unwrap_or_default()),
    Column::wide("message", |t| t.message.clone().unwrap_or_default()),
    Column::wide("reason", |t| t.reason.clone()),
];

const DETECTIONS: [Column<DetectionView>; 11] = [
    Column::narrow("path", |d| d.path.clone()),
    Column::narrow("member", |d| receipt::member(&d.member)),
    Column::narrow("rule", |d| d.rule.clone()),
    Column::narrow("pattern", |d| d.pattern.clone()),
    Column::wide("sha256", |d| d.sha256.clone()),
    Column::narrow("size", |d| d.size.to_string()),
    Column::narrow("found_at", |d| d.found_at.clone()),
    Column::wide("endpoint", |d| d.endpoint.clone()),
    Column::wide("task", |d| d.task.clone()),
    Column::wide("path_b64", |d| d.path_b64.clone()),
    Column::wide("pattern_sha256", |d| d.pattern_sha256.clone()),
];

pub(crate) async fn run(command: Task, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Task::List { endpoint, state, limit } => {
            let query = TaskQuery { endpoint, state, limit: Some(limit) };
            let tasks: Vec<TaskView> = client.get(&["tasks"], &query).await?;
            out.list(&tasks, &TASKS, "no tasks")?;
        }
        Task::Show { task } => {
            let task: TaskView = client.get(&["tasks", &task], &()).await?;
            out.one(&task, &TASKS)?;
            match out.format() {
                Format::Table => out.text(&receipt::text(&task))?,
                Format::Json | Format::Csv => {}
            }
        }
        Task::Detections { task } => {
            let found = detections(client, &task).await?;
            out.list(&found, &DETECTIONS, "no detections")?;
        }
    }
    Ok(Exit::Done)
}

/// Every detection of a task.
///
/// # Errors
/// If the manager refuses or cannot be asked.
pub(crate) async fn detections(client: &Client, task: &str) -> Result<Vec<DetectionView>, Failure> {
    let mut found = Vec::new();
    client.pages(&["tasks", task, "detections"], "detections", 0, |page| found.extend(page)).await?;
    Ok(found)
}
