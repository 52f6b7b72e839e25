//! Patterns down: parts, cuts, what has changed.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
};

use tm_protocol::ids::Sha256;
use tm_tests::{
    Agent, Lab, PATIENCE, bulk::BulkLink, fault_proxy::Way, raw, samples, tmpfs::Tmpfs, wait_for,
};

use super::{enrolled, import, list, runtime};

/// A folder with the one file that the lists name.
fn dirty(lab: &Lab) -> PathBuf {
    let folder = lab.folder("dirty");
    fs::write(folder.join("sample"), samples::eicar()).expect("the lab's folder is writable");
    folder
}

/// What an agent has of a pattern.
fn kept(agent: &Agent, digest: Sha256) -> PathBuf {
    agent.data.join("patterns").join(digest.to_string())
}

fn part(agent: &Agent, digest: Sha256) -> PathBuf {
    agent.data.join("patterns").join(format!("{digest}.part"))
}

#[test]
fn a_pattern_is_served_in_any_part_over_one_link() {
    let (lab, runtime) = (Lab::start(), runtime());
    let (digest, bytes) = import(&lab, &list(0..3000));
    let config = enrolled(&lab, &runtime, 1).remove(0);
    let (get, tag) = (format!("GET /v1/patterns/{digest}"), format!("\"{digest}\""));
    let last = bytes.len() - 1;
    runtime.block_on(async {
        let mut link = BulkLink::connect(lab.agent_port, config).await.unwrap();
        let whole = link.ask(&get, "", &[]).await.unwrap();
        assert_eq!((whole.status, whole.header("etag")), (200, Some(tag.as_str())));
        assert_eq!(whole.header("accept-ranges"), Some("bytes"));
        assert!(whole.body == bytes);
        let head = link.ask(&format!("HEAD /v1/patterns/{digest}"), "", &[]).await.unwrap();
        assert_eq!((head.status, head.number("content-length")), (200, Some(bytes.len() as u64)));
        for (range, expected) in [
            ("0-0".to_owned(), 0..1),
            ("100-99999999".to_owned(), 100..bytes.len()),
            (format!("{last}-"), last..bytes.len()),
            ("-10".to_owned(), bytes.len() - 10..bytes.len()),
        ] {
            let headers = format!("Range: bytes={range}\r\nIf-Range: {tag}\r\n");
            let part = link.ask(&get, &headers, &[]).await.unwrap();
            assert_eq!(part.status, 206, "{range}");
            let said = format!("bytes {}-{}/{}", expected.start, expected.end - 1, bytes.len());
            assert_eq!(part.header("content-range"), Some(said.as_str()));
            assert!(part.body == bytes[expected], "{range}");
        }
        let beyond = link.ask(&get, &format!("Range: bytes={}-\r\n", bytes.len()), &[]).await.unwrap();
        let said = format!("bytes */{}", bytes.len());
        assert_eq!((beyond.status, beyond.header("content-range")), (416, Some(said.as_str())));
        for headers in
            ["Range: bytes=5-9\r\nIf-Range: \"other\"\r\n", "Range: bytes=1-2,4-5\r\n", "Range: x\r\n"]
        {
            let whole = link.ask(&get, headers, &[]).await.unwrap();
            assert!(whole.status == 200 && whole.body == bytes, "{headers}");
        }
        for (line, status) in [
            (format!("POST /v1/patterns/{digest}"), 405),
            (format!("GET /v1/patterns/{}", Sha256::of(b"none")), 404),
            ("GET /v1/patterns/../manager.toml".to_owned(), 404),
            (format!("GET /v1/patterns/{digest}/deltas"), 404),
            (format!("GET /v1/patterns/{digest}/deltas?from=x,{digest},,"), 404),
            (format!("GET /v1/deltas/{digest}"), 404),
            ("GET /".to_owned(), 404),
        ] {
            assert_eq!(link.ask(&line, "", &[]).await.unwrap().status, status, "{line}");
        }
        let metadata = link.ask("GET /v1/trust", "", &[]).await.unwrap();
        assert_eq!(metadata.status, 200);
        let unless = |digest: Sha256| format!("If-None-Match: \"{digest}\"\r\n");
        let same = link.ask("GET /v1/trust", &unless(Sha256::of(&metadata.body)), &[]).await.unwrap();
        assert_eq!((same.status, same.body.len()), (304, 0));
        let other = link.ask("GET /v1/trust", &unless(digest), &[]).await.unwrap();
        assert!(other.status == 200 && other.body == metadata.body);
        assert!(link.ask(&get, "", &[]).await.unwrap().body == bytes, "it was one link for all");
    });
    let stranger = raw::Raw::connect(lab.agent_port, b"http/1.1", None);
    let is_out = stranger.and_then(|mut raw| {
        raw.send(format!("{get} HTTP/1.1\r\nHost: m\r\n\r\n").as_bytes())?;
        Ok(raw.is_closed_within(PATIENCE))
    });
    assert!(is_out.unwrap_or(true), "nobody without a certificate");
}

#[test]
fn a_link_that_is_cut_every_64_kib_brings_a_pattern_whole_and_hardly_anything_twice() {
    let (lab, proxy) = Lab::start_behind_proxy();
    let agent = lab.agent();
    let dirty = dirty(&lab);
    let (digest, bytes) = import(&lab, &list(0..60_000));
    proxy.cut_every(Way::Down, Some(64 << 10));
    let (moved, cuts) = (proxy.moved(Way::Down), proxy.cuts());
    lab.scan(&agent, &dirty).expect(10);
    let (moved, cuts) = (proxy.moved(Way::Down) - moved, proxy.cuts() - cuts);
    let size = bytes.len() as u64;
    let twice = moved.saturating_sub(size);
    println!("{size} bytes, {cuts} cuts, {} bytes for each besides", twice / cuts);
    assert!(cuts >= size / (64 << 10), "{cuts} cuts");
    // A handshake, and what of a record (16 KiB) had come when the link was cut.
    assert!(twice < cuts * (24 << 10), "{moved} bytes for {size}, {cuts} cuts");
    assert!(fs::read(kept(&agent, digest)).unwrap() == bytes);
    assert_eq!(fs::metadata(kept(&agent, digest)).unwrap().mode() & 0o777, 0o600);
    assert!(!part(&agent, digest).exists());
}

#[test]
fn what_was_fetched_half_outlives_the_agent_and_is_not_believed() {
    let (mut lab, proxy) = Lab::start_behind_proxy();
    // Slow enough to be interrupted.
    lab.set("bulk_bytes_per_second", "\"512KiB\"");
    lab.restart_manager();
    let mut agent = lab.agent();
    let dirty = dirty(&lab);
    for is_changed in [false, true] {
        let numbers = if is_changed { 100_000..160_000 } else { 0..60_000 };
        let (digest, bytes) = import(&lab, &list(numbers));
        let moved = proxy.moved(Way::Down);
        let scan = lab.scan_in_background(&agent, &dirty);
        wait_for("a third to arrive", PATIENCE, || {
            let arrived = fs::metadata(part(&agent, digest)).map_or(0, |file| file.len());
            (arrived > bytes.len() as u64 / 3).then_some(())
        });
        agent.kill9();
        let half = fs::read(part(&agent, digest)).unwrap();
        assert!(half.len() < bytes.len() && half == bytes[..half.len()]);
        let meta = fs::metadata(part(&agent, digest)).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.uid()), (0o600, rustix::process::geteuid().as_raw()));
        if is_changed {
            let mut other = half.clone();
            other[1000] ^= 1;
            fs::write(part(&agent, digest), other).unwrap();
        }
        agent.run();
        scan.join().unwrap().expect(10);
        assert!(fs::read(kept(&agent, digest)).unwrap() == bytes);
        assert!(!part(&agent, digest).exists());
        let moved = proxy.moved(Way::Down) - moved;
        let size = bytes.len() as u64;
        if is_changed {
            assert!(moved > size + half.len() as u64, "it was begun anew");
        } else {
            assert!(moved < size + size / 5, "{moved} bytes for {size}, of which {} were there", half.len());
        }
    }
}

#[test]
fn a_full_disk_stands_in_the_way_of_no_scan() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    let dirty = dirty(&lab);
    agent.stop();
    let disk = Tmpfs::over(&agent.data, 8 * 1024, 1000);
    agent.run();
    lab.wait_connected(&agent);
    let ballast = disk.fill(1024);
    let (digest, bytes) = import(&lab, &list(0..60_000));
    lab.scan(&agent, &dirty).expect(10);
    assert!(!kept(&agent, digest).exists() && !part(&agent, digest).exists(), "there is no room");
    fs::remove_file(ballast).unwrap();
    lab.scan(&agent, &dirty).expect(10);
    assert!(fs::read(kept(&agent, digest)).unwrap() == bytes);
}

#[test]
fn of_a_new_version_only_what_has_changed_travels() {
    let (lab, proxy) = Lab::start_behind_proxy();
    let (one, other) = (lab.agent(), lab.agent());
    let dirty = dirty(&lab);
    let (old, _) = import(&lab, &list(0..200_000));
    for agent in [&one, &other] {
        lab.scan(agent, &dirty).expect(10);
    }
    // One in a hundred is new, one in a hundred is gone.
    let (new, bytes) = import(&lab, &list((0..202_000).filter(|n| n % 100 != 7)));
    let moved = proxy.moved(Way::Down);
    lab.scan(&one, &dirty).expect(10);
    let moved = proxy.moved(Way::Down) - moved;
    println!("{} bytes, of which {moved} travelled, {}x", bytes.len(), bytes.len() as u64 / moved);
    assert!(fs::read(kept(&one, new)).unwrap() == bytes);
    // A handshake and what else was said is in it; without it, it is a part in eighty.
    assert!(moved * 50 < bytes.len() as u64, "{moved} of {}", bytes.len());

    // A delta that was changed on the manager's disk is not used, and the whole comes.
    let deltas = fs::read_dir(lab.manager_data().join("deltas")).unwrap();
    let delta = deltas.map(|entry| entry.unwrap().path()).next().expect("it is kept");
    assert_eq!(fs::metadata(&delta).unwrap().permissions().mode() & 0o777, 0o600);
    let mut damaged = fs::read(&delta).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&delta, damaged).unwrap();
    let moved = proxy.moved(Way::Down);
    lab.scan(&other, &dirty).expect(10);
    assert!(proxy.moved(Way::Down) - moved > bytes.len() as u64);
    assert!(fs::read(kept(&other, new)).unwrap() == bytes);
    assert!(kept(&other, old).exists());
    let left = fs::read_dir(other.data.join("patterns")).unwrap().count();
    assert_eq!(left, 2, "the delta is not kept");
}
