//! What is counted and measured in this process, for Prometheus. `manager/README.md` names every series.
//!
//! The crate `prometheus` keeps plain atomics and writes the text; there is one set a process, so that whoever
//! counts needs nothing handed down to him, and every series is there from the first moment (a counter that
//! appears with its first event has no rate then).
//!
//! **Invariant:** no label has a value that comes from outside: the number of series does not grow with the fleet.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus::{
    Encoder as _, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use tm_api::event::EventKind;
use tm_protocol::task::TaskState;

/// Bounds of what usually takes from a tenth of a millisecond to seconds, in seconds.
const SECONDS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Handshakes on the agents' port, by how they ended.
pub(crate) const HANDSHAKES: [&str; 5] = ["completed", "failed", "timeout", "refused", "turned-away"];
/// Messages of agents.
pub(crate) const MESSAGES: [&str; 9] =
    ["ping", "pong", "inventory", "progress", "report", "notices", "renew", "out-of-place", "unknown"];
/// Queues whose length is shown.
pub(crate) const QUEUES: [&str; 3] = ["doors", "intake", "bulk"];

/// Everything that is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) agent_port_listening: IntGauge,
    pub(crate) agents_connected: IntGauge,
    pub(crate) links_unproven: IntGauge,
    handshakes: IntCounterVec,
    pub(crate) sessions: IntCounter,
    sessions_ended: IntCounterVec,
    pub(crate) heartbeats: IntCounter,
    messages: IntCounterVec,
    enrollments: IntCounterVec,
    queues: IntGaugeVec,
    bulk_bytes: IntCounterVec,
    events: IntCounterVec,
    pub(crate) transaction_wait: Histogram,
    pub(crate) transaction: Histogram,
    pub(crate) transactions_failed: IntCounter,
    pub(crate) database_up: IntGauge,
    database_connections: IntGaugeVec,
    tasks: IntGaugeVec,
    pub(crate) endpoints: IntGauge,
    pub(crate) incidents_open: IntGauge,
    certificate_expiry: prometheus::GaugeVec,
    exported: IntCounterVec,
    export_failures: IntCounterVec,
    export_lag: IntGaugeVec,
    export_lag_seconds: prometheus::GaugeVec,
    requests: IntCounterVec,
    pub(crate) request: Histogram,
}

/// This process's.
pub(crate) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

impl Metrics {
    fn new() -> Self {
        let make = Maker(Registry::new());
        let build = make.gauges("tm_build_info", "Always 1; the labels say which build runs.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        make.float("tm_start_time_seconds", "When this process began, in seconds since 1970.").set(seconds());
        let metrics = Self {
            agent_port_listening: make
                .gauge("tm_agent_port_listening", "Whether links of agents are accepted (1) or not (0)."),
            agents_connected: make.gauge("tm_agents_connected", "Agents with a session at this manager."),
            links_unproven: make.gauge(
                "tm_agent_links_unproven",
                "Links on the agents' port whose other side has not proven yet who it is.",
            ),
            handshakes: make.counters(
                "tm_agent_handshakes_total",
                "Links on the agents' port, by how their handshake ended.",
                &["outcome"],
            ),
            sessions: make.counter("tm_agent_sessions_total", "Sessions of agents that were opened."),
            sessions_ended: make.counters(
                "tm_agent_sessions_ended_total",
                "Control links of agents that ended, by reason.",
                &["reason"],
            ),
            heartbeats: make.counter("tm_agent_heartbeats_total", "Pings and pongs heard from agents."),
            messages: make.counters(
                "tm_agent_messages_total",
                "Messages heard in sessions of agents, by kind.",
                &["kind"],
            ),
            enrollments: make.counters(
                "tm_enrollments_total",
                "Enrollment requests, by how they were answered.",
                &["outcome"],
            ),
            queues: make.gauges(
                "tm_queue_length",
                "What waits: sessions to be opened or closed (doors), sessions with something to be stored \
                 (intake), transfers for a place (bulk).",
                &["queue"],
            ),
            bulk_bytes: make.counters(
                "tm_bulk_bytes_total",
                "Bytes of files moved on bulk links, down to agents or up from them.",
                &["direction"],
            ),
            events: make.counters(
                "tm_events_total",
                "Threat events that this manager wrote, by kind.",
                &["kind"],
            ),
            transaction_wait: make.histogram(
                "tm_database_transaction_wait_seconds",
                "How long transactions that write waited to begin.",
            ),
            transaction: make.histogram(
                "tm_database_transaction_seconds",
                "How long transactions that write took from their begin until they were durable.",
            ),
            transactions_failed: make.counter(
                "tm_database_transactions_failed_total",
                "Transactions that could not begin or not be committed.",
            ),
            database_up: make
                .gauge("tm_database_up", "Whether the database answers and has this program's schema."),
            database_connections: make.gauges(
                "tm_database_connections",
                "Connections to the database, by state.",
                &["state"],
            ),
            tasks: make.gauges("tm_tasks", "Tasks of the whole fleet, by state.", &["state"]),
            endpoints: make.gauge("tm_endpoints", "Endpoints of the whole fleet."),
            incidents_open: make.gauge("tm_incidents_open", "Open incidents of the whole fleet."),
            certificate_expiry: make.floats(
                "tm_certificate_expiry_timestamp_seconds",
                "When the first of this manager's own certificates of a kind ends, in seconds since 1970.",
                &["certificate"],
            ),
            exported: make.counters(
                "tm_export_events_total",
                "Threat events that an exporter's receiver took, those that it got twice counted twice.",
                &["exporter"],
            ),
            export_failures: make.counters(
                "tm_export_failures_total",
                "Batches of threat events that did not get to an exporter's receiver.",
                &["exporter"],
            ),
            export_lag: make.gauges(
                "tm_export_lag_events",
                "Threat events that an exporter has not dealt with yet.",
                &["exporter"],
            ),
            export_lag_seconds: make.floats(
                "tm_export_lag_seconds",
                "Age of the oldest of these; 0 if there is none.",
                &["exporter"],
            ),
            requests: make.counters(
                "tm_api_requests_total",
                "Requests to the administrators' interface, by class of the answer's status.",
                &["status"],
            ),
            request: make.histogram(
                "tm_api_request_seconds",
                "How long requests to the administrators' interface took.",
            ),
            registry: make.0,
        };
        metrics.begin();
        metrics
    }

    /// Makes every series whose labels are known.
    fn begin(&self) {
        let all: [(&IntCounterVec, &[&str]); 7] = [
            (&self.handshakes, &HANDSHAKES),
            (&self.sessions_ended, &crate::agents::LinkError::REASONS),
            (&self.messages, &MESSAGES),
            (&self.enrollments, &["enrolled", "refused"]),
            (&self.bulk_bytes, &["down", "up"]),
            (&self.events, &EventKind::ALL.iter().map(|kind| kind.word()).collect::<Vec<_>>()),
            (&self.requests, &["1xx", "2xx", "3xx", "4xx", "5xx"]),
        ];
        for (counters, values) in all {
            for value in values {
                let _ = counters.with_label_values(&[value]);
            }
        }
        for queue in QUEUES {
            let _ = self.queues.with_label_values(&[queue]);
        }
        for state in TaskState::ALL {
            let _ = self.tasks.with_label_values(&[state.word()]);
        }
        for state in ["used", "idle"] {
            let _ = self.database_connections.with_label_values(&[state]);
        }
        for certificate in ["authority", "manager"] {
            let _ = self.certificate_expiry.with_label_values(&[certificate]);
        }
    }

    /// Counts a handshake; `outcome` is one of [`HANDSHAKES`].
    pub(crate) fn handshake(&self, outcome: &'static str) {
        self.handshakes.with_label_values(&[outcome]).inc();
    }

    /// Counts the end of a control link.
    pub(crate) fn session_ended(&self, reason: &'static str) {
        self.sessions_ended.with_label_values(&[reason]).inc();
    }

    /// Counts a message; `kind` is one of [`MESSAGES`].
    pub(crate) fn message(&self, kind: &'static str) {
        self.messages.with_label_values(&[kind]).inc();
    }

    /// Counts an answer to an enrollment request.
    pub(crate) fn enrollment(&self, is_enrolled: bool) {
        self.enrollments.with_label_values(&[if is_enrolled { "enrolled" } else { "refused" }]).inc();
    }

    /// The length of a queue; `queue` is one of [`QUEUES`].
    pub(crate) fn queue(&self, queue: &'static str) -> IntGauge {
        self.queues.with_label_values(&[queue])
    }

    /// Counts bytes that agents got.
    pub(crate) fn bulk_down(&self, bytes: usize) {
        self.bulk_bytes.with_label_values(&["down"]).inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// Counts bytes that agents sent.
    pub(crate) fn bulk_up(&self, bytes: usize) {
        self.bulk_bytes.with_label_values(&["up"]).inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// Counts an event that was written.
    pub(crate) fn event(&self, kind: EventKind) {
        self.events.with_label_values(&[kind.word()]).inc();
    }

    /// How many connections to the database there are.
    pub(crate) fn connections(&self, used: usize, idle: usize) {
        for (state, count) in [("used", used), ("idle", idle)] {
            self.database_connections
                .with_label_values(&[state])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// How many tasks are in a state.
    pub(crate) fn tasks(&self, state: TaskState, count: i64) {
        self.tasks.with_label_values(&[state.word()]).set(count);
    }

    /// When the first certificate of a kind (`authority`, `manager`) ends, in milliseconds since 1970.
    #[expect(clippy::cast_precision_loss, reason = "a double tells milliseconds apart for 280,000 years")]
    pub(crate) fn certificate(&self, kind: &'static str, end_ms: i64) {
        self.certificate_expiry.with_label_values(&[kind]).set(end_ms as f64 / 1000.0);
    }

    /// Makes the series of an exporter: its name comes from the configuration.
    pub(crate) fn exporter(&self, name: &str) {
        self.exported(name, 0);
        let _ = self.export_failures.with_label_values(&[name]);
        self.export_lag(name, 0, 0.0);
    }

    /// Counts events that a receiver took.
    pub(crate) fn exported(&self, name: &str, count: usize) {
        self.exported.with_label_values(&[name]).inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// Counts a batch that did not get through.
    pub(crate) fn export_failed(&self, name: &str) {
        self.export_failures.with_label_values(&[name]).inc();
    }

    /// How far behind an exporter is.
    pub(crate) fn export_lag(&self, name: &str, events: i64, seconds: f64) {
        self.export_lag.with_label_values(&[name]).set(events);
        self.export_lag_seconds.with_label_values(&[name]).set(seconds);
    }

    /// Counts a request and what it took.
    pub(crate) fn request(&self, status: u16, took: Duration) {
        let class = match status {
            ..=199 => "1xx",
            200..=299 => "2xx",
            300..=399 => "3xx",
            400..=499 => "4xx",
            500.. => "5xx",
        };
        self.requests.with_label_values(&[class]).inc();
        self.request.observe(took.as_secs_f64());
    }

    /// Everything, as Prometheus reads it.
    pub(crate) fn text(&self) -> String {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "Cannot write the metrics.");
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

/// A gauge that is one more as long as this lives.
#[derive(Debug)]
pub(crate) struct Held(IntGauge);

impl Held {
    /// Counts one up.
    pub(crate) fn one(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Makes series and enters them. Names, help and labels are this file's own and right.
struct Maker(Registry);

impl Maker {
    fn entered<C: prometheus::core::Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let made = made.expect("the name and the labels are well formed");
        self.0.register(Box::new(made.clone())).expect("every name is there once");
        made
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.entered(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.entered(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.entered(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.entered(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn float(&self, name: &str, help: &str) -> Gauge {
        self.entered(Gauge::new(name, help))
    }

    fn floats(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::GaugeVec {
        self.entered(prometheus::GaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str) -> Histogram {
        self.entered(Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
    }
}

/// Now, in seconds since 1970.
fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Names, types and help of what is exposed, read from the text as Prometheus does.
    fn exposed(text: &str) -> BTreeMap<String, (String, String)> {
        let mut found: BTreeMap<String, (String, String)> = BTreeMap::new();
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
                found.entry(name.to_owned()).or_default().1 = help.to_owned();
            } else if let Some((name, kind)) =
                line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
            {
                found.entry(name.to_owned()).or_default().0 = kind.to_owned();
            }
        }
        found
    }

    #[test]
    fn the_list_in_the_handbook_is_what_is_exposed() {
        let rows: BTreeMap<String, (String, String)> = include_str!("../README.md")
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `tm_")?.split(" | ");
                let name = format!("tm_{}", cells.next()?.trim_end_matches('`'));
                let (kind, _labels) = (cells.next()?.to_owned(), cells.next()?);
                Some((name, (kind, cells.next()?.trim_end_matches(" |").to_owned())))
            })
            .collect();
        METRICS.exporter("siem");
        assert_eq!(rows, exposed(&METRICS.text()));
        assert!(rows.len() > 20 && rows.values().all(|(kind, help)| !kind.is_empty() && help.ends_with('.')));
    }

    #[test]
    fn every_series_is_there_before_anything_has_happened() {
        let text = METRICS.text();
        for series in [
            "tm_agent_handshakes_total{outcome=\"turned-away\"}",
            "tm_tasks{state=\"expired\"}",
            "tm_queue_length{queue=\"bulk\"}",
            "tm_api_requests_total{status=\"5xx\"}",
            "tm_events_total{kind=\"certificate\"}",
            "tm_database_transaction_seconds_bucket{le=\"+Inf\"}",
        ] {
            assert!(text.contains(series), "{series}:\n{text}");
        }
        let held = Held::one(METRICS.queue("bulk"));
        assert_eq!(METRICS.queue("bulk").get(), 1);
        drop(held);
        assert_eq!(METRICS.queue("bulk").get(), 0);
    }
}
