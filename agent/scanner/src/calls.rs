//! The system calls that a worker keeps.
//!
//! **Invariant:** whatever is not listed here ends the process (SIGSYS). The list has no call that takes a
//! path but `statx`/`newfstatat` of a descriptor, none that makes a socket, a process or a thread, and none
//! that reaches another process; mappings are never executable.
//!
//! `open` and `openat` fail with `EACCES` instead of ending the process: the C library's allocator asks for
//! `/proc/sys/vm/overcommit_memory` when it gives memory back, and does without when it gets no answer.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls that are harmless with whatever arguments: memory, waiting, time, and descriptors it holds.
const PLAIN: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_memfd_create,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Commands of `fcntl` that only look at a descriptor, copy it or seal scratch.
const FCNTL: [i32; 5] =
    [libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC, libc::F_ADD_SEALS, libc::F_GET_SEALS];

/// Restricts all threads of this process; says how.
pub(crate) fn restrict() -> Result<String, String> {
    let quiet = quiet().map_err(|error| error.to_string())?;
    let strict = strict().map_err(|error| error.to_string())?;
    // The strict one allows no further filter, so it comes last; of two answers the stricter one holds.
    for program in [quiet, strict] {
        seccompiler::apply_filter_all_threads(&program)
            .map_err(|error| format!("seccomp is not in this kernel, or not allowed: {error}"))?;
    }
    Ok(format!("{} system calls", PLAIN.len() + CONDITIONAL))
}

/// Linux 6.4, `linux/prctl.h`.
const PR_GET_AUXV: u32 = 0x4155_5856;

/// Calls that are allowed with certain arguments only.
const CONDITIONAL: usize = 8;

fn strict() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: Rules = PLAIN.iter().map(|call| (*call, Vec::new())).collect();
    let not_executable = || bits(2, libc::PROT_EXEC, 0);
    rules.insert(libc::SYS_mmap, vec![rule(vec![not_executable()?])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(vec![not_executable()?])?]);
    // Orders come from standard input alone.
    rules.insert(libc::SYS_recvmsg, vec![rule(vec![equal(0, 0)?])?]);
    rules.insert(libc::SYS_statx, vec![rule(vec![bits(2, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)?])?]);
    rules.insert(libc::SYS_newfstatat, vec![rule(vec![bits(3, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)?])?]);
    let fcntl = FCNTL.iter().map(|command| rule(vec![equal(1, (*command).cast_unsigned())?]));
    rules.insert(libc::SYS_fcntl, fcntl.collect::<Result<_, _>>()?);
    // A program may ask what the kernel told it at its start; rustix does before it first asks for the time.
    rules.insert(libc::SYS_prctl, vec![rule(vec![equal(0, PR_GET_AUXV)?])?]);
    // An abort is a signal to oneself.
    rules.insert(libc::SYS_tgkill, vec![rule(vec![equal(0, std::process::id())?])?]);
    // What `quiet` answers must not end the process.
    for call in quiet_calls() {
        rules.insert(call, Vec::new());
    }
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn quiet() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = quiet_calls().map(|call| (call, Vec::new())).collect();
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EACCES.cast_unsigned()))
}

fn quiet_calls() -> impl Iterator<Item = i64> {
    [
        libc::SYS_openat,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open,
    ]
    .into_iter()
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let processor = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, listed, processor)?.try_into()
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions)
}

/// Argument `index` is `value` (its lower 32 bits: the kernel looks at no more of these).
fn equal(index: u8, value: u32) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(index, Length::Dword, Compare::Eq, value.into())
}

/// Of argument `index` the bits of `mask` are `value`.
fn bits(index: u8, mask: i32, value: i32) -> Result<SeccompCondition, seccompiler::BackendError> {
    let wide = |bits: i32| u64::from(bits.cast_unsigned());
    SeccompCondition::new(index, Length::Dword, Compare::MaskedEq(wide(mask)), wide(value))
}
