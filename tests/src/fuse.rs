//! A file system in user space that answers what it is asked until it is told to be silent.
//!
//! It speaks just enough of the kernel's protocol (`linux/fuse.h`, 7.31) to show one folder of files and folders.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

const ROOT: u64 = 1;
const HEADER: usize = 40;
const NO_ENTRY: i32 = -2;
const NOT_KNOWN: i32 = -38;

/// What may stay unanswered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Silence {
    /// Every request that is not needed to mount.
    All,
    /// Questions for this name.
    Lookup(&'static str),
    /// Listing the folder of this name.
    List(&'static str),
    /// Opening the file of this name.
    Open(&'static str),
    /// Reading the file of this name.
    Read(&'static str),
}

/// A mounted file system; unmounted when dropped, and whoever waits for it is released with an error.
#[derive(Debug)]
pub struct Fuse {
    path: PathBuf,
    shared: Arc<Shared>,
    device: Option<File>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Content by node number, from 2; `None` is an empty folder.
    nodes: BTreeMap<u64, (&'static str, Option<Vec<u8>>)>,
    silences: Mutex<Vec<Silence>>,
    reads: AtomicBool,
    ended: AtomicBool,
    unanswered: AtomicU64,
}

impl Fuse {
    /// Mounts one on a folder, which is made if it is missing, with these files (`None`: an empty folder).
    ///
    /// # Panics
    /// If it cannot be mounted (that needs root).
    pub fn mount(path: &Path, entries: &[(&'static str, Option<&[u8]>)]) -> Self {
        fs::create_dir_all(path).expect("a mount point can be made");
        let device =
            File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse can be opened");
        let nodes =
            (ROOT + 1..).zip(entries.iter().map(|(name, content)| (*name, content.map(<[u8]>::to_vec))));
        let shared = Arc::new(Shared {
            nodes: nodes.collect(),
            silences: Mutex::new(Vec::new()),
            reads: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            unanswered: AtomicU64::new(0),
        });
        // It must answer already while `mount` looks at what it has done.
        let (served, heard) = (device.try_clone().expect("a descriptor can be doubled"), Arc::clone(&shared));
        let thread = std::thread::spawn(move || heard.serve(served));
        // The program finds the device as its standard input.
        let done = Command::new("mount")
            .args(["-i", "-t", "fuse", "-o", "fd=0,rootmode=40000,user_id=0,group_id=0", "silent"])
            .arg(path)
            .stdin(Stdio::from(device.try_clone().expect("a descriptor can be doubled")))
            .status();
        assert!(done.expect("mount can be run").success(), "FUSE cannot be mounted; these tests need root");
        let mounted = Self { path: path.to_path_buf(), shared, device: Some(device), thread: Some(thread) };
        // The control: it answers.
        assert_eq!(fs::read_dir(path).expect("it can be listed").count(), entries.len());
        mounted
    }

    /// From now on this is read and never answered: whoever asks cannot even be killed.
    pub fn be_silent(&self, silence: Silence) {
        self.shared.silences.lock().unwrap_or_else(PoisonError::into_inner).push(silence);
    }

    /// From now on nothing is read any more: whoever asks waits until he is killed.
    pub fn stop_reading(&self) {
        self.shared.reads.store(false, Ordering::Release);
    }

    /// How many requests wait for an answer that does not come.
    pub fn unanswered(&self) -> u64 {
        self.shared.unanswered.load(Ordering::Acquire)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Closing the last descriptor ends the connection, with an error for all who wait.
        drop(self.device.take());
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

impl Shared {
    fn serve(&self, mut device: File) {
        let mut request = vec![0; 1 << 20];
        while !self.ended.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&device, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 5_000_000 }));
            if !matches!(ready, Ok(1..)) || !self.reads.load(Ordering::Acquire) {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            }
            // It is an error before the mount, and where a request was taken back meanwhile.
            let Ok(length) = device.read(&mut request) else {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            };
            if let Some(answer) = self.answer(&request[..length]) {
                let _ = device.write_all(&answer);
            }
        }
    }

    fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let (operation, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
        let body = &request[HEADER..];
        if self.is_silent(operation, node, body) {
            self.unanswered.fetch_add(1, Ordering::AcqRel);
            return None;
        }
        let answer = match operation {
            // LOOKUP
            1 => match self.node(name(body)) {
                Some(node) => Ok(self.entry(node)),
                None => Err(NO_ENTRY),
            },
            // FORGET, INTERRUPT, BATCH_FORGET
            2 | 36 | 42 => return None,
            // GETATTR
            3 => Ok([&1_000_000_u64.to_le_bytes()[..], &[0; 8], &self.attributes(node)].concat()),
            // OPEN, OPENDIR
            14 | 27 => Ok(vec![0; 16]),
            // READ
            15 => {
                let content = self.nodes.get(&node).and_then(|(_, content)| content.as_deref());
                Ok(part(content.unwrap_or_default(), body))
            }
            // STATFS
            17 => {
                let mut answer = vec![0; 80];
                answer[40..44].copy_from_slice(&4096_u32.to_le_bytes());
                answer[44..48].copy_from_slice(&255_u32.to_le_bytes());
                Ok(answer)
            }
            // RELEASE, FLUSH, RELEASEDIR
            18 | 25 | 29 => Ok(vec![]),
            // INIT
            26 => {
                let mut answer = vec![0; 64];
                // Version, FUSE_PARALLEL_DIROPS (one question does not hold up others), longest write, clock.
                for (at, value) in [(0, 7_u32), (4, 31), (12, 1 << 18), (20, 64 << 10), (24, 1)] {
                    answer[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                Ok(answer)
            }
            // READDIR; a listing fits one answer
            28 if u64_at(body, 8) == 0 && node == ROOT => Ok(self.listing()),
            28 => Ok(vec![]),
            _ => Err(NOT_KNOWN),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (error, vec![]),
        };
        let length = u32::try_from(16 + body.len()).expect("answers are short");
        Some([&length.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes(), &body].concat())
    }

    fn is_silent(&self, operation: u32, node: u64, body: &[u8]) -> bool {
        let called = |wanted: &str| self.nodes.get(&node).is_some_and(|(name, _)| *name == wanted);
        let silences = self.silences.lock().unwrap_or_else(PoisonError::into_inner);
        silences.iter().any(|silence| match (silence, operation) {
            // Nobody waits for the answer to a RELEASEDIR.
            (Silence::All, operation) => ![2, 26, 29, 36, 42].contains(&operation),
            (Silence::Lookup(wanted), 1) => name(body) == wanted.as_bytes(),
            (Silence::List(wanted), 28) | (Silence::Open(wanted), 14) | (Silence::Read(wanted), 15) => {
                called(wanted)
            }
            (Silence::Lookup(_) | Silence::List(_) | Silence::Open(_) | Silence::Read(_), _) => false,
        })
    }

    fn node(&self, wanted: &[u8]) -> Option<u64> {
        self.nodes.iter().find(|(_, (name, _))| name.as_bytes() == wanted).map(|(node, _)| *node)
    }

    fn entry(&self, node: u64) -> Vec<u8> {
        let valid = 1_000_000_u64.to_le_bytes();
        [&node.to_le_bytes()[..], &[0; 8], &valid, &valid, &[0; 8], &self.attributes(node)].concat()
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let content = self.nodes.get(&node).and_then(|(_, content)| content.as_ref());
        let (mode, links) = if content.is_some() { (0o100_644_u32, 1_u32) } else { (0o040_755, 2) };
        let size = content.map_or(0, Vec::len);
        let mut attributes = vec![0; 88];
        attributes[..8].copy_from_slice(&node.to_le_bytes());
        attributes[8..16].copy_from_slice(&u64::try_from(size).expect("it fits").to_le_bytes());
        attributes[60..64].copy_from_slice(&mode.to_le_bytes());
        attributes[64..68].copy_from_slice(&links.to_le_bytes());
        attributes[80..84].copy_from_slice(&4096_u32.to_le_bytes());
        attributes
    }

    fn listing(&self) -> Vec<u8> {
        let mut listing = Vec::new();
        for (offset, (node, (name, content))) in (1_u64..).zip(&self.nodes) {
            let kind: u32 = if content.is_some() { 8 } else { 4 };
            listing.extend_from_slice(&node.to_le_bytes());
            listing.extend_from_slice(&offset.to_le_bytes());
            listing.extend_from_slice(&u32::try_from(name.len()).expect("names are short").to_le_bytes());
            listing.extend_from_slice(&kind.to_le_bytes());
            listing.extend_from_slice(name.as_bytes());
            listing.resize(listing.len().next_multiple_of(8), 0);
        }
        listing
    }
}

fn name(body: &[u8]) -> &[u8] {
    body.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// What a READ asks for.
fn part(content: &[u8], body: &[u8]) -> Vec<u8> {
    let start = usize::try_from(u64_at(body, 8)).unwrap_or(usize::MAX).min(content.len());
    let size = usize::try_from(u32_at(body, 16)).unwrap_or(usize::MAX);
    content[start..].iter().take(size).copied().collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
