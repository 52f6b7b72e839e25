//! Makes rule sets of any size for benches, of the same mix as public ones.
//!
//! Out of a hundred rules about 45 ask for several text strings (some wide, some without regard to case), 25 for
//! hexadecimal strings with gaps, 15 for a regular expression with a literal in it, 10 for a property of an ELF or
//! PE file, and 5 have a condition alone. The literals are words that a seed makes up, with common ones among
//! them, so that few rules hold on clean files, as in the sets they stand for.

use std::{
    fmt::{self, Write as _},
    fs,
    path::PathBuf,
};

use anyhow::{Context as _, ensure};

/// Which rules are used.
#[derive(Debug, clap::Args)]
pub(super) struct Rules {
    /// YARA rules: a file, or a folder whose `.yar` and `.yara` files are taken together.
    #[arg(long, value_name = "FILE", conflicts_with = "generate", required_unless_present = "generate")]
    rules: Option<PathBuf>,
    /// Make a set of so many rules instead, of the same mix as public sets.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    generate: Option<u32>,
}

impl Rules {
    /// Their text.
    ///
    /// # Errors
    /// If there are none or they cannot be read.
    pub(super) fn text(&self) -> anyhow::Result<String> {
        let Some(path) = &self.rules else { return Ok(generate(self.generate.unwrap_or(1), 1)) };
        if path.is_file() {
            return fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()));
        }
        let mut files: Vec<PathBuf> = fs::read_dir(path)
            .with_context(|| format!("cannot read `{}`", path.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|end| end == "yar" || end == "yara"))
            .collect();
        files.sort_unstable();
        let mut text = String::new();
        for file in &files {
            text.push_str(
                &fs::read_to_string(file).with_context(|| format!("cannot read `{}`", file.display()))?,
            );
            text.push('\n');
        }
        ensure!(!text.is_empty(), "no rules in `{}`", path.display());
        Ok(text)
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.rules, self.generate) {
            (Some(path), _) => write!(f, "rules of {}", path.file_name().unwrap_or_default().display()),
            (None, count) => write!(f, "{} generated rules", count.unwrap_or(1)),
        }
    }
}

/// Words that are in many files; a rule may ask for one beside its own.
const COMMON: [&str; 12] = [
    "http://",
    "/bin/sh",
    "/etc/passwd",
    "password",
    "socket",
    "connect",
    "<?php",
    "eval(",
    "cmd.exe",
    "kernel32.dll",
    "Mozilla/5.0",
    "GLIBC_2.2.5",
];
const SYLLABLES: [&str; 24] = [
    "ka", "zor", "mi", "ten", "qu", "lex", "ra", "do", "sun", "vip", "ho", "tra", "ne", "gul", "bex", "po",
    "wy", "dra", "fi", "jun", "cor", "ash", "ul", "me",
];

/// Words of texts to scan: none is made of the syllables above, so that rules are as rarely right as elsewhere.
const PLAIN: [&str; 40] = [
    "the",
    "of",
    "and",
    "which",
    "between",
    "system",
    "value",
    "returns",
    "number",
    "file",
    "when",
    "other",
    "should",
    "first",
    "buffer",
    "length",
    "because",
    "option",
    "default",
    "is",
    "not",
    "however",
    "people",
    "through",
    "under",
    "time",
    "where",
    "point",
    "would",
    "different",
    "it",
    "if",
    "else",
    "size",
    "string",
    "world",
    "every",
    "process",
    "again",
    "change",
];

/// A generator of numbers that are the same for the same seed (Marsaglia, "Xorshift RNGs", 2003).
pub(super) struct Numbers(u64);

impl Numbers {
    /// Those of a seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        let len = u64::try_from(words.len()).unwrap_or(1);
        usize::try_from(self.below(len)).ok().and_then(|at| words.get(at)).copied().unwrap_or_default()
    }

    /// A word as in texts that no rule is about.
    pub(super) fn plain_word(&mut self) -> &'static str {
        self.of(&PLAIN)
    }

    fn word(&mut self) -> String {
        let mut word = String::new();
        for _ in 0..self.below(4) + 3 {
            word.push_str(self.of(&SYLLABLES));
        }
        if self.below(3) == 0 {
            let _ = write!(word, "{}", self.below(1000));
        }
        word
    }

    fn hex(&mut self) -> String {
        let mut text = String::new();
        for part in 0..self.below(3) + 1 {
            if part > 0 {
                text.push_str(["?? ", "[2-6] ", "[4] ", "?A "][usize::try_from(self.below(4)).unwrap_or(0)]);
            }
            for _ in 0..self.below(6) + 6 {
                let _ = write!(text, "{:02X} ", self.below(256));
            }
        }
        text
    }
}

/// `count` rules, as text. The same count and seed give the same text.
pub(super) fn generate(count: u32, seed: u64) -> String {
    let mut numbers = Numbers::new(seed);
    let mut text = String::from("import \"pe\"\nimport \"elf\"\n");
    for number in 0..count {
        rule(&mut text, number, &mut numbers);
    }
    text
}

fn rule(text: &mut String, number: u32, numbers: &mut Numbers) {
    let header = ["uint16(0) == 0x5A4D and ", "uint32(0) == 0x464C457F and ", "", ""]
        [usize::try_from(numbers.below(4)).unwrap_or(0)];
    let size = if numbers.below(2) == 0 { "filesize < 5MB and " } else { "" };
    let _ = writeln!(text, "rule bench_{number} {{");
    match numbers.below(100) {
        0..45 => {
            let own = numbers.below(6) + 2;
            text.push_str("  strings:\n");
            for at in 0..own {
                let modifier = ["", "", "", " wide", " nocase", " fullword", " ascii wide"]
                    [usize::try_from(numbers.below(7)).unwrap_or(0)];
                let _ = writeln!(text, "    $s{at} = \"{}\"{modifier}", numbers.word());
            }
            if numbers.below(3) == 0 {
                let _ = writeln!(text, "    $c = \"{}\"", numbers.of(&COMMON));
                let _ = writeln!(text, "  condition: {header}{size}$c and {} of ($s*)", own.min(2));
            } else {
                let wanted =
                    ["all of them".to_owned(), "any of them".to_owned(), format!("{} of them", own.min(2))];
                let wanted = &wanted[usize::try_from(numbers.below(3)).unwrap_or(0)];
                let _ = writeln!(text, "  condition: {header}{size}{wanted}");
            }
        }
        45..70 => {
            let _ = writeln!(
                text,
                "  strings:\n    $a = {{ {}}}\n    $b = {{ {}}}",
                numbers.hex(),
                numbers.hex()
            );
            let _ = writeln!(text, "  condition: {header}{size}any of them");
        }
        70..85 => {
            let (one, two) = (numbers.word(), numbers.word());
            let expression = match numbers.below(4) {
                0 => format!("{one}[a-z0-9]{{1,8}}{two}"),
                1 => format!("({one}|{two})\\.(php|exe|so)"),
                2 => format!("https?:\\/\\/[a-z]{{3,12}}\\.{one}"),
                _ => format!("{one}\\s*=\\s*['\"]?{two}"),
            };
            let _ = writeln!(text, "  strings:\n    $r = /{expression}/");
            let _ = writeln!(text, "  condition: {size}$r");
        }
        85..90 => {
            let (word, sections) = (numbers.word(), numbers.below(90) + 60);
            let _ = writeln!(text, "  strings:\n    $a = \"{word}\"");
            let _ = writeln!(text, "  condition: elf.number_of_sections > {sections} and $a");
        }
        90..95 => {
            let (word, sections) = (numbers.word(), numbers.below(20) + 3);
            let _ = writeln!(
                text,
                "  condition: pe.number_of_sections == {sections} and pe.imports(\"{word}.dll\")"
            );
        }
        _ => {
            let (size, magic) = (numbers.below(1 << 20) + 10, numbers.below(1 << 31));
            let _ = writeln!(text, "  condition: filesize == {size} and uint32(4) == {magic:#x}");
        }
    }
    text.push_str("}\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_set_each_time_and_of_the_size_asked_for() {
        let text = generate(300, 7);
        assert_eq!(text, generate(300, 7));
        assert_ne!(text, generate(300, 8));
        assert_eq!(text.matches("rule bench_").count(), 300);
        for part in ["wide", "[2-6]", "$r = /", "elf.number", "pe.imports", "uint32(4)"] {
            assert!(text.contains(part), "{part}");
        }
    }
}
