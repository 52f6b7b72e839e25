//! `tmctl task cancel`: calls tasks off, and with `--wait` stays for the agents' last word.

use std::time::Duration;

use serde::Serialize;
use tm_api::task::TaskView;
use tm_protocol::{task::TaskState, text::escape_for_display};
use tokio::time::Instant;

use crate::{
    client::Client,
    cmds::{
        ordered::READING,
        receipt,
        task::{TASKS, is_treatment},
        treatment::{self, Treated},
        wait::{self, Patience},
    },
    failure::{Exit, Failure},
    output::{Format, Output, say},
};

pub(super) async fn run(
    ids: &[String],
    wait: Option<Duration>,
    client: &Client,
    out: &Output,
) -> Result<Exit, Failure> {
    let mut tasks: Vec<TaskView> = Vec::new();
    let mut worst = Exit::Done;
    for id in ids {
        // One that cannot be called off does not keep the others running.
        match client.post(&["tasks", id, "cancel"], &serde_json::json!({})).await {
            Ok(task) => tasks.push(task),
            Err(error) => {
                let failure = Failure::from(error);
                if ids.len() == 1 {
                    return Err(failure);
                }
                say(&failure.report());
                worst = worse(worst, failure.exit());
            }
        }
    }
    let Some(wait) = wait else {
        out.list(&tasks, &TASKS, "nothing was called off")?;
        say(&tasks.iter().map(first_word).collect::<String>());
        return Ok(worst);
    };
    let patience = Patience::new(Instant::now() + wait);
    let begun = tasks.clone();
    let ended = wait::unless_interrupted(
        async {
            let ended = wait::until_ended(client, tasks, &patience).await?;
            patience.extend(READING);
            let (treatments, others): (Vec<TaskView>, Vec<TaskView>) =
                ended.into_iter().partition(is_treatment);
            let mut ended = treatment::with_items(client, treatments, &patience).await?;
            ended.extend(others.into_iter().map(|task| Treated { task, items: Vec::new() }));
            Ok(ended)
        },
        || wait::goes_on(&begun),
    )
    .await?;
    print(&ended, out)?;
    Ok(ended.iter().map(|one| exit(&one.task)).fold(worst, worse))
}

/// What is known at once.
fn first_word(task: &TaskView) -> String {
    let host = escape_for_display(&task.host);
    let id = escape_for_display(&task.id);
    if task.state == TaskState::Cancelled {
        format!("{host}: called off before it began; nothing was done there\n")
    } else if task.state.is_final() {
        format!("{host}: had ended ({})\n", task.state)
    } else {
        format!(
            "{host}: its agent is told to stop (once it is connected) and says what was kept: tmctl task \
             follow {id}\n"
        )
    }
}

/// Whether it was called off.
const fn exit(task: &TaskView) -> Exit {
    match task.state {
        TaskState::Cancelled => Exit::Done,
        // It was too late.
        TaskState::Done | TaskState::Failed | TaskState::Expired | TaskState::Refused => Exit::Refused,
        TaskState::Queued | TaskState::Delivered | TaskState::Running => Exit::TimedOut,
    }
}

/// The one of two that a script must know of.
const fn worse(one: Exit, other: Exit) -> Exit {
    const fn rank(exit: Exit) -> u8 {
        match exit {
            Exit::Failed | Exit::Usage | Exit::Detected | Exit::Incomplete | Exit::Interrupted => 3,
            Exit::Refused => 2,
            Exit::TimedOut => 1,
            Exit::Done => 0,
        }
    }
    if rank(other) > rank(one) { other } else { one }
}

fn print(ended: &[Treated], out: &Output) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        tasks: &'a [Treated],
    }
    match out.format() {
        Format::Table => out.text(&ended.iter().map(last_word).collect::<String>()),
        Format::Json => out.json(&Report { tasks: ended }),
        Format::Csv => {
            let tasks: Vec<TaskView> = ended.iter().map(|one| one.task.clone()).collect();
            out.csv(&tasks, &TASKS)
        }
    }
}

/// What the agent said in the end.
fn last_word(one: &Treated) -> String {
    if is_treatment(&one.task) {
        let kept: String = one
            .items
            .iter()
            .filter(|item| item.failure.is_none())
            .map(|item| {
                let vault = item.vault.as_ref().map(|id| format!(" (vault item {})", escape_for_display(id)));
                let path = escape_for_display(&item.path);
                format!("  {}: {path}{}\n", item.verdict, vault.unwrap_or_default())
            })
            .collect();
        treatment::text(&one.task, &one.items) + &kept
    } else {
        receipt::text(&one.task)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tm_api::task::TaskResult;
    use tm_protocol::report::{ItemVerdict, Tally};

    use super::*;
    use crate::{
        cmds::samples::{item, task},
        testing::Scripted,
    };

    /// `a` was queued, `b` runs and stops when asked, `c` has ended.
    async fn manager() -> Scripted {
        Scripted::start(|asked| {
            let with = |id: &str, state| TaskView { id: id.to_owned(), ..task("cleanup", state) };
            Some(match asked.line.as_str() {
                "POST /v1/tasks/a/cancel" => (200, json!(with("a", TaskState::Cancelled))),
                "POST /v1/tasks/b/cancel" => (200, json!(with("b", TaskState::Running))),
                "POST /v1/tasks/c/cancel" => {
                    (409, json!({"code": "conflict", "message": "it has ended: done"}))
                }
                "GET /v1/tasks/b" => (200, json!(with("b", TaskState::Cancelled))),
                "GET /v1/tasks/a/items?after=0" | "GET /v1/tasks/b/items?after=0" => {
                    (200, json!({"items": []}))
                }
                other => (500, json!({"code": "internal", "message": other})),
            })
        })
        .await
    }

    #[tokio::test]
    async fn one_that_cannot_be_called_off_does_not_keep_the_others_running() {
        let manager = manager().await;
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        for (tasks, wait, code) in [
            (&["a"][..], None, 0),
            (&["b"], None, 0),
            (&["a", "b"], Some(5), 0),
            (&["c", "a", "b"], None, 3),
            (&["c", "b"], Some(5), 3),
        ] {
            let before = manager.lines().len();
            let out = Output::kept(Format::Csv);
            let wait = wait.map(Duration::from_secs);
            let exit = run(&ids(tasks), wait, &manager.client, &out).await.unwrap();
            assert_eq!(exit.code(), code, "{tasks:?}");
            let posts = manager.lines()[before..].iter().filter(|line| line.starts_with("POST")).count();
            assert_eq!(posts, tasks.len());
        }
        let out = Output::kept(Format::Csv);
        let failure = run(&ids(&["c"]), None, &manager.client, &out).await.unwrap_err();
        assert_eq!(failure.exit().code(), 3);
        assert_eq!(out.text_kept(), "");
    }

    #[test]
    fn the_exit_code_says_whether_it_was_called_off() {
        use TaskState as S;
        for (states, code) in [
            (&[S::Cancelled][..], 0),
            (&[S::Cancelled, S::Done], 3),
            (&[S::Running, S::Cancelled], 4),
            (&[S::Queued, S::Failed], 3),
            (&[S::Expired], 3),
        ] {
            let exits = states.iter().map(|state| exit(&task("scan", *state)));
            assert_eq!(exits.fold(Exit::Done, worse).code(), code, "{states:?}");
        }
        assert_eq!(worse(Exit::Failed, Exit::Refused), Exit::Failed);
    }

    #[test]
    fn what_is_known_at_once_and_what_was_kept_are_told() {
        let mut hostile = task("cleanup", TaskState::Cancelled);
        hostile.host = "w\u{1b}b".into();
        assert_eq!(first_word(&hostile), "w\\u{1b}b: called off before it began; nothing was done there\n");
        assert!(first_word(&task("scan", TaskState::Running)).contains("tmctl task follow t"));

        let mut cancelled = task("cleanup", TaskState::Cancelled);
        cancelled.result =
            Some(TaskResult::Treatment(Tally { done: 1, left: 2, bytes: 1024, ..Tally::default() }));
        let mut vaulted = item("/srv/x\n", ItemVerdict::Vaulted, None);
        vaulted.vault = Some("v-1".into());
        let one = Treated { task: cancelled, items: vec![vaulted] };
        assert_eq!(
            last_word(&one),
            "web (e): cancelled; 1 vaulted, 2 not reached, 1.0 KiB\n  \
             vaulted: /srv/x\\u{a} (vault item v-1)\n"
        );
    }
}
