//! How far a scan is, for a person: one line that is written over on a terminal, a line now and then elsewhere.
//!
//! **Invariant:** a line on a terminal is never longer than the terminal is wide, and is drawn at most ten times a second;
//! elsewhere there is at most one line in five seconds.
//! **Invariant:** time left is told only while it is known how much there is, and marked as an estimate.

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _, Write},
    time::{Duration, Instant},
};

use tm_protocol::{
    report::{Coverage, PathBytes},
    text::escape,
};

use super::{
    ahead::{Ahead, Total},
    report::Format,
    units::show_size,
};

/// The shortest time between two draws on a terminal.
const DRAW: Duration = Duration::from_millis(100);
/// The shortest time between two lines elsewhere.
const LINE: Duration = Duration::from_secs(5);
/// The time that a rate is worked out of.
const WINDOW: Duration = Duration::from_secs(5);
/// How long a scan takes before anything is said of the time left.
const SETTLED: Duration = Duration::from_secs(3);
/// How many bytes cost as much as one file does by itself, roughly.
const FILE_COST: u64 = 64 << 10;
/// Of what width a terminal is taken to be that does not say.
const WIDTH: usize = 80;
/// The fewest columns that a path is shown in.
const LEAST_PATH: usize = 12;
const CLEAR: &str = "\r\x1b[K";

/// When progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum When {
    /// On a terminal; elsewhere now and then, unless results are for programs
    Auto,
    /// On a terminal, and now and then elsewhere
    Always,
    /// Never
    Never,
}

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// One line that is written over.
    Terminal,
    /// A line now and then.
    Lines,
}

impl When {
    /// How progress is shown on standard error, if it is.
    pub(super) fn style(self, format: Format) -> Option<Style> {
        self.style_on(io::stderr().is_terminal(), format)
    }

    fn style_on(self, is_terminal: bool, format: Format) -> Option<Style> {
        match (self, is_terminal, format) {
            (Self::Never, _, _) | (Self::Auto, false, Format::Json) => None,
            (Self::Auto | Self::Always, true, _) => Some(Style::Terminal),
            (Self::Auto, false, Format::Text) | (Self::Always, false, _) => Some(Style::Lines),
        }
    }
}

/// Shows how far a scan is.
#[derive(Debug)]
pub(super) struct Progress<W: Write> {
    out: W,
    style: Style,
    width: fn() -> usize,
    started: Instant,
    last: Option<Instant>,
    is_shown: bool,
    now: Option<String>,
    ahead: Option<Ahead>,
    rate: Rate,
}

impl<W: Write> Progress<W> {
    /// Nothing is shown yet. `width` tells how wide the terminal is; `ahead` counts what there is.
    pub(super) fn new(out: W, style: Style, width: fn() -> usize, ahead: Option<Ahead>) -> Self {
        let started = Instant::now();
        let rate = Rate::default();
        Self { out, style, width, started, last: None, is_shown: false, now: None, ahead, rate }
    }

    /// What is looked at now.
    pub(super) fn looks_at(&mut self, path: &PathBytes) {
        self.now = Some(escape(&path.0));
    }

    /// So much is done at `at`.
    pub(super) fn show(&mut self, coverage: &Coverage, at: Instant) {
        self.rate.note(at, coverage.files, coverage.bytes);
        let pace = match self.style {
            Style::Terminal => DRAW,
            Style::Lines => LINE,
        };
        let since = self.last.unwrap_or(self.started);
        let is_first = self.last.is_none() && self.style == Style::Terminal;
        if !is_first && at.saturating_duration_since(since) < pace {
            return;
        }
        self.last = Some(at);
        let total = self.ahead.as_ref().and_then(Ahead::total);
        let elapsed = at.saturating_duration_since(self.started);
        let text = text(coverage, total, self.rate.now(), elapsed);
        let now = self.now.as_deref();
        // Progress is a courtesy; a terminal that went away does not stop the scan.
        let _ = match self.style {
            Style::Terminal => {
                self.is_shown = true;
                // The last column stays free: some terminals go on to the next line when it is filled.
                let line = fit(&text, now, (self.width)().saturating_sub(1));
                write!(self.out, "{CLEAR}{line}").and_then(|()| self.out.flush())
            }
            Style::Lines => match now {
                Some(now) => writeln!(self.out, "{text}: {now}"),
                None => writeln!(self.out, "{text}"),
            },
        };
    }

    /// Takes the line away.
    pub(super) fn clear(&mut self) {
        if self.is_shown {
            let _ = write!(self.out, "{CLEAR}").and_then(|()| self.out.flush());
            self.is_shown = false;
        }
    }

    /// CPU time that it took to count what there is, in milliseconds.
    pub(super) fn cpu_ms(&self) -> u64 {
        self.ahead.as_ref().map_or(0, Ahead::cpu_ms)
    }
}

/// How wide the terminal on standard error is, in columns.
pub(super) fn terminal_width() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stderr()).map_or(0, |size| usize::from(size.ws_col));
    if size == 0 { WIDTH } else { size }
}

/// What was done when, for as long as a rate looks back.
#[derive(Debug, Default)]
struct Rate(VecDeque<(Instant, u64, u64)>);

impl Rate {
    fn note(&mut self, at: Instant, files: u64, bytes: u64) {
        self.0.push_back((at, files, bytes));
        // The one before the window is where it begins.
        while self.0.get(1).is_some_and(|(then, ..)| at.saturating_duration_since(*then) >= WINDOW) {
            self.0.pop_front();
        }
    }

    /// Megabytes a second, or files a second where there are few.
    fn now(&self) -> Option<String> {
        let ((then, files, bytes), (at, more_files, more_bytes)) = (self.0.front()?, self.0.back()?);
        let seconds = at.saturating_duration_since(*then).as_secs_f64();
        if seconds < 0.5 {
            return None;
        }
        let each = |before: u64, after: u64| float(after.saturating_sub(before)) / seconds;
        let megabytes = each(*bytes, *more_bytes) / 1e6;
        Some(match megabytes {
            m if m >= 100.0 => format!("{m:.0} MB/s"),
            m if m >= 1.0 => format!("{m:.1} MB/s"),
            _ => format!("{:.0} files/s", each(*files, *more_files)),
        })
    }
}

/// What is done, how fast, and how long it will take.
fn text(coverage: &Coverage, total: Option<Total>, rate: Option<String>, elapsed: Duration) -> String {
    // What grew since it was counted has no known end.
    let total = total.filter(|total| total.files >= coverage.files && total.bytes >= coverage.bytes);
    let files = match total {
        Some(total) => format!("{} of {}", coverage.files, total.files),
        None => coverage.files.to_string(),
    };
    let mut parts = vec![format!("{files} files"), show_size(coverage.bytes)];
    parts.extend(rate);
    parts.extend(total.and_then(|total| left(coverage, total, elapsed)));
    match coverage.detections {
        0 => {}
        1 => parts.push("1 detection".to_owned()),
        count => parts.push(format!("{count} detections")),
    }
    parts.join(", ")
}

/// The time left, once there is something to work it out of.
fn left(coverage: &Coverage, total: Total, elapsed: Duration) -> Option<String> {
    let work = |files: u64, bytes: u64| float(files) * float(FILE_COST) + float(bytes);
    let (done, all) = (work(coverage.files, coverage.bytes), work(total.files, total.bytes));
    if elapsed < SETTLED || done < all / 100.0 || done <= 0.0 {
        return None;
    }
    let seconds = elapsed.as_secs_f64() * (all - done) / done;
    Some(match seconds {
        s if s < 55.0 => format!("about {:.0} s left", (s / 5.0).ceil().max(1.0) * 5.0),
        s if s < 90.0 * 60.0 => format!("about {:.0} min left", (s / 60.0).ceil()),
        s => format!("about {:.0} h left", (s / 3600.0).ceil()),
    })
}

/// As much as fits in `width` columns: the beginning of `text`, and then the end of a path.
fn fit(text: &str, path: Option<&str>, width: usize) -> String {
    let used = columns(text);
    let Some(path) = path.filter(|_| used + 2 + LEAST_PATH <= width) else {
        return take(text.chars(), width).into_iter().collect();
    };
    let room = width - used - 2;
    if columns(path) <= room {
        return format!("{text}: {path}");
    }
    // The file's own name stands at the end.
    let end = take(path.chars().rev(), room - 3);
    format!("{text}: ...{}", end.into_iter().rev().collect::<String>())
}

fn take(chars: impl Iterator<Item = char>, width: usize) -> Vec<char> {
    let mut used = 0;
    let fits = |c: &char| {
        used += column(*c);
        used <= width
    };
    chars.take_while(fits).collect()
}

fn columns(text: &str) -> usize {
    text.chars().map(column).sum()
}

/// How many columns a character takes at most.
fn column(c: char) -> usize {
    if c.is_ascii() { 1 } else { 2 }
}

#[expect(clippy::cast_precision_loss, reason = "shown with few digits")]
fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coverage(files: u64, bytes: u64) -> Coverage {
        Coverage { files, bytes, ..Coverage::default() }
    }

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn it_is_shown_where_somebody_looks() {
        use {Format::*, Style::*, When::*};
        for (when, is_terminal, format, expected) in [
            (Auto, true, Text, Some(Terminal)),
            (Auto, true, Json, Some(Terminal)),
            (Auto, false, Text, Some(Lines)),
            (Auto, false, Json, None),
            (Always, false, Json, Some(Lines)),
            (Always, true, Json, Some(Terminal)),
            (Never, true, Text, None),
            (Never, false, Text, None),
        ] {
            assert_eq!(when.style_on(is_terminal, format), expected, "{when:?} {is_terminal} {format:?}");
        }
    }

    #[test]
    fn time_left_is_told_when_it_is_known_and_never_before() {
        let total = Total { files: 1000, bytes: 1000 << 20 };
        for (done, total, elapsed, expected) in [
            (coverage(500, 500 << 20), Some(total), S(60), Some("about 1 min left")),
            (coverage(250, 250 << 20), Some(total), S(60), Some("about 3 min left")),
            (coverage(900, 900 << 20), Some(total), S(60), Some("about 10 s left")),
            (coverage(990, 990 << 20), Some(total), S(60), Some("about 5 s left")),
            (coverage(1000, 1000 << 20), Some(total), S(60), Some("about 5 s left")),
            (coverage(100, 100 << 20), Some(total), S(7200), Some("about 18 h left")),
            (coverage(500, 500 << 20), None, S(60), None),
            (coverage(500, 500 << 20), Some(total), S(2), None),
            (coverage(5, 5 << 20), Some(total), S(60), None),
            (coverage(1001, 500 << 20), Some(total), S(60), None),
            (coverage(500, 1001 << 20), Some(total), S(60), None),
            (coverage(0, 0), Some(Total { files: 0, bytes: 0 }), S(60), None),
        ] {
            let text = text(&done, total, None, elapsed);
            match expected {
                Some(left) => assert!(text.ends_with(left), "{text}"),
                None => assert!(!text.contains("left"), "{text}"),
            }
        }
    }

    #[test]
    fn a_rate_is_of_the_last_seconds() {
        let start = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.now(), None);
        rate.note(start, 0, 0);
        assert_eq!(rate.now(), None);
        rate.note(start + S(1), 10, 5_000_000);
        assert_eq!(rate.now().as_deref(), Some("5.0 MB/s"));
        for s in 2..=20 {
            rate.note(start + S(s), 10 + 200 * s, 5_000_000);
        }
        assert_eq!(rate.now().as_deref(), Some("200 files/s"), "what was long ago counts no more");
        assert!(rate.0.len() < 8);
        rate.note(start + S(21), 5000, 10_005_000_000);
        assert_eq!(rate.now().as_deref(), Some("2000 MB/s"));
    }

    #[test]
    fn a_line_fits_the_terminal_whatever_a_file_is_called() {
        let text = "12 files, 1.5 KiB, 3 files/s";
        for name in [
            &b"/short"[..],
            "/日本/日本/日本/日本/日本/日本/日本/日本/日本/日本/日本/日本/名.txt".as_bytes(),
            b"/esc\x1b[2J\x1b]0;owned\x07/\r\n/\xff\xfe/end.exe",
            "/\u{202e}gpj.exe/e\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}/\u{200b}".as_bytes(),
            &[b'a'; 5000],
            b"",
        ] {
            let path = escape(name);
            for width in [0, 1, 19, 30, 43, 44, 79, 200] {
                let line = fit(text, Some(&path), width);
                assert!(columns(&line) <= width, "{width}: {line}");
                assert!(!line.chars().any(char::is_control), "{line:?}");
                assert!(text.starts_with(&line) || line.starts_with(text), "{line}");
            }
        }
        assert_eq!(fit("a", Some("/some/where/far/away/name.txt"), 20), "a: .../away/name.txt");
        assert_eq!(fit("a", Some("/name.txt"), 20), "a: /name.txt");
    }

    #[test]
    fn it_is_drawn_now_and_then_and_taken_away() {
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, Style::Terminal, || 20, None);
        let start = progress.started;
        for ms in 0..1000 {
            progress.looks_at(&PathBytes::from(&b"/x"[..]));
            progress.show(&coverage(ms, 0), start + Duration::from_millis(ms));
        }
        progress.clear();
        progress.clear();
        let text = String::from_utf8(out).unwrap();
        assert!(text.ends_with(CLEAR) && !text.ends_with(&format!("{CLEAR}{CLEAR}")));
        assert_eq!(text.matches(CLEAR).count(), 10 + 1, "{text:?}");
        assert!(!text.contains('\n'));

        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, Style::Lines, || 20, None);
        let start = progress.started;
        for s in 0..60 {
            progress.looks_at(&PathBytes::from(&b"/a\nb"[..]));
            progress.show(&coverage(s, 0), start + S(s));
        }
        progress.clear();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 11, "{text}");
        assert_eq!(text.lines().next(), Some(r"5 files, 0 B, 1 files/s: /a\nb"));
        assert!(!text.contains('\x1b') && !text.contains('\r'));
    }
}
