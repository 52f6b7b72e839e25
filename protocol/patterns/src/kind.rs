//! What some bytes are: rule text, a digest list's text, or a compiled list.
//!
//! **Invariant:** text that YARA's grammar allows is never taken for a list: it begins, comments aside, with `rule`,
//! `private`, `global`, `import` or `include` and what must follow these. Nothing else is rules, so a list is never
//! taken for rules that load.

use crate::digests::{is_compiled, is_entry};

/// What bytes can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// YARA text, or what only a rule compiler can tell the fault of.
    Rules,
    /// A digest list as people write it.
    List,
    /// One in its compiled form.
    Compiled,
}

/// What `text` is; `None` if more of it must be seen. `is_whole`: there is no more.
pub(crate) fn of(text: &[u8], is_whole: bool) -> Option<Kind> {
    if is_compiled(text) {
        return Some(Kind::Compiled);
    }
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    match begins_rules(text, is_whole) {
        Some(true) => Some(Kind::Rules),
        Some(false) => by_lines(text, is_whole),
        None => None,
    }
}

/// Text that does not begin like rules is a list if a line holds a digest before any looks like part of a rule.
fn by_lines(text: &[u8], is_whole: bool) -> Option<Kind> {
    let mut lines = text.split(|byte| *byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        if lines.peek().is_none() && !is_whole {
            return None;
        }
        let line = String::from_utf8_lossy(line);
        let line = line.trim_start();
        let begins = |starts: &[&str]| starts.iter().any(|start| line.starts_with(start));
        if begins(&["meta:", "strings:", "condition:"])
            || begins(&["rule ", "private rule ", "global rule "]) && line.contains('{')
        {
            return Some(Kind::Rules);
        }
        if is_entry(line) {
            return Some(Kind::List);
        }
    }
    // It is neither; the compiler says where it first is not what it should be.
    Some(Kind::Rules)
}

/// Whether the first words are those of rules, or there is nothing but comments. `None`: they may go on.
fn begins_rules(text: &[u8], is_whole: bool) -> Option<bool> {
    let mut rest = text;
    loop {
        rest = match after_blanks(rest) {
            Some([]) | None => return if is_whole { Some(true) } else { None },
            Some(rest) => rest,
        };
        let (word, after) = word(rest);
        if after.is_empty() && !is_whole {
            return None;
        }
        match word {
            b"private" | b"global" => rest = after,
            b"import" | b"include" => return followed_by(after, b"\"", is_whole),
            b"rule" => {
                let Some(name) = after_blanks(after).filter(|rest| !rest.is_empty()) else {
                    return if is_whole { Some(false) } else { None };
                };
                let (name, after) = self::word(name);
                return if name.is_empty() { Some(false) } else { followed_by(after, b"{:", is_whole) };
            }
            _ => return Some(false),
        }
    }
}

/// Whether the next byte that is no blank is one of `marks`.
fn followed_by(rest: &[u8], marks: &[u8], is_whole: bool) -> Option<bool> {
    match after_blanks(rest).and_then(<[u8]>::first) {
        Some(next) => Some(marks.contains(next)),
        None => is_whole.then_some(false),
    }
}

/// What stands behind blanks and comments; `None` if a comment does not end.
fn after_blanks(text: &[u8]) -> Option<&[u8]> {
    let mut rest = text.trim_ascii_start();
    loop {
        let after = if let Some(comment) = rest.strip_prefix(b"//") {
            comment.iter().position(|byte| *byte == b'\n').map_or(Some(&[][..]), |end| comment.get(end..))
        } else if let Some(comment) = rest.strip_prefix(b"/*") {
            let end = comment.windows(2).position(|two| two == b"*/")?;
            comment.get(end + 2..)
        } else {
            return Some(rest);
        };
        rest = after?.trim_ascii_start();
    }
}

/// The letters, digits and underscores at the start, and what follows.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    text.split_at(text.iter().position(|byte| !is_part(byte)).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MD5: &str = "44d88612fea8a8f36de82e1278abb02f";
    const SHA256: &str = "275a021bbfb6489e54d471899f7db9d1663fc695ec2fe2a2c4538aabf651fd0f";

    #[test]
    fn lists_and_rules_are_told_apart() {
        let rules = [
            "rule a { condition: true }".to_owned(),
            "\u{feff}rule a:tag{condition:true}".to_owned(),
            "private global rule a\r\n{ condition: true }".to_owned(),
            "import\"pe\"\nrule a { condition: true }".to_owned(),
            "include \"x\"".to_owned(),
            format!("// {MD5}\n// {SHA256}\nrule a {{ condition: true }}"),
            format!(
                "/*\n{MD5}\n{SHA256}\n{MD5}  evil.exe\n*/ rule /* {MD5} */ a // x\n{{ condition: true }}"
            ),
            format!("rule a\n/*\n{MD5}\n*/\n: tag\n{{ condition: true }}"),
            format!("/*\n{SHA256}\n{MD5}:5:name\n*/"),
            format!("// only\n/* {MD5} */"),
            format!("/* never ends\n{MD5}\n"),
            // What a rule compiler should find fault with.
            format!("rul a {{\n meta:\n  hash = \"{MD5}\"\n condition: for any of (\"a\", \"{MD5}\")\n}}"),
            format!("}}\nrule a {{ meta: hash = 1,\"{MD5}\"\n condition: true }}"),
            "no list and no rule".to_owned(),
            MD5[1..].to_owned(),
            String::new(),
        ];
        for text in rules {
            assert_eq!(of(text.as_bytes(), true), Some(Kind::Rules), "{text}");
        }
        let lists = [
            MD5.to_owned(),
            format!("\u{feff}{SHA256}\r\n"),
            format!("# rule a {{ condition: true }}\n{SHA256}"),
            format!("# import \"pe\"\n// rule\n\n{MD5} x"),
            format!("rule,sha256\nrule,{SHA256}"),
            format!("rule of thumb: these are bad\n{SHA256}\n"),
            format!("rule one,{SHA256}\n"),
            format!("rule\n{SHA256}\n"),
            format!("import,hash\nx,{MD5}"),
            format!("uuid,event_id,category,type,value\nu,7,Payload delivery,md5,{MD5}"),
            format!("{MD5}:12:Win.Evil\n"),
            format!("Hashes of the campaign\n======\n{MD5}\n"),
            format!("\"private\",\"{MD5}\""),
        ];
        for text in lists {
            assert_eq!(of(text.as_bytes(), true), Some(Kind::List), "{text}");
        }
        assert_eq!(of(b"\x89tm-digests\r\n\0\x01\0", true), Some(Kind::Compiled));
        assert_eq!(of(b"\x89tm-digests\n\0\x01\0", true), Some(Kind::Rules));
    }

    #[test]
    fn the_beginning_alone_never_says_something_else() {
        let long = "x".repeat(200);
        for text in [
            format!("/* {MD5}\n{long} */ // {MD5}\nprivate rule abc : tag {{ condition: true }}"),
            format!("// {MD5}\nimport \"pe\"\n"),
            format!("# {long}\n{long}\n{SHA256} name\n"),
            format!("rulebook,sha256\nname,{SHA256}\n"),
            format!("// {long}\n{MD5}:5:x\n{MD5}"),
        ] {
            let whole = of(text.as_bytes(), true);
            for end in 0..text.len() {
                let part = of(&text.as_bytes()[..end], false);
                assert!(part.is_none() || part == whole, "{end} bytes of {text}: {part:?}");
            }
        }
    }
}
