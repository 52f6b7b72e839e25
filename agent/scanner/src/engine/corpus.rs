//! Bytes of the kinds that scans meet, to measure rules on.
//!
//! **Invariant:** made here, the same every time and on every machine; nothing of it is on a disk. Smaller
//! pieces come first, so that what grows faster than its data is noticed before it is long.

/// Sizes of the pieces of every kind, in bytes.
const SIZES: [usize; 6] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Size of the one large piece, in bytes.
const LARGE: usize = 4 << 20;

const WORDS: [&str; 40] = [
    "the",
    "system",
    "of",
    "and",
    "file",
    "to",
    "a",
    "in",
    "is",
    "option",
    "for",
    "user",
    "with",
    "that",
    "data",
    "not",
    "process",
    "value",
    "be",
    "this",
    "when",
    "error",
    "network",
    "server",
    "from",
    "memory",
    "address",
    "default",
    "configuration",
    "or",
    "are",
    "Copyright",
    "version",
    "on",
    "function",
    "returns",
    "will",
    "2024-11-07",
    "0x7ffd1c",
    "localhost:8080",
];

const SCRIPT: [&str; 16] = [
    "#!/bin/sh\n",
    "set -eu\n",
    "for f in /etc/*.conf; do cat \"$f\"; done\n",
    "if [ -x /usr/bin/curl ]; then curl -fsSL https://example.com/install.sh | sh; fi\n",
    "function run(cmd) { return eval(String.fromCharCode(104, 105)); }\n",
    "var data = atob('aGVsbG8gd29ybGQgZnJvbSBhIHNjcmlwdA==');\n",
    "$result = mysql_query('SELECT * FROM users WHERE id=' . $_GET['id']);\n",
    "import os, sys, subprocess\n",
    "subprocess.Popen(['powershell', '-NoProfile', '-EncodedCommand', code])\n",
    "    except Exception as error:  # nothing to be done\n",
    "export PATH=\"$HOME/bin:/usr/local/bin:$PATH\"\n",
    "echo \"$(date '+%F %T') $(hostname) started\" >> /var/log/app.log\n",
    "document.getElementById(\"main\").innerHTML = unescape(text);\n",
    "chmod 0755 ./a.out && ./a.out --daemon\n",
    "CreateObject(\"WScript.Shell\").Run \"cmd.exe /c dir\", 0, False\n",
    "\n",
];

/// Runs of bytes as compilers make them.
const CODE: [&[u8]; 10] = [
    b"\x55\x48\x89\xe5",
    b"\x48\x83\xec\x20",
    b"\xe8\x00\x10\x00\x00",
    b"\x48\x8b\x45\xf8",
    b"\xc9\xc3\x90\x90",
    b"\x0f\x1f\x44\x00\x00",
    b"\x48\x8d\x3d\xc4\x0e\x00\x00",
    b"\x85\xc0\x74\x12",
    b"\xcc\xcc\xcc\xcc",
    b"\x31\xc0\x5d\xc3",
];

/// Words as programs carry them.
const NAMES: [&str; 10] = [
    "malloc",
    "free",
    "__libc_start_main",
    "GetProcAddress",
    "LoadLibraryA",
    "kernel32.dll",
    "GLIBC_2.34",
    "usage: %s [options] file",
    "/proc/self/exe",
    "connect",
];

/// One piece.
#[derive(Debug)]
pub(super) struct Piece {
    /// What it is like, for people.
    pub(super) kind: &'static str,
    pub(super) bytes: Vec<u8>,
}

/// Makes a piece of a size.
type Make = fn(usize, &mut Dice) -> Vec<u8>;

/// All pieces, some 13 MB, by size.
pub(super) fn pieces() -> Vec<Piece> {
    let kinds: [(&str, Make); 7] = [
        ("text", text),
        ("a script", script),
        ("an ELF program", elf),
        ("a PE program", pe),
        ("zeros", |size, _| vec![0; size]),
        ("random bytes", random),
        ("base64", base64),
    ];
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut pieces = Vec::new();
    for size in SIZES {
        for (kind, make) in kinds {
            pieces.push(Piece { kind, bytes: make(size, &mut dice) });
        }
    }
    let mut large = Vec::with_capacity(LARGE);
    for (_, make) in kinds.iter().cycle() {
        large.extend(make((64 << 10).min(LARGE - large.len()), &mut dice));
        if large.len() >= LARGE {
            break;
        }
    }
    pieces.push(Piece { kind: "mixed data", bytes: large });
    pieces
}

/// Numbers that look random and are always the same (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> Option<&'a T> {
        let at = self.roll() % u64::try_from(of.len().max(1)).unwrap_or(1);
        of.get(usize::try_from(at).unwrap_or(0)).copied()
    }
}

fn filled(size: usize, mut more: impl FnMut(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 128);
    while bytes.len() < size {
        more(&mut bytes);
    }
    bytes.truncate(size);
    bytes
}

fn text(size: usize, dice: &mut Dice) -> Vec<u8> {
    filled(size, |bytes| {
        bytes.extend(dice.pick(&WORDS).unwrap_or_default().bytes());
        bytes.push(if dice.roll().is_multiple_of(11) { b'\n' } else { b' ' });
    })
}

fn script(size: usize, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = b"#!/bin/sh\n".to_vec();
    bytes.extend(filled(size, |bytes| bytes.extend(dice.pick(&SCRIPT).unwrap_or_default().bytes())));
    bytes.truncate(size);
    bytes
}

fn random(size: usize, dice: &mut Dice) -> Vec<u8> {
    filled(size, |bytes| bytes.extend(dice.roll().to_le_bytes()))
}

/// Without line ends, as scripts carry it.
fn base64(size: usize, dice: &mut Dice) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    filled(size, |bytes| {
        let digits = dice.roll().to_le_bytes();
        bytes.extend(digits.iter().filter_map(|byte| ALPHABET.get(usize::from(byte & 63))));
    })
}

fn code(size: usize, dice: &mut Dice) -> Vec<u8> {
    filled(size, |bytes| match dice.roll() % 16 {
        0 => {
            bytes.extend(dice.pick(&NAMES).unwrap_or_default().bytes());
            bytes.push(0);
        }
        1 => bytes.extend(dice.roll().to_le_bytes()),
        2 => bytes.extend([0; 12]),
        _ => bytes.extend(dice.pick(&CODE).unwrap_or_default()),
    })
}

/// A 64-bit ELF program with four sections that fill it.
fn elf(size: usize, dice: &mut Dice) -> Vec<u8> {
    const HEADER: usize = 64;
    const SECTION: usize = 64;
    let names: &[u8] = b"\0.text\0.rodata\0.data\0.shstrtab\0";
    let table = 5 * SECTION;
    let mut bytes = code(size, dice);
    let Some(body) = size.checked_sub(HEADER + names.len() + table).map(|left| left / 3) else {
        return bytes;
    };
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for x86-64, version 1.
    header.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    header.extend(0x40_1000_u64.to_le_bytes());
    header.extend(0_u64.to_le_bytes());
    let names_at = HEADER + 3 * body;
    let table_at = names_at + names.len();
    header.extend(number(table_at).to_le_bytes());
    header.extend([0; 4]);
    for half in [64_u16, 56, 0, 64, 5, 4] {
        header.extend(half.to_le_bytes());
    }
    put(&mut bytes, 0, &header);
    put(&mut bytes, names_at, names);
    // Name, type, flags, place and size of each.
    let sections = [
        (0, 0, 0, 0, 0),
        (1_u32, 1_u32, 6_u64, HEADER, body),
        (7, 1, 2, HEADER + body, body),
        (15, 1, 3, HEADER + 2 * body, body),
        (21, 3, 0, names_at, names.len()),
    ];
    for (at, (name, kind, flags, place, length)) in sections.into_iter().enumerate() {
        let mut row = Vec::with_capacity(SECTION);
        row.extend(name.to_le_bytes());
        row.extend(kind.to_le_bytes());
        row.extend(flags.to_le_bytes());
        row.extend((0x40_0000 + number(place)).to_le_bytes());
        row.extend(number(place).to_le_bytes());
        row.extend(number(length).to_le_bytes());
        row.resize(SECTION, 0);
        put(&mut bytes, table_at + at * SECTION, &row);
    }
    bytes
}

/// A 32-bit Windows program with three sections that fill it.
fn pe(size: usize, dice: &mut Dice) -> Vec<u8> {
    const HEADERS: usize = 0x200;
    const START: usize = 0x80;
    const OPTIONAL: u16 = 0xe0;
    let mut bytes = code(size, dice);
    let body = size.saturating_sub(HEADERS) / 3;
    let mut header = vec![0; START];
    put(&mut header, 0, b"MZ\x90");
    put(&mut header, 0x3c, &[0x80]);
    header.extend(b"PE\0\0\x4c\x01\x03\0");
    header.extend([0; 12]);
    header.extend(OPTIONAL.to_le_bytes());
    header.extend([0x02, 0x01]);
    let mut optional = vec![0x0b, 0x01, 14, 0];
    for word in [body, body, 0, 0x1000, 0x1000, 0x2000, 0x40_0000, 0x1000, 0x200] {
        optional.extend(u32::try_from(word).unwrap_or(u32::MAX).to_le_bytes());
    }
    optional.resize(usize::from(OPTIONAL), 0);
    // Data directories: none is filled, sixteen are there.
    put(&mut optional, 92, &[16]);
    header.extend(optional);
    for (at, name) in [b".text\0\0\0", b".rdata\0\0", b".data\0\0\0"].into_iter().enumerate() {
        header.extend(name);
        for word in [body, 0x1000 * (at + 1), body, HEADERS + at * body] {
            header.extend(u32::try_from(word).unwrap_or(u32::MAX).to_le_bytes());
        }
        header.extend([0; 12]);
        header.extend(0x6000_0020_u32.to_le_bytes());
    }
    header.resize(HEADERS, 0);
    put(&mut bytes, 0, &header);
    bytes
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + what.len()) {
        place.copy_from_slice(what);
    }
}

fn number(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tm_protocol::ids::Sha256;

    use super::*;
    use crate::engine::Engine;

    #[test]
    fn the_pieces_are_always_the_same_and_grow() {
        let (one, other) = (pieces(), pieces());
        assert!(one.iter().map(|p| &p.bytes).eq(other.iter().map(|p| &p.bytes)));
        assert!(one.is_sorted_by_key(|piece| piece.bytes.len()));
        let total: usize = one.iter().map(|piece| piece.bytes.len()).sum();
        assert_eq!((one.len(), total), (43, 7 * SIZES.iter().sum::<usize>() + LARGE));
    }

    #[test]
    fn programs_are_programs_to_the_modules() {
        let text = "import \"elf\" import \"pe\"
            rule e { condition: elf.type == elf.ET_EXEC and for any s in elf.sections : (s.name == \".rodata\") }
            rule p { condition: pe.number_of_sections == 3 and pe.sections[1].name == \".rdata\" }";
        let (mut engine, _, _) = Engine::compile(&[(Sha256::of(b""), text.to_owned())]).unwrap();
        for piece in pieces().iter().filter(|piece| piece.bytes.len() >= 4 << 10) {
            let judged = engine.judge(&piece.bytes, Duration::from_secs(5));
            let rules: Vec<&str> = judged.matches.iter().map(|(_, rule)| rule.as_str()).collect();
            match piece.kind {
                "an ELF program" => assert_eq!(rules, ["e"]),
                "a PE program" => assert_eq!(rules, ["p"]),
                other => assert_eq!(rules, [""; 0], "{other}"),
            }
        }
    }
}
