//! Files up: resumed where they stood, and nothing that is not right.

use std::{fs, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rustls::ClientConfig;
use serde_json::Value;
use tm_protocol::ids::Sha256;
use tm_tests::{
    FaultProxy, Lab, PATIENCE,
    bulk::{Answer, BulkLink},
    fault_proxy::Way,
    wait_for,
};

use super::{enrolled, runtime};

/// What is sent at a time: what a cut costs at most.
const PART: usize = 128 << 10;

fn announcement(size: u64, digest: Sha256) -> Vec<u8> {
    format!(r#"{{"size": {size}, "sha256": "{digest}", "kind": "evidence"}}"#).into_bytes()
}

fn json(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or(Value::Null)
}

async fn connect(lab: &Lab, config: &Arc<ClientConfig>) -> BulkLink {
    BulkLink::connect(lab.agent_port, Arc::clone(config)).await.expect("the port answers")
}

/// Begins one; its id.
async fn begin(link: &mut BulkLink, bytes: &[u8]) -> String {
    let begun = link
        .ask("POST /v1/uploads", "", &announcement(bytes.len() as u64, Sha256::of(bytes)))
        .await
        .expect("it answers");
    assert_eq!(begun.status, 201, "{begun:?}");
    json(&begun)["id"].as_str().expect("it has an id").to_owned()
}

fn content(length: u32) -> Vec<u8> {
    (0..length).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()
}

fn folder(lab: &Lab) -> PathBuf {
    lab.manager_data().join("uploads")
}

#[test]
fn an_upload_over_a_link_that_is_cut_20_times_sends_hardly_anything_twice() {
    let (lab, runtime) = (Lab::start(), runtime());
    let proxy = FaultProxy::start(lab.agent_port);
    let config = enrolled(&lab, &runtime, 1).remove(0);
    let bytes = content(20 << 20);
    proxy.cut_every(Way::Up, Some(1 << 20));
    let put = |id: &str| format!("PUT /v1/uploads/{id}");
    let id = runtime.block_on(async {
        let connect = || BulkLink::connect(proxy.address(), Arc::clone(&config));
        let id = begin(&mut connect().await.unwrap(), &bytes).await;
        'links: loop {
            let mut link = connect().await.unwrap();
            let head = link.ask(&format!("HEAD /v1/uploads/{id}"), "", &[]).await.unwrap();
            assert_eq!((head.status, head.number("upload-length")), (204, Some(bytes.len() as u64)));
            let mut offset = head.number("upload-offset").unwrap();
            while head.header("upload-complete") == Some("?0") {
                let from = usize::try_from(offset).unwrap();
                let part = &bytes[from..bytes.len().min(from + PART)];
                let sent = link.ask(&put(&id), &format!("Upload-Offset: {offset}\r\n"), part).await;
                // Cut: what the manager has of it, it says.
                let Ok(sent) = sent else { continue 'links };
                if sent.status != 200 {
                    continue 'links;
                }
                offset = json(&sent)["offset"].as_u64().unwrap();
                if json(&sent)["complete"] == true {
                    break 'links;
                }
            }
            break;
        }
        id
    });
    assert!(proxy.cuts() >= 20, "{} cuts", proxy.cuts());
    let twice = proxy.moved(Way::Up).saturating_sub(bytes.len() as u64);
    println!("{} cuts, {} bytes for each besides", proxy.cuts(), twice / proxy.cuts());
    // What of a part is on its way when the link is cut is lost, and a handshake comes with each link.
    assert!(twice < proxy.cuts() * (PART as u64 + (16 << 10)), "{twice} bytes, {} cuts", proxy.cuts());
    assert!(fs::read(folder(&lab).join(format!("{id}.whole"))).unwrap() == bytes);
}

/// Goes on with an upload over one new link, a part at a time, until it is whole.
async fn go_on(at: SocketAddr, config: &Arc<ClientConfig>, id: &str, bytes: &[u8]) -> io::Result<()> {
    let mut link = BulkLink::connect(at, Arc::clone(config)).await?;
    let head = link.ask(&format!("HEAD /v1/uploads/{id}"), "", &[]).await?;
    let offset = head.number("upload-offset").ok_or(io::ErrorKind::NotFound)?;
    let mut from = usize::try_from(offset).map_err(io::Error::other)?;
    while from < bytes.len() {
        let part = &bytes[from..bytes.len().min(from + PART)];
        let headers = format!("Upload-Offset: {from}\r\n");
        let sent = link.ask(&format!("PUT /v1/uploads/{id}"), &headers, part).await?;
        assert_eq!(sent.status, 200, "{sent:?}");
        from += part.len();
    }
    Ok(())
}

#[test]
fn a_flipped_bit_costs_an_upload_its_link_and_never_a_byte() {
    let (lab, runtime) = (Lab::start(), runtime());
    let proxy = FaultProxy::start(lab.agent_port);
    let config = enrolled(&lab, &runtime, 1).remove(0);
    let bytes = content(4 << 20);
    let id = runtime.block_on(async {
        let id = begin(&mut connect(&lab, &config).await, &bytes).await;
        // In either handshake, in a part, in what answers a part.
        for (way, at) in [(Way::Up, 100), (Way::Down, 1_000), (Way::Up, 300_000), (Way::Down, 3_000)] {
            let flips = proxy.flips();
            proxy.flip(way, Some(at));
            let ended = go_on(proxy.address(), &config, &id, &bytes).await;
            assert!(ended.is_err(), "{way:?} {at}: the link ends");
            assert_eq!(proxy.flips(), flips + 1, "{way:?} {at}");
            proxy.flip(way, None);
        }
        go_on(proxy.address(), &config, &id, &bytes).await.expect("the control: without a fault it goes on");
        id
    });
    assert!(fs::read(folder(&lab).join(format!("{id}.whole"))).unwrap() == bytes);
}

#[test]
fn an_upload_goes_on_after_a_restart_of_the_manager() {
    let (mut lab, runtime) = (Lab::start(), runtime());
    let config = enrolled(&lab, &runtime, 1).remove(0);
    let bytes = content(300_000);
    let put = |id: &str| format!("PUT /v1/uploads/{id}");
    let id = runtime.block_on(async {
        let mut link = connect(&lab, &config).await;
        let id = begin(&mut link, &bytes).await;
        let half = link.ask(&put(&id), "Upload-Offset: 0\r\n", &bytes[..200_000]).await.unwrap();
        assert_eq!(
            (half.status, &json(&half)["offset"], &json(&half)["complete"]),
            (200, &200_000.into(), &false.into())
        );
        id
    });
    lab.kill9_manager();
    runtime.block_on(async {
        let mut link = connect(&lab, &config).await;
        assert_eq!(begin(&mut link, &bytes).await, id, "the same announced again is the same upload");
        let done = link.ask(&put(&id), "Upload-Offset: 200000\r\n", &bytes[200_000..]).await.unwrap();
        assert_eq!((done.status, &json(&done)["complete"]), (200, &true.into()));
    });
    let whole = folder(&lab).join(format!("{id}.whole"));
    assert!(fs::read(&whole).unwrap() == bytes);
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&whole).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn lies_about_uploads_are_refused() {
    let (lab, runtime) = (Lab::start(), runtime());
    let mut configs = enrolled(&lab, &runtime, 2);
    let (other, own) = (configs.remove(1), configs.remove(0));
    let bytes = content(100_000);
    runtime.block_on(async {
        let mut link = connect(&lab, &own).await;
        let id = begin(&mut link, &bytes).await;
        let at = |offset: &str| format!("Upload-Offset: {offset}\r\n");
        let put = format!("PUT /v1/uploads/{id}");

        // Another agent neither sees nor touches it.
        for method in ["HEAD", "PUT", "DELETE"] {
            let mut stranger = connect(&lab, &other).await;
            let body: &[u8] = if method == "PUT" { b"x" } else { b"" };
            let answer = stranger.ask(&format!("{method} /v1/uploads/{id}"), &at("0"), body).await.unwrap();
            assert_eq!(answer.status, 404, "{method}");
        }

        // Places and lengths that are wrong: that shows before any of the body has come.
        for (headers, length, status) in [
            (at("1"), 10, 409),
            (at("100001"), 10, 409),
            (at("18446744073709551615"), 10, 409),
            (at("0"), 100_001, 413),
            (at("-1"), 10, 400),
            (at("+0"), 10, 400),
            (String::new(), 10, 400),
        ] {
            let mut link = connect(&lab, &own).await;
            let head = format!("{put} HTTP/1.1\r\nHost: m\r\n{headers}Content-Length: {length}\r\n\r\n");
            link.send(head.as_bytes()).await.unwrap();
            let answer = link.answer(true, true).await.unwrap();
            assert_eq!(answer.status, status, "{headers}");
            if status == 409 {
                assert_eq!(answer.number("upload-offset"), Some(0));
            }
        }
        // A body that does not say where it ends is not begun to be read.
        let mut endless = connect(&lab, &own).await;
        let head =
            format!("{put} HTTP/1.1\r\nHost: m\r\nUpload-Offset: 0\r\nTransfer-Encoding: chunked\r\n\r\n");
        endless.send(head.as_bytes()).await.unwrap();
        assert_eq!(endless.answer(true, true).await.unwrap().status, 411);

        for announced in [
            "{}".to_owned(),
            "nonsense".to_owned(),
            format!(r#"{{"size": -1, "sha256": "{}", "kind": "evidence"}}"#, Sha256::of(b"")),
            format!(r#"{{"size": 1, "sha256": "{}", "kind": "other"}}"#, Sha256::of(b"")),
            format!(r#"{{"size": 1, "sha256": "{}", "kind": "evidence", "name": "../x"}}"#, Sha256::of(b"")),
            r#"{"size": 1, "sha256": "../../x", "kind": "evidence"}"#.to_owned(),
        ] {
            let answer = link.ask("POST /v1/uploads", "", announced.as_bytes()).await.unwrap();
            assert_eq!(answer.status, 400, "{announced}");
        }
        for size in [0, u64::MAX, 9 << 30] {
            let answer =
                link.ask("POST /v1/uploads", "", &announcement(size, Sha256::of(b"x"))).await.unwrap();
            assert_eq!(answer.status, 413, "{size}");
        }
        let long = vec![b' '; 5000];
        let mut shouting = connect(&lab, &own).await;
        assert_eq!(shouting.ask("POST /v1/uploads", "", &long).await.unwrap().status, 413);
        for path in [
            "/v1/uploads/x",
            "/v1/uploads/../patterns",
            "/v1/uploads/",
            &format!("/v1/uploads/{}", id.to_uppercase()),
        ] {
            assert_eq!(link.ask(&format!("HEAD {path}"), "", &[]).await.unwrap().status, 404, "{path}");
        }

        // All of it, but something else.
        let mut wrong = bytes.clone();
        wrong[5] ^= 1;
        let answer = link.ask(&put, &at("0"), &wrong).await.unwrap();
        assert_eq!(answer.status, 422);
        assert_eq!(link.ask(&format!("HEAD /v1/uploads/{id}"), "", &[]).await.unwrap().status, 404);

        // Ten thousand that are begun and never gone on with.
        let mut refused = 0;
        for n in 0..10_000_u32 {
            let announced = announcement(1000, Sha256::of(&n.to_le_bytes()));
            let answer = link.ask("POST /v1/uploads", "", &announced).await.unwrap();
            match answer.status {
                201 => {}
                429 => refused += 1,
                status => panic!("{status}"),
            }
        }
        assert_eq!(refused, 10_000 - 8);
        assert_eq!(fs::read_dir(folder(&lab)).unwrap().count(), 16, "eight, with two files each");

        // The other is not held up by that, and the control: the right bytes are taken.
        let mut stranger = connect(&lab, &other).await;
        let id = begin(&mut stranger, &bytes).await;
        let done = stranger.ask(&format!("PUT /v1/uploads/{id}"), &at("0"), &bytes).await.unwrap();
        assert_eq!((done.status, &json(&done)["complete"]), (200, &true.into()));
    });
}

#[test]
fn an_upload_that_another_link_goes_on_with_is_let_go() {
    let (lab, runtime) = (Lab::start(), runtime());
    let config = enrolled(&lab, &runtime, 1).remove(0);
    let bytes = content(200_000);
    runtime.block_on(async {
        let mut first = connect(&lab, &config).await;
        let id = begin(&mut first, &bytes).await;
        let head = format!(
            "PUT /v1/uploads/{id} HTTP/1.1\r\nHost: m\r\nUpload-Offset: 0\r\nContent-Length: 200000\r\n\r\n"
        );
        first.send(head.as_bytes()).await.unwrap();
        first.send(&bytes[..100_000]).await.unwrap();
        // It says nothing more, as one whose network is gone.
        let mut second = connect(&lab, &config).await;
        let mut standing = 0;
        while standing < 65_536 {
            let head = second.ask(&format!("HEAD /v1/uploads/{id}"), "", &[]).await.unwrap();
            standing = head.number("upload-offset").unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let from = usize::try_from(standing).unwrap();
        let done = second
            .ask(&format!("PUT /v1/uploads/{id}"), &format!("Upload-Offset: {standing}\r\n"), &bytes[from..])
            .await
            .unwrap();
        assert_eq!((done.status, &json(&done)["complete"]), (200, &true.into()));
        let left = first.answer(true, true).await.map(|answer| answer.status);
        assert!(matches!(left, Ok(503) | Err(_)), "{left:?}");
    });
    wait_for("the file", PATIENCE, || {
        fs::read_dir(folder(&lab))
            .unwrap()
            .any(|e| e.unwrap().path().extension().is_some_and(|e| e == "whole"))
            .then_some(())
    });
}
