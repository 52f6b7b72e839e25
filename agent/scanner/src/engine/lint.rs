//! What makes a rule slow, said when a pattern is imported.
//!
//! Remarks begin with [`SLOW`] or [`VERY_SLOW`]; the second kind is refused at import unless forced: no time
//! limit stops the engine within such a rule.

use boreal_parser::{
    expression::{Expression, ExpressionKind as Kind, ForIterator, Identifier, IdentifierOperationType},
    file::{YaraFile, YaraFileComponent},
    regex::{AssertionKind, Node, RepetitionKind, RepetitionRange},
    rule::{VariableDeclaration, VariableDeclarationValue},
};
use tm_patterns::Problem;

use super::{needles, units::children};

/// How a remark on a rule that costs more than others begins.
pub(crate) const SLOW: &str = "slow rule";
/// How a remark on a rule that can stop a scan begins.
pub(crate) const VERY_SLOW: &str = "very slow rule";

/// Rounds of a loop that are always few.
const FEW_ROUNDS: i64 = 64;

/// What is said of a rule.
#[derive(Debug, Clone)]
pub(super) struct Remark {
    /// Its name.
    pub(super) rule: String,
    /// Where in the text, in bytes.
    pub(super) at: usize,
    /// It can stop a scan.
    pub(super) very: bool,
    /// Why.
    pub(super) reason: String,
}

/// Remarks on the rules of `text` (parsed: `file`), each at the name of its rule or at its string.
pub(super) fn look(text: &str, file: &YaraFile) -> Vec<Problem> {
    problems(text, remarks(file))
}

/// What there is to say of the rules of a file.
pub(super) fn remarks(file: &YaraFile) -> Vec<Remark> {
    let mut remarks = Vec::new();
    for component in &file.components {
        if let YaraFileComponent::Rule(rule) = component {
            let mut found = Vec::new();
            for string in &rule.variables {
                if let Some((very, reason)) = of_string(string) {
                    found.push((string.span.start, very, reason));
                }
            }
            of_loops(&rule.condition, None, &mut found);
            remarks.extend(found.into_iter().map(|(at, very, reason)| Remark {
                rule: rule.name.clone(),
                at,
                very,
                reason,
            }));
        }
    }
    remarks
}

/// Remarks in the order of the text, with their lines and columns.
pub(super) fn problems(text: &str, mut remarks: Vec<Remark>) -> Vec<Problem> {
    remarks.sort_by_key(|remark| remark.at);
    let mut place = Place { text, at: 0, line: 1 };
    remarks
        .into_iter()
        .map(|Remark { rule, at, very, reason }| {
            let prefix = if very { VERY_SLOW } else { SLOW };
            let (line, column) = place.of(at);
            Problem { line, column, message: format!("{prefix} `{rule}`: {reason}") }
        })
        .collect()
}

/// Lines and columns of ascending offsets, counted once.
struct Place<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl Place<'_> {
    fn of(&mut self, at: usize) -> (u32, u32) {
        let between = self.text.get(self.at..at).unwrap_or_default();
        self.line += between.matches('\n').count();
        self.at = self.at.max(at);
        let before = self.text.get(..at).unwrap_or_default();
        let line = before.rsplit('\n').next().unwrap_or_default();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        (number(self.line), number(line.chars().count() + 1))
    }
}

fn of_string(string: &VariableDeclaration) -> Option<(bool, String)> {
    let name = &string.name;
    match &string.value {
        VariableDeclarationValue::Bytes(bytes) => (bytes.len() < 3
            && !(string.modifiers.wide && bytes.len() == 2 && !string.modifiers.ascii))
            .then(|| (false, format!("string `${name}` is shorter than 3 bytes"))),
        VariableDeclarationValue::HexString(tokens) => short(needles::hex_runs(tokens, 1), name),
        VariableDeclarationValue::Regex(regex) => {
            let runs = needles::regex_runs(regex, 1);
            if runs.is_none() && endless(&regex.ast) {
                return Some((true, format!("regular expression `${name}` has no literal and no end")));
            }
            if anchored(&regex.ast) {
                return Some((false, format!("regular expression `${name}` is tried at every line")));
            }
            short(runs, name)
        }
    }
}

fn short(runs: Option<Vec<Vec<u8>>>, name: &str) -> Option<(bool, String)> {
    match runs.map(|runs| runs.iter().map(Vec::len).min().unwrap_or_default()) {
        None => Some((false, format!("string `${name}` has no literal that must be there"))),
        Some(length @ (0..=2)) => {
            let bytes = if length == 1 { "1 byte".to_owned() } else { format!("{length} bytes") };
            Some((false, format!("string `${name}` has no literal longer than {bytes}")))
        }
        Some(_) => None,
    }
}

fn endless(node: &Node) -> bool {
    match node {
        Node::Repetition { node, kind, .. } => match kind {
            RepetitionKind::ZeroOrMore
            | RepetitionKind::OneOrMore
            | RepetitionKind::Range(RepetitionRange::AtLeast(_)) => true,
            RepetitionKind::ZeroOrOne
            | RepetitionKind::Range(RepetitionRange::Exactly(_) | RepetitionRange::Bounded(..)) => {
                endless(node)
            }
        },
        Node::Alternation(nodes) | Node::Concat(nodes) => nodes.iter().any(endless),
        Node::Group(node) => endless(node),
        Node::Assertion(_) | Node::Class(_) | Node::Dot | Node::Empty | Node::Literal(_) | Node::Char(_) => {
            false
        }
    }
}

fn anchored(node: &Node) -> bool {
    match node {
        Node::Assertion(AssertionKind::StartLine | AssertionKind::EndLine) => true,
        Node::Alternation(nodes) | Node::Concat(nodes) => nodes.iter().any(anchored),
        Node::Group(node) | Node::Repetition { node, .. } => anchored(node),
        Node::Assertion(AssertionKind::WordBoundary | AssertionKind::NonWordBoundary)
        | Node::Class(_)
        | Node::Dot
        | Node::Empty
        | Node::Literal(_)
        | Node::Char(_) => false,
    }
}

/// A loop that is being read, and whether its rounds are bounded by the rule itself.
#[derive(Clone, Copy)]
enum Within {
    Short,
    Long,
}

fn of_loops(expression: &Expression, within: Option<Within>, found: &mut Vec<(usize, bool, String)>) {
    let mut inner = within;
    if let Kind::ForIdentifiers { iterator, .. } = &expression.expr {
        let long = match iterator {
            ForIterator::Range { from, to } => {
                if mentions_filesize(to) || mentions_filesize(from) {
                    found.push((expression.span.start, false, "loops over the size of the file".to_owned()));
                }
                let rounds = match (&from.expr, &to.expr) {
                    (Kind::Integer(from), Kind::Integer(to)) => to.saturating_sub(*from),
                    _ => i64::MAX,
                };
                rounds > FEW_ROUNDS
            }
            // Sections, resources and the like: as many as the file says.
            ForIterator::Identifier(_) | ForIterator::List(_) => false,
        };
        inner = Some(match (within, long) {
            (Some(Within::Long), _) | (_, true) => Within::Long,
            (Some(Within::Short) | None, false) => Within::Short,
        });
    }
    if let (Some(kind), Kind::Identifier(identifier)) = (within, &expression.expr)
        && reads_the_file(identifier)
    {
        let reason = format!("`{}` is called in a loop", identifier.name);
        found.push((expression.span.start, matches!(kind, Within::Long), reason));
    }
    if let Kind::Identifier(identifier) = &expression.expr {
        for operation in &identifier.operations {
            match &operation.op {
                IdentifierOperationType::FunctionCall(arguments) => {
                    arguments.iter().for_each(|argument| of_loops(argument, inner, found));
                }
                IdentifierOperationType::Subscript(at) => of_loops(at, inner, found),
                IdentifierOperationType::Subfield(_) => {}
            }
        }
    }
    for child in children(expression) {
        of_loops(child, inner, found);
    }
}

/// Whether a call goes over bytes of the file: all of `hash`, and of `math` what is not mere arithmetic.
fn reads_the_file(identifier: &Identifier) -> bool {
    identifier.name == "hash"
        || identifier.name == "math"
            && identifier.operations.first().is_some_and(|operation| match &operation.op {
                IdentifierOperationType::Subfield(name) => matches!(
                    name.as_str(),
                    "entropy"
                        | "deviation"
                        | "serial_correlation"
                        | "mean"
                        | "monte_carlo_pi"
                        | "count"
                        | "percentage"
                        | "mode"
                ),
                IdentifierOperationType::Subscript(_) | IdentifierOperationType::FunctionCall(_) => false,
            })
}

fn mentions_filesize(expression: &Expression) -> bool {
    matches!(expression.expr, Kind::Filesize) || children(expression).into_iter().any(mentions_filesize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remarks(text: &str) -> Vec<Problem> {
        look(text, &boreal_parser::parse(text).unwrap())
    }

    #[test]
    fn slow_rules_are_named_with_their_place_and_reason() {
        for (text, line, column, prefix, reason) in [
            ("rule a {\n strings: $a = \"x\"\n condition: $a }", 2, 11, SLOW, "shorter than 3"),
            ("rule a { strings: $b = { 4? ?? 1? } condition: $b }", 1, 19, SLOW, "no literal that must"),
            ("rule a { strings: $b = { 41 42 ?? } condition: $b }", 1, 19, SLOW, "longer than 2 bytes"),
            ("rule a { strings: $b = /[a-z]+.*[0-9]/ condition: $b }", 1, 19, VERY_SLOW, "no end"),
            ("rule a { strings: $b = /(abcd|[a-z]*)/ condition: $b }", 1, 19, VERY_SLOW, "no end"),
            ("rule a { strings: $b = /[a-z]{4}/ condition: $b }", 1, 19, SLOW, "no literal that must"),
            ("rule a { strings: $b = /^abcdef/ condition: $b }", 1, 19, SLOW, "every line"),
            (
                "rule a { condition:\n  for any i in (0..filesize) : (uint8(i) == 4) }",
                2,
                3,
                SLOW,
                "size of the file",
            ),
            (
                "import \"math\"\nrule a { condition: for any i in (0..9000) : (math.entropy(i, 9) > 7.0) }",
                2,
                47,
                VERY_SLOW,
                "in a loop",
            ),
        ] {
            let remarks = remarks(text);
            let remark = remarks.last().unwrap_or_else(|| panic!("nothing said of {text}"));
            assert!(remark.message.starts_with(&format!("{prefix} `a`: ")), "{text}: {remark:?}");
            assert!(remark.message.contains(reason), "{text}: {remark:?}");
            assert_eq!((remark.line, remark.column), (line, column), "{text}: {remark:?}");
        }
    }

    #[test]
    fn ordinary_rules_are_not_remarked_on() {
        for text in [
            "rule a { strings: $a = \"needle\" $b = { 41 42 43 ?? 44 } $c = /abc.*def/ condition: any of them }",
            "import \"hash\" rule a { condition: hash.md5(0, filesize) == \"x\" }",
            "import \"pe\" rule a { condition: for any s in pe.sections : (s.name == \".text\") }",
            "import \"math\" rule a { condition: for any i in (1..3) : (math.min(i, 2) == 2) }",
        ] {
            assert_eq!(remarks(text), [], "{text}");
        }
    }
}
