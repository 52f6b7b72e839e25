//! An HTTP proxy that knows `CONNECT` and nothing else, and is as pleasant as a test wants it to be.
//!
//! It keeps the first line of every request, the credentials that came with it, and what it carried.
//!
//! **Invariant:** it ends with its value: no link outlives it.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Links in its life; more are closed at once.
const LINKS: usize = 4096;
/// Longest request head, in bytes.
const HEAD: usize = 8 << 10;
/// What is kept of what was carried, in bytes.
const KEPT: usize = 4 << 20;

/// What the proxy does with a request.
#[derive(Debug, Clone, Default)]
pub enum Manner {
    /// Leads where it was asked to.
    #[default]
    Serve,
    /// The same, for whoever shows these credentials (`user:password` in base64); 407 for others.
    Demand(String),
    /// Says that it leads where it was asked to, and leads elsewhere.
    Mislead(SocketAddr),
    /// Answers this and closes.
    Answer(Vec<u8>),
    /// Says nothing.
    Silence,
}

#[derive(Debug, Default)]
struct Seen {
    manner: Manner,
    asked: Vec<String>,
    credentials: Vec<Option<String>>,
    tunnels: usize,
    carried: Vec<u8>,
    links: Vec<TcpStream>,
}

/// A running proxy.
#[derive(Debug)]
pub struct ConnectProxy {
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    ending: Arc<AtomicBool>,
}

impl ConnectProxy {
    /// Serves at `listener` until it is dropped; ways out begin where this is called, whatever network the listener
    /// belongs to.
    ///
    /// # Panics
    /// If the listener is none.
    pub fn start(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("a listener has an address");
        listener.set_nonblocking(true).expect("a listener can be asked without waiting");
        let (seen, ending) = (Arc::<Mutex<Seen>>::default(), Arc::new(AtomicBool::new(false)));
        let (all, end) = (Arc::clone(&seen), Arc::clone(&ending));
        thread::spawn(move || {
            while !end.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((link, _)) => admit(link, &all),
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Self { address, seen, ending }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Treats requests in this manner from now on, and cuts every link.
    pub fn set(&self, manner: Manner) {
        lock(&self.seen).manner = manner;
        self.cut();
    }

    /// Cuts every link.
    pub fn cut(&self) {
        for link in lock(&self.seen).links.drain(..) {
            let _ = link.shutdown(Shutdown::Both);
        }
    }

    /// The first line of every request.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.seen).asked.clone()
    }

    /// The credentials of every request.
    pub fn credentials(&self) -> Vec<Option<String>> {
        lock(&self.seen).credentials.clone()
    }

    /// How many ways it has opened.
    pub fn tunnels(&self) -> usize {
        lock(&self.seen).tunnels
    }

    /// What it has carried, both ways and of all ways, as it came (the first 4 MiB).
    pub fn carried(&self) -> Vec<u8> {
        lock(&self.seen).carried.clone()
    }
}

impl Drop for ConnectProxy {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        self.cut();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn admit(link: TcpStream, seen: &Arc<Mutex<Seen>>) {
    let (Ok(copy), Ok(())) = (link.try_clone(), link.set_nonblocking(false)) else { return };
    let mut all = lock(seen);
    if all.links.len() >= LINKS {
        return;
    }
    all.links.push(copy);
    drop(all);
    let seen = Arc::clone(seen);
    thread::spawn(move || serve(link, &seen));
}

/// Serves one link to its end. A link that breaks is no news.
fn serve(mut link: TcpStream, seen: &Arc<Mutex<Seen>>) -> Option<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD {
        link.read_exact(&mut byte).ok()?;
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let line = head.lines().next().unwrap_or_default().to_owned();
    let credentials =
        head.lines().find_map(|line| line.strip_prefix("Proxy-Authorization: Basic ").map(str::to_owned));
    let mut all = lock(seen);
    all.asked.push(line.clone());
    all.credentials.push(credentials.clone());
    let manner = all.manner.clone();
    drop(all);
    let asked = line.strip_prefix("CONNECT ").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
    let target: Option<SocketAddr> = asked.and_then(|asked| asked.parse().ok());
    let target = match manner {
        Manner::Serve => target,
        Manner::Demand(wanted) if credentials.as_ref() == Some(&wanted) => target,
        Manner::Demand(_) => {
            let answer =
                "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n";
            return say(&mut link, answer.as_bytes());
        }
        Manner::Mislead(elsewhere) => Some(elsewhere),
        Manner::Answer(answer) => return say(&mut link, &answer),
        Manner::Silence => {
            // Until the other side, or the test, has had enough.
            let _ = link.read(&mut byte);
            return None;
        }
    };
    let Some(target) = target else { return say(&mut link, b"HTTP/1.1 400 Bad Request\r\n\r\n") };
    let Ok(mut far) = TcpStream::connect(target) else {
        return say(&mut link, b"HTTP/1.1 502 Bad Gateway\r\n\r\n");
    };
    link.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").ok()?;
    let (mut back, mut near) = (far.try_clone().ok()?, link.try_clone().ok()?);
    let mut all = lock(seen);
    all.tunnels += 1;
    all.links.push(far.try_clone().ok()?);
    drop(all);
    let also = Arc::clone(seen);
    thread::spawn(move || carry(&mut back, &mut near, &also));
    carry(&mut link, &mut far, seen);
    Some(())
}

/// Says the last word. What was not read must not make the word unread.
fn say(link: &mut TcpStream, answer: &[u8]) -> Option<()> {
    link.write_all(answer).ok()?;
    link.shutdown(Shutdown::Write).ok()?;
    let _ = link.read_to_end(&mut Vec::new());
    Some(())
}

fn carry(from: &mut TcpStream, to: &mut TcpStream, seen: &Mutex<Seen>) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        let mut all = lock(seen);
        let room = KEPT.saturating_sub(all.carried.len());
        all.carried.extend_from_slice(&bytes[..read.min(room)]);
        drop(all);
        if to.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
