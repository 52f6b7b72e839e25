//! Standard output for data (table, JSON or CSV), standard error for talk.
//!
//! **Invariant:** a closed pipe is a quiet end: what nobody reads is not an error, and the exit code still
//! says how the work went.

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
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
}

impl<T> Column<T> {
    /// A column everywhere.
    pub(crate) const fn narrow(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: false }
    }

    /// A column in CSV and where one row is shown.
    pub(crate) const fn wide(name: &'static str, cell: fn(&T) -> String) -> Self {
        Self { name, cell, wide: true }
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Output {
    format: Format,
}

impl Output {
    /// Prints in this format.
    pub(crate) const fn new(format: Format) -> Self {
        Self { format }
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
            Format::Table => self.text(&card(row, columns)),
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
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Says something to the person; if nobody listens, there is nobody to tell.
pub(crate) fn say(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// How many columns the terminal has; `None` if it is none.
pub(crate) fn width<F: std::os::fd::AsFd + io::IsTerminal>(file: &F) -> Option<u16> {
    let size = file.is_terminal().then(|| rustix::termios::tcgetwinsize(file).ok()).flatten()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

/// Whether standard error is a terminal that can show progress.
pub(crate) fn can_show_progress() -> bool {
    io::stderr().is_terminal()
}

/// Aligned columns without borders, wrapped to `width` where there is one.
pub(crate) fn table<T>(rows: &[T], columns: &[Column<T>], width: Option<u16>) -> String {
    let columns: Vec<&Column<T>> = columns.iter().filter(|column| !column.wide).collect();
    let mut table = plain_table(width);
    table.set_header(columns.iter().map(|column| column.name.to_uppercase().replace('_', " ")));
    for row in rows {
        table.add_row(columns.iter().map(|column| escape_for_display(&(column.cell)(row))));
    }
    finish(table)
}

/// One thing, a line for each of its columns that is not empty.
fn card<T>(row: &T, columns: &[Column<T>]) -> String {
    let mut table = plain_table(width(&io::stdout()));
    for column in columns {
        let cell = escape_for_display(&(column.cell)(row));
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
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn csv<T>(rows: &[T], columns: &[Column<T>]) -> String {
    let header = columns.iter().map(|column| column.name.to_owned()).collect();
    let lines = rows.iter().map(|row| columns.iter().map(|column| csv_cell(&(column.cell)(row))).collect());
    std::iter::once(header).chain(lines).map(|cells: Vec<String>| cells.join(",") + "\n").collect()
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
