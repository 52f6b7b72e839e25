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
        receipt,
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
