//! Rules: compiled here, inside a worker, and run on bytes.
//!
//! **Invariant:** no rule can make the compiler open a file (includes are off), and the `macho` module is not
//! there: a 48-byte fat Mach-O file sends boreal 1.4.0 into endless recursion when a rule imports it.

use std::time::Duration;

use boreal::{
    Scanner,
    compiler::{CompilerBuilder, CompilerParams},
    module,
    scanner::{ScanError, ScanParams},
};
use tm_patterns::Problem;
use tm_protocol::ids::Sha256;

/// Most matches of one string that are kept while a rule is judged.
const MAX_STRING_MATCHES: u32 = 1000;

/// A compiled set of patterns.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    scanner: Scanner,
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

impl Engine {
    /// Compiles rule texts, each under the digest of its pattern. Returns the number of rules and the
    /// compiler's remarks as well.
    pub(crate) fn compile(texts: &[(Sha256, String)]) -> Result<(Self, u32, Vec<Problem>), Refused> {
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
        let mut warnings = Vec::new();
        for (index, (sha256, text)) in texts.iter().enumerate() {
            match compiler.add_rules_str_in_namespace(text, sha256.to_string()) {
                Ok(status) => warnings.extend(status.warnings().map(|w| problem(&w.to_string()))),
                Err(error) => {
                    return Err(Refused { pattern: index, problems: vec![problem(&error.to_string())] });
                }
            }
        }
        let scanner = compiler.finalize();
        let rules = u32::try_from(scanner.rules().count()).unwrap_or(u32::MAX);
        Ok((Self { scanner }, rules, warnings))
    }

    /// Judges `bytes`, for at most `time` (the engine looks at its clock now and then; who needs a hard
    /// limit kills the process).
    pub(crate) fn judge(&mut self, bytes: &[u8], time: Duration) -> Judgement {
        self.scanner.set_scan_params(
            ScanParams::default().timeout_duration(Some(time)).string_max_nb_matches(MAX_STRING_MATCHES),
        );
        let (result, timed_out) = match self.scanner.scan_mem(bytes) {
            Ok(result) => (result, false),
            Err((error, result)) => (result, matches!(error, ScanError::Timeout)),
        };
        let matches = result
            .rules
            .iter()
            .filter_map(|rule| Some((rule.namespace.parse().ok()?, rule.name.to_owned())))
            .collect();
        Judgement { matches, timed_out }
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
