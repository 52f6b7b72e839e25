//! Groups: units that are compiled into one scanner, when one of them is first needed.
//!
//! **Invariant:** the scanners kept take no more than a fixed amount of memory by estimate; the one used longest
//! ago goes first. A group that does not compile is never passed over in silence: the whole set judges instead.

use std::sync::{Mutex, PoisonError};

use boreal::Scanner;
use tm_protocol::ids::Sha256;

use super::{Built, units::Unit};

/// Most units of a group that is compiled on use.
const UNITS: usize = 24;
/// Memory of a scanner that does not depend on its rules, in bytes.
const BASE: usize = 160 << 10;
/// Memory of a compiled rule for each byte of its text.
const PER_BYTE: usize = 12;

/// Units that are judged together.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) units: Vec<usize>,
    /// One of these begins every data its rules can hold for.
    pub(super) starts: Option<Vec<Vec<u8>>>,
    /// Smallest and largest size of data its rules can hold for.
    pub(super) size: (u64, u64),
    /// Estimated memory, in bytes.
    cost: usize,
}

impl Group {
    /// Whether its rules can hold for data like this.
    pub(super) fn fits(&self, data: &[u8]) -> bool {
        let size = u64::try_from(data.len()).unwrap_or(u64::MAX);
        self.size.0 <= size
            && size <= self.size.1
            && self.starts.as_ref().is_none_or(|starts| starts.iter().any(|start| data.starts_with(start)))
    }
}

/// Divides units into groups, those of one file type together; never more than `UNITS` if `limited`.
pub(super) fn divide(units: &[Unit], mut chosen: Vec<usize>, limited: bool) -> Vec<Group> {
    chosen.sort_by_key(|at| units.get(*at).map(|unit| unit.demand.starts.clone()));
    let mut groups: Vec<Group> = Vec::new();
    for at in chosen {
        let Some(unit) = units.get(at) else { continue };
        let cost = unit.ranges.iter().map(|range| range.len() * PER_BYTE).sum::<usize>();
        let fits = groups.last().is_some_and(|group| {
            group.starts == unit.demand.starts && (!limited || group.units.len() < UNITS)
        });
        // A namespace with a global rule stands alone: boreal reports its global rules although one of them
        // does not hold, if another namespace is there.
        let alone = |at: &usize| units.get(*at).is_some_and(|unit| unit.whole);
        let fits = fits && !alone(&at) && !groups.last().is_some_and(|group| group.units.iter().any(alone));
        if !fits {
            groups.push(Group {
                starts: unit.demand.starts.clone(),
                size: (u64::MAX, 0),
                cost: BASE,
                units: Vec::new(),
            });
        }
        if let Some(group) = groups.last_mut() {
            group.size = (group.size.0.min(unit.demand.size.0), group.size.1.max(unit.demand.size.1));
            group.units.push(at);
            group.cost += cost;
        }
    }
    groups
}

/// Compiles a group from the texts of its units.
pub(super) fn compile(texts: &[(Sha256, String)], units: &[Unit], group: &Group) -> Option<Scanner> {
    let mut sorted = group.units.clone();
    // Rules keep the order of their texts.
    sorted.sort_unstable();
    let mut built = Built::new();
    let mut rest = sorted.as_slice();
    while let Some(text) = rest.first().and_then(|at| units.get(*at)).map(|unit| unit.text) {
        let of_text = rest.partition_point(|at| units.get(*at).is_some_and(|unit| unit.text <= text));
        let (own, others) = rest.split_at_checked(of_text)?;
        rest = others;
        let own: Vec<&Unit> = own.iter().filter_map(|at| units.get(*at)).collect();
        let (sha256, whole) = texts.get(text)?;
        let mut source = String::new();
        let mut imports: Vec<&String> = own.iter().flat_map(|unit| &unit.imports).collect();
        imports.sort_unstable();
        imports.dedup();
        for import in imports {
            source.push_str(&format!("import \"{import}\"\n"));
        }
        let mut ranges: Vec<_> = own.iter().flat_map(|unit| &unit.ranges).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        for range in ranges {
            source.push_str(whole.get(range.clone())?);
            source.push('\n');
        }
        built.add(sha256, &source).ok()?;
    }
    Some(built.finish())
}

/// The scanners kept, shared by the threads of a worker.
#[derive(Debug)]
pub(super) struct Kept {
    most: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// A scanner of each group, and when it was last used.
    scanners: Vec<Option<(Scanner, u64)>>,
    clock: u64,
    cost: usize,
}

impl Kept {
    /// Keeps scanners of `groups` groups, up to `most` bytes of them.
    pub(super) fn new(groups: usize, most: usize) -> Self {
        let scanners = (0..groups).map(|_| None).collect();
        Self { most, inner: Mutex::new(Inner { scanners, clock: 0, cost: 0 }) }
    }

    /// The scanner of the group at `at`, compiled if there is none. Others wait meanwhile: they would compile
    /// the same.
    pub(super) fn get(
        &self,
        at: usize,
        texts: &[(Sha256, String)],
        units: &[Unit],
        groups: &[Group],
    ) -> Option<Scanner> {
        // A panic ends the process (see the worker); what is kept is sound at any moment.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clock += 1;
        let now = inner.clock;
        if let Some((scanner, used)) = inner.scanners.get_mut(at)?.as_mut() {
            *used = now;
            return Some(scanner.clone());
        }
        let group = groups.get(at)?;
        let scanner = compile(texts, units, group)?;
        inner.cost += group.cost;
        while inner.cost > self.most {
            let oldest = inner
                .scanners
                .iter()
                .enumerate()
                .filter_map(|(at, slot)| slot.as_ref().map(|(_, used)| (*used, at)))
                .min();
            let Some((_, oldest)) = oldest else { break };
            if let Some(slot) = inner.scanners.get_mut(oldest) {
                *slot = None;
            }
            inner.cost -= groups.get(oldest).map_or(0, |group| group.cost);
        }
        *inner.scanners.get_mut(at)? = Some((scanner.clone(), now));
        Some(scanner)
    }

    /// How many scanners are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let inner = self.inner.lock().unwrap();
        inner.scanners.iter().flatten().count()
    }
}
