//! LZX as cabinets have it (MS-PATCH describes the coder, MS-CAB the container): blocks of Huffman codes over a
//! window, cut into frames of 32 KiB that begin at a whole 16-bit word.
//!
//! **Invariant:** nothing refers back further than to what has come out, and no frame grows beyond its told size.

/// Windows are 2^15 to 2^21 bytes; the number of position slots of each.
const SLOTS: [usize; 7] = [30, 32, 34, 36, 38, 42, 50];
const SMALLEST_WINDOW: u64 = 15;
/// Codes of single bytes; those above are matches.
const BYTES: usize = 256;
/// Codes of the second tree, which has the lengths of long matches.
const LENGTHS: usize = 249;
/// Longest code, in bits.
const LONGEST: usize = 16;
/// Calls are no longer translated from this position on.
const CALLS_END: u64 = 1 << 30;

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Verbatim,
    Aligned,
    Stored,
}

/// A decoder.
pub(super) struct Lzx {
    window: Vec<u8>,
    /// Where the next byte goes.
    at: usize,
    /// How much has come out.
    done: u64,
    /// Offsets of the last matches.
    recent: [u32; 3],
    main_lengths: Vec<u8>,
    length_lengths: [u8; LENGTHS],
    main: Tree,
    length: Tree,
    aligned: Tree,
    kind: Kind,
    /// What is left of the block, in bytes, and whether a byte of padding follows it.
    left: u32,
    padded: bool,
    /// The told size of the program whose calls were translated, once it is known.
    translated: Option<i32>,
}

impl Lzx {
    /// With a window of 2^`bits` bytes, if there is such a one.
    pub(super) fn new(bits: u64) -> Option<Self> {
        let slots = *SLOTS.get(usize::try_from(bits.checked_sub(SMALLEST_WINDOW)?).ok()?)?;
        Some(Self {
            window: vec![0; 1 << bits],
            at: 0,
            done: 0,
            recent: [1; 3],
            main_lengths: vec![0; BYTES + slots * 8],
            length_lengths: [0; LENGTHS],
            main: Tree::default(),
            length: Tree::default(),
            aligned: Tree::default(),
            kind: Kind::Verbatim,
            left: 0,
            padded: false,
            translated: None,
        })
    }

    /// Unpacks a frame of `size` bytes, at most a window, into `out`. Where it is wrong, `out` has what came
    /// before that.
    pub(super) fn unpack(&mut self, packed: &[u8], size: usize, out: &mut Vec<u8>) -> Option<()> {
        out.clear();
        let begin = self.done;
        let mut bits = Bits::new(packed);
        let whole = self.frame(&mut bits, size, out);
        if self.translated.is_some_and(|size| size != 0) && begin < CALLS_END {
            translate_calls(out, begin, self.translated.unwrap_or_default());
        }
        // The padding of a stored block ends with the frame at the latest.
        self.padded &= bits.rest.is_empty();
        whole
    }

    fn frame(&mut self, bits: &mut Bits<'_>, size: usize, out: &mut Vec<u8>) -> Option<()> {
        if self.translated.is_none() {
            let size = if bits.take(1)? == 1 { bits.take(16)? << 16 | bits.take(16)? } else { 0 };
            self.translated = Some(size.cast_signed());
        }
        while out.len() < size {
            if self.left == 0 {
                self.begin(bits)?;
            }
            let room = size - out.len();
            match self.kind {
                Kind::Stored => self.stored(bits, room, out)?,
                Kind::Verbatim | Kind::Aligned => self.element(bits, room, out)?,
            }
        }
        Some(())
    }

    /// Reads a block's header.
    fn begin(&mut self, bits: &mut Bits<'_>) -> Option<()> {
        if std::mem::take(&mut self.padded) {
            bits.bytes(1)?;
        }
        self.kind = match bits.take(3)? {
            1 => Kind::Verbatim,
            2 => Kind::Aligned,
            3 => Kind::Stored,
            _ => return None,
        };
        let size = bits.take(16)? << 8 | bits.take(8)?;
        match self.kind {
            Kind::Stored => {
                bits.align()?;
                let mut recent = [0; 3];
                for offset in &mut recent {
                    *offset = u32::from_le_bytes(bits.bytes(4)?.try_into().ok()?);
                }
                self.recent = recent;
                self.padded = size % 2 == 1;
            }
            Kind::Aligned => {
                let mut lengths = [0; 8];
                for length in &mut lengths {
                    *length = u8::try_from(bits.take(3)?).ok()?;
                }
                self.aligned = Tree::new(&lengths)?;
                self.trees(bits)?;
            }
            Kind::Verbatim => self.trees(bits)?,
        }
        self.left = size;
        (size > 0).then_some(())
    }

    fn trees(&mut self, bits: &mut Bits<'_>) -> Option<()> {
        let (bytes, matches) = self.main_lengths.split_at_mut_checked(BYTES)?;
        update_lengths(bits, bytes)?;
        update_lengths(bits, matches)?;
        update_lengths(bits, &mut self.length_lengths)?;
        self.main = Tree::new(&self.main_lengths)?;
        self.length = Tree::new(&self.length_lengths)?;
        Some(())
    }

    fn stored(&mut self, bits: &mut Bits<'_>, room: usize, out: &mut Vec<u8>) -> Option<()> {
        let length = room.min(usize::try_from(self.left).ok()?).min(bits.rest.len());
        let bytes = bits.bytes(length)?;
        for byte in bytes {
            self.put(*byte, out);
        }
        self.left -= u32::try_from(length).ok()?;
        (length > 0).then_some(())
    }

    fn put(&mut self, byte: u8, out: &mut Vec<u8>) {
        if let Some(place) = self.window.get_mut(self.at) {
            *place = byte;
        }
        self.at = (self.at + 1) % self.window.len();
        self.done += 1;
        out.push(byte);
    }

    /// One byte or one match, which may not reach beyond the frame or the block.
    fn element(&mut self, bits: &mut Bits<'_>, room: usize, out: &mut Vec<u8>) -> Option<()> {
        let code = usize::from(self.main.decode(bits)?);
        let Some(code) = code.checked_sub(BYTES) else {
            self.put(u8::try_from(code).ok()?, out);
            self.left -= 1;
            return Some(());
        };
        let length = match code & 7 {
            7 => usize::from(self.length.decode(bits)?) + 9,
            short => short + 2,
        };
        let offset = self.offset(bits, code >> 3)?;
        let distance = usize::try_from(offset).ok().filter(|distance| *distance <= self.window.len())?;
        if distance == 0 || u64::from(offset) > self.done || length > room {
            return None;
        }
        self.left = self.left.checked_sub(u32::try_from(length).ok()?)?;
        let mut from = (self.at + self.window.len() - distance) % self.window.len();
        for _ in 0..length {
            let byte = *self.window.get(from)?;
            from = (from + 1) % self.window.len();
            self.put(byte, out);
        }
        Some(())
    }

    fn offset(&mut self, bits: &mut Bits<'_>, slot: usize) -> Option<u32> {
        if slot < 3 {
            self.recent.swap(0, slot);
            return Some(self.recent[0]);
        }
        let (base, extra) = base(slot);
        let low = if self.kind == Kind::Aligned && extra >= 3 {
            (bits.take(extra - 3)? << 3) + u32::from(self.aligned.decode(bits)?)
        } else {
            bits.take(extra)?
        };
        let offset = base + low - 2;
        self.recent = [offset, self.recent[0], self.recent[1]];
        Some(offset)
    }
}

/// The first position of a slot, and how many bits are added to it.
fn base(slot: usize) -> (u32, u32) {
    let extra = |slot: usize| if slot < 4 { 0 } else { (slot as u32 / 2 - 1).min(17) };
    ((0..slot).map(|slot| 1 << extra(slot)).sum(), extra(slot))
}

/// Changes the lengths of a tree's codes by what is told, which is coded by a tree of its own.
fn update_lengths(bits: &mut Bits<'_>, lengths: &mut [u8]) -> Option<()> {
    let mut own = [0; 20];
    for length in &mut own {
        *length = u8::try_from(bits.take(4)?).ok()?;
    }
    let tree = Tree::new(&own)?;
    let mut at = 0;
    while at < lengths.len() {
        let changed = |code: u16| Some((*lengths.get(at)? + 17 - u8::try_from(code).ok()?) % 17);
        let (value, count) = match tree.decode(bits)? {
            code @ 0..17 => (changed(code)?, 1),
            17 => (0, bits.take(4)? + 4),
            18 => (0, bits.take(5)? + 20),
            _ => {
                let count = bits.take(1)? + 4;
                let code = tree.decode(bits)?;
                (changed((code < 17).then_some(code)?)?, count)
            }
        };
        let end = at + usize::try_from(count).ok()?;
        lengths.get_mut(at..end)?.fill(value);
        at = end;
    }
    Some(())
}

/// A call's target was made absolute before packing, so that calls of one target look alike: back again.
fn translate_calls(frame: &mut [u8], begin: u64, size: i32) {
    let mut at = 0;
    let end = frame.len().saturating_sub(10);
    while at < end {
        let Some(call) = frame.get(at..end).and_then(|rest| memchr::memchr(0xe8, rest)) else { return };
        at += call;
        let position = i32::try_from(begin + at as u64).unwrap_or(i32::MAX);
        if let Some(target) = frame.get_mut(at + 1..at + 5).and_then(|target| target.first_chunk_mut::<4>()) {
            let absolute = i32::from_le_bytes(*target);
            if absolute >= -position && absolute < size {
                let relative =
                    if absolute >= 0 { absolute.wrapping_sub(position) } else { absolute.wrapping_add(size) };
                *target = relative.to_le_bytes();
            }
        }
        at += 5;
    }
}

/// A canonical Huffman code: how many codes there are of each length, and their symbols in order.
#[derive(Default)]
struct Tree {
    counts: [u16; LONGEST + 1],
    symbols: Vec<u16>,
}

impl Tree {
    /// Nothing if there are more codes than their lengths allow. One without any code decodes nothing.
    fn new(lengths: &[u8]) -> Option<Self> {
        let mut counts = [0u16; LONGEST + 1];
        for length in lengths {
            *counts.get_mut(usize::from(*length))? += 1;
        }
        counts[0] = 0;
        let mut left = 1i32;
        let mut starts = [0usize; LONGEST + 2];
        for length in 1..=LONGEST {
            left = left * 2 - i32::from(counts[length]);
            if left < 0 {
                return None;
            }
            starts[length + 1] = starts[length] + usize::from(counts[length]);
        }
        let mut symbols = vec![0; starts[LONGEST + 1]];
        for (symbol, length) in (0u16..).zip(lengths).filter(|(_, length)| **length > 0) {
            let place = &mut starts[usize::from(*length)];
            *symbols.get_mut(*place)? = symbol;
            *place += 1;
        }
        Some(Self { counts, symbols })
    }

    fn decode(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let (mut code, mut first, mut index) = (0usize, 0usize, 0usize);
        for count in &self.counts[1..] {
            code |= usize::try_from(bits.take(1)?).ok()?;
            let count = usize::from(*count);
            if code < first + count {
                return self.symbols.get(index + (code - first)).copied();
            }
            index += count;
            first = (first + count) * 2;
            code *= 2;
        }
        None
    }
}

/// Bits of 16-bit numbers, the lower byte first, the highest bit first.
struct Bits<'p> {
    rest: &'p [u8],
    word: u32,
    /// How many bits of `word` are left: the lowest ones.
    left: u32,
}

impl<'p> Bits<'p> {
    fn new(rest: &'p [u8]) -> Self {
        Self { rest, word: 0, left: 0 }
    }

    /// At most 17 bits.
    fn take(&mut self, mut count: u32) -> Option<u32> {
        let mut value = 0;
        while count > 0 {
            if self.left == 0 {
                let (word, rest) = self.rest.split_first_chunk::<2>()?;
                (self.word, self.rest, self.left) = (u16::from_le_bytes(*word).into(), rest, 16);
            }
            let take = count.min(self.left);
            self.left -= take;
            value = value << take | self.word >> self.left & ((1 << take) - 1);
            count -= take;
        }
        Some(value)
    }

    /// Goes on at the next whole number; where one is over, the one behind it is passed.
    fn align(&mut self) -> Option<()> {
        if self.left == 0 {
            self.take(16)?;
        }
        self.left = 0;
        Some(())
    }

    fn bytes(&mut self, count: usize) -> Option<&'p [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(bytes)
    }
}
