//! What is done about threats: how an incident moves, and what a person should do next. Pure.
//!
//! The store applies it inside the transaction of what happened; the REST interface shows it.
//!
//! **Invariant:** nothing here reads a clock, a store or a configuration.

pub(crate) mod advice;
pub(crate) mod incident;
