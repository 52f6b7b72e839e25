//! The rows: what was measured, what must hold, and whether it does.

use std::io::{self, Write as _};

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use super::super::{Format, machine};

/// What was measured with one number of agents; `None` where it was not asked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures {
    pub(super) agents: u32,
    pub(super) enroll_per_s: Option<f64>,
    pub(super) enroll_cpu_us: Option<f64>,
    pub(super) connect_s: f64,
    /// Handshake, login and inventory.
    pub(super) handshake_cpu_us: f64,
    pub(super) idle_kib_per_agent: f64,
    pub(super) idle_core_percent: Option<f64>,
    /// Until the last agent has its task.
    pub(super) push_received_ms: Option<f64>,
    /// Until the last end is acknowledged.
    pub(super) push_last_ms: Option<f64>,
    pub(super) push_cpu_us_per_task: Option<f64>,
    pub(super) storm_all_back_s: Option<f64>,
    pub(super) storm_cpu_us: Option<f64>,
    pub(super) restart_all_back_s: Option<f64>,
    /// Tasks without an end, and agents that did not come back.
    pub(super) lost: u64,
}

/// One figure.
struct Row {
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    value: f64,
    floor: Option<Floor>,
}

enum Floor {
    AtMost(f64),
    AtLeast(f64),
}

impl Row {
    /// Whether it is as good as it must be, where something must hold.
    fn holds(&self) -> Option<bool> {
        self.floor.as_ref().map(|floor| match floor {
            Floor::AtMost(most) => self.value <= *most,
            Floor::AtLeast(least) => self.value >= *least,
        })
    }
}

impl Figures {
    fn rows(&self) -> Vec<Row> {
        use Floor::{AtLeast, AtMost};
        let row = |key, what, unit, value: Option<f64>, floor| {
            value.map(|value| Row { key, what, unit, value, floor })
        };
        let rows = [
            row("enroll_per_s", "enrollments", "/s", self.enroll_per_s, Some(AtLeast(200.0))),
            row("enroll_cpu_us", "server CPU per enrollment", "µs", self.enroll_cpu_us, None),
            row("connect_s", "all connected, 64 handshakes at a time", "s", Some(self.connect_s), None),
            row(
                "handshake_cpu_us",
                "server CPU per handshake, login and inventory",
                "µs",
                Some(self.handshake_cpu_us),
                Some(AtMost(400.0)),
            ),
            row(
                "idle_kib_per_agent",
                "memory per idle agent",
                "KiB",
                Some(self.idle_kib_per_agent),
                Some(AtMost(40.0)),
            ),
            row(
                "idle_core_percent",
                "idle with heartbeats",
                "% of a core",
                self.idle_core_percent,
                Some(AtMost(3.0)),
            ),
            row("push_received_ms", "push, last agent has its task", "ms", self.push_received_ms, None),
            row("push_last_ms", "push, last end acknowledged", "ms", self.push_last_ms, Some(AtMost(1500.0))),
            row(
                "push_cpu_us_per_task",
                "server CPU per task and agent",
                "µs",
                self.push_cpu_us_per_task,
                Some(AtMost(500.0)),
            ),
            row(
                "storm_all_back_s",
                "all links cut, all back",
                "s",
                self.storm_all_back_s,
                Some(AtMost(15.0)),
            ),
            row("storm_cpu_us", "server CPU per agent that returns", "µs", self.storm_cpu_us, None),
            row(
                "restart_all_back_s",
                "manager killed and started, all back",
                "s",
                self.restart_all_back_s,
                None,
            ),
        ];
        rows.into_iter().flatten().collect()
    }

    fn json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("agents".to_owned(), json!(self.agents));
        let mut missed = Vec::new();
        for row in self.rows() {
            object.insert(row.key.to_owned(), json!(row.value));
            if row.holds() == Some(false) {
                missed.push(row.key);
            }
        }
        object.insert("lost".to_owned(), json!(self.lost));
        object.insert("missed".to_owned(), json!(missed));
        object
    }
}

/// Prints everything: as a table, or as an object with the figures of the largest fleet and all under `sizes`.
pub(super) fn print(all: &[Figures], build: &str, output: Format) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match output {
        Format::Table => write!(out, "{}, {build}\n{}", machine(), table(all)),
        Format::Json => {
            let mut object = all.last().map(Figures::json).unwrap_or_default();
            object.insert("machine".to_owned(), json!(machine()));
            object.insert("build".to_owned(), json!(build));
            object.insert("sizes".to_owned(), all.iter().map(Figures::json).collect::<Vec<_>>().into());
            writeln!(out, "{:#}", Value::Object(object))
        }
    }
    .context("cannot print")
}

fn table(all: &[Figures]) -> String {
    let mut text = format!("\n{:>6}  {:<46}  {:>20}  {:>14}\n", "agents", "row", "measured", "floor");
    for figures in all {
        for row in figures.rows() {
            let floor = match &row.floor {
                None => String::new(),
                Some(Floor::AtMost(most)) => format!("≤ {most}"),
                Some(Floor::AtLeast(least)) => format!("≥ {least}"),
            };
            let verdict = match row.holds() {
                None => "",
                Some(true) => "held",
                Some(false) => "MISSED",
            };
            let measured = format!("{} {}", rounded(row.value), row.unit);
            text.push_str(&format!(
                "{:>6}  {:<46}  {measured:>20}  {floor:>8} {verdict:>6}\n",
                figures.agents, row.what
            ));
        }
        text.push_str(&format!("{:>6}  {:<46}  {:>20}\n", figures.agents, "lost", figures.lost));
    }
    text
}

/// Three digits are as much as such a measurement says.
fn rounded(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_holds_up_to_its_floor() {
        let mut figures = Figures { agents: 7, handshake_cpu_us: 400.0, ..Figures::default() };
        figures.idle_kib_per_agent = 40.1;
        figures.enroll_per_s = Some(199.0);
        let object = figures.json();
        assert_eq!(object["missed"], json!(["enroll_per_s", "idle_kib_per_agent"]));
        assert_eq!((object["agents"].as_u64(), object.get("push_last_ms")), (Some(7), None));
        let text = table(&[figures]);
        assert!(text.contains("40.1 KiB") && text.matches("MISSED").count() == 2, "{text}");
        assert_eq!((rounded(1234.5), rounded(0.126)), ("1234".to_owned(), "0.13".to_owned()));
    }
}
