//! The rule files of [`super::rules`]: made here, none of them lies in the repository.

/// What is to become of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fate {
    /// It is a pattern, whatever it looks like.
    Taken,
    /// It is none; on which line, and a part of what is said, where that is certain.
    Refused(Option<(u32, &'static str)>),
    /// Only that it is bounded.
    Either,
}

/// One file.
pub(crate) struct Case {
    /// Its name, without `.yar`.
    pub(crate) name: &'static str,
    pub(crate) fate: Fate,
    pub(crate) make: fn() -> Vec<u8>,
}

fn condition(text: &str) -> Vec<u8> {
    format!("rule a {{ condition: {text} }}\n").into_bytes()
}

fn string(text: &str) -> Vec<u8> {
    format!("rule a {{ strings: $a = {text} condition: $a }}\n").into_bytes()
}

/// `open` and `close` `count` times around `core`.
fn nest(open: &str, core: &str, close: &str, count: usize) -> String {
    [open.repeat(count).as_str(), core, close.repeat(count).as_str()].concat()
}

/// `count` texts, made of their numbers.
fn each(count: usize, between: &str, make: impl Fn(usize) -> String) -> String {
    (0..count).map(make).collect::<Vec<_>>().join(between)
}

/// A rule of many strings, any of which will do.
fn strings(count: usize, modifiers: &str) -> Vec<u8> {
    let strings = each(count, "\n", |n| format!("$s{n} = \"marker {n:06} of many\" {modifiers}"));
    format!("rule a {{ strings: {strings} condition: any of them }}").into_bytes()
}

/// The files, in no order that matters.
pub(crate) fn cases() -> Vec<Case> {
    let refused = |line, part| Fate::Refused(Some((line, part)));
    let no = Fate::Refused(None);
    let case = |name, fate, make: fn() -> Vec<u8>| Case { name, fate, make };
    vec![
        // Depth.
        case("nested-parentheses", no, || condition(&nest("(", "true", ")", 100_000))),
        case("nested-not", no, || condition(&nest("not ", "true", "", 100_000))),
        case("nested-minus", no, || condition(&format!("{} == 1", nest("-", "1", "", 100_000)))),
        case("nested-complement", no, || condition(&format!("{} == 1", nest("~", "1", "", 100_000)))),
        case("nested-loops", no, || condition(&nest("for any i in (0..1) : (", "true", ")", 20_000))),
        case("nested-calls", no, || {
            [b"import \"math\"\n".as_slice(), &condition(&nest("math.abs(", "1", ")", 50_000))].concat()
        }),
        case("nested-subscripts", no, || {
            [b"import \"pe\"\n".as_slice(), &condition(&nest("pe.sections[", "1", "].raw_data_size", 50_000))]
                .concat()
        }),
        case("nested-groups", no, || string(&format!("/{}/", nest("(", "abcd", ")", 100_000)))),
        case("nested-hex-alternatives", no, || {
            string(&format!("{{ 01 {} 02 }}", nest("( 03 | ", "04", ")", 50_000)))
        }),
        case("nested-quantifiers", Fate::Either, || {
            string(&format!("/{}/", nest("(", "abcd", "){1,100}", 5)))
        }),
        case("nested-quantifiers-deep", no, || string(&format!("/{}/", nest("(", "a", "+)+", 10_000)))),
        case("nested-defined", no, || condition(&nest("defined ", "filesize", "", 100_000))),
        case("loops-that-nest-a-little", Fate::Either, || {
            condition(&nest("for all i in (0..1000000) : (", "filesize >= 0", ")", 5))
        }),
        // Length.
        case("long-and", Fate::Either, || condition(&each(200_000, " and ", |_| "true".to_owned()))),
        case("long-sum", Fate::Either, || {
            condition(&format!("{} > 1", each(200_000, " + ", |n| n.to_string())))
        }),
        case("long-regex-alternation", Fate::Either, || {
            string(&format!("/({})/", each(50_000, "|", |n| format!("word{n}"))))
        }),
        case("long-hex-alternation", Fate::Either, || {
            string(&format!(
                "{{ 01 02 ( {} ) 03 }}",
                each(20_000, " | ", |n| format!("{:02X} {:02X}", n >> 8, n & 255))
            ))
        }),
        case("repetition-huge", Fate::Either, || string("/abcd(ef){1,30000}gh/")),
        case("repetition-of-class", Fate::Either, || string("/[a-z]{30000}x/")),
        case("repetition-beyond-numbers", no, || string("/a{1,99999999999999999999}/")),
        case("repetition-backwards", no, || string("/a{9,1}/")),
        case("jump-huge", Fate::Either, || string("{ 01 02 03 04 [0-2147483647] 05 06 07 08 }")),
        case("jump-beyond-numbers", no, || string("{ 01 02 [4294967296-99999999999999999999] 03 }")),
        case("jump-backwards", refused(1, ""), || string("{ 01 02 [9-3] 03 }")),
        case("jumps-many", Fate::Either, || {
            string(&format!("{{ 01 02 03 04 {} 05 }}", "[0-100] 07 ".repeat(10_000)))
        }),
        case("hex-5-mb", Fate::Either, || string(&format!("{{ {} }}", "4A ".repeat(1_700_000)))),
        case("text-5-mb", Fate::Either, || string(&format!("\"{}\"", "text ".repeat(1_000_000)))),
        case("regex-1-mb", Fate::Either, || string(&format!("/{}/", "abcdefgh".repeat(131_072)))),
        case("regex-1-mb-class", Fate::Either, || string(&format!("/[{}]+x/", "a-zA-Z0-9".repeat(116_508)))),
        case("regex-1-mb-dots", Fate::Either, || string(&format!("/abcd{}/", ".?".repeat(500_000)))),
        case("identifier-10-mb", Fate::Either, || {
            format!("rule {} {{ condition: true }}", "a".repeat(10 << 20)).into_bytes()
        }),
        case("string-name-10-mb", Fate::Either, || {
            let name = "a".repeat(10 << 20);
            format!("rule a {{ strings: ${name} = \"abcd\" condition: any of them }}").into_bytes()
        }),
        case("unknown-name-10-mb", refused(1, ""), || condition(&"a".repeat(10 << 20))),
        case("meta-10-mb", Fate::Taken, || {
            format!("rule a {{ meta: text = \"{}\" condition: false }}", "m".repeat(10 << 20)).into_bytes()
        }),
        case("comment-20-mb", Fate::Taken, || {
            format!("/*{}*/ rule a {{ condition: false }}", "* /".repeat(7 << 20)).into_bytes()
        }),
        case("more-than-64-mb", no, || vec![b'/'; (64 << 20) + 1]),
        // Number.
        case("strings-100000", Fate::Either, || strings(100_000, "")),
        case("rules-100000", Fate::Either, || {
            each(100_000, "\n", |n| format!("rule r{n} {{ strings: $a = \"marker {n:06}\" condition: $a }}"))
                .into_bytes()
        }),
        case("slow-rules-20000", Fate::Either, || {
            each(20_000, "\n", |n| format!("rule r{n} {{ strings: $a = /[a-z]{{3}}{n}?/ condition: $a }}"))
                .into_bytes()
        }),
        case("tags-100000", Fate::Either, || {
            format!("rule a : {} {{ condition: false }}", each(100_000, " ", |n| format!("t{n}")))
                .into_bytes()
        }),
        case("imports-100000", Fate::Either, || {
            format!("{} rule a {{ condition: false }}", "import \"pe\"\n".repeat(100_000)).into_bytes()
        }),
        case("xor-everywhere", Fate::Either, || strings(2_000, "xor ascii wide")),
        case("base64-everywhere", Fate::Either, || strings(5_000, "base64 base64wide")),
        case("modifiers-everywhere", Fate::Either, || strings(5_000, "wide ascii nocase fullword private")),
        case("modifiers-that-contradict", refused(1, ""), || strings(1, "xor nocase base64")),
        case("externals-5000", refused(1, "ext"), || condition(&each(5_000, " and ", |n| format!("ext{n}")))),
        case("private-global-mix", Fate::Either, || {
            let kinds = ["", "private ", "global ", "private global "];
            each(4_000, "\n", |n| format!("{}rule r{n} {{ condition: filesize >= 0 }}", kinds[n % 4]))
                .into_bytes()
        }),
        // Quantifiers that take long.
        case("star-of-star", Fate::Either, || string("/(a*)*b/")),
        case("plus-of-plus", Fate::Either, || string("/(a+)+$/")),
        case("dots-of-dots", no, || string("/(.*)*(.*)*x[0-9]/s")),
        case("only-dots", Fate::Either, || string("/.*/s")),
        case("nothing-or-nothing", Fate::Either, || string("/(|)/")),
        case("boundaries", Fate::Either, || string("/\\b\\B\\b/")),
        // Files of others.
        case("include-passwd", refused(1, "include"), || b"include \"/etc/passwd\"\n".to_vec()),
        case("include-upward", refused(1, "include"), || b"include \"../../../../etc/shadow\"\n".to_vec()),
        case("include-itself", refused(2, "include"), || b"\ninclude \"include-itself.yar\"\n".to_vec()),
        case("include-endless", refused(1, "include"), || b"include \"/dev/zero\"\n".to_vec()),
        case("include-folder", refused(1, "include"), || b"include \"/\"\n".to_vec()),
        // Bytes.
        case("compiled-yara", no, || b"YARA\x00\x20\x00\x00\x0c\x0b\x00\x00".to_vec()),
        case("compiled-yara-x", no, || b"YARA-X\x00\x00\x00\x01\x02\x03".to_vec()),
        case("nul-bytes", no, || b"rule a {\0 condition:\0 true }".to_vec()),
        case("not-utf-8", no, || b"rule a { meta: x = \"\xff\xfe\" condition: true }".to_vec()),
        case("utf-16", no, || {
            "rule a { condition: true }".encode_utf16().flat_map(u16::to_le_bytes).collect()
        }),
        case("byte-order-mark", Fate::Either, || "\u{feff}rule a { condition: false }".as_bytes().to_vec()),
        case("only-blanks", no, || b" \n\t \r\n".repeat(10_000)),
        case("unterminated-string", refused(2, ""), || {
            b"rule a { strings:\n $a = \"no end condition: $a }".to_vec()
        }),
        case("unterminated-comment", refused(1, ""), || b"/* no end rule a { condition: true }".to_vec()),
        case("unterminated-regex", refused(2, ""), || {
            b"rule a { strings:\n $a = /no end condition: $a }".to_vec()
        }),
        case("unterminated-hex", refused(2, ""), || {
            b"rule a { strings:\n $a = { 01 02 condition: $a }".to_vec()
        }),
        case("unterminated-rule", refused(1, ""), || b"rule a { condition: true".to_vec()),
        case("terminal-controls", refused(1, ""), || {
            "rule \u{1b}[31mred\u{7} { condition: \u{1b}]0;title\u{7} }".as_bytes().to_vec()
        }),
        case("right-to-left", no, || "rule a { condition: \u{202e}eurt }".as_bytes().to_vec()),
        case("only-returns", Fate::Either, || b"rule a {\r condition:\r  nowhere }\r".to_vec()),
        // Names.
        case("the-same-rule-twice", refused(2, "a"), || {
            b"rule a { condition: true }\nrule a { condition: true }".to_vec()
        }),
        case("the-same-string-twice", refused(1, ""), || {
            b"rule a { strings: $a = \"abcd\" $a = \"efgh\" condition: any of them }".to_vec()
        }),
        case("unknown-rule", refused(2, "nowhere"), || b"rule a { condition:\n nowhere }".to_vec()),
        case("circle", refused(1, "b"), || b"rule a { condition: b }\nrule b { condition: a }".to_vec()),
        case("itself", refused(1, "a"), || condition("a")),
        case("chain-of-rules", Fate::Either, || {
            let first = "rule r0 { condition: filesize >= 0 }\n".to_owned();
            (first + &each(20_000, "\n", |n| format!("rule r{} {{ condition: r{n} }}", n + 1))).into_bytes()
        }),
        case("set-of-rules", Fate::Either, || {
            let rules = each(20_000, "\n", |n| format!("rule r{n} {{ condition: filesize == {n} }}"));
            format!("{rules}\nrule a {{ condition: any of (r*) }}").into_bytes()
        }),
        // Numbers.
        case("number-huge", refused(1, ""), || condition(&format!("filesize == {}", "9".repeat(40)))),
        case("number-huge-hex", refused(1, ""), || condition(&format!("filesize == 0x{}", "f".repeat(40)))),
        case("number-with-unit", refused(1, ""), || condition("filesize == 9999999999999999MB")),
        case("divided-by-nothing", Fate::Either, || condition("1 \\ 0 == 1 or 1 % 0 == 1")),
        case("least-by-minus-one", Fate::Either, || condition("-9223372036854775807 - 1 \\ -1 == 1")),
        case("shift-far", Fate::Either, || condition("1 << 9223372036854775807 == 1")),
        // Modules.
        case("module-macho", refused(1, "macho"), || {
            b"import \"macho\"\nrule a { condition: true }".to_vec()
        }),
        case("module-cuckoo", refused(1, "cuckoo"), || {
            b"import \"cuckoo\"\nrule a { condition: true }".to_vec()
        }),
        case("module-magic", refused(1, "magic"), || {
            b"import \"magic\"\nrule a { condition: true }".to_vec()
        }),
        case("module-unknown", refused(1, "nonesuch"), || {
            b"import \"nonesuch\"\nrule a { condition: true }".to_vec()
        }),
        case("module-of-controls", no, || b"import \"\x1b[2J\"\nrule a { condition: true }".to_vec()),
        // Time.
        case("loop-over-the-file", Fate::Either, || {
            condition("for all i in (0..filesize) : (uint8(i) >= 0)")
        }),
        case("loops-over-the-file", no, || {
            condition(
                "for all i in (0..filesize) : (for all j in (0..filesize) : (uint8(i) + uint8(j) >= 0))",
            )
        }),
        case("hash-in-a-loop", refused(2, "very slow"), || {
            b"import \"hash\" rule a { condition:\n for any i in (0..filesize) : (hash.md5(0, filesize) == \"x\") }".to_vec()
        }),
        case("entropy-in-a-loop", refused(2, "very slow"), || {
            b"import \"math\" rule a { condition:\n for any i in (0..filesize) : (math.entropy(0, i) > 8.5) }"
                .to_vec()
        }),
        case("endless", refused(1, "very slow"), || tm_tests::samples::ENDLESS_RULE.as_bytes().to_vec()),
    ]
}

#[test]
fn there_are_seventy_and_no_two_are_called_alike() {
    let mut names: Vec<&str> = cases().iter().map(|case| case.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() == count && count >= 70, "{count}");
}
