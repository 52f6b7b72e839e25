//! Needles: literals of which at least one stands in the data wherever a string matches.
//!
//! **Invariant:** a list is complete: a string cannot match data that holds none of its literals. Where this is
//! not certain there is no list ([`None`]), and the rule is run on everything.

use std::{collections::HashSet, fmt, sync::LazyLock};

use boreal_parser::{
    hex_string::Token,
    regex::{Node, Regex, RepetitionKind, RepetitionRange},
    rule::{VariableDeclaration, VariableDeclarationValue, VariableModifiers},
};

/// Shortest literal the filter can look for.
pub(super) const SHORTEST: usize = 4;
/// Longest piece of a literal that is kept: longer ones are no rarer in practice.
const LONGEST: usize = 16;
/// Most literals of one demand; more of them cost more than they save.
pub(super) const MOST: usize = 4096;

/// At most [`LONGEST`] bytes, kept in place: a large set has some hundred thousand of them while it is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Piece {
    bytes: [u8; LONGEST],
    len: u8,
}

impl Piece {
    /// The first [`LONGEST`] of `bytes`.
    pub(super) fn new(bytes: impl IntoIterator<Item = u8>) -> Self {
        let mut piece = Self { bytes: [0; LONGEST], len: 0 };
        for (slot, byte) in piece.bytes.iter_mut().zip(bytes) {
            *slot = byte;
            piece.len += 1;
        }
        piece
    }

    /// The bytes.
    pub(super) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.as_slice().escape_ascii())
    }
}

/// Bytes that must be in the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Literal {
    /// The bytes, `SHORTEST..=LONGEST` of them.
    pub(super) bytes: Piece,
    /// ASCII letters stand for both cases.
    pub(super) nocase: bool,
    /// How rare it is thought to be: higher is rarer.
    pub(super) rarity: i32,
}

impl Literal {
    fn new(bytes: &[u8], nocase: bool) -> Self {
        let rarity = rarity(bytes) - if nocase { 5 } else { 0 };
        Self { bytes: Piece::new(bytes.iter().copied()), nocase, rarity }
    }
}

fn rarity(bytes: &[u8]) -> i32 {
    /// Windows of the common texts, as the filter sees them: few literals need the long look.
    static WINDOWS: LazyLock<HashSet<[u8; SHORTEST]>> =
        LazyLock::new(|| COMMON.iter().flat_map(|text| text.windows(SHORTEST)).filter_map(folded).collect());
    let (at, window) = best_window(bytes);
    let best = bytes.get(at..).and_then(folded);
    if best.is_some_and(|best| WINDOWS.contains(&best))
        && COMMON.iter().any(|common| contains_folded(common, bytes))
    {
        return 5;
    }
    window.saturating_add(i32::try_from(bytes.len()).unwrap_or(i32::MAX).saturating_mul(2))
}

fn folded(bytes: &[u8]) -> Option<[u8; SHORTEST]> {
    bytes.first_chunk().map(|window| window.map(|byte| byte | 0x20))
}

/// Where the rarest four bytes of a literal start, and how rare they are.
pub(super) fn best_window(bytes: &[u8]) -> (usize, i32) {
    bytes
        .windows(SHORTEST)
        .map(window_rarity)
        .enumerate()
        // The first of equals: `max_by_key` would give the last.
        .fold((0, i32::MIN), |best, (at, rarity)| if rarity > best.1 { (at, rarity) } else { best })
}

fn window_rarity(window: &[u8]) -> i32 {
    let Some(bytes) = window.first_chunk::<SHORTEST>() else { return 0 };
    let folded = bytes.map(|byte| byte | 0x20);
    if folded == [folded[0]; SHORTEST] {
        return 0;
    }
    if COMMON_WINDOWS.contains(&&folded) {
        return 10;
    }
    window
        .iter()
        .map(|byte| match byte {
            0 | 0xff | b' ' => 2,
            b'a'..=b'z' => 14,
            b'A'..=b'Z' => 16,
            b'\n' | b'\r' | b'\t' | b'/' | b'.' | b'-' | b'_' | b'=' | b'0' | b'1' => 13,
            b'!'..=b'~' => 17,
            1..=8 => 12,
            _ => 20,
        })
        .sum()
}

/// Texts that stand in very many files: a rule that hangs on one of them (or on a part of one) is run on all.
const COMMON: [&[u8]; 44] = [
    b"this program cannot be run in dos mode",
    b"/usr/bin/",
    b"/usr/lib/",
    b"/usr/local/",
    b"/usr/share/",
    b"/bin/sh",
    b"/bin/bash",
    b"/usr/bin/env python",
    b"/etc/passwd",
    b"/dev/null",
    b"/proc/self/",
    b"#!/bin/",
    b"https://www.",
    b"http://www.",
    b"content-type: ",
    b"application/",
    b"text/html",
    b"user-agent",
    b"password",
    b"username",
    b"import ",
    b"function",
    b"return ",
    b"include",
    b"system(",
    b"string",
    b"version",
    b"license",
    b"copyright",
    b"error",
    b"failed",
    b"cannot ",
    b"windows",
    b"microsoft",
    b"linux",
    b"default",
    b"command",
    b"execute",
    b"file not found",
    b"public class",
    b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz0123456789+/",
    b"kernel32.dll",
];

/// Four-byte windows (bit 5 set, as the filter sees them) that stand nearly everywhere.
const COMMON_WINDOWS: [&[u8; 4]; 46] = [
    b"http", b"ttp:", b"tps:", b"tp:/", b"p://", b"://w", b"www.", b".com", b"tion", b"atio", b"ing ",
    b"the ", b" the", b"and ", b" and", b"that", b"ment", b"this", b"with", b"from", b"file", b"name",
    b"type", b"data", b"user", b"/usr", b"usr/", b"/bin", b"bin/", b"/lib", b"lib/", b".so.", b"func",
    b"unct", b"ncti", b"ctio", b"impo", b"mpor", b"port", b"stri", b"trin", b"ring", b"retu", b"etur",
    b"turn", b"erro",
];

fn contains_folded(hay: &[u8], needle: &[u8]) -> bool {
    let fold = |b: &u8| b.to_ascii_lowercase();
    hay.windows(needle.len()).any(|window| window.iter().map(fold).eq(needle.iter().map(fold)))
}

/// The needles of one string of a rule; see the module.
pub(super) fn of_string(string: &VariableDeclaration) -> Option<Vec<Literal>> {
    let modifiers = &string.modifiers;
    match &string.value {
        VariableDeclarationValue::Bytes(bytes) => of_text(bytes, modifiers),
        VariableDeclarationValue::Regex(regex) => {
            let runs = regex_runs(regex, 1)?;
            let nocase = regex.case_insensitive || modifiers.nocase;
            let mut literals = Vec::new();
            for run in runs {
                literals.extend(plain_or_wide(&run, modifiers).into_iter().map(|bytes| (bytes, nocase)));
            }
            finish(literals)
        }
        VariableDeclarationValue::HexString(tokens) => {
            finish(hex_runs(tokens, SHORTEST)?.into_iter().map(|run| (run, false)).collect())
        }
    }
}

fn of_text(text: &[u8], modifiers: &VariableModifiers) -> Option<Vec<Literal>> {
    let forms = plain_or_wide(text, modifiers);
    if let Some((from, to)) = modifiers.xor {
        let mut literals = Vec::new();
        for form in forms {
            let piece = rarest_piece(&form)?;
            let rarity = rarity(piece);
            literals.extend((from..=to).map(|key| Literal {
                bytes: Piece::new(piece.iter().map(|byte| byte ^ key)),
                nocase: false,
                // As rare as the text itself: with most keys it is rarer.
                rarity,
            }));
        }
        return (literals.len() <= MOST).then_some(literals);
    }
    let mut literals = Vec::new();
    if let Some(base64) = &modifiers.base64 {
        for form in forms {
            for offset in 0..3 {
                let coded = base64_core(&form, base64.alphabet.as_ref(), offset);
                if base64.wide {
                    literals.push((widen(&coded), false));
                }
                if base64.ascii {
                    literals.push((coded, false));
                }
            }
        }
    } else {
        literals.extend(forms.into_iter().map(|form| (form, modifiers.nocase)));
    }
    finish(literals)
}

/// Cuts each to its rarest piece; no list if one of them is too short or they are too many.
fn finish(literals: Vec<(Vec<u8>, bool)>) -> Option<Vec<Literal>> {
    if literals.is_empty() || literals.len() > MOST {
        return None;
    }
    literals.into_iter().map(|(bytes, nocase)| Some(Literal::new(rarest_piece(&bytes)?, nocase))).collect()
}

/// At most [`LONGEST`] bytes around the rarest window.
fn rarest_piece(bytes: &[u8]) -> Option<&[u8]> {
    if bytes.len() < SHORTEST {
        return None;
    }
    let start = best_window(bytes).0.min(bytes.len().saturating_sub(LONGEST));
    bytes.get(start..(start + LONGEST).min(bytes.len()))
}

fn widen(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte, 0]).collect()
}

/// The forms in which a text is looked for: as it is unless `wide` stands alone, and wide if it is named.
fn plain_or_wide(bytes: &[u8], modifiers: &VariableModifiers) -> Vec<Vec<u8>> {
    let mut forms = Vec::new();
    if modifiers.ascii || !modifiers.wide {
        forms.push(bytes.to_vec());
    }
    if modifiers.wide {
        forms.push(widen(bytes));
    }
    forms
}

/// The characters of the base64 form of `bytes`, `offset` bytes into a group of three, that depend on `bytes` alone.
fn base64_core(bytes: &[u8], alphabet: Option<&[u8; 64]>, offset: usize) -> Vec<u8> {
    let alphabet = alphabet.unwrap_or(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
    let bits = bytes.len() * 8;
    let mut coded = Vec::new();
    // A character covers six bits; the first of `bytes` is bit `offset * 8` of the stream.
    let mut at = (offset * 8).div_ceil(6) * 6 - offset * 8;
    while at + 6 <= bits {
        let value = (at..at + 6).fold(0u8, |value, bit| {
            let byte = bytes.get(bit / 8).copied().unwrap_or_default();
            (value << 1) | ((byte >> (7 - bit % 8)) & 1)
        });
        coded.push(alphabet.get(usize::from(value)).copied().unwrap_or_default());
        at += 6;
    }
    coded
}

/// Runs of literal bytes of which one stands in every match of a hex string; each has at least `shortest` bytes.
pub(super) fn hex_runs(tokens: &[Token], shortest: usize) -> Option<Vec<Vec<u8>>> {
    let mut best: Option<Vec<Vec<u8>>> = None;
    let mut run = Vec::new();
    for token in tokens {
        match token {
            Token::Byte(byte) => run.push(*byte),
            Token::NotByte(_) | Token::MaskedByte(..) | Token::NotMaskedByte(..) | Token::Jump(_) => {
                better(&mut best, one_run(&mut run, shortest));
            }
            Token::Alternatives(alternatives) => {
                better(&mut best, one_run(&mut run, shortest));
                better(&mut best, all_of(alternatives.iter().map(|a| hex_runs(a, shortest))));
            }
        }
    }
    better(&mut best, one_run(&mut run, shortest));
    best
}

/// Runs of literal bytes of which one stands in every match of a regular expression.
pub(super) fn regex_runs(regex: &Regex, shortest: usize) -> Option<Vec<Vec<u8>>> {
    node_runs(&regex.ast, shortest)
}

fn node_runs(node: &Node, shortest: usize) -> Option<Vec<Vec<u8>>> {
    let mut best = None;
    let mut run = Vec::new();
    walk(node, shortest, &mut run, &mut best);
    better(&mut best, one_run(&mut run, shortest));
    best
}

/// Carries the literal run over what must follow it at once, and keeps the best closed one.
fn walk(node: &Node, shortest: usize, run: &mut Vec<u8>, best: &mut Option<Vec<Vec<u8>>>) {
    match node {
        Node::Literal(literal) => run.push(literal.byte),
        Node::Concat(nodes) => {
            for node in nodes {
                walk(node, shortest, run, best);
            }
        }
        Node::Group(node) => walk(node, shortest, run, best),
        Node::Empty => {}
        Node::Alternation(nodes) => {
            better(best, one_run(run, shortest));
            better(best, all_of(nodes.iter().map(|node| node_runs(node, shortest))));
        }
        Node::Repetition { node, kind, .. } => {
            better(best, one_run(run, shortest));
            let at_least_once = match kind {
                RepetitionKind::OneOrMore => true,
                RepetitionKind::ZeroOrOne | RepetitionKind::ZeroOrMore => false,
                RepetitionKind::Range(
                    RepetitionRange::Exactly(n)
                    | RepetitionRange::AtLeast(n)
                    | RepetitionRange::Bounded(n, _),
                ) => *n > 0,
            };
            if at_least_once {
                better(best, node_runs(node, shortest));
            }
        }
        // A character above ASCII is left to the engine: how it is folded is not ours to know.
        Node::Assertion(_) | Node::Class(_) | Node::Dot | Node::Char(_) => {
            better(best, one_run(run, shortest))
        }
    }
}

fn one_run(run: &mut Vec<u8>, shortest: usize) -> Option<Vec<Vec<u8>>> {
    let run = std::mem::take(run);
    (run.len() >= shortest.max(1)).then(|| vec![run])
}

fn all_of(alternatives: impl Iterator<Item = Option<Vec<Vec<u8>>>>) -> Option<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for alternative in alternatives {
        all.extend(alternative?);
        if all.len() > MOST {
            return None;
        }
    }
    (!all.is_empty()).then_some(all)
}

fn better(best: &mut Option<Vec<Vec<u8>>>, other: Option<Vec<Vec<u8>>>) {
    let worth = |runs: &Vec<Vec<u8>>| {
        let shortest = runs.iter().map(Vec::len).min().unwrap_or_default().min(8);
        let rarity = runs.iter().map(|run| best_window(run).1).min().unwrap_or_default();
        (shortest.min(SHORTEST), rarity, shortest, std::cmp::Reverse(runs.len()))
    };
    if let Some(other) = other
        && best.as_ref().is_none_or(|best| worth(&other) > worth(best))
    {
        *best = Some(other);
    }
}
