//! What comes in: bodies, queries and paths, refused in one shape; and the words that may name things.

use axum::{
    extract::{
        FromRequest, FromRequestParts, Path, Query, Request,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::request::Parts,
};
use serde::de::DeserializeOwned;
use tm_api::{PageQuery, error::Code};
use tm_protocol::text::escape_for_display;

use super::{
    AppState,
    error::{Error, is_too_large, quoted},
};

/// Most rows of one page.
const MAX_ROWS: u32 = 1000;

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<AppState> for Body<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Error> {
        match axum::Json::<T>::from_request(request, state).await {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(body_refused(&rejection)),
        }
    }
}

fn body_refused(rejection: &JsonRejection) -> Error {
    let code = if is_too_large(rejection.status()) { Code::TooLarge } else { Code::Invalid };
    Error::new(code, sentence(&rejection.body_text()))
}

/// The query string.
pub(crate) struct Params<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequestParts<AppState> for Params<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Error> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(query_refused(&rejection)),
        }
    }
}

fn query_refused(rejection: &QueryRejection) -> Error {
    Error::invalid(sentence(&rejection.body_text()))
}

/// The one variable part of the path.
pub(crate) struct Named(pub(crate) String);

impl FromRequestParts<AppState> for Named {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Error> {
        let path: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        path.map(|Path(name)| Self(name))
            .map_err(|rejection| Error::invalid(sentence(&rejection.body_text())))
    }
}

/// The framework's words, in the shape of ours.
fn sentence(text: &str) -> String {
    let text = escape_for_display(text.trim_end_matches('.'));
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// Where a page begins and how many rows it has.
pub(crate) fn page(query: &PageQuery) -> Result<(i64, u32), Error> {
    Ok((query.after.max(0), rows(query.limit, MAX_ROWS)?))
}

/// How many rows, where `default` are meant if nothing is said.
pub(crate) fn rows(limit: Option<u32>, default: u32) -> Result<u32, Error> {
    match limit {
        None => Ok(default),
        Some(limit) if (1..=MAX_ROWS).contains(&limit) => Ok(limit),
        Some(limit) => Err(Error::invalid(format!("a limit of {limit} rows is not within 1 to {MAX_ROWS}"))),
    }
}

/// Checks the name of an account.
pub(crate) fn account_name(name: &str) -> Result<(), Error> {
    // The audit log says `system` where no account acted.
    if name == "system" {
        return Err(Error::invalid("the name `system` is the manager's own"));
    }
    word("an account's name", name, ".-_@")
}

/// Checks the name of a group.
pub(crate) fn group(name: &str) -> Result<(), Error> {
    word("a group's name", name, ".-_")
}

fn word(what: &str, name: &str, marks: &str) -> Result<(), Error> {
    let fits = (1..=64).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || marks.contains(c));
    if fits {
        return Ok(());
    }
    let marks: Vec<String> = marks.chars().map(|c| format!("`{c}`")).collect();
    Err(Error::invalid(format!(
        "{what} has 1 to 64 characters, letters, digits or {}; {} is not one",
        marks.join(" "),
        quoted(name)
    )))
}

/// Checks the name of a pattern.
pub(crate) fn pattern_name(name: &str) -> Result<(), Error> {
    let fits = (1..=128).contains(&name.chars().count())
        && !name.contains('/')
        && escape_for_display(name) == name
        && name.trim() == name;
    if fits {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "a pattern's name has 1 to 128 characters, no `/`, no control characters and no blanks at its ends; \
         {} is not one",
        quoted(name)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_they_may_be() {
        let long = "a".repeat(65);
        for (name, as_account, as_group, as_pattern) in [
            ("ann", true, true, true),
            ("ann@example.org", true, false, true),
            ("system", false, true, true),
            ("", false, false, false),
            (&*long, false, false, true),
            ("a b.yar", false, false, true),
            ("../x", false, false, false),
            ("a\nb", false, false, false),
            ("a\u{202e}b", false, false, false),
            (" a", false, false, false),
        ] {
            assert_eq!(account_name(name).is_ok(), as_account, "account {name:?}");
            assert_eq!(group(name).is_ok(), as_group, "group {name:?}");
            assert_eq!(pattern_name(name).is_ok(), as_pattern, "pattern {name:?}");
        }
    }

    #[test]
    fn a_page_has_a_bounded_number_of_rows() {
        let query = |after, limit| PageQuery { after, limit };
        assert_eq!(page(&query(-5, None)).unwrap(), (0, 1000));
        assert_eq!(page(&query(7, Some(1))).unwrap(), (7, 1));
        assert!(page(&query(0, Some(0))).is_err());
        assert!(page(&query(0, Some(1001))).is_err());
    }
}
