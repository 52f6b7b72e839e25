//! How an agent gets the next certificate, for a key that it made anew: over its session, or, if its certificate has
//! ended meanwhile, over a link of its own that is good for nothing else.
//!
//! **Invariant:** a certificate is issued to the endpoint that the shown certificate names, never to one that a
//! message names.

use std::time::Duration;

use bytes::BytesMut;
use tm_protocol::{
    ids::EndpointId,
    message::{Renew, Renewed, ToManager},
    report::Failure,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{LinkError, now_ms, read, session::Shared, write};
use crate::store::StoreError;

/// How long the request may take to arrive.
const REQUEST: Duration = Duration::from_secs(10);

/// Serves the one exchange of a link that is for renewal only.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    endpoint: EndpointId,
    shared: &Shared,
) -> Result<(), LinkError> {
    let mut buffer = BytesMut::new();
    let request = match timeout(REQUEST, read(link, &mut buffer)).await.map_err(|_| LinkError::Silent)?? {
        ToManager::Renew(request) => request,
        ToManager::Hello(_)
        | ToManager::Inventory(_)
        | ToManager::Ping(_)
        | ToManager::Pong(_)
        | ToManager::Report(_)
        | ToManager::Notices(_)
        | ToManager::Progress(_)
        | ToManager::EnrollRequest(_) => return Err(LinkError::Protocol("no renewal request")),
    };
    let renewed = renew(endpoint, &request, shared).await.map_err(LinkError::Store)?;
    write(link, &renewed.into()).await
}

/// Certifies the key of a request for `endpoint`.
///
/// # Errors
/// If the store fails.
pub(crate) async fn renew(
    endpoint: EndpointId,
    request: &Renew,
    shared: &Shared,
) -> Result<Renewed, StoreError> {
    let Ok(issued) = shared.authorities.now().certify(endpoint, &request.csr) else {
        return Ok(refuse("csr-invalid", "the certificate request is not one"));
    };
    if shared.store.renew(endpoint, &issued.row(), now_ms()).await? {
        tracing::info!(%endpoint, serial = issued.serial, "A certificate is renewed.");
        Ok(Renewed::Certified { certificate: issued.der })
    } else {
        Ok(refuse("revoked", "the certificate of this endpoint was revoked"))
    }
}

fn refuse(code: &str, message: &str) -> Renewed {
    Renewed::Refused(Failure::new(code, message))
}
