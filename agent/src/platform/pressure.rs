//! How much of the time something on this machine waits for CPU, disk or memory, as the kernel tells it (pressure
//! stall information, kernel 4.20 and later; not every kernel is built with it).
//!
//! The machine's own files count, and those of the control group that this process is in.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What is waited for.
const KINDS: [&str; 3] = ["cpu", "io", "memory"];

/// Where this machine tells its pressure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gauges(Vec<PathBuf>);

impl Gauges {
    /// Those of this machine and of this process's control group.
    pub(crate) fn find() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::within(Path::new("/proc/pressure"), Path::new("/sys/fs/cgroup"), &own)
    }

    /// `machine` has a file for each kind, `groups` a folder for each control group, `own` is what
    /// `/proc/self/cgroup` says. Files that cannot be read are left out.
    fn within(machine: &Path, groups: &Path, own: &str) -> Self {
        let of_machine = KINDS.iter().map(|kind| machine.join(kind));
        // The line of the unified hierarchy begins with `0::`; where older ones are in use it has a folder apart.
        let group = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let folders =
            group.into_iter().flat_map(|group| [groups.join(group), groups.join("unified").join(group)]);
        let of_group =
            folders.flat_map(|folder| KINDS.iter().map(move |kind| folder.join(format!("{kind}.pressure"))));
        Self(of_machine.chain(of_group).filter(|file| read(file).is_some()).collect())
    }

    /// The highest share of the last ten seconds in which something waited, in hundredths of a percent. `None` if
    /// this machine does not tell.
    pub(crate) fn read(&self) -> Option<u32> {
        self.0.iter().filter_map(|file| read(file)).max()
    }
}

fn read(file: &Path) -> Option<u32> {
    some_avg10(&fs::read_to_string(file).ok()?)
}

/// Reads `some avg10=12.34 …` as 1234.
fn some_avg10(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let number = line.split(' ').find_map(|word| word.strip_prefix("avg10="))?;
    let (whole, part) = number.split_once('.')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if part.len() != 2 || !digits(whole) || !digits(part) {
        return None;
    }
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(part.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read_and_nonsense_is_not() {
        let real = "some avg10=98.46 avg60=60.90 avg300=29.03 total=6393007364\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(some_avg10(real), Some(9846));
        assert_eq!(some_avg10("some avg10=0.00 avg60=0.00 avg300=0.00 total=0"), Some(0));
        assert_eq!(some_avg10("some avg10=100.00 avg60=1.00"), Some(10_000));
        for text in [
            "",
            "full avg10=1.00",
            "some",
            "some avg10=",
            "some avg10=1",
            "some avg10=1.5",
            "some avg10=-1.00",
        ] {
            assert_eq!(some_avg10(text), None, "{text}");
        }
        assert_eq!(some_avg10("some avg10=99999999999.00"), None);
    }

    #[test]
    fn the_highest_counts_and_what_is_not_there_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (machine, groups) = (folder.path().join("pressure"), folder.path().join("groups"));
        let line = |number: &str| format!("some avg10={number} avg60=0.00 avg300=0.00 total=0\n");
        let none = Gauges::within(&machine, &groups, "0::/a/b\n");
        assert_eq!(none.read(), None, "an old kernel");
        fs::create_dir_all(&machine).unwrap();
        fs::create_dir_all(groups.join("a/b")).unwrap();
        fs::write(machine.join("cpu"), line("3.00")).unwrap();
        fs::write(machine.join("io"), line("7.25")).unwrap();
        assert_eq!(Gauges::within(&machine, &groups, "").read(), Some(725));
        fs::write(groups.join("a/b/memory.pressure"), line("50.00")).unwrap();
        let own = "4:memory:/x\n0::/a/b\n";
        let gauges = Gauges::within(&machine, &groups, own);
        assert_eq!(gauges.read(), Some(5000), "its own group");
        fs::write(groups.join("a/b/memory.pressure"), line("0.00")).unwrap();
        assert_eq!(gauges.read(), Some(725), "read anew each time");
        fs::write(machine.join("io"), "broken").unwrap();
        assert_eq!(gauges.read(), Some(300));
    }
}
