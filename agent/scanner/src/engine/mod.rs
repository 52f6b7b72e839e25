//! Rules: compiled here, inside a worker, and run on bytes.
//!
//! A large set is not run as a whole: a [`filter`] finds in one pass which rules can hold at all, by clauses of
//! literals, of each of which one must be in the data ([`needles`], [`demand`]), and only these are run, in
//! [`groups`] that are compiled when first needed. Rules that hold for data of one size are found by the size.
//! Rules of which no literal is known, or only common ones, are run on everything. Few rules, and data that wakes
//! many, are judged by the whole set.
//!
//! **Invariant:** the hits are those of the whole set, in its order. (One defect of boreal 1.4.0 is not kept:
//! of a namespace whose global rules do not all hold, it reports those that do, if there is another namespace.)
//!
//! **Invariant:** no rule can make the compiler open a file (includes are off), and the `macho` module is not
//! there: a 48-byte fat Mach-O file sends boreal 1.4.0 into endless recursion when a rule imports it.

mod corpus;
pub(crate) mod cost;
mod demand;
#[cfg(test)]
mod equality;
mod filter;
mod groups;
pub(crate) mod lint;
mod needles;
mod units;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use boreal::{
    Compiler, Scanner,
    compiler::{AddRuleError, AddRuleStatus, CompilerBuilder, CompilerParams},
    module,
    scanner::{ScanError, ScanParams},
};
use demand::MOST_CLAUSES;
use filter::{Filter, Met, Next};
use groups::{Group, Kept};
use needles::Literal;
use tm_patterns::Problem;
use tm_protocol::ids::Sha256;
use units::Unit;

/// Most matches of one string that are kept while a rule is judged.
const MAX_STRING_MATCHES: u32 = 1000;
/// Sets of up to this many rules are always run as a whole: the engine's own search is as fast.
const FEW: usize = 64;
/// Rules whose rarest needle is rated below this are run on everything.
const COMMON_BELOW: i32 = 32;
/// Memory for the scanners of groups, by estimate, in bytes.
const KEPT: usize = 40 << 20;
/// Data that wakes more groups than this is judged by the whole set.
const MANY: usize = 16;

/// A compiled set of patterns. A clone shares what is compiled; each thread has its own.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    /// Together they are the whole set: one, and one more for each namespace that must stand alone.
    whole: Vec<Scanner>,
    /// Place of each rule in the whole, where one scanner does not give the order.
    order: Arc<HashMap<Sha256, HashMap<String, usize>>>,
    sieve: Option<Sieve>,
}

/// What chooses the rules of a large set.
#[derive(Debug, Clone)]
struct Sieve {
    shared: Arc<Shared>,
    /// Scanners of the groups that are run on all that fits them.
    always: Vec<Scanner>,
    known: Knowledge,
}

/// What is known of the data at hand.
#[derive(Debug, Clone, Default)]
struct Knowledge {
    /// Of each group.
    states: Vec<State>,
    /// Groups whose state is known.
    touched: Vec<usize>,
    /// The clauses of each unit that are met, a bit for each.
    clauses: Vec<u8>,
    /// Units of which one is met.
    begun: Vec<usize>,
    /// Groups that are to be run.
    woken: Vec<usize>,
    met: Met,
}

#[derive(Debug)]
struct Shared {
    texts: Vec<(Sha256, String)>,
    units: Vec<Unit>,
    /// The group of each unit; of those that have no group nothing is entered in the filter.
    group_of: Vec<usize>,
    /// The clauses of each unit that are entered in the filter.
    clauses_of: Vec<u8>,
    groups: Vec<Group>,
    /// Units without needles that can hold for data of one size only.
    of_size: HashMap<u64, Vec<usize>>,
    filter: Filter,
    kept: Kept,
    /// Groups that are run on all that fits them.
    always: Vec<Group>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unknown,
    Woken,
    /// Its rules cannot hold for data of this kind.
    Unfit,
}

/// What the rules said about some bytes.
#[derive(Debug, Default)]
pub(crate) struct Judgement {
    /// Pattern and rule of each match.
    pub(crate) matches: Vec<(Sha256, String)>,
    /// The time was up before all rules were judged.
    pub(crate) timed_out: bool,
}

/// Which pattern is wrong, and where.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) pattern: usize,
    pub(crate) problems: Vec<Problem>,
}

/// A compiler with our modules and limits.
struct Built(Compiler);

impl Built {
    fn new() -> Self {
        let mut compiler = CompilerBuilder::default()
            .add_module(module::Time)
            .add_module(module::Math)
            .add_module(module::String_)
            .add_module(module::Hash)
            .add_module(module::Elf)
            .add_module(module::Pe)
            .add_module(module::Dotnet)
            .add_module(module::Dex)
            .build();
        compiler.set_params(CompilerParams::default().disable_includes(true));
        Self(compiler)
    }

    fn add(&mut self, sha256: &Sha256, text: &str) -> Result<AddRuleStatus, AddRuleError> {
        self.0.add_rules_str_in_namespace(text, sha256.to_string())
    }

    fn finish(self) -> Scanner {
        self.0.finalize()
    }
}

impl Engine {
    /// Compiles rule texts, each under the digest of its pattern. Returns the number of rules and the
    /// compiler's remarks as well, with ours on slow rules (see [`lint`]).
    pub(crate) fn compile(texts: &[(Sha256, String)]) -> Result<(Self, u32, Vec<Problem>), Refused> {
        Self::compile_for(texts, FEW)
    }

    /// As [`Self::compile`]; sets of up to `few` rules are run as a whole, and with 0 none, whatever its rules.
    fn compile_for(texts: &[(Sha256, String)], few: usize) -> Result<(Self, u32, Vec<Problem>), Refused> {
        let mut built = Built::new();
        let (mut warnings, mut units) = (Vec::new(), Vec::new());
        for (index, (sha256, text)) in texts.iter().enumerate() {
            match built.add(sha256, text) {
                Ok(status) => warnings.extend(status.warnings().map(|w| problem(&w.to_string()))),
                Err(error) => {
                    return Err(Refused { pattern: index, problems: vec![problem(&error.to_string())] });
                }
            }
            // The compiler has parsed it too, and keeps what it read to itself.
            let file = boreal_parser::parse(text).map_err(|error| {
                let message = format!("cannot be read a second time: {error:?}");
                Refused { pattern: index, problems: vec![Problem { line: 0, column: 0, message }] }
            })?;
            warnings.extend(lint::look(text, &file));
            units.extend(units::cut(index, text, &file));
        }
        let whole = built.finish();
        let rules = whole.rules().count();
        let mut order: HashMap<Sha256, HashMap<String, usize>> = HashMap::new();
        for (place, rule) in whole.rules().enumerate() {
            if let Ok(sha256) = rule.namespace.parse() {
                order.entry(sha256).or_default().insert(rule.name.to_owned(), place);
            }
        }
        let whole = apart(texts, &units).unwrap_or_else(|| vec![whole]);
        let sieve = if rules > few { Sieve::new(texts, units, few > 0) } else { None };
        let engine = Self { whole, order: Arc::new(order), sieve };
        Ok((engine, u32::try_from(rules).unwrap_or(u32::MAX), warnings))
    }

    /// Judges `bytes`, for at most `time` (the engine looks at its clock now and then; who needs a hard
    /// limit kills the process).
    pub(crate) fn judge(&mut self, bytes: &[u8], time: Duration) -> Judgement {
        // A limit beyond the clock's range is no limit.
        let run =
            &mut Run { bytes, deadline: Instant::now().checked_add(time), judgement: Judgement::default() };
        let is_judged = self.sieve.as_mut().is_some_and(|sieve| sieve.judge(run).is_some());
        if !is_judged {
            self.whole.iter_mut().for_each(|scanner| run.scan(scanner));
        }
        let mut judgement = std::mem::take(&mut run.judgement);
        if judgement.matches.len() > 1 {
            let place = |(sha256, rule): &(Sha256, String)| {
                self.order.get(sha256).and_then(|rules| rules.get(rule)).copied().unwrap_or(usize::MAX)
            };
            judgement.matches.sort_by_cached_key(place);
        }
        judgement
    }
}

/// The whole in parts, if a namespace must stand alone beside others.
fn apart(texts: &[(Sha256, String)], units: &[Unit]) -> Option<Vec<Scanner>> {
    if texts.len() < 2 || !units.iter().any(|unit| unit.whole) {
        return None;
    }
    let mut rest = Built::new();
    let mut scanners = Vec::new();
    for (index, (sha256, text)) in texts.iter().enumerate() {
        if units.iter().any(|unit| unit.whole && unit.text == index) {
            let mut alone = Built::new();
            alone.add(sha256, text).ok()?;
            scanners.push(alone.finish());
        } else {
            rest.add(sha256, text).ok()?;
        }
    }
    scanners.push(rest.finish());
    Some(scanners)
}

/// One judgement, while it is made.
struct Run<'a> {
    bytes: &'a [u8],
    deadline: Option<Instant>,
    judgement: Judgement,
}

impl Run<'_> {
    fn scan(&mut self, scanner: &mut Scanner) {
        if self.judgement.timed_out {
            return;
        }
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        scanner.set_scan_params(
            ScanParams::default().timeout_duration(left).string_max_nb_matches(MAX_STRING_MATCHES),
        );
        let (result, timed_out) = match scanner.scan_mem(self.bytes) {
            Ok(result) => (result, false),
            Err((error, result)) => (result, matches!(error, ScanError::Timeout)),
        };
        self.judgement.timed_out |= timed_out;
        self.judgement.matches.extend(
            result.rules.iter().filter_map(|rule| Some((rule.namespace.parse().ok()?, rule.name.to_owned()))),
        );
    }
}

impl Sieve {
    /// `None` if a part does not compile alone, or, with `if_worth`, if most rules have no needles.
    fn new(texts: &[(Sha256, String)], units: Vec<Unit>, if_worth: bool) -> Option<Self> {
        let (mut wanted, mut sized, mut always) = (Vec::new(), Vec::new(), Vec::new());
        // What can never hold is in none of them.
        for (at, Unit { demand, .. }) in units.iter().enumerate().filter(|(_, unit)| !unit.demand.is_never())
        {
            if demand.worth() >= COMMON_BELOW {
                wanted.push(at);
            } else if demand.size.0 == demand.size.1 {
                sized.push(at);
            } else {
                always.push(at);
            }
        }
        if if_worth && always.len() > wanted.len() {
            return None;
        }
        let mut wants: HashMap<Literal, Vec<u32>> = HashMap::new();
        let mut clauses_of = vec![0; units.len()];
        for at in &wanted {
            let clauses = &units.get(*at)?.demand.clauses;
            for (number, clause) in
                clauses.iter().take_while(|clause| clause.worth >= COMMON_BELOW).enumerate()
            {
                let tell = u32::try_from(*at * MOST_CLAUSES + number).ok()?;
                *clauses_of.get_mut(*at)? |= 1 << number;
                for literal in &clause.literals {
                    wants.entry(*literal).or_default().push(tell);
                }
            }
        }
        let filter = Filter::new(wants.into_iter());
        let mut of_size: HashMap<u64, Vec<usize>> = HashMap::new();
        for at in &sized {
            of_size.entry(units.get(*at)?.demand.size.0).or_default().push(*at);
        }
        let mut groups = groups::divide(&units, wanted, true);
        groups.extend(groups::divide(&units, sized, true));
        let mut group_of = vec![usize::MAX; units.len()];
        for (place, group) in groups.iter().enumerate() {
            for unit in &group.units {
                *group_of.get_mut(*unit)? = place;
            }
        }
        let always = groups::divide(&units, always, false);
        let scanners =
            always.iter().map(|group| groups::compile(texts, &units, group)).collect::<Option<Vec<_>>>()?;
        let known = Knowledge {
            states: vec![State::Unknown; groups.len()],
            clauses: vec![0; units.len()],
            ..Knowledge::default()
        };
        let kept = Kept::new(groups.len(), KEPT);
        let texts = texts.to_vec();
        let shared = Shared { texts, units, group_of, clauses_of, groups, of_size, filter, kept, always };
        Some(Self { shared: Arc::new(shared), always: scanners, known })
    }

    /// Runs the rules that can find something in these bytes; `None`, and nothing is run, if the whole set should
    /// look.
    fn judge(&mut self, run: &mut Run<'_>) -> Option<()> {
        let Self { shared, always, known } = self;
        let in_time = shared.look(known, run.bytes, run.deadline);
        if known.woken.len() > MANY {
            return None;
        }
        let woken = known.woken.iter();
        let woken = woken.map(|at| shared.kept.get(*at, &shared.texts, &shared.units, &shared.groups));
        let mut woken = woken.collect::<Option<Vec<Scanner>>>()?;
        run.judgement.timed_out |= !in_time;
        for (group, scanner) in shared.always.iter().zip(always) {
            if group.fits(run.bytes) {
                run.scan(scanner);
            }
        }
        woken.iter_mut().for_each(|scanner| run.scan(scanner));
        Some(())
    }
}

impl Shared {
    /// Finds the groups to run, up to one more than [`MANY`]. Returns false if the deadline came before the end.
    fn look(&self, known: &mut Knowledge, bytes: &[u8], deadline: Option<Instant>) -> bool {
        let Knowledge { states, touched, clauses, begun, woken, met } = known;
        woken.clear();
        for at in touched.drain(..) {
            if let Some(state) = states.get_mut(at) {
                *state = State::Unknown;
            }
        }
        for at in begun.drain(..) {
            if let Some(clauses) = clauses.get_mut(at) {
                *clauses = 0;
            }
        }
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mut wake = |at: usize| {
            let group = self.group_of.get(at).copied().unwrap_or(usize::MAX);
            let Some(state) = states.get_mut(group).filter(|state| **state == State::Unknown) else {
                return Next::Go;
            };
            let fits = |unit: &Unit| (unit.demand.size.0..=unit.demand.size.1).contains(&size);
            if !self.groups.get(group).is_some_and(|group| group.fits(bytes)) {
                *state = State::Unfit;
                touched.push(group);
            } else if self.units.get(at).is_some_and(fits) {
                *state = State::Woken;
                touched.push(group);
                woken.push(group);
            }
            if woken.len() > MANY { Next::Stop } else { Next::Go }
        };
        if self.of_size.get(&size).is_some_and(|units| units.iter().any(|at| wake(*at) == Next::Stop)) {
            return true;
        }
        self.filter.find(bytes, deadline, met, |tell| {
            let (at, number) = (tell as usize / MOST_CLAUSES, tell as usize % MOST_CLAUSES);
            let (Some(met), Some(all)) = (clauses.get_mut(at), self.clauses_of.get(at)) else {
                return Next::Go;
            };
            if *met == 0 {
                begun.push(at);
            }
            *met |= 1 << number;
            if *met == *all { wake(at) } else { Next::Go }
        })
    }
}

/// Reads `mem:LINE:COLUMN: error: text`, the form in which boreal describes an error in one line.
fn problem(description: &str) -> Problem {
    let whole = || Problem { line: 0, column: 0, message: description.replace('\n', " ") };
    let mut parts = description.splitn(4, ':');
    let (Some(_), Some(line), Some(column), Some(message)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return whole();
    };
    let (Ok(line), Ok(column)) = (line.trim().parse(), column.trim().parse()) else { return whole() };
    let message = message.trim();
    let message =
        message.strip_prefix("error: ").or_else(|| message.strip_prefix("warning: ")).unwrap_or(message);
    Problem { line, column, message: message.replace('\n', " ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(text: &str) -> Result<(Engine, u32, Vec<Problem>), Refused> {
        Engine::compile(&[(Sha256::of(text.as_bytes()), text.to_owned())])
    }

    #[test]
    fn rules_match_under_the_digest_of_their_pattern() {
        let text =
            "rule marker { strings: $a = \"needle-47\" condition: $a } rule other { condition: false }";
        let (mut engine, rules, _) = compile(text).unwrap();
        assert_eq!(rules, 2);
        let judged = engine.judge(b"hay needle-47 hay", Duration::from_secs(5));
        assert_eq!(judged.matches, [(Sha256::of(text.as_bytes()), "marker".to_owned())]);
        assert!(engine.judge(b"only hay", Duration::from_secs(5)).matches.is_empty());
    }

    #[test]
    fn wrong_rules_are_refused_with_their_place() {
        for (text, line, part) in [
            ("rule a {\n  condition:\n    $nowhere\n}", 3, "nowhere"),
            ("include \"/etc/passwd\"\n", 1, "include"),
            ("import \"macho\"\nrule a { condition: true }", 1, "macho"),
            ("import \"nonesuch\"\nrule a { condition: true }", 1, "nonesuch"),
            ("rule a { condition: true }\nrule a { condition: true }", 2, "a"),
            ("rule", 1, ""),
        ] {
            let refused = compile(text).unwrap_err();
            let problem = &refused.problems[0];
            assert_eq!(problem.line, line, "{text}: {problem:?}");
            assert!(problem.column > 0, "{text}: {problem:?}");
            assert!(problem.message.contains(part), "{text}: {problem:?}");
            assert!(!problem.message.contains("root:"), "an include must not read the file");
        }
    }
}
