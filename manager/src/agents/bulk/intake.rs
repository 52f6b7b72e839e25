//! Uploads over HTTP.
//!
//! | request | answer |
//! |---|---|
//! | `POST /v1/uploads` with `{"size": N, "sha256": "…", "kind": "evidence"}` | 201 and how it stands: a new one, or the same announced before |
//! | `HEAD /v1/uploads/ID` | 204; `Upload-Offset`, `Upload-Length`, `Upload-Complete` (`?0`, `?1`) |
//! | `PUT /v1/uploads/ID` with `Upload-Offset: N` and `Content-Length` | 200 and how it stands; 409 with the right offset if it is not N; 422 if everything arrived and is something else |
//! | `DELETE /v1/uploads/ID` | 204 |
//!
//! What is on its way when a link is cut is lost, so whoever sends a part at a time, and the next when it is answered,
//! sends at most one part twice.
//!
//! How it stands: `{"id": "…", "offset": N, "size": N, "complete": false}`. An upload of another endpoint is not there
//! (404); what is too much for the endpoint is 413 or 429, for the manager 507 or 503.

use std::sync::Arc;

use http_body_util::{BodyExt as _, Limited};
use hyper::{
    Method, Request, StatusCode,
    body::{Body as _, Incoming},
    header::{CONTENT_LENGTH, HeaderName, HeaderValue},
};
use serde_json::json;
use tm_protocol::ids::EndpointId;
use uuid::Uuid;

use super::{
    Answer, Inner, Moved, busy,
    files::Open,
    method, status_only, text,
    turns::{Busy, Turn},
    uploads::{Announced, Standing, UploadError, Writer},
};
use crate::metrics::METRICS;

/// Longest announcement, in bytes.
const ANNOUNCEMENT: usize = 4096;
const OFFSET: HeaderName = HeaderName::from_static("upload-offset");
const LENGTH: HeaderName = HeaderName::from_static("upload-length");
const COMPLETE: HeaderName = HeaderName::from_static("upload-complete");

/// Answers a request on an upload, or on all if there is no `id`.
pub(super) async fn answer(
    inner: &Arc<Inner>,
    request: Request<Incoming>,
    id: Option<&str>,
    endpoint: EndpointId,
    moved: &Arc<Moved>,
) -> Answer {
    let Some(id) = id else {
        return if *request.method() == Method::POST {
            begin(inner, request, endpoint, moved).await
        } else {
            method("POST")
        };
    };
    // Only as it is written in answers.
    let Some(id) = id.parse::<Uuid>().ok().filter(|parsed| parsed.to_string() == id) else {
        return status_only(StatusCode::NOT_FOUND);
    };
    let done = match *request.method() {
        Method::HEAD => {
            inner.uploads.standing(id, endpoint).map(|standing| headed(StatusCode::NO_CONTENT, standing))
        }
        Method::PUT => put(inner, request, id, endpoint, moved).await,
        Method::DELETE => inner.uploads.give_up(id, endpoint).map(|()| status_only(StatusCode::NO_CONTENT)),
        _ => return method("HEAD, PUT, DELETE"),
    };
    done.unwrap_or_else(|error| refused(&error, endpoint))
}

async fn begin(
    inner: &Arc<Inner>,
    request: Request<Incoming>,
    endpoint: EndpointId,
    moved: &Arc<Moved>,
) -> Answer {
    let _open = Open::new(Arc::clone(moved));
    let Ok(body) = Limited::new(request.into_body(), ANNOUNCEMENT).collect().await else {
        return status_only(StatusCode::PAYLOAD_TOO_LARGE);
    };
    let Ok(announced) = serde_json::from_slice::<Announced>(&body.to_bytes()) else {
        return text(StatusCode::BAD_REQUEST, "an announcement has `size`, `sha256` and `kind`\n".to_owned());
    };
    let uploads = Arc::clone(inner);
    match tokio::task::spawn_blocking(move || uploads.uploads.begin(endpoint, announced)).await {
        Ok(Ok(standing)) => told(StatusCode::CREATED, standing),
        Ok(Err(error)) => refused(&error, endpoint),
        Err(_) => status_only(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

async fn put(
    inner: &Inner,
    request: Request<Incoming>,
    id: Uuid,
    endpoint: EndpointId,
    moved: &Arc<Moved>,
) -> Result<Answer, UploadError> {
    let number = |name: &HeaderName| -> Option<u64> {
        let value = request.headers().get(name)?.to_str().ok()?;
        value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse().ok())?
    };
    let Some(offset) = number(&OFFSET) else {
        return Ok(text(StatusCode::BAD_REQUEST, "`Upload-Offset` is missing\n".to_owned()));
    };
    // A body that does not say where it ends would have to be believed.
    let Some(length) = number(&CONTENT_LENGTH).or(request.body().size_hint().exact()) else {
        return Ok(status_only(StatusCode::LENGTH_REQUIRED));
    };
    // Before a place is waited for: most mistakes show at once.
    let standing = inner.uploads.standing(id, endpoint)?;
    if standing.offset != offset {
        return Err(UploadError::Offset(standing.offset));
    }
    let turn = match inner.turns.take(endpoint).await {
        Ok(turn) => turn,
        Err(Busy) => return Ok(busy()),
    };
    let writer = inner.uploads.go_on(id, endpoint, offset, length).await?;
    let (writer, is_all) = receive(writer, request.into_body(), &turn, moved).await?;
    let standing = inner.uploads.finish(writer).await?;
    if is_all {
        return Ok(told(StatusCode::OK, standing));
    }
    let mut answer = busy();
    answer.headers_mut().insert(OFFSET, HeaderValue::from(standing.offset));
    Ok(answer)
}

/// Takes what comes; `false` if it was somebody else's turn before the end.
async fn receive(
    mut writer: Writer,
    mut body: Incoming,
    turn: &Turn,
    moved: &Arc<Moved>,
) -> Result<(Writer, bool), UploadError> {
    let _open = Open::new(Arc::clone(moved));
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            () = writer.taken_over() => return Err(UploadError::TakenOver),
        };
        let bytes = match frame {
            None => return Ok((writer, true)),
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            // The link is cut; what has arrived is kept.
            Some(Err(_)) => {
                writer.flush().await?;
                return Ok((writer, true));
            }
        };
        moved.add(bytes.len());
        METRICS.bulk_up(bytes.len());
        writer.write(&bytes).await?;
        turn.pay(bytes.len()).await;
        if turn.is_over() {
            return Ok((writer, false));
        }
    }
}

fn told(status: StatusCode, standing: Standing) -> Answer {
    let Standing { id, offset, size, is_whole } = standing;
    text(status, json!({ "id": id, "offset": offset, "size": size, "complete": is_whole }).to_string())
}

fn headed(status: StatusCode, standing: Standing) -> Answer {
    let mut answer = status_only(status);
    let headers = answer.headers_mut();
    headers.insert(OFFSET, HeaderValue::from(standing.offset));
    headers.insert(LENGTH, HeaderValue::from(standing.size));
    headers.insert(COMPLETE, HeaderValue::from_static(if standing.is_whole { "?1" } else { "?0" }));
    answer
}

fn refused(error: &UploadError, endpoint: EndpointId) -> Answer {
    let status = match error {
        UploadError::Unknown => StatusCode::NOT_FOUND,
        UploadError::Size | UploadError::TooMuch => StatusCode::PAYLOAD_TOO_LARGE,
        UploadError::OwnQuota => StatusCode::TOO_MANY_REQUESTS,
        UploadError::Full => StatusCode::INSUFFICIENT_STORAGE,
        UploadError::Offset(_) => StatusCode::CONFLICT,
        UploadError::Digest => StatusCode::UNPROCESSABLE_ENTITY,
        UploadError::TakenOver => return busy(),
        UploadError::Store(cause) => {
            tracing::error!(%cause, %endpoint, "Cannot store what an agent hands in.");
            StatusCode::INSUFFICIENT_STORAGE
        }
    };
    let mut answer = text(status, format!("{error}\n"));
    if let UploadError::Offset(offset) = error {
        answer.headers_mut().insert(OFFSET, HeaderValue::from(*offset));
    }
    if matches!(status, StatusCode::INSUFFICIENT_STORAGE | StatusCode::TOO_MANY_REQUESTS) {
        answer.headers_mut().insert(hyper::header::RETRY_AFTER, HeaderValue::from(60));
    }
    answer
}
