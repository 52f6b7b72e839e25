//! Which words after `--pattern` are patterns and which are paths.
//!
//! Several files may follow one `--pattern`, and paths may follow them. Where paths stand apart (after another
//! option, or after `--`), every word after `--pattern` is a pattern. Where they do not, the first word is,
//! and with it the following ones that are named like YARA rules or ClamAV lists; the others are paths.

use std::{ffi::OsStr, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command, error::ErrorKind, value_parser};

/// What to look for and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PatternsAndPaths {
    /// Files with rules; none where the agent's are used.
    pub(super) patterns: Vec<PathBuf>,
    /// Files and folders to scan, at least one.
    pub(super) paths: Vec<PathBuf>,
}

impl clap::Args for PatternsAndPaths {
    fn augment_args(command: Command) -> Command {
        command
            .arg(
                Arg::new("pattern")
                    .long("pattern")
                    .value_name("FILE")
                    .help(
                        "With --standalone: what to look for (YARA rules or a list of digests); may be given several times",
                    )
                    .long_help(
                        "With --standalone: what to look for: YARA rules or a list of digests (plain, CSV, MISP, \
                         ClamAV .hdb and .hsb), told apart by content. May be given several times, and with several \
                         files. \
                         Put another option or -- between the last FILE and the first PATH if both could \
                         be meant.",
                    )
                    .num_args(1..)
                    .action(ArgAction::Append)
                    .value_parser(value_parser!(PathBuf)),
            )
            .arg(
                Arg::new("path")
                    .value_name("PATH")
                    .help("Files and folders to scan")
                    .num_args(0..)
                    .action(ArgAction::Append)
                    .value_parser(value_parser!(PathBuf)),
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for PatternsAndPaths {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let groups = matches
            .get_occurrences::<PathBuf>("pattern")
            .into_iter()
            .flatten()
            .map(|group| group.cloned().collect())
            .collect::<Vec<Vec<PathBuf>>>();
        let paths = matches.get_many("path").into_iter().flatten().cloned().collect();
        // These are something to scan, so every word may be a pattern.
        let is_set =
            |flag: &&str| matches.try_get_one::<bool>(flag).ok().flatten().is_some_and(|is_set| *is_set);
        if ["processes", "quick", "full"].iter().any(is_set) {
            return Ok(Self { patterns: groups.into_iter().flatten().collect(), paths });
        }
        Self::sort_out(groups, paths)
            .ok_or_else(|| clap::Error::raw(ErrorKind::MissingRequiredArgument, "no PATH to scan was given"))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl PatternsAndPaths {
    /// `groups` are the words after each `--pattern`, `paths` those that stand apart. `None` without a path.
    fn sort_out(mut groups: Vec<Vec<PathBuf>>, mut paths: Vec<PathBuf>) -> Option<Self> {
        // Without a pattern all words are paths.
        if paths.is_empty() {
            let last = groups.last_mut()?;
            // At least the last word must be a path, however it is named.
            let named = last.iter().skip(1).take_while(|word| is_named_like_a_pattern(word)).count();
            let patterns = named.saturating_add(1).min(last.len().saturating_sub(1)).max(1);
            paths = last.split_off(patterns.min(last.len()));
        }
        let patterns = groups.into_iter().flatten().collect();
        (!paths.is_empty()).then_some(Self { patterns, paths })
    }
}

fn is_named_like_a_pattern(path: &std::path::Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str);
    extension.is_some_and(|extension| {
        ["yar", "yara", "hdb", "hsb"].iter().any(|rules| extension.eq_ignore_ascii_case(rules))
    })
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    #[test]
    fn words_after_pattern_are_sorted_out() {
        for (line, expected) in [
            ("--pattern a /x", Some((&["a"][..], &["/x"][..]))),
            ("--pattern=a /x /y", Some((&["a"], &["/x", "/y"]))),
            ("--pattern a /x /y", Some((&["a"], &["/x", "/y"]))),
            ("--pattern a b -o json /x", Some((&["a", "b"], &["/x"]))),
            ("--pattern a b -- /x", Some((&["a", "b"], &["/x"]))),
            ("--pattern a --pattern b /x", Some((&["a", "b"], &["/x"]))),
            ("--pattern a.yar b.YARA /x c.yar", Some((&["a.yar", "b.YARA"], &["/x", "c.yar"]))),
            ("--pattern a.hdb b.HSB c /x", Some((&["a.hdb", "b.HSB"], &["c", "/x"]))),
            ("--pattern a.yar b.yar", Some((&["a.yar"], &["b.yar"]))),
            ("/x --pattern a b", Some((&["a", "b"], &["/x"]))),
            ("--pattern a", None),
            ("--pattern a -o json", None),
            ("/x", Some((&[], &["/x"]))),
            ("/x /y.yar", Some((&[], &["/x", "/y.yar"]))),
            ("", None),
        ] {
            let command = PatternsAndPaths::augment_args(Command::new("scan"))
                .arg(Arg::new("output").short('o').num_args(1));
            let words = std::iter::once("scan").chain(line.split_ascii_whitespace());
            let found = command
                .try_get_matches_from(words)
                .and_then(|matches| PatternsAndPaths::from_arg_matches(&matches))
                .ok();
            let all = |words: &[&str]| words.iter().map(PathBuf::from).collect();
            let expected = expected
                .map(|(patterns, paths)| PatternsAndPaths { patterns: all(patterns), paths: all(paths) });
            assert_eq!(found, expected, "{line}");
        }
    }
}
