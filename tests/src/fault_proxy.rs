//! A TCP proxy on loopback that is unpleasant in measured doses: it cuts links, and it holds bytes back.
//!
//! What it forwards it forwards unchanged. Held bytes stay with their sender, as on a network that drops
//! every packet: after [`FaultProxy::heal`] the links go on where they stood, if both ends still want to.
//!
//! **Invariant:** it ends with its value: the thread is joined, and no link outlives it.

use std::{
    net::{SocketAddr, TcpListener as StdListener},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Links at a time; more are closed at once.
const LINKS: u64 = 8192;
/// Bytes moved at a time.
const CHUNK: usize = 16 * 1024;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From those who connect (agents) to the target (a manager).
    Up,
    /// Back.
    Down,
}

/// What happens to links.
#[derive(Debug, Clone, Copy, Default)]
struct Rules {
    held_up: bool,
    held_down: bool,
    /// Each link is cut after so many bytes that way.
    cut_up: Option<u64>,
    cut_down: Option<u64>,
}

impl Rules {
    fn holds(self, way: Way) -> bool {
        match way {
            Way::Up => self.held_up,
            Way::Down => self.held_down,
        }
    }

    fn cuts(self, way: Way) -> Option<u64> {
        match way {
            Way::Up => self.cut_up,
            Way::Down => self.cut_down,
        }
    }
}

#[derive(Debug)]
struct Shared {
    target: Mutex<SocketAddr>,
    rules: watch::Sender<Rules>,
    /// Cuts every link that is open when it is cancelled, and is then replaced.
    knife: Mutex<CancellationToken>,
    accepted: AtomicU64,
    open: AtomicU64,
    cut: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
}

impl Shared {
    fn moved(&self, way: Way) -> &AtomicU64 {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }
}

/// The proxy, running.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    ending: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl FaultProxy {
    /// Listens on a free loopback port and forwards to `target`, for now without faults.
    ///
    /// # Panics
    /// If loopback cannot be listened on.
    pub fn start(target: SocketAddr) -> Self {
        let listener = StdListener::bind(("127.0.0.1", 0)).expect("loopback can be listened on");
        listener.set_nonblocking(true).expect("a socket can be set up");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            rules: watch::Sender::new(Rules::default()),
            knife: Mutex::default(),
            accepted: AtomicU64::new(0),
            open: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
        });
        let ending = CancellationToken::new();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("threads can be made");
        let (inner, ended) = (Arc::clone(&shared), ending.clone());
        let thread = thread::spawn(move || runtime.block_on(serve(listener, inner, ended)));
        Self { address, shared, ending, thread: Some(thread) }
    }

    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Forwards new links to `target`.
    pub fn aim(&self, target: SocketAddr) {
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// Cuts each link, those that are open and those to come, after `bytes` that way, counted for each link
    /// from its beginning; `None` ends that.
    pub fn cut_every(&self, way: Way, bytes: Option<u64>) {
        self.shared.rules.send_modify(|rules| match way {
            Way::Up => rules.cut_up = bytes,
            Way::Down => rules.cut_down = bytes,
        });
    }

    /// Cuts every open link now: both ends see a reset.
    pub fn cut_now(&self) {
        let mut knife = self.shared.knife.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *knife).cancel();
    }

    /// Forwards nothing more that way. Links are still accepted, as by a kernel whose program hangs.
    pub fn hold(&self, way: Way) {
        self.shared.rules.send_modify(|rules| match way {
            Way::Up => rules.held_up = true,
            Way::Down => rules.held_down = true,
        });
    }

    /// Forwards nothing either way.
    pub fn black_hole(&self) {
        self.hold(Way::Up);
        self.hold(Way::Down);
    }

    /// Ends every hold.
    pub fn heal(&self) {
        self.shared.rules.send_modify(|rules| (rules.held_up, rules.held_down) = (false, false));
    }

    /// Links accepted since the start.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Links that are open.
    pub fn open(&self) -> u64 {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Bytes forwarded that way, of all links.
    pub fn moved(&self, way: Way) -> u64 {
        self.shared.moved(way).load(Ordering::SeqCst)
    }

    /// Links that were cut.
    pub fn cuts(&self) -> u64 {
        self.shared.cut.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.ending.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: StdListener, shared: Arc<Shared>, ending: CancellationToken) {
    let listener = TcpListener::from_std(listener).expect("a listening socket was handed over");
    let links = TaskTracker::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // A peer that left before it was accepted, or no descriptors left for the moment.
                Err(_) => {
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                    continue;
                }
            },
            () = ending.cancelled() => break,
        };
        shared.accepted.fetch_add(1, Ordering::SeqCst);
        if shared.open.load(Ordering::SeqCst) >= LINKS {
            continue;
        }
        shared.open.fetch_add(1, Ordering::SeqCst);
        let (shared, ending) = (Arc::clone(&shared), ending.clone());
        links.spawn(async move {
            tokio::select! {
                () = link(stream, &shared) => {}
                () = ending.cancelled() => {}
            }
            shared.open.fetch_sub(1, Ordering::SeqCst);
        });
    }
    links.close();
    links.wait().await;
}

async fn link(mut near: TcpStream, shared: &Shared) {
    let target = *shared.target.lock().unwrap_or_else(PoisonError::into_inner);
    let knife = shared.knife.lock().unwrap_or_else(PoisonError::into_inner).child_token();
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    for stream in [&near, &far] {
        let _ = stream.set_nodelay(true);
    }
    let was_cut = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        let both = async {
            tokio::join!(
                pump(near_read, far_write, Way::Up, shared, &knife),
                pump(far_read, near_write, Way::Down, shared, &knife),
            );
        };
        tokio::select! {
            () = both => false,
            () = knife.cancelled() => true,
        }
    };
    if was_cut {
        shared.cut.fetch_add(1, Ordering::SeqCst);
        // No goodbye: what is in flight is lost, and both ends see a reset.
        for stream in [&near, &far] {
            let _ = stream.set_zero_linger();
        }
    }
}

/// Moves bytes one way, until they end or the link's own share is used up (which cuts both ways).
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    way: Way,
    shared: &Shared,
    knife: &CancellationToken,
) {
    let mut rules = shared.rules.subscribe();
    let mut chunk = vec![0; CHUNK];
    let mut moved = 0_u64;
    loop {
        let now = *rules.borrow_and_update();
        let left = now.cuts(way).map(|most| most.saturating_sub(moved));
        if left == Some(0) {
            knife.cancel();
            return;
        }
        let most = left.map_or(CHUNK, |left| usize::try_from(left).unwrap_or(CHUNK).min(CHUNK));
        let read = tokio::select! {
            read = from.read(&mut chunk[..most]), if !now.holds(way) => read,
            changed = rules.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let n = read.unwrap_or(0);
        if n == 0 {
            let _ = to.shutdown().await;
            return;
        }
        // What was read as the hold began is held like what comes after it.
        if rules.wait_for(|rules| !rules.holds(way)).await.is_err() {
            return;
        }
        if to.write_all(&chunk[..n]).await.is_err() {
            return;
        }
        moved += n as u64;
        shared.moved(way).fetch_add(n as u64, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
        time::Duration,
    };

    use super::*;
    use crate::{PATIENCE, wait_for};

    /// Sends back what it is sent.
    fn echo() -> SocketAddr {
        let listener = StdListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
                    let _ = std::io::copy(&mut from, &mut to);
                });
            }
        });
        address
    }

    fn connect(proxy: &FaultProxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn echoes(stream: &mut TcpStream) -> bool {
        let mut back = [0; 5];
        stream.write_all(b"hello").is_ok() && stream.read_exact(&mut back).is_ok() && &back == b"hello"
    }

    #[test]
    fn it_forwards_counts_and_ends_with_its_value() {
        let proxy = FaultProxy::start(echo());
        let mut one = connect(&proxy);
        assert!(echoes(&mut one));
        assert_eq!((proxy.accepted(), proxy.open(), proxy.cuts()), (1, 1, 0));
        drop(one);
        wait_for("the link to end", PATIENCE, || (proxy.open() == 0).then_some(()));
        let mut two = connect(&proxy);
        assert!(echoes(&mut two));
        drop(proxy);
        assert!(!echoes(&mut two), "no link outlives the proxy");
    }

    #[test]
    fn each_link_is_cut_after_its_share_of_bytes() {
        let proxy = FaultProxy::start(echo());
        for way in [Way::Up, Way::Down] {
            proxy.cut_every(way, Some(50_000));
            for _ in 0..3 {
                let cuts = proxy.cuts();
                let mut stream = connect(&proxy);
                let mut reader = stream.try_clone().unwrap();
                let got = thread::spawn(move || {
                    let (mut got, mut chunk) = (0, [0; 4096]);
                    while let Ok(n @ 1..) = reader.read(&mut chunk) {
                        got += n;
                    }
                    got
                });
                while stream.write_all(&[7; 1000]).is_ok() {}
                assert!(got.join().unwrap() <= 50_000);
                wait_for("the cut to be counted", PATIENCE, || (proxy.cuts() == cuts + 1).then_some(()));
            }
            proxy.cut_every(way, None);
        }
        assert!(echoes(&mut connect(&proxy)), "the control: uncut links go on");
    }

    #[test]
    fn a_cut_hits_open_links_and_spares_later_ones() {
        let proxy = FaultProxy::start(echo());
        let mut one = connect(&proxy);
        assert!(echoes(&mut one));
        proxy.cut_now();
        assert!(!echoes(&mut one));
        assert!(echoes(&mut connect(&proxy)));
        assert_eq!(proxy.cuts(), 1);
    }

    #[test]
    fn held_bytes_arrive_when_it_heals() {
        let proxy = FaultProxy::start(echo());
        let mut one = connect(&proxy);
        assert!(echoes(&mut one));
        for hold in [&[Way::Up][..], &[Way::Down], &[Way::Up, Way::Down]] {
            hold.iter().for_each(|way| proxy.hold(*way));
            one.write_all(b"later").unwrap();
            one.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut back = [0; 5];
            assert!(one.read(&mut back).is_err(), "nothing comes through");
            one.set_read_timeout(Some(PATIENCE)).unwrap();
            proxy.heal();
            one.read_exact(&mut back).unwrap();
            assert_eq!(&back, b"later");
        }
    }
}
