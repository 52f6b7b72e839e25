//! What a worker looks with: rules and digest lists, over the same bytes.
//!
//! **Invariant:** hits by digest come before those by rules, whatever the time that is left for these.

use std::time::{Duration, Instant};

use crate::{
    engine::{Engine, Judgement},
    lists::Lists,
};

/// Rules and digest lists. A clone shares what is loaded; each thread has its own.
#[derive(Debug, Clone)]
pub(crate) struct Judge {
    /// Absent if there are no rules.
    engine: Option<Engine>,
    lists: Lists,
}

impl Judge {
    pub(crate) fn new(engine: Option<Engine>, lists: Lists) -> Self {
        Self { engine, lists }
    }

    /// Whether there are rules.
    pub(crate) fn has_rules(&self) -> bool {
        self.engine.is_some()
    }

    /// The digest lists.
    pub(crate) fn lists(&self) -> &Lists {
        &self.lists
    }

    /// Judges `bytes`, for about `time` at most.
    pub(crate) fn judge(&mut self, bytes: &[u8], time: Duration) -> Judgement {
        let begun = Instant::now();
        let mut hits = if self.lists.is_empty() { Vec::new() } else { self.lists.look(bytes) };
        let mut judgement = match &mut self.engine {
            Some(engine) => engine.judge(bytes, time.saturating_sub(begun.elapsed())),
            None => Judgement::default(),
        };
        hits.append(&mut judgement.matches);
        Judgement { matches: hits, ..judgement }
    }
}
