//! Demands: what must be true of the data before a rule can hold.
//!
//! **Invariant:** a demand is never stronger than the condition it was worked out from: whenever the condition
//! holds, so does the demand. Whatever is not understood demands nothing.

use std::collections::HashMap;

use boreal_parser::{
    expression::{
        Expression, ExpressionKind as Kind, ForIterator, ForSelection, Identifier,
        IdentifierOperationType as Op, ReadIntegerType, SetElement, VariableSet,
    },
    rule::{Rule, VariableDeclaration, VariableDeclarationValue},
};

use super::needles::{self, Literal, MOST};

/// Most beginnings that are told apart.
const MOST_STARTS: usize = 16;
/// Most clauses of one demand.
pub(super) const MOST_CLAUSES: usize = 4;
/// Most literals of a clause beside the best one: a clause of many is one that most data meets.
const MOST_BESIDE: usize = 64;

/// Literals of which at least one is in the data; of none, never.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Clause {
    /// Sorted, each once.
    pub(super) literals: Vec<Literal>,
    /// How much it keeps away: the least rarity of its literals.
    pub(super) worth: i32,
}

impl Clause {
    fn new(mut literals: Vec<Literal>) -> Self {
        literals.sort_unstable();
        literals.dedup();
        let worth = literals.iter().map(|literal| literal.rarity).min().unwrap_or(i32::MAX);
        Self { literals, worth }
    }

    /// Higher is better.
    fn rank(&self) -> (i32, std::cmp::Reverse<usize>) {
        (self.worth, std::cmp::Reverse(self.literals.len()))
    }
}

/// What must be true of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Demand {
    /// Each is met; the best first. None: nothing is known. With one that has no literals it can never hold.
    pub(super) clauses: Vec<Clause>,
    /// It begins with one of these.
    pub(super) starts: Option<Vec<Vec<u8>>>,
    /// Smallest and largest size in bytes.
    pub(super) size: (u64, u64),
}

impl Demand {
    /// Demands nothing: the rule is run on everything.
    pub(super) const NOTHING: Self = Self { clauses: Vec::new(), starts: None, size: (0, u64::MAX) };

    /// Cannot be met.
    pub(super) fn never() -> Self {
        Self { clauses: vec![Clause::new(Vec::new())], ..Self::NOTHING }
    }

    fn needles(needles: Option<Vec<Literal>>) -> Self {
        Self { clauses: needles.into_iter().map(Clause::new).collect(), ..Self::NOTHING }
    }

    fn starts(starts: Vec<Vec<u8>>) -> Self {
        Self { starts: Some(starts), ..Self::NOTHING }
    }

    /// Whether it cannot be met.
    pub(super) fn is_never(&self) -> bool {
        self.clauses.iter().any(|clause| clause.literals.is_empty())
    }

    /// How much its best clause keeps away: higher is better.
    pub(super) fn worth(&self) -> i32 {
        self.clauses.first().map_or(-1, |clause| clause.worth)
    }

    /// Both hold.
    pub(super) fn and(self, other: Self) -> Self {
        let size = (self.size.0.max(other.size.0), self.size.1.min(other.size.1));
        let starts = match (self.starts.clone(), other.starts.clone()) {
            (Some(a), Some(b)) => {
                let mut both: Vec<Vec<u8>> = Vec::new();
                for x in &a {
                    for y in &b {
                        if x.starts_with(y) {
                            both.push(x.clone());
                        } else if y.starts_with(x) {
                            both.push(y.clone());
                        }
                    }
                }
                both.sort();
                both.dedup();
                Some(both).filter(|both| both.len() <= MOST_STARTS).or(Some(a))
            }
            (a, b) => a.or(b),
        };
        if self.is_never() || other.is_never() {
            return Self { starts, size, ..Self::never() };
        }
        let clauses = best_of(self.clauses.into_iter().chain(other.clauses).collect());
        Self { clauses, starts, size }
    }

    /// At least one holds.
    pub(super) fn or(self, other: Self) -> Self {
        Self::any(&[self, other])
    }

    /// At least one of these holds; of none, nothing is known.
    pub(super) fn any(demands: &[Self]) -> Self {
        let Some((first, others)) = demands.split_first() else { return Self::NOTHING };
        let mut size = first.size;
        let mut starts = first.starts.clone();
        for other in others {
            size = (size.0.min(other.size.0), size.1.max(other.size.1));
            starts = starts.zip(other.starts.clone()).and_then(|(a, b)| union(a, b, MOST_STARTS));
        }
        Self { clauses: best_of(clauses_of_any(demands.iter())), starts, size }
    }
}

/// Whichever of them holds, one of each of its clauses is met: the best of all together, the next of all, and so on.
fn clauses_of_any<'a>(demands: impl Iterator<Item = &'a Demand>) -> Vec<Clause> {
    let possible: Vec<&Demand> = demands.filter(|demand| !demand.is_never()).collect();
    let Some(count) = possible.iter().map(|demand| demand.clauses.len()).min() else {
        return Demand::never().clauses;
    };
    let all = |at: usize| {
        let literals = || possible.iter().filter_map(move |demand| demand.clauses.get(at));
        let len: usize = literals().map(|clause| clause.literals.len()).sum();
        (len <= MOST).then(|| Clause::new(literals().flat_map(|clause| &clause.literals).copied().collect()))
    };
    (0..count).filter_map(all).collect()
}

/// The best of them first, each once; of those behind it only such as keep much away at little cost.
fn best_of(mut clauses: Vec<Clause>) -> Vec<Clause> {
    clauses.sort_by_key(|clause| std::cmp::Reverse(clause.rank()));
    clauses.dedup();
    let mut at = 0;
    clauses.retain(|clause| {
        at += 1;
        at == 1 || clause.literals.len() <= MOST_BESIDE
    });
    clauses.truncate(MOST_CLAUSES);
    clauses
}

fn union(mut a: Vec<Vec<u8>>, b: Vec<Vec<u8>>, most: usize) -> Option<Vec<Vec<u8>>> {
    a.extend(b);
    a.sort();
    a.dedup();
    (a.len() <= most).then_some(a)
}

/// At least `n` of these hold: whichever `n - 1` of them are left out, one of the others does.
fn n_of(mut demands: Vec<Demand>, n: usize) -> Demand {
    if n == 0 || n > demands.len() {
        return Demand::NOTHING;
    }
    let any = Demand::any(&demands);
    if n == 1 {
        return any;
    }
    demands.sort_by_key(|demand| std::cmp::Reverse(demand.worth()));
    // Without the weakest, without the strongest, without the strongest but one.
    let left_out = if demands.len() > MOST_BESIDE { 1 } else { 3 };
    let clauses = [demands.len() + 1 - n, 0, 1].into_iter().take(left_out).flat_map(|first| {
        let out = first..first + n - 1;
        clauses_of_any(demands.iter().enumerate().filter(|(at, _)| !out.contains(at)).map(|(_, one)| one))
    });
    Demand { clauses: best_of(clauses.collect()), ..any }
}

/// Works out the demands of the rules of one namespace, in their order.
struct Reader<'a> {
    /// Demands of the rules before, by name.
    known: &'a HashMap<String, Demand>,
    /// Names of modules that are imported anywhere in the namespace.
    modules: &'a [String],
    strings: &'a [VariableDeclaration],
    of_strings: Vec<Demand>,
    bound: Vec<String>,
}

/// The demand of `rule`.
pub(super) fn of_rule(rule: &Rule, known: &HashMap<String, Demand>, modules: &[String]) -> Demand {
    let of_strings =
        rule.variables.iter().map(|string| Demand::needles(needles::of_string(string))).collect();
    let mut reader = Reader { known, modules, strings: &rule.variables, of_strings, bound: Vec::new() };
    reader.holds(&rule.condition, None)
}

impl Reader<'_> {
    /// What must be true for `expression` to be true; `current` is the string `$` stands for.
    fn holds(&mut self, expression: &Expression, current: Option<usize>) -> Demand {
        match &expression.expr {
            Kind::And(all) => {
                all.iter().fold(Demand::NOTHING, |demand, one| demand.and(self.holds(one, current)))
            }
            Kind::Or(any) => {
                let demands: Vec<_> = any.iter().map(|one| self.holds(one, current)).collect();
                Demand::any(&demands)
            }
            Kind::Boolean(false) => Demand::never(),
            Kind::Variable(name) | Kind::Count(name) => self.string(name, current),
            Kind::CountInRange { variable_name, .. } => self.string(variable_name, current),
            Kind::VariableIn { variable_name, .. } => self.string(variable_name, current),
            Kind::VariableAt { variable_name, offset, .. } => {
                let demand = self.string(variable_name, current);
                match (&offset.expr, self.index(variable_name, current).and_then(|i| self.start_of(i))) {
                    (Kind::Integer(0), Some(start)) => demand.and(Demand::starts(vec![start])),
                    _ => demand,
                }
            }
            Kind::Offset { .. } | Kind::Length { .. } | Kind::Defined(_) => self.defined(expression, current),
            Kind::Cmp { left, right, less_than, can_be_equal } => {
                let demand = self.defined(left, current).and(self.defined(right, current));
                let (small, large) = if *less_than { (left, right) } else { (right, left) };
                demand.and(self.ordered(small, large, *can_be_equal, current))
            }
            Kind::Eq(left, right) => {
                let demand = self.defined(left, current).and(self.defined(right, current));
                demand.and(self.equal(left, right, current)).and(self.equal(right, left, current))
            }
            Kind::NotEq(left, right) | Kind::IEquals(left, right) => {
                self.defined(left, current).and(self.defined(right, current))
            }
            Kind::Contains { haystack: whole, needle: part, .. }
            | Kind::StartsWith { expr: whole, prefix: part, .. }
            | Kind::EndsWith { expr: whole, suffix: part, .. } => {
                self.defined(whole, current).and(self.defined(part, current))
            }
            Kind::Matches(whole, _) => self.defined(whole, current),
            Kind::For { selection, set, body } => self.for_strings(selection, set, body.as_deref()),
            Kind::ForIn { selection, set, .. } | Kind::ForAt { selection, set, .. } => {
                self.for_strings(selection, set, None)
            }
            Kind::ForIdentifiers { selection, identifiers, iterator, body, .. } => {
                let once = match selection {
                    ForSelection::Any => true,
                    // An empty list satisfies `all`; a range is never empty.
                    ForSelection::All => matches!(iterator, ForIterator::Range { .. }),
                    ForSelection::None => false,
                    ForSelection::Expr { expr, .. } => matches!(expr.expr, Kind::Integer(n) if n > 0),
                };
                if !once {
                    return Demand::NOTHING;
                }
                let demand = match iterator {
                    ForIterator::Identifier(identifier) => self.module_value(identifier),
                    ForIterator::Range { .. } | ForIterator::List(_) => Demand::NOTHING,
                };
                let before = self.bound.len();
                self.bound.extend(identifiers.iter().cloned());
                let body = self.holds(body, current);
                self.bound.truncate(before);
                demand.and(body)
            }
            Kind::Identifier(identifier) => self.identifier(identifier),
            Kind::ReadInteger { .. } => self.defined(expression, current),
            Kind::ForRules { .. }
            | Kind::Not(_)
            | Kind::Boolean(true)
            | Kind::Filesize
            | Kind::Entrypoint
            | Kind::Integer(_)
            | Kind::Double(_)
            | Kind::Neg(_)
            | Kind::Add(..)
            | Kind::Sub(..)
            | Kind::Mul(..)
            | Kind::Div(..)
            | Kind::Mod(..)
            | Kind::BitwiseXor(..)
            | Kind::BitwiseAnd(..)
            | Kind::BitwiseOr(..)
            | Kind::BitwiseNot(_)
            | Kind::ShiftLeft(..)
            | Kind::ShiftRight(..)
            | Kind::Bytes(_)
            | Kind::Regex(_) => Demand::NOTHING,
        }
    }

    /// What must be true for a value to be defined at all.
    fn defined(&self, expression: &Expression, current: Option<usize>) -> Demand {
        match &expression.expr {
            Kind::Offset { variable_name, .. } | Kind::Length { variable_name, .. } => {
                self.string(variable_name, current)
            }
            Kind::Identifier(identifier) => self.module_value(identifier),
            Kind::Neg(one) | Kind::BitwiseNot(one) | Kind::Defined(one) => self.defined(one, current),
            Kind::Add(a, b)
            | Kind::Sub(a, b)
            | Kind::Mul(a, b)
            | Kind::Div(a, b)
            | Kind::Mod(a, b)
            | Kind::BitwiseXor(a, b)
            | Kind::BitwiseAnd(a, b)
            | Kind::BitwiseOr(a, b)
            | Kind::ShiftLeft(a, b)
            | Kind::ShiftRight(a, b) => self.defined(a, current).and(self.defined(b, current)),
            Kind::ReadInteger { addr, .. } => self.defined(addr, current),
            Kind::Filesize
            | Kind::Entrypoint
            | Kind::Integer(_)
            | Kind::Double(_)
            | Kind::Count(_)
            | Kind::CountInRange { .. }
            | Kind::And(_)
            | Kind::Or(_)
            | Kind::Not(_)
            | Kind::Cmp { .. }
            | Kind::Eq(..)
            | Kind::NotEq(..)
            | Kind::Contains { .. }
            | Kind::StartsWith { .. }
            | Kind::EndsWith { .. }
            | Kind::IEquals(..)
            | Kind::Matches(..)
            | Kind::Boolean(_)
            | Kind::Variable(_)
            | Kind::VariableAt { .. }
            | Kind::VariableIn { .. }
            | Kind::For { .. }
            | Kind::ForIn { .. }
            | Kind::ForAt { .. }
            | Kind::ForIdentifiers { .. }
            | Kind::ForRules { .. }
            | Kind::Bytes(_)
            | Kind::Regex(_) => Demand::NOTHING,
        }
    }

    /// `small < large`, or `<=` if they may be equal.
    fn ordered(&self, small: &Expression, large: &Expression, equal: bool, current: Option<usize>) -> Demand {
        match (&small.expr, &large.expr) {
            (Kind::Integer(n), Kind::Count(name) | Kind::CountInRange { variable_name: name, .. })
                if *n > 0 || (*n == 0 && !equal) =>
            {
                self.string(name, current)
            }
            (Kind::Filesize, Kind::Integer(n)) => {
                let most = u64::try_from(*n).unwrap_or_default();
                Demand { size: (0, most), ..Demand::NOTHING }
            }
            (Kind::Integer(n), Kind::Filesize) => {
                let least = u64::try_from(*n).unwrap_or_default();
                Demand { size: (least, u64::MAX), ..Demand::NOTHING }
            }
            _ => Demand::NOTHING,
        }
    }

    fn equal(&self, left: &Expression, right: &Expression, current: Option<usize>) -> Demand {
        let Kind::Integer(n) = &right.expr else { return Demand::NOTHING };
        if let Kind::Count(name) | Kind::CountInRange { variable_name: name, .. } = &left.expr
            && *n > 0
        {
            return self.string(name, current);
        }
        if matches!(left.expr, Kind::Filesize) {
            let size = u64::try_from(*n).unwrap_or_default();
            return Demand { size: (size, size), ..Demand::NOTHING };
        }
        if let Kind::ReadInteger { ty, addr } = &left.expr
            && matches!(addr.expr, Kind::Integer(0))
        {
            return read_bytes(*ty, *n).map_or(Demand::NOTHING, |start| Demand::starts(vec![start]));
        }
        Demand::NOTHING
    }

    fn for_strings(
        &mut self,
        selection: &ForSelection,
        set: &VariableSet,
        body: Option<&Expression>,
    ) -> Demand {
        let members: Vec<usize> = (0..self.strings.len())
            .filter(|i| {
                let name = self.strings.get(*i).map_or("", |string| string.name.as_str());
                set.elements.is_empty() || set.elements.iter().any(|element| selects(element, name))
            })
            .collect();
        let n = match selection {
            ForSelection::Any => 1,
            ForSelection::All => members.len(),
            ForSelection::None => return Demand::NOTHING,
            ForSelection::Expr { expr, as_percent } => {
                let Kind::Integer(n) = expr.expr else { return Demand::NOTHING };
                if n <= 0 {
                    return Demand::NOTHING;
                }
                if *as_percent { 1 } else { usize::try_from(n).unwrap_or(usize::MAX) }
            }
        };
        let demands: Vec<Demand> = members
            .into_iter()
            .map(|member| match body {
                None => self.of_strings.get(member).cloned().unwrap_or(Demand::NOTHING),
                Some(body) => self.holds(body, Some(member)),
            })
            .collect();
        if demands.len() == n {
            return demands.into_iter().reduce(Demand::and).unwrap_or(Demand::NOTHING);
        }
        n_of(demands, n)
    }

    fn index(&self, name: &str, current: Option<usize>) -> Option<usize> {
        if name.is_empty() { current } else { self.strings.iter().position(|string| string.name == name) }
    }

    fn string(&self, name: &str, current: Option<usize>) -> Demand {
        let index = self.index(name, current);
        index.and_then(|i| self.of_strings.get(i)).cloned().unwrap_or(Demand::NOTHING)
    }

    /// The first bytes of a string that has one form only.
    fn start_of(&self, index: usize) -> Option<Vec<u8>> {
        let string = self.strings.get(index)?;
        let modifiers = &string.modifiers;
        if modifiers.nocase || modifiers.wide || modifiers.xor.is_some() || modifiers.base64.is_some() {
            return None;
        }
        let start: Vec<u8> = match &string.value {
            VariableDeclarationValue::Bytes(bytes) => bytes.iter().copied().take(4).collect(),
            VariableDeclarationValue::HexString(tokens) => tokens
                .iter()
                .map_while(|token| match token {
                    boreal_parser::hex_string::Token::Byte(byte) => Some(*byte),
                    boreal_parser::hex_string::Token::NotByte(_)
                    | boreal_parser::hex_string::Token::MaskedByte(..)
                    | boreal_parser::hex_string::Token::NotMaskedByte(..)
                    | boreal_parser::hex_string::Token::Jump(_)
                    | boreal_parser::hex_string::Token::Alternatives(_) => None,
                })
                .take(4)
                .collect(),
            VariableDeclarationValue::Regex(_) => return None,
        };
        (!start.is_empty()).then_some(start)
    }

    fn is_module(&self, name: &str) -> bool {
        self.modules.iter().any(|module| module == name) && !self.bound.iter().any(|bound| bound == name)
    }

    fn identifier(&self, identifier: &Identifier) -> Demand {
        if self.is_module(&identifier.name) {
            // Of the functions, only those that say no about anything that is not of the module's type.
            let says_no = matches!(
                identifier.operations.as_slice(),
                [field, call, ..] if matches!(&field.op, Op::Subfield(name)
                    if identifier.name == "pe" && matches!(name.as_str(), "is_dll" | "imports" | "exports"))
                    && matches!(call.op, Op::FunctionCall(_))
            );
            let is_pe = matches!(identifier.operations.as_slice(), [field]
                if matches!(&field.op, Op::Subfield(name) if name == "is_pe") && identifier.name == "pe");
            if says_no || is_pe {
                return Demand::starts(vec![b"MZ".to_vec()]);
            }
            return self.module_value(identifier);
        }
        if identifier.operations.is_empty() && !self.bound.contains(&identifier.name) {
            return self.known.get(&identifier.name).cloned().unwrap_or(Demand::NOTHING);
        }
        Demand::NOTHING
    }

    /// Fields of file modules are defined only for files of their type. Constants (in capitals) and
    /// functions are defined for all.
    fn module_value(&self, identifier: &Identifier) -> Demand {
        let start: &[u8] = match identifier.name.as_str() {
            "pe" | "dotnet" => b"MZ",
            "elf" => b"\x7fELF",
            _ => return Demand::NOTHING,
        };
        let field = match identifier.operations.first().map(|operation| &operation.op) {
            Some(Op::Subfield(field)) => field,
            Some(Op::Subscript(_) | Op::FunctionCall(_)) | None => return Demand::NOTHING,
        };
        let calls = identifier.operations.iter().any(|operation| matches!(operation.op, Op::FunctionCall(_)));
        let constant = !field.chars().any(|c| c.is_ascii_lowercase());
        if calls
            || constant
            || matches!(field.as_str(), "is_pe" | "is_dotnet")
            || !self.is_module(&identifier.name)
        {
            return Demand::NOTHING;
        }
        Demand::starts(vec![start.to_vec()])
    }
}

/// Whether an element of a set names `name`.
pub(super) fn selects(element: &SetElement, name: &str) -> bool {
    if element.is_wildcard { name.starts_with(&element.name) } else { name == element.name }
}

/// The bytes that are read as `value`; `None` where the type cannot hold it or its sign is in play.
fn read_bytes(ty: ReadIntegerType, value: i64) -> Option<Vec<u8>> {
    Some(match ty {
        ReadIntegerType::Int8 | ReadIntegerType::Int16 | ReadIntegerType::Int16BE => return None,
        ReadIntegerType::Int32 | ReadIntegerType::Int32BE => return None,
        ReadIntegerType::Uint8 => vec![u8::try_from(value).ok()?],
        ReadIntegerType::Uint16 => u16::try_from(value).ok()?.to_le_bytes().to_vec(),
        ReadIntegerType::Uint16BE => u16::try_from(value).ok()?.to_be_bytes().to_vec(),
        ReadIntegerType::Uint32 => u32::try_from(value).ok()?.to_le_bytes().to_vec(),
        ReadIntegerType::Uint32BE => u32::try_from(value).ok()?.to_be_bytes().to_vec(),
    })
}
