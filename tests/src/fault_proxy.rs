//! A TCP proxy on loopback that is unpleasant in measured doses: it cuts links, holds bytes back, delays them,
//! forgets links without a word, and flips a bit.
//!
//! What it forwards it forwards unchanged, but for the one bit that it is told to flip. Held bytes stay with their
//! sender, as on a network that drops every packet: after [`FaultProxy::heal`] the links go on where they stood, if
//! both ends still want to. A forgotten link ([`FaultProxy::half_open`]) never goes on: neither end hears anything of
//! the other again, also not its end, as when a firewall between them has lost its table.
//!
//! **Invariant:** a delay costs time and no throughput, and what is under way keeps its order.
//! **Invariant:** it ends with its value: the thread is joined, and no link outlives it.

use std::{
    net::{SocketAddr, TcpListener as StdListener},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Links at a time; more are closed at once.
const LINKS: u64 = 8192;
/// Bytes moved at a time.
const CHUNK: usize = 16 * 1024;
/// Chunks of a link that are under way in one direction; more stay with their sender.
const UNDER_WAY: usize = 256;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From those who connect (agents) to the target (a manager).
    Up,
    /// Back.
    Down,
}

/// What happens to the bytes of one direction.
#[derive(Debug, Clone, Copy, Default)]
struct Rule {
    held: bool,
    /// Each link is cut after so many bytes.
    cut: Option<u64>,
    delay: Duration,
    /// The byte of each link, counted from 0, of which one bit is flipped.
    flip: Option<u64>,
}

/// What happens to links.
#[derive(Debug, Clone, Copy, Default)]
struct Rules {
    up: Rule,
    down: Rule,
}

impl Rules {
    fn of(&self, way: Way) -> &Rule {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    fn change(&mut self, way: Way) -> &mut Rule {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

#[derive(Debug)]
struct Shared {
    target: Mutex<SocketAddr>,
    rules: watch::Sender<Rules>,
    /// Cuts every link that is open when it is cancelled, and is then replaced.
    knife: Mutex<CancellationToken>,
    /// The same for forgetting them.
    oblivion: Mutex<CancellationToken>,
    accepted: AtomicU64,
    open: AtomicU64,
    cut: AtomicU64,
    forgotten: AtomicU64,
    flipped: AtomicU64,
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
            oblivion: Mutex::default(),
            accepted: AtomicU64::new(0),
            open: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
            flipped: AtomicU64::new(0),
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
        self.shared.rules.send_modify(|rules| rules.change(way).cut = bytes);
    }

    /// Whatever goes that way from now on arrives so much later; no delay ends that.
    pub fn delay(&self, way: Way, delay: Duration) {
        self.shared.rules.send_modify(|rules| rules.change(way).delay = delay);
    }

    /// Flips the lowest bit of byte `at` (from 0, counted for each link from its beginning) that way, of the links
    /// that are open and those to come; `None` ends that.
    pub fn flip(&self, way: Way, at: Option<u64>) {
        self.shared.rules.send_modify(|rules| rules.change(way).flip = at);
    }

    /// Forgets every open link: nothing is forwarded over it any more, no bytes and no end, and both sockets stay
    /// open until the proxy ends. Links to come are forwarded.
    pub fn half_open(&self) {
        let mut oblivion = self.shared.oblivion.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *oblivion).cancel();
    }

    /// Cuts every open link now: both ends see a reset.
    pub fn cut_now(&self) {
        let mut knife = self.shared.knife.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *knife).cancel();
    }

    /// Forwards nothing more that way. Links are still accepted, as by a kernel whose program hangs.
    pub fn hold(&self, way: Way) {
        self.shared.rules.send_modify(|rules| rules.change(way).held = true);
    }

    /// Forwards nothing either way.
    pub fn black_hole(&self) {
        self.hold(Way::Up);
        self.hold(Way::Down);
    }

    /// Ends every hold.
    pub fn heal(&self) {
        self.shared.rules.send_modify(|rules| (rules.up.held, rules.down.held) = (false, false));
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

    /// Links that were forgotten. They count as open.
    pub fn forgotten(&self) -> u64 {
        self.shared.forgotten.load(Ordering::SeqCst)
    }

    /// Bits that were flipped.
    pub fn flips(&self) -> u64 {
        self.shared.flipped.load(Ordering::SeqCst)
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
    let oblivion = shared.oblivion.lock().unwrap_or_else(PoisonError::into_inner).child_token();
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
            () = oblivion.cancelled() => {
                shared.forgotten.fetch_add(1, Ordering::SeqCst);
                // Both sockets are held, unread, until the proxy ends.
                std::future::pending().await
            }
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

/// What is under way.
enum Parcel {
    Bytes(Vec<u8>),
    /// The link has had its share.
    Cut,
}

/// Moves bytes one way, until they end or the link's own share is used up (which cuts both ways).
async fn pump(from: ReadHalf<'_>, to: WriteHalf<'_>, way: Way, shared: &Shared, knife: &CancellationToken) {
    let (sender, parcels) = mpsc::channel(UNDER_WAY);
    tokio::join!(take(from, sender, way, shared), deliver(to, parcels, way, shared, knife));
}

async fn take(mut from: ReadHalf<'_>, parcels: mpsc::Sender<(Instant, Parcel)>, way: Way, shared: &Shared) {
    let mut rules = shared.rules.subscribe();
    let mut taken = 0_u64;
    let mut chunk = vec![0; CHUNK];
    loop {
        let now = *rules.borrow_and_update().of(way);
        let left = now.cut.map(|most| most.saturating_sub(taken));
        if left == Some(0) {
            let _ = parcels.send((Instant::now() + now.delay, Parcel::Cut)).await;
            return;
        }
        let most = left.map_or(CHUNK, |left| usize::try_from(left).unwrap_or(CHUNK).min(CHUNK));
        let read = tokio::select! {
            read = from.read(&mut chunk[..most]), if !now.held => read,
            changed = rules.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            // Whoever is to be told of it has gone.
            () = parcels.closed() => return,
        };
        let n = read.unwrap_or(0);
        if n == 0 {
            return;
        }
        // What is the rule at the moment at which they come.
        let now = *rules.borrow().of(way);
        let mut bytes = chunk[..n].to_vec();
        let at = now.flip.and_then(|at| at.checked_sub(taken)).and_then(|at| usize::try_from(at).ok());
        if let Some(byte) = at.and_then(|at| bytes.get_mut(at)) {
            *byte ^= 1;
            shared.flipped.fetch_add(1, Ordering::SeqCst);
        }
        taken += n as u64;
        if parcels.send((Instant::now() + now.delay, Parcel::Bytes(bytes))).await.is_err() {
            return;
        }
    }
}

async fn deliver(
    mut to: WriteHalf<'_>,
    mut parcels: mpsc::Receiver<(Instant, Parcel)>,
    way: Way,
    shared: &Shared,
    knife: &CancellationToken,
) {
    let mut rules = shared.rules.subscribe();
    while let Some((due, parcel)) = parcels.recv().await {
        sleep_until(due).await;
        // What was read as the hold began is held like what comes after it.
        if rules.wait_for(|rules| !rules.of(way).held).await.is_err() {
            return;
        }
        match parcel {
            Parcel::Bytes(bytes) => {
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
                shared.moved(way).fetch_add(bytes.len() as u64, Ordering::SeqCst);
            }
            Parcel::Cut => {
                knife.cancel();
                return;
            }
        }
    }
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
        time::Instant,
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

    #[test]
    fn what_is_delayed_arrives_later_whole_and_at_full_speed() {
        let proxy = FaultProxy::start(echo());
        let mut one = connect(&proxy);
        assert!(echoes(&mut one));
        let delay = Duration::from_millis(300);
        for ways in [&[Way::Up][..], &[Way::Down], &[Way::Up, Way::Down]] {
            ways.iter().for_each(|way| proxy.delay(*way, delay));
            let begin = Instant::now();
            assert!(echoes(&mut one));
            let took = begin.elapsed();
            assert!(took >= delay * u32::try_from(ways.len()).unwrap(), "{took:?} {ways:?}");
            ways.iter().for_each(|way| proxy.delay(*way, Duration::ZERO));
        }
        // A hundred pieces that each waited for the one before would take half a minute.
        proxy.delay(Way::Up, delay);
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| (n >> 7) as u8).collect();
        let mut writer = one.try_clone().unwrap();
        let (begin, sent) = (Instant::now(), bytes.clone());
        let writes =
            thread::spawn(move || sent.chunks(10_000).for_each(|part| writer.write_all(part).unwrap()));
        let mut back = vec![0; bytes.len()];
        one.read_exact(&mut back).unwrap();
        writes.join().unwrap();
        assert!(back == bytes, "in order");
        let took = begin.elapsed();
        assert!(took >= delay && took < Duration::from_secs(15), "{took:?}");
    }

    #[test]
    fn a_forgotten_link_is_silent_for_both_ends_and_a_new_one_is_not() {
        let target = StdListener::bind(("127.0.0.1", 0)).unwrap();
        let proxy = FaultProxy::start(target.local_addr().unwrap());
        let mut near = connect(&proxy);
        let (mut far, _) = target.accept().unwrap();
        near.write_all(b"hello").unwrap();
        far.read_exact(&mut [0; 5]).unwrap();
        proxy.half_open();
        wait_for("the link to be forgotten", PATIENCE, || (proxy.forgotten() == 1).then_some(()));
        near.write_all(b"hello").unwrap();
        for stream in [&mut near, &mut far] {
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let silent = stream.read(&mut [0; 5]).unwrap_err();
            assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock, "no bytes, no end");
        }
        drop(near);
        let silent = far.read(&mut [0; 5]).unwrap_err();
        assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock, "not even of the other's end");
        let mut new = connect(&proxy);
        new.write_all(b"hello").unwrap();
        target.accept().unwrap().0.read_exact(&mut [0; 5]).unwrap();
        assert_eq!((proxy.forgotten(), proxy.open()), (1, 2));
    }

    #[test]
    fn one_bit_of_each_link_is_flipped_and_no_other() {
        let proxy = FaultProxy::start(echo());
        let sent: Vec<u8> = (0..100_000_u32).map(|n| (n >> 5) as u8).collect();
        let through = |stream: &mut TcpStream| {
            let mut back = vec![0; sent.len()];
            let mut writer = stream.try_clone().unwrap();
            let bytes = sent.clone();
            let writes = thread::spawn(move || writer.write_all(&bytes).unwrap());
            stream.read_exact(&mut back).unwrap();
            writes.join().unwrap();
            let changed: Vec<usize> = (0..sent.len()).filter(|at| back[*at] != sent[*at]).collect();
            assert!(changed.iter().all(|at| back[*at] == sent[*at] ^ 1), "the lowest bit");
            changed
        };
        for (way, at) in [(Way::Up, 0), (Way::Down, 70_000), (Way::Up, 99_999)] {
            proxy.flip(way, Some(at));
            let flips = proxy.flips();
            let mut stream = connect(&proxy);
            assert_eq!(through(&mut stream), [usize::try_from(at).unwrap()]);
            assert!(through(&mut stream).is_empty(), "once a link");
            assert_eq!(proxy.flips(), flips + 1);
            proxy.flip(way, None);
            assert!(through(&mut connect(&proxy)).is_empty(), "the control");
        }
    }
}
