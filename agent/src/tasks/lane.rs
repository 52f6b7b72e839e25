//! The numbers of what waits for the manager: which are stored, which are under way, which are lost. Pure.
//!
//! **Invariant:** numbers are sent in order and without a gap; a number whose content is lost is told as lost.

use std::collections::VecDeque;

/// Most bytes under way without the manager's word that they are stored. A session begins with the smallest
/// window, and each such word doubles it: a link that breaks all the time still brings something across each
/// time, because not everything is on its way when it breaks.
const WINDOW_BYTES: u64 = 1 << 20;
const WINDOW_BYTES_FIRST: u64 = 8 << 10;
/// The same as a number of messages.
const WINDOW: u64 = 64;
const WINDOW_FIRST: u64 = 4;

/// One lane of numbered messages.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    stored: u64,
    sent: u64,
    /// Lengths of what follows `stored`, in order; `None` where the content is lost.
    waiting: VecDeque<Option<u64>>,
    bytes: u64,
    /// The highest number that can ever have been sent: by this process, or by one before it.
    known: u64,
    /// How often the window has been doubled in this session.
    doubled: u32,
}

/// What to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The message of this number.
    Message(u64),
    /// That `count` messages up to `through` are lost.
    Lost { through: u64, count: u64 },
}

impl Lane {
    /// A lane as a journal held it: everything after `stored` that is not in `messages` is lost.
    pub(crate) fn load(stored: u64, messages: impl Iterator<Item = (u64, u64)>) -> Self {
        let mut lane = Self { stored, sent: stored, ..Self::default() };
        for (number, bytes) in messages {
            // A number that far ahead is no number of ours.
            let ahead = number.saturating_sub(lane.last());
            if number <= lane.last() || ahead > 1 << 24 {
                continue;
            }
            lane.waiting.extend((1..ahead).map(|_| None));
            lane.waiting.push_back(Some(bytes));
            lane.bytes += bytes;
        }
        lane.known = lane.last();
        lane
    }

    /// The highest number given out.
    pub(crate) fn last(&self) -> u64 {
        self.stored.saturating_add(u64::try_from(self.waiting.len()).unwrap_or(u64::MAX))
    }

    /// No number above this one has been sent yet: the manager must not know one.
    pub(crate) fn expect_at_most(&mut self, number: u64) {
        self.known = number.min(self.last());
    }

    /// The highest number that is stored.
    pub(crate) fn stored(&self) -> u64 {
        self.stored
    }

    /// Bytes that wait, sent or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives a message of `bytes` bytes the next number.
    pub(crate) fn push(&mut self, bytes: u64) -> u64 {
        self.waiting.push_back(Some(bytes));
        self.bytes += bytes;
        self.last()
    }

    /// The content of `number` cannot be read.
    pub(crate) fn lose(&mut self, number: u64) {
        if let Some(slot) = self.slot(number)
            && let Some(bytes) = self.waiting.get_mut(slot).and_then(Option::take)
        {
            self.bytes -= bytes;
            self.sent = self.sent.min(number.saturating_sub(1));
        }
    }

    /// Whether a message of this number waits.
    pub(crate) fn holds(&self, number: u64) -> bool {
        self.slot(number).is_some_and(|slot| matches!(self.waiting.get(slot), Some(Some(_))))
    }

    /// A session begins and its manager has stored up to here: what follows is sent again.
    ///
    /// # Errors
    /// If the manager has stored what was never sent from here: this journal is older than what it has seen
    /// (its end was cut off, or the machine was set back to an earlier state). If it no longer has what it had
    /// stored: then it was set back itself, and what is missing there is gone here.
    pub(crate) fn connected(&mut self, stored: u64) -> Result<(), GoneBack> {
        if stored > self.known || stored < self.stored {
            return Err(GoneBack);
        }
        self.let_go(stored);
        self.sent = self.stored;
        self.doubled = 0;
        Ok(())
    }

    /// The manager has stored up to here. It cannot have stored what was not sent to it.
    pub(crate) fn stored_through(&mut self, through: u64) {
        self.doubled = self.doubled.saturating_add(u32::from(self.stored < through)).min(16);
        self.let_go(through.min(self.known));
    }

    fn let_go(&mut self, through: u64) {
        while self.stored < through.min(self.last()) {
            self.stored += 1;
            self.bytes -= self.waiting.pop_front().flatten().unwrap_or(0);
        }
        self.sent = self.sent.max(self.stored);
    }

    /// What to send next while the window has room. It counts as sent.
    pub(crate) fn next(&mut self) -> Option<Next> {
        let number = self.sent.saturating_add(1);
        let slot = self.slot(number)?;
        let under_way: u64 = self.waiting.iter().take(slot).flatten().sum();
        let window = (WINDOW_FIRST << self.doubled).min(WINDOW);
        let window_bytes = (WINDOW_BYTES_FIRST << self.doubled).min(WINDOW_BYTES);
        if self.sent - self.stored >= window || under_way >= window_bytes {
            return None;
        }
        if self.waiting.get(slot)?.is_some() {
            self.sent = number;
            self.known = self.known.max(self.sent);
            return Some(Next::Message(number));
        }
        let count = u64::try_from(self.waiting.iter().skip(slot).take_while(|m| m.is_none()).count()).ok()?;
        self.sent += count;
        self.known = self.known.max(self.sent);
        Some(Next::Lost { through: self.sent, count })
    }

    fn slot(&self, number: u64) -> Option<usize> {
        let ahead = number.checked_sub(self.stored)?.checked_sub(1)?;
        usize::try_from(ahead).ok().filter(|slot| *slot < self.waiting.len())
    }
}

/// The manager has stored more than this lane has ever sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GoneBack;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_told_and_the_window_holds() {
        let mut lane = Lane::load(2, [(3, 10), (6, 10), (7, 10)].into_iter());
        assert_eq!((lane.last(), lane.bytes()), (7, 30));
        let all: Vec<Next> = std::iter::from_fn(|| lane.next()).collect();
        assert_eq!(
            all,
            [Next::Message(3), Next::Lost { through: 5, count: 2 }, Next::Message(6)],
            "the seventh is one too many at first"
        );
        lane.stored_through(6);
        assert_eq!((lane.stored(), lane.bytes(), lane.holds(7), lane.holds(6)), (6, 10, true, false));
        assert_eq!(lane.connected(8), Err(GoneBack));
        assert_eq!(lane.connected(6), Ok(()));
        lane.lose(7);
        assert_eq!(lane.next(), Some(Next::Lost { through: 7, count: 1 }));
        for _ in 0..200 {
            lane.push(1);
        }
        // Three more are under way at first; what is stored makes room for more and more.
        let mut counts = Vec::new();
        for _ in 0..4 {
            counts.push(std::iter::from_fn(|| lane.next()).count());
            lane.stored_through(lane.sent);
        }
        assert_eq!(counts, [3, 8, 16, 32]);
        assert_eq!(std::iter::from_fn(|| lane.next()).count(), 64);
        lane.stored_through(u64::MAX);
        assert_eq!((lane.stored(), lane.last()), (130, 207), "what was never sent is not stored");
        while lane.next().is_some() {}
        lane.stored_through(u64::MAX);
        while lane.next().is_some() {}
        lane.stored_through(u64::MAX);
        assert!(lane.waiting.is_empty());
        assert_eq!((lane.bytes(), lane.last()), (0, 207));
    }

    /// A machine that is set back with all its memory does not know what it has sent since.
    #[test]
    fn a_manager_that_knows_more_than_was_sent_is_noticed_also_within_a_process() {
        let mut lane = Lane::load(0, [(1, 1), (2, 1)].into_iter());
        assert_eq!(lane.connected(0), Ok(()));
        assert_eq!(std::iter::from_fn(|| lane.next()).count(), 2);
        // It goes on without a link; the manager has seen another 3 and 4 before.
        for _ in 0..5 {
            lane.push(1);
        }
        assert_eq!(lane.connected(4), Err(GoneBack));
        assert_eq!(lane.connected(2), Ok(()), "the control");
        assert_eq!(lane.connected(1), Err(GoneBack), "a manager that has forgotten what it had stored");
    }
}
