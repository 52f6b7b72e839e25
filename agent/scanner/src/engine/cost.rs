//! What the rules of a pattern cost, measured on bytes made for it ([`corpus`]).
//!
//! A rule's cost is told in milliseconds of CPU time for a megabyte, and as a multiple of what a plain rule costs
//! in the same run, which is what limits are set in: it does not depend on the machine. Rules are measured in
//! groups, and only what is in a slow group is looked at more closely; rules that [`lint`] has remarked on are
//! suspects and come first.
//!
//! **Invariant:** every rule is measured, found slow before its measure was complete, or counted as not measured.

use std::time::Duration;

use boreal::{
    Scanner,
    scanner::{ScanError, ScanParams},
};
use boreal_parser::{
    expression::{Expression, ExpressionKind as Kind},
    file::{YaraFile, YaraFileComponent},
    rule::{Rule, VariableDeclarationValue},
};
use tm_patterns::Problem;
use tm_protocol::ids::Sha256;

use super::{
    Built, MAX_STRING_MATCHES,
    corpus::{self, Piece},
    lint::{self, Remark},
    needles,
    units::{self, Unit, children},
};

/// What stands for an ordinary rule: a few words that are rare.
const PLAIN: &str = "rule plain { strings: $a = \"Zq7-measure\" $b = \"jxk_nowhere\" $c = { 8f 1e d4 aa 07 5b } \
                     condition: any of them }";
/// Times the plain rule is measured; the least counts.
const ROUNDS: usize = 3;
/// Plain rules that a rule is worth before it is remarked on.
const SLOW_TIMES: u64 = 30;
/// Plain rules that a rule is worth before it is refused.
const VERY_SLOW_TIMES: u64 = 200;
/// One piece, however small, may take as long as this many plain rules take for all pieces, and that again for
/// every [`PIECE`] of it: what takes longer grows faster than its data, and would not end on the next.
const PIECE_TIMES: u64 = 20;
const PIECE: u64 = 64 << 10;
/// Rules that are measured together first.
const GROUP: usize = 256;
/// Suspects that are measured together first.
const SUSPECTS: usize = 8;
/// Parts that a slow group is divided into.
const PARTS: usize = 4;
/// Most time for one piece as clocks show it, beside the limits above.
const PIECE_TIME: Duration = Duration::from_millis(1500);

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// [`lint`]'s remarks on the pattern, with costs, and those on rules that were only found slow here.
    pub(crate) remarks: Vec<Problem>,
    /// Rules for which there was no time.
    pub(crate) unmeasured: usize,
}

/// A rule and its place.
struct Known<'a> {
    rule: &'a Rule,
    /// The unit it is part of.
    unit: usize,
}

/// What a run over the pieces took.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    /// CPU time, in nanoseconds.
    ns: u64,
    /// What was looked at.
    bytes: u64,
    /// On which kind of data it was slowest: nanoseconds for 1000 bytes.
    worst: (u64, &'static str),
    /// Some pieces were left out: it was slow enough.
    stopped: bool,
    /// One piece alone took too long.
    endless: bool,
}

/// Measures the rules of `text`, which compiles, for up to `budget` of CPU time and somewhat more.
pub(crate) fn measure(text: &str, budget: Duration) -> Measured {
    let end_ns = cpu_ns().saturating_add(u64::try_from(budget.as_nanos()).unwrap_or(u64::MAX));
    let Ok(file) = boreal_parser::parse(text) else { return Measured::default() };
    let mut remarks = lint::remarks(&file);
    let units = units::cut(0, text, &file);
    let known = known(&file, &units);
    let pieces = corpus::pieces();
    let Some(plain) = plain(&pieces) else {
        return Measured { remarks: lint::problems(text, remarks), unmeasured: known.len() };
    };
    let is_suspect = |unit: &usize| {
        known.iter().any(|k| k.unit == *unit && remarks.iter().any(|remark| remark.rule == k.rule.name))
    };
    let (suspects, others): (Vec<usize>, Vec<usize>) = (0..units.len()).partition(is_suspect);
    let mut open: Vec<Vec<usize>> = others.chunks(GROUP).map(<[usize]>::to_vec).collect();
    // The last is taken first.
    open.extend(suspects.chunks(SUSPECTS).map(<[usize]>::to_vec));
    let mut slow = Vec::new();
    let mut unmeasured = 0;
    while let Some(group) = open.pop() {
        let scanner = (cpu_ns() < end_ns).then(|| compile(text, &units, &group)).flatten();
        let Some(mut scanner) = scanner else {
            unmeasured += known.iter().filter(|k| group.contains(&k.unit)).count();
            continue;
        };
        let times = if group.len() > 1 { SLOW_TIMES } else { VERY_SLOW_TIMES };
        let run = run(&mut scanner, &pieces, plain.ns, times);
        match group.as_slice() {
            _ if !run.stopped && run.times(&plain) < SLOW_TIMES => {}
            [unit] => slow.push((*unit, run)),
            several => open.extend(several.chunks(several.len().div_ceil(PARTS)).map(<[usize]>::to_vec)),
        }
    }
    for (unit, run) in slow {
        tell(&mut remarks, known.iter().filter(|k| k.unit == unit).map(|k| k.rule), run, &plain);
    }
    Measured { remarks: lint::problems(text, remarks), unmeasured }
}

fn known<'a>(file: &'a YaraFile, units: &[Unit]) -> Vec<Known<'a>> {
    let mut ranges: Vec<(usize, usize)> = units
        .iter()
        .enumerate()
        .flat_map(|(at, unit)| unit.ranges.iter().map(move |range| (range.start, at)))
        .collect();
    ranges.sort_unstable();
    let rules = file.components.iter().filter_map(|component| match component {
        YaraFileComponent::Rule(rule) => Some(rule.as_ref()),
        YaraFileComponent::Import(_) | YaraFileComponent::Include(_) => None,
    });
    rules
        .filter_map(|rule| {
            let before = ranges.partition_point(|(start, _)| *start <= rule.name_span.start);
            let (_, unit) = ranges.get(before.checked_sub(1)?)?;
            Some(Known { rule, unit: *unit })
        })
        .collect()
}

fn plain(pieces: &[Piece]) -> Option<Run> {
    let mut built = Built::new();
    built.add(&Sha256::of(PLAIN.as_bytes()), PLAIN).ok()?;
    let mut scanner = built.finish();
    let runs = (0..ROUNDS).map(|_| run(&mut scanner, pieces, u64::MAX, 1));
    runs.filter(|run| !run.stopped && run.ns > 0).min_by_key(|run| run.ns)
}

/// `None` if the parts do not compile alone.
fn compile(text: &str, units: &[Unit], group: &[usize]) -> Option<Scanner> {
    let chosen: Vec<&Unit> = group.iter().filter_map(|at| units.get(*at)).collect();
    let mut imports: Vec<&String> = chosen.iter().flat_map(|unit| &unit.imports).collect();
    imports.sort_unstable();
    imports.dedup();
    let mut source: String = imports.iter().map(|import| format!("import \"{import}\"\n")).collect();
    let mut ranges: Vec<_> = chosen.iter().flat_map(|unit| &unit.ranges).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    for range in ranges {
        source.push_str(text.get(range.clone())?);
        source.push('\n');
    }
    let mut built = Built::new();
    built.add(&Sha256::of(b""), &source).ok()?;
    Some(built.finish())
}

/// Runs over the pieces until they took `times` as long as the plain rule, which took `plain_ns` for all.
fn run(scanner: &mut Scanner, pieces: &[Piece], plain_ns: u64, times: u64) -> Run {
    let mut run = Run::default();
    scanner.set_scan_params(
        ScanParams::default().timeout_duration(Some(PIECE_TIME)).string_max_nb_matches(MAX_STRING_MATCHES),
    );
    for piece in pieces {
        let before = cpu_ns();
        let timed_out = matches!(scanner.scan_mem(&piece.bytes), Err((ScanError::Timeout, _)));
        let took = cpu_ns().saturating_sub(before);
        let bytes = u64::try_from(piece.bytes.len()).unwrap_or(u64::MAX).max(1);
        run.ns += took;
        run.bytes += bytes;
        run.worst = run.worst.max((took.saturating_mul(1000) / bytes, piece.kind));
        run.endless |= took > plain_ns.saturating_mul(PIECE_TIMES).saturating_mul(1 + bytes / PIECE);
        if timed_out || run.endless || run.ns > plain_ns.saturating_mul(times) {
            run.stopped = true;
            break;
        }
    }
    run
}

impl Run {
    /// How many times as long as `plain` it took for the same data.
    fn times(&self, plain: &Self) -> u64 {
        let ours = u128::from(self.ns) * u128::from(plain.bytes);
        let theirs = (u128::from(plain.ns) * u128::from(self.bytes)).max(1);
        u64::try_from(ours / theirs).unwrap_or(u64::MAX)
    }
}

/// CPU time of this thread, in nanoseconds: a busy machine does not make a rule slow.
fn cpu_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Adds the cost of a unit to the remarks on its rules, or makes one.
fn tell<'a>(remarks: &mut Vec<Remark>, rules: impl Iterator<Item = &'a Rule>, run: Run, plain: &Run) {
    let times = run.times(plain);
    let is_very = run.endless || run.stopped && times >= SLOW_TIMES || times >= VERY_SLOW_TIMES;
    // Nanoseconds for a byte are milliseconds for a megabyte.
    let tenths = run.ns.saturating_mul(10) / run.bytes.max(1);
    let cost = format!(
        "{}{}.{} ms per MB, {times} times a plain rule, slowest on {}",
        if run.stopped { "at least " } else { "" },
        tenths / 10,
        tenths % 10,
        run.worst.1
    );
    let rules: Vec<&Rule> = rules.collect();
    let mut own: Vec<&mut Remark> =
        remarks.iter_mut().filter(|remark| rules.iter().any(|rule| rule.name == remark.rule)).collect();
    // What is known to be worst has the cost; the others stay what they are.
    let worst = own.iter().position(|remark| remark.very).unwrap_or(0);
    let is_told = own.get_mut(worst).is_some_and(|remark| {
        remark.very |= is_very;
        remark.reason = format!("{} ({cost})", remark.reason);
        true
    });
    let public = rules.iter().rev().find(|rule| !rule.is_private).or(rules.last());
    if let Some(rule) = public.filter(|_| !is_told) {
        let with = if rules.len() > 1 { ", with the rules it goes with" } else { "" };
        let reason = format!("{}{with} ({cost})", reason(rule));
        let (rule, at) = (rule.name.clone(), rule.name_span.start);
        remarks.push(Remark { rule, at, very: is_very, reason });
    }
}

/// What is most likely to be slow in a rule that looks ordinary.
fn reason(rule: &Rule) -> String {
    if rule.variables.len() >= 1000 {
        return format!("it has {} strings", rule.variables.len());
    }
    if loops(&rule.condition) {
        return "its condition has a loop".to_owned();
    }
    let short = rule.variables.iter().find(|string| {
        let runs = match &string.value {
            VariableDeclarationValue::Bytes(bytes) => Some(vec![bytes.clone()]),
            VariableDeclarationValue::HexString(tokens) => needles::hex_runs(tokens, 1),
            VariableDeclarationValue::Regex(regex) => needles::regex_runs(regex, 1),
        };
        runs.is_none_or(|runs| runs.iter().any(|run| run.len() < needles::SHORTEST))
    });
    match short {
        Some(string) => format!("string `${}` has only short literals", string.name),
        None if rule.variables.is_empty() => "its condition is long".to_owned(),
        None => "its strings are found often in ordinary data, or its condition is long".to_owned(),
    }
}

fn loops(expression: &Expression) -> bool {
    matches!(expression.expr, Kind::ForIdentifiers { .. }) || children(expression).into_iter().any(loops)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    fn measured(text: &str) -> Measured {
        measure(text, Duration::from_secs(60))
    }

    /// `count` rules as people write them, on lines of their own.
    fn ordinary(count: usize) -> String {
        let mut text = String::new();
        for n in 0..count {
            let hex = format!("{:08x}", (n + 1).wrapping_mul(2_654_435_761) & 0xffff_ffff);
            let _ = writeln!(
                text,
                "rule r{n} {{ strings: $a = \"marker-{hex}\" nocase $b = {{ {hex} ?? 00 {hex} }} \
                 $c = /key{hex}=[a-z]{{4,9}}/ condition: $a or ($b and $c) }}"
            );
        }
        text
    }

    #[test]
    fn slow_rules_are_found_among_many_with_cost_place_and_reason() {
        let mut text = ordinary(600);
        text.push_str("rule counts { condition: for any i in (0..filesize) : (uint8(i) == 256) }\n");
        text.push_str("private rule within { condition: for all i in (1..400000) : (uint8(i) != 256) }\n");
        text.push_str("rule uses { condition: within and filesize < 1 }\n");
        text.push_str(&ordinary(5).replace("rule r", "rule s"));
        let Measured { remarks, unmeasured } = measured(&text);
        assert_eq!((remarks.len(), unmeasured), (2, 0), "{remarks:?}");
        let [counts, uses] = [&remarks[0], &remarks[1]];
        assert_eq!((counts.line, uses.line, uses.column), (601, 603, 6), "{remarks:?}");
        let of_counts =
            ["slow rule `counts`: loops over the size of the file (", " ms per MB, ", " times a plain"];
        assert!(of_counts.iter().all(|part| counts.message.contains(part)), "{counts:?}");
        let of_uses = ["slow rule `uses`: ", "with the rules it goes with (", " ms per MB, "];
        assert!(of_uses.iter().all(|part| uses.message.contains(part)), "{uses:?}");
    }

    #[test]
    fn a_rule_is_found_very_slow_although_nothing_looks_so() {
        for (text, reason) in [
            (
                "rule a { condition: for all i in (0..100000000000) : (for all j in (0..100000) : (i + j >= 0)) }",
                "its condition has a loop",
            ),
            ("rule a { strings: $a = /[a-z]+.*[0-9]/ condition: $a }", "has no literal and no end"),
        ] {
            let Measured { remarks, .. } = measured(text);
            assert_eq!(remarks.len(), 1, "{remarks:?}");
            let parts = ["very slow rule `a`: ", reason, "(at least ", " ms per MB, ", "slowest on "];
            assert!(parts.iter().all(|part| remarks[0].message.contains(part)), "{remarks:?}");
        }
    }

    #[test]
    fn ordinary_rules_cost_nothing_worth_a_word() {
        let before = cpu_ns();
        let text = format!(
            "import \"pe\" import \"hash\" import \"math\" {} \
             rule whole {{ condition: hash.sha256(0, filesize) == \"x\" or math.entropy(0, filesize) > 7.99999 }} \
             rule sections {{ condition: for any s in pe.sections : (s.name == \".upx\") }}",
            ordinary(1000)
        );
        let Measured { remarks, unmeasured } = measured(&text);
        assert_eq!((remarks, unmeasured), (vec![], 0));
        assert!(cpu_ns() - before < 10_000_000_000, "it takes {} ns", cpu_ns() - before);
    }

    #[test]
    fn what_there_is_no_time_for_is_counted() {
        let Measured { remarks, unmeasured } = measure(
            &format!("{} rule short {{ strings: $a = \"a\" condition: $a }}", ordinary(9)),
            Duration::ZERO,
        );
        assert_eq!(unmeasured, 10);
        assert_eq!(remarks.len(), 1, "what is known without measure is said: {remarks:?}");
    }

    #[test]
    fn a_pattern_with_a_global_rule_is_measured_as_one() {
        let text = format!(
            "global rule all {{ condition: filesize > 0 }}\n{}rule loops {{ condition: for any i in (0..filesize) : \
             (uint8(i) == 256) }}",
            ordinary(3)
        );
        let Measured { remarks, unmeasured } = measured(&text);
        assert_eq!((remarks.len(), unmeasured, remarks[0].line), (1, 0, 5), "{remarks:?}");
        assert!(
            remarks[0].message.contains("slow rule `loops`: loops over the size of the file ("),
            "{remarks:?}"
        );
    }
}
