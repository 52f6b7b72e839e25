//! Makes the compiled form out of entries.
//!
//! **Invariant:** the bytes depend on which entries there are and on nothing else, neither their order nor how
//! often each is given.

use sha2::{Digest as _, Sha256};

use super::{
    Algorithm, filter,
    layout::{ALL_SIZED, ANY_SIZE, HEADER, MAGIC, NAMES, SIZES, TABLE, VERSION},
};

/// Stands for no name while entries are put in order: one with a name comes first.
const UNNAMED: u32 = u32::MAX;

/// Entries of one algorithm: digest, size, and the number of a name.
#[derive(Debug)]
pub(super) struct Rows<const N: usize>(Vec<Row<N>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Row<const N: usize> {
    digest: [u8; N],
    size: u64,
    name: u32,
}

impl<const N: usize> Rows<N> {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    /// `name` is its number in the list of names.
    pub(super) fn push(&mut self, digest: [u8; N], size: Option<u64>, name: Option<u32>) {
        self.0.push(Row { digest, size: size.unwrap_or(ANY_SIZE), name: name.unwrap_or(UNNAMED) });
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Puts the rows in order, each once; `ranks` are the places of names when these are in order.
    fn settle(&mut self, ranks: &[u32]) {
        let rank = |name: u32| usize::try_from(name).ok().and_then(|name| ranks.get(name)).copied();
        self.0.iter_mut().for_each(|row| row.name = rank(row.name).unwrap_or(UNNAMED));
        self.0.sort_unstable();
        self.0.dedup_by(|next, first| next.digest == first.digest && next.size == first.size);
    }

    fn names(&self) -> impl Iterator<Item = usize> {
        self.0.iter().filter_map(|row| usize::try_from(row.name).ok().filter(|_| row.name != UNNAMED))
    }

    /// Appends the table's part of the header and of the body; `numbers` are those of names that are used, from 1.
    fn write(self, header: &mut Vec<u8>, body: &mut Vec<u8>, numbers: &[u32]) {
        let rows = self.0;
        let digests: Vec<[u8; N]> = rows.iter().map(|row| row.digest).collect();
        let (shape, bytes) = filter::build(&digests);
        let has_sizes = rows.iter().any(|row| row.size != ANY_SIZE);
        let has_names = rows.iter().any(|row| row.name != UNNAMED);
        let mut distinct: Vec<u64> = rows.iter().map(|row| row.size).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let all_sized = has_sizes && distinct.last() != Some(&ANY_SIZE);
        if !all_sized {
            distinct.clear();
        }
        let flags = [(has_sizes, SIZES), (has_names, NAMES), (all_sized, ALL_SIZED)];
        let flags: u64 = flags.into_iter().filter_map(|(is_set, flag)| is_set.then_some(flag)).sum();
        for number in [wide(rows.len()), flags, wide(distinct.len()), shape.salt, shape.seed] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        header.extend_from_slice(&shape.segment.to_le_bytes());
        header.extend_from_slice(&shape.segments.to_le_bytes());
        header.extend_from_slice(&wide(shape.length).to_le_bytes());

        body.extend_from_slice(&bytes);
        digests.iter().for_each(|digest| body.extend_from_slice(digest));
        if has_sizes {
            rows.iter().for_each(|row| body.extend_from_slice(&row.size.to_le_bytes()));
        }
        if has_names {
            for row in &rows {
                let number = usize::try_from(row.name).ok().and_then(|name| numbers.get(name)).copied();
                body.extend_from_slice(&number.unwrap_or(0).to_le_bytes());
            }
        }
        distinct.iter().for_each(|size| body.extend_from_slice(&size.to_le_bytes()));
    }
}

/// The compiled form of all entries; `names` by their numbers, each once.
pub(super) fn write(
    (mut md5, mut sha1, mut sha256): (Rows<16>, Rows<20>, Rows<32>),
    names: &[&str],
) -> Vec<u8> {
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_unstable_by_key(|at| names.get(*at));
    let mut ranks = vec![UNNAMED; names.len()];
    for (rank, at) in (0..).zip(&order) {
        if let Some(place) = ranks.get_mut(*at) {
            *place = rank;
        }
    }
    md5.settle(&ranks);
    sha1.settle(&ranks);
    sha256.settle(&ranks);
    // A duplicate may have been the only one that used a name.
    let mut numbers = vec![0; names.len()];
    for rank in md5.names().chain(sha1.names()).chain(sha256.names()) {
        if let Some(number) = numbers.get_mut(rank) {
            *number = 1;
        }
    }
    let (mut ends, mut text, mut last) = (Vec::new(), Vec::new(), 0u32);
    for (number, at) in numbers.iter_mut().zip(&order).filter(|(number, _)| **number > 0) {
        text.extend_from_slice(names.get(*at).copied().unwrap_or_default().as_bytes());
        ends.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
        last = last.saturating_add(1);
        *number = last;
    }

    let mut tables = Vec::with_capacity(3 * TABLE);
    let rows = md5.len() * Algorithm::Md5.length()
        + sha1.len() * Algorithm::Sha1.length()
        + sha256.len() * Algorithm::Sha256.length();
    let mut body = Vec::with_capacity(rows + rows / 8);
    md5.write(&mut tables, &mut body, &numbers);
    sha1.write(&mut tables, &mut body, &numbers);
    sha256.write(&mut tables, &mut body, &numbers);
    body.extend_from_slice(&ends);
    body.extend_from_slice(&text);

    let mut bytes = Vec::with_capacity(HEADER + body.len() + 32);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    for number in [HEADER + body.len() + 32, ends.len() / 4, text.len()] {
        bytes.extend_from_slice(&wide(number).to_le_bytes());
    }
    bytes.append(&mut tables);
    bytes.append(&mut body);
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    bytes
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
