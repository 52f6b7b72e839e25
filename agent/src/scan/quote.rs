//! What a scan would look at and what that is likely to cost, and what one that is done adds to that knowledge.

use tm_protocol::{ids::Sha256, quote::Quote};

use super::{
    Done, Order, millis,
    past::{Past, Quoted, Run, Work, set_of},
};

/// The quote for an order that was walked through and not read.
pub(super) fn of(order: &Order, done: &Done, past: &Past) -> Quote {
    let coverage = &done.coverage;
    let work = Work {
        patterns: set(order),
        files: coverage.files.saturating_sub(coverage.known),
        bytes: coverage.bytes.saturating_sub(done.known_bytes),
        known: coverage.known,
        percent: order.options.cpu_percent,
    };
    Quote {
        files: coverage.files,
        bytes: coverage.bytes,
        known: coverage.known,
        known_bytes: done.known_bytes,
        skipped: coverage.skipped.clone(),
        estimate: past.estimate(&work),
        elapsed_ms: coverage.elapsed_ms,
        cpu_ms: coverage.cpu_ms,
    }
}

/// What is remembered of a scan.
pub(super) fn run_of(order: &Order, done: &Done) -> Run {
    let coverage = &done.coverage;
    Run {
        patterns: set(order),
        files: coverage.files.saturating_sub(coverage.known),
        bytes: coverage.bytes.saturating_sub(done.known_bytes),
        known: coverage.known,
        load_ms: millis(done.load).min(coverage.cpu_ms),
        cpu_ms: coverage.cpu_ms,
        elapsed_ms: coverage.elapsed_ms,
        percent: order.options.cpu_percent,
    }
}

/// What is remembered of a quote.
pub(super) fn quoted_of(order: &Order, quote: &Quote) -> Quoted {
    Quoted {
        order: name(order),
        files: quote.files,
        bytes: quote.bytes,
        cpu_ms: quote.estimate.map(|estimate| estimate.cpu_ms),
        elapsed_ms: quote.estimate.map(|estimate| estimate.elapsed_ms),
    }
}

/// Names an order; the one that asks for its quote has the same name.
pub(super) fn name(order: &Order) -> Sha256 {
    let mut options = order.options;
    options.dry_run = false;
    // Within one version of the program this is one text for one order; a name of another version matches none.
    let version = env!("CARGO_PKG_VERSION");
    Sha256::of(format!("{version} {:?}", (set(order), &order.paths, order.limits, options)).as_bytes())
}

fn set(order: &Order) -> Sha256 {
    set_of(order.patterns.iter().map(tm_patterns::Pattern::sha256))
}
