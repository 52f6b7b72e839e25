//! Enrolled agents that are kept in a file, so that a fleet comes back as itself and is enrolled once.
//!
//! The file has one line of JSON for each: `number`, `endpoint`, `host`, `certificate` (DER, base64) and `key`
//! (PKCS#8, base64). Only its owner may read it. A last line that was cut off by a kill is left out and written
//! anew by the next enrollment.
//!
//! **Invariant:** an agent is in the file before it is used, so that no endpoint is left without its key.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};

use crate::wire::Persona;

/// Enrollments on their way at a time.
const AT_A_TIME: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    number: u64,
    endpoint: String,
    host: String,
    certificate: String,
    key: String,
}

/// The agents of a file, by number; none if there is no file.
///
/// # Errors
/// If it cannot be read, or holds something else.
pub fn load(path: &Path) -> io::Result<BTreeMap<u64, Persona>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let mut personas = BTreeMap::new();
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let Line { number, endpoint, host, certificate, key } = serde_json::from_str(line)?;
        let endpoint = endpoint.parse().map_err(io::Error::other)?;
        let bytes = |text: &str| STANDARD.decode(text).map_err(io::Error::other);
        personas.insert(number, Persona::known(endpoint, &host, &bytes(&certificate)?, &bytes(&key)?)?);
    }
    Ok(personas)
}

/// Enrolls agents under these numbers at the manager at `at`, with the secret of `token`, and puts them into the file.
/// `enrolled` hears of each.
///
/// # Errors
/// If one is refused or the file cannot be written; those that were enrolled by then are in it.
pub async fn enroll(
    path: &Path,
    at: SocketAddr,
    token: &str,
    numbers: impl IntoIterator<Item = u64>,
    mut enrolled: impl FnMut(u64),
) -> io::Result<BTreeMap<u64, Persona>> {
    mend(path)?;
    let mut file = File::options().create(true).append(true).mode(0o600).open(path)?;
    let mut personas = BTreeMap::new();
    // Those that are on their way when one fails are still waited for: their endpoints exist.
    let failed = Cell::new(false);
    let mut arriving = stream::iter(numbers.into_iter().take_while(|_| !failed.get()))
        .map(async |number| {
            Persona::enroll(at, token, &format!("sim-{number:05}")).await.map(|persona| (number, persona))
        })
        .buffer_unordered(AT_A_TIME);
    let mut outcome = Ok(());
    while let Some(arrived) = arriving.next().await {
        match arrived {
            Ok((number, persona)) => {
                let line = Line {
                    number,
                    endpoint: persona.endpoint.to_string(),
                    host: persona.host.clone(),
                    certificate: STANDARD.encode(&persona.certificate),
                    key: STANDARD.encode(&persona.key),
                };
                file.write_all(format!("{}\n", serde_json::to_string(&line)?).as_bytes())?;
                personas.insert(number, persona);
                enrolled(number);
            }
            Err(error) => {
                failed.set(true);
                outcome = outcome.and(Err(error));
            }
        }
    }
    outcome.map(|()| personas)
}

/// Cuts off a last line without an end.
fn mend(path: &Path) -> io::Result<()> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if whole < text.len() {
        File::options().write(true).open(path)?.set_len(u64::try_from(whole).unwrap_or(0))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u64) -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let line = Line {
            number,
            endpoint: "01890000-0000-7000-8000-000000000001".to_owned(),
            host: format!("sim-{number}"),
            certificate: STANDARD.encode(certificate.der()),
            key: STANDARD.encode(key.serialize_der()),
        };
        serde_json::to_string(&line).unwrap() + "\n"
    }

    #[test]
    fn agents_come_back_from_a_file_that_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("personas.jsonl");
        assert!(load(&path).unwrap().is_empty());
        let (whole, cut) = (line(1) + &line(2), line(3));
        fs::write(&path, whole.clone() + &cut[..cut.len() / 2]).unwrap();
        let known = load(&path).unwrap();
        assert_eq!(known.keys().copied().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(known[&2].host, "sim-2");
        mend(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        fs::write(&path, "{}\n").unwrap();
        load(&path).unwrap_err();
        fs::write(&path, line(1).replace("\"key\":\"", "\"key\":\"AAAA")).unwrap();
        load(&path).unwrap_err();
    }
}
