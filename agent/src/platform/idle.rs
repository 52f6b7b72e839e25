//! Makes a thread one whose reads wait for everybody else's.

use std::{
    io,
    process::{Command, Stdio},
};

/// Sets the class by which a thread's reads wait for others' (util-linux). There is no safe call for it at hand.
const IONICE: &str = "/usr/bin/ionice";

/// From here on this thread, every thread that it starts, and every process that these start read from a disk only
/// when nobody else does. It is not taken back.
///
/// # Errors
/// If the kernel refuses, or there is no `ionice` on this machine.
pub(crate) fn wait_for_others() -> io::Result<()> {
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    let done = Command::new(IONICE)
        .args(["-c", "3", "-p", &thread])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run `{IONICE}`: {error}")))?;
    if !done.success() {
        return Err(io::Error::other(format!("`{IONICE}` failed ({done})")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The class of a thread or process, as `ionice` tells it.
    fn class(id: i32) -> String {
        let said = Command::new(IONICE).args(["-p", &id.to_string()]).output().unwrap().stdout;
        String::from_utf8(said).unwrap().trim().to_owned()
    }

    fn own() -> String {
        class(rustix::thread::gettid().as_raw_nonzero().get())
    }

    #[test]
    fn a_thread_and_what_it_starts_wait_and_others_do_not() {
        let before = own();
        assert_ne!(before, "idle");
        std::thread::spawn(|| {
            wait_for_others().unwrap();
            assert_eq!(own(), "idle");
            std::thread::spawn(|| assert_eq!(own(), "idle")).join().unwrap();
            let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
            let said = class(i32::try_from(child.id()).unwrap());
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(said, "idle");
        })
        .join()
        .unwrap();
        assert_eq!(own(), before);
    }
}
