//! Patterns, fetched by digest from the manager in use and kept.
//!
//! **Invariant:** bytes are used only if they are exactly those that the order names.

use std::{fs, sync::Arc, time::Duration};

use rustls::ClientConfig;
use tm_patterns::{MAX_SIZE, Pattern};
use tm_protocol::{address::Address, ids::Sha256, report::Failure, task::PatternRef};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    time::timeout,
};

use crate::{
    connection,
    paths::{Paths, make_folder, replace},
};

/// How long one pattern may take.
const TRANSFER: Duration = Duration::from_secs(300);
/// Longest header line and most lines of an answer.
const MAX_LINE: u64 = 8192;
const MAX_LINES: usize = 64;

/// The pattern that `wanted` names: from the folder, or else from the manager.
pub(crate) async fn pattern(
    paths: &Paths,
    address: Option<&Address>,
    config: &Arc<ClientConfig>,
    wanted: &PatternRef,
) -> Result<Pattern, Failure> {
    let failed = |why: String| {
        let from = address.map(|address| format!(" from {address}")).unwrap_or_default();
        Failure::new("pattern-fetch-failed", format!("cannot fetch pattern `{}`{from}: {why}", wanted.name))
    };
    let kept = paths.patterns().join(wanted.sha256.to_string());
    // A kept file that was changed is no longer what its name says, and is fetched again.
    if let Some(pattern) = fs::read(&kept).ok().and_then(|bytes| Pattern::verified(wanted, bytes).ok()) {
        return Ok(pattern);
    }
    let length = usize::try_from(wanted.size).ok().filter(|size| *size <= MAX_SIZE);
    let length = length.ok_or_else(|| failed(format!("{} bytes are too many", wanted.size)))?;
    let address = address.ok_or_else(|| failed("no manager's address is known".to_owned()))?;
    let bytes = match timeout(TRANSFER, get(address, config, wanted, length)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(why)) => return Err(failed(why)),
        Err(_) => return Err(failed(format!("not complete after {} s", TRANSFER.as_secs()))),
    };
    let pattern = Pattern::verified(wanted, bytes.clone()).map_err(|error| failed(error.to_string()))?;
    make_folder(&paths.patterns()).and_then(|()| replace(&kept, &bytes)).map_err(|error| {
        Failure::new("pattern-not-kept", format!("cannot keep pattern `{}`: {error}", wanted.name))
    })?;
    Ok(pattern)
}

/// A pattern that was fetched before and is kept whole; `None` if it is not.
pub(crate) fn kept(paths: &Paths, sha256: Sha256) -> Option<Pattern> {
    let bytes = fs::read(paths.patterns().join(sha256.to_string())).ok()?;
    let size = u64::try_from(bytes.len()).ok()?;
    Pattern::verified(&PatternRef { sha256, size, name: sha256.to_string() }, bytes).ok()
}

async fn get(
    address: &Address,
    config: &Arc<ClientConfig>,
    wanted: &PatternRef,
    length: usize,
) -> Result<Vec<u8>, String> {
    let link = connection::dial(address, config).await.map_err(|e| connection::chain(&e))?;
    let mut link = BufReader::new(link);
    let request = format!(
        "GET /v1/patterns/{} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n",
        wanted.sha256
    );
    link.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
    link.flush().await.map_err(|e| e.to_string())?;
    let status = line(&mut link).await?;
    if !status.starts_with("HTTP/1.1 200 ") {
        return Err(format!("the manager answers `{}`", tm_protocol::text::escape_for_display(&status)));
    }
    let mut announced = None;
    for _ in 0..MAX_LINES {
        let header = line(&mut link).await?;
        if header.is_empty() {
            if announced != Some(length) {
                return Err("its length is not the one that was ordered".to_owned());
            }
            let mut bytes = vec![0; length];
            link.read_exact(&mut bytes).await.map_err(|e| e.to_string())?;
            return Ok(bytes);
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            announced = value.trim().parse().ok();
        }
    }
    Err("the answer's header does not end".to_owned())
}

async fn line(link: &mut BufReader<connection::Link>) -> Result<String, String> {
    let mut line = Vec::new();
    link.take(MAX_LINE).read_until(b'\n', &mut line).await.map_err(|e| e.to_string())?;
    let text = line.strip_suffix(b"\n").ok_or("the answer breaks off")?;
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    Ok(String::from_utf8_lossy(text).into_owned())
}
