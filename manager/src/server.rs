//! Builds every room, starts every loop, ends them in order.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::ServerConfig;
use tm_scanner::pool::WorkerProgram;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    agents::{
        ca::Authority,
        enrollment::Guard,
        intake::Intake,
        listener::{self, Port},
        meter::Meters,
        registry::Registry,
        session::Shared,
        tls,
    },
    cli,
    config::Config,
    dispatch,
    http::{self, AppState},
    patterns::{
        Blobs,
        trust::{self, OnlineKeys},
    },
    store::Store,
};

/// How long sessions and requests have to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Administrators' links at a time; more are turned away.
const ADMIN_LINKS: usize = 512;
/// How long a handshake and a request's header may take on the administrators' port.
const ADMIN_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the manager until it is told to end.
pub(crate) async fn run(data: &Path, config: Config) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let authority =
        Arc::new(Authority::load(&data.join("ca")).context("cannot load the certificate authority")?);
    let url = config.database.clone().unwrap_or_else(|| cli::default_database(data));
    let store = Store::open(&url).await?;
    let blobs = Blobs::open(data.join("patterns")).context("cannot open the patterns' folder")?;
    let trust = Arc::new(OnlineKeys::open(&data.join("trust"))?);
    store.forget_sessions(authority.manager).await?;
    let (agent_tls, admin_tls) = tls::configure(&authority, &config.hosts()).context("cannot set up TLS")?;
    let agents = TcpListener::bind(config.agent_listen)
        .await
        .with_context(|| format!("cannot listen for agents on {}", config.agent_listen))?;
    let admins = TcpListener::bind(config.admin_listen)
        .await
        .with_context(|| format!("cannot listen for administrators on {}", config.admin_listen))?;

    let ending = CancellationToken::new();
    let loops = TaskTracker::new();
    let nudge = Arc::new(Notify::new());
    let registry = Registry::new(Arc::clone(&nudge));
    let shared = Shared {
        store: store.clone(),
        intake: Intake::start(store.clone(), &config.limits, ending.clone()),
        registry: registry.clone(),
        meters: Meters::new(config.limits),
        manager: authority.manager,
        addresses: config.addresses(),
        heartbeat: config.heartbeat,
        ending: ending.clone(),
    };
    let router = http::router(AppState {
        store: store.clone(),
        blobs: blobs.clone(),
        nudge: Arc::clone(&nudge),
        addresses: config.addresses(),
        ca_sha256: authority.digest(),
        manager: authority.manager,
        fleet: authority.fleet,
        trust: Arc::clone(&trust),
        worker: WorkerProgram::this(),
    });
    let port = Port { tls: agent_tls, authority, blobs, guard: Guard::default(), shared };
    loops.spawn(listener::run(agents, port));
    loops.spawn(serve_admins(admins, admin_tls, router, ending.clone()));
    loops.spawn(trust::keep_fresh(store.clone(), trust, ending.clone()));
    loops.spawn(dispatch::run(store.clone(), registry.clone(), nudge, ending.clone()));
    loops.spawn(dispatch::sweep(store.clone(), registry.clone(), ending.clone()));
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(agents = %config.agent_listen, administrators = %config.admin_listen, "The manager runs.");

    let mut terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to signals")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("The manager ends.");
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
    let _ = timeout(DRAIN, store.close()).await;
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

async fn serve_admins(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    router: Router,
    ending: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let links = Arc::new(Semaphore::new(ADMIN_LINKS));
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
        let (acceptor, router, ending) = (acceptor.clone(), router.clone(), ending.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let Ok(Ok(link)) = timeout(ADMIN_PATIENCE, acceptor.accept(stream)).await else { return };
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(ADMIN_PATIENCE)
                .serve_connection(TokioIo::new(link), TowerToHyperService::new(router));
            tokio::select! {
                _ = served => {}
                () = ending.cancelled() => {}
            }
            drop(permit);
        });
    }
}
