//! Bytes to detections, in a worker process.
//!
//! [`pool::ScanPool`] runs in the agent (and, to try a rule before it is used, in the manager): it hands
//! open files to a worker process and takes verdicts back. [`worker::main`] is that process. The parent
//! never parses rules or archives itself.
//!
//! **Invariant:** whatever a file or a rule does to a worker, the parent goes on: the item in hand is named,
//! the others are given to a new worker.

mod archive;
mod blame;
mod calls;
pub mod check;
mod engine;
pub mod item;
mod judge;
mod lists;
pub mod pool;
mod process;
pub mod sandbox;
mod wire;
pub mod worker;
