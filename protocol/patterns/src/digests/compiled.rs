//! Looks digests up in a compiled list, where it lies.
//!
//! **Invariant:** whatever the bytes are, a look-up ends without a panic and reads nothing but them.

use std::cmp::Ordering;

use sha2::{Digest as _, Sha256};

use super::{
    Algorithm, Counts, Digest, InvalidCompiled,
    layout::{ANY_SIZE, Layout, Table},
    parse::MAX_NAME,
};

/// A compiled list in bytes of whatever owner.
#[derive(Debug)]
pub struct Compiled<B> {
    bytes: B,
    layout: Layout,
}

/// An entry that a digest and a size were found in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// What people call it; may be empty. Hostile text: escape it where it is shown.
    pub name: String,
}

impl<B: AsRef<[u8]>> Compiled<B> {
    /// Reads where the parts of `bytes` lie. Takes the same time whatever their number; [`Self::check`] looks at
    /// all of them.
    ///
    /// # Errors
    /// If they are not a compiled list, or its parts do not fit.
    pub fn open(bytes: B) -> Result<Self, InvalidCompiled> {
        let layout = Layout::read(bytes.as_ref(), bytes.as_ref().len())?;
        Ok(Self { bytes, layout })
    }

    /// How many entries there are.
    pub fn counts(&self) -> Counts {
        self.layout.counts()
    }

    /// Whether a file of `size` bytes may be in the list by this algorithm: there are entries, and one of them is for
    /// any size or for this one.
    pub fn wants(&self, algorithm: Algorithm, size: u64) -> bool {
        let table = self.table(algorithm);
        let distinct = |at: usize| {
            self.search(table.distinct, |index| self.long(at, index).map(|distinct| distinct.cmp(&size)))
        };
        table.count > 0 && table.distinct_at.is_none_or(|at| distinct(at).is_some())
    }

    /// The entry that is for `digest` and for `size` bytes, or else for any size.
    pub fn find(&self, digest: &Digest, size: u64) -> Option<Hit> {
        let table = self.table(digest.algorithm());
        let filter = self.part(table.filter_at, table.filter.length)?;
        if table.count == 0 || !table.filter.may_hold(filter, digest.as_bytes()) {
            return None;
        }
        let with_size = |wanted: u64| {
            self.search(table.count, |index| {
                let order = self.digest(table, digest.algorithm(), index)?.cmp(digest.as_bytes());
                Some(order.then(self.size(table, index)?.cmp(&wanted)))
            })
        };
        let index = with_size(size).or_else(|| with_size(ANY_SIZE))?;
        // A copy: whoever owns a list that is used where it lies could change it between the check and the use.
        let name = self.name_number(table, index).and_then(|number| self.name_bytes(number));
        Some(Hit { name: name.and_then(|name| String::from_utf8(name.to_vec()).ok()).unwrap_or_default() })
    }

    /// Looks at every entry: order, sizes, names, filters, and the digest at the end. Takes time in proportion to
    /// their number.
    ///
    /// # Errors
    /// With what is wrong, if anything is.
    pub fn check(&self) -> Result<(), InvalidCompiled> {
        let damaged = InvalidCompiled::Damaged;
        let body = self.part(0, self.layout.body).ok_or(InvalidCompiled::Length)?;
        if self.bytes.as_ref().get(self.layout.body..) != Some(Sha256::digest(body).as_slice()) {
            return Err(damaged("its digest differs"));
        }
        let mut begin = 0;
        for index in 0..self.layout.names {
            let end = self.word(self.layout.name_ends_at, index).ok_or(damaged("names"))?;
            let name = self.name(index).ok_or(damaged("names"))?;
            if end <= begin || name.len() > MAX_NAME {
                return Err(damaged("names"));
            }
            begin = end;
        }
        if usize::try_from(begin) != Ok(self.layout.text) {
            return Err(damaged("names"));
        }
        Algorithm::ALL.into_iter().try_for_each(|algorithm| self.check_table(algorithm).map_err(damaged))
    }

    fn check_table(&self, algorithm: Algorithm) -> Result<(), &'static str> {
        let table = self.table(algorithm);
        let filter = self.part(table.filter_at, table.filter.length).ok_or("filter")?;
        let mut previous: Option<(&[u8], u64)> = None;
        for index in 0..table.count {
            let entry = self.digest(table, algorithm, index).zip(self.size(table, index)).ok_or("digests")?;
            if previous.is_some_and(|previous| previous >= entry) {
                return Err("digests are not in order");
            }
            previous = Some(entry);
            let (digest, size) = entry;
            if !table.filter.may_hold(filter, digest) {
                return Err("the filter lacks a digest");
            }
            if !self.wants(algorithm, size) {
                return Err("a size is not among the sizes");
            }
            if let Some(at) = table.names_at {
                let number = self.word(at, index).and_then(|number| usize::try_from(number).ok());
                if number.is_none_or(|number| number > self.layout.names) {
                    return Err("a name is not there");
                }
            }
        }
        let sizes = table.distinct_at.map_or(0..0, |_| 0..table.distinct);
        let distinct = |index| table.distinct_at.and_then(|at| self.long(at, index));
        let in_order = sizes.clone().zip(sizes.skip(1)).all(|(a, b)| distinct(a) < distinct(b));
        if in_order { Ok(()) } else { Err("sizes are not in order") }
    }

    /// Digest, size (all ones for any) and name (empty for none) of an entry, counted from 0 in the table's order.
    pub(super) fn row(&self, algorithm: Algorithm, index: usize) -> Option<(&[u8], u64, &str)> {
        let table = self.table(algorithm);
        let digest = self.digest(table, algorithm, index)?;
        Some((digest, self.size(table, index)?, self.name_of(table, index).unwrap_or_default()))
    }

    fn table(&self, algorithm: Algorithm) -> &Table {
        let [md5, sha1, sha256] = &self.layout.tables;
        match algorithm {
            Algorithm::Md5 => md5,
            Algorithm::Sha1 => sha1,
            Algorithm::Sha256 => sha256,
        }
    }

    /// Binary search. In a column that is not in order it ends all the same.
    fn search(&self, count: usize, order: impl Fn(usize) -> Option<Ordering>) -> Option<usize> {
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            match order(middle)? {
                Ordering::Equal => return Some(middle),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        None
    }

    fn part(&self, at: usize, length: usize) -> Option<&[u8]> {
        self.bytes.as_ref().get(at..at.checked_add(length)?)
    }

    fn field<const N: usize>(&self, at: usize, index: usize) -> Option<[u8; N]> {
        self.part(index.checked_mul(N)?.checked_add(at)?, N)?.first_chunk().copied()
    }

    fn long(&self, at: usize, index: usize) -> Option<u64> {
        self.field(at, index).map(u64::from_le_bytes)
    }

    fn word(&self, at: usize, index: usize) -> Option<u32> {
        self.field(at, index).map(u32::from_le_bytes)
    }

    fn digest(&self, table: &Table, algorithm: Algorithm, index: usize) -> Option<&[u8]> {
        let length = algorithm.length();
        self.part(index.checked_mul(length)?.checked_add(table.digests_at)?, length)
    }

    fn size(&self, table: &Table, index: usize) -> Option<u64> {
        table.sizes_at.map_or(Some(ANY_SIZE), |at| self.long(at, index))
    }

    /// Which name an entry has.
    fn name_number(&self, table: &Table, index: usize) -> Option<usize> {
        usize::try_from(self.word(table.names_at?, index)?).ok()?.checked_sub(1)
    }

    fn name_of(&self, table: &Table, index: usize) -> Option<&str> {
        self.name(self.name_number(table, index)?)
    }

    fn name(&self, index: usize) -> Option<&str> {
        std::str::from_utf8(self.name_bytes(index)?).ok()
    }

    fn name_bytes(&self, index: usize) -> Option<&[u8]> {
        let ends = self.layout.name_ends_at;
        let begin = match index.checked_sub(1).filter(|_| index < self.layout.names) {
            Some(previous) => self.word(ends, previous)?,
            None => 0,
        };
        let end = self.word(ends, index).filter(|_| index < self.layout.names)?;
        let (begin, end) = (usize::try_from(begin).ok()?, usize::try_from(end).ok()?);
        self.part(self.layout.text_at, self.layout.text)?.get(begin..end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::List, *};

    fn compile(text: &str) -> Vec<u8> {
        let mut list = List::new();
        list.feed(text.as_bytes()).unwrap();
        list.finish().unwrap().0
    }

    fn md5(n: u8) -> Digest {
        Digest::Md5([n; 16])
    }

    /// Every kind of column, and a filter.
    fn sample() -> Vec<u8> {
        let mut text = format!("{}:10:Win.A\n{}:*:Win.B\n", "01".repeat(16), "02".repeat(16));
        text += &format!("{}:20:X\n{}:30:Y\n", "03".repeat(20), "04".repeat(20));
        for n in 0..70u8 {
            text += &format!("{:02x}{},name{}\n", n, "55".repeat(31), n % 7);
        }
        compile(&text)
    }

    #[test]
    fn entries_are_found_by_digest_and_size() {
        let list = Compiled::open(sample()).unwrap();
        list.check().unwrap();
        assert_eq!(list.counts().to_string(), "70 SHA-256, 2 SHA-1, 2 MD5");
        let name = |digest, size| list.find(&digest, size).map(|hit| hit.name);
        assert_eq!(name(md5(1), 10).as_deref(), Some("Win.A"));
        assert_eq!(name(md5(1), 11), None, "its size differs");
        assert_eq!(name(md5(2), 11).as_deref(), Some("Win.B"));
        assert_eq!(name(md5(3), 11), None);
        assert_eq!(name(Digest::Sha1([3; 20]), 20).as_deref(), Some("X"));
        assert_eq!(name(Digest::Sha1([3; 20]), 30), None, "that is another one's size");
        for n in 0..70 {
            let mut digest = [0x55; 32];
            digest[0] = n;
            assert_eq!(name(Digest::Sha256(digest), 5), Some(format!("name{}", n % 7)));
            digest[31] = 0;
            assert_eq!(name(Digest::Sha256(digest), 5), None);
        }
        let wants = |algorithm, size| list.wants(algorithm, size);
        assert!(wants(Algorithm::Md5, 10) && wants(Algorithm::Md5, 11), "one of them is for any size");
        assert!(wants(Algorithm::Sha1, 20) && wants(Algorithm::Sha1, 30) && !wants(Algorithm::Sha1, 25));
        assert!(wants(Algorithm::Sha256, 0));
        let only = Compiled::open(compile(&"07".repeat(16))).unwrap();
        assert!(!only.wants(Algorithm::Sha256, 0), "there are none");
        assert_eq!(only.find(&md5(7), 0), Some(Hit { name: String::new() }));
    }

    #[test]
    fn the_same_entries_give_the_same_bytes() {
        let (a, b, c) = ("aa".repeat(32), "bb".repeat(32), "cc".repeat(16));
        let one = compile(&format!("{a},Trojan\n{b}\n{c}:5:Worm\n{a}\n"));
        let other =
            compile(&format!("# the same\r\n{c}:5:Worm\r\n\r\n{b}\r\n{}  Trojan\r\n{b}", a.to_uppercase()));
        assert_eq!(one, other);
        assert_ne!(one, compile(&format!("{a},Trojan\n{b}\n{c}:6:Worm\n")));
        let list = Compiled::open(one).unwrap();
        assert_eq!(list.counts().total(), 3, "duplicates are one");
        let hit = list.find(&Digest::Sha256([0xaa; 32]), 0);
        assert_eq!(hit, Some(Hit { name: "Trojan".to_owned() }), "one that has a name is kept");
    }

    #[test]
    fn a_digest_of_several_sizes_is_found_by_each() {
        let digest = "0a".repeat(16);
        let list = Compiled::open(compile(&format!("{digest}:5:five\n{digest}:7:seven\n"))).unwrap();
        let name = |size| list.find(&md5(10), size).map(|hit| hit.name);
        assert_eq!([5, 6, 7].map(name), [Some("five".to_owned()), None, Some("seven".to_owned())]);
        let list = Compiled::open(compile(&format!("{digest}:5:five\n{digest}:*:any\n"))).unwrap();
        let name = |size| list.find(&md5(10), size).map(|hit| hit.name);
        assert_eq!([5, 6].map(name), [Some("five".to_owned()), Some("any".to_owned())]);
    }

    /// Asks everything that can be asked.
    fn use_all(bytes: &[u8]) -> Option<InvalidCompiled> {
        let list = match Compiled::open(bytes) {
            Ok(list) => list,
            Err(error) => return Some(error),
        };
        for n in 0..=5 {
            for digest in [md5(n), Digest::Sha1([n; 20]), Digest::Sha256([0x55; 32]), Digest::Sha256([n; 32])]
            {
                for size in [0, 10, 20, u64::MAX] {
                    let _ = (list.find(&digest, size), list.wants(digest.algorithm(), size));
                }
            }
        }
        list.check().err()
    }

    #[test]
    fn every_byte_that_is_turned_and_every_cut_is_noticed() {
        let good = sample();
        assert_eq!(use_all(&good), None, "the control");
        for length in 0..good.len() {
            assert!(use_all(&good[..length]).is_some(), "cut to {length}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(use_all(&bad).is_some(), "a bit of byte {at}");
        }
        let mut longer = good;
        longer.push(0);
        assert_eq!(use_all(&longer), Some(InvalidCompiled::Length));
    }

    /// Makes the digest at the end right again, as a forger would.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        if let Some(body) = bytes.len().checked_sub(32) {
            let digest = Sha256::digest(&bytes[..body]);
            bytes[body..].copy_from_slice(&digest);
        }
        bytes
    }

    #[test]
    fn a_forged_list_panics_nowhere() {
        let good = sample();
        assert_eq!(use_all(&sealed(good.clone())), None, "the control");
        let mut refused = 0;
        for at in 0..good.len() - 32 {
            for value in [0, 0xff, good[at].wrapping_add(1)] {
                let mut bad = good.clone();
                bad[at] = value;
                refused += usize::from(use_all(&sealed(bad)).is_some());
            }
        }
        // Another digest is as good as the one that was there.
        assert!(refused > good.len() / 2, "{refused} of {}", 3 * good.len());
    }

    proptest! {
        #[test]
        fn changed_bytes_panic_nowhere(changes in prop::collection::vec((0usize..3000, any::<u8>()), 1..6), cut in any::<prop::sample::Index>()) {
            let mut bytes = sample();
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            use_all(&sealed(bytes.clone()));
            bytes.truncate(cut.index(bytes.len()));
            use_all(&sealed(bytes));
        }

        #[test]
        fn what_is_put_in_is_found_and_nothing_else(
            entries in prop::collection::btree_map(any::<[u8; 20]>(), (prop::option::of(0u64..1000), "[a-zA-Z][a-zA-Z.]{0,8}"), 1..200),
            others in prop::collection::vec(any::<[u8; 20]>(), 0..50),
        ) {
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            let line = |(digest, (size, name)): (&[u8; 20], &(Option<u64>, String))| {
                let size = size.map_or("*".to_owned(), |size| size.to_string());
                format!("{}:{size}:{name}\n", hex(digest))
            };
            let list = Compiled::open(compile(&entries.iter().map(line).collect::<String>())).unwrap();
            prop_assert_eq!(list.check(), Ok(()));
            for (digest, (size, name)) in &entries {
                let found = list.find(&Digest::Sha1(*digest), size.unwrap_or(77));
                prop_assert_eq!(found.map(|hit| hit.name), Some(name.clone()));
                prop_assert!(size.is_none() || list.find(&Digest::Sha1(*digest), 1001).is_none());
            }
            for digest in others.iter().filter(|digest| !entries.contains_key(*digest)) {
                prop_assert!(list.find(&Digest::Sha1(*digest), 5).is_none());
            }
        }
    }
}
