//! House rules as tests: what a machine can check is not left to review.
//!
//! **Invariant:** every rule is proved to be able to fail (the tests named `…_would_be_noticed`).

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Longest file, in lines.
const LONGEST: usize = 800;

/// Which crates of ours a crate may use, tests included.
const CRATES: [(&str, &[&str]); 9] = [
    ("tm-protocol", &[]),
    ("tm-patterns", &["tm-protocol"]),
    ("tm-scanner", &["tm-patterns", "tm-protocol"]),
    ("tm-api", &["tm-protocol"]),
    // A rule is tried on the desk, before it is signed there.
    ("tmctl", &["tm-api", "tm-patterns", "tm-scanner", "tm-protocol"]),
    ("tm-agent", &["tm-protocol", "tm-patterns", "tm-scanner"]),
    ("tm-manager", &["tm-protocol", "tm-patterns", "tm-api", "tm-scanner"]),
    // It plays the thief of a manager, who signs with what he has.
    ("tm-tests", &["tm-protocol", "tm-api", "tm-patterns"]),
    ("xtask", &["tm-patterns"]),
];

/// Which rooms of the agent a room may use. Files beside the rooms (config, paths, …) are plumbing: the
/// composition root alone may know everything.
const AGENT: [(&str, &[&str]); 7] = [
    ("platform", &[]),
    ("scan", &["platform"]),
    // A user's scan is a scan whose files another process looks at.
    ("local", &["platform", "scan"]),
    ("cleanup", &["platform", "vault"]),
    // `execute` hands each task to its room, and has patterns fetched for it.
    ("tasks", &["platform", "scan", "connection", "vault", "cleanup"]),
    ("connection", &["platform"]),
    ("vault", &["platform"]),
];

/// The same for the manager.
const MANAGER: [(&str, &[&str]); 9] = [
    ("access", &[]),
    // Pure; the store applies it within the transaction of what happened.
    ("mitigation", &[]),
    ("store", &["mitigation"]),
    ("backup", &["store"]),
    ("forward", &["store"]),
    ("patterns", &["store"]),
    ("agents", &["store", "patterns"]),
    ("dispatch", &["store", "agents"]),
    ("http", &["store", "access", "mitigation", "patterns"]),
];

/// Modules that build everything; only the command line, which starts them, may use them.
const ROOTS: [&str; 4] = ["main", "cli", "daemon", "server"];

/// Cryptography comes from aws-lc-rs alone.
const BANNED: [&str; 4] = ["ring", "openssl", "openssl-sys", "native-tls"];

const PERMISSIVE: [&str; 15] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    "bzip2-1.0.6",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository").to_path_buf()
}

fn cargo(args: &[&str]) -> String {
    let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program).args(args).current_dir(root()).output().expect("cargo can be run");
    assert!(output.status.success(), "cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo prints UTF-8")
}

fn metadata() -> Value {
    let text = cargo(&[
        "metadata",
        "--locked",
        "--offline",
        "--format-version",
        "1",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]);
    serde_json::from_str(&text).expect("cargo prints JSON")
}

/// Every source file of ours, by its path within the repository.
fn sources() -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let mut open: Vec<PathBuf> =
        ["agent", "manager", "protocol", "tests", "packaging"].map(|name| root().join(name)).into();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).expect("readable").map(|entry| entry.expect("readable").path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root()).expect("it is within").to_string_lossy().into_owned();
            sources.insert(name, fs::read_to_string(&path).expect("sources are UTF-8"));
        }
    }
    assert!(sources.len() > 30, "the sources were not found: {:?}", sources.keys());
    sources
}

#[track_caller]
fn none(found: &[String]) {
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn crates_use_only_whom_they_may() {
    let metadata = metadata();
    let ours: BTreeSet<&str> = CRATES.iter().map(|(name, _)| *name).collect();
    let members: BTreeSet<String> = metadata["workspace_members"]
        .as_array()
        .expect("a workspace has members")
        .iter()
        .map(|id| package(&metadata, id)["name"].as_str().expect("a name").to_owned())
        .collect();
    assert_eq!(
        members.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        ours,
        "the table names every crate"
    );
    let mut found = Vec::new();
    for (name, allowed) in CRATES {
        let package = metadata["packages"].as_array().expect("packages").iter().find(|p| p["name"] == name);
        let package = package.expect("a member is a package");
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let dependency = dependency["name"].as_str().expect("a name");
            if ours.contains(dependency) && !allowed.contains(&dependency) {
                found.push(format!("{name} must not use {dependency}"));
            }
        }
    }
    none(&found);
}

fn package<'m>(metadata: &'m Value, id: &Value) -> &'m Value {
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().find(|package| package["id"] == *id).expect("every id is a package")
}

#[test]
fn banned_crates_are_not_built() {
    // `cargo metadata` lists optional dependencies that a weak feature mentions even when nothing turns
    // them on (ring behind rustls-webpki); `cargo tree` lists what is built.
    let tree =
        cargo(&["tree", "--locked", "--offline", "--workspace", "--prefix", "none", "--format", "{p}"]);
    let built: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(built.contains("aws-lc-rs") && built.contains("tm-agent"), "the control: {built:?}");
    let found: Vec<String> =
        BANNED.iter().filter(|name| built.contains(*name)).map(|n| (*n).into()).collect();
    none(&found);
}

#[test]
fn licences_are_permissive() {
    let metadata = metadata();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let licence = package["license"].as_str().unwrap_or("none");
        if !is_permissive(licence) {
            found.push(format!("{}: {licence}", package["name"]));
        }
    }
    none(&found);
    assert!(root().join("Cargo.lock").is_file());
    assert!(root().join("LICENSE").is_file());
}

/// An SPDX expression: `OR` needs one side, `AND` both; `/` is the old way to write `OR`.
fn is_permissive(expression: &str) -> bool {
    fn split<'e>(text: &'e str, word: &str) -> Option<(&'e str, &'e str)> {
        let mut depth = 0_i32;
        for (at, c) in text.char_indices() {
            match c {
                '(' => depth += 1,
                ')' => depth -= 1,
                _ if depth == 0 && text[at..].starts_with(word) => {
                    return Some((&text[..at], &text[at + word.len()..]));
                }
                _ => {}
            }
        }
        None
    }
    let text = expression.trim();
    // AND binds more tightly, so OR is split first.
    if let Some((left, right)) = split(text, " OR ").or_else(|| split(text, "/")) {
        return is_permissive(left) || is_permissive(right);
    }
    if let Some((left, right)) = split(text, " AND ") {
        return is_permissive(left) && is_permissive(right);
    }
    match text.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => is_permissive(inner),
        None => PERMISSIVE.contains(&text),
    }
}

#[test]
fn a_bad_licence_would_be_noticed() {
    for (expression, permissive) in [
        ("MIT", true),
        ("MIT/Apache-2.0", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0 AND MIT", false),
        ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
        ("MIT AND (GPL-3.0 OR AGPL-3.0)", false),
        ("none", false),
    ] {
        assert_eq!(is_permissive(expression), permissive, "{expression}");
    }
}

#[test]
fn every_file_says_what_it_is_for_and_is_of_a_readable_length() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        if !text.starts_with("//! ") {
            found.push(format!("{name} does not begin with a header"));
        }
        let lines = text.lines().count();
        if lines > LONGEST {
            found.push(format!("{name} has {lines} lines; where is the second noun?"));
        }
    }
    none(&found);
}

#[test]
fn exceptions_to_lints_give_a_reason_and_notice_when_they_are_needless() {
    let forbidden = [concat!("#[", "allow("), concat!("#![", "allow(")];
    let mut found = Vec::new();
    for (name, text) in sources() {
        for (number, line) in (1..).zip(text.lines()) {
            if forbidden.iter().any(|word| line.trim_start().starts_with(word)) {
                found.push(format!("{name}:{number}: use `expect` with a reason"));
            }
        }
    }
    none(&found);
}

#[test]
fn only_the_store_knows_sql() {
    let mut found = Vec::new();
    let mut inside = 0;
    for (name, text) in sources() {
        // A unit test may make up an error of the database.
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        if !mentions(text, "sqlx::") {
            continue;
        }
        if name.starts_with("manager/src/store/") {
            inside += 1;
        } else if name != "tests/tidy.rs" {
            found.push(format!("{name} uses sqlx"));
        }
    }
    none(&found);
    assert!(inside > 0, "the control: the store does");
}

fn mentions(text: &str, word: &str) -> bool {
    text.lines().any(|line| code(line).contains(word))
}

/// A line without its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

#[test]
fn rooms_use_only_whom_they_may() {
    let sources = sources();
    let mut found = rooms("agent/src/", &AGENT, &sources);
    found.extend(rooms("manager/src/", &MANAGER, &sources));
    none(&found);
}

/// What is wrong in one program: uses that the table does not allow, rooms it does not name.
fn rooms(base: &str, table: &[(&str, &[&str])], sources: &BTreeMap<String, String>) -> Vec<String> {
    let known: BTreeMap<&str, &[&str]> = table.iter().copied().collect();
    let mut found = Vec::new();
    let files = sources.iter().filter_map(|(name, text)| Some((name.strip_prefix(base)?, text)));
    for (name, text) in files {
        let (room, depth) = match name.split_once('/') {
            // `super::` in room/mod.rs is the crate, in room/file.rs the room.
            Some((room, rest)) => (room, rest.split('/').count() - usize::from(rest.ends_with("mod.rs"))),
            None => (name.trim_end_matches(".rs"), 0),
        };
        let allowed = known.get(room).copied();
        if allowed.is_none() && name.contains('/') && !ROOTS.contains(&room) {
            found.push(format!("{base}{name}: the table of rooms does not name `{room}`"));
        }
        for used in uses(text, depth) {
            if used == room {
                continue;
            }
            let is_room = known.contains_key(used.as_str());
            if is_room && allowed.is_some_and(|allowed| !allowed.contains(&used.as_str())) {
                found.push(format!("{base}{name}: `{room}` must not use `{used}`"));
            }
            if ROOTS.contains(&used.as_str()) && !ROOTS.contains(&room) {
                found.push(format!("{base}{name}: nothing uses `{used}`"));
            }
        }
    }
    found
}

/// The top-level modules that a file names, `depth` levels below the crate.
fn uses(text: &str, depth: usize) -> BTreeSet<String> {
    let text: String = text.lines().map(|line| format!("{}\n", code(line))).collect();
    let up = "super::".repeat(depth + 1);
    let mut names = BTreeSet::new();
    for start in ["crate::", up.as_str()] {
        for (at, _) in text.match_indices(start) {
            // `$crate::` in a macro and a longer chain of `super::` are other things.
            let before = text[..at].chars().next_back();
            if before.is_some_and(|c| c == ':' || c == '_' || c == '$' || c.is_alphanumeric()) {
                continue;
            }
            heads(&text[at + start.len()..], &mut names);
        }
    }
    names
}

/// The first names of a path or of a `{…}` group.
fn heads(rest: &str, names: &mut BTreeSet<String>) {
    let word =
        |text: &str| -> String { text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    let Some(group) = rest.strip_prefix('{') else {
        names.insert(word(rest));
        return;
    };
    let (mut depth, mut begins) = (0_i32, true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return,
            '}' => depth -= 1,
            ',' if depth == 0 => begins = true,
            c if c.is_whitespace() => {}
            _ if begins => {
                names.insert(word(&group[at..]));
                begins = false;
            }
            _ => {}
        }
    }
}

#[test]
fn a_forbidden_use_would_be_noticed() {
    let check = |name: &str, text: &str| {
        rooms("agent/src/", &AGENT, &BTreeMap::from([(format!("agent/src/{name}"), text.to_owned())])).len()
    };
    for (name, text, wrong) in [
        ("scan/walk.rs", "use crate::platform::fs;", 0),
        ("scan/walk.rs", "use crate::{platform, scan::{limits, tasks}};", 0),
        ("scan/walk.rs", "// crate::tasks knows more", 0),
        ("scan/walk.rs", "use crate::tasks::Journal;", 1),
        ("scan/walk.rs", "use crate::{\n    platform::fs,\n    tasks::{Journal, x},\n};", 1),
        ("scan/walk.rs", "fn f() { crate::daemon::stop() }", 1),
        ("scan/walk.rs", "use super::super::tasks;", 1),
        ("scan/mod.rs", "use super::tasks;", 1),
        ("platform/fs.rs", "use crate::scan::Limits;", 1),
        ("daemon.rs", "use crate::{tasks, scan, connection};", 0),
        ("attic/mod.rs", "", 1),
    ] {
        assert_eq!(check(name, text), wrong, "{name}: {text}");
    }
}

#[test]
fn units_and_documents_are_there() {
    for name in ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md", "LICENSE"] {
        let text = fs::read_to_string(root().join(name)).unwrap_or_default();
        assert!(text.len() > 200, "{name} is missing or empty");
    }
    for name in ["tm-agent", "tm-manager"] {
        let path = root().join(format!("packaging/systemd/{name}.service"));
        let unit = fs::read_to_string(&path).expect("every daemon has a unit");
        assert!(
            unit.contains(&format!("ExecStart=/usr/bin/{name} ")) && unit.contains("Type=notify"),
            "{name}"
        );
    }
}
