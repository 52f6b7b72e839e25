//! What was looked at: signed receipts, the options of ordered scans, and what nobody has looked at.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;
use tm_tests::{lab::Lab, samples};

/// Checks a signature with a program that is not ours.
fn openssl_accepts(folder: &Path, receipt: &Value, signed: &[u8]) -> bool {
    let bytes = |name: &str| STANDARD.decode(receipt[name].as_str().expect("a text")).expect("base64");
    let file = |name: &str, content: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, content).expect("a temporary folder is writable");
        path
    };
    let (key, signature) = (file("key", &bytes("key")), file("signature", &bytes("signature")));
    let text = file("text", signed);
    let done = Command::new("openssl")
        .args(["dgst", "-sha256", "-keyform", "DER", "-verify"])
        .arg(key)
        .arg("-signature")
        .args([signature, text])
        .output()
        .expect("openssl can be run");
    done.status.success()
}

#[test]
fn a_receipt_is_signed_by_the_endpoint_and_anybody_can_check_it() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("signed");
    fs::write(folder.join("a"), "harmless").unwrap();
    lab.scan(&agent, &folder).expect(0);

    let task = lab.newest_task(&agent).unwrap();
    let receipt = &task["result"]["receipt"];
    assert_eq!(receipt["verified"], true, "{task}");
    let signed = STANDARD.decode(receipt["signed_bytes_b64"].as_str().unwrap()).unwrap();
    let text = String::from_utf8(signed.clone()).unwrap();
    let hex: String = folder.as_os_str().as_encoded_bytes().iter().map(|b| format!("{b:02x}")).collect();
    for line in [
        format!("task {}", task["id"].as_str().unwrap()),
        format!("endpoint {}", task["endpoint"].as_str().unwrap()),
        format!("path {hex}"),
        "files 1".to_owned(),
        "verdict clean".to_owned(),
        "whole true".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    let scratch = lab.folder("openssl");
    assert!(openssl_accepts(&scratch, receipt, &signed));
    let forged = text.replace("files 1", "files 2");
    assert_ne!(forged, text);
    assert!(!openssl_accepts(&scratch, receipt, forged.as_bytes()), "the control: it can say no");

    let shown = lab.tmctl(["task", "show", task["id"].as_str().unwrap()]).expect(0);

    assert!(shown.out().contains("signed by the endpoint's key, verified"), "{}", shown.both());
}

#[test]
fn coverage_names_what_nobody_has_looked_at() {
    let lab = Lab::start();
    let agent = lab.agent();
    let idle = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let folder = lab.folder("web");
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/a"), "harmless").unwrap();
    let coverage = |path: &Path, more: &[&str]| -> Value {
        let mut args = vec!["coverage", "-o", "json", "--path", path.to_str().unwrap()];
        args.extend(more);
        let done = lab.tmctl(args).expect(0);

        serde_json::from_str(&done.out()).expect("JSON")
    };
    let of = |view: &Value, id: &str| -> Value {
        let all = view["endpoints"].as_array().unwrap().clone();
        all.into_iter().find(|e| e["id"] == id).expect("it is listed")
    };
    let (one, other) = (agent.id.clone(), idle.id.clone());
    let before = coverage(&folder, &[]);
    assert_eq!(
        (before["counts"]["never"].as_u64(), before["counts"]["covered"].as_u64()),
        (Some(2), Some(0))
    );

    lab.scan(&agent, &folder).expect(0);
    // The scan covers what it was ordered for and what is below, not what is above, and no other endpoint.
    for path in [folder.clone(), folder.join("sub"), folder.join("./sub/")] {
        let view = coverage(&path, &[]);
        let found = of(&view, &one);
        assert_eq!(found["standing"], "covered", "{}: {view}", path.display());
        assert_eq!(
            (&found["whole"]["verdict"], &found["whole"]["verified"]),
            (&"clean".into(), &true.into())
        );
        assert_eq!(found["whole"]["patterns"], serde_json::json!(["eicar.yar"]));
        assert_eq!(of(&view, &other)["standing"], "never");
    }
    for path in [folder.parent().unwrap(), Path::new("/"), &folder.with_extension("x")] {
        assert_eq!(coverage(path, &[])["counts"]["never"], 2, "{}", path.display());
    }
    assert_eq!(coverage(&folder, &[other.as_str()])["endpoints"].as_array().unwrap().len(), 1);

    // A gap is no cover, and does not undo an older look.
    let gaps = lab.folder("gaps");
    fs::write(gaps.join("big"), vec![b'x'; 5000]).unwrap();
    let limited = |path: &Path| {
        let path = path.to_str().unwrap();
        lab.tmctl(["scan", "start", &one, "--path", path, "--max-file-size", "4KiB", "--wait"])
    };
    limited(&gaps).expect(11);
    let view = coverage(&gaps, &[]);
    let found = of(&view, &one);
    assert_eq!(
        (&found["standing"], &found["last"]["gaps"]["limit"]),
        (&"incomplete".into(), &1.into()),
        "{view}"
    );
    assert!(found["whole"].is_null(), "{view}");

    let list = lab.tmctl(["coverage", "--path", gaps.to_str().unwrap()]).expect(0);

    assert!(list.out().contains("limit 1"), "{}", list.both());
    assert!(list.both().contains("0 covered, 0 stale, 1 incomplete, 1 never"), "{}", list.both());
    for bad in [&["coverage", "--days", "0"][..], &["coverage", "--path", "srv"], &["coverage", "nobody"]] {
        assert!([2, 3].contains(&lab.tmctl(bad).code()) || lab.tmctl(bad).code() == 1, "{bad:?}");
        assert_ne!(lab.tmctl(bad).code(), 0, "{bad:?}");
    }
}

#[test]
fn a_scan_stays_within_its_share_of_a_core() {
    let lab = Lab::start();
    let agent = lab.agent();
    // Its loop takes CPU time for every file.
    let slow = "rule slow { condition: for any i in (0..30000) : (uint8(i) == 256) }";
    lab.import("slow.yar", slow).expect(0);
    let folder = lab.folder("much");
    let chunk: Vec<u8> =
        (0..256 << 10).map(|n: u32| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    for n in 0..30 {
        fs::write(folder.join(n.to_string()), &chunk).unwrap();
    }
    let path = folder.to_str().unwrap();
    let scan = |more: &[&str]| -> (f64, f64) {
        let id = agent.id.clone();
        let mut args = vec!["scan", "start", &id, "--path", path, "--wait"];
        args.extend(more);
        lab.tmctl(args).expect(0);
        let result = lab.newest_task(&agent).unwrap()["result"].clone();
        assert_eq!(result["files"], 30);
        (result["cpu_s"].as_f64().unwrap(), result["elapsed_s"].as_f64().unwrap())
    };
    let started = Instant::now();
    let (cpu, elapsed) = scan(&["--cpu", "20%"]);
    assert!(cpu > 0.2, "there was something to hold: {cpu} s");
    let held = cpu / elapsed;
    assert!(held <= 0.25, "{cpu} s of CPU in {elapsed} s");
    assert!(started.elapsed() >= Duration::from_secs_f64(elapsed), "the receipt's time is real");
    let (cpu, elapsed) = scan(&[]);
    // Where much else runs the held one makes room besides, and the free one gets little.
    assert!(
        cpu / elapsed > held * 1.5,
        "the control: without a limit it uses more, {cpu} s of CPU in {elapsed} s"
    );
}
