//! The manager's REST API, asked one request at a time.
//!
//! **Invariant:** a request that changes something is sent once; only the caller decides to ask again, and
//! only for reading.

use std::{error::Error as StdError, io, path::PathBuf, time::Duration};

use reqwest::{Method, RequestBuilder, StatusCode, Url, redirect::Policy};
use rustls::{CertificateError, Error as TlsError};
use serde::{Serialize, de::DeserializeOwned};
use tm_api::{
    PREFIX, Page, PageQuery,
    error::{Code, ErrorView},
};

use crate::{failure::Failure, profile::Profile, tls};

const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(60);
/// A pattern is compiled by the manager before it answers.
const IMPORT: Duration = Duration::from_secs(5 * 60);

/// A way to one manager.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    profile: Profile,
}

/// Why a request did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The manager said no.
    #[error(transparent)]
    Refused(Box<ErrorView>),
    /// The manager does not know the token.
    #[error("the manager at {url} does not accept the token in `{}`", profile.display())]
    NotAuthenticated {
        /// Where.
        url: Box<Url>,
        /// Whose token.
        profile: PathBuf,
    },
    /// Nobody answers, or the connection broke.
    #[error("cannot reach the manager at {url}")]
    Unreachable {
        /// Where.
        url: Box<Url>,
        /// From which profile.
        profile: PathBuf,
        /// The innermost reason.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Somebody else answers.
    #[error("what answers at {url} is not the manager of the profile `{}`: {reason}", profile.display())]
    NotTheManager {
        /// Where.
        url: Box<Url>,
        /// Of which profile.
        profile: PathBuf,
        /// Why it is not.
        reason: String,
    },
    /// No answer in time.
    #[error("the manager at {url} did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// Where.
        url: Box<Url>,
        /// How long it was waited for.
        limit: Duration,
    },
    /// An answer that is not of the contract.
    #[error("the manager at {url} answered {status} with something this tmctl does not understand")]
    Strange {
        /// What was asked.
        url: Box<Url>,
        /// The status.
        status: StatusCode,
    },
    /// An argument that cannot stand in an address.
    #[error("`{0}` is not a name or id")]
    Name(String),
    /// No TLS on this machine.
    #[error("cannot set up TLS")]
    Setup(#[source] Box<dyn StdError + Send + Sync>),
}

impl ClientError {
    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Refused(view) => view.hint.clone(),
            Self::NotAuthenticated { profile, .. } => Some(format!(
                "an administrator makes a new token with `tmctl account token NAME`; put it into `{}`",
                profile.display()
            )),
            Self::Unreachable { profile, .. } => Some(format!(
                "see whether tm-manager runs there, and whether `url` in `{}` is right",
                profile.display()
            )),
            Self::NotTheManager { profile, .. } => Some(format!(
                "nothing was sent to it; if the manager was set up anew, `{}` needs its new profile, \
                 otherwise somebody may stand between",
                profile.display()
            )),
            Self::TimedOut { .. } => Some(
                "it may still have done what was asked; `tmctl task list` and `tmctl audit list` tell"
                    .to_owned(),
            ),
            Self::Strange { .. } => Some("compare `tmctl --version` with the manager's version".to_owned()),
            Self::Name(_) | Self::Setup(_) => None,
        }
    }

    /// Whether a manager that restarts would look like this.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } => true,
            Self::Refused(view) => matches!(view.code, Code::Unavailable | Code::TooMany),
            Self::NotAuthenticated { .. }
            | Self::NotTheManager { .. }
            | Self::Strange { .. }
            | Self::Name(_)
            | Self::Setup(_) => false,
        }
    }
}

impl Client {
    /// A client for the manager of `profile`; connects with the first request.
    ///
    /// # Errors
    /// If there is no TLS.
    pub(crate) fn new(profile: Profile) -> Result<Self, ClientError> {
        let tls = tls::config(profile.ca_sha256).map_err(|error| ClientError::Setup(error.into()))?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .redirect(Policy::none())
            // The way to a manager is the profile's, not that of an environment variable.
            .no_proxy()
            .connect_timeout(CONNECT)
            .user_agent(concat!("tmctl/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ClientError::Setup(error.into()))?;
        Ok(Self { http, profile })
    }

    /// Reads.
    ///
    /// # Errors
    /// If the manager refuses or cannot be asked.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &impl Serialize,
    ) -> Result<T, ClientError> {
        let url = self.url(path)?;
        self.answer(self.http.request(Method::GET, url.clone()).query(query), url, REQUEST).await
    }

    /// Reads every page after a position; `take` gets one after the other.
    ///
    /// # Errors
    /// If the manager refuses, cannot be asked, or leads in a circle.
    pub(crate) async fn pages<T: DeserializeOwned>(
        &self,
        path: &[&str],
        what: &'static str,
        mut after: i64,
        mut take: impl FnMut(Vec<T>),
    ) -> Result<(), Failure> {
        loop {
            let page: Page<T> = self.get(path, &PageQuery { after, limit: None }).await?;
            take(page.items);
            match page.next {
                None => return Ok(()),
                Some(next) if next > after => after = next,
                Some(_) => return Err(Failure::EndlessPages(what)),
            }
        }
    }

    /// Orders or makes something.
    ///
    /// # Errors
    /// If the manager refuses or cannot be asked.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let url = self.url(path)?;
        self.answer(self.http.request(Method::POST, url.clone()).json(body), url, REQUEST).await
    }

    /// Changes something.
    ///
    /// # Errors
    /// If the manager refuses or cannot be asked.
    pub(crate) async fn put<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let url = self.url(path)?;
        self.answer(self.http.request(Method::PUT, url.clone()).json(body), url, REQUEST).await
    }

    /// Ends something.
    ///
    /// # Errors
    /// If the manager refuses or cannot be asked.
    pub(crate) async fn delete(&self, path: &[&str]) -> Result<(), ClientError> {
        let url = self.url(path)?;
        self.bytes(self.http.request(Method::DELETE, url.clone()), url, REQUEST).await.map(drop)
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the manager refuses or cannot be asked.
    pub(crate) async fn upload<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &impl Serialize,
        bytes: Vec<u8>,
    ) -> Result<T, ClientError> {
        let url = self.url(path)?;
        let request = self.http.request(Method::POST, url.clone()).query(query).body(bytes);
        self.answer(request, url, IMPORT).await
    }

    fn url(&self, path: &[&str]) -> Result<Url, ClientError> {
        // `Url` would drop these instead of sending them, and the address would be another one.
        if let Some(bad) = path.iter().find(|segment| matches!(**segment, "" | "." | "..")) {
            return Err(ClientError::Name((*bad).to_owned()));
        }
        let mut url = self.profile.url.clone();
        url.path_segments_mut()
            .expect("an https address has a path")
            .clear()
            .push(PREFIX.trim_start_matches('/'))
            .extend(path);
        Ok(url)
    }

    async fn answer<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        url: Url,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let (status, body) = self.bytes(request, url.clone(), limit).await?;
        serde_json::from_slice(&body).map_err(|_| ClientError::Strange { url: Box::new(url), status })
    }

    /// Sends; an answer that is not a success becomes an error.
    async fn bytes(
        &self,
        request: RequestBuilder,
        url: Url,
        limit: Duration,
    ) -> Result<(StatusCode, Vec<u8>), ClientError> {
        let request = request.bearer_auth(self.profile.token.expose()).timeout(limit);
        let response = request.send().await.map_err(|error| self.broken(error, limit))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.broken(error, limit))?;
        if status.is_success() {
            return Ok((status, body.into()));
        }
        if status == StatusCode::UNAUTHORIZED {
            let (url, profile) = (Box::new(self.profile.url.clone()), self.profile.path.clone());
            return Err(ClientError::NotAuthenticated { url, profile });
        }
        match serde_json::from_slice::<ErrorView>(&body) {
            Ok(view) => Err(ClientError::Refused(Box::new(view))),
            Err(_) => Err(ClientError::Strange { url: Box::new(url), status }),
        }
    }

    fn broken(&self, error: reqwest::Error, limit: Duration) -> ClientError {
        let (url, profile) = (Box::new(self.profile.url.clone()), self.profile.path.clone());
        if let Some(reason) = distrust(&error) {
            return ClientError::NotTheManager { url, profile, reason };
        }
        if error.is_timeout() && error.is_connect() {
            let source = format!("no connection within {} s", CONNECT.as_secs()).into();
            return ClientError::Unreachable { url, profile, source };
        }
        if error.is_timeout() {
            return ClientError::TimedOut { url, limit };
        }
        // Layers of the HTTP library say nothing to people; the innermost cause does.
        let mut innermost: &dyn StdError = &error;
        while let Some(cause) = innermost.source() {
            innermost = cause;
        }
        let source = match innermost.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => "connection refused".into(),
            _ => innermost.to_string().into(),
        };
        ClientError::Unreachable { url, profile, source }
    }
}

/// Why the other side's certificate was not believed, if that is what went wrong.
fn distrust(error: &reqwest::Error) -> Option<String> {
    let mut cause: Option<&dyn StdError> = Some(error);
    while let Some(error) = cause {
        let wrapped = error.downcast_ref::<io::Error>().and_then(|io| io.get_ref());
        let tls = match wrapped {
            Some(inner) => inner.downcast_ref::<TlsError>(),
            None => error.downcast_ref::<TlsError>(),
        };
        if let Some(TlsError::InvalidCertificate(problem)) = tls {
            return Some(if let CertificateError::Other(ours) = problem {
                ours.0.to_string()
            } else {
                format!("its certificate is not valid ({problem})")
            });
        }
        // An I/O error passes over what it wraps when it is asked for its cause.
        cause = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        testing::{acceptor, client},
        tls::tests::Authority,
    };

    type Expected = fn(&ClientError) -> bool;

    /// A server with a real certificate that gives one answer to every request and keeps what it was asked.
    async fn server(
        authority: &Authority,
        answer: &'static str,
    ) -> (SocketAddr, tokio::sync::mpsc::Receiver<String>) {
        let acceptor = acceptor(authority);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, requests) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut request = vec![0; 64 << 10];
                let read = stream.read(&mut request).await.unwrap_or(0);
                asked.send(String::from_utf8_lossy(&request[..read]).into_owned()).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        (address, requests)
    }

    #[tokio::test]
    async fn the_manager_of_the_profile_is_asked_and_nobody_else() {
        let (ours, other) = (Authority::new(), Authority::new());
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\n[42]";
        let (address, mut requests) = server(&ours, ok).await;

        let got: Vec<i32> = client(address, ours.digest()).get(&["endpoints", "a/b?c"], &()).await.unwrap();
        assert_eq!(got, [42]);
        let request = requests.recv().await.unwrap();
        assert!(request.starts_with("GET /v1/endpoints/a%2Fb%3Fc HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("authorization: Bearer t0ken"), "{request}");

        let error = client(address, other.digest()).get::<Vec<i32>>(&["endpoints"], &()).await.unwrap_err();
        assert!(matches!(error, ClientError::NotTheManager { .. }), "{error:?}");
        assert!(error.to_string().ends_with("another authority than the profile names"), "{error}");
        assert!(!error.may_pass());
        assert!(requests.try_recv().is_err(), "the token must not have been sent");
    }

    #[tokio::test]
    async fn every_kind_of_failure_is_told_apart() {
        let ours = Authority::new();
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = client(closed, ours.digest()).get::<()>(&["version"], &()).await.unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { .. }) && error.may_pass(), "{error:?}");
        let report = Failure::from(error).report();
        assert!(report.contains(": connection refused\nhint: see whether tm-manager runs"), "{report}");

        let answers: [(&str, Expected); 4] = [
            ("HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", |e| {
                matches!(e, ClientError::NotAuthenticated { .. })
            }),
            (
                "HTTP/1.1 409 No\r\ncontent-length: 34\r\n\r\n{\"code\":\"conflict\",\"message\":\"no\"} ",
                |e| matches!(e, ClientError::Refused(view) if view.code == Code::Conflict),
            ),
            ("HTTP/1.1 502 No\r\ncontent-length: 6\r\n\r\n<html>", |e| {
                matches!(e, ClientError::Strange { .. })
            }),
            ("", |e| matches!(e, ClientError::Unreachable { .. }) && e.may_pass()),
        ];
        for (answer, is_right) in answers {
            let (address, _requests) = server(&ours, answer).await;
            let error = client(address, ours.digest()).get::<()>(&["version"], &()).await.unwrap_err();
            assert!(is_right(&error), "{answer:?}: {error:?}");
        }
        for bad in ["", ".", ".."] {
            let error = client(closed, ours.digest()).delete(&["accounts", bad]).await.unwrap_err();
            assert!(matches!(error, ClientError::Name(_)), "{bad:?}: {error:?}");
        }
    }
}
