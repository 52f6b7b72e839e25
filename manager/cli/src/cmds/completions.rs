//! What the command line says about itself: completions for shells, manual pages. Needs no manager.

use std::{fs, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::{
    cli::Cli,
    failure::{Exit, Failure},
    output::Output,
};

pub(crate) fn shell(shell: Shell, out: &Output) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tmctl", &mut script);
    out.raw(&script)?;
    Ok(Exit::Done)
}

/// Writes one page for each command into a folder, which is made if it is missing.
pub(crate) fn manual(folder: &Path) -> Result<Exit, Failure> {
    fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .map_err(|source| Failure::File { verb: "write manual pages to", path: folder.into(), source })?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_hidden_ones_have_none() {
        let folder = tempfile::tempdir().unwrap();
        manual(&folder.path().join("man1")).unwrap();
        let page = |name: &str| fs::read_to_string(folder.path().join("man1").join(name)).unwrap_or_default();
        for name in ["tmctl.1", "tmctl-scan.1", "tmctl-scan-start.1", "tmctl-endpoint-set-group.1"] {
            assert!(page(name).contains(".SH"), "{name}");
        }
        assert_eq!(page("tmctl-man.1"), "");
    }
}
