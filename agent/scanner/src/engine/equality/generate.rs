//! Makes rule sets of every YARA construct, and data in which their strings stand whole, changed and in parts.
//!
//! **Invariant:** the same seed makes the same.

/// A small generator of numbers (xorshift64*): its seed tells a failing case.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % u64::try_from(n).unwrap())
            .unwrap()
    }

    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

const WORDS: [&str; 24] = [
    "evil",
    "Needle47",
    "xmrig",
    "stratum+tcp",
    "cmd.exe",
    "GetProcAddress",
    "http",
    "abc",
    "zq",
    "PAYLOAD_",
    "aaaa",
    "rat!",
    "beacon",
    "kill -9 ",
    "eval(base64",
    "\\x00\\x01\\x02\\x03",
    "/tmp/.X11",
    "SELECT",
    "mimikatz",
    "lsass",
    "Q",
    "tion",
    "\\xff\\xfe\\xfd",
    "powershell",
];

/// A rule set and the bytes that may stand where it matches.
pub(super) struct Set {
    pub(super) text: String,
    pub(super) plants: Vec<Vec<u8>>,
}

fn unescape(word: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if let [b'x', hex @ ..] = tail
            && *first == b'\\'
        {
            bytes.push(u8::from_str_radix(std::str::from_utf8(&hex[..2]).unwrap(), 16).unwrap());
            rest = &hex[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    bytes
}

fn word(dice: &mut Dice) -> String {
    let mut word = (*dice.pick(&WORDS)).to_owned();
    if dice.once_in(3) {
        word += *dice.pick(&WORDS);
    }
    if dice.once_in(2) {
        word += &format!("{:02}", dice.below(100));
    }
    word
}

fn wide(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|b| [*b, 0]).collect()
}

fn base64(bytes: &[u8]) -> Vec<u8> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes).into_bytes()
}

/// One string declaration without its name.
fn string(dice: &mut Dice, plants: &mut Vec<Vec<u8>>, newest: bool) -> String {
    match dice.below(10) {
        0..=4 => text_string(dice, plants),
        5..=7 => hex_string(dice, plants, newest),
        _ => regex_string(dice, plants),
    }
}

fn text_string(dice: &mut Dice, plants: &mut Vec<Vec<u8>>) -> String {
    let word = word(dice);
    let bytes = unescape(&word);
    plants.push(bytes.clone());
    let modifiers = match dice.below(14) {
        0 => "wide",
        1 => "wide ascii",
        2 => "nocase",
        3 => "nocase wide",
        4 => "fullword",
        5 => "fullword wide ascii nocase",
        6 => "xor",
        7 => "xor(1-40) wide ascii",
        8 if bytes.len() > 3 => "base64",
        9 if bytes.len() > 3 => "base64wide",
        10 if bytes.len() > 3 => {
            "base64(\"!@#$%^&*(){}[].,|ABCDEFGHIJ\\x09LMNOPQRSTUVWXYZabcdefghijklmnopqrstu\")"
        }
        11 => "private",
        _ => "",
    };
    let text = word.replace('"', "\\\"");
    if modifiers.contains("wide") {
        plants.push(wide(&bytes));
    }
    if modifiers.contains("nocase") {
        plants.push(bytes.to_ascii_uppercase());
        plants.push(wide(&bytes.to_ascii_lowercase()));
    }
    if modifiers.contains("xor") {
        let key = u8::try_from(dice.below(60)).unwrap();
        plants.push(bytes.iter().map(|b| b ^ key).collect());
        plants.push(wide(&bytes).iter().map(|b| b ^ key).collect());
    }
    if modifiers.contains("base64") {
        for before in ["", "x", "xy"] {
            let coded = base64(&[before.as_bytes(), &bytes, b"tail"].concat());
            plants.push(wide(&coded));
            plants.push(coded);
        }
    }
    format!("\"{text}\" {modifiers}")
}

fn hex_string(dice: &mut Dice, plants: &mut Vec<Vec<u8>>, newest: bool) -> String {
    let mut text = String::from("{");
    let mut plant = Vec::new();
    let byte = |dice: &mut Dice, text: &mut String, plant: &mut Vec<u8>| {
        let value = *dice.pick(b"ABCDefgh\x00\x01\x7f\x90\xff\xc3MZ");
        text.push_str(&format!(" {value:02x}"));
        plant.push(value);
    };
    byte(dice, &mut text, &mut plant);
    for _ in 0..dice.below(12) {
        match dice.below(14) {
            0 => {
                text.push_str(" ??");
                plant.push(7);
            }
            1 => {
                text.push_str(" 4?");
                plant.push(0x4c);
            }
            2 => {
                text.push_str(" ?1");
                plant.push(0x71);
            }
            3 if newest => {
                text.push_str(" ~41");
                plant.push(0x42);
            }
            4 => {
                text.push_str(" [2-4]");
                plant.extend(b"...");
            }
            5 => {
                text.push_str(" [3]");
                plant.extend(b"...");
            }
            6 => {
                text.push_str(" [0-]");
                plant.extend(b"..");
            }
            7 => {
                text.push_str(" ( 61 62 63 64 65 | 7a ?? 7a | 31 32 [1-2] 33 34 35 36 )");
                plant.extend(*dice.pick(&[b"abcde".as_slice(), b"zyz", b"12.3456"]));
            }
            8 => {
                text.push_str(" ( 61 62 63 64 | 77 78 79 7a )");
                plant.extend(*dice.pick(&[b"abcd", b"wxyz"]));
            }
            _ => byte(dice, &mut text, &mut plant),
        }
    }
    byte(dice, &mut text, &mut plant);
    plants.push(plant);
    text.push_str(" }");
    text
}

fn regex_string(dice: &mut Dice, plants: &mut Vec<Vec<u8>>) -> String {
    let mut text = String::new();
    let mut plant = Vec::new();
    for _ in 0..=dice.below(5) {
        let (part, match_): (&str, &[u8]) = match dice.below(18) {
            0 => ("[a-f]{2}", b"ad"),
            1 => ("(foo|barbar)", b"barbar"),
            2 => ("(quux)?", b""),
            3 => ("(hello)+", b"hellohello"),
            4 => ("x{0,3}", b"xx"),
            5 => ("(wxyz){2,}", b"wxyzwxyz"),
            6 => ("\\d+", b"4711"),
            7 => (".", b"?"),
            8 => (".{1,5}", b"???"),
            9 => ("\\bneedle\\b", b" needle "),
            10 => ("a?b*c+", b"bcc"),
            11 => ("(aaaa(bbbb|cccc)|dddd)", b"aaaacccc"),
            12 => ("[^x]yes", b"ayes"),
            13 => ("stra\\x00ta", b"stra\0ta"),
            14 => ("(a|b|)word", b"word"),
            15 => ("ab|cdefgh", b"cdefgh"),
            _ => ("Literal", b"Literal"),
        };
        text.push_str(part);
        plant.extend(match_);
    }
    // yara and boreal do not agree on matches of nothing.
    if text.replace("(quux)?", "").replace("x{0,3}", "").is_empty() {
        text.push_str("end");
        plant.extend(b"end");
    }
    if dice.once_in(12) {
        text.insert(0, '^');
    }
    if dice.once_in(12) {
        text.push('$');
    }
    plants.push(plant.clone());
    let modifiers =
        *dice.pick(&["", "", "", "i", "s", " nocase", " wide", " wide ascii", "i wide", " fullword"]);
    if modifiers.contains("wide") {
        plants.push(wide(&plant));
    }
    if modifiers.contains('i') || modifiers.contains("nocase") {
        plants.push(plant.to_ascii_uppercase());
        plants.push(wide(&plant.to_ascii_uppercase()));
    }
    format!("/{text}/{modifiers}")
}

/// What conditions of a rule may speak of.
struct Scope<'a> {
    strings: &'a [String],
    earlier: &'a [String],
    modules: bool,
    in_for: bool,
    /// Constructs that the `yara` of Debian 12 does not know are used as well.
    newest: bool,
}

fn name<'a>(dice: &mut Dice, scope: &Scope<'a>) -> &'a str {
    dice.pick::<String>(scope.strings)
}

fn set(dice: &mut Dice, scope: &Scope<'_>) -> String {
    match dice.below(4) {
        0 => "them".to_owned(),
        1 => "($s*)".to_owned(),
        2 => format!("(${}, ${})", name(dice, scope), name(dice, scope)),
        _ => format!("(${})", name(dice, scope)),
    }
}

fn selection(dice: &mut Dice) -> String {
    match dice.below(7) {
        0 => "all".to_owned(),
        1 => "none".to_owned(),
        2 => "2".to_owned(),
        3 => "1".to_owned(),
        4 => "50%".to_owned(),
        _ => "any".to_owned(),
    }
}

fn condition(dice: &mut Dice, scope: &Scope<'_>, depth: usize) -> String {
    if depth > 0 {
        let inner = |dice: &mut Dice| condition(dice, scope, depth - 1);
        match dice.below(6) {
            0 | 1 => return format!("({} and {})", inner(dice), inner(dice)),
            2 => return format!("({} or {})", inner(dice), inner(dice)),
            3 => return format!("(not {})", inner(dice)),
            4 => return format!("({} and {} and {})", inner(dice), inner(dice), inner(dice)),
            _ => {}
        }
    }
    if scope.strings.is_empty() {
        return without_strings(dice, scope);
    }
    let s = name(dice, scope);
    match dice.below(30) {
        0..=4 => format!("${s}"),
        5 => format!("${s} at {}", dice.pick(&["0", "4", "@s0", "filesize - 1"])),
        6 => format!("${s} in (0..{})", dice.below(300)),
        7 => format!("#{s} > {}", dice.below(3)),
        8 => format!("#{s} >= {}", dice.below(3)),
        9 => format!("#{s} == {}", dice.below(3)),
        10 => format!("{} < #{s}", dice.below(2)),
        11 => format!("#{s} < 2"),
        12 => format!("#{s} in (0..200) > 0"),
        13 => format!("@{s}[1] < {}", dice.below(400)),
        14 => format!("@{s}[2] != 5"),
        15 => format!("!{s}[1] > 4"),
        16..=18 => format!("{} of {}", selection(dice), set(dice, scope)),
        19 => format!("{} of {} in (0..100)", dice.pick(&["any", "all", "1"]), set(dice, scope)),
        20 if scope.newest => format!("any of {} at 0", set(dice, scope)),
        21 if !scope.in_for => {
            let body = *dice.pick(&["$", "# > 1", "@ < 100", "$ at 0", "$ in (0..50)", "not $", "# == 0"]);
            let also = if dice.once_in(3) { format!(" and ${s}") } else { String::new() };
            format!(
                "for {} of {} : ({body}{also})",
                dice.pick(&["any", "all", "none", "2"]),
                set(dice, scope)
            )
        }
        22 => format!("for any i in (1..#{s}) : (@{s}[i] < 60)"),
        23 => format!("for all i in (1..3) : (@{s}[i] > 2)"),
        24 => format!("for any i in (0..2) : (${s} at i)"),
        25 => format!("defined @{s}[1]"),
        26 => format!("not defined !{s}[2]"),
        27 => format!("(@{s} + 1 > 3)"),
        _ => without_strings(dice, scope),
    }
}

fn without_strings(dice: &mut Dice, scope: &Scope<'_>) -> String {
    if !scope.earlier.is_empty() && dice.once_in(3) {
        return match dice.below(3) {
            0 => format!("any of ({})", dice.pick(scope.earlier)),
            _ => dice.pick(scope.earlier).clone(),
        };
    }
    if scope.modules && dice.once_in(2) {
        return (*dice.pick(&[
            "pe.is_pe",
            "pe.number_of_sections > 0",
            "not pe.is_pe",
            "pe.is_pe == 0",
            "pe.is_dll()",
            "pe.MACHINE_I386 == 332",
            "elf.type == elf.ET_DYN",
            "elf.number_of_sections > 2",
            "elf.machine != 3",
            "for any x in elf.sections : (x.name == \".text\")",
            "for all x in pe.sections : (x.name == \".text\")",
            "not defined elf.type",
            "hash.md5(0, 4) == \"x\"",
            "math.entropy(0, filesize) > 3.0",
            "math.max(1, 2) == 2",
            "for any x in (1..2) : (elf.number_of_segments >= x)",
        ]))
        .to_owned();
    }
    match dice.below(12) {
        0 => "uint16(0) == 0x5a4d".to_owned(),
        1 => "uint32(0) == 0x464c457f".to_owned(),
        2 => "0x7f454c46 == uint32be(0)".to_owned(),
        3 => "uint8(0) == 0x7f".to_owned(),
        4 => "int16(0) == 0x5a4d".to_owned(),
        5 => "uint16be(0) == 0x4d5a".to_owned(),
        6 => "uint32(uint32(0x3c)) == 0x4550".to_owned(),
        7 => format!("filesize < {}", dice.below(600)),
        8 => format!("filesize > {}", dice.below(600)),
        9 => "filesize >= 1KB".to_owned(),
        10 => "false".to_owned(),
        _ => "true".to_owned(),
    }
}

/// A set of `rules` rules in one text. With `modules`, file modules are used; with `globals`, global rules; with
/// `newest`, what the `yara` of Debian 12 does not know.
pub(super) fn rule_set(dice: &mut Dice, rules: usize, modules: bool, globals: bool, newest: bool) -> Set {
    let mut text = String::new();
    let mut plants = Vec::new();
    let mut earlier: Vec<String> = Vec::new();
    if modules {
        text +=
            "import \"pe\"\nimport \"elf\"\n// a comment } with a brace\nimport \"hash\" import \"math\"\n";
    }
    for index in 0..rules {
        let count = dice.below(5);
        let mut strings = Vec::new();
        let mut declared = String::new();
        for at in 0..count {
            // An anonymous string now and then; `them` takes it in.
            let anonymous = at > 0 && dice.once_in(9);
            let value = string(dice, &mut plants, newest);
            if anonymous {
                declared += &format!("    $ = {value}\n");
            } else {
                strings.push(format!("s{at}"));
                declared += &format!("    $s{at} = {value}\n");
            }
        }
        let start = earlier.len().saturating_sub(3);
        let some: &[String] = if dice.once_in(6) { &earlier[start..] } else { &[] };
        let scope = Scope { strings: &strings, earlier: some, modules, in_for: false, newest };
        let depth = dice.below(4);
        let mut condition = condition(dice, &scope, depth);
        if count > 0 {
            // Every string must be used.
            condition = match dice.below(4) {
                0 => format!("{condition} and any of them"),
                1 => format!("{condition} or all of them"),
                2 => format!("{condition} and (#s0 >= 0 or all of them)"),
                _ => format!("{condition} and {} of them", selection(dice)),
            };
        }
        let name = format!("r{index}");
        let kind = match dice.below(12) {
            0 => "private ",
            1 if globals => "global ",
            2 if globals && dice.once_in(3) => "global private ",
            _ => "",
        };
        text += &format!("{kind}rule {name} : tag {{\n  meta:\n    a = \"}}\"\n");
        if count > 0 {
            text += &format!("  strings:\n{declared}");
        }
        text += &format!("  condition:\n    {condition} // }}\n /* }} */ }}\n");
        // boreal allows naming only rules before.
        if !kind.contains("global") {
            earlier.push(name);
        }
    }
    Set { text, plants }
}

/// Data with some of `plants` in it, some of them damaged.
pub(super) fn data(dice: &mut Dice, plants: &[Vec<u8>], elf: &[u8]) -> Vec<u8> {
    let mut data = match dice.below(8) {
        0 => b"MZ\x90\x00".to_vec(),
        1 => b"\x7fELF".to_vec(),
        2 => elf.to_vec(),
        3 => tiny_pe(),
        _ => Vec::new(),
    };
    for _ in 0..dice.below(8) {
        if plants.is_empty() {
            break;
        }
        let mut plant = dice.pick(plants).clone();
        if dice.once_in(4) && !plant.is_empty() {
            let at = dice.below(plant.len());
            if dice.once_in(2) {
                plant[at] ^= 1 << dice.below(8);
            } else {
                plant.truncate(at);
            }
        }
        for _ in 0..dice.below(40) {
            data.push(*dice.pick(b"\0\0 .,xyz\n\xffabc"));
        }
        data.extend(plant);
        if dice.once_in(10) {
            data.splice(0..0, dice.pick(plants).clone());
        }
    }
    data
}

/// A PE file that parses: headers and one section.
fn tiny_pe() -> Vec<u8> {
    let mut pe = vec![0; 0x200];
    pe[..2].copy_from_slice(b"MZ");
    pe[0x3c] = 0x40;
    pe[0x40..0x44].copy_from_slice(b"PE\0\0");
    pe[0x44..0x46].copy_from_slice(&0x14cu16.to_le_bytes());
    pe[0x46] = 1;
    pe[0x54] = 0xe0;
    pe[0x57] = 0x20;
    pe[0x58..0x5a].copy_from_slice(&0x10bu16.to_le_bytes());
    pe[0x58 + 0x5c] = 16;
    let section = 0x58 + 0xe0;
    pe[section..section + 5].copy_from_slice(b".text");
    pe
}
