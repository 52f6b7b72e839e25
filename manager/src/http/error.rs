//! How a refusal leaves the house: the only place with status codes.
//!
//! A code and a sentence go out; causes go to the log.

use std::{any::Any, error::Error as StdError};

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use tm_api::{
    error::{Candidate, Code, ErrorView},
    pattern::Problem,
};
use tm_protocol::text::escape_for_display;

use crate::store::StoreError;

/// A refusal.
#[derive(Debug)]
pub(crate) struct Error {
    view: Box<ErrorView>,
    cause: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        let view = ErrorView {
            code,
            message: message.into(),
            hint: None,
            candidates: Vec::new(),
            problems: Vec::new(),
        };
        Self { view: Box::new(view), cause: None }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message)
    }

    /// There is no such `what`.
    pub(crate) fn not_found(what: &str, name: &str) -> Self {
        Self::new(Code::NotFound, format!("there is no {what} {}", quoted(name)))
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.view.hint = Some(hint.into());
        self
    }

    pub(crate) fn candidates(mut self, candidates: Vec<Candidate>) -> Self {
        self.view.candidates = candidates;
        self
    }

    pub(crate) fn problems(mut self, problems: Vec<Problem>) -> Self {
        self.view.problems = problems;
        self
    }

    /// For the log only.
    pub(crate) fn cause(mut self, cause: impl StdError + Send + Sync + 'static) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }
}

/// Text from outside in a message: escaped, in quotes, not endless.
pub(crate) fn quoted(text: &str) -> String {
    const LONGEST: usize = 100;
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("`{}`", escape_for_display(&shown))
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let view = if error.is_passing() {
            Self::new(Code::Unavailable, "the store is out of reach for the moment").hint("try again")
        } else {
            Self::new(Code::Internal, "the manager could not use its store").hint(LOG_HINT)
        };
        view.cause(error)
    }
}

const LOG_HINT: &str = "the manager's log says more";

/// Makes the answer of a handler that panicked.
pub(crate) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let message = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    tracing::error!(message, "A request's handler panicked.");
    Error::new(Code::Internal, "the manager failed at this request").hint(LOG_HINT).into_response()
}

const fn status(code: Code) -> StatusCode {
    match code {
        Code::NotAuthenticated => StatusCode::UNAUTHORIZED,
        Code::NotAllowed => StatusCode::FORBIDDEN,
        Code::NotFound | Code::TargetUnknown => StatusCode::NOT_FOUND,
        Code::Invalid => StatusCode::BAD_REQUEST,
        Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Code::AlreadyExists | Code::Conflict | Code::TargetAmbiguous | Code::NotConnected => {
            StatusCode::CONFLICT
        }
        Code::PatternRefused => StatusCode::UNPROCESSABLE_ENTITY,
        Code::TooMany => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Internal | Code::Other => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Whether a status that the framework chose for unreadable input means that there was too much of it.
pub(crate) fn is_too_large(status: StatusCode) -> bool {
    status == StatusCode::PAYLOAD_TOO_LARGE
}

/// A header that tells a client what to do about a code.
fn advice(code: Code) -> Option<(HeaderName, &'static str)> {
    match code {
        Code::NotAuthenticated => Some((header::WWW_AUTHENTICATE, "Bearer")),
        Code::TooMany | Code::Unavailable => Some((header::RETRY_AFTER, "2")),
        Code::NotAllowed
        | Code::NotFound
        | Code::Invalid
        | Code::TooLarge
        | Code::AlreadyExists
        | Code::Conflict
        | Code::TargetUnknown
        | Code::TargetAmbiguous
        | Code::NotConnected
        | Code::PatternRefused
        | Code::Internal
        | Code::Other => None,
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let code = self.view.code;
        if let Some(cause) = &self.cause {
            let cause = chain(cause.as_ref());
            if code == Code::Unavailable {
                tracing::warn!(cause, message = self.view.message, "A request could not be served for now.");
            } else {
                tracing::error!(cause, message = self.view.message, "A request failed.");
            }
        }
        let mut response = (status(code), Json(*self.view)).into_response();
        if let Some((name, value)) = advice(code) {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    escape_for_display(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_busy_asks_to_come_back_and_a_broken_one_does_not() {
        let busy = StoreError::Query { what: "read", source: sqlx::Error::PoolTimedOut };
        let response = Error::from(busy).into_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        let response = Error::from(StoreError::content("role", "king")).into_response();
        assert_eq!(response.status(), 500);
        assert!(!response.headers().contains_key(header::RETRY_AFTER));
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_that_does_not_say_why() {
        let response = panicked(Box::new("secret"));
        assert_eq!(response.status(), 500);
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        let view: ErrorView = serde_json::from_slice(&body).unwrap();
        assert_eq!(view.code, Code::Internal);
        assert!(!view.message.contains("secret"));
    }

    #[test]
    fn text_from_outside_is_tame_in_a_message() {
        assert_eq!(quoted("a\u{1b}[31m\n"), "`a\\u{1b}[31m\\u{a}`");
        assert_eq!(quoted(&"é".repeat(101)).chars().count(), 103);
    }
}
