//! Judged by other engines, in Python: `yara-python` (the C library's newest) and `yara-x` (its successor in Rust).
//!
//! Run by `cargo xtask test`, which installs them and says where in `TM_ORACLES` (a Python interpreter that has
//! both). Without it the test fails: it must not pass by comparing nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use super::{
    super::Engine,
    TIME,
    generate::{self, Dice},
    named,
};

/// Prints `ENGINE error TEXT` for rules that an engine does not take, and `ENGINE RULE DATA` for each hit.
const SCRIPT: &str = r#"
import os, sys, yara, yara_x
folder = sys.argv[1]
text = open(os.path.join(folder, "rules.yar"), encoding="latin-1").read()
def one_line(error):
    return str(error).replace("\n", " ")
engines = {}
try:
    rules = yara.compile(source=text)
    engines["yara-python"] = lambda data: [match.rule for match in rules.match(data=data)]
except yara.Error as error:
    print("yara-python", "error", one_line(error))
try:
    rules_x = yara_x.compile(text)
    engines["yara-x"] = lambda data: [rule.identifier for rule in rules_x.scan(data).matching_rules]
except yara_x.CompileError as error:
    print("yara-x", "error", one_line(error))
for name in sorted(os.listdir(os.path.join(folder, "data")), key=int):
    data = open(os.path.join(folder, "data", name), "rb").read()
    for engine, scan in engines.items():
        for rule in scan(data):
            print(engine, rule, name)
"#;

/// Hits of each engine: data and rule.
type Hits = BTreeMap<String, BTreeSet<(usize, String)>>;

/// Asks the oracles. Those that do not take the rules are named with the reason.
fn ask(python: &str, rules: &str, data: &[Vec<u8>]) -> (Hits, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("rules.yar"), rules).unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    for (at, data) in data.iter().enumerate() {
        std::fs::write(folder.path().join(format!("data/{at}")), data).unwrap();
    }
    let out = Command::new(python).args(["-c", SCRIPT]).arg(folder.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut hits: Hits = ["yara-python", "yara-x"].map(|name| (name.to_owned(), BTreeSet::new())).into();
    let mut refused = Vec::new();
    for line in String::from_utf8(out.stdout).unwrap().lines() {
        let mut words = line.splitn(3, ' ');
        let (engine, rule, at) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        if rule == "error" {
            hits.remove(engine);
            refused.push(line.to_owned());
        } else {
            hits.get_mut(engine).unwrap().insert((at.parse().unwrap(), rule.to_owned()));
        }
    }
    (hits, refused)
}

/// The text of one rule of a generated set.
fn text_of<'a>(set: &'a str, name: &str) -> &'a str {
    let start = set.find(&format!("rule {name} :")).unwrap();
    let end = set[start + 1..].find("\nrule ").map_or(set.len(), |end| start + 1 + end);
    &set[start..end]
}

#[test]
#[ignore = "needs yara-python and yara-x: cargo xtask test installs them and runs it"]
fn hits_are_those_of_other_engines() {
    let python = std::env::var("TM_ORACLES")
        .expect("TM_ORACLES names no Python that has yara-python and yara-x: nothing to compare with");
    let long = std::env::var_os("TM_TEST_LONG").is_some();
    let (mut pairs, mut sieved, mut refused) = (0, 0, Vec::new());
    let mut hits_of: BTreeMap<String, usize> = BTreeMap::new();
    // By engine, what differs: the rules, with what was found where.
    let mut differ: BTreeMap<String, BTreeSet<(u64, String)>> = BTreeMap::new();
    for seed in 7000..if long { 7400 } else { 7060 } {
        let dice = &mut Dice::new(seed);
        let mut set = generate::rule_set(dice, 30, false, seed % 3 == 0, seed % 2 == 0);
        // yara-x takes no escapes in an alphabet.
        set.text = set.text.replace("GHIJ\\x09LMN", "GHIJKLMN");
        let texts = named(&[&set.text]);
        let (mut engine, _, _) = Engine::compile_for(&texts, 0).unwrap();
        sieved += usize::from(engine.sieve.is_some());
        let data: Vec<Vec<u8>> = (0..25).map(|_| generate::data(dice, &set.plants, &[])).collect();
        let own: BTreeSet<(usize, String)> = data
            .iter()
            .enumerate()
            .flat_map(|(at, data)| {
                engine.judge(data, TIME).matches.into_iter().map(move |(_, rule)| (at, rule))
            })
            .collect();
        pairs += data.len();
        let (others, not_taken) = ask(&python, &set.text, &data);
        refused.extend(not_taken);
        *hits_of.entry("own".to_owned()).or_default() += own.len();
        for (name, theirs) in others {
            *hits_of.entry(name.clone()).or_default() += theirs.len();
            for (at, rule) in own.symmetric_difference(&theirs) {
                if differ.entry(name.clone()).or_default().insert((seed, rule.clone())) {
                    let who = if own.contains(&(*at, rule.clone())) { "only this engine" } else { &name };
                    println!(
                        "seed {seed}, data {at}: {who}, not the other ({name}):\n{}",
                        text_of(&set.text, rule)
                    );
                }
            }
        }
    }
    let counts: BTreeMap<_, _> = differ.iter().map(|(name, rules)| (name.as_str(), rules.len())).collect();
    println!("{pairs} data, {sieved} sets sieved, hits {hits_of:?}, rules that differ {counts:?}");
    println!("{} sets not taken: {refused:#?}", refused.len());
    assert!(hits_of.values().all(|hits| *hits > 2000) && sieved > 10, "the cases say too little");
    assert_eq!(hits_of.len(), 3);
    // yara-x misses some matches of `base64wide`, and has others of `/^./ wide`; in both, yara-python says what this
    // engine says.
    let sets = if long { 400 } else { 60 };
    for (name, most) in [("yara-python", sets / 60), ("yara-x", sets / 12)] {
        let rules = differ.get(name).map_or(0, BTreeSet::len);
        assert!(rules <= most, "{rules} of {} rules differ from {name}: {:?}", sets * 30, differ[name]);
    }
}
