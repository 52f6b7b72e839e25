//! `tmctl task follow`: stays with one task until it ends.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use tm_api::task::TaskView;
use tokio::time::Instant;

use crate::{
    client::Client,
    cmds::{
        ordered::READING,
        progress::{self, Progress},
        quote, receipt,
        task::{TASKS, is_treatment},
        treatment,
        wait::{self, Patience, SHORTEST},
    },
    failure::{Exit, Failure},
    output::{Column, Format, Output, say, table, width},
};

/// Between two questions, after a while.
const LONGEST: Duration = Duration::from_secs(1);

pub(super) async fn run(
    id: &str,
    timeout: Option<Duration>,
    client: &Client,
    out: &Output,
) -> Result<Exit, Failure> {
    let patience = timeout.map_or_else(Patience::endless, |timeout| Patience::new(Instant::now() + timeout));
    let first: TaskView = client.get(&["tasks", id], &()).await?;
    let begun = first.clone();
    wait::unless_interrupted(follow(first, &patience, client, out), || wait::goes_on(&[begun])).await
}

async fn follow(
    first: TaskView,
    patience: &Patience,
    client: &Client,
    out: &Output,
) -> Result<Exit, Failure> {
    let mut teller = Teller::new(out);
    let mut task = first;
    let mut pause = SHORTEST;
    loop {
        let is_news = teller.tell(&task)?;
        // Nobody reads any more, and nobody is told of the outcome.
        if out.is_closed() || task.state.is_final() || patience.is_over() {
            break;
        }
        pause = if is_news { SHORTEST } else { LONGEST.min(pause * 2) };
        patience.pause(pause).await;
        task = patience.ask(async || Ok(client.get(&["tasks", &task.id], &()).await?)).await?;
    }
    drop(teller);
    patience.extend(READING);
    end(&task, patience, client, out).await
}

/// What came of it, and the exit code.
async fn end(task: &TaskView, patience: &Patience, client: &Client, out: &Output) -> Result<Exit, Failure> {
    if is_treatment(task) {
        match out.format() {
            Format::Table => {
                let treated = treatment::with_items(client, vec![task.clone()], patience).await?;
                for one in &treated {
                    let items = match one.items.as_slice() {
                        [] => String::new(),
                        items => table(items, &treatment::ITEMS, width(&io::stdout())) + "\n",
                    };
                    out.text(&(items + &treatment::text(&one.task, &one.items)))?;
                }
            }
            Format::Json | Format::Csv => {}
        }
        return Ok(treatment::outcome([task]).exit());
    }
    match out.format() {
        Format::Table => out.text(&receipt::text(task))?,
        Format::Json | Format::Csv => {}
    }
    if quote::is_one(task) {
        return Ok(quote::exit(task));
    }
    if receipt::detections_of(task).is_some_and(|count| count > 0) {
        say(&tm_protocol::text::escape_for_display(&format!(
            "hint: to see what was detected: tmctl task detections {}; to remove it: {}",
            task.id,
            receipt::cleanup_command(&[task])
        )));
        say("\n");
    }
    Ok(receipt::outcome_of(task).exit())
}

/// Tells of changes, each once.
struct Teller<'a> {
    out: &'a Output,
    /// Where a person looks on; only for the table.
    line: Option<Progress>,
    told: Option<String>,
}

const ROWS: &[Column<TaskView>] = &TASKS;

impl<'a> Teller<'a> {
    fn new(out: &'a Output) -> Self {
        let is_live = match out.format() {
            Format::Table => io::stdout().is_terminal() && io::stderr().is_terminal(),
            Format::Json | Format::Csv => false,
        };
        Self { out, line: is_live.then(Progress::start), told: None }
    }

    /// Whether there was something to tell.
    fn tell(&mut self, task: &TaskView) -> Result<bool, Failure> {
        let text = progress::line(std::slice::from_ref(task));
        let is_first = self.told.is_none();
        let is_news = self.told.as_ref() != Some(&text);
        if let Some(line) = &mut self.line {
            line.show(std::slice::from_ref(task), Instant::now());
        } else if is_news {
            match self.out.format() {
                Format::Table => self.out.line(&text)?,
                Format::Json => self.out.json_line(task)?,
                Format::Csv if is_first => self.out.csv(std::slice::from_ref(task), ROWS)?,
                Format::Csv => self.out.csv_more(std::slice::from_ref(task), ROWS)?,
            }
        }
        self.told = Some(text);
        Ok(is_news)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::{Value, json};
    use tm_api::task::{ProgressView, ScanResult, TaskResult};
    use tm_protocol::{report::Verdict, task::TaskState};

    use super::*;
    use crate::{cmds::samples, testing::Scripted};

    /// A scan that goes through all its states and detects something; each is seen twice.
    async fn manager() -> Scripted {
        let rounds = AtomicUsize::new(0);
        Scripted::start(move |asked| {
            assert_eq!(asked.line, "GET /v1/tasks/t");
            let mut task = samples::task("scan", TaskState::Queued);
            match rounds.fetch_add(1, Ordering::Relaxed) / 2 {
                0 => {}
                1 => {
                    task.state = TaskState::Running;
                    task.progress = Some(ProgressView { files: 7, ..ProgressView::default() });
                }
                _ => {
                    task.state = TaskState::Done;
                    task.result = Some(TaskResult::Scan(ScanResult {
                        verdict: Verdict::Detected,
                        files: 9,
                        known: 0,
                        bytes: 1024,
                        detections: 1,
                        skipped: std::collections::BTreeMap::new(),
                        skipped_paths: Vec::new(),
                        elapsed_s: 1.0,
                        cpu_s: 1.0,
                        receipt: None,
                    }));
                }
            }
            Some((200, json!(task)))
        })
        .await
    }

    #[tokio::test]
    async fn every_change_is_told_once_and_the_exit_code_is_the_outcome() {
        let (manager, out) = (manager().await, Output::kept(Format::Table));
        let exit = run("t", None, &manager.client, &out).await.unwrap();
        assert_eq!(exit, Exit::Detected);
        assert_eq!(
            out.text_kept(),
            "waiting for the endpoint\nrunning, 7 files, 0 B, 0 detections\n\
             done, 9 files, 1.0 KiB, 1 detection\n\
             web (e): detected: 1 detection, 9 files, 1.0 KiB, 1.0 s, 1.0 s of CPU\n"
        );
    }

    #[tokio::test]
    async fn json_is_a_line_for_each_change() {
        let (manager, out) = (manager().await, Output::kept(Format::Json));
        run("t", None, &manager.client, &out).await.unwrap();
        let states: Vec<String> = out
            .text_kept()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["state"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(states, ["queued", "running", "done"]);
    }

    #[tokio::test]
    async fn time_that_is_over_ends_it() {
        let manager = Scripted::start(|_| Some((200, json!(samples::task("scan", TaskState::Queued))))).await;
        let out = Output::kept(Format::Csv);
        let exit = run("t", Some(Duration::from_millis(300)), &manager.client, &out).await.unwrap();
        assert_eq!(exit, Exit::TimedOut);
        assert_eq!(out.text_kept().lines().count(), 2);
    }
}
