//! A folder's coders, put together to one reader.

use std::io::{self, Read};

use lzma_rust2::filter::{bcj::BcjReader, bcj2::Bcj2Reader, delta::DeltaReader};
use tm_protocol::report::SkipReason;

use super::header::{Chain, Coder};
use crate::archive::{
    codec::{self, Decoder},
    field,
};

/// What a coder reads.
enum Source<'b> {
    Packed(&'b [u8]),
    Made(Box<dyn Read + 'b>),
}

impl Read for Source<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Packed(bytes) => bytes.read(out),
            Self::Made(reader) => reader.read(out),
        }
    }
}

/// A chain that is put together.
struct Assembly<'c, 'h, 'b> {
    chain: &'c Chain<'h>,
    packed: &'c [&'b [u8]],
    sizes: &'c [u64],
    taken: Vec<bool>,
    workspace: u64,
}

/// The reader of what comes out of `chain`, fed with `packed` streams; `sizes` are those that its coders make.
pub(super) fn open<'b>(
    chain: &Chain<'_>,
    packed: &[&'b [u8]],
    sizes: &[u64],
) -> Result<Decoder<'b>, SkipReason> {
    // All methods of this family encrypt.
    if chain.coders.iter().any(|coder| coder.method.first() == Some(&6)) {
        return Err(SkipReason::Encrypted);
    }
    let last = chain.last().ok_or(SkipReason::Malformed)?;
    let mut assembly = Assembly { chain, packed, sizes, taken: vec![false; sizes.len()], workspace: 0 };
    let reader = assembly.output(last)?;
    if assembly.taken.contains(&false) {
        return Err(SkipReason::Malformed);
    }
    Ok(Decoder { reader: Box::new(reader), workspace: assembly.workspace })
}

impl<'b> Assembly<'_, '_, 'b> {
    /// What comes out of the coder that makes `output`. Each is taken once, so this ends.
    fn output(&mut self, output: usize) -> Result<Source<'b>, SkipReason> {
        let taken = self.taken.get_mut(output).ok_or(SkipReason::Malformed)?;
        if std::mem::replace(taken, true) {
            return Err(SkipReason::Malformed);
        }
        let size = *self.sizes.get(output).ok_or(SkipReason::Malformed)?;
        let chain = self.chain;
        // No coder that is known has two outputs, so outputs are coders.
        if chain.coders.iter().any(|coder| coder.outputs != 1) {
            return Err(SkipReason::Unsupported);
        }
        let coder = chain.coders.get(output).ok_or(SkipReason::Malformed)?;
        let before = chain.coders.iter().take(output).map(|coder| coder.inputs).sum::<usize>();
        let inputs =
            (before..before + coder.inputs).map(|input| self.input(input)).collect::<Result<Vec<_>, _>>()?;
        self.coder(coder, inputs, size)
    }

    fn input(&mut self, input: usize) -> Result<Source<'b>, SkipReason> {
        let packed = self.chain.packed.iter().position(|packed| *packed == input);
        if let Some(bytes) = packed.and_then(|at| self.packed.get(at)) {
            return Ok(Source::Packed(bytes));
        }
        let bound = self.chain.bound.iter().find(|(bound, _)| *bound == input);
        self.output(bound.ok_or(SkipReason::Malformed)?.1)
    }

    fn coder(
        &mut self,
        coder: &Coder<'_>,
        inputs: Vec<Source<'b>>,
        size: u64,
    ) -> Result<Source<'b>, SkipReason> {
        if coder.method == BCJ2 {
            self.workspace = self.workspace.saturating_add(1 << 20);
            let reader = Bcj2Reader::try_new(inputs, size).map_err(|error| codec::reason(&error))?;
            return Ok(Source::Made(Box::new(Exactly::new(reader, size, false))));
        }
        let [input] = <[_; 1]>::try_from(inputs).map_err(|_| SkipReason::Unsupported)?;
        let properties = coder.properties;
        // Whether the coded stream has an end of its own.
        let ends = !matches!(coder.method, LZMA | PPMD);
        let decoder = match coder.method {
            [0] => return copied(input, size),
            LZMA => {
                let decoder = codec::lzma(input, properties, Some(size))?;
                codec::within(decoder, size)
            }
            LZMA2 => {
                let property = *properties.first().ok_or(SkipReason::Malformed)?;
                codec::within(codec::lzma2(input, property)?, size)
            }
            PPMD => codec::ppmd7(input, properties)?,
            [4, 2, 2] => codec::bzip2(input),
            [4, 1, 8] => codec::deflate(input),
            [4, 1, 9] => codec::deflate64(input),
            [4, 0xf7, 0x11, 1] => match input {
                Source::Packed(bytes) => codec::zstd(bytes)?,
                Source::Made(_) => return Err(SkipReason::Unsupported),
            },
            _ => filter(coder, input)?,
        };
        self.workspace = self.workspace.saturating_add(decoder.workspace);
        Ok(Source::Made(Box::new(Exactly::new(decoder.reader, size, ends))))
    }
}

const LZMA: &[u8] = &[3, 1, 1];
const LZMA2: &[u8] = &[0x21];
const PPMD: &[u8] = &[3, 4, 1];
const BCJ2: &[u8] = &[3, 3, 1, 0x1b];

/// Bytes as they are.
fn copied(input: Source<'_>, size: u64) -> Result<Source<'_>, SkipReason> {
    Ok(Source::Made(Box::new(Exactly::new(input, size, true))))
}

/// Filters that change a program's addresses, or bytes by those before them.
fn filter<'b>(coder: &Coder<'_>, input: Source<'b>) -> Result<Decoder<'b>, SkipReason> {
    let properties = coder.properties;
    if coder.method == [3] {
        let distance = usize::from(*properties.first().ok_or(SkipReason::Malformed)?) + 1;
        return Ok(codec::filtered(DeltaReader::new(input, distance)));
    }
    // Where the program is thought to begin.
    let start = field::index(field::le(properties, 0, 4).unwrap_or(0));
    let reader = match coder.method {
        [3, 3, 1, 3] | [4] => BcjReader::new_x86(input, start),
        [3, 3, 2, 5] | [5] => BcjReader::new_ppc(input, start),
        [3, 3, 4, 1] | [6] => BcjReader::new_ia64(input, start),
        [3, 3, 5, 1] | [7] => BcjReader::new_arm(input, start),
        [3, 3, 7, 1] | [8] => BcjReader::new_arm_thumb(input, start),
        [3, 3, 8, 5] | [9] => BcjReader::new_sparc(input, start),
        [0x0a] => BcjReader::new_arm64(input, start),
        [0x0b] => BcjReader::new_riscv(input, start),
        _ => return Err(SkipReason::Unsupported),
    };
    Ok(codec::filtered(reader))
}

/// As much as is told comes out of a coder; less is an error, and so is more, where the coder knows its end.
struct Exactly<R> {
    inner: R,
    left: u64,
    probe: bool,
}

impl<R: Read> Exactly<R> {
    fn new(inner: R, size: u64, ends: bool) -> Self {
        Self { inner, left: size, probe: ends }
    }
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            let more = std::mem::take(&mut self.probe) && self.inner.read(&mut [0])? > 0;
            return if more { Err(io::ErrorKind::InvalidData.into()) } else { Ok(0) };
        }
        let room = field::index(self.left).min(out.len());
        let got = self.inner.read(out.get_mut(..room).unwrap_or_default())?;
        if got == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.left -= u64::try_from(got).unwrap_or(u64::MAX);
        Ok(got)
    }
}
