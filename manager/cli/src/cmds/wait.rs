//! Waits for tasks to end, also across a restart of the manager.
//!
//! **Invariant:** a round of questions is bounded, however many tasks are waited for.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tm_api::task::{TaskQuery, TaskView};
use tm_protocol::text::escape_for_display;
use tokio::time::{Instant, sleep_until};

use crate::{
    client::{Client, ClientError},
    cmds::progress::Progress,
    failure::Failure,
    output::say_over,
};

/// Between two rounds of questions, at first.
pub(super) const SHORTEST: Duration = Duration::from_millis(200);
/// The same after a while.
const LONGEST: Duration = Duration::from_secs(2);
/// Between two tries to reach a manager.
const RETRY: Duration = Duration::from_secs(1);
/// Questions that are under way at once.
pub(super) const PARALLEL: usize = 8;
/// Tasks that are asked for by name in one round.
const NAMED: usize = 200;
/// Most rows that a manager gives.
const ROWS: usize = 1000;

/// How long questions are asked again while the manager is out of reach.
pub(super) struct Patience {
    until: Cell<Option<Instant>>,
    said: Cell<bool>,
}

impl Patience {
    pub(super) const fn new(until: Instant) -> Self {
        Self { until: Cell::new(Some(until)), said: Cell::new(false) }
    }

    /// One that does not end.
    pub(super) const fn endless() -> Self {
        Self { until: Cell::new(None), said: Cell::new(false) }
    }

    /// Goes on for at least this long.
    pub(super) fn extend(&self, longer: Duration) {
        self.until.set(self.until.get().map(|until| until.max(Instant::now() + longer)));
    }

    pub(super) fn is_over(&self) -> bool {
        self.until.get().is_some_and(|until| until <= Instant::now())
    }

    /// Sleeps, but not beyond the end.
    pub(super) async fn pause(&self, pause: Duration) {
        let then = Instant::now() + pause;
        sleep_until(self.until.get().map_or(then, |until| until.min(then))).await;
    }

    /// Asks, and asks again while only the way to the manager is in question.
    ///
    /// # Errors
    /// If the manager refuses, or time is over.
    pub(super) async fn ask<T>(&self, question: impl AsyncFn() -> Result<T, Failure>) -> Result<T, Failure> {
        loop {
            match question().await {
                Err(Failure::Client(error)) if error.may_pass() && !self.is_over() => {
                    self.say_once(&error);
                    self.pause(RETRY).await;
                }
                Ok(answer) => {
                    if self.said.replace(false) {
                        say_over("the manager answers again");
                    }
                    return Ok(answer);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn say_once(&self, error: &ClientError) {
        if !self.said.replace(true) {
            say_over(&format!("{}; trying again", escape_for_display(&error.to_string())));
        }
    }
}

/// Does `work` unless the person ends it first; `goes_on` then says what goes on without tmctl.
///
/// # Errors
/// Those of `work`, and [`Failure::Interrupted`].
pub(super) async fn unless_interrupted<T>(
    work: impl Future<Output = Result<T, Failure>>,
    goes_on: impl FnOnce() -> String,
) -> Result<T, Failure> {
    tokio::select! {
        done = work => done,
        // Where no handler can be set, Ctrl-C ends the program as it always did.
        Ok(()) = tokio::signal::ctrl_c() => Err(Failure::Interrupted(goes_on())),
    }
}

/// What to say to a person who does not wait for these tasks any longer, or never did.
pub(super) fn goes_on(tasks: &[TaskView]) -> String {
    /// More ids than fit a screen help nobody.
    const NAMED: usize = 10;
    let open: Vec<&str> =
        tasks.iter().filter(|task| !task.state.is_final()).map(|task| task.id.as_str()).collect();
    match open.as_slice() {
        [] => "every task has ended; see: tmctl task list".to_owned(),
        [one] => format!(
            "the task goes on\n  follow it:   tmctl task follow {one}\n  call it off: tmctl task cancel {one}"
        ),
        some if some.len() <= NAMED => format!(
            "{} tasks go on\n  follow one:    tmctl task follow {}\n  call them off: tmctl task cancel {}",
            some.len(),
            some[0],
            some.join(" ")
        ),
        many => format!(
            "{} tasks go on\n  see them:     tmctl task list\n  follow one:   tmctl task follow {}\n  \
             call one off: tmctl task cancel {}",
            many.len(),
            many[0],
            many[0]
        ),
    }
}

/// Asks for every task until it has ended, or time is over: then some of the tasks have not.
///
/// # Errors
/// If the manager refuses, or is out of reach when time is over.
pub(super) async fn until_ended(
    client: &Client,
    mut tasks: Vec<TaskView>,
    patience: &Patience,
) -> Result<Vec<TaskView>, Failure> {
    let mut progress = Progress::start();
    let mut rounds = Rounds::default();
    let mut pause = SHORTEST;
    loop {
        rounds.ask(client, &mut tasks, patience).await?;
        if tasks.iter().all(|task| task.state.is_final()) || patience.is_over() {
            return Ok(tasks);
        }
        progress.show(&tasks, Instant::now());
        patience.pause(pause).await;
        pause = LONGEST.min(pause * 2);
    }
}

/// Rounds of questions after the same tasks.
#[derive(Debug, Default)]
struct Rounds {
    /// Where among the tasks that the list did not show the next round goes on.
    next: usize,
}

impl Rounds {
    /// One round: a list of the newest tasks tells of most; the others are asked for by name, some each round.
    async fn ask(
        &mut self,
        client: &Client,
        tasks: &mut [TaskView],
        patience: &Patience,
    ) -> Result<(), Failure> {
        let open: BTreeSet<String> =
            tasks.iter().filter(|task| !task.state.is_final()).map(|task| task.id.clone()).collect();
        let mut known: BTreeMap<String, TaskView> = BTreeMap::new();
        if open.len() > 1 {
            // Others order too: twice as many as ours leave room for theirs.
            let limit = u32::try_from((2 * tasks.len()).clamp(50, ROWS)).unwrap_or(u32::MAX);
            let query = TaskQuery { endpoint: None, state: None, limit: Some(limit) };
            let newest: Vec<TaskView> =
                patience.ask(async || Ok(client.get(&["tasks"], &query).await?)).await?;
            known.extend(
                newest.into_iter().filter(|task| open.contains(&task.id)).map(|task| (task.id.clone(), task)),
            );
        }
        let missing: Vec<&String> = open.iter().filter(|id| !known.contains_key(*id)).collect();
        if !missing.is_empty() && !patience.is_over() {
            let start = self.next % missing.len();
            let turn: Vec<&String> =
                missing[start..].iter().chain(&missing[..start]).take(NAMED).copied().collect();
            self.next = start + turn.len();
            let asked: Vec<TaskView> = stream::iter(turn)
                .map(|id| patience.ask(async || Ok(client.get(&["tasks", id], &()).await?)))
                .buffer_unordered(PARALLEL)
                .try_collect()
                .await?;
            known.extend(asked.into_iter().map(|task| (task.id.clone(), task)));
        }
        for task in tasks {
            if let Some(view) = known.remove(&task.id) {
                *task = view;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use reqwest::Url;
    use serde_json::json;
    use tm_protocol::task::TaskState;

    use super::*;
    use crate::{cmds::samples, testing::Scripted};

    fn away() -> Failure {
        let url = Box::new(Url::parse("https://m").unwrap());
        ClientError::TimedOut { url, limit: Duration::from_secs(1) }.into()
    }

    fn task(id: &str, state: TaskState) -> TaskView {
        TaskView { id: id.to_owned(), ..samples::task("scan", state) }
    }

    fn long() -> Patience {
        Patience::new(Instant::now() + Duration::from_secs(10))
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_of_the_manager_is_waited_out_and_a_refusal_is_not() {
        let asked = Cell::new(0);
        let patience = long();
        let answer = patience
            .ask(async || {
                asked.set(asked.get() + 1);
                if asked.get() < 5 { Err(away()) } else { Ok(asked.get()) }
            })
            .await;
        assert_eq!(answer.unwrap(), 5);

        let refused = patience.ask(async || Err::<(), _>(Failure::Usage("no".into()))).await;
        assert!(matches!(refused, Err(Failure::Usage(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_in_time() {
        let start = Instant::now();
        let patience = Patience::new(start + Duration::from_millis(3500));
        let answer = patience.ask(async || Err::<(), _>(away())).await;
        assert_eq!(answer.unwrap_err().exit().code(), 4);
        assert_eq!(start.elapsed(), Duration::from_millis(3500));
    }

    #[tokio::test]
    async fn many_tasks_are_asked_for_with_one_request_a_round() {
        let round = AtomicUsize::new(0);
        let manager = Scripted::start(move |asked| {
            assert_eq!(asked.line, "GET /v1/tasks?limit=80");
            // The manager restarts in the second round.
            let state = match round.fetch_add(1, Ordering::Relaxed) {
                0 => TaskState::Running,
                1 => return None,
                _ => TaskState::Done,
            };
            let tasks: Vec<TaskView> = (0..40).map(|n| task(&format!("t{n}"), state)).collect();
            Some((200, json!(tasks)))
        })
        .await;
        let tasks = (0..40).map(|n| task(&format!("t{n}"), TaskState::Queued)).collect();
        let ended = until_ended(&manager.client, tasks, &long()).await.unwrap();
        assert_eq!(ended.len(), 40);
        assert!(ended.iter().all(|task| task.state == TaskState::Done));
        assert_eq!(manager.lines().len(), 3);
    }

    #[tokio::test]
    async fn what_the_list_does_not_show_is_asked_for_by_name_and_rounds_are_bounded() {
        let named = Mutex::new(BTreeSet::new());
        let manager = Scripted::start(move |asked| {
            let Some(id) = asked.line.strip_prefix("GET /v1/tasks/") else {
                // Others have ordered so much that ours are not among the newest.
                return Some((200, json!([task("other", TaskState::Running)])));
            };
            assert!(
                named.lock().unwrap().insert(id.to_owned()),
                "{id} was asked for again before all others"
            );
            Some((200, json!(task(id, TaskState::Running))))
        })
        .await;
        let mut tasks: Vec<TaskView> =
            (0..2 * NAMED + 1).map(|n| task(&format!("t{n}"), TaskState::Queued)).collect();
        let mut rounds = Rounds::default();
        for round in 1..=2 {
            rounds.ask(&manager.client, &mut tasks, &long()).await.unwrap();
            assert_eq!(manager.lines().len(), round * (1 + NAMED));
        }
        let known = tasks.iter().filter(|task| task.state == TaskState::Running).count();
        assert_eq!(known, 2 * NAMED);
    }

    #[tokio::test]
    async fn one_task_is_asked_for_by_name_and_time_that_is_over_ends_the_waiting() {
        let manager = Scripted::start(|asked| {
            assert_eq!(asked.line, "GET /v1/tasks/t");
            Some((200, json!(task("t", TaskState::Running))))
        })
        .await;
        let tasks = vec![task("t", TaskState::Queued), task("u", TaskState::Done)];
        let patience = Patience::new(Instant::now() + Duration::from_millis(300));
        let left = until_ended(&manager.client, tasks, &patience).await.unwrap();
        assert_eq!([left[0].state, left[1].state], [TaskState::Running, TaskState::Done]);
    }

    #[test]
    fn who_stops_waiting_learns_how_to_go_on() {
        let open = |n| (0..n).map(|n| task(&format!("t{n}"), TaskState::Running)).collect::<Vec<_>>();
        assert!(goes_on(&open(1)).ends_with("call it off: tmctl task cancel t0"));
        assert!(goes_on(&open(3)).ends_with("call them off: tmctl task cancel t0 t1 t2"));
        assert!(goes_on(&open(11)).contains("see them:     tmctl task list"));
        assert!(goes_on(&[task("t", TaskState::Done)]).starts_with("every task has ended"));
    }
}
