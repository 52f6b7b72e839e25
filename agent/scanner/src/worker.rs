//! The worker process: compiles patterns, reads files it is handed, answers.
//!
//! **Invariant:** it is given open files and never a path; it opens nothing and talks to nobody but the
//! process that started it, and ends when that does. [`crate::sandbox`] is in force, as far as this machine
//! has it, before any pattern or file is read.

use std::{
    fs::File,
    io::{self, IoSliceMut, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    process::ExitCode,
    sync::{Barrier, Mutex, OnceLock},
    time::Duration,
};

use memmap2::Mmap;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tm_patterns::Problem;
use tm_protocol::{ids::Sha256, report::SkipReason, task::ScanLimits, text::escape_for_display};

use crate::{
    archive,
    engine::{
        Engine, Refused,
        cost::{self, Measured},
        lint::VERY_SLOW,
    },
    item::{Findings, Match, Skip},
    judge::Judge,
    lists::{self, Lists},
    sandbox::{PartState, Sandbox},
    wire::{self, Answer, BATCH, Order, Place, Slots, Told},
};

/// Files up to this size are read into a buffer, larger ones mapped (measured: mapping costs twice the CPU
/// on small files and a third on large ones).
const READ_LIMIT: u64 = 1 << 20;

/// CPU time for the measure of a pattern's rules: 10,000 ordinary ones take some 3 s.
const MEASURE_TIME: Duration = Duration::from_secs(8);

/// Most remarks on a pattern.
const MOST_PROBLEMS: usize = 1000;
/// Longest text of one, in characters.
const LONGEST_PROBLEM: usize = 500;
/// How much of a large file's ends is looked at to see whether it is a container, in bytes.
const ENDS: u64 = 128 << 10;

/// How long answers are gathered, in milliseconds.
const SAY_EVERY_MS: u64 = 10;

/// Runs the worker on the socket that stands at standard input. Ends when the parent does.
pub fn main() -> ExitCode {
    // One thread's panic ends the process at once: its item is tried again instead of waiting for its time.
    std::panic::set_hook(Box::new(|panic| {
        // It may quote a rule.
        let text = escape_for_display(&panic.to_string());
        let _ = writeln!(io::stderr(), "scan worker: {text}");
        std::process::abort();
    }));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "scan worker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let mut sandbox = Sandbox::begin()?;
    let socket = io::stdin();
    let Some((Order::Setup(frame, count), files)) = receive(&socket)? else { return Ok(()) };
    let [setup, slots] =
        <[OwnedFd; 2]>::try_from(files).map_err(|_| io::Error::other("a set-up without its files"))?;
    if frame.nice > 0 {
        rustix::process::nice(frame.nice)?;
    }
    sandbox.confine(&frame);
    let maps = receive_lists(&socket, count)?;
    let (setup, slots) = (File::from(setup), Slots(File::from(slots)));
    let setup_bytes = setup.metadata()?.len();
    // As a plain file: what stands before it flushes at every byte that looks like the end of a line.
    let out = Mutex::new(File::from(io::stdout().as_fd().try_clone_to_owned()?));
    // Threads come before the last step of the sandbox, which allows no new ones, and wait for the engine.
    let begun = Barrier::new(frame.threads + 1);
    let job = OnceLock::new();
    std::thread::scope(|scope| {
        let threads = (0..frame.threads)
            .map(|thread| {
                let (socket, out, slots, begun, job) = (&socket, &out, &slots, &begun, &job);
                std::thread::Builder::new().spawn_scoped(scope, move || {
                    begun.wait();
                    let Some(Job { judge, limits }) = job.wait() else { return Ok(()) };
                    serve(thread, socket, out, slots, judge.clone(), limits).inspect_err(|error| {
                        // The rest of its batch has nobody else: the pool must see an end, not a gap.
                        let _ = writeln!(io::stderr(), "scan worker: {error}");
                        std::process::exit(1);
                    })
                })
            })
            .collect::<io::Result<Vec<_>>>();
        let threads = threads.unwrap_or_else(|error| {
            // Those that did start wait for more than will come.
            let _ = writeln!(io::stderr(), "scan worker: cannot start threads: {error}");
            std::process::exit(1);
        });
        begun.wait();
        let parts = sandbox.seal();
        let prepared = prepare((&setup, setup_bytes), maps, parts, &out);
        drop(setup);
        let (job_now, done) = match prepared {
            Ok(job) => (job, Ok(())),
            Err(error) => (None, Err(error)),
        };
        // It is set once, here.
        let _ = job.set(job_now);
        done?;
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| std::process::abort()))
    })
}

/// What every thread works with.
struct Job {
    judge: Judge,
    limits: ScanLimits,
}

/// Maps the digest lists that follow the set-up. Their files are closed: a map holds what it needs.
fn receive_lists(socket: &io::Stdin, count: usize) -> io::Result<Vec<Mmap>> {
    let mut maps = Vec::new();
    while maps.len() < count {
        match receive(socket)? {
            Some((Order::Lists, files)) if !files.is_empty() => {
                for file in &files {
                    maps.push(lists::map(file)?);
                }
            }
            Some((Order::Lists | Order::Setup(..) | Order::Items(_) | Order::Measure, _)) | None => {
                return Err(io::Error::other("digest lists are missing"));
            }
        }
    }
    Ok(maps)
}

/// Reads and compiles the patterns and tells the parent; nothing if they are refused.
fn prepare(
    (setup, length): (&File, u64),
    maps: Vec<Mmap>,
    sandbox: Vec<PartState>,
    out: &Mutex<File>,
) -> io::Result<Option<Job>> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    setup.read_exact_at(&mut bytes, 0)?;
    let told = wire::decode::<Told>(&bytes)?;
    drop(bytes);
    match load(told.patterns, maps) {
        Ok((judge, rules, warnings)) => {
            send(out, &Answer::Ready { rules, warnings: bounded(warnings), sandbox })?;
            Ok(Some(Job { judge, limits: told.limits }))
        }
        Err(refused) => {
            let problems = bounded(refused.problems);
            send(out, &Answer::Refused { pattern: refused.pattern, problems })?;
            Ok(None)
        }
    }
}

/// Rules compiled, lists opened; how many rules there are, and the compiler's remarks.
fn load(
    patterns: Vec<(Sha256, Option<String>)>,
    maps: Vec<Mmap>,
) -> Result<(Judge, u32, Vec<Problem>), Refused> {
    let (mut texts, mut text_at, mut lists, mut list_at) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut maps = maps.into_iter();
    for (index, (sha256, text)) in patterns.into_iter().enumerate() {
        if let Some(text) = text {
            texts.push((sha256, text));
            text_at.push(index);
        } else if let Some(map) = maps.next() {
            lists.push((sha256, map));
            list_at.push(index);
        } else {
            let problem = Problem { line: 0, column: 0, message: "the digest list is missing".to_owned() };
            return Err(Refused { pattern: index, problems: vec![problem] });
        }
    }
    let of = |places: &[usize], at: usize| places.get(at).copied().unwrap_or(at);
    let lists = Lists::open(lists).map_err(|(at, error)| {
        let problem = Problem { line: 0, column: 0, message: error.to_string() };
        Refused { pattern: of(&list_at, at), problems: vec![problem] }
    })?;
    if texts.is_empty() {
        return Ok((Judge::new(None, lists), 0, Vec::new()));
    }
    let (engine, rules, warnings) = Engine::compile(&texts)
        .map_err(|refused| Refused { pattern: of(&text_at, refused.pattern), ..refused })?;
    Ok((Judge::new(Some(engine), lists), rules, warnings))
}

fn serve(
    thread: usize,
    socket: &io::Stdin,
    out: &Mutex<File>,
    slots: &Slots,
    mut judge: Judge,
    limits: &ScanLimits,
) -> io::Result<()> {
    let (mut buffer, mut answers) = (Vec::new(), Vec::new());
    while let Some((order, files)) = receive(socket)? {
        let ids = match order {
            Order::Items(ids) => ids,
            Order::Measure => {
                let [text] = <[OwnedFd; 1]>::try_from(files)
                    .map_err(|_| io::Error::other("a measure without its pattern"))?;
                send(out, &measure(&File::from(text))?)?;
                continue;
            }
            Order::Setup(..) | Order::Lists => return Err(io::Error::other("a second set-up")),
        };
        if ids.len() != files.len() {
            return Err(io::Error::other("items without their files"));
        }
        let mut said_ms = wire::monotonic_ms();
        for (id, file) in ids.into_iter().zip(files) {
            let now_ms = wire::monotonic_ms();
            // What is done is told before something long may begin: most files take microseconds, and an answer
            // each would cost more than looking at them.
            if now_ms.saturating_sub(said_ms) >= SAY_EVERY_MS {
                say(out, &mut answers)?;
                said_ms = now_ms;
            }
            slots.set(thread, id, now_ms)?;
            let findings =
                look(&File::from(file), &mut buffer, &mut judge, limits).unwrap_or_else(|_| Findings {
                    skips: vec![Skip { member: Vec::new(), reason: SkipReason::Unreadable }],
                    ..Findings::default()
                });
            wire::write_answer(&mut answers, &Answer::Done { id, findings })?;
        }
        say(out, &mut answers)?;
        slots.clear(thread)?;
    }
    Ok(())
}

/// What the rules of a text cost.
fn measure(text: &File) -> io::Result<Answer> {
    let mut bytes = Vec::new();
    let length = read(text, 0, text.metadata()?.len(), &mut bytes)?;
    bytes.truncate(length);
    let text = String::from_utf8(bytes).map_err(io::Error::other)?;
    let Measured { remarks, unmeasured } = cost::measure(&text, MEASURE_TIME);
    Ok(Answer::Measured { remarks: bounded(remarks), unmeasured })
}

/// What is said of a pattern, not more than anybody reads: a hostile one could fill the memory of whoever asks.
/// What forbids its use comes first, so that it is never left out.
fn bounded(mut problems: Vec<Problem>) -> Vec<Place> {
    if problems.len() > MOST_PROBLEMS {
        problems.sort_by_key(|problem| !problem.message.starts_with(VERY_SLOW));
        let more = problems.len() - MOST_PROBLEMS;
        problems.truncate(MOST_PROBLEMS);
        problems.push(Problem { line: 0, column: 0, message: format!("and {more} more remarks") });
    }
    for problem in &mut problems {
        if let Some((cut, _)) = problem.message.char_indices().nth(LONGEST_PROBLEM) {
            problem.message.truncate(cut);
            problem.message.push('…');
        }
    }
    problems.into_iter().map(Into::into).collect()
}

fn look(file: &File, buffer: &mut Vec<u8>, judge: &mut Judge, limits: &ScanLimits) -> io::Result<Findings> {
    let before = file.metadata()?;
    let size = before.len();
    let judge_all = |bytes: &[u8], judge: &mut Judge| {
        let mut findings = archive::look(judge, limits, bytes);
        if !findings.matches.is_empty() {
            findings.sha256 = Some(Sha256::of(bytes));
        }
        findings
    };
    let mut findings = if size > limits.file_bytes {
        look_at_large(file, size, buffer, judge, limits)?
    } else if size <= READ_LIMIT {
        let length = read(file, 0, size, buffer)?;
        judge_all(buffer.get(..length).unwrap_or_default(), judge)
    } else {
        #[expect(unsafe_code, reason = "files above the read limit are mapped")]
        // SAFETY: the map is only read. A file that is changed meanwhile changes what is read, and one that
        // is cut ends this process by SIGBUS, which the pool outlives; this is why only a worker maps files.
        let map = unsafe { memmap2::Mmap::map(file)? };
        judge_all(&map, judge)
    };
    findings.size = size;
    let after = file.metadata()?;
    let stamp = |m: &std::fs::Metadata| (m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    if stamp(&before) != stamp(&after) {
        findings.skips.push(Skip { member: Vec::new(), reason: SkipReason::Changed });
    }
    Ok(findings)
}

/// A file that is too large for rules and archive readers: digests have no limit. It is a gap all the same if there
/// are rules, or if it may hold members that a list could name.
fn look_at_large(
    file: &File,
    size: u64,
    buffer: &mut Vec<u8>,
    judge: &Judge,
    limits: &ScanLimits,
) -> io::Result<Findings> {
    let time = Duration::from_millis(limits.file_ms);
    let streamed = judge.lists().stream(file, size, buffer, time)?;
    let matches = streamed.hits.into_iter();
    let matches = matches.map(|(pattern, rule)| Match { member: Vec::new(), pattern, rule }).collect();
    let is_cut = judge.has_rules() || may_hold_members(file, size, buffer)?;
    let reasons = streamed.skip.into_iter().chain(is_cut.then_some(SkipReason::Limit));
    let skips = reasons.map(|reason| Skip { member: Vec::new(), reason }).collect();
    Ok(Findings { matches, skips, sha256: streamed.sha256, size })
}

/// Judged by its ends.
fn may_hold_members(file: &File, size: u64, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut end = Vec::new();
    let head = read(file, 0, size.min(ENDS), buffer)?;
    let tail = read(file, size.saturating_sub(ENDS), size.min(ENDS), &mut end)?;
    let head = buffer.get(..head).unwrap_or_default();
    Ok(archive::may_hold(head, end.get(..tail).unwrap_or_default()))
}

/// Reads `size` bytes from `at`, wherever the descriptor stands: a worker that died may have moved it.
/// A file that grows or shrinks meanwhile gives what it has and is reported as changed by the caller.
fn read(file: &File, at: u64, size: u64, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let size = usize::try_from(size).map_err(io::Error::other)?;
    if buffer.len() < size {
        buffer.resize(size, 0);
    }
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..size).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at.saturating_add(u64::try_from(length).map_err(io::Error::other)?)) {
            Ok(0) => break,
            Ok(got) => length += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn send(out: &Mutex<File>, answer: &Answer) -> io::Result<()> {
    let mut bytes = Vec::new();
    wire::write_answer(&mut bytes, answer)?;
    say(out, &mut bytes)
}

/// Tells what was gathered.
fn say(out: &Mutex<File>, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut out = out.lock().map_err(|_| io::Error::other("a scan thread has panicked"))?;
    out.write_all(bytes)?;
    bytes.clear();
    out.flush()
}

/// One message and the files beside it; `None` when the parent has closed the socket.
fn receive(socket: &io::Stdin) -> io::Result<Option<(Order, Vec<OwnedFd>)>> {
    let mut bytes = [0; 16 * BATCH];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        match recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(message) => break message.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    Ok(Some((wire::decode(bytes.get(..length).unwrap_or_default())?, files)))
}
