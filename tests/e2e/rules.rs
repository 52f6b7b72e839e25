//! Rule files made to hurt whoever reads them, and rules that are slow.
//!
//! Each is tried by `tm-agent pattern check` and imported into a manager. The control: a pattern that was imported
//! before stays what its name means, and finds what it found.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use tm_tests::{Agent, Lab, Output, bin, is_long, process::Process, samples};

use crate::hostile_rules::{Case, Fate, cases};

/// CPU time that one file may cost, in milliseconds.
const CPU_MS: u64 = 20_000;
/// Memory that one file may cost, in KiB.
const MEMORY_KIB: u64 = 512 << 10;
/// Time that one file may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// What costs more to try is imported in the long form only.
const DEAR_MS: u64 = 2_000;

/// What a try cost.
#[derive(Debug, Default)]
struct Cost {
    cpu_ms: u64,
    /// Of the process that had most at any time.
    peak_kib: u64,
    /// The largest ceiling of memory that any worker had.
    ceiling_kib: u64,
}

/// A line `name: number kB` of `/proc/PID/status`, or a limit of `/proc/PID/limits` in bytes.
fn number_of(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.strip_prefix(name)?.split_whitespace().find_map(|word| word.parse().ok())
}

impl Cost {
    /// Looks at a process and its workers as they are now.
    fn look(&mut self, of: &Process) {
        for pid in of.children() {
            let peak = number_of(&format!("/proc/{pid}/status"), "VmHWM:").unwrap_or(0);
            self.peak_kib = self.peak_kib.max(peak);
            // A child that is not yet a worker has no ceiling.
            let ceiling = number_of(&format!("/proc/{pid}/limits"), "Max data size").unwrap_or(0);
            self.ceiling_kib = self.ceiling_kib.max(ceiling >> 10);
        }
    }

    #[track_caller]
    fn is_bounded(&self, name: &str) {
        assert!(self.cpu_ms <= CPU_MS, "{name} took {self:?}");
        assert!(self.peak_kib <= MEMORY_KIB, "{name} took {self:?}");
        assert!(self.ceiling_kib <= MEMORY_KIB, "{name} could take {self:?}");
    }
}

/// CPU time of all children that this process has waited for, in milliseconds (`/proc/self/stat`, fields 16, 17).
fn children_cpu_ms() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("a process can read about itself");
    let (_, rest) = stat.rsplit_once(") ").expect("the name stands in parentheses");
    let fields: Vec<u64> = rest.split(' ').skip(13).take(2).filter_map(|field| field.parse().ok()).collect();
    fields.iter().sum::<u64>() * 1000 / rustix::param::clock_ticks_per_second()
}

/// `tm-agent pattern check FILE`, and what it cost.
fn check(file: &Path, more: &[&str], log: &Path) -> (i32, String, Cost) {
    let _ = fs::remove_file(log);
    let before = children_cpu_ms();
    let mut command = Command::new(bin("tm-agent"));
    command.args(["pattern", "check"]).args(more).arg(file);
    let mut process = Process::start(&mut command, log);
    let mut cost = Cost::default();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = process.wait(Duration::from_millis(20)) {
            break status;
        }
        cost.look(&process);
        assert!(started.elapsed() < PATIENCE, "{} is never done with", file.display());
    };
    cost.cpu_ms = children_cpu_ms() - before;
    (status.code().unwrap_or(-1), process.log(), cost)
}

/// Whether a terminal would be moved, or a line mistaken for another's.
fn is_harmless(text: &str) -> bool {
    !text.chars().any(|c| c != '\n' && (c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c)))
}

/// Names and digests of the patterns that a manager has.
fn known(lab: &Lab) -> BTreeMap<String, String> {
    let list = lab.tmctl(["pattern", "list", "-o", "json"]).expect(0).json();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    tm_tests::output::rows(&list).iter().map(|row| (text(row, "name"), text(row, "sha256"))).collect()
}

/// The pattern that was there before finds what it found.
fn still_detects(lab: &Lab, agent: &Agent) {
    let folder = lab.path("dirty");
    lab.scan_with(agent, &folder, &["--pattern", "good.yar", "-o", "json"]).expect(10);
}

fn import(lab: &Lab, case: &Case, file: &Path) {
    let before = known(lab);
    // What should be refused tries to take the place of a good pattern.
    let name = match case.fate {
        Fate::Refused(_) => "good.yar",
        Fate::Taken | Fate::Either => case.name,
    };
    let output = lab
        .tmctl(["pattern", "import", "--name", name, "-o", "json"].map(Path::new).into_iter().chain([file]));
    let after = known(lab);
    assert!(is_harmless(&output.err()), "{}: {}", case.name, output.both());
    match output.code() {
        0 => {
            assert!(!matches!(case.fate, Fate::Refused(_)), "{}: {}", case.name, output.both());
            assert_eq!(after.len(), before.len() + 1, "{}", case.name);
        }
        3 => {
            assert!(!matches!(case.fate, Fate::Taken), "{}: {}", case.name, output.both());
            assert_eq!(after, before, "{}: nothing has changed", case.name);
            assert_eq!(output.json()["code"], "pattern-refused", "{}", output.both());
            if let Fate::Refused(Some((line, part))) = case.fate {
                let problem = &output.json()["problems"][0];
                assert_eq!(problem["line"], line, "{}: {}", case.name, output.both());
                assert!(
                    problem["message"].as_str().expect("a problem has a message").contains(part),
                    "{}",
                    output.both()
                );
            }
        }
        // It is not even sent.
        1 if fs::metadata(file).is_ok_and(|file| file.len() > 64 << 20) => assert_eq!(after, before),
        other => panic!("{}: exit code {other}\n{}", case.name, output.both()),
    }
}

/// Tries every fourth of the hostile files, from `first` on.
fn try_them(first: usize) {
    let lab = Lab::start();
    let agent = lab.agent();
    let dirty = lab.folder("dirty");
    fs::write(dirty.join("a.com"), samples::eicar()).expect("the lab's folder is writable");
    lab.import("good.yar", samples::EICAR_RULE).expect(0);
    still_detects(&lab, &agent);
    let (manager, daemon) = (lab.manager().pid(), agent.pid());
    let log = lab.path("check.log");
    let mut tried = 0;
    for case in cases().into_iter().skip(first).step_by(4) {
        let file = lab.path(&format!("{}.yar", case.name));
        fs::write(&file, (case.make)()).expect("the lab's folder is writable");
        let started = Instant::now();
        let (code, said, cost) = check(&file, &[], &log);
        eprintln!("{:>28}: exit {code}, {cost:?}, {:.1?}", case.name, started.elapsed());
        cost.is_bounded(case.name);
        assert!(is_harmless(&said), "{}: {said:?}", case.name);
        assert!(said.len() < 1 << 20, "{}: {} bytes are said", case.name, said.len());
        assert!(!said.contains("root:"), "{}: a file was read: {said}", case.name);
        match case.fate {
            Fate::Taken => assert_eq!(code, 0, "{}: {said}", case.name),
            Fate::Refused(place) => {
                assert_eq!(code, 1, "{}: {said}", case.name);
                if let Some((line, part)) = place {
                    let begin = format!("{}.yar:{line}:", case.name);
                    assert!(said.contains(&begin) && said.contains(part), "{}: {said}", case.name);
                }
            }
            Fate::Either => assert!([0, 1].contains(&code), "{}: {said}", case.name),
        }
        if cost.cpu_ms < DEAR_MS || is_long() {
            import(&lab, &case, &file);
        }
        fs::remove_file(&file).expect("it was written just now");
        tried += 1;
    }
    assert!(tried >= 18, "there are 70 in all: {tried}");
    assert_eq!((lab.manager().pid(), agent.pid()), (manager, daemon));
    assert!(lab.is_connected(&agent));
    still_detects(&lab, &agent);
}

#[test]
fn hostile_rule_files_are_bounded_and_change_nothing_first() {
    try_them(0);
}

#[test]
fn hostile_rule_files_are_bounded_and_change_nothing_second() {
    try_them(1);
}

#[test]
fn hostile_rule_files_are_bounded_and_change_nothing_third() {
    try_them(2);
}

#[test]
fn hostile_rule_files_are_bounded_and_change_nothing_fourth() {
    try_them(3);
}

#[test]
fn slow_rules_are_refused_with_cost_and_reason_unless_forced() {
    let lab = Lab::start();
    let slow = "rule good { strings: $a = \"needle-4711\" condition: $a }\n\
                rule slow { condition:\n for all i in (0..100000000000) : (for all j in (0..100000) : (i + j >= 0)) }\n";
    let file = lab.path("slow.yar");
    fs::write(&file, slow).unwrap();
    let import = |more: &[&str]| -> Output {
        let args = ["pattern", "import"].iter().chain(more).map(Path::new).chain([file.as_path()]);
        lab.tmctl(args)
    };
    let refused = import(&[]).expect(3);
    let line = refused.err().lines().find(|line| line.contains("slow.yar:2:6: ")).map(str::to_owned);
    let line = line.unwrap_or_else(|| panic!("{}", refused.both()));
    for part in ["very slow rule `slow`: ", "its condition has a loop", " ms per MB, ", " times a plain rule"]
    {
        assert!(line.contains(part), "{line}");
    }
    assert!(refused.err().contains("\nhint: ") && refused.err().contains("--force"), "{}", refused.both());
    let json = import(&["-o", "json"]).expect(3).json();
    assert_eq!(
        (&json["code"], &json["problems"][0]["line"]),
        (&"pattern-refused".into(), &2.into()),
        "{json}"
    );
    assert!(json["hint"].as_str().unwrap().contains("--force"), "{json}");
    assert!(known(&lab).is_empty());
    let (code, said, _) = check(&file, &[], &lab.path("check.log"));
    assert!(code == 1 && said.contains("slow.yar:2:6: very slow rule `slow`: "), "{said}");
    assert!(said.contains("--force"), "{said}");
    let (code, said, _) = check(&file, &["--force"], &lab.path("check.log"));
    assert!(code == 0 && said.contains("slow.yar:2:6: warning: very slow rule `slow`: "), "{said}");

    let taken = import(&["--force"]).expect(0);
    assert!(
        taken.err().contains("slow.yar:2:6: very slow rule `slow`: "),
        "it is still named: {}",
        taken.both()
    );
    assert_eq!(known(&lab).len(), 1);
    let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json();
    let rows = tm_tests::output::rows(&audit);
    let imports: Vec<&Value> = rows.iter().filter(|row| row["action"] == "pattern.import").collect();
    assert_eq!(imports.len(), 1, "{audit}");
    assert!(imports[0].to_string().contains("forced"), "{audit}");
    // The control: what is not forced is not called so.
    lab.import("good.yar", samples::EICAR_RULE).expect(0);
    let audit = lab.tmctl(["audit", "list", "-o", "json"]).expect(0).json();
    let forced =
        tm_tests::output::rows(&audit).iter().filter(|row| row.to_string().contains("forced")).count();
    assert_eq!(forced, 1, "{audit}");
}
