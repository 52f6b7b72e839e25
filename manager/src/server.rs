//! Builds every room, starts every loop, ends them in order.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tm_protocol::ids::ManagerId;
use tm_scanner::pool::WorkerProgram;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    agents::{
        authorities::{self, Authorities, Live},
        bulk::Bulk,
        doors::Doors,
        enrollment::Guard,
        expiry, held,
        intake::Intake,
        links::Links,
        listener::{self, Port},
        lookups::Lookups,
        meter::Meters,
        peers::Peers,
        registry::Registry,
        session::Shared,
        tls,
    },
    cli,
    config::Config,
    dispatch,
    forward::{self, Exporter},
    http::{
        self, AppState,
        probes::{self, Probes},
    },
    lobby,
    patterns::{
        Blobs,
        trust::{self, OnlineKeys},
    },
    store::{Store, schema::Version},
};

/// How long sessions and requests have to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Links of monitoring at a time; more are turned away.
const MONITOR_LINKS: usize = 16;
/// How long the header of a request of theirs may take.
const MONITOR_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the manager until it is told to end.
pub(crate) async fn run(data: &Path, config: Config) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let live = Live::load(&data.join("ca"), config.certificate_life)
        .context("cannot load the certificate authority")?;
    let live = Arc::new(live);
    let present = live.now();
    let manager = present.manager();
    let url = config.database.clone().unwrap_or_else(|| cli::default_database(data));
    let store = Store::connect(&url).await?;
    bring_up(&store, manager).await?;
    let blobs = Blobs::open(config.patterns(data), manager).context("cannot open the patterns' folder")?;
    let trust = Arc::new(OnlineKeys::open(&data.join("trust"))?);
    anyhow::ensure!(
        store.claim_fleet(present.fleet()).await?,
        "the database belongs to another fleet than the authority in `{}`",
        data.join("ca").display()
    );
    if let Some(oldest) = present.all().first() {
        store.attribute_certificates(oldest.digest()).await?;
    }
    let shown = Arc::new(tls::Shown::new(Arc::clone(&live), config.hosts()).context("cannot set up TLS")?);
    let (agent_tls, admin_tls) = tls::configure(&present, &shown).context("cannot set up TLS")?;
    let agents = TcpListener::bind(config.agent_listen)
        .await
        .with_context(|| format!("cannot listen for agents on {}", config.agent_listen))?;
    let admins = TcpListener::bind(config.admin_listen)
        .await
        .with_context(|| format!("cannot listen for administrators on {}", config.admin_listen))?;
    let exporters = config
        .exports
        .iter()
        .map(|export| Exporter::open(export, present.fleet()).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    let monitors = match config.metrics_listen {
        None => None,
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen for monitoring on {address}"))?,
        ),
    };

    let ending = CancellationToken::new();
    let loops = TaskTracker::new();
    let nudge = Arc::new(Notify::new());
    let ordered = Arc::new(Notify::new());
    let registry = Registry::new(Arc::clone(&nudge));
    let peers = Peers::new(store.clone(), registry.clone(), manager, config.addresses());
    peers.enter().await?;
    forward::enter(&store, manager, &exporters).await?;
    let shared = Shared {
        store: store.clone(),
        intake: Intake::start(store.clone(), &config.limits, ending.clone()),
        doors: Doors::start(store.clone()),
        lookups: Lookups::start(store.clone()),
        registry: registry.clone(),
        held: held::Places::default(),
        meters: Meters::new(config.limits),
        authorities: Arc::clone(&live),
        manager,
        addresses: peers.addresses(),
        peers: peers.clone(),
        heartbeat: config.heartbeat,
        ending: ending.clone(),
    };
    let (announce, ca_sha256) = watch::channel(present.issuing().digest());
    let cuts = ca_sha256.clone();
    let folders = vec![data.to_owned(), config.patterns(data)];
    let probes = Probes::new(store.clone(), manager, folders, ending.clone());
    let router = http::router(AppState {
        store: store.clone(),
        blobs: blobs.clone(),
        nudge: Arc::clone(&ordered),
        addresses: peers.addresses(),
        ca_sha256,
        manager,
        fleet: present.fleet(),
        trust: Arc::clone(&trust),
        worker: WorkerProgram::this(),
        probes: Arc::clone(&probes),
    });
    let ports = Arc::new(tls::Ports::new(agent_tls));
    let bulk = Bulk::open(data, store.clone(), blobs, &config.limits)
        .context("cannot open the folders of transfers")?;
    loops.spawn(bulk.clone().sweep(ending.clone()));
    let port =
        Port { tls: Arc::clone(&ports), bulk, guard: Guard::default(), links: Links::default(), shared };
    let agents =
        lobby::open(agents, listener::places(), true, ending.clone()).context("cannot wait for agents")?;
    loops.spawn(listener::run(agents, port));
    if let Some(listener) = monitors {
        loops.spawn(serve_monitors(listener, probes::local(probes), ending.clone()));
    }
    let admins = lobby::open(admins, http::port::LINKS, false, ending.clone())
        .context("cannot wait for administrators")?;
    loops.spawn(http::port::serve(admins, admin_tls, router, ending.clone()));
    let told = registry.clone();
    let changed = move |authorities: &Authorities| {
        let _ = announce.send(authorities.issuing().digest());
        told.tell_all(&authorities.message(told.count()).into());
    };
    loops.spawn(authorities::cut(store.clone(), registry.clone(), manager, cuts, ending.clone()));
    loops.spawn(tls::keep_fresh(Arc::clone(&shown), ports, changed, ending.clone()));
    loops.spawn(expiry::run(store.clone(), live, shown, ending.clone()));
    loops.spawn(held::remind(store.clone(), registry.clone(), ending.clone()));
    loops.spawn(peers.clone().beat(ending.clone()));
    loops.spawn(peers.clone().listen(Arc::clone(&nudge), ending.clone()));
    loops.spawn(peers.clone().pass_on(ordered, Arc::clone(&nudge), ending.clone()));
    loops.spawn(trust::keep_fresh(store.clone(), trust, ending.clone()));
    for exporter in exporters {
        loops.spawn(forward::run(exporter, store.clone(), manager, ending.clone()));
    }
    loops.spawn(dispatch::run(store.clone(), registry.clone(), nudge, ending.clone()));
    loops.spawn(dispatch::sweep(store.clone(), registry.clone(), manager, ending.clone()));
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(agents = %config.agent_listen, administrators = %config.admin_listen, "The manager runs.");

    let mut terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to signals")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("The manager ends.");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    ending.cancel();
    loops.close();
    let _ = timeout(DRAIN, loops.wait()).await;
    // Sessions say goodbye by themselves; the store is closed when they have left.
    let _ = timeout(DRAIN, async {
        while !registry.connected().is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    if let Ok(Err(error)) = timeout(DRAIN, peers.leave()).await {
        tracing::warn!(%error, "Cannot say that this manager ends.");
    }
    let _ = timeout(DRAIN, store.close()).await;
    Ok(())
}

/// Brings the schema up to this program's, unless another manager still works with the older one.
async fn bring_up(store: &Store, own: ManagerId) -> anyhow::Result<()> {
    let (found, known) = (store.known_schema().await?, Version::of_this_program());
    if found == known {
        return Ok(());
    }
    let managers = store.managers_of_any_schema().await?;
    if let Some(other) = managers.iter().find(|row| row.is_up && row.id != own) {
        anyhow::bail!(
            "the database has the older schema `{found}`, and the manager {} works with it: stop that one first; if \
             it does not run any more, `tm-manager migrate` brings the schema to `{known}`",
            other.id
        );
    }
    store.migrate().await?;
    tracing::info!(from = %found, to = %known, "The database has this version's schema.");
    Ok(())
}

/// One link is one descriptor, and the usual soft limit (1024) is there for programs that use `select`.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "Cannot raise the limit of open files.");
    }
}

/// Serves whoever monitors this manager, without TLS: the address is of this machine.
async fn serve_monitors(listener: TcpListener, router: Router, ending: CancellationToken) {
    let links = Arc::new(Semaphore::new(MONITOR_LINKS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ending.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&links).try_acquire_owned() else { continue };
        let (router, ending) = (router.clone(), ending.clone());
        tokio::spawn(async move {
            serve_link(stream, router, &ending).await;
            drop(permit);
        });
    }
}

/// Answers requests until the other side, or the manager, ends.
async fn serve_link<L: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    link: L,
    router: Router,
    ending: &CancellationToken,
) {
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(MONITOR_PATIENCE)
        .serve_connection(TokioIo::new(link), TowerToHyperService::new(router));
    tokio::select! {
        _ = served => {}
        () = ending.cancelled() => {}
    }
}
