//! Looks at a detected file again, by descriptor.
//!
//! **Invariant:** object and checksums are those of one open file; no link is followed to it.

use std::{
    fs::File as Handle,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
};

use rustix::io::Errno;
use tm_protocol::report::{Failure, PathBytes};

use crate::{
    cleanup::{
        decide::{File, Owned, Seen},
        target::Target,
    },
    platform::{
        fs::{Kind, Object, OpenError, Place, Residence},
        packages::Digester,
    },
};

/// How much is read before it is asked whether to stop, in bytes.
const BLOCK: usize = 256 * 1024;

const CHANGED: &str = "its content has changed since it was detected; scan again";
const REPLACED: &str = "another file stands there now; scan again";
const NO_FILE: &str = "no file but something else stands there now; scan again";
const BEHIND_LINK: &str = "the way to it leads through a link now; scan again";
const MOVED: &str = "another file system is mounted there now; scan again";

/// The task was called off while the file was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stopped;

/// What stands at the target's path. A file is read only if it can still be the detected one.
pub(super) fn look(target: &Target, owned: Owned<'_>, stop: &dyn Fn() -> bool) -> Result<Seen, Stopped> {
    let mut open = match open(target) {
        Ok(open) => open,
        Err(seen) => return Ok(seen),
    };
    let mut digester = Digester::new(&owned.algorithms());
    let mut block = vec![0; BLOCK];
    let mut left = target.size;
    loop {
        if stop() {
            return Err(Stopped);
        }
        match open.file.read(&mut block) {
            Ok(0) => break,
            Ok(taken) => {
                let Some(rest) = u64::try_from(taken).ok().and_then(|taken| left.checked_sub(taken)) else {
                    return Ok(Seen::Other(CHANGED));
                };
                left = rest;
                digester.update(block.get(..taken).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Ok(unreadable("read", &error)),
        }
    }
    let (sha256, checksums) = digester.finish();
    if sha256 != target.sha256 {
        return Ok(Seen::Other(CHANGED));
    }
    Ok(Seen::File(File { object: open.object, checksums, other_links: open.other_links }))
}

/// Whether a file stands at the path. What cannot be told counts as one; a link or a folder does not: nothing
/// can be detected in it.
pub(crate) fn stands_again(path: &PathBytes) -> bool {
    match Place::find(&path.0).and_then(|place| place.facts()) {
        Ok(facts) => facts.kind == Kind::Regular,
        Err(Errno::NOENT | Errno::NOTDIR) => false,
        Err(_) => true,
    }
}

struct Open {
    file: Handle,
    object: Object,
    other_links: u64,
}

fn open(target: &Target) -> Result<Open, Seen> {
    let way = |errno| match errno {
        Errno::NOENT | Errno::NOTDIR => Seen::Gone,
        Errno::LOOP => Seen::Other(BEHIND_LINK),
        errno => unreadable("look at", &errno.into()),
    };
    let place = Place::find(&target.path.0).map_err(way)?;
    let facts = place.facts().map_err(way)?;
    if facts.kind != Kind::Regular {
        return Err(Seen::Other(NO_FILE));
    }
    match place.residence().map_err(way)? {
        Residence::Local => {}
        // Nothing is ever detected there, and to read it could take for ever.
        Residence::Pseudo | Residence::Remote => return Err(Seen::Other(MOVED)),
    }
    if !target.objects.is_empty() && !target.objects.contains(&facts.object()) {
        return Err(Seen::Other(REPLACED));
    }
    let file = place.open_regular(&facts).map(Handle::from).map_err(|error| match error {
        OpenError::Gone => Seen::Gone,
        OpenError::Changed => Seen::Other(REPLACED),
        OpenError::Refused(errno) => unreadable("open", &errno.into()),
    })?;
    let metadata = file.metadata().map_err(|error| unreadable("look at", &error))?;
    if metadata.len() != target.size {
        return Err(Seen::Other(CHANGED));
    }
    Ok(Open { file, object: facts.object(), other_links: metadata.nlink().saturating_sub(1) })
}

fn unreadable(tried: &str, error: &io::Error) -> Seen {
    Seen::Closed(Failure::new("unreadable", format!("cannot {tried} it: {error}")))
}
