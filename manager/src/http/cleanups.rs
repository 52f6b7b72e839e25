//! `/v1/cleanups`: orders to remove what was detected.

use axum::{Extension, Json, extract::State};
use tm_api::{
    error::Code,
    task::{RunCleanup, TaskView},
};

use super::{
    Actor, AppState,
    error::{Error, quoted},
    input::Body,
    now_ms, orders,
};
use crate::store::cleanups::{CleanupRefusal, CleanupWish};

/// Most detections that an order names.
const MAX_KEYS: usize = 1000;
/// Shortest start of a key that stands for it, in digits.
const MIN_DIGITS: usize = 8;
/// Digits of a key.
const DIGITS: usize = 64;

pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(actor): Extension<Actor>,
    Body(request): Body<RunCleanup>,
) -> Result<Json<Vec<TaskView>>, Error> {
    let times = orders::terms(&request.terms)?;
    let keys = keys(&request.detections)?;
    let endpoints = orders::addressed(&state.store, &request.to).await?;
    let wish = CleanupWish {
        endpoints: &endpoints,
        keys: &keys,
        dry_run: request.terms.dry_run,
        when_connected: request.terms.when_connected,
        issuer: &actor.name,
        reason: &request.terms.reason,
        expires_in_ms: times.expires_in_ms,
        deadline_ms: times.deadline_ms,
    };
    let rows = state.store.order_cleanup(&wish, now_ms()).await?.map_err(refused)?;
    Ok(Json(orders::ordered(&state, rows)?))
}

fn keys(texts: &[String]) -> Result<Vec<String>, Error> {
    if texts.len() > MAX_KEYS {
        return Err(Error::invalid(format!("an order names at most {MAX_KEYS} detections")));
    }
    texts
        .iter()
        .map(|text| {
            let key = text.to_ascii_lowercase();
            let fits =
                (MIN_DIGITS..=DIGITS).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_hexdigit());
            if fits {
                Ok(key)
            } else {
                Err(Error::invalid(format!(
                    "{} is not a detection's key or a start of one ({MIN_DIGITS} to {DIGITS} hex digits)",
                    quoted(text)
                )))
            }
        })
        .collect()
}

fn refused(refusal: CleanupRefusal) -> Error {
    match refusal {
        CleanupRefusal::Unknown(key) => Error::new(
            Code::NotFound,
            format!("no detection on these endpoints has the key {}", quoted(&key)),
        )
        .hint("`tmctl task detections` lists a scan's detections with their keys"),
        CleanupRefusal::Ambiguous(key, keys) => {
            let mut shown: Vec<String> = keys.iter().take(10).map(|key| quoted(key)).collect();
            if keys.len() > shown.len() {
                shown.push("more".to_owned());
            }
            Error::new(
                Code::Conflict,
                format!(
                    "several detections have keys that begin with {}: {}",
                    quoted(&key),
                    shown.join(", ")
                ),
            )
            .hint("give more digits")
        }
        CleanupRefusal::UnderWay { task, host } => Error::new(
            Code::Conflict,
            format!("a cleanup of this is under way on {}: task {task}", quoted(&host)),
        )
        .hint(format!(
            "watch it with `tmctl task follow {task}`, or call it off with `tmctl task cancel {task}`"
        )),
        CleanupRefusal::Nothing(host) => {
            let place = host.map_or_else(|| "these endpoints".to_owned(), |host| quoted(&host));
            Error::new(Code::Conflict, format!("nothing awaits cleanup on {place}"))
                .hint("scan first (`tmctl scan start`), or name what to clean with `--detection`")
        }
        CleanupRefusal::TooMany(host) => Error::new(
            Code::TooLarge,
            format!("more awaits cleanup on {} than one order takes", quoted(&host)),
        )
        .hint("name the detections in several orders, with `--detection`"),
        CleanupRefusal::Away(rows) => orders::not_connected(&rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_at_least_eight_hex_digits() {
        let whole = "a".repeat(DIGITS);
        for (text, fits) in [
            ("deadbeef", true),
            ("DEADBEEF", true),
            (&*whole, true),
            ("deadbee", false),
            ("deadbeeg", false),
            ("", false),
            ("deadbeef%", false),
            (&*format!("{whole}a"), false),
        ] {
            assert_eq!(keys(&[text.to_owned()]).is_ok(), fits, "{text}");
        }
        assert_eq!(keys(&["DEADBEEF".to_owned()]).unwrap(), ["deadbeef"]);
    }
}
