//! What this endpoint is: the inventory.

use std::fs;

use sysinfo::{Disks, Networks, System};
use tm_protocol::message::{Disk, Inventory};

/// Longest text sent for one fact, in bytes.
const MAX_TEXT: usize = 256;
/// Most addresses and file systems sent.
const MAX_LIST: usize = 64;

/// The host name as the system says it.
pub(crate) fn host_name() -> String {
    cut(System::host_name().unwrap_or_else(|_| "localhost".to_owned()))
}

/// Changes with each boot of the machine.
pub(crate) fn boot_id() -> String {
    cut(fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned())
}

/// All facts; takes some milliseconds of CPU and blocks.
pub(crate) fn inventory() -> Inventory {
    // A fact that the system does not give is left empty: the others are still worth having.
    let system = System::new().ok().map(|mut system| {
        system.refresh_memory();
        system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
        system
    });
    let cpus = system.as_ref().map(System::cpus).unwrap_or_default();
    let networks = Networks::new_with_refreshed_list().ok();
    let mut addresses: Vec<String> = networks
        .iter()
        .flat_map(|networks| networks.iter())
        .filter(|(name, _)| name.as_encoded_bytes() != b"lo")
        .flat_map(|(_, data)| data.ip_networks().iter().map(|network| network.addr.to_string()))
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses.truncate(MAX_LIST);
    let mounted = Disks::new_with_refreshed_list().ok();
    let mut disks: Vec<Disk> = mounted
        .iter()
        .flat_map(|disks| disks.iter())
        .map(|disk| Disk {
            mount: cut(disk.mount_point().to_string_lossy().into_owned()),
            filesystem: cut(disk.file_system().to_string_lossy().into_owned()),
            total: disk.total_space(),
        })
        .collect();
    disks.sort_by(|a, b| a.mount.cmp(&b.mount));
    disks.dedup_by(|a, b| a.mount == b.mount);
    disks.truncate(MAX_LIST);
    Inventory {
        host: host_name(),
        os: cut(System::long_os_version().unwrap_or_default()),
        kernel: cut(System::kernel_version().unwrap_or_default()),
        arch: std::env::consts::ARCH.to_owned(),
        cpu: cut(cpus.first().map(|cpu| cpu.brand().to_owned()).unwrap_or_default()),
        cpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        memory: system.as_ref().map_or(0, System::total_memory),
        disks,
        addresses,
        boot_id: boot_id(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
    }
    text
}
