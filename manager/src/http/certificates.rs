//! `/v1/certificates`, and what the overview says of them.

use axum::{Json, extract::State};
use tm_api::{
    certificate::{
        CertificateQuery, CertificateState, CertificateSummary, CertificateView, OwnCertificateView,
    },
    endpoint::Connectivity,
};

use super::{AppState, error::Error, input::Params, now_ms, rfc3339};
use crate::store::expiry::ExpiryRow;

const DAY_MS: i64 = 86_400_000;
/// Most days ahead: a hundred years.
const MOST_DAYS: u32 = 36_500;

pub(crate) async fn list(
    State(state): State<AppState>,
    Params(query): Params<CertificateQuery>,
) -> Result<Json<Vec<CertificateView>>, Error> {
    let days = query.expiring_days.unwrap_or(MOST_DAYS);
    if days > MOST_DAYS {
        return Err(Error::invalid(format!("more than {MOST_DAYS} days")));
    }
    let now = now_ms();
    let before = now.saturating_add(i64::from(days) * DAY_MS);
    let rows = state.store.certificates_ending(before).await?;
    Ok(Json(rows.into_iter().map(|row| view(row, now)).collect()))
}

/// What the overview says.
pub(crate) async fn summary(state: &AppState) -> Result<CertificateSummary, Error> {
    let now = now_ms();
    let own = state.store.own(state.manager).await?;
    let mut warnings: Vec<String> =
        own.iter().filter(|own| own.warning(now).is_some()).map(|own| own.sentence(now)).collect();
    let rows = state.store.certificates_ending(now.saturating_add(30 * DAY_MS)).await?;
    let ending: Vec<&ExpiryRow> =
        rows.iter().filter(|row| row.state(now) != CertificateState::Good).collect();
    let soon = |row: &&&ExpiryRow| row.warning(now).is_some_and(|days| days <= 7);
    let sooner = ending.iter().filter(soon).count();
    if !ending.is_empty() {
        warnings.push(format!(
            "{} of agents end within 30 days or have ended, and are not being renewed ({sooner} within 7 days): \
             `tmctl endpoint certificates --expiring 30`",
            if ending.len() == 1 { "1 certificate".to_owned() } else { format!("{} certificates", ending.len()) },
        ));
    }
    Ok(CertificateSummary {
        ending: ending.len() as u64,
        ending_7_days: sooner as u64,
        own: own
            .into_iter()
            .map(|own| OwnCertificateView {
                what: own.what,
                name: own.name,
                issuing: own.issuing,
                ends_at: rfc3339(own.end_ms),
            })
            .collect(),
        warnings,
    })
}

fn view(row: ExpiryRow, now: i64) -> CertificateView {
    CertificateView {
        state: row.state(now),
        endpoint: row.endpoint.to_string(),
        host: row.host,
        group: row.group,
        connectivity: if row.connected { Connectivity::Connected } else { Connectivity::Disconnected },
        last_seen_at: row.last_seen_ms.map(rfc3339),
        serial: row.serial,
        authority: row.authority,
        issued_at: rfc3339(row.issued_ms),
        ends_at: rfc3339(row.not_after_ms),
    }
}
