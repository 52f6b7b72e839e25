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
    /// This object goes to the vault.
    Take(Object, Vec<Failure>),
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
        belonging => Decision::Take(file.object, notes(target, file.other_links, belonging.as_ref())),
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
    let message = match count {
        1 => "1 other name (hard link) of the same file remains".to_owned(),
        count => format!("{count} other names (hard links) of the same file remain"),
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tm_protocol::ids::Sha256;

    use super::*;
    use crate::platform::packages::{Digester, Manager};

    fn target(path: &str) -> Target {
        Target {
            path: PathBytes(path.as_bytes().to_vec()),
            sha256: Sha256::of(b"bad"),
            size: 3,
            objects: vec![],
            keys: vec![Sha256::of(b"key")],
            members: BTreeSet::new(),
        }
    }

    fn checksums(content: &[u8]) -> Vec<Checksum> {
        let mut digester = Digester::new(&[Algorithm::Md5].into());
        digester.update(content);
        digester.finish().1
    }

    const OBJECT: Object = Object { device: 1, inode: 2 };

    fn file(other_links: u64) -> Seen {
        Seen::File(File { object: OBJECT, checksums: checksums(b"bad"), other_links })
    }

    fn owner(name: &str, content: Option<&[u8]>) -> Owner {
        let checksums = content.map(checksums).unwrap_or_default();
        Owner { package: Package::new(name.as_bytes(), Manager::Apt), checksums }
    }

    /// The decision as one line: its word, its code, the codes of its notes.
    fn shown(decision: &Decision) -> String {
        let (word, code, notes) = match decision {
            Decision::Gone => ("gone", "", &[][..]),
            Decision::Refuse(failure, notes) => ("refuse", failure.code.as_str(), notes.as_slice()),
            Decision::Fail(failure) => ("fail", failure.code.as_str(), &[][..]),
            Decision::Take(object, notes) => {
                assert_eq!(*object, OBJECT, "what was judged is what is taken");
                ("take", "", notes.as_slice())
            }
        };
        let words = [word, code].into_iter().chain(notes.iter().map(|note| note.code.as_str()));
        words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_case_has_its_decision() {
        let none: &[Owner] = &[];
        let intact = &[owner("p", Some(b"bad"))][..];
        let altered = &[owner("p", Some(b"good"))][..];
        let listed = &[owner("p", None)][..];
        let one_intact = &[owner("a", None), owner("b", Some(b"good")), owner("c", Some(b"bad"))][..];
        let closed = Seen::Closed(Failure::new("unreadable", "x"));
        let shell = Some(Role::Shell);
        for (path, seen, role, owned, expected) in [
            ("/home/x", file(0), None, Owned::By(none), "take"),
            ("/home/x", file(2), None, Owned::By(none), "take other-links"),
            ("/home/x", Seen::Gone, None, Owned::By(none), "gone"),
            ("/home/x", Seen::Other("x"), None, Owned::By(none), "refuse changed"),
            ("/home/x", closed.clone(), None, Owned::By(none), "fail unreadable"),
            ("/usr/bin/x", file(0), None, Owned::By(none), "take"),
            ("/usr/bin/x", file(0), None, Owned::By(intact), "refuse likely-false-positive"),
            ("/usr/bin/x", file(0), None, Owned::By(altered), "take reinstall"),
            ("/usr/bin/x", file(0), None, Owned::By(listed), "take package"),
            ("/usr/bin/x", file(1), None, Owned::By(altered), "take reinstall other-links"),
            ("/usr/bin/x", file(0), None, Owned::By(one_intact), "refuse likely-false-positive"),
            ("/usr/bin/x", Seen::Gone, None, Owned::By(intact), "gone"),
            ("/usr/bin/x", Seen::Other("x"), None, Owned::By(intact), "refuse changed"),
            ("/usr/bin/sh", file(0), shell, Owned::By(none), "refuse critical-file"),
            ("/usr/bin/sh", file(0), shell, Owned::By(intact), "refuse critical-file likely-false-positive"),
            ("/usr/bin/sh", file(0), shell, Owned::By(altered), "refuse critical-file reinstall"),
            ("/usr/bin/sh", file(0), shell, Owned::By(listed), "refuse critical-file package"),
            ("/home/sh", file(0), shell, Owned::By(none), "refuse critical-file"),
            ("/usr/bin/sh", file(0), shell, Owned::Unknown("x"), "refuse critical-file"),
            ("/usr/bin/x", file(0), None, Owned::Unknown("x"), "fail package-unknown"),
            ("/etc/x", file(0), None, Owned::Unknown("x"), "fail package-unknown"),
            ("/tmp/../usr/bin/x", file(0), None, Owned::Unknown("x"), "fail package-unknown"),
            ("/usr/local/bin/x", file(0), None, Owned::Unknown("x"), "take"),
            ("/usrx", file(0), None, Owned::Unknown("x"), "take"),
            ("/home/x", file(0), None, Owned::Unknown("x"), "take"),
            ("/usr/bin/x", Seen::Gone, None, Owned::Unknown("x"), "gone"),
        ] {
            let decision = decide(&target(path), &seen, role, owned);
            assert_eq!(shown(&decision), expected, "{path} {seen:?} {role:?} {owned:?}");
        }
    }

    #[test]
    fn a_package_is_named_with_the_command_that_puts_it_right() {
        let message = |owner: Owner| {
            let owners = [owner];
            match decide(&target("/usr/bin/x"), &file(0), None, Owned::By(&owners)) {
                Decision::Take(_, notes) => notes.first().unwrap().message.clone(),
                Decision::Refuse(failure, _) => failure.message,
                other @ (Decision::Gone | Decision::Fail(_)) => panic!("{other:?}"),
            }
        };
        for (owner, expected) in [
            (owner("cron", Some(b"good")), "reinstall the package: apt-get install --reinstall cron"),
            (owner("a;b", Some(b"good")), "`a;b` delivered; reinstall the package"),
            (owner("\u{202e}x", None), r"it belongs to package `\u{202e}x`"),
            (owner("cron", Some(b"bad")), "is what package `cron` delivered (the checksum matches)"),
        ] {
            let message = message(owner);
            assert!(message.contains(expected), "{message}");
        }
        let notes = notes_on_taken(&target("/usr/bin/x"), Owned::By(&[owner("cron", Some(b"good"))]));
        assert_eq!(notes.iter().map(|note| note.code.as_str()).collect::<Vec<_>>(), ["reinstall"]);
    }

    #[test]
    fn members_are_named_escaped_and_bounded() {
        let mut target = target("/home/x.zip");
        let members = |names: &[&[&[u8]]]| {
            let member =
                |names: &&[&[u8]]| names.iter().map(|name| PathBytes(name.to_vec())).collect::<Vec<_>>();
            names.iter().map(member).collect::<BTreeSet<_>>()
        };
        for (names, expected) in [
            (&[&[&b"inner.zip"[..], b"a\x1b[2J\xff"][..]][..], r"`inner.zip > a\u{1b}[2J\xff`"),
            (&[&[&b"a"[..]][..], &[b"b"], &[b"c"], &[b"d"], &[b"e"]], "`a`, `b`, `c` and 2 more"),
        ] {
            target.members = members(names);
            let notes = notes(&target, 0, None);
            assert!(notes[0].message.ends_with(expected), "{notes:?}");
            assert_eq!(notes[0].code, "container");
        }
        target.members = members(&[&["\u{e9}".repeat(5000).as_bytes()]]);
        let message = &notes(&target, 0, None)[0].message;
        assert!(message.len() < 300 && message.ends_with("\u{e9}\u{2026}`"), "{message}");
        for (count, expected) in [(1, "1 other name (hard link)"), (2, "2 other names (hard links)")] {
            assert!(other_links_note(count).message.starts_with(expected));
        }
    }
}
