//! Every format, good and hostile: what can be reached is judged, what cannot be is said.

mod cab;
mod formats;
mod hostile;
mod samples;
mod sevenz;

use std::{collections::BTreeSet, time::Duration};

use tm_protocol::{ids::Sha256, report::SkipReason, task::ScanLimits};

use self::samples::{BZIP2, DEFLATE, Entry, XZ, ZSTD, ar, cpio_new, end_zip, gzip, packed, plain, tar, zip};
use crate::{engine::Engine, item::Findings, judge::Judge, lists::Lists};

const RULE: &str = "rule marker { strings: $a = \"needle-47\" condition: $a }";

fn engine() -> Judge {
    let engine = Engine::compile(&[(Sha256::of(RULE.as_bytes()), RULE.to_owned())]).unwrap().0;
    Judge::new(Some(engine), Lists::default())
}

fn look_within(limits: &ScanLimits, bytes: &[u8]) -> Findings {
    super::look(&mut engine(), limits, bytes)
}

fn look(bytes: &[u8]) -> Findings {
    look_within(&ScanLimits::default(), bytes)
}

fn joined(names: &[tm_protocol::report::PathBytes]) -> String {
    names.iter().map(|name| String::from_utf8_lossy(&name.0).into_owned()).collect::<Vec<_>>().join(" > ")
}

fn matched(findings: &Findings) -> BTreeSet<String> {
    findings.matches.iter().map(|found| joined(&found.member)).collect()
}

/// As [`matched`], without the file itself.
fn matched_within(findings: &Findings) -> BTreeSet<String> {
    matched(findings).into_iter().filter(|member| !member.is_empty()).collect()
}

fn skipped(findings: &Findings) -> Vec<(String, SkipReason)> {
    findings.skips.iter().map(|skip| (joined(&skip.member), skip.reason)).collect()
}

/// The marker is found in `member`, and everything was looked at.
#[track_caller]
fn finds(bytes: &[u8], member: &str) {
    let found = look(bytes);
    assert!(matched(&found).contains(member), "{member}: {found:?}");
    assert_eq!(skipped(&found), [], "{member}");
}

/// What this thread has computed so far: other work on the machine does not count.
fn cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap(), now.tv_nsec.try_into().unwrap())
}

#[track_caller]
fn says(found: &Findings, reason: SkipReason) {
    assert!(found.skips.iter().any(|skip| skip.reason == reason), "{reason:?} in {found:?}");
}

#[test]
fn every_format_is_looked_into() {
    for format in formats::good() {
        finds(&format.bytes, format.member);
    }
}

#[test]
fn a_deb_is_looked_into_down_to_its_files() {
    let data = tar("./usr/bin/x", &plain(), |_| ());
    let deb =
        ar(&[("debian-binary", b"2.0\n"), ("control.tar.gz", &gzip(b"")), ("data.tar.gz", &gzip(&data))]);
    finds(&deb, "data.tar.gz > content > usr/bin/x");
}

#[test]
fn streams_in_a_row_are_one_content_and_zeros_behind_them_nothing() {
    finds(&[gzip(b"hay"), gzip(&plain()), vec![0; 700]].concat(), "content");
    for sample in [BZIP2, XZ, ZSTD] {
        finds(&[packed(sample), packed(sample)].concat(), "content");
        finds(&[packed(sample), vec![0; 512]].concat(), "content");
    }
    // A marker across the border of two streams.
    let across = [gzip(b"hay needle"), gzip(b"-47 hay")].concat();
    assert_eq!(matched(&look(&across)), ["content".to_owned()].into());
    // A container behind the end is looked into as well.
    let behind = [gzip(b"hay"), b"\0\0".to_vec(), packed(ZSTD)].concat();
    finds(&behind, "appended > content");
}

#[test]
fn a_program_or_a_picture_in_front_of_a_zip_hides_nothing() {
    let entry = Entry::of_plain("a", 8, &packed(DEFLATE));
    for front in [&b"MZ a program that unpacks itself"[..], b"\x89PNG\r\n\x1a\n", b"%PDF-1.7\n"] {
        finds(&[front, &zip(std::slice::from_ref(&entry))].concat(), "a");
    }
}

#[test]
fn a_zip_at_the_end_of_a_tar_is_read_once_and_one_across_its_members_both_ways() {
    let zip = samples::zip(&[Entry::of_plain("deep.txt", 0, &samples::plain())]);
    let once = look(&samples::tar("inner.zip", &zip, |_| {}));
    assert_eq!(once.matches.iter().filter(|found| found.member.len() == 2).count(), 1, "{:?}", once.matches);
    // An unzipper reads this one from the header of the tar on: other bytes than the member's.
    let mut behind = samples::tar("inner.zip", &zip, |_| {});
    let tail = samples::zip(&[Entry::of_plain("other.txt", 0, &samples::plain())]);
    behind.extend_from_slice(&tail);
    let found = look(&behind);
    let names: Vec<String> = found.matches.iter().map(|found| joined(&found.member)).collect();
    assert!(names.iter().any(|name| name.ends_with("other.txt")), "{names:?}");
    assert!(names.iter().any(|name| name.ends_with("deep.txt")), "{names:?}");
}

#[test]
fn what_is_encrypted_or_has_no_reader_is_said() {
    let mut entry = Entry::of_plain("secret", 8, b"whatever it is");
    entry.flags = 1;
    assert_eq!(skipped(&look(&zip(&[entry]))), [("secret".to_owned(), SkipReason::Encrypted)]);
    let odd = Entry::of_plain("odd", 1, b"shrunk");
    assert_eq!(skipped(&look(&zip(&[odd]))), [("odd".to_owned(), SkipReason::Unsupported)]);
    for magic in [&b"Rar!\x1a\x07\x01\0"[..], b"7z\xbc\xaf\x27\x1c\0\x04", b"MSCF\0\0\0\0"] {
        let found = look(&[magic, &[0; 64]].concat());
        assert!(!found.skips.is_empty(), "{magic:?}");
    }
}

#[test]
fn a_zip_that_contradicts_itself_is_read_both_ways_and_said() {
    let hidden = Entry::of_plain("hidden", 8, &packed(DEFLATE));
    let shown = Entry {
        data: b"hay".to_vec(),
        size: 3,
        crc: crc32fast::hash(b"hay"),
        ..Entry::of_plain("shown", 0, b"")
    };
    // A local header that the directory does not know.
    let body = [hidden.local(), shown.local()].concat();
    let at = u32::try_from(hidden.local().len()).unwrap();
    let found = look(&end_zip(body, &shown.central(at), 1));
    assert!(matched(&found).contains("hidden"), "{found:?}");
    says(&found, SkipReason::Malformed);
    // A directory that says stored where the local header says deflate.
    let lying = Entry { method: 0, ..hidden.clone() };
    let found = look(&end_zip(hidden.local(), &lying.central(0), 1));
    assert!(matched(&found).contains("hidden"), "{found:?}");
    says(&found, SkipReason::Malformed);
    // Two entries of one name, entries that share their bytes, and wrong sizes and sums.
    says(
        &look(&zip(&[shown.clone(), Entry { name: "shown".into(), ..hidden.clone() }])),
        SkipReason::Malformed,
    );
    let shared = [hidden.central(0), Entry { name: "hiddem".into(), ..hidden.clone() }.central(0)].concat();
    says(&look(&end_zip(hidden.local(), &shared, 2)), SkipReason::Malformed);
    for wrong in [Entry { size: 7, ..hidden.clone() }, Entry { crc: 7, ..hidden.clone() }] {
        let found = look(&zip(&[wrong]));
        assert!(matched(&found).contains("hidden"), "{found:?}");
        says(&found, SkipReason::Malformed);
    }
    // A second archive in front of the one that readers find.
    let found = look(&[zip(&[hidden]), zip(&[shown])].concat());
    assert!(matched(&found).contains("hidden"), "{found:?}");
}

#[test]
fn tar_dialects_are_read_and_smuggled_members_found() {
    let data = gzip(&plain());
    let long = "d/".repeat(120) + "x";
    let mut gnu = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(u64::try_from(data.len()).unwrap());
    gnu.append_data(&mut header, &long, &data[..]).unwrap();
    finds(&gnu.into_inner().unwrap(), &format!("{long} > content"));

    let pax = |records: &[u8], size: Option<u64>| {
        let extended = tar("PaxHeaders/x", records, |header| header.set_entry_type(tar::EntryType::XHeader));
        let extended = extended.get(..1024).unwrap().to_vec();
        let mut member = tar("x", &data, |_| ());
        if let Some(size) = size {
            let mut header = tar::Header::new_ustar();
            header.as_mut_bytes().copy_from_slice(&member[..512]);
            header.set_size(size);
            header.set_cksum();
            member[..512].copy_from_slice(header.as_bytes());
        }
        [extended, member].concat()
    };
    finds(&pax(b"16 path=renamed\n", None), "renamed > content");
    let told = format!("size={}\n", data.len());
    let record = format!("{} {told}", told.len() + 3);
    finds(&pax(record.as_bytes(), None), "x > content");
    says(&look(&pax(record.as_bytes(), Some(0))), SkipReason::Malformed);
    says(&look(&pax(b"99 broken\n", None)), SkipReason::Malformed);

    // `tar -i` reads what stands behind the end.
    let two = [tar("a", b"hay", |_| ()), tar("b", &data, |_| ())].concat();
    finds(&two, "b > content");
    // Names that lead out, and links, are labels.
    finds(&cpio_new(&[("../../etc/x", &data), ("/etc/x", b"")]), "../../etc/x > content");
}

#[test]
fn old_sparse_members_are_put_together() {
    // The member is a tar whose first member is a hole: only with the hole in it is the second one found.
    let (first, second) = (tar("a", &[0; 512], |_| ()), tar("b", &gzip(&plain()), |_| ()));
    let (first, second) = (&first[..512], &second[..1024]);
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::new(b'S'));
    header.set_path("s").unwrap();
    header.set_size(512 + 1024);
    let gnu = header.as_gnu_mut().unwrap();
    for (piece, (offset, length)) in gnu.sparse.iter_mut().zip([(0, 512), (1024, 1024)]) {
        piece.offset.copy_from_slice(format!("{offset:011o}\0").as_bytes());
        piece.numbytes.copy_from_slice(format!("{length:011o}\0").as_bytes());
    }
    gnu.realsize.copy_from_slice(format!("{:011o}\0", 2048).as_bytes());
    header.set_cksum();
    finds(&[header.as_bytes(), first, second, &[0; 1024]].concat(), "s > b > content");
}

#[test]
fn dictionaries_of_gigabytes_are_refused_before_they_are_taken() {
    let lzma = [&b"\x5d\xff\xff\xff\xff"[..], &[0xff; 8], &[0; 40]].concat();
    says(&look(&lzma), SkipReason::Limit);
    // A frame of zstd with a window of 2 GiB.
    says(&look(&[&b"\x28\xb5\x2f\xfd\0\xa8"[..], &[0; 40]].concat()), SkipReason::Limit);
    // The first block of xz with a dictionary of 4 GiB - 1.
    let mut xz = packed(XZ);
    let at = xz.windows(2).skip(12).position(|pair| pair == b"\x21\x01").unwrap() + 12;
    xz[at + 2] = 40;
    says(&look(&xz), SkipReason::Limit);
    let mut entry =
        Entry::of_plain("a", 14, &[b"\x09\x04\x05\0\x5d\xff\xff\xff\xff".as_slice(), &[0; 40]].concat());
    entry.flags = 2;
    says(&look(&zip(&[entry])), SkipReason::Limit);
}

#[test]
fn bombs_are_limited_in_every_direction() {
    let begun = cpu();
    let zeros = gzip(&vec![0; 40 << 20]);
    says(&look(&zeros), SkipReason::Limit);
    let mut nested = gzip(&plain());
    for _ in 0..12 {
        nested = gzip(&nested);
    }
    says(&look(&nested), SkipReason::Limit);
    let entries: Vec<Entry> = (0..50)
        .map(|n| Entry { size: 0, crc: 0, ..Entry::of_plain(&n.to_string(), 8, &zeros[10..]) })
        .collect();
    says(&look(&zip(&entries)), SkipReason::Limit);
    // Many entries that share one body.
    let one = Entry::of_plain("n", 8, &packed(DEFLATE));
    let names = (0..20_000).map(|n| Entry { name: n.to_string(), ..one.clone() });
    let directory: Vec<u8> = names.flat_map(|entry| entry.central(0)).collect();
    let found = look(&end_zip(one.local(), &directory, 20_000));
    says(&found, SkipReason::Limit);
    // One entry that is told again and again is one entry.
    let found = look(&end_zip(one.local(), &one.central(0).repeat(20_000), 20_000));
    assert_eq!(found.matches.len(), 1, "{found:?}");
    assert!(cpu() - begun < Duration::from_secs(20), "{:?}", cpu() - begun);
}

/// Samples whose packed content has a checksum, and how many of their first bytes tell the format.
fn summed() -> Vec<(&'static str, Vec<u8>, usize)> {
    formats::good()
        .into_iter()
        .filter_map(|format| {
            let magic = match format.kind {
                "gzip" => 2,
                "bzip2" => 10,
                "xz" => 6,
                "zstd" | "zip deflate" | "zip deflate64" | "zip bzip2" | "zip zstd" | "zip lzma"
                | "zip xz" => 4,
                kind if kind.starts_with("7z") => 6,
                _ => return None,
            };
            Some((format.kind, format.bytes, magic))
        })
        .collect()
}

#[test]
fn one_changed_byte_is_never_clean() {
    let mut engine = engine();
    for (kind, bytes, magic) in summed() {
        for at in magic..bytes.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= change;
                let found = super::look(&mut engine, &ScanLimits::default(), &bytes);
                assert!(
                    !found.skips.is_empty() || !found.matches.is_empty(),
                    "{kind} changed at {at} by {change}"
                );
            }
        }
    }
}
