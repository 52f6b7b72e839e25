//! Waits for tasks to end, also across a restart of the manager.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use tm_api::task::TaskView;
use tokio::time::{Instant, sleep_until};

use crate::{
    client::{Client, ClientError},
    cmds::receipt,
    failure::Failure,
    output::{self, bytes, say},
};

const SHORTEST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(1);

/// How long questions are asked again while the manager is out of reach.
pub(super) struct Patience {
    until: Instant,
    said: bool,
}

impl Patience {
    pub(super) const fn new(until: Instant) -> Self {
        Self { until, said: false }
    }

    /// Goes on until `until`, if that is later.
    pub(super) fn extend(&mut self, until: Instant) {
        self.until = self.until.max(until);
    }

    fn is_over(&self, now: Instant) -> bool {
        self.until <= now
    }

    /// Asks, and asks again while only the way to the manager is in question.
    ///
    /// # Errors
    /// If the manager refuses, or time is over.
    pub(super) async fn ask<T>(
        &mut self,
        question: impl AsyncFn() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        loop {
            match question().await {
                Err(Failure::Client(error)) if error.may_pass() && !self.is_over(Instant::now()) => {
                    self.say_once(&error);
                    sleep_until(self.until.min(Instant::now() + LONGEST)).await;
                }
                answer => return answer,
            }
        }
    }

    fn say_once(&mut self, error: &ClientError) {
        if !self.said {
            say(&tm_protocol::text::escape_for_display(&format!("{error}; the scan goes on, trying again")));
            say("\n");
            self.said = true;
        }
    }
}

/// Asks for every task until it has ended, or time is over: then some of the tasks have not.
///
/// # Errors
/// If the manager refuses, or is out of reach when time is over.
pub(super) async fn until_ended(
    client: &Client,
    mut tasks: Vec<TaskView>,
    patience: &mut Patience,
) -> Result<Vec<TaskView>, Failure> {
    let mut progress = Progress::start();
    let mut pause = SHORTEST;
    loop {
        for task in tasks.iter_mut().filter(|task| !task.state.is_final()) {
            *task = patience.ask(async || Ok(client.get(&["tasks", &task.id], &()).await?)).await?;
            if patience.is_over(Instant::now()) {
                break;
            }
        }
        let now = Instant::now();
        if tasks.iter().all(|task| task.state.is_final()) || patience.is_over(now) {
            progress.clear();
            return Ok(tasks);
        }
        progress.show(&tasks, now);
        sleep_until(patience.until.min(now + pause)).await;
        pause = LONGEST.min(pause * 2);
    }
}

/// One line on a terminal that is written over at most once a second; nothing anywhere else.
struct Progress {
    is_on: bool,
    shown: Option<Instant>,
}

impl Progress {
    fn start() -> Self {
        Self { is_on: output::can_show_progress(), shown: None }
    }

    fn show(&mut self, tasks: &[TaskView], now: Instant) {
        if !self.is_on || self.shown.is_some_and(|shown| now < shown + LONGEST) {
            return;
        }
        self.shown = Some(now);
        let width = usize::from(output::width(&io::stderr()).unwrap_or(80)).saturating_sub(1);
        let line: String = line(tasks).chars().take(width).collect();
        say(&format!("\r\u{1b}[K{line}"));
        let _ = io::stderr().flush();
    }

    fn clear(&mut self) {
        if self.shown.take().is_some() {
            say("\r\u{1b}[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Numbers only: nothing in it comes from an endpoint.
fn line(tasks: &[TaskView]) -> String {
    let ended = tasks.iter().filter(|task| task.state.is_final()).count();
    let (mut files, mut size) = (0_u64, 0_u64);
    for task in tasks {
        let (f, b) = match (task.scan(), &task.progress) {
            (Some(result), _) => (result.files, result.bytes),
            (None, Some(progress)) => (progress.files, progress.bytes),
            (None, None) => (0, 0),
        };
        (files, size) = (files.saturating_add(f), size.saturating_add(b));
    }
    let found: u64 = tasks.iter().filter_map(receipt::detections_of).fold(0, u64::saturating_add);
    format!("{ended} of {} ended, {files} files, {}, {found} detections", tasks.len(), bytes(size))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use reqwest::Url;

    use super::*;

    fn away() -> Failure {
        ClientError::TimedOut { url: Box::new(Url::parse("https://m").unwrap()), limit: LONGEST }.into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_of_the_manager_is_waited_out_and_a_refusal_is_not() {
        let asked = Cell::new(0);
        let mut patience = Patience::new(Instant::now() + Duration::from_secs(60));
        let answer = patience
            .ask(async || {
                asked.set(asked.get() + 1);
                if asked.get() < 5 { Err(away()) } else { Ok(asked.get()) }
            })
            .await;
        assert_eq!(answer.unwrap(), 5);
        assert!(patience.said);

        let refused = patience.ask(async || Err::<(), _>(Failure::Usage("no".into()))).await;
        assert!(matches!(refused, Err(Failure::Usage(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_in_time() {
        let start = Instant::now();
        let mut patience = Patience::new(start + Duration::from_millis(3500));
        let answer = patience.ask(async || Err::<(), _>(away())).await;
        assert_eq!(answer.unwrap_err().exit().code(), 4);
        assert_eq!(start.elapsed(), Duration::from_millis(3500));
    }
}
