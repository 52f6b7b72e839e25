//! `tmctl event`: the Threat Event Log, once or as it grows.
//!
//! **Invariant:** `follow` prints each event once, and none of those that its filters let through is left out
//! while it runs, whatever happens to the manager meanwhile.

use std::time::Duration;

use jiff::Zoned;
use tm_api::{
    Page,
    event::{EventQuery, EventView},
};
use tm_protocol::text::escape_for_display;

use crate::{
    cli::{Event, EventFilter, ListEvents},
    client::Client,
    cmds::wait::Patience,
    failure::{Exit, Failure},
    output::{Column, Format, Output, say, time_for_people},
    when::When,
};

/// Between two questions for further events.
const PACE: Duration = Duration::from_secs(1);

const COLUMNS: [Column<EventView>; 11] = [
    Column::time("at", |e| e.at.clone()),
    Column::narrow("host", |e| e.host.clone()),
    Column::narrow("kind", |e| e.kind.to_string()),
    Column::narrow("status", |e| e.status.to_string()),
    Column::narrow("detail", |e| e.detail.clone()),
    Column::narrow("message", |e| e.message.clone()),
    Column::wide("advice", |e| e.advice.clone()),
    Column::wide("endpoint", |e| e.endpoint.clone()),
    Column::wide("task", |e| e.task.clone().unwrap_or_default()),
    Column::wide("incident", |e| e.incident.clone().unwrap_or_default()),
    Column::wide("id", |e| e.id.to_string()),
];

pub(crate) async fn run(command: Event, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Event::List(args) => list(*args, client, out).await,
        Event::Follow { filter, since, limit } => {
            let done = tokio::select! {
                done = follow(filter, since, limit, client, out) => done,
                Ok(()) = tokio::signal::ctrl_c() => Ok(()),
            };
            done.map(|()| Exit::Done)
        }
    }
}

async fn list(args: ListEvents, client: &Client, out: &Output) -> Result<Exit, Failure> {
    let now = Zoned::now();
    let since_ms = args.since.map(|when| when.milliseconds(&now));
    let until_ms = args.until.map(|when| when.milliseconds(&now));
    if since_ms.zip(until_ms).is_some_and(|(since, until)| until <= since) {
        return Err(Failure::Usage("--until is not after --since: no event can lie between".to_owned()));
    }
    let query = EventQuery { since_ms, until_ms, ..query(args.filter) };
    if args.all {
        let mut events = Vec::new();
        pages(client, query, |page| {
            events.extend(page);
            Ok(())
        })
        .await?;
        return print(&events, out);
    }
    let query = EventQuery { newest: true, limit: Some(args.limit), ..query };
    let page: Page<EventView> = client.get(&["events"], &query).await?;
    print(&page.items, out)?;
    if u32::try_from(page.items.len()).is_ok_and(|count| count >= args.limit) {
        say(&format!("these are the newest {}; --limit or --all shows more\n", args.limit));
    }
    Ok(Exit::Done)
}

/// The newest events of one endpoint.
pub(super) async fn of_endpoint(
    target: String,
    limit: u32,
    client: &Client,
    out: &Output,
) -> Result<Exit, Failure> {
    let filter = EventFilter { endpoint: Some(target), ..EventFilter::default() };
    list(ListEvents { filter, since: None, until: None, limit, all: false }, client, out).await
}

fn print(events: &[EventView], out: &Output) -> Result<Exit, Failure> {
    match out.format() {
        Format::Table if events.is_empty() => say("no events\n"),
        Format::Table => {
            let mut lines = Lines::default();
            lines.widen(events);
            out.text(&(lines.header() + &events.iter().map(|event| lines.line(event)).collect::<String>()))?;
        }
        Format::Json | Format::Csv => out.list(events, &COLUMNS, "no events")?,
    }
    Ok(Exit::Done)
}

fn query(filter: EventFilter) -> EventQuery {
    EventQuery {
        endpoint: filter.endpoint,
        search: filter.search,
        kind: filter.kind,
        status: filter.status,
        ..EventQuery::default()
    }
}

/// Reads events from the oldest on, page by page; where it ended.
async fn pages(
    client: &Client,
    mut query: EventQuery,
    mut take: impl FnMut(Vec<EventView>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    loop {
        let page: Page<EventView> = client.get(&["events"], &query).await?;
        take(page.items)?;
        match page.next {
            None => return Ok(()),
            Some(next) if query.after.is_none_or(|after| next > after) => query.after = Some(next),
            Some(_) => return Err(Failure::EndlessPages("events")),
        }
    }
}

async fn follow(
    filter: EventFilter,
    since: Option<When>,
    limit: u32,
    client: &Client,
    out: &Output,
) -> Result<(), Failure> {
    let since_ms = since.map(|when| when.milliseconds(&Zoned::now()));
    let mut query = EventQuery { since_ms, ..query(filter) };
    let mut teller = Teller::new(out);
    if since_ms.is_none() {
        query.after = Some(begin(&query, limit, client, &mut teller).await?);
    }
    let patience = Patience::endless();
    loop {
        let page: Page<EventView> = patience.ask(async || Ok(client.get(&["events"], &query).await?)).await?;
        teller.tell(&page.items)?;
        if out.is_closed() {
            return Ok(());
        }
        let last = page.items.last().map(|event| event.id).max(page.next);
        let is_more = page.next.is_some();
        if is_more && last <= query.after {
            return Err(Failure::EndlessPages("events"));
        }
        query.after = query.after.max(last);
        if !is_more {
            patience.pause(PACE).await;
        }
    }
}

/// Tells the newest events, and says after which number the others come.
async fn begin(
    query: &EventQuery,
    limit: u32,
    client: &Client,
    teller: &mut Teller<'_>,
) -> Result<i64, Failure> {
    // Before the filtered ones are read: what comes between the two answers has a higher number than this,
    // and is either in the second answer or after it.
    let newest = EventQuery { newest: true, limit: Some(1), ..EventQuery::default() };
    let newest: Page<EventView> = client.get(&["events"], &newest).await?;
    let mut last = newest.items.last().map_or(0, |event| event.id);
    // Also asked for when none is to be shown, so that a target that means nothing is refused at once.
    let shown = EventQuery { newest: true, limit: Some(limit.max(1)), ..query.clone() };
    let shown: Page<EventView> = client.get(&["events"], &shown).await?;
    if limit > 0 {
        teller.tell(&shown.items)?;
        last = shown.items.last().map_or(last, |event| event.id.max(last));
    }
    Ok(last)
}

/// Prints events as they come.
struct Teller<'a> {
    out: &'a Output,
    lines: Lines,
    has_header: bool,
}

impl<'a> Teller<'a> {
    fn new(out: &'a Output) -> Self {
        Self { out, lines: Lines::default(), has_header: false }
    }

    fn tell(&mut self, events: &[EventView]) -> Result<(), Failure> {
        match self.out.format() {
            Format::Table => {
                self.lines.widen(events);
                for event in events {
                    self.out.text(&(self.lines.line(event) + &advice(event)))?;
                }
            }
            Format::Json => {
                for event in events {
                    self.out.json_line(event)?;
                }
            }
            Format::Csv if self.has_header => self.out.csv_more(events, &COLUMNS)?,
            Format::Csv => {
                self.out.csv(events, &COLUMNS)?;
                self.has_header = true;
            }
        }
        Ok(())
    }
}

/// One line for each event, in columns that only grow: a later event does not move the ones before it.
#[derive(Debug, Default)]
struct Lines {
    host: usize,
    kind: usize,
    status: usize,
}

impl Lines {
    /// The longest host name that others are moved for.
    const HOST: usize = 24;

    fn widen(&mut self, events: &[EventView]) {
        let width = |text: &str| escape_for_display(text).chars().count();
        for event in events {
            self.host = self.host.max(width(&event.host).min(Self::HOST));
            self.kind = self.kind.max(event.kind.word().len());
            self.status = self.status.max(event.status.word().len());
        }
    }

    fn header(&self) -> String {
        self.columns("TIME", "HOST", "KIND", "STATUS", "MESSAGE")
    }

    fn line(&self, event: &EventView) -> String {
        self.columns(
            &escape_for_display(&time_for_people(&event.at)),
            &escape_for_display(&event.host),
            event.kind.word(),
            event.status.word(),
            &escape_for_display(&event.message),
        )
    }

    fn columns(&self, at: &str, host: &str, kind: &str, status: &str, message: &str) -> String {
        /// As long as times for people are.
        const AT: usize = "2026-01-02 03:04:05Z".len();
        let line = format!(
            "{at:AT$}  {host:h$}  {kind:k$}  {status:s$}  {message}",
            h = self.host.max(4),
            k = self.kind.max(4),
            s = self.status.max(6)
        );
        line.trim_end().to_owned() + "\n"
    }
}

/// What to do next, as a line below the event; nothing if there is nothing.
pub(super) fn advice(event: &EventView) -> String {
    if event.advice.is_empty() {
        String::new()
    } else {
        format!("    next: {}\n", escape_for_display(&event.advice))
    }
}

/// The events as `why` shows them.
pub(super) fn text(events: &[EventView]) -> String {
    let mut lines = Lines::default();
    lines.widen(events);
    events.iter().map(|event| lines.line(event)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use clap::Parser as _;
    use serde_json::{Value, json};
    use tm_api::event::{EventKind, EventStatus};

    use super::*;
    use crate::{
        cli::{Cli, Command},
        cmds::samples,
        testing::Scripted,
    };

    fn event(id: i64, host: &str, kind: EventKind, message: &str, advice: &str) -> EventView {
        EventView {
            host: host.into(),
            kind,
            status: EventStatus::Noted,
            advice: advice.into(),
            ..samples::event(id, message)
        }
    }

    async fn run_on(manager: &Scripted, args: &[&str], out: &Output) -> Result<Exit, Failure> {
        let args = ["tmctl", "event"].into_iter().chain(args.iter().copied());
        let Command::Event(command) = Cli::try_parse_from(args).unwrap().command else {
            panic!("another command")
        };
        run(command, &manager.client, out).await
    }

    /// The end of what would go on for ever.
    fn end() -> (u16, Value) {
        (403, json!({"code": "not-allowed", "message": "the end"}))
    }

    #[tokio::test]
    async fn each_event_is_followed_once_also_across_a_restart_of_the_manager() {
        let polls = AtomicUsize::new(0);
        let manager = Scripted::start(move |asked| {
            Some(match asked.line.as_str() {
                // Another endpoint's event is the newest of all.
                "GET /v1/events?newest=true&limit=1" => (200, json!({"items": [samples::event(9, "nine")]})),
                "GET /v1/events?endpoint=web&newest=true&limit=10" => {
                    (200, json!({"items": [samples::event(3, "three"), samples::event(5, "five")]}))
                }
                "GET /v1/events?endpoint=web&after=9&newest=false" => {
                    match polls.fetch_add(1, Ordering::Relaxed) {
                        0 => (200, json!({"items": []})),
                        1 => return None,
                        _ => (200, json!({"items": [samples::event(12, "twelve")], "next": 12})),
                    }
                }
                "GET /v1/events?endpoint=web&after=12&newest=false" => {
                    (200, json!({"items": [samples::event(13, "thirteen")]}))
                }
                "GET /v1/events?endpoint=web&after=13&newest=false" => end(),
                other => (500, json!({"code": "internal", "message": other})),
            })
        })
        .await;
        let out = Output::kept(Format::Json);
        let failure = run_on(&manager, &["follow", "--endpoint", "web"], &out).await.unwrap_err();
        assert!(failure.to_string().ends_with("the end"), "{failure}");
        let ids: Vec<i64> = out
            .text_kept()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_i64().unwrap())
            .collect();
        assert_eq!(ids, [3, 5, 12, 13]);
    }

    #[tokio::test]
    async fn following_from_a_time_begins_with_the_oldest() {
        let manager = Scripted::start(|asked| {
            Some(match asked.line.as_str() {
                "GET /v1/events?since_ms=0&newest=false" => {
                    (200, json!({"items": [samples::event(1, "one")], "next": 1}))
                }
                "GET /v1/events?since_ms=0&after=1&newest=false" => {
                    (200, json!({"items": [samples::event(2, "two")]}))
                }
                _ => end(),
            })
        })
        .await;
        let out = Output::kept(Format::Csv);
        run_on(&manager, &["follow", "--since", "1970-01-01T00:00:00Z"], &out).await.unwrap_err();
        let text = out.text_kept();
        let starts: Vec<&str> = text.lines().map(|line| line.split(',').nth(5).unwrap()).collect();
        assert_eq!(starts, ["message", "one", "two"], "{text}");
    }

    #[tokio::test]
    async fn pages_that_lead_in_a_circle_end() {
        let manager = Scripted::start(|_| Some((200, json!({"items": [], "next": 4})))).await;
        let out = Output::kept(Format::Table);
        for args in [&["list", "--all"][..], &["follow", "--since", "7d"]] {
            let failure = run_on(&manager, args, &out).await.unwrap_err();
            assert!(matches!(failure, Failure::EndlessPages(_)), "{args:?}: {failure:?}");
        }
        assert_eq!(manager.lines().len(), 4);
    }

    #[tokio::test]
    async fn a_list_asks_for_what_was_typed() {
        let manager = Scripted::start(|_| Some((200, json!({"items": [samples::event(1, "one")]})))).await;
        let out = Output::kept(Format::Table);
        let typed =
            ["list", "--search", "web", "--kind", "cleanup", "--status", "unsuccessful", "--limit", "5"];
        let times = ["--since", "1970-01-01T00:00:01Z", "--until", "1970-01-01T00:00:02Z"];
        run_on(&manager, &[&typed[..], &times].concat(), &out).await.unwrap();
        assert_eq!(
            manager.lines(),
            ["GET /v1/events?search=web&kind=cleanup&status=unsuccessful&since_ms=1000&until_ms=2000\
              &newest=true&limit=5"]
        );
        assert_eq!(
            out.text_kept(),
            "TIME                  HOST  KIND     STATUS       MESSAGE\n\
             2026-01-02 03:04:05Z  web   cleanup  in-progress  one\n"
        );
        let failure = run_on(&manager, &["list", "--since", "1h", "--until", "2h"], &out).await.unwrap_err();
        assert_eq!(failure.exit().code(), 2);
    }

    #[test]
    fn an_event_is_one_harmless_line_and_columns_only_grow() {
        let mut lines = Lines::default();
        let first = event(1, "web", EventKind::Agent, "started", "");
        lines.widen(std::slice::from_ref(&first));
        assert_eq!(lines.line(&first), "2026-01-02 03:04:05Z  web   agent  noted   started\n");
        let hostile = event(2, "w\u{1b}b\n", EventKind::ScanAdministrator, "x\r\ny", "look\u{202e}");
        lines.widen(std::slice::from_ref(&hostile));
        assert_eq!(
            lines.line(&hostile),
            "2026-01-02 03:04:05Z  w\\u{1b}b\\u{a}  scan-administrator  noted   x\\u{d}\\u{a}y\n"
        );
        assert_eq!(advice(&hostile), "    next: look\\u{202e}\n");
        assert_eq!(advice(&first), "");
        let short = lines.line(&first);
        assert_eq!(short.find("noted"), lines.line(&hostile).find("noted"), "{short}");
    }
}
