//! Warns of certificates that end: those of agents that do not renew theirs, the authorities', and the manager's own.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{authorities::Live, now_ms, tls::Shown};
use crate::store::{Store, StoreError, expiry::Own};

/// How often is looked at most and at least.
const OFTEN: Duration = Duration::from_millis(500);
const SELDOM: Duration = Duration::from_secs(60);
/// No warning comes earlier than this before an end.
const HORIZON_MS: i64 = 30 * 86_400_000;

/// Looks until the manager ends.
pub(crate) async fn run(store: Store, live: Arc<Live>, shown: Arc<Shown>, ending: CancellationToken) {
    let every = (live.life() / 40).clamp(OFTEN, SELDOM);
    let mut kept = Vec::new();
    while !ending.is_cancelled() {
        if let Err(error) = look(&store, &live, &shown, &mut kept).await {
            tracing::warn!(%error, "Cannot look for certificates that end.");
        }
        tokio::select! {
            () = sleep(every) => {}
            () = ending.cancelled() => {}
        }
    }
}

async fn look(store: &Store, live: &Live, shown: &Shown, kept: &mut Vec<Own>) -> Result<(), StoreError> {
    let (authorities, now) = (live.now(), now_ms());
    let manager = authorities.manager();
    let mut own: Vec<Own> = authorities
        .all()
        .iter()
        .map(|authority| Own {
            what: "authority".to_owned(),
            name: authority.digest().to_string(),
            issuing: authority.digest() == authorities.issuing().digest(),
            begin_ms: authority.validity_ms.0,
            end_ms: authority.validity_ms.1,
        })
        .collect();
    if let Some((begin_ms, end_ms)) = shown.validity_ms() {
        let name = manager.to_string();
        own.push(Own { what: "manager".to_owned(), name, issuing: false, begin_ms, end_ms });
    }
    if own != *kept {
        store.keep_own(manager, &own).await?;
        kept.clone_from(&own);
    }
    for certificate in &own {
        if store.warn_of_own_end(certificate, now).await? {
            tracing::warn!("{}.", certificate.sentence(now));
        }
    }
    for row in store.certificates_ending(now.saturating_add(HORIZON_MS)).await? {
        store.warn_of_end(&row, now).await?;
    }
    Ok(())
}
