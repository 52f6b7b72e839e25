//! How far a scan is, as a person sees it: on a terminal of any width, whatever files are called, and in a pipe.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tempfile::TempDir;
use tm_tests::{Output, bin};

/// Each file of some size takes as long as it may.
const RULES: &str = "rule slow { condition: filesize > 100 and for all i in (0..100000000000) : \
    (for all j in (0..100000000000) : (i + j >= 0)) }\n\
    rule found { strings: $a = \"find-me-here\" condition: $a and filesize <= 100 }\n";

/// Files that take some seconds, with names that would like to be more than names.
fn folder(slow: usize) -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folders work");
    fs::write(folder.path().join("rules.yar"), RULES).expect("a temporary folder is writable");
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).expect("a temporary folder is writable");
    let names: [&[u8]; 4] = [
        b"esc\x1b[2J\x1b]0;owned\x07\x1b[31m",
        "日本日本日本日本日本日本日本日本日本日本日本日本日本日本".as_bytes(),
        b"new\nline\r\xff\xfe\xc2\x9b2J",
        &[b'l'; 200],
    ];
    for n in 0..slow {
        let mut name = format!("{n}-").into_bytes();
        name.extend_from_slice(names[n % names.len()]);
        let path = tree.join(OsStr::from_bytes(&name));
        fs::write(path, [b'x'; 200]).expect("a temporary folder is writable");
        fs::write(tree.join(format!("{n}-found")), "find-me-here").expect("a temporary folder is writable");
    }
    folder
}

fn scan(folder: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(bin("tm-agent"));
    command.args(["scan", "--standalone", "--threads", "1", "--file-timeout", "600ms", "--pattern"]);
    command.arg(folder.join("rules.yar")).args(more).arg("--").arg(folder.join("tree"));
    command.stdin(Stdio::null());
    command
}

/// Runs a command on a terminal: what it wrote there, and how long it took.
fn on_terminal(mut command: Command, columns: u16, with_results: bool) -> (String, Duration, i32) {
    let ours =
        openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("there are terminals");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("a terminal can be used");
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&ours, size).expect("a terminal has a size");
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let theirs = ioctl_tiocgptpeer(&ours, flags).expect("a terminal has two ends");
    command.stderr(theirs.try_clone().expect("a descriptor can be shared"));
    if with_results {
        command.stdout(theirs);
    } else {
        command.stdout(Stdio::null());
        drop(theirs);
    }
    let started = Instant::now();
    let mut child = command.spawn().expect("programs can be run");
    // It holds the other end of the terminal.
    drop(command);
    let (mut text, mut ours) = (Vec::new(), File::from(ours));
    let mut some = [0; 4096];
    // The end of the other side is told as an error.
    while let Ok(length @ 1..) = ours.read(&mut some) {
        text.extend_from_slice(&some[..length]);
    }
    let status = child.wait().expect("a child ends");
    (String::from_utf8(text).expect("text is UTF-8"), started.elapsed(), status.code().unwrap_or(-1))
}

/// What stands on a terminal in the end, row by row; and for each text that was written over, how wide it was.
fn shown(text: &str, columns: usize) -> (Vec<String>, Vec<(String, usize)>) {
    let mut rows: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column, mut drawn) = (0, 0, Vec::new());
    let mut rest = text.chars().peekable();
    let mut line: Option<(String, usize)> = None;
    while let Some(c) = rest.next() {
        match c {
            // The terminal makes both of the end of a line, and that line stays.
            '\r' if rest.peek() == Some(&'\n') => {
                line = None;
                column = 0;
            }
            '\r' => {
                drawn.extend(line.take());
                column = 0;
            }
            '\n' => {
                row += 1;
                rows.resize(rows.len().max(row + 1), Vec::new());
            }
            '\x1b' => {
                let sequence: String = rest.by_ref().take(2).collect();
                assert_eq!(sequence, "[K", "no other sequence");
                rows[row].truncate(column);
                line = Some((String::new(), 0));
            }
            c => {
                assert!(!c.is_control(), "{c:?} in {text:?}");
                let wide = if c.is_ascii() { 1 } else { 2 };
                if column + wide > columns {
                    row += 1;
                    column = 0;
                    rows.resize(rows.len().max(row + 1), Vec::new());
                }
                rows[row].truncate(column);
                rows[row].extend(std::iter::once(c).chain(std::iter::repeat_n('\0', wide - 1)));
                column += wide;
                if let Some((text, width)) = &mut line {
                    text.push(c);
                    *width += wide;
                }
            }
        }
    }
    let rows = rows.into_iter().map(|row| row.into_iter().filter(|c| *c != '\0').collect());
    (rows.filter(|row: &String| !row.is_empty()).collect(), drawn)
}

#[test]
fn a_terminal_of_any_width_shows_one_line_and_then_only_results() {
    let folder = folder(9);
    std::thread::scope(|scope| {
        for columns in [80_u16, 20] {
            let folder = folder.path();
            scope.spawn(move || {
                let width = usize::from(columns);
                let (text, elapsed, code) = on_terminal(scan(folder, &[]), columns, true);
                assert_eq!(code, 1, "{text}");
                let (rows, drawn) = shown(&text, width);
                let lines: Vec<_> = drawn.iter().filter(|(line, _)| !line.is_empty()).collect();
                assert!(lines.len() > 5, "it is alive: {text:?}");
                let most = elapsed.as_millis() / 100 + 2;
                assert!(
                    u128::try_from(lines.len()).is_ok_and(|count| count <= most),
                    "{} in {elapsed:?}",
                    lines.len()
                );
                for (line, wide) in &lines {
                    assert!(*wide < width, "{wide} columns: {line}");
                }
                let whole = rows.concat();
                assert_eq!(whole.matches("DETECTED ").count(), 9, "{rows:#?}");
                assert!(whole.contains("verdict: detected (9 detections)"), "{rows:#?}");
                for rest in ["/s", "left", " of 18 files", "..."] {
                    assert!(!whole.contains(rest), "nothing of the line is left: {rows:#?}");
                }
                if columns == 80 {
                    let is_said = |what: &str| lines.iter().any(|(line, _)| line.contains(what));
                    assert!(is_said("files/s"), "{lines:#?}");
                    assert!(is_said(" of 18 files"), "it is known how much there is: {lines:#?}");
                    assert!(is_said(" left"), "{lines:#?}");
                    assert!(is_said("日"), "what is looked at: {lines:#?}");
                    assert!(is_said(r"\u{7}") || is_said(r"[31m"), "it is harmless: {lines:#?}");
                }
                // How much is left is not said before it is known how much there is.
                for (line, _) in &lines {
                    assert!(!line.contains(" left") || line.contains(" of "), "{line}");
                }
            });
        }
    });
}

#[test]
fn a_pipe_gets_a_line_now_and_then_unless_a_program_reads_the_results() {
    let folder = folder(12);
    let lines = |output: &Output| output.err().lines().filter(|line| line.contains(" files, ")).count();
    std::thread::scope(|scope| {
        let run = |more: &'static [&'static str]| {
            let folder = folder.path();
            scope.spawn(move || {
                let started = Instant::now();
                let output = scan(folder, more).output().expect("programs can be run");
                (Output::from(output).expect(1), started.elapsed())
            })
        };
        let cases = [
            (run(&[]), true),
            (run(&["-o", "json", "--progress"]), true),
            (run(&["-o", "json"]), false),
            (run(&["--progress=never"]), false),
        ];
        for (number, (running, is_told)) in cases.into_iter().enumerate() {
            let (output, elapsed) = running.join().expect("it does not panic");
            assert!(elapsed > Duration::from_secs(6), "the control: it takes a while");
            let most = usize::try_from(elapsed.as_secs() / 5).unwrap_or(0);
            let count = lines(&output);
            if is_told {
                assert!((1..=most).contains(&count), "{number}: {count} in {elapsed:?}\n{}", output.both());
            } else {
                assert_eq!(output.err(), "", "{number}");
            }
            assert!(!output.err().contains(['\r', '\x1b']), "{number}: {}", output.err());
        }
    });
    let (text, ..) = on_terminal(scan(folder.path(), &["--progress=never"]), 80, false);
    assert_eq!(text, "");
    let short = Command::new(bin("tm-agent"))
        .args(["scan", "--standalone", "--pattern"])
        .arg(folder.path().join("rules.yar"))
        .arg("--")
        .arg(folder.path().join("tree/0-found"))
        .output()
        .expect("programs can be run");
    assert_eq!(String::from_utf8_lossy(&short.stderr), "", "a short scan says nothing on its way");
}
