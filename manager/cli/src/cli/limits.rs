//! The flags that say how far a scan goes and how it goes about it; `tm-agent scan` has the same.

use std::time::Duration;

use clap::Args;
use tm_protocol::task::{ScanLimits, ScanOptions};

use crate::duration;

/// How a scan goes about its work.
#[derive(Debug, Args)]
pub(crate) struct OptionArgs {
    /// Go on into other file systems of the endpoint (without it they are skipped: other-filesystem)
    #[arg(long)]
    pub(crate) all_local: bool,
    /// Most CPU time, on average, in percent of one core (1 to 100) [default: no limit]
    ///
    /// The scan then looks at files one by one, reads only what nobody else wants to read, and takes less while
    /// others wait for CPU, disk or memory.
    #[arg(long, value_name = "N%", value_parser = percent)]
    pub(crate) cpu: Option<u8>,
    /// Stay in the background: --cpu 10%
    #[arg(long, conflicts_with = "cpu")]
    pub(crate) background: bool,
    /// Look at what runs, what starts by itself, and where things are dropped
    ///
    /// Running programs, autostart places, /tmp, /var/tmp, /dev/shm, and in home folders what is executable or was
    /// changed within two weeks. Paths are looked at besides.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Look at every local file system; no --path stands beside it
    #[arg(long, conflicts_with_all = ["quick", "paths"])]
    pub(crate) full: bool,
    /// Look at the memory of running processes, too
    #[arg(long)]
    pub(crate) processes: bool,
    /// Read everything again, also what is known clean
    #[arg(long)]
    pub(crate) fresh: bool,
}

impl OptionArgs {
    pub(crate) fn options(&self) -> ScanOptions {
        ScanOptions {
            all_local: self.all_local,
            cpu_percent: self.cpu.or(self.background.then_some(ScanOptions::BACKGROUND_PERCENT)),
            quick: self.quick,
            full: self.full,
            processes: self.processes,
            fresh: self.fresh,
            dry_run: false,
        }
    }
}

/// How far to go with one file. What a limit cuts off is counted as skipped.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Read containers raw only; each one counts as skipped (limit)
    #[arg(long, conflicts_with = "max_depth")]
    pub(crate) no_archives: bool,
    /// Largest file to look at, for example 1GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_file_size: Option<u64>,
    /// How many containers deep to look; 0 reads archives raw only
    #[arg(long, value_name = "N")]
    pub(crate) max_depth: Option<u32>,
    /// Most members in the whole tree of one file
    #[arg(long, value_name = "N")]
    pub(crate) max_members: Option<u32>,
    /// Largest unpacked member, for example 256MiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_member_size: Option<u64>,
    /// Most unpacked bytes in the whole tree of one file, for example 1GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_total_size: Option<u64>,
    /// Largest unpacked size of one member, as a multiple of its packed size
    #[arg(long, value_name = "N")]
    pub(crate) max_ratio: Option<u32>,
    /// Longest time for one file
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) file_timeout: Option<Duration>,
}

impl LimitArgs {
    /// The defaults, but for what was said.
    pub(crate) fn limits(&self) -> ScanLimits {
        let default = ScanLimits::default();
        let depth = self.max_depth.unwrap_or(default.depth);
        ScanLimits {
            file_bytes: self.max_file_size.unwrap_or(default.file_bytes),
            depth: if self.no_archives { 0 } else { depth },
            members: self.max_members.unwrap_or(default.members),
            member_bytes: self.max_member_size.unwrap_or(default.member_bytes),
            total_bytes: self.max_total_size.unwrap_or(default.total_bytes),
            ratio: self.max_ratio.unwrap_or(default.ratio),
            file_ms: self
                .file_timeout
                .map_or(default.file_ms, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

/// `10%` or `10`: 1 to 100.
fn percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    let percent = number.parse().ok().filter(|percent| (1..=100).contains(percent));
    percent.ok_or_else(|| "expected a share of one core from 1% to 100%".to_owned())
}

/// `1GiB`, `256MiB`, `4KiB`, `512B` or plain bytes.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits).unwrap_or((text, ""));
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1_u64 << 40,
        _ => return Err("expected a size such as 512B, 64KiB, 256MiB or 1GiB".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a whole number before the unit".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_outside_of_sense_are_refused() {
        for (text, expected) in [("10%", Some(10)), ("1", Some(1)), ("100%", Some(100))] {
            assert_eq!(percent(text).ok(), expected);
        }
        for text in ["", "%", "0", "101%", "-1", "1.5", "10 %", "256"] {
            assert!(percent(text).is_err(), "{text}");
        }
        assert_eq!((size("2GiB"), size("7")), (Ok(2 << 30), Ok(7)));
        for text in ["", "GiB", "1GB", "1 GiB", "99999999999999999999", "17000000TiB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
