//! Units: the smallest sets of rules that can be compiled and judged apart from the rest with the same result.
//!
//! A rule and all that it names, or that name it, are one unit. A namespace with a global rule is one unit, as
//! is one whose text cannot be cut with certainty.
//!
//! **Invariant:** compiled alone (imports first, then its rules in their order), a unit gives exactly the hits
//! it gives within the whole.

use std::{collections::HashMap, ops::Range};

use boreal_parser::{
    expression::{
        Expression, ExpressionKind as Kind, ForIterator, ForSelection, Identifier, IdentifierOperationType,
    },
    file::{YaraFile, YaraFileComponent},
    rule::Rule,
};

use super::demand::{self, Demand, selects};

/// A set of rules that is judged together.
#[derive(Debug)]
pub(super) struct Unit {
    /// Index of the text (and namespace) it comes from.
    pub(super) text: usize,
    /// Modules it may use.
    pub(super) imports: Vec<String>,
    /// Places of its rules in the text, in order.
    pub(super) ranges: Vec<Range<usize>>,
    /// What must be true of the data before one of its rules can be reported.
    pub(super) demand: Demand,
    /// It holds its whole namespace: nothing of it may be judged beside another unit of the namespace.
    pub(super) whole: bool,
}

/// A rule, as far as units need it.
struct Member {
    range: Range<usize>,
    names: Vec<String>,
    private: bool,
    demand: Demand,
}

/// Cuts a text into units. It is the namespace `index`, has been accepted by the compiler, and was parsed: `file`.
pub(super) fn cut(index: usize, text: &str, file: &YaraFile) -> Vec<Unit> {
    let verbatim = |demand| {
        let ranges = Vec::from([Range { start: 0, end: text.len() }]);
        vec![Unit { text: index, imports: Vec::new(), ranges, demand, whole: true }]
    };
    let modules: Vec<String> = file
        .components
        .iter()
        .filter_map(|component| match component {
            YaraFileComponent::Import(import) => Some(import.name.clone()),
            YaraFileComponent::Rule(_) | YaraFileComponent::Include(_) => None,
        })
        .collect();
    let mut known: HashMap<String, Demand> = HashMap::new();
    let mut members: Vec<Member> = Vec::new();
    let mut order: HashMap<String, usize> = HashMap::new();
    let mut parents: Vec<usize> = Vec::new();
    let mut globals: Option<Demand> = None;
    let mut cut = true;
    let mut end = 0;
    for component in &file.components {
        match component {
            YaraFileComponent::Import(import) => end = import.span.end,
            YaraFileComponent::Include(_) => return verbatim(Demand::NOTHING),
            YaraFileComponent::Rule(rule) => {
                let demand = demand::of_rule(rule, &known, &modules);
                if rule.is_global {
                    globals = Some(globals.unwrap_or(Demand::NOTHING).and(demand.clone()));
                }
                // An import that comes later takes a rule's name away, and units have their imports first.
                cut &= !modules.contains(&rule.name);
                let Some(close) = closing_brace(text, rule.condition.span.end) else {
                    return verbatim(Demand::NOTHING);
                };
                let range = end..close;
                end = close;
                let names = names(rule);
                let own = members.len();
                parents.push(own);
                for name in &names.rules {
                    match name.strip_suffix('*') {
                        None => {
                            if let Some(other) = order.get(name) {
                                join(&mut parents, own, *other);
                            }
                        }
                        Some(prefix) => {
                            for (_, other) in order.iter().filter(|(other, _)| other.starts_with(prefix)) {
                                join(&mut parents, own, *other);
                            }
                        }
                    }
                }
                order.insert(rule.name.clone(), own);
                known.insert(rule.name.clone(), demand.clone());
                members.push(Member { range, names: names.rules, private: rule.is_private, demand });
            }
        }
    }
    if let Some(demand) = globals {
        return verbatim(demand);
    }
    if !cut {
        let public = members.iter().filter(|member| !member.private).map(|member| member.demand.clone());
        return verbatim(public.reduce(Demand::or).unwrap_or_else(Demand::never));
    }
    gather(index, members, &mut parents, &modules)
}

fn gather(text: usize, members: Vec<Member>, parents: &mut [usize], modules: &[String]) -> Vec<Unit> {
    let mut of_root: HashMap<usize, usize> = HashMap::new();
    let mut units: Vec<(Unit, Option<Demand>)> = Vec::new();
    for (own, member) in members.into_iter().enumerate() {
        let at = *of_root.entry(root(parents, own)).or_insert_with(|| {
            let unit =
                Unit { text, imports: Vec::new(), ranges: Vec::new(), demand: Demand::never(), whole: false };
            units.push((unit, None));
            units.len() - 1
        });
        let Some((unit, demand)) = units.get_mut(at) else { continue };
        unit.ranges.push(member.range);
        for module in modules {
            if member.names.contains(module) && !unit.imports.contains(module) {
                unit.imports.push(module.clone());
            }
        }
        // A private rule is never reported by itself, and who uses it has its demand.
        if !member.private {
            *demand = Some(match demand.take() {
                Some(others) => others.or(member.demand),
                None => member.demand,
            });
        }
    }
    units
        .into_iter()
        .map(|(unit, demand)| Unit { demand: demand.unwrap_or_else(Demand::never), ..unit })
        .collect()
}

fn root(parents: &mut [usize], mut at: usize) -> usize {
    loop {
        let parent = parents.get(at).copied().unwrap_or(at);
        if parent == at {
            return at;
        }
        let above = parents.get(parent).copied().unwrap_or(parent);
        if let Some(slot) = parents.get_mut(at) {
            *slot = above;
        }
        at = above;
    }
}

fn join(parents: &mut [usize], a: usize, b: usize) {
    let (a, b) = (root(parents, a), root(parents, b));
    // The earlier is the root, so that units keep the order of their first rules.
    if let Some(slot) = parents.get_mut(a.max(b)) {
        *slot = a.min(b);
    }
}

/// The end (after the brace) of a rule whose condition ends at `from`: between them stand only blanks, comments
/// and closing parentheses.
fn closing_brace(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = from;
    loop {
        match bytes.get(at)? {
            b'}' => return Some(at + 1),
            b'/' => {
                let rest = text.get(at..)?;
                at += if rest.starts_with("//") {
                    rest.find('\n')?
                } else if rest.starts_with("/*") {
                    rest.get(2..)?.find("*/")? + 4
                } else {
                    return None;
                };
            }
            b' ' | b'\t' | b'\r' | b'\n' | b')' => at += 1,
            _ => return None,
        }
    }
}

/// What a condition names: identifiers (rules, modules, loop variables), a set of rules with `*` at its end.
#[derive(Default)]
struct Names {
    rules: Vec<String>,
}

fn names(rule: &Rule) -> Names {
    let mut found = Names::default();
    found.expression(&rule.condition);
    found
}

impl Names {
    fn identifier(&mut self, identifier: &Identifier) {
        self.rules.push(identifier.name.clone());
        for operation in &identifier.operations {
            match &operation.op {
                IdentifierOperationType::Subscript(at) => self.expression(at),
                IdentifierOperationType::Subfield(_) => {}
                IdentifierOperationType::FunctionCall(arguments) => {
                    arguments.iter().for_each(|argument| self.expression(argument));
                }
            }
        }
    }

    fn selection(&mut self, selection: &ForSelection) {
        match selection {
            ForSelection::Any | ForSelection::All | ForSelection::None => {}
            ForSelection::Expr { expr, .. } => self.expression(expr),
        }
    }

    fn expression(&mut self, expression: &Expression) {
        if let Kind::Identifier(identifier) = &expression.expr {
            self.identifier(identifier);
        }
        if let Kind::ForIdentifiers { iterator: ForIterator::Identifier(identifier), .. } = &expression.expr {
            self.identifier(identifier);
        }
        if let Kind::For { selection, .. }
        | Kind::ForIn { selection, .. }
        | Kind::ForAt { selection, .. }
        | Kind::ForIdentifiers { selection, .. }
        | Kind::ForRules { selection, .. } = &expression.expr
        {
            self.selection(selection);
        }
        if let Kind::ForRules { set, .. } = &expression.expr {
            self.rules.extend(set.elements.iter().map(|element| {
                if element.is_wildcard { format!("{}*", element.name) } else { element.name.clone() }
            }));
            debug_assert!(set.elements.iter().all(|element| selects(element, &element.name)));
        }
        children(expression).into_iter().for_each(|child| self.expression(child));
    }
}

/// The expressions directly within one, but those of identifiers and selections.
pub(super) fn children(expression: &Expression) -> Vec<&Expression> {
    match &expression.expr {
        Kind::Filesize
        | Kind::Entrypoint
        | Kind::Integer(_)
        | Kind::Double(_)
        | Kind::Count(_)
        | Kind::Boolean(_)
        | Kind::Variable(_)
        | Kind::ForRules { .. }
        | Kind::Identifier(_)
        | Kind::Bytes(_)
        | Kind::Regex(_) => Vec::new(),
        Kind::ReadInteger { addr: one, .. }
        | Kind::Offset { occurence_number: one, .. }
        | Kind::Length { occurence_number: one, .. }
        | Kind::Neg(one)
        | Kind::BitwiseNot(one)
        | Kind::Not(one)
        | Kind::Defined(one)
        | Kind::Matches(one, _)
        | Kind::VariableAt { offset: one, .. }
        | Kind::ForAt { offset: one, .. } => vec![one],
        Kind::CountInRange { from: a, to: b, .. }
        | Kind::VariableIn { from: a, to: b, .. }
        | Kind::ForIn { from: a, to: b, .. }
        | Kind::Add(a, b)
        | Kind::Sub(a, b)
        | Kind::Mul(a, b)
        | Kind::Div(a, b)
        | Kind::Mod(a, b)
        | Kind::BitwiseXor(a, b)
        | Kind::BitwiseAnd(a, b)
        | Kind::BitwiseOr(a, b)
        | Kind::ShiftLeft(a, b)
        | Kind::ShiftRight(a, b)
        | Kind::Cmp { left: a, right: b, .. }
        | Kind::Eq(a, b)
        | Kind::NotEq(a, b)
        | Kind::Contains { haystack: a, needle: b, .. }
        | Kind::StartsWith { expr: a, prefix: b, .. }
        | Kind::EndsWith { expr: a, suffix: b, .. }
        | Kind::IEquals(a, b) => vec![a, b],
        Kind::And(all) | Kind::Or(all) => all.iter().collect(),
        Kind::For { body, .. } => body.iter().map(AsRef::as_ref).collect(),
        Kind::ForIdentifiers { iterator, body, .. } => {
            let mut found: Vec<&Expression> = match iterator {
                ForIterator::Identifier(_) => Vec::new(),
                ForIterator::Range { from, to } => vec![from, to],
                ForIterator::List(list) => list.iter().collect(),
            };
            found.push(body);
            found
        }
    }
}
