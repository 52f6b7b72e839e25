//! Certificates are looked up here, all that wait with one statement: a fleet that comes back asks for ten thousand of
//! them, and a statement costs the same for one and for a hundred.
//!
//! There is no waiting for company: a lone certificate is looked up at once, and who asks meanwhile is the next batch.
//!
//! **Invariant:** an answer is what the database said after it was asked for, never what it said before.

use tm_protocol::ids::EndpointId;
use tokio::sync::{mpsc, oneshot};

use super::{now_ms, tls::Peer};
use crate::store::{Store, StoreError, enrollments::CertificateStatus, sessions::writer_ended};

/// Questions that wait; more wait with their links.
const WAITING: usize = 1024;
/// Certificates in one statement.
const BATCH: usize = 256;

type Answer<T> = Result<T, StoreError>;

/// Where certificates are looked up.
#[derive(Debug, Clone)]
pub(crate) struct Lookups {
    statuses: mpsc::Sender<Asked<CertificateStatus>>,
    uses: mpsc::Sender<Asked<()>>,
}

#[derive(Debug)]
struct Asked<T> {
    endpoint: EndpointId,
    serial: String,
    answer: oneshot::Sender<Answer<T>>,
}

impl Lookups {
    /// Starts those who ask the database; they end when nobody can ask them any more.
    pub(crate) fn start(store: Store) -> Self {
        let (statuses, asked) = mpsc::channel(WAITING);
        tokio::spawn(look(store.clone(), asked));
        let (uses, used) = mpsc::channel(WAITING);
        tokio::spawn(note(store, used));
        Self { statuses, uses }
    }

    /// How the peer's certificate stands.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn status(&self, peer: &Peer) -> Answer<CertificateStatus> {
        ask(&self.statuses, peer).await
    }

    /// Notes the first use of the peer's certificate; [`Store::certificates_used`] says what follows.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn used(&self, peer: &Peer) -> Answer<()> {
        ask(&self.uses, peer).await
    }
}

async fn ask<T>(at: &mpsc::Sender<Asked<T>>, peer: &Peer) -> Answer<T> {
    let (answer, answered) = oneshot::channel();
    let asked = Asked { endpoint: peer.endpoint, serial: peer.serial.clone(), answer };
    at.send(asked).await.map_err(|_| writer_ended())?;
    answered.await.map_err(|_| writer_ended())?
}

async fn look(store: Store, mut asked: mpsc::Receiver<Asked<CertificateStatus>>) {
    let mut batch = Vec::with_capacity(BATCH);
    while asked.recv_many(&mut batch, BATCH).await > 0 {
        let (wanted, answers) = taken(&mut batch);
        match store.certificate_statuses(&wanted).await {
            Ok(statuses) => {
                for (answer, status) in answers.into_iter().zip(statuses) {
                    // Whoever asked may have gone meanwhile.
                    let _ = answer.send(Ok(status));
                }
            }
            // Each is told in its own words why.
            Err(_) => {
                for (answer, (endpoint, serial)) in answers.into_iter().zip(&wanted) {
                    let _ = answer.send(store.certificate_status(*endpoint, serial).await);
                }
            }
        }
    }
}

async fn note(store: Store, mut used: mpsc::Receiver<Asked<()>>) {
    let mut batch = Vec::with_capacity(BATCH);
    while used.recv_many(&mut batch, BATCH).await > 0 {
        // Rows are locked in one order everywhere.
        batch.sort_by_key(|asked| asked.endpoint);
        let (wanted, answers) = taken(&mut batch);
        let noted = store.certificates_used(&wanted, now_ms()).await;
        for (answer, (endpoint, serial)) in answers.into_iter().zip(&wanted) {
            let told = match &noted {
                Ok(()) => Ok(()),
                Err(_) => store.certificate_used(*endpoint, serial, now_ms()).await,
            };
            let _ = answer.send(told);
        }
    }
}

type Taken<T> = (Vec<(EndpointId, String)>, Vec<oneshot::Sender<Answer<T>>>);

fn taken<T>(batch: &mut Vec<Asked<T>>) -> Taken<T> {
    batch.drain(..).map(|asked| ((asked.endpoint, asked.serial), asked.answer)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        streams::tests::{endpoint, run},
        tests::scratch,
    };
    use futures_util::future::join_all;

    #[tokio::test]
    async fn many_are_answered_each_with_its_own_and_as_it_stands_then() {
        let (store, _folder) = scratch().await;
        let mut peers = Vec::new();
        for n in 1..=40_u128 {
            let endpoint = endpoint(&store, n).await;
            peers.push(Peer { endpoint, serial: format!("{n:02x}") });
        }
        run(
            &store,
            "INSERT INTO certificate (serial, endpoint_id, issued_ms, not_after_ms)
             SELECT substr(id, 35), id, 0, 1 FROM endpoint WHERE id < '00000000-0000-0000-0000-00000000000a'",
        )
        .await;
        let lookups = Lookups::start(store.clone());
        let ask = || async {
            let all = join_all(peers.iter().map(|peer| lookups.status(peer))).await;
            all.into_iter().map(Result::unwrap).collect::<Vec<_>>()
        };
        let first = ask().await;
        assert_eq!(first[..9], [CertificateStatus::Fresh; 9]);
        assert!(first[9..].iter().all(|status| *status == CertificateStatus::Unknown), "{first:?}");
        let strange = Peer { endpoint: peers[1].endpoint, serial: peers[0].serial.clone() };
        assert_eq!(lookups.status(&strange).await.unwrap(), CertificateStatus::Unknown, "another's");

        let used = join_all(peers[..3].iter().map(|peer| lookups.used(peer))).await;
        assert!(used.iter().all(Result::is_ok), "{used:?}");
        run(&store, "UPDATE certificate SET revoked_ms = 5 WHERE serial = '01'").await;
        let then = ask().await;
        assert_eq!(
            then[..4],
            [
                CertificateStatus::Revoked,
                CertificateStatus::Enrolled,
                CertificateStatus::Enrolled,
                CertificateStatus::Fresh
            ]
        );
    }
}
