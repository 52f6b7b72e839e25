//! Standard output for data (table, JSON or CSV), standard error for talk.
//!
//! **Invariant:** a closed pipe is a quiet end: what nobody reads is not an error, and the exit code still
//! says how the work went.

use std::{
    cell::Cell,
    io::{self, IsTerminal as _, Write as _},
};

use clap::ValueEnum;
use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width, presets};
use serde::Serialize;
use tm_protocol::text::{csv_cell, escape_for_display};

use crate::failure::Failure;

/// How data are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns for people.
    Table,
    /// Everything, with paths' exact bytes in base64.
    Json,
    /// For spreadsheets (RFC 4180, but lines end as the system ends them); a cell is never a formula.
    Csv,
}

/// One column of a kind of row.
#[derive(Debug)]
pub(crate) struct Column<T> {
    name: &'static str,
    cell: fn(&T) -> String,
    /// Too much for a table of many rows: only in CSV and where one row is shown.
    wide: bool,
    shape: Shape,
}

/// How a table treats a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Broken into lines where the terminal is narrow.
    Text,
    /// Never broken: people copy it.
    Id,
    /// RFC 3339; people see the seconds, and a blank where a narrow table may break it.
    Time,
}

impl<T> Column<T> {
    /// A column everywhere.
    pub(crate) const fn narrow(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: false, shape: Shape::Text }
    }

    /// A column in CSV and where one row is shown.
    pub(crate) const fn wide(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: true, shape: Shape::Text }
    }

    /// A column everywhere, whose cells stay in one piece.
    pub(crate) const fn id(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: false, shape: Shape::Id }
    }

    /// A column everywhere, of times in RFC 3339.
    pub(crate) const fn time(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: false, shape: Shape::Time }
    }

    /// A column of times in CSV and where one row is shown.
    pub(crate) const fn wide_time(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: true, shape: Shape::Time }
    }

    /// The cell for people.
    fn shown(&self, row: &T) -> String {
        let cell = escape_for_display(&(self.cell)(row));
        match self.shape {
            Shape::Text | Shape::Id => cell,
            Shape::Time => time_for_people(&cell),
        }
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Output {
    format: Format,
    closed: Cell<bool>,
    /// What was printed, instead of printing it.
    #[cfg(test)]
    kept: Option<std::cell::RefCell<Vec<u8>>>,
}

impl Output {
    /// Prints in this format.
    pub(crate) const fn new(format: Format) -> Self {
        Self {
            format,
            closed: Cell::new(false),
            #[cfg(test)]
            kept: None,
        }
    }

    /// Keeps what it would print.
    #[cfg(test)]
    pub(crate) fn kept(format: Format) -> Self {
        Self { kept: Some(std::cell::RefCell::default()), ..Self::new(format) }
    }

    /// What it would have printed.
    #[cfg(test)]
    pub(crate) fn text_kept(&self) -> String {
        String::from_utf8(self.kept.as_ref().unwrap().borrow().clone()).unwrap()
    }

    /// Whether its reader has gone: what never ends by itself ends then.
    pub(crate) const fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// The format that was asked for.
    pub(crate) const fn format(&self) -> Format {
        self.format
    }

    /// Prints rows. An empty table prints its header only as CSV; people are told on standard error.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn list<T: Serialize>(
        &self,
        rows: &[T],
        columns: &[Column<T>],
        none: &str,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table if rows.is_empty() => {
                say(&format!("{none}\n"));
                Ok(())
            }
            Format::Table => self.text(&table(rows, columns, width(&io::stdout()))),
            Format::Json => self.json(&rows),
            Format::Csv => self.csv(rows, columns),
        }
    }

    /// Prints one thing.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn one<T: Serialize>(&self, row: &T, columns: &[Column<T>]) -> Result<(), Failure> {
        match self.format {
            Format::Table => self.text(&card(row, columns, width(&io::stdout()))),
            Format::Json => self.json(row),
            Format::Csv => self.text(&csv(std::slice::from_ref(row), columns)),
        }
    }

    /// Prints rows as CSV, header first.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn csv<T>(&self, rows: &[T], columns: &[Column<T>]) -> Result<(), Failure> {
        self.text(&csv(rows, columns))
    }

    /// Prints rows as CSV that go on below a header.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn csv_more<T>(&self, rows: &[T], columns: &[Column<T>]) -> Result<(), Failure> {
        self.text(&csv_rows(rows, columns))
    }

    /// Prints one line of text of unknown origin.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn line(&self, text: &str) -> Result<(), Failure> {
        self.text(&(escape_for_display(text) + "\n"))
    }

    /// Prints JSON.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn json(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Output(error.into()))?;
        // JSON strings escape C0 only; a terminal obeys more than that.
        self.text(&(json_for_display(&text) + "\n"))
    }

    /// Prints JSON on one line, for what goes on and on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn json_line(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(value).map_err(|error| Failure::Output(error.into()))?;
        self.text(&(json_for_display(&text) + "\n"))
    }

    /// Prints lines that are harmless already.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        self.raw(text.as_bytes())
    }

    /// Prints bytes of our own making.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Result<(), Failure> {
        #[cfg(test)]
        if let Some(kept) = &self.kept {
            kept.borrow_mut().extend_from_slice(bytes);
            return Ok(());
        }
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed.set(true);
                Ok(())
            }
            Err(error) => Err(Failure::Output(error)),
        }
    }
}

/// Says something to the person; if nobody listens, there is nobody to tell.
pub(crate) fn say(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Says a line in the place of a progress line, if there is one.
pub(crate) fn say_over(text: &str) {
    let clear = if io::stderr().is_terminal() { "\r\u{1b}[K" } else { "" };
    say(&format!("{clear}{text}\n"));
}

/// How many columns the terminal has; `None` if it is none.
pub(crate) fn width<F: std::os::fd::AsFd + io::IsTerminal>(file: &F) -> Option<u16> {
    let size = file.is_terminal().then(|| rustix::termios::tcgetwinsize(file).ok()).flatten()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

/// `1 file`, `2 files`.
pub(crate) fn plural(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// What to type for an endpoint in a suggested command. A host name is what its endpoint says: one that a
/// shell or our own command line could take for something else is not suggested, its id is.
pub(crate) fn target_word(host: &str, id: &str) -> String {
    let is_plain = host.starts_with(|c: char| c.is_ascii_alphanumeric())
        && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    escape_for_display(if is_plain { host } else { id })
}

/// Aligned columns without borders, wrapped to `width` where there is one.
pub(crate) fn table<T>(rows: &[T], columns: &[Column<T>], width: Option<u16>) -> String {
    let columns: Vec<&Column<T>> = columns.iter().filter(|column| !column.wide).collect();
    let cells: Vec<Vec<String>> =
        rows.iter().map(|row| columns.iter().map(|column| column.shown(row)).collect()).collect();
    let header: Vec<String> =
        columns.iter().map(|column| column.name.to_uppercase().replace('_', " ")).collect();
    let last = columns.len().saturating_sub(1);
    let least: usize = columns
        .iter()
        .enumerate()
        .map(|(index, column)| {
            let all = std::iter::once(&header).chain(&cells);
            let widest = all.map(|row| row[index].chars().count()).max().unwrap_or(0);
            let needed = if column.shape == Shape::Id { widest } else { widest.min(LEAST) };
            needed + if index == last { 0 } else { GAP }
        })
        .sum();
    // Columns of two letters are harder to read than lines that the terminal breaks.
    let mut table = plain_table(width.filter(|width| least <= usize::from(*width)));
    table.set_header(header);
    for row in cells {
        table.add_row(row);
    }
    for (index, column) in columns.iter().enumerate() {
        let constraint = match column.shape {
            Shape::Text => None,
            Shape::Id => Some(ColumnConstraint::ContentWidth),
            // As wide as a date.
            Shape::Time => Some(ColumnConstraint::LowerBoundary(Width::Fixed(12))),
        };
        if let (Some(constraint), Some(column)) = (constraint, table.column_mut(index)) {
            column.set_constraint(constraint);
        }
    }
    finish(table)
}

/// Blanks between two columns.
const GAP: usize = 2;
/// What a column that may be broken needs at least.
const LEAST: usize = 10;

/// One thing, a line for each of its columns that is not empty.
pub(crate) fn card<T>(row: &T, columns: &[Column<T>], width: Option<u16>) -> String {
    let mut table = plain_table(width);
    for column in columns {
        let cell = column.shown(row);
        if !cell.is_empty() {
            table.add_row([column.name.replace('_', " "), cell]);
        }
    }
    finish(table)
}

fn plain_table(width: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    match width {
        Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table
}

fn finish(mut table: Table) -> String {
    let last = table.column_count().saturating_sub(1);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index == last { 0 } else { 2 }));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn csv<T>(rows: &[T], columns: &[Column<T>]) -> String {
    let header: Vec<&str> = columns.iter().map(|column| column.name).collect();
    header.join(",") + "\n" + &csv_rows(rows, columns)
}

fn csv_rows<T>(rows: &[T], columns: &[Column<T>]) -> String {
    let cells = |row| columns.iter().map(|column| csv_cell(&(column.cell)(row))).collect::<Vec<_>>();
    rows.iter().map(|row| cells(row).join(",") + "\n").collect()
}

/// `2026-01-02T03:04:05.678Z` as `2026-01-02 03:04:05Z`; what is not a time stays as it is.
pub(crate) fn time_for_people(text: &str) -> String {
    text.parse::<jiff::Timestamp>()
        .map_or_else(|_| text.to_owned(), |at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string())
}

/// The same JSON, with what a terminal would obey written as `\uXXXX`.
fn json_for_display(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let mut buffer = [0; 4];
        let one: &str = c.encode_utf8(&mut buffer);
        // Outside strings, JSON of our making holds no such character but line ends.
        if c == '\n' || escape_for_display(one) == one {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// Bytes for people: `512 B`, `1.5 KiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut whole, mut tenths, mut unit) = (count, 0, "B");
    for next in UNITS {
        if whole < 1024 {
            break;
        }
        tenths = whole % 1024 * 10 / 1024;
        whole /= 1024;
        unit = next;
    }
    format!("{whole}.{tenths} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Row {
        host: &'static str,
        path: &'static str,
    }

    const COLUMNS: [Column<Row>; 3] = [
        Column::narrow("host", |row| row.host.to_owned()),
        Column::narrow("the_path", |row| row.path.to_owned()),
        Column::wide("length", |row| row.path.len().to_string()),
    ];

    const ROWS: [Row; 2] =
        [Row { host: "web-01", path: "=1+1,\"x\"" }, Row { host: "w", path: "\u{1b}[2J\u{202e}" }];

    #[test]
    fn a_table_is_aligned_plain_and_harmless() {
        assert_eq!(
            table(&ROWS, &COLUMNS, None),
            "HOST    THE PATH\nweb-01  =1+1,\"x\"\nw       \\u{1b}[2J\\u{202e}\n"
        );
        let narrow = table(&ROWS, &COLUMNS, Some(20));
        assert!(narrow.lines().all(|line| line.chars().count() <= 20), "{narrow}");
    }

    #[test]
    fn csv_has_every_column_and_no_formula() {
        assert_eq!(
            csv(&ROWS, &COLUMNS),
            "host,the_path,length\nweb-01,\"'=1+1,\"\"x\"\"\",8\nw,\\u{1b}[2J\\u{202e},7\n"
        );
    }

    #[test]
    fn what_people_copy_stays_in_one_piece_and_times_are_short() {
        const COLUMNS: [Column<Row>; 3] = [
            Column::id("id", |_| "018f3c1e-6b5a-7000-8000-0123456789ab".to_owned()),
            Column::time("at", |_| "2026-01-02T03:04:05.678Z".to_owned()),
            Column::narrow("path", |row| format!("/a/long/path/that/has/to/be/broken/{}", row.host)),
        ];
        let narrow = table(&ROWS, &COLUMNS, Some(80));
        assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
        assert_eq!(narrow.matches("018f3c1e-6b5a-7000-8000-0123456789ab").count(), 2, "{narrow}");
        assert!(narrow.contains("2026-01-02"), "{narrow}");
        assert!(!narrow.contains(".678"), "{narrow}");
        // Where even the ids do not fit, the terminal breaks the lines.
        assert_eq!(table(&ROWS, &COLUMNS, Some(40)), table(&ROWS, &COLUMNS, None));
        assert!(csv(&ROWS, &COLUMNS).contains("2026-01-02T03:04:05.678Z"));
        assert_eq!(time_for_people("soon"), "soon");
    }

    #[test]
    fn a_suggested_command_is_safe_to_paste() {
        for (host, word) in [
            ("web-07.example", "web-07.example"),
            ("-o", "the-id"),
            ("web;reboot", "the-id"),
            ("$(reboot)", "the-id"),
            ("w b", "the-id"),
            ("", "the-id"),
            ("\u{202e}x", "the-id"),
        ] {
            assert_eq!(target_word(host, "the-id"), word, "{host:?}");
        }
    }

    #[test]
    fn json_keeps_its_meaning_and_cannot_move_a_cursor() {
        let value = serde_json::json!({"a": "\u{9b}2J \u{202e}x \u{e0041} ö\n"});
        let text = json_for_display(&serde_json::to_string_pretty(&value).unwrap());
        assert!(!text.contains(['\u{9b}', '\u{202e}', '\u{e0041}']) && text.contains('ö'), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn sizes_are_short() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
