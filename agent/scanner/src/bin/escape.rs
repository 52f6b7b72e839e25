//! Tries one thing that a worker must not do: `tm-scan-escape free|landlock|sealed ATTEMPT`. Exit code 0 says
//! that it was possible, 1 that it was refused (standard error says how); a sealed process may be ended by
//! SIGSYS instead. For tests of the sandbox, each with `free` as its control.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use tm_protocol::task::ScanLimits;
use tm_scanner::sandbox::{Frame, Sandbox};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let (Some(how), Some(what)) = (words.next(), words.next()) else {
        return ExitCode::from(64);
    };
    match restrict(&how).and_then(|()| attempt(&what)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{:?}: {error}", error.kind());
            ExitCode::FAILURE
        }
    }
}

fn restrict(how: &str) -> io::Result<()> {
    if how == "free" {
        return Ok(());
    }
    let mut sandbox = Sandbox::begin()?;
    let frame = Frame { data_bytes: 96 << 20, ..Frame::new(1, 0, &ScanLimits::default()) };
    sandbox.confine(&frame);
    if how == "sealed" {
        sandbox.seal();
    }
    Ok(())
}

fn attempt(what: &str) -> io::Result<()> {
    match what {
        "nothing" => Ok(()),
        "abort" => std::process::abort(),
        "read" => File::open("/etc/passwd")?.read_exact(&mut [0]),
        "write" => {
            File::create(std::env::temp_dir().join(format!("escape-{}", std::process::id()))).map(drop)
        }
        "remove" => match std::fs::remove_file("/nonexistent/file") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        },
        "list" => std::fs::read_dir("/").map(drop),
        "openat2" => rustix::fs::openat2(
            rustix::fs::CWD,
            "/etc/passwd",
            rustix::fs::OFlags::RDONLY,
            rustix::fs::Mode::empty(),
            rustix::fs::ResolveFlags::empty(),
        )
        .map(drop)
        .map_err(Into::into),
        "tcp" => TcpListener::bind("127.0.0.1:0").map(drop),
        "udp" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "unix" => std::os::unix::net::UnixStream::pair().map(drop),
        "exec" => Err(Command::new("/proc/self/exe").args(["free", "nothing"]).exec()),
        "spawn" => Command::new("/proc/self/exe").args(["free", "nothing"]).status().map(drop),
        "thread" => std::thread::Builder::new().spawn(|| {})?.join().map_err(|_| io::ErrorKind::Other.into()),
        "executable" => memmap2::MmapMut::map_anon(4096)?.make_exec().map(drop),
        "map-executable" => {
            #[expect(unsafe_code, reason = "there is no safe call for an executable mapping of a file")]
            // SAFETY: nothing reads or runs the mapping; it is of a page that only this process has.
            let map = unsafe { memmap2::MmapOptions::new().len(4096).map_exec(&memory(4096)?) };
            map.map(drop)
        }
        "kill" => {
            let parent = rustix::process::getppid().ok_or(io::ErrorKind::NotFound)?;
            rustix::process::test_kill_process(parent).map_err(Into::into)
        }
        "new-user" => rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).map_err(Into::into),
        "ceiling" => rustix::process::setrlimit(
            rustix::process::Resource::Core,
            rustix::process::Rlimit { current: Some(0), maximum: Some(0) },
        )
        .map_err(Into::into),
        "memory" => {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(160 << 20).map_err(io::Error::other)?;
            bytes.resize(160 << 20, 1);
            (bytes.last() == Some(&1)).then_some(()).ok_or_else(|| io::ErrorKind::Other.into())
        }
        // What scanning needs goes on: large and small memory back and forth, scratch, mapping, time, chance.
        "work" => {
            for size in [1 << 10, 60 << 10, 1 << 20, 20 << 20] {
                let blocks = (0..(48usize << 20) / (2 * size).max(64 << 10)).map(|_| vec![1_u8; size]);
                drop(blocks.collect::<Vec<_>>());
            }
            let scratch = memory(4 << 20)?;
            #[expect(unsafe_code, reason = "files are mapped in a worker")]
            // SAFETY: only this process has the file, and nothing changes it.
            let map = unsafe { memmap2::Mmap::map(&scratch)? };
            let random = std::collections::HashMap::from([(map.len(), scratch.metadata()?.len())]);
            let _ = (std::time::SystemTime::now(), std::time::Instant::now());
            scratch.try_clone()?.set_len(random.values().sum())
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// A file of `length` bytes that has no name.
fn memory(length: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("escape", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.set_len(length)?;
    Ok(file)
}
