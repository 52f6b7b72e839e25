//! A laboratory: real managers and agents as processes, and the means to be unpleasant to them.
//!
//! Everything here acts from outside, as a person or an attacker would: through programs, files, sockets and
//! signals. Nothing of a program under test is linked but the contract.
//!
//! **Invariant:** only processes started here are ended here, each through its own handle, and folders are
//! removed with the value that owns them.

pub mod bulk;
pub mod connect_proxy;
pub mod fault_proxy;
pub mod fleet;
pub mod fuse;
pub mod lab;
pub mod namespace;
pub mod output;
pub mod personas;
pub mod postgres;
pub mod process;
pub mod raw;
pub mod samples;
pub mod siege;
pub mod sim_agent;
pub mod standalone;
pub mod strace;
pub mod tmpfs;
pub mod vault;
pub mod wire;

use std::{
    env,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

pub use connect_proxy::ConnectProxy;
pub use fault_proxy::FaultProxy;
pub use lab::{Agent, Lab};
pub use namespace::Namespace;
pub use output::Output;

/// How long a fact is waited for when nothing else is said. Long: machines that run tests are busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where a program of ours is.
///
/// # Panics
/// If it has not been built.
pub fn bin(name: &str) -> PathBuf {
    // target/debug/deps/e2e-…
    let here = env::current_exe().expect("a running test has a path");
    let path = here.parent().and_then(|deps| deps.parent()).expect("test programs lie in deps/").join(name);
    assert!(path.is_file(), "`{}` has not been built: run `cargo xtask test`", path.display());
    path
}

/// Whether what takes minutes was asked for (`cargo xtask test --long`).
pub fn is_long() -> bool {
    env::var_os("TM_TEST_LONG").is_some_and(|value| value == "1")
}

/// Waits until `fact` is `Some`; looks 20 times a second.
///
/// # Panics
/// When `patience` is over, naming `what`.
pub fn wait_for<T>(what: &str, patience: Duration, mut fact: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + patience;
    loop {
        if let Some(value) = fact() {
            return value;
        }
        assert!(Instant::now() < end, "waited {} s in vain for {what}", patience.as_secs());
        thread::sleep(Duration::from_millis(50));
    }
}
