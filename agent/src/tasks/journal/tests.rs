//! The journal by itself: what stays, what goes, and what its files may be like.

use std::os::unix::fs::symlink;

use tm_protocol::{
    message::ReportBody,
    report::{Detection, PathBytes},
};
use uuid::Uuid;

use super::{record::Boot, *};
use crate::platform::fs::Object;

const SEGMENT: u64 = 4000;

/// In memory where there is such a place: many runs flush to it.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn found(name: &str) -> Found {
    let detection = Detection {
        path: PathBytes(name.as_bytes().to_vec()),
        member: vec![],
        pattern: Sha256::of(b"p"),
        rule: "r".into(),
        sha256: Sha256::of(b"x"),
        size: 1,
    };
    Found::new(detection, Object { device: 1, inode: 1 }, Boot(1))
}

fn found_record(name: &str) -> Record {
    Record::Found(Box::new(found(name)))
}

fn key(name: &str) -> Sha256 {
    found(name).detection.key()
}

fn task(n: u128) -> TaskId {
    TaskId::new(Uuid::from_u128(n))
}

fn stream(n: u128) -> StreamId {
    StreamId::new(Uuid::from_u128(n))
}

fn report(epoch: u32, sequence: u64, ends: Option<TaskId>) -> Record {
    let report = Report { sequence, at_ms: 0, body: ReportBody::Accepted { task: task(sequence.into()) } };
    Record::Report { epoch, sequence, ends, frame: encode_report(&report).unwrap() }
}

fn open(folder: &Path) -> (Journal, Held) {
    Journal::open_sized(folder, SEGMENT).unwrap()
}

/// A journal with a stream.
fn begun(folder: &Path) -> Journal {
    let (mut journal, _) = open(folder);
    journal.restream(stream(1)).unwrap();
    journal
}

pub(crate) fn size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

fn segments(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

/// Reports come and are stored, for long.
fn churn(journal: &mut Journal, rounds: u64) {
    let first = journal.stored + 1;
    for sequence in first..first + rounds {
        journal.write(&[report(journal.epoch(), sequence, None)]).unwrap();
        journal.stored(sequence, 0);
    }
}

#[test]
fn what_counts_no_longer_goes_also_behind_a_segment_that_is_mostly_alive() {
    let folder = scratch();
    let mut journal = begun(folder.path());
    for n in 0..50 {
        journal.write(&[found_record(&format!("/alive/{n}"))]).unwrap();
    }
    let live = segments(folder.path());
    assert!(live > 1, "the control: they fill a segment");
    churn(&mut journal, 5000);
    assert!(segments(folder.path()) < 4 * live + 8, "{} segments", segments(folder.path()));
    let (journal, held) = open(folder.path());
    assert_eq!(held.damaged, 0);
    assert!((0..50).all(|n| journal.found(key(&format!("/alive/{n}"))).unwrap().is_some()));
}

#[test]
fn a_record_that_became_unreadable_does_not_keep_segments_from_going() {
    let folder = scratch();
    let mut journal = begun(folder.path());
    journal.write(&[found_record("/broken"), found_record("/whole")]).unwrap();
    let place = journal.live[&Key::Found(key("/broken"))].place;
    let path = folder.path().join("00000001.log");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(7).position(|window| window == b"/broken").unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(journal.segments[&1].file.read(place).is_err(), "the control");
    churn(&mut journal, 2000);
    assert!(segments(folder.path()) < 10, "{} segments", segments(folder.path()));
    assert_eq!(journal.found(key("/broken")).unwrap(), None);
    assert!(journal.found(key("/whole")).unwrap().is_some());
}

#[test]
fn a_find_that_is_made_again_costs_nothing_and_is_not_the_oldest_any_more() {
    let folder = scratch();
    let (mut journal, _) = Journal::open_sized(folder.path(), 8 << 20).unwrap();
    for _ in 0..100 {
        journal.write(&[found_record("/again")]).unwrap();
    }
    assert_eq!(journal.found.len(), 1);
    let many: Vec<Record> = (0..MAX_FOUND - 1).map(|n| found_record(&format!("/{n}"))).collect();
    journal.write(&many).unwrap();
    journal.write(&[found_record("/again")]).unwrap();
    journal.write(&[found_record("/one more")]).unwrap();
    assert!(journal.found(key("/again")).unwrap().is_some(), "it was noted last but one");
    assert_eq!(journal.found(key("/0")).unwrap(), None, "the oldest goes");
    assert_eq!(journal.found.len(), MAX_FOUND);
}

#[test]
fn finds_with_very_long_paths_are_bounded_in_bytes() {
    let folder = scratch();
    let (mut journal, _) = Journal::open(folder.path()).unwrap();
    let long = "x".repeat(60_000);
    for n in 0..2500 {
        journal.write(&[found_record(&format!("/{n}/{long}"))]).unwrap();
    }
    assert!(journal.found_bytes <= 64 << 20, "of 150 MB");
    assert!(size(folder.path()) < 140 << 20, "{} bytes", size(folder.path()));
    assert!(journal.found(key(&format!("/2499/{long}"))).unwrap().is_some());
}

#[test]
fn a_journal_opens_whatever_stands_in_the_place_of_its_files() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 5] = [
        ("a folder", |path| fs::create_dir_all(path.join("x")).unwrap()),
        ("a link", |path| symlink("/etc/passwd", path).unwrap()),
        ("a fifo", |path| {
            let mode = rustix::fs::Mode::from_bits_truncate(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        }),
        ("a huge file", |path| fs::File::create(path).unwrap().set_len(2 << 30).unwrap()),
        ("nothing", |_| {}),
    ];
    for (what, spoil) in spoils {
        for which in [1, 2, 3] {
            let folder = scratch();
            let mut journal = begun(folder.path());
            while journal.segments.len() < 3 {
                let n = journal.noted;
                journal.write(&[found_record(&format!("/{n}"))]).unwrap();
            }
            let numbers: Vec<u64> = journal.segments.keys().copied().collect();
            let path = folder.path().join(format!("{:08}.log", numbers[which - 1]));
            drop(journal);
            fs::remove_file(&path).unwrap();
            spoil(&path);
            let (mut journal, held) = open(folder.path());
            assert_eq!(held.damaged, u64::from(what != "nothing"), "{what} as segment {which}");
            journal.restream(stream(2)).unwrap();
            churn(&mut journal, 300);
            drop(journal);
            let (journal, held) = open(folder.path());
            assert_eq!((held.damaged, journal.stream), (0, Some(stream(2))), "{what} as segment {which}");
        }
    }
    let folder = scratch();
    let place = folder.path().join("journal");
    fs::write(&place, "no folder").unwrap();
    open(&place);
    assert_eq!(fs::read(folder.path().join("journal.bad")).unwrap(), b"no folder");
}

#[test]
fn names_that_are_not_the_journals_are_left_alone() {
    let folder = scratch();
    for name in ["3.log", "+0000003.log", "00000004.log.bak", "99999999999999999999.log"] {
        fs::write(folder.path().join(name), "x").unwrap();
    }
    let mut journal = begun(folder.path());
    churn(&mut journal, 300);
    assert_eq!(fs::read(folder.path().join("3.log")).unwrap(), b"x");
    assert_eq!(open(folder.path()).1.damaged, 0);
}

/// Wherever the write of another stream breaks off, either stream is there, whole.
#[test]
fn a_stream_takes_the_place_of_another_whole_or_not_at_all() {
    let folder = scratch();
    let mut journal = begun(folder.path());
    for sequence in 1..=20 {
        journal.write(&[report(1, sequence, Some(task(sequence.into())))]).unwrap();
    }
    journal.write(&[Record::Opened { epoch: 1, reports: 20, notices: 0 }]).unwrap();
    let newest = journal.path(*journal.segments.last_key_value().unwrap().0);
    let before = journal.newest().unwrap().1.file.len();
    let outbox = journal.restream(stream(2)).unwrap();
    assert_eq!(outbox.reports.len(), 20, "the control");
    let after = journal.newest().unwrap().1.file.len();
    drop(journal);
    let whole = fs::read(&newest).unwrap();
    let other = scratch();
    let copy = other.path().join("journal");
    for cut in (before..=after).step_by(7).chain([after]) {
        let _ = fs::remove_dir_all(&copy);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        let kept = usize::try_from(cut).unwrap();
        fs::write(copy.join(newest.file_name().unwrap()), &whole[..kept]).unwrap();
        let (mut journal, held) = open(&copy);
        assert!([Some(stream(1)), Some(stream(2))].contains(&held.outbox.stream), "cut at {cut}");
        assert_eq!(held.outbox.reports.len(), 20, "cut at {cut}");
        // What was left of it does not get into the next.
        journal.stored(15, 0);
        assert_eq!(journal.restream(stream(3)).unwrap().reports.len(), 5, "cut at {cut}");
        drop(journal);
        let (journal, held) = open(&copy);
        assert_eq!((journal.stream, held.outbox.reports.len()), (Some(stream(3)), 5), "cut at {cut}");
    }
}

#[test]
fn a_stream_that_finds_no_room_takes_none() {
    let folder = scratch();
    let mut journal = begun(folder.path());
    journal.write(&[report(1, 1, None), report(1, 2, None)]).unwrap();
    let before = journal.newest().unwrap().1.file.len();
    // It takes the reports, and then not the name.
    journal.writes_left = 1;
    assert!(journal.restream(stream(2)).is_err());
    assert_eq!(journal.writes_left, 0, "the control");
    journal.writes_left = u32::MAX;
    assert_eq!(journal.newest().unwrap().1.file.len(), before);
    assert_eq!((journal.epoch(), journal.stream), (1, Some(stream(1))));
    assert_eq!(journal.restream(stream(3)).unwrap().reports.len(), 2);
    assert_eq!(open(folder.path()).1.outbox.stream, Some(stream(3)));
}
