//! What every order has in common: for whom it is, on which terms, and how it is refused.

use std::collections::BTreeMap;

use tm_api::{
    error::Code,
    task::{Targets, TaskView, Terms},
};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    message::{Assign, ToAgent},
    report::PathBytes,
    task::ScanSpec,
};
use uuid::Uuid;

use super::{
    AppState, endpoints,
    error::{Error, quoted},
    input, tasks,
};
use crate::store::{
    Store,
    endpoints::{EndpointRow, Filter},
    tasks::{Order, TaskRow},
};

/// Most endpoints in one order.
const MAX_ENDPOINTS: usize = 10_000;
/// Most endpoints named in one refusal.
const MAX_NAMED: usize = 10;
pub(crate) const HOUR_S: u64 = 3600;
const MAX_S: u64 = 30 * 24 * HOUR_S;

/// How long an order may wait and run, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) expires_in_ms: i64,
    pub(crate) deadline_ms: i64,
}

/// Checks an order's terms; without a deadline it has an hour.
pub(crate) fn terms(terms: &Terms) -> Result<Times, Error> {
    times(terms.expires_in_s, terms.deadline_s, HOUR_S, &terms.reason)
}

/// Checks how long an order may wait (an hour if nothing is said) and run, and its reason.
pub(crate) fn times(
    expires_in_s: Option<u64>,
    deadline_s: Option<u64>,
    default_deadline_s: u64,
    reason: &str,
) -> Result<Times, Error> {
    if reason.len() > endpoints::MAX_REASON {
        return Err(Error::invalid(format!("the reason is longer than {} bytes", endpoints::MAX_REASON)));
    }
    Ok(Times {
        expires_in_ms: milliseconds("expires_in_s", expires_in_s.unwrap_or(HOUR_S))?,
        deadline_ms: milliseconds("deadline_s", deadline_s.unwrap_or(default_deadline_s))?,
    })
}

fn milliseconds(what: &str, seconds: u64) -> Result<i64, Error> {
    match i64::try_from(seconds) {
        Ok(s) if (1..=MAX_S).contains(&seconds) => Ok(s * 1000),
        _ => Err(Error::invalid(format!("`{what}` is not within 1 to {MAX_S} seconds"))),
    }
}

/// Checks a path that an endpoint is to use.
pub(crate) fn absolute(text: &str, bytes: Option<Vec<u8>>) -> Result<PathBytes, Error> {
    let path = bytes.ok_or_else(|| Error::invalid(format!("{} is not base64 of a path", quoted(text))))?;
    let fits = path.first() == Some(&b'/') && !path.contains(&0) && path.len() <= ScanSpec::MAX_PATH;
    if fits {
        return Ok(PathBytes(path));
    }
    let shown = PathBytes(path).to_string();
    Err(Error::invalid(format!("{} is not an absolute path", quoted(&shown))))
}

/// Every endpoint that an order is for, once, and whether it was named itself.
pub(crate) async fn addressed(store: &Store, to: &Targets) -> Result<Vec<(EndpointRow, bool)>, Error> {
    if to.targets.is_empty() && to.search.is_none() && to.group.is_none() && to.query.is_none() {
        return Err(Error::invalid("the order names no target, search, group or query"));
    }
    let too_many = || Error::invalid(format!("an order is for at most {MAX_ENDPOINTS} endpoints"));
    if to.targets.len() > MAX_ENDPOINTS {
        return Err(too_many());
    }
    let mut found: BTreeMap<EndpointId, (EndpointRow, bool)> = BTreeMap::new();
    for target in &to.targets {
        let row = endpoints::one(store, target).await?;
        if row.revoked_ms.is_some() {
            return Err(Error::new(
                Code::Conflict,
                format!("the agent of {} was revoked", quoted(&row.host)),
            ));
        }
        found.insert(row.id, (row, true));
    }
    let mut filters = Vec::new();
    if let Some(search) = &to.search {
        filters.push(Filter { terms: endpoints::terms(search)?, ..Filter::default() });
    }
    if let Some(group) = &to.group {
        input::group(group)?;
        if !store.has_group(group).await? {
            let message = format!("there is no group {}", quoted(group));
            return Err(Error::new(Code::TargetUnknown, message).hint("see them all: tmctl group list"));
        }
        filters.push(Filter { group: Some(group.clone()), ..Filter::default() });
    }
    if let Some(query) = to.query {
        filters.push(Filter { query: Some(query), ..Filter::default() });
    }
    for filter in filters {
        let rows = store.addressees(&filter).await?;
        for row in rows.into_iter().filter(|row| row.revoked_ms.is_none()) {
            found.entry(row.id).or_insert((row, false));
        }
    }
    match found.len() {
        0 => Err(Error::new(Code::TargetUnknown, "the search, group or query finds no endpoint")),
        1..=MAX_ENDPOINTS => Ok(found.into_values().collect()),
        _ => Err(too_many()),
    }
}

/// Refuses an order for endpoints of which some are away.
pub(crate) fn all_connected<'a>(rows: impl IntoIterator<Item = &'a EndpointRow>) -> Result<(), Error> {
    let away: Vec<EndpointRow> = rows.into_iter().filter(|row| !row.connected).cloned().collect();
    if away.is_empty() { Ok(()) } else { Err(not_connected(&away)) }
}

/// The refusal that names who is away.
pub(crate) fn not_connected(away: &[EndpointRow]) -> Error {
    let named = &away[..away.len().min(MAX_NAMED)];
    let mut names: Vec<String> = named.iter().map(|row| quoted(&row.host)).collect();
    if away.len() > MAX_NAMED {
        names.push(format!("{} more", away.len() - MAX_NAMED));
    }
    Error::new(Code::NotConnected, format!("not connected: {}", names.join(", ")))
        .hint("ask for `when_connected` (--when-connected) to keep the order until they connect")
        .candidates(endpoints::candidates(named))
}

/// An order that no frame can carry would wait for ever.
pub(crate) fn fits_a_frame(order: &Order<'_>) -> Result<(), Error> {
    let assign = Assign {
        task: TaskId::new(Uuid::nil()),
        endpoint: EndpointId::new(Uuid::nil()),
        spec: order.spec.clone(),
        expires_in_ms: order.expires_in_ms.unsigned_abs(),
        deadline_ms: order.deadline_ms.unsigned_abs(),
        issuer: order.issuer.to_owned(),
        reason: order.reason.to_owned(),
    };
    ToAgent::from(assign).encode(&mut bytes::BytesMut::new()).map_err(|_| {
        Error::new(Code::TooLarge, "the order's paths and patterns are too long for one message to an agent")
    })
}

/// Wakes the dispatcher and shows what was ordered.
pub(crate) fn ordered(state: &AppState, rows: Vec<TaskRow>) -> Result<Vec<TaskView>, Error> {
    state.nudge.notify_one();
    Ok(rows.into_iter().map(tasks::view).collect::<Result<_, _>>()?)
}
