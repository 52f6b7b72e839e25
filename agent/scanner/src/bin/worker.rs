//! The worker alone, for tests and benches; the programs carry it as a hidden verb.

fn main() -> std::process::ExitCode {
    tm_scanner::worker::main()
}
