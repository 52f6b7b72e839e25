//! Who may say what the fleet looks for: signed metadata by The Update Framework (TUF), with the types and the
//! signature rules of `tough`.
//!
//! Five files, each JSON with signatures: `root` names the keys of all others and is changed only by its own keys;
//! `targets` names the keys of the delegated roles `detect`, `cleanup` and `expert`, which list patterns by digest;
//! `snapshot` names the versions and digests of all of these, `timestamp` that of the snapshot. The keys of root,
//! targets and the delegated roles lie on desks, those of snapshot and timestamp at the manager.
//!
//! `tough`'s own loader is not used: it fetches file by file through an asynchronous transport into a folder of its
//! own, reads the clock itself, refuses what is expired for good, and does not tell which role a target came from.
//! Here a whole set is one [`Bundle`], judged at once, with the time as an argument; a set in force goes on being
//! used after its end, and every refusal has a code of its own.
//!
//! **Invariant:** there is no [`Verified`] but one whose every signature, version and digest was checked.
//! **Invariant:** no I/O and no clock; chance only where a key is made or sealed.

mod keys;
mod repository;
mod roles;
#[cfg(test)]
mod tests;
mod verify;

pub use tough::schema::{Role, Root, Signed, Targets};

pub use self::{
    keys::{KeyError, SigningKey},
    repository::{
        Entry, Holders, entries, holders, online, parse, role, role_holders, root, sign, signers, targets,
        text, unsigned,
    },
    roles::{About, Delegate, Kind, TopRole},
    verify::{Bundle, Expired, MAX_BUNDLE, Start, TrustError, Use, Verified, Versions, root_digest},
};
