//! `tm-agent scan --standalone`, by its exit codes and lines.

use std::fs;

use tm_tests::{samples, standalone};

#[test]
fn the_exit_code_says_clean_detected_or_incomplete() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(path.join("c.txt"), samples::look_alike()).unwrap();
    let verdict = |code: i32, word: &str| {
        let output = standalone::scan(samples::EICAR_RULE, path, &[]).expect(code);
        let summary = standalone::lines(&output, "summary");
        assert_eq!(summary.len(), 1, "{}", output.both());
        assert_eq!(summary[0]["verdict"], word);
        assert!(output.out().lines().last().unwrap().contains("\"summary\""), "it is the last line");
        output
    };
    verdict(0, "clean");
    fs::write(path.join("secret.zip"), samples::encrypted_zip()).unwrap();
    let output = verdict(2, "incomplete");
    let skipped = standalone::lines(&output, "skipped");
    assert_eq!((skipped.len(), &skipped[0]["reason"]), (1, &"encrypted".into()), "{}", output.both());
    fs::write(path.join("b.tar.gz"), samples::nested()).unwrap();
    let output = verdict(1, "detected");
    let found = standalone::lines(&output, "detection");
    assert_eq!(found.len(), 1, "{}", output.both());
    assert_eq!(found[0]["rule"], samples::EICAR_RULE_NAME);
    assert_eq!(standalone::lines(&output, "summary")[0]["skipped"]["encrypted"], 1, "the gap stays counted");
}

#[test]
fn what_cannot_be_scanned_is_an_error_and_wrong_usage_is_64() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    standalone::scan(samples::EICAR_RULE, &missing, &[]).expect(2);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("/etc", &link).unwrap();
    standalone::scan(samples::EICAR_RULE, &link, &[]).expect(2);
    standalone::scan(samples::BROKEN_RULE, folder.path(), &[]).expect(2);
    standalone::scan(samples::EICAR_RULE, folder.path(), &["--no-such-option"]).expect(64);
    standalone::scan(samples::EICAR_RULE, folder.path(), &[]).expect(0);
}
