//! Lines out of blocks of bytes, in bounded memory.

/// Longest line that is looked at, in bytes; longer ones are skipped. A path has at most 4096.
const MAX_LINE: usize = 16 * 1024;

/// What of a line has come so far.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    is_too_long: bool,
}

impl Lines {
    /// Takes the next block and gives each line that it completes to `visit`, without its end.
    pub(super) fn take(&mut self, block: &[u8], visit: &mut dyn FnMut(&[u8])) {
        let mut rest = block;
        while let Some(at) = rest.iter().position(|b| *b == b'\n') {
            let (line, after) = rest.split_at(at);
            if self.begun.is_empty() && !self.is_too_long && line.len() <= MAX_LINE {
                visit(line);
            } else {
                self.add(line);
                self.end(visit);
            }
            self.begun.clear();
            self.is_too_long = false;
            rest = after.get(1..).unwrap_or_default();
        }
        self.add(rest);
    }

    /// Gives the last line to `visit`, if it has no end.
    pub(super) fn end(&self, visit: &mut dyn FnMut(&[u8])) {
        if !self.begun.is_empty() && !self.is_too_long {
            visit(&self.begun);
        }
    }

    fn add(&mut self, part: &[u8]) {
        self.is_too_long |= self.begun.len() + part.len() > MAX_LINE;
        if self.is_too_long {
            self.begun.clear();
        } else {
            self.begun.extend_from_slice(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_however_they_come() {
        let mut text = b"one\n\ntwo \xff\n".to_vec();
        text.extend([b'x'; MAX_LINE]);
        text.push(b'\n');
        text.extend([b'y'; MAX_LINE + 1]);
        text.extend(b"\nafter\nlast");
        let expected: Vec<Vec<u8>> = vec![
            b"one".into(),
            b"".into(),
            b"two \xff".into(),
            vec![b'x'; MAX_LINE],
            b"after".into(),
            b"last".into(),
        ];
        for size in [1, 2, 3, 7, 4096, MAX_LINE, MAX_LINE + 1, text.len()] {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            let mut visit = |line: &[u8]| seen.push(line.to_vec());
            text.chunks(size).for_each(|block| lines.take(block, &mut visit));
            lines.end(&mut visit);
            assert_eq!(seen.len(), expected.len(), "in blocks of {size}");
            assert!(seen == expected, "in blocks of {size}");
        }
    }
}
