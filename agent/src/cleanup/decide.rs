//! What is to become of one detected file. Decided from what was seen, without touching anything.
//!
//! **Invariant:** a file is taken only if it is what was detected (object, size and digest), is not critical,
//! and is not what its package delivered.

use std::collections::BTreeSet;

use tm_protocol::{
    report::{Failure, PathBytes},
    text,
};

use crate::{
    cleanup::target::Target,
    platform::{
        critical::Role,
        fs::Object,
        packages::{self, Algorithm, Checksum, Owner, Package},
    },
};

/// Most members of a container that are named.
const MAX_MEMBERS: usize = 3;
/// Longest name of a member that is shown whole, in bytes of text.
const MAX_MEMBER: usize = 200;
/// Where packages put files. If it cannot be told what belongs to a package, nothing is taken from here.
const SYSTEM_FOLDERS: [&[u8]; 8] =
    [b"/usr/", b"/bin/", b"/sbin/", b"/lib/", b"/lib32/", b"/lib64/", b"/etc/", b"/boot/"];
/// And where, below those, they do not.
const LOCAL_FOLDERS: [&[u8]; 1] = [b"/usr/local/"];

/// What stands at its path now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing.
    Gone,
    /// Something else; the text says what.
    Other(&'static str),
    /// What cannot be looked at: it may not be opened or read.
    Closed(Failure),
    /// The file that was detected.
    File(File),
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub(super) object: Object,
    /// Of its content, with SHA-256 among them.
    pub(super) checksums: Vec<Checksum>,
    /// How many other names it has.
    pub(super) other_links: u64,
}

/// What the package databases say of it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Owned<'a> {
    /// They could not be asked.
    Unknown(&'a str),
    /// These packages list it; there may be none.
    By(&'a [Owner]),
}

impl Owned<'_> {
    /// What has to be computed to compare the content with what the packages say.
    pub(super) fn algorithms(&self) -> BTreeSet<Algorithm> {
        match self {
            Self::Unknown(_) => BTreeSet::new(),
            Self::By(owners) => owners.iter().flat_map(|o| &o.checksums).map(Checksum::algorithm).collect(),
        }
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nothing: it is not there.
    Gone,
    /// It is left alone.
    Refuse(Failure, Vec<Failure>),
    /// It cannot be done.
    Fail(Failure),
    /// It goes to the vault.
    Take(Vec<Failure>),
}

/// Decides.
pub(super) fn decide(target: &Target, seen: &Seen, role: Option<Role>, owned: Owned<'_>) -> Decision {
    let file = match seen {
        Seen::Gone => return Decision::Gone,
        Seen::Other(what) => return Decision::Refuse(Failure::new("changed", *what), vec![]),
        Seen::Closed(failure) => return Decision::Fail(failure.clone()),
        Seen::File(file) => file,
    };
    let belonging = match owned {
        Owned::Unknown(_) => None,
        Owned::By(owners) => Belonging::of(owners, &file.checksums),
    };
    if let Some(role) = role {
        let failure = Failure::new("critical-file", format!("it is {role}, which a cleanup never removes"));
        return Decision::Refuse(failure, belonging.iter().map(Belonging::note).collect());
    }
    match owned {
        Owned::Unknown(why) if is_of_the_system(&target.path.0) => {
            let message = format!("it cannot be told whether a package delivered it just so: {why}");
            return Decision::Fail(Failure::new("package-unknown", message));
        }
        Owned::Unknown(_) | Owned::By(_) => {}
    }
    match belonging {
        Some(belonging @ Belonging::Intact(_)) => Decision::Refuse(belonging.note(), vec![]),
        belonging => Decision::Take(notes(target, file.other_links, belonging.as_ref())),
    }
}

/// The notes on a file that this task took before, and did not get round to telling.
pub(super) fn notes_on_taken(target: &Target, owned: Owned<'_>) -> Vec<Failure> {
    let belonging = match owned {
        Owned::Unknown(_) => None,
        // It was not as its package delivered it, or it would not have been taken.
        Owned::By(owners) => Belonging::of(owners, &[]),
    };
    notes(target, 0, belonging.as_ref())
}

/// A file's relation to the package that lists it.
#[derive(Debug, PartialEq, Eq)]
enum Belonging<'a> {
    /// It is as the package delivered it.
    Intact(&'a Package),
    /// It is not.
    Altered(&'a Package),
    /// The package does not say how it should be.
    Listed(&'a Package),
}

impl<'a> Belonging<'a> {
    fn of(owners: &'a [Owner], checksums: &[Checksum]) -> Option<Self> {
        let intact = owners.iter().find(|owner| owner.checksums.iter().any(|c| checksums.contains(c)));
        let altered = owners.iter().find(|owner| !owner.checksums.is_empty());
        intact
            .map(|owner| Self::Intact(&owner.package))
            .or_else(|| altered.map(|owner| Self::Altered(&owner.package)))
            .or_else(|| owners.first().map(|owner| Self::Listed(&owner.package)))
    }

    fn note(&self) -> Failure {
        match self {
            Self::Intact(package) => Failure::new(
                "likely-false-positive",
                format!("its content is what package `{package}` delivered (the checksum matches)"),
            ),
            Self::Altered(package) => {
                let said = format!("its content is not what package `{package}` delivered");
                let message = match package.reinstall() {
                    Some(command) => format!("{said}; reinstall the package: {command}"),
                    None => format!("{said}; reinstall the package"),
                };
                Failure::new("reinstall", message)
            }
            Self::Listed(package) => Failure::new(
                "package",
                format!("it belongs to package `{package}`, which does not tell its checksum"),
            ),
        }
    }
}

fn notes(target: &Target, other_links: u64, belonging: Option<&Belonging<'_>>) -> Vec<Failure> {
    let mut notes = Vec::new();
    if let Some(members) = member_names(&target.members) {
        notes.push(Failure::new(
            "container",
            format!("the whole file is taken; what matched is in it: {members}"),
        ));
    }
    notes.extend(belonging.map(Belonging::note));
    if other_links > 0 {
        notes.push(other_links_note(other_links));
    }
    notes
}

/// Says that the same content can still be reached.
pub(super) fn other_links_note(count: u64) -> Failure {
    let names = if count == 1 { "1 other name (hard link)" } else { "other names (hard links)" };
    let message = match count {
        1 => format!("{names} of the same file remains"),
        count => format!("{count} {names} of the same file remain"),
    };
    Failure::new("other-links", message)
}

fn member_names(members: &BTreeSet<Vec<PathBytes>>) -> Option<String> {
    let shown: Vec<String> = members
        .iter()
        .take(MAX_MEMBERS)
        .map(|member| {
            let names: Vec<String> = member.iter().map(|name| text::escape(&name.0)).collect();
            let name = names.join(" > ");
            match (0..=MAX_MEMBER).rev().find(|at| name.is_char_boundary(*at)) {
                Some(end) if name.len() > MAX_MEMBER => format!("`{}…`", name.get(..end).unwrap_or_default()),
                Some(_) | None => format!("`{name}`"),
            }
        })
        .collect();
    let shown = (!shown.is_empty()).then(|| shown.join(", "))?;
    match members.len().saturating_sub(MAX_MEMBERS) {
        0 => Some(shown),
        more => Some(format!("{shown} and {more} more")),
    }
}

fn is_of_the_system(path: &[u8]) -> bool {
    let Some(path) = packages::normal(path) else { return true };
    SYSTEM_FOLDERS.iter().any(|folder| path.starts_with(folder))
        && !LOCAL_FOLDERS.iter().any(|folder| path.starts_with(folder))
}
