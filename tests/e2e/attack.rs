//! A manager under attack: thousands of connections that lead to nothing, requests that never end, guessed tokens and a
//! renegade. Forty good agents beside are measured before and meanwhile.
//!
//! The limits that every attack is held to are the constants here; the figures are printed.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tm_protocol::{
    ALPN_BULK, ALPN_CONTROL, ALPN_ENROLL, ids::TaskId, message::EnrollRequest, message::ToManager,
};
use tm_tests::{
    Lab, bulk, raw, samples,
    siege::{self, Manner, Siege},
    sim_agent::{self, SimAgent},
    wait_for,
    wire::Persona,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Runtime,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::link::{descriptors, enroll, measure, order_scan, resident_mib, runtime, start, task_of};

const AGENTS: u32 = 40;
/// How late the answers to 99 of 100 heartbeats and reports may be.
const LATEST: Duration = Duration::from_secs(5);
/// How much larger the manager may become meanwhile.
const GROWTH_MIB: u64 = 200;
/// How soon after an attack the manager's descriptors are back.
const BACK: Duration = Duration::from_secs(15);
/// How soon a new agent has to be let in meanwhile.
const NEWCOMER: Duration = Duration::from_secs(20);
/// How long it tries at a time, and waits between.
const TRY: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(500);
/// How long an attack is measured.
const LASTS: Duration = Duration::from_secs(10);
/// Where attackers come from.
const SOURCES: u32 = 16;

/// A manager with its good agents. Fields are dropped in order: agents before their runtime, the manager last.
struct Good {
    agents: Vec<SimAgent>,
    tasks: Vec<TaskId>,
    token: String,
    runtime: Runtime,
    /// The attackers' own, so that what is measured is how late the manager is and not how busy they are.
    enemy: Runtime,
    lab: Lab,
}

impl Good {
    fn start() -> Self {
        siege::raise_descriptors();
        let mut lab = Lab::start();
        lab.set("heartbeat", "\"5s\"");
        lab.restart_manager();
        lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
        let runtime = runtime();
        let personas = enroll(&lab, &runtime, lab.agent_port, AGENTS);
        order_scan(&lab);
        let agents: Vec<SimAgent> = personas
            .into_iter()
            .map(|persona| start(&runtime, persona, lab.agent_port, sim_agent::begun()))
            .collect();
        let tasks = agents.iter().map(task_of).collect();
        let token = lab.token(3);
        let enemy = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads can be made");
        Self { agents, tasks, token, runtime, enemy, lab }
    }

    /// TLS of one who has no certificate.
    fn stranger(&self, alpn: &[u8]) -> Arc<ClientConfig> {
        raw::client_config(alpn, None).expect("no identity is always right")
    }

    /// Attacks, measures for `lasts`, ends the attack, and holds the manager to the limits.
    ///
    /// `lay` begins the attack and returns when it is in force; `lift` ends it.
    fn endure<A>(
        &self,
        what: &str,
        lasts: Duration,
        lay: impl FnOnce(&Self) -> A,
        lift: impl FnOnce(&Self, A),
    ) {
        let (pid, lab) = (self.lab.manager().pid(), &self.lab);
        let alone = self.measure("alone", Duration::from_secs(3));
        let (memory, open) = (resident_mib(lab), descriptors(lab));
        let (most_memory, most_open) = (AtomicU64::new(memory), AtomicU64::new(open as u64));
        let (is_over, mut newcomer, mut beside, mut desk) = (AtomicBool::new(false), None, None, Vec::new());
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    most_memory.fetch_max(resident_mib(lab), Ordering::Relaxed);
                    most_open.fetch_max(descriptors(lab) as u64, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(200));
                }
            });
            // Whatever fails, the watch ends with it.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let attack = lay(self);
                let asking = scope.spawn(|| {
                    let (end, mut took) = (Instant::now() + lasts, Vec::new());
                    while Instant::now() < end {
                        let begin = Instant::now();
                        lab.rest("/v1/tasks?limit=1");
                        took.push(begin.elapsed());
                        thread::sleep(Duration::from_millis(100));
                    }
                    took
                });
                let arriving = self.runtime.spawn(arrive(lab.agent_port, self.token.clone()));
                beside = Some(self.measure("beside", lasts));
                newcomer = Some(self.runtime.block_on(arriving).expect("it does not panic"));
                desk = asking.join().expect("the administrator is served all the time");
                lift(self, attack);
            }));
            is_over.store(true, Ordering::Relaxed);
            if let Err(panic) = ended {
                std::panic::resume_unwind(panic);
            }
        });
        let end = Instant::now();
        wait_for("descriptors to come back", BACK, || (descriptors(lab) <= open + 4).then_some(()));
        let (back, beside) = (end.elapsed(), beside.expect("it was measured"));
        desk.sort_unstable();
        let slowest = desk.last().copied().unwrap_or_default();
        eprintln!(
            "ATTACK {what}: p99 heartbeat {:?} (alone {:?}), report {:?} (alone {:?}); administrator at most {slowest:?} \
             ({} requests); newcomer {newcomer:?}; memory {memory} then at most {} MiB; descriptors {open} then at most \
             {}, back after {back:?}",
            beside.0,
            alone.0,
            beside.1,
            alone.1,
            desk.len(),
            most_memory.load(Ordering::Relaxed),
            most_open.load(Ordering::Relaxed),
        );
        assert!(beside.0 <= LATEST && beside.1 <= LATEST, "{what}: too late: {beside:?}");
        let most = most_memory.load(Ordering::Relaxed);
        assert!(most < memory + GROWTH_MIB, "{what}: the manager grew from {memory} to {most} MiB");
        assert!(newcomer.flatten().is_some(), "{what}: a new agent is not let in within {NEWCOMER:?}");
        assert_eq!(lab.manager().pid(), pid);
        for agent in &self.agents {
            let seen = agent.snapshot();
            assert!(seen.connected && seen.sessions == 1, "{what}: a good agent lost its session: {seen:?}");
        }
    }

    fn measure(&self, phase: &str, lasts: Duration) -> (Duration, Duration) {
        self.runtime.block_on(measure(&self.agents, &self.tasks, phase, lasts))
    }
}

/// Enrolls and opens a session, as a new agent that tries again; how long that took.
async fn arrive(at: std::net::SocketAddr, token: String) -> Option<Duration> {
    let begin = Instant::now();
    let arrived = timeout(NEWCOMER, async {
        let persona = loop {
            match timeout(TRY, Persona::enroll(at, &token, "newcomer")).await {
                Ok(Ok(persona)) => break persona,
                Ok(Err(_)) | Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        loop {
            match timeout(TRY, persona.open(at, 7)).await {
                Ok(Ok(_)) => break,
                Ok(Err(_)) | Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    });
    arrived.await.is_ok().then(|| begin.elapsed())
}

/// Waits until that many connections have been made.
fn in_force(siege: Siege, count: u64) -> Siege {
    wait_for("the attackers to be there", Duration::from_secs(60), || {
        (siege.seen().opened >= count).then_some(())
    });
    siege
}

fn lift(good: &Good, what: &str, siege: Siege) -> siege::Seen {
    let seen = good.enemy.block_on(siege.lift());
    eprintln!("ATTACK {what}: {seen:?}");
    seen
}

/// From so many addresses; from none, from the one where the good agents are.
fn besiege_the_agents_port(what: &str, sources: u32) {
    let good = Good::start();
    let _enemy = good.enemy.enter();
    let enroll = good.stranger(ALPN_ENROLL);
    let manners = vec![
        (4_000, Manner::Silent),
        (3_000, Manner::HalfHello),
        (1_500, Manner::WholeHello(Arc::clone(&enroll))),
        (1_500, Manner::Idle(enroll)),
    ];
    good.endure(
        what,
        LASTS,
        |good| in_force(Siege::lay(good.lab.agent_port, sources, manners), 10_000),
        |good, siege| {
            let seen = lift(good, what, siege);
            assert!(seen.ended > 5_000, "they are thrown out again and again: {seen:?}");
        },
    );
}

#[test]
fn ten_thousand_connections_to_the_agents_port_that_lead_to_nothing() {
    besiege_the_agents_port("10,000 idle and half-open, agents' port", SOURCES);
}

#[test]
fn ten_thousand_connections_from_the_good_agents_own_address() {
    besiege_the_agents_port("10,000 idle and half-open, agents' port and address", 0);
}

#[test]
fn ten_thousand_connections_to_the_administrators_port_that_lead_to_nothing() {
    let good = Good::start();
    let what = "10,000 idle and half-open, administrators' port";
    let _enemy = good.enemy.enter();
    let tls = good.stranger(b"http/1.1");
    let manners = vec![
        (5_000, Manner::Silent),
        (3_500, Manner::HalfHello),
        (1_000, Manner::WholeHello(Arc::clone(&tls))),
        (500, Manner::Idle(tls)),
    ];
    good.endure(
        what,
        LASTS,
        |good| in_force(Siege::lay(good.lab.admin_port, SOURCES, manners), 10_000),
        |good, siege| {
            let seen = lift(good, what, siege);
            assert!(seen.ended > 5_000, "they are thrown out again and again: {seen:?}");
        },
    );
}

#[test]
fn requests_that_never_end_on_both_ports() {
    let good = Good::start();
    let _enemy = good.enemy.enter();
    let (web, admin) = (good.stranger(b"http/1.1"), good.lab.admin_port);
    let insider = good.lab.account("slow", "operator");
    let insider = std::fs::read_to_string(insider).expect("it was written");
    let insider =
        insider.lines().find_map(|line| line.strip_prefix("token = \"")?.strip_suffix('"')).unwrap();
    let token = good.lab.token(4);
    let renegades: Vec<Arc<ClientConfig>> = (0..4)
        .map(|n| {
            let host = format!("slow-{n}");
            let enrolled = bulk::enroll(good.lab.agent_port, &token, &host);
            raw::client_config(ALPN_BULK, Some(&good.runtime.block_on(enrolled).expect("it is let in")))
                .unwrap()
        })
        .collect();
    let body = |request: &str, more: &str, length: u32| -> Arc<str> {
        format!("{request} HTTP/1.1\r\nHost: m\r\n{more}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n")
            .into()
    };
    let header: Arc<str> = "GET /v1/version HTTP/1.1\r\nHost: m\r\nX-Slow: ".into();
    let bearer = format!("Authorization: Bearer {insider}\r\n");
    // Uploads that are begun, so that their bodies are read.
    let uploads: Vec<Arc<str>> = renegades
        .iter()
        .map(|config| {
            good.runtime.block_on(async {
                let mut link =
                    bulk::BulkLink::connect(good.lab.agent_port, Arc::clone(config)).await.unwrap();
                let digest = tm_protocol::ids::Sha256::of(b"slow");
                let announced = format!(r#"{{"size": 100000, "sha256": "{digest}", "kind": "evidence"}}"#);
                let answer = link.ask("POST /v1/uploads", "", announced.as_bytes()).await.unwrap();
                let id: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
                let id = id["id"].as_str().expect("it was begun");
                body(&format!("PUT /v1/uploads/{id}"), "Upload-Offset: 0\r\n", 100_000)
            })
        })
        .collect();
    let slow_on_bulk = |make: &dyn Fn(usize, &Arc<ClientConfig>) -> Manner, each: u32| {
        renegades.iter().enumerate().map(|(n, config)| (each, make(n, config))).collect::<Vec<_>>()
    };
    let at_admin = |count, saying: &Arc<str>| {
        Siege::lay(admin, SOURCES, vec![(count, Manner::Drip(Arc::clone(&web), Arc::clone(saying), b'a'))])
    };
    good.endure(
        "slow headers and bodies",
        Duration::from_secs(40),
        |good| {
            let agents = good.lab.agent_port;
            let drips = |make: &dyn Fn(usize, &Arc<ClientConfig>) -> Manner, each| {
                Siege::lay(agents, 4, slow_on_bulk(make, each))
            };
            vec![
                ("headers, administrators' port", 200, at_admin(200, &header)),
                ("bodies without a token", 50, at_admin(50, &body("POST /v1/scans", "", 100_000))),
                ("bodies with a token", 50, at_admin(50, &body("POST /v1/scans", &bearer, 100_000))),
                (
                    "answers that nobody reads",
                    50,
                    Siege::lay(
                        admin,
                        SOURCES,
                        vec![(
                            50,
                            Manner::Deaf(
                                Arc::clone(&web),
                                "GET / HTTP/1.1\r\nHost: m\r\n\r\n".repeat(50).into(),
                            ),
                        )],
                    ),
                ),
                (
                    "headers, bulk",
                    24,
                    drips(&|_, config| Manner::Drip(Arc::clone(config), Arc::clone(&header), b'a'), 6),
                ),
                (
                    "announcements, bulk",
                    20,
                    drips(
                        &|_, config| {
                            Manner::Drip(Arc::clone(config), body("POST /v1/uploads", "", 4_000), b' ')
                        },
                        5,
                    ),
                ),
                (
                    "uploads, bulk",
                    4,
                    drips(&|n, config| Manner::Drip(Arc::clone(config), Arc::clone(&uploads[n]), b'a'), 1),
                ),
            ]
        },
        |good, sieges| {
            for (what, count, siege) in sieges {
                let seen = lift(good, what, siege);
                assert!(seen.ended >= count, "{what}: each is ended: {seen:?}");
            }
        },
    );
}

/// Guesses tokens at this pace, a quarter of them from ever new addresses, until told to end; attempts that got an answer,
/// and those that were closed without one.
async fn guess(at: std::net::SocketAddr, per_second: u32, ending: CancellationToken) -> (u64, u64) {
    const AT_A_TIME: usize = 400;
    let config = raw::client_config(ALPN_ENROLL, None).expect("no identity is always right");
    let key = rcgen::KeyPair::generate().expect("keys can be made");
    let csr = rcgen::CertificateParams::default().serialize_request(&key).expect("requests can be made");
    let request = EnrollRequest {
        secret: [0; 32],
        csr: csr.der().to_vec(),
        host: "guess".to_owned(),
        agent_version: "0.0.0".to_owned(),
    };
    let (answered, closed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let places = Arc::new(tokio::sync::Semaphore::new(AT_A_TIME));
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    let mut number = 0_u32;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = ending.cancelled() => break,
        }
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        number += 1;
        let source = if number.is_multiple_of(4) { 1_000 + number } else { number % 8 };
        let mut request = request.clone();
        request.secret[..4].copy_from_slice(&number.to_be_bytes());
        let (config, answered, closed) = (Arc::clone(&config), Arc::clone(&answered), Arc::clone(&closed));
        tokio::spawn(async move {
            let _place = place;
            let attempt = async {
                let stream = siege::connect(Some(source), at).await?;
                let name = ServerName::from(at.ip());
                let mut link = TlsConnector::from(config).connect(name, stream).await?;
                let mut bytes = bytes::BytesMut::new();
                ToManager::from(request).encode(&mut bytes).map_err(io::Error::other)?;
                link.write_all(&bytes).await?;
                link.flush().await?;
                link.read_u8().await
            };
            let count = if matches!(timeout(Duration::from_secs(20), attempt).await, Ok(Ok(_))) {
                answered
            } else {
                closed
            };
            count.fetch_add(1, Ordering::Relaxed);
        });
    }
    (answered.load(Ordering::Relaxed), closed.load(Ordering::Relaxed))
}

#[test]
fn a_thousand_guessed_tokens_a_second() {
    let good = Good::start();
    let endpoints = good.lab.endpoints().len();
    good.endure(
        "1,000 bad tokens a second",
        LASTS,
        |good| {
            let (ending, at) = (CancellationToken::new(), good.lab.agent_port);
            (good.enemy.spawn(guess(at, 1_000, ending.clone())), ending, Instant::now())
        },
        |good, (guessing, ending, begin)| {
            ending.cancel();
            let (answered, closed) = good.enemy.block_on(guessing).expect("it does not panic");
            let rate = (answered + closed) / begin.elapsed().as_secs().max(1);
            eprintln!("ATTACK guessed tokens: {answered} answered, {closed} closed unheard; {rate} a second");
            assert!(rate > 300, "the control: {rate} attempts a second");
            assert!(closed > answered / 20, "who guesses for long is not heard any more");
        },
    );
    assert_eq!(good.lab.endpoints().len(), endpoints + 1, "the newcomer, and nobody else");
}

#[test]
fn a_renegade_that_opens_links_without_end() {
    let good = Good::start();
    let _enemy = good.enemy.enter();
    let token = good.lab.token(1);
    let enrolled = bulk::enroll(good.lab.agent_port, &token, "renegade");
    let identity = good.runtime.block_on(enrolled).expect("it is let in");
    let config = |alpn: &[u8]| raw::client_config(alpn, Some(&identity)).unwrap();
    let what = "a renegade's 1,000 links";
    let manners = vec![(500, Manner::Idle(config(ALPN_CONTROL))), (500, Manner::Idle(config(ALPN_BULK)))];
    good.endure(
        what,
        LASTS,
        |good| {
            let siege = in_force(Siege::lay(good.lab.agent_port, 1, manners), 1_000);
            let (ending, at) = (CancellationToken::new(), good.lab.agent_port);
            let storms: Vec<_> =
                (0..16).map(|_| good.enemy.spawn(storm(at, config(ALPN_CONTROL), ending.clone()))).collect();
            (siege, storms, ending)
        },
        |good, (siege, storms, ending)| {
            ending.cancel();
            let sessions: u64 =
                storms.into_iter().map(|storm| good.enemy.block_on(storm).expect("it does not panic")).sum();
            let seen = lift(good, what, siege);
            eprintln!("ATTACK {what}: {sessions} handshakes besides");
            assert!(seen.ended > 500 && sessions > 50, "the control: {seen:?}, {sessions} handshakes");
        },
    );
    assert!(
        good.lab.manager().log().contains("more links than any agent needs"),
        "the administrator can see it"
    );
}

/// Opens links with a hello as fast as it goes and leaves each at once; how many.
async fn storm(at: std::net::SocketAddr, config: Arc<ClientConfig>, ending: CancellationToken) -> u64 {
    let mut count = 0;
    let mut hello = bytes::BytesMut::new();
    raw::hello().encode(&mut hello).expect("a proper message fits");
    while !ending.is_cancelled() {
        let attempt = async {
            let stream = siege::connect(Some(0), at).await?;
            let mut link =
                TlsConnector::from(Arc::clone(&config)).connect(ServerName::from(at.ip()), stream).await?;
            link.write_all(&hello).await?;
            link.flush().await
        };
        match timeout(Duration::from_secs(10), attempt).await {
            Ok(Ok(())) => count += 1,
            Ok(Err(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    count
}
