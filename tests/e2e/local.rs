//! Scans for the users of an endpoint, by the agent that runs there: whoever asks hears of his own files, nobody
//! else does, and nobody can hold up the others.

use std::{
    fs::{self, File, Permissions},
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::{MemfdFlags, OFlags, memfd_create},
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
        SocketFlags, SocketType, bind, connect, listen, recv, sendmsg, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{Pid, Signal, kill_process},
    thread::{Uid, set_thread_res_uid},
};
use serde_json::Value;
use tempfile::TempDir;
use tm_protocol::{
    ids::Sha256,
    report::{Failure, PathBytes, SkipReason},
    task::ScanLimits,
};
use tm_tests::{
    Agent, Lab, Output, PATIENCE, bin,
    fuse::{Fuse, Silence},
    is_long, samples, standalone, wait_for,
};

/// A user without rights.
const NOBODY: u32 = 65534;

/// A manager, an agent that holds a pattern and serves users, and a place that every user can reach.
struct Place {
    agent: Agent,
    lab: Lab,
    open: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self::without_patterns();
        place.lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
        let empty = place.lab.folder("empty");
        place.lab.scan(&place.agent, &empty).expect(0);
        place
    }

    fn without_patterns() -> Self {
        let lab = Lab::start();
        let mut agent = lab.agent();
        let open = tempfile::Builder::new().prefix("tm-open-").tempdir().expect("temporary folders work");
        fs::set_permissions(open.path(), Permissions::from_mode(0o755))
            .expect("a temporary folder is writable");
        // The build may lie where only its own user can go.
        fs::copy(bin("tm-agent"), open.path().join("tm-agent")).expect("a temporary folder is writable");
        agent.stop();
        agent.run_at(&open.path().join("run/scan.sock"));
        lab.wait_connected(&agent);
        Self { agent, lab, open }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.open.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/scan.sock")
    }

    /// Makes a file of a user.
    fn file(&self, name: &str, content: &[u8], owner: u32, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it lies in a folder"))
            .expect("a temporary folder is writable");
        fs::write(&path, content).expect("a temporary folder is writable");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("a temporary folder is writable");
        std::os::unix::fs::chown(&path, Some(owner), Some(owner)).expect("root may give files away");
        path
    }

    /// `tm-agent scan` as the user without rights.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("tm-agent"));
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        command.arg("scan").arg("--socket").arg(self.socket()).args(args);
        command
    }

    fn scan(&self, args: &[&str], path: &Path) -> Output {
        self.command(args).arg(path).output().expect("programs can be run").into()
    }

    /// Open descriptors of the agent.
    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.agent.pid())).expect("the agent runs").count()
    }

    /// Waits until the agent has no more descriptors and workers than before.
    fn wait_for_rest(&self, before: usize) {
        wait_for("the agent to let go of everything", PATIENCE, || {
            (self.descriptors() <= before && self.agent.process().children().is_empty()).then_some(())
        });
    }

    /// A scan of the other user, as proof that nobody is held up.
    fn works_for_others(&self) {
        let path = self.file("proof/eicar", &samples::eicar(), NOBODY, 0o600);
        let output = self.scan(&["-o", "json"], &path).expect(1);
        assert_eq!(standalone::lines(&output, "detection").len(), 1, "{}", output.both());
    }
}

/// A client of this test's own, which does what no good one does.
struct Raw(OwnedFd);

/// Messages with the files beside them.
type Messages<'a> = Vec<(Vec<u8>, Vec<BorrowedFd<'a>>)>;

/// Matches, skips, digest and size.
type RawFindings =
    (Vec<(Vec<PathBytes>, Sha256, String)>, Vec<(Vec<PathBytes>, SkipReason)>, Option<Sha256>, u64);

/// What the agent says.
#[derive(Debug)]
enum Said {
    Ready,
    Done(Vec<(u64, RawFindings)>),
    End,
    Refused(Failure),
    Closed,
}

impl Raw {
    fn new(place: &Place) -> Self {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("there are sockets");
        connect(&socket, &SocketAddrUnix::new(place.socket()).expect("the path is short"))
            .expect("the agent listens");
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).expect("a socket has timeouts");
        Self(socket)
    }

    /// One that was let in.
    fn begun(place: &Place) -> Self {
        wait_for("the agent to let a client in", PATIENCE, || {
            let raw = Self::new(place);
            raw.try_say(&begin(ScanLimits::default()), &[], SendFlags::empty());
            match raw.hear() {
                Said::Ready => Some(raw),
                // The session of another one is coming to its end.
                Said::Refused(failure) if failure.code == "busy" => None,
                other @ (Said::Done(_) | Said::End | Said::Refused(_) | Said::Closed) => panic!("{other:?}"),
            }
        })
    }

    fn say(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        assert!(self.try_say(bytes, files, SendFlags::empty()), "the agent takes it");
    }

    fn try_say(&self, bytes: &[u8], files: &[BorrowedFd<'_>], flags: SendFlags) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags | SendFlags::NOSIGNAL).is_ok()
    }

    fn hear(&self) -> Said {
        let mut body = Vec::new();
        loop {
            let mut packet = vec![0; 64 << 10];
            let length = match recv(&self.0, &mut packet[..], RecvFlags::empty()) {
                Ok((_, length)) => length,
                Err(rustix::io::Errno::CONNRESET) => continue,
                Err(error) => panic!("the agent does not answer: {error}"),
            };
            if length == 0 {
                return Said::Closed;
            }
            body.extend_from_slice(&packet[1..length]);
            if packet[0] != 0 {
                continue;
            }
            let kind = body.remove(0);
            let config = bincode::config::standard();
            match kind {
                0 => body.clear(),
                1 => return Said::Ready,
                2 => {
                    let (files, _) = bincode::decode_from_slice(&body, config).expect("files and findings");
                    return Said::Done(files);
                }
                3 => return Said::End,
                4 => return Said::Refused(bincode::decode_from_slice(&body, config).expect("a failure").0),
                other => panic!("an answer of kind {other}"),
            }
        }
    }

    /// Hears until the end: what the agent ended it with.
    fn end(&self) -> String {
        loop {
            match self.hear() {
                Said::Ready | Said::Done(_) => {}
                Said::End => return "end".to_owned(),
                Said::Closed => return "closed".to_owned(),
                Said::Refused(failure) => return failure.code,
            }
        }
    }
}

fn encoded(message: impl bincode::Encode) -> Vec<u8> {
    bincode::encode_to_vec(message, bincode::config::standard()).expect("it can be encoded")
}

fn begin(limits: ScanLimits) -> Vec<u8> {
    encoded((0_u32, 1_u32, limits, 1_u16))
}

fn files(ids: &[u64]) -> Vec<u8> {
    encoded((1_u32, ids.to_vec()))
}

fn finish() -> Vec<u8> {
    encoded(3_u32)
}

/// The lines of a scan without what no two scans share.
fn comparable(output: &Output) -> Vec<Value> {
    let mut lines: Vec<Value> =
        output.out().lines().map(|line| serde_json::from_str(line).expect("every line is JSON")).collect();
    for line in &mut lines {
        let fields = line.as_object_mut().expect("every line is an object");
        for key in ["elapsed_s", "cpu_s", "pattern_name"] {
            fields.remove(key);
        }
    }
    lines.sort_by_key(ToString::to_string);
    lines
}

#[test]
fn a_user_hears_of_his_own_files_and_nobody_else_does() {
    let place = Place::new();
    let tree = place.path("tree");
    place.file("tree/found", &samples::eicar(), NOBODY, 0o600);
    place.file("tree/b.tar.gz", &samples::nested(), NOBODY, 0o600);
    place.file("tree/clean", b"nothing", NOBODY, 0o600);
    place.file("tree/secret", &samples::eicar(), 0, 0o600);
    let task = place.lab.newest_task(&place.agent);
    let events = place.lab.rest("/v1/events?limit=100");
    let before = place.descriptors();

    let output = place.scan(&["-o", "json"], &tree).expect(1);
    let found = standalone::lines(&output, "detection");
    let mut names: Vec<&str> =
        found.iter().filter_map(|line| line["path"].as_str()?.rsplit('/').next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["b.tar.gz", "found"], "{}", output.both());
    let skipped = standalone::lines(&output, "skipped");
    assert_eq!(skipped.len(), 1, "{}", output.both());
    assert_eq!(skipped[0]["reason"], "unreadable");
    assert!(
        skipped[0]["path"].as_str().unwrap().ends_with("/secret"),
        "the agent could read it, the user not"
    );
    assert_eq!(found[0]["pattern_name"].as_str().map(str::len), Some(12), "the pattern is named");

    // The same as without the agent, but for who looks: here it is root itself that scans.
    let alone = standalone::scan(samples::EICAR_RULE, &tree, &[]).expect(1);
    assert_eq!(standalone::lines(&alone, "detection").len(), 3, "the control: there is more to find");
    fs::remove_file(place.path("tree/secret")).unwrap();
    let alone = standalone::scan(samples::EICAR_RULE, &tree, &[]).expect(1);
    let by_agent = place.scan(&["-o", "json"], &tree).expect(1);
    assert_eq!(comparable(&by_agent), comparable(&alone));
    let text = place.scan(&[], &tree).expect(1);
    assert!(text.out().contains("verdict: detected (2 detections)"), "{}", text.both());

    place.wait_for_rest(before);
    assert_eq!(place.lab.newest_task(&place.agent), task, "no task came of it");
    assert_eq!(place.lab.rest("/v1/events?limit=100"), events, "no event came of it");
}

#[test]
fn the_exit_code_says_what_came_of_it_and_errors_name_the_way_out() {
    let place = Place::new();
    let clean = place.file("clean/file", &samples::look_alike(), NOBODY, 0o600);
    place.scan(&["-o", "json"], &clean).expect(0);
    let secret = place.file("secret/a.zip", &samples::encrypted_zip(), NOBODY, 0o600);
    let output = place.scan(&["-o", "json"], &secret).expect(2);
    assert_eq!(standalone::lines(&output, "skipped")[0]["reason"], "encrypted", "{}", output.both());
    place.scan(&[], &place.path("missing")).expect(2);

    for args in [&["--pattern", "/x.yar", "--"][..], &["--processes"], &["--cache", "/tmp/x"]] {
        let output = place.scan(args, &clean).expect(64);
        assert!(output.err().contains("--standalone"), "{args:?}: {}", output.err());
    }
    place.scan(&["--no-such-option"], &clean).expect(64);
    place.command(&[]).output().map(Output::from).unwrap().expect(64);
    let both = place.scan(&["--standalone", "--pattern", "/x.yar", "-o", "json"], &clean);
    both.expect(64);
    let output = place.scan(&["--max-depth", "100"], &clean).expect(2);
    assert!(
        output.err().contains("usual limits") && output.err().contains("--standalone"),
        "{}",
        output.err()
    );
    place.scan(&["--max-depth", "1", "--cpu", "50%"], &clean).expect(0);

    // Without an agent.
    let mut place = place;
    place.agent.kill9();
    assert!(place.socket().exists(), "a killed agent leaves its socket");
    for socket in [place.socket(), place.path("none")] {
        let mut command = Command::new(place.path("tm-agent"));
        command.uid(NOBODY).gid(NOBODY).current_dir("/").args(["scan", "--socket"]).arg(&socket).arg(&clean);
        let output = Output::from(command.output().unwrap()).expect(2);
        assert!(output.err().contains("--standalone"), "{}", output.err());
        assert!(output.err().contains("no agent"), "{}", output.err());
    }
    place.agent.run_at(&place.socket());
    wait_for("the agent to take its place again", PATIENCE, || {
        (place.scan(&[], &clean).code() == 0).then_some(())
    });
    place.agent.stop();
    assert!(!place.socket().exists(), "an agent that ends removes its socket");
}

#[test]
fn an_agent_without_patterns_says_so() {
    let place = Place::without_patterns();
    let file = place.file("file", b"x", NOBODY, 0o600);
    let output = place.scan(&[], &file).expect(2);
    assert!(
        output.err().contains("no patterns") && output.err().contains("--standalone"),
        "{}",
        output.err()
    );
    assert_eq!(output.out(), "", "no verdict");
}

#[test]
fn only_files_are_looked_at_whatever_is_handed_over() {
    let place = Place::new();
    let before = place.descriptors();
    let path = place.file("file", &samples::eicar(), NOBODY, 0o644);
    let raw = Raw::begun(&place);
    let (pipe, _end) = std::io::pipe().unwrap();
    let memory = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
    let flags = i32::try_from(OFlags::PATH.bits()).unwrap();
    let of = |file: File| OwnedFd::from(file);
    let handed: Vec<(OwnedFd, SkipReason)> = vec![
        (pipe.into(), SkipReason::Special),
        (of(File::open("/dev/zero").unwrap()), SkipReason::Special),
        (of(File::open("/").unwrap()), SkipReason::Special),
        (of(File::options().write(true).open(&path).unwrap()), SkipReason::Unreadable),
        (of(File::options().read(true).write(true).open(&path).unwrap()), SkipReason::Unreadable),
        (of(File::options().read(true).custom_flags(flags).open(&path).unwrap()), SkipReason::Unreadable),
        (of(File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap()), SkipReason::Special),
        (of(File::open("/proc/self/mem").unwrap()), SkipReason::Pseudo),
        (raw.0.try_clone().unwrap(), SkipReason::Unreadable),
    ];
    let good = File::open(&path).unwrap();
    let ids: Vec<u64> = (0..10).collect();
    let mut fds: Vec<_> = handed.iter().map(|(file, _)| file.as_fd()).collect();
    fds.push(good.as_fd());
    raw.say(&files(&ids), &fds);
    raw.say(&finish(), &[]);
    let (mut skipped, mut matched) = (Vec::new(), 0);
    loop {
        match raw.hear() {
            Said::Done(done) => {
                for (id, (matches, skips, ..)) in done {
                    matched += matches.len();
                    skipped.extend(skips.into_iter().map(|(_, reason)| (id, reason)));
                }
            }
            Said::End => break,
            other @ (Said::Ready | Said::Refused(_) | Said::Closed) => panic!("{other:?}"),
        }
    }
    skipped.sort_unstable();
    let expected: Vec<_> = (0..).zip(handed.iter().map(|(_, reason)| *reason)).collect();
    assert_eq!(skipped, expected);
    assert_eq!(matched, 1, "the control: a file is looked at");
    drop(raw);
    place.wait_for_rest(before);
}

#[test]
fn clients_that_talk_nonsense_are_sent_away_and_leave_nothing_behind() {
    let place = Place::new();
    let before = place.descriptors();
    let file = File::open(place.file("file", b"x", NOBODY, 0o644)).unwrap();
    let fd = file.as_fd();
    let limits = ScanLimits::default();
    // At once, in place of a greeting.
    let firsts: [(&str, Vec<u8>, Vec<BorrowedFd<'_>>, &str); 8] = [
        ("garbage", vec![0xff; 100], vec![], "protocol"),
        ("too long", vec![0; 100_000], vec![], "protocol"),
        ("files first", files(&[1]), vec![fd], "protocol"),
        ("many files", begin(limits), vec![fd; 250], "protocol"),
        ("a file with the greeting", begin(limits), vec![fd], "protocol"),
        ("another version", encoded((0_u32, 99_u32, limits, 1_u16)), vec![], "version"),
        ("no time", begin(ScanLimits { file_ms: 0, ..limits }), vec![], "limits"),
        ("no limits", begin(ScanLimits { total_bytes: u64::MAX, ..limits }), vec![], "limits"),
    ];
    for (what, bytes, files, code) in firsts {
        let end = wait_for("the agent to let a client in", PATIENCE, || {
            let raw = Raw::new(&place);
            raw.try_say(&bytes, &files, SendFlags::empty());
            Some(raw.end()).filter(|end| end != "busy")
        });
        assert_eq!(end, code, "{what}");
    }
    // After it.
    let laters: [(&str, Messages<'_>); 6] = [
        ("a second greeting", vec![(begin(limits), vec![])]),
        ("more numbers than files", vec![(files(&[1, 2]), vec![fd])]),
        ("more files than numbers", vec![(files(&[1]), vec![fd, fd])]),
        ("17 files", vec![(files(&(0..17).collect::<Vec<_>>()), vec![fd; 17])]),
        ("a number twice", vec![(files(&[5]), vec![fd]), (files(&[5]), vec![fd])]),
        ("a file after the last", vec![(finish(), vec![]), (files(&[9]), vec![fd])]),
    ];
    for (what, messages) in laters {
        let raw = Raw::begun(&place);
        for (bytes, files) in &messages {
            raw.try_say(bytes, files, SendFlags::empty());
        }
        let end = raw.end();
        // The last may come after all was told.
        assert!(end == "protocol" || what == "a file after the last" && end == "end", "{what}: {end}");
    }
    // One that says nothing at all.
    let end = wait_for("the agent to let a client in", PATIENCE, || {
        Some(Raw::new(&place).end()).filter(|end| end != "busy")
    });
    assert_eq!(end, "idle");
    place.wait_for_rest(before);
    place.works_for_others();
}

#[test]
fn clients_that_die_or_do_not_listen_hold_nobody_up() {
    let place = Place::new();
    let before = place.descriptors();
    let folder = place.path("many");
    fs::create_dir(&folder).unwrap();
    for n in 0..200 {
        place.file(&format!("many/{n}"), &samples::eicar(), NOBODY, 0o644);
    }
    // Hands over as much as is taken, and never listens.
    let fill = |raw: &Raw| {
        let file = File::open(folder.join("0")).unwrap();
        let (mut next, started) = (0_u64, Instant::now());
        let mut taken = Instant::now();
        while taken.elapsed() < Duration::from_secs(2) {
            let ids: Vec<u64> = (next..next + 16).collect();
            if raw.try_say(&files(&ids), &[file.as_fd(); 16], SendFlags::DONTWAIT) {
                next += 16;
                taken = Instant::now();
            }
            assert!(started.elapsed() < PATIENCE * 2, "the agent takes files for ever: {next}");
            std::thread::yield_now();
        }
        next
    };
    let deaf = [Raw::begun(&place), Raw::begun(&place)];
    for raw in &deaf {
        assert!(fill(raw) > 64, "the control: it takes some");
    }
    assert!(
        place.descriptors() <= before + 4,
        "the agent itself holds none: {} of {before}",
        place.descriptors()
    );
    let sessions = place.agent.process().children();
    assert_eq!(sessions.len(), 2, "the control: each has a process");
    for session in sessions {
        let count = fs::read_dir(format!("/proc/{session}/fd")).unwrap().count();
        assert!(count < 64 + 16 + 16 + 20, "{count}");
    }
    place.works_for_others();
    // A third of the same user is not let in; one of another is.
    let third = Raw::new(&place);
    assert_eq!(third.end(), "busy");
    drop(third);
    drop(deaf);
    place.wait_for_rest(before);

    // Clients that are killed in the middle.
    for _ in 0..3 {
        let mut child: Child =
            place.command(&[]).arg("/usr/lib").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("the scan to be under way", PATIENCE, || {
            assert!(child.try_wait().unwrap().is_none(), "it goes on for a while");
            (!place.agent.process().children().is_empty()).then_some(())
        });
        child.kill().unwrap();
        child.wait().unwrap();
        place.wait_for_rest(before);
    }
    place.works_for_others();
}

#[test]
fn a_file_that_never_lets_go_holds_up_its_own_session_alone() {
    let mut place = Place::new();
    let fuse = Fuse::mount(&place.path("fuse"), &[("file", Some(b"x"))]);
    let raw = Raw::begun(&place);
    let session = place.agent.process().children();
    assert_eq!(session.len(), 1);
    let session = i32::try_from(session[0]).ok().and_then(Pid::from_raw).unwrap();
    // It takes the file only once nobody answers for it any more, not even for its closing.
    kill_process(session, Signal::STOP).unwrap();
    let file = File::open(place.path("fuse/file")).unwrap();
    raw.say(&files(&[1]), &[file.as_fd()]);
    drop(file);
    fuse.be_silent(Silence::All);
    kill_process(session, Signal::CONT).unwrap();
    wait_for("the session to hang", PATIENCE, || (fuse.unanswered() > 0).then_some(()));
    drop(raw);
    place.works_for_others();
    let old = place.agent.pid();
    place.agent.stop();
    assert!(
        Path::new(&format!("/proc/{}", session.as_raw_nonzero())).exists(),
        "the control: it still hangs"
    );
    place.agent.run_at(&place.socket());
    place.lab.wait_connected(&place.agent);
    assert_ne!(place.agent.pid(), old);
    place.works_for_others();
    drop(fuse);
}

#[test]
fn a_client_that_takes_no_answer_is_left() {
    if !is_long() {
        return;
    }
    let place = Place::new();
    let before = place.descriptors();
    let raw = Raw::begun(&place);
    let file = File::open(place.file("file", &samples::eicar(), NOBODY, 0o644)).unwrap();
    let mut next = 0;
    // Until nothing is taken any more, for it takes no answers.
    while raw.try_say(&files(&[next]), &[file.as_fd()], SendFlags::DONTWAIT) || next < 500 {
        next += 1;
        std::thread::yield_now();
    }
    let idle = Raw::begun(&place);
    wait_for("both to be left", Duration::from_secs(200), || {
        place.agent.process().children().is_empty().then_some(())
    });
    assert_eq!(idle.end(), "idle");
    place.wait_for_rest(before);
}

#[test]
fn two_hundred_connections_at_once_leave_room_for_others() {
    let place = Place::new();
    let before = place.descriptors();
    let mut raws: Vec<Raw> = Vec::new();
    std::thread::scope(|scope| {
        let connecting: Vec<_> = (0..200).map(|_| scope.spawn(|| Raw::new(&place))).collect();
        raws.extend(connecting.into_iter().map(|thread| thread.join().unwrap()));
    });
    place.works_for_others();
    let ends: Vec<String> = raws.iter().map(Raw::end).collect();
    let count = |code: &str| ends.iter().filter(|end| *end == code).count();
    assert!(count("busy") >= 190, "{ends:?}");
    assert!(count("idle") >= 2, "the ones that were let in: {ends:?}");
    assert_eq!(count("busy") + count("idle"), 200, "{ends:?}");
    drop(raws);
    place.wait_for_rest(before);
    let pid = place.agent.pid();
    place.works_for_others();
    assert_eq!(place.agent.pid(), pid);
}

#[test]
fn the_place_is_open_to_all_and_only_its_own_is_replaced() {
    let place = Place::new();
    let there = fs::symlink_metadata(place.socket()).unwrap();
    assert!(there.file_type().is_socket());
    assert_eq!(there.permissions().mode() & 0o777, 0o666);
    // Files are given to no stranger who listens, here to a user who hopes for root's.
    let path = place.path("strange/strange.sock");
    fs::create_dir(path.parent().unwrap()).unwrap();
    std::os::unix::fs::chown(path.parent().unwrap(), Some(NOBODY), Some(NOBODY)).unwrap();
    let listening = std::thread::scope(|scope| {
        let listen_there = || {
            let nobody = Uid::from_raw(NOBODY);
            set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
            let socket = socket.unwrap();
            bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            listen(&socket, 1).unwrap();
            socket
        };
        scope.spawn(listen_there).join().unwrap()
    });
    let mut command = Command::new(place.path("tm-agent"));
    let output = command.args(["scan", "--socket"]).arg(&path).arg("/etc/hostname").output().unwrap();
    let output = Output::from(output).expect(2);
    assert!(output.err().contains("neither root nor this user"), "{}", output.err());
    drop(listening);

    let mut place = place;
    place.agent.stop();
    fs::write(place.socket(), "precious").unwrap();
    place.agent.run_at(&place.socket());
    place.lab.wait_connected(&place.agent);
    assert_eq!(fs::read(place.socket()).unwrap(), b"precious", "the agent does all else without it");
    assert!(place.agent.process().log().contains("Users cannot scan"), "{}", place.agent.process().log());
}
