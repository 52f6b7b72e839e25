//! Ctrl-C, SIGTERM and a closed terminal, as a fact that is asked for.

use std::{
    io,
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel},
    thread,
    time::Duration,
};

use anyhow::bail;

/// Hears that somebody wants the command to end.
#[derive(Debug)]
pub(crate) struct Interrupt(Receiver<()>);

impl Interrupt {
    /// Takes the signals over; from here on they end nothing by themselves.
    ///
    /// # Errors
    /// If the system does not allow it.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (ready, is_ready) = sync_channel(1);
        // One place: a second signal while the first is not yet heard says nothing new.
        let (say, heard) = sync_channel(1);
        thread::spawn(move || {
            runtime.block_on(async {
                let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
                let signals: io::Result<Vec<_>> = kinds.into_iter().map(signal).collect();
                let failed = signals.as_ref().err().map(ToString::to_string);
                let _ = ready.send(failed);
                let Ok(mut signals) = signals else { return };
                loop {
                    let [interrupt, terminate, hangup] = signals.as_mut_slice() else { return };
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    let _ = say.try_send(());
                }
            });
        });
        match is_ready.recv()? {
            None => Ok(Self(heard)),
            Some(error) => bail!("cannot listen for signals: {error}"),
        }
    }

    /// Whether it has been heard by now or is heard within `time`.
    pub(crate) fn within(&self, time: Duration) -> bool {
        if time.is_zero() {
            return !matches!(self.0.try_recv(), Err(TryRecvError::Empty));
        }
        !matches!(self.0.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}
