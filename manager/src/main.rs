//! Under construction.
mod store;
fn main() {}
