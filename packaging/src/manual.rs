//! Manual pages: each program writes its own, this only puts them in place.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, ensure};

use crate::programs::{self, PROGRAMS};

/// Writes `NAME.1` for each program to `dir`.
pub(crate) fn write(dir: &Path) -> anyhow::Result<()> {
    programs::build()?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make the folder `{}`", dir.display()))?;
    for name in PROGRAMS {
        let page = Command::new(programs::path(name)?)
            .arg("man")
            .output()
            .with_context(|| format!("cannot run {name}"))?;
        ensure!(page.status.success(), "`{name} man` failed: {}", String::from_utf8_lossy(&page.stderr));
        let file = dir.join(format!("{name}.1"));
        fs::write(&file, page.stdout).with_context(|| format!("cannot write `{}`", file.display()))?;
        eprintln!("wrote {}", file.display());
    }
    Ok(())
}
