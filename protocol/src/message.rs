//! What agents and managers say to each other on the control channel.
//!
//! One struct per type number. A released struct never changes: a new need gets a new number, and an enum
//! inside a body grows only at its end.

use bincode::{Decode, Encode};
use bytes::BytesMut;

use crate::{
    address::Address,
    frame::{self, Frame, FrameError},
    ids::{EndpointId, ManagerId, StreamId, TaskId},
    quote::Quote,
    report::{Coverage, Detection, Failure, ItemReport, Notice, OwnedFile, Tally, VaultEntry},
    task::TaskSpec,
};

macro_rules! messages {
    ($(#[$doc:meta])* $enum:ident { $($number:literal $name:ident <= $limit:expr;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $enum {
            $(#[doc = concat!("Type number ", stringify!($number), ".")] $name($name),)*
        }

        impl $enum {
            /// Longest body of a type number, in bytes; `None` if this side knows no such type.
            pub fn limit(kind: u16) -> Option<usize> {
                match kind {
                    $($number => Some($limit),)*
                    _ => None,
                }
            }

            /// Decodes a frame; `Ok(None)` for a type that this build does not know, which is skipped.
            ///
            /// # Errors
            /// If the body is not a message of its type.
            pub fn decode(frame: &Frame) -> Result<Option<Self>, FrameError> {
                match frame.kind {
                    $($number => frame::decode(frame.kind, &frame.body).map(|m| Some(Self::$name(m))),)*
                    _ => Ok(None),
                }
            }

            /// Appends this message, as a frame, to `buffer`.
            ///
            /// # Errors
            /// If it is longer than its type allows.
            pub fn encode(&self, buffer: &mut BytesMut) -> Result<(), FrameError> {
                match self {
                    $(Self::$name(m) => frame::put($number, $limit, m, buffer),)*
                }
            }

            /// The type numbers of this enum, for the tests that walk them all.
            pub const NUMBERS: &[u16] = &[$($number),*];
        }

        $(impl From<$name> for $enum {
            fn from(message: $name) -> Self {
                Self::$name(message)
            }
        })*
    };
}

const KIB: usize = 1024;

messages! {
    /// What an agent may say.
    ToManager {
        1 Hello <= 4 * KIB;
        2 Inventory <= 64 * KIB;
        3 Ping <= 16;
        4 Pong <= 16;
        5 Report <= 256 * KIB;
        6 Progress <= 8 * KIB;
        7 EnrollRequest <= 16 * KIB;
        8 Notices <= 64 * KIB;
        9 Renew <= 16 * KIB;
    }
}

messages! {
    /// What a manager may say.
    ToAgent {
        101 Welcome <= 16 * KIB;
        102 Ping <= 16;
        103 Pong <= 16;
        104 Assign <= 256 * KIB;
        105 ReportStored <= 64;
        106 Goodbye <= 4 * KIB;
        107 EnrollReply <= 32 * KIB;
        108 Cancel <= 64;
        109 NoticesStored <= 64;
        110 Renewed <= 32 * KIB;
        111 Authorities <= 64 * KIB;
        112 Held <= 64;
        113 NewIdentity <= 32 * KIB;
        114 RenewNow <= 16;
    }
}

/// The agent's first message.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Lowest protocol version the agent accepts.
    pub min_version: u8,
    /// Highest protocol version the agent speaks.
    pub max_version: u8,
    /// The program's version (`0.1.0`).
    pub agent_version: String,
    /// Changes with each boot of the machine (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// Drawn once per start of the agent: tells a reconnect from a second copy.
    pub process_nonce: u64,
    /// `TaskKind::number` of each kind of task the agent can do.
    pub task_kinds: Vec<u16>,
    /// The series that this agent's reports are numbered in.
    pub stream: StreamId,
    /// The agent's clock, in milliseconds since 1970.
    pub clock_ms: i64,
    /// Why the last attempts to connect failed, if they did.
    pub last_failure: Option<Failure>,
}

/// The manager's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The version both will speak.
    pub version: u8,
    /// Who answers.
    pub manager: ManagerId,
    /// The manager's program version.
    pub manager_version: String,
    /// The manager's clock, in milliseconds since 1970.
    pub clock_ms: i64,
    /// How often each side pings, in milliseconds; silence of twice that long ends the session.
    pub heartbeat_ms: u32,
    /// Every address of the fleet's managers, in order of preference.
    pub addresses: Vec<Address>,
    /// The highest report number of the agent's stream that is stored here; 0 if none.
    pub stored_through: u64,
    /// The same for [`Notices`].
    pub notices_through: u64,
}

/// The endpoint's facts, sent after [`Welcome`] and whenever they change.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Inventory {
    /// Host name.
    pub host: String,
    /// Name and version of the operating system (`Debian GNU/Linux 12`).
    pub os: String,
    /// Kernel release.
    pub kernel: String,
    /// Machine architecture (`x86_64`).
    pub arch: String,
    /// CPU model.
    pub cpu: String,
    /// Number of logical processors.
    pub cpus: u32,
    /// Physical memory, in bytes.
    pub memory: u64,
    /// Mounted local file systems.
    pub disks: Vec<Disk>,
    /// IP addresses of all interfaces but loopback, as text.
    pub addresses: Vec<String>,
    /// As in [`Hello`].
    pub boot_id: String,
    /// As in [`Hello`].
    pub agent_version: String,
}

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
pub struct Disk {
    /// Where it is mounted.
    pub mount: String,
    /// Its type (`ext4`).
    pub filesystem: String,
    /// Its size, in bytes.
    pub total: u64,
}

/// "Are you there?"; either side may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Ping {
    /// Comes back in [`Pong`].
    pub nonce: u64,
}

/// "I am."
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Pong {
    /// From the [`Ping`] it answers.
    pub nonce: u64,
}

/// Something the manager must store. Sent again after each reconnect until [`ReportStored`] covers it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Report {
    /// Its number in the agent's stream; the first is 1, none is left out.
    pub sequence: u64,
    /// When it was made, in milliseconds since 1970 by the agent's clock.
    pub at_ms: i64,
    /// What it says.
    pub body: ReportBody,
}

impl Report {
    /// Most [`Report::weight`] that a manager accepts: one report must not hold everybody else's up.
    pub const MAX_WEIGHT: usize = 512;

    /// How much there is to store: one for the report itself, and one for each detection, item, detection
    /// that an item settles, vault entry and file of a package in it.
    pub fn weight(&self) -> usize {
        1 + match &self.body {
            ReportBody::Accepted { .. }
            | ReportBody::Started { .. }
            | ReportBody::Refused { .. }
            | ReportBody::Finished { .. }
            | ReportBody::Lost { .. } => 0,
            ReportBody::Detections { detections, .. } => detections.len(),
            ReportBody::Items { items, .. } => items.iter().map(|item| 1 + item.detections.len()).sum(),
            ReportBody::Vault { items, .. } => items.len(),
            ReportBody::Owned { files, .. } => files.len(),
        }
    }
}

/// What a report says. Variants are only ever added at the end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ReportBody {
    /// The task is noted here and will be begun.
    Accepted {
        /// Which.
        task: TaskId,
    },
    /// The task is being carried out.
    Started {
        /// Which.
        task: TaskId,
    },
    /// The agent will not carry the task out.
    Refused {
        /// Which.
        task: TaskId,
        /// Why.
        failure: Failure,
    },
    /// Part of a scan's findings.
    Detections {
        /// Which scan.
        task: TaskId,
        /// At most what fits one frame and [`Report::MAX_WEIGHT`].
        detections: Vec<Detection>,
    },
    /// The task has ended.
    Finished {
        /// Which.
        task: TaskId,
        /// How.
        outcome: Outcome,
    },
    /// Part of what a cleanup or a restore did. A task that went on after a crash may report an item again;
    /// the later report holds.
    Items {
        /// Which task.
        task: TaskId,
        /// At most what fits one frame and [`Report::MAX_WEIGHT`].
        items: Vec<ItemReport>,
    },
    /// A part of what the vault holds: after a start, and when it changed outside of any task.
    Vault {
        /// The first part of a listing, which takes the place of everything known before.
        first: bool,
        /// At most what fits one frame and [`Report::MAX_WEIGHT`].
        items: Vec<VaultEntry>,
    },
    /// The report of this number and the `count` before it were lost on the endpoint (a damaged journal): it
    /// follows `sequence - count - 1`.
    Lost {
        /// How many besides this one.
        count: u64,
    },
    /// Of the files in which a scan found something, those that belong to packages. Told before the detections, so that
    /// a manager stops what is wrong before it does anything about them.
    Owned {
        /// Which scan.
        task: TaskId,
        /// At most what fits one frame and [`Report::MAX_WEIGHT`].
        files: Vec<OwnedFile>,
    },
}

/// The agent wants a certificate for a new key, in the place of the one that it is known by on this link.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Renew {
    /// A certificate request (PKCS #10, DER). Only its key is taken from it.
    pub csr: Vec<u8>,
}

/// The answer to [`Renew`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Renewed {
    /// The key is certified. The older certificate is good until this one is used for the first time.
    Certified {
        /// DER.
        certificate: Vec<u8>,
    },
    /// It is not; the older certificate stays what it is.
    Refused(Failure),
}

/// The certificate authorities that the fleet's managers answer for, told after [`Welcome`] and whenever they change.
/// An agent trusts these from then on, and no others.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Authorities {
    /// DER; the one that issues comes first. 1 to [`Authorities::MAX`].
    pub certificates: Vec<Vec<u8>>,
    /// Within how many milliseconds an agent whose certificate comes from another one asks for its next: a fleet's
    /// renewals spread over that time.
    pub renew_within_ms: u32,
}

impl Authorities {
    /// Most authorities at a time.
    pub const MAX: usize = 8;
}

/// The manager's answer to [`Hello`] while another agent with the same identity is connected and answers. The agent says
/// its [`Inventory`] and asks for a certificate ([`Renew`]) for an identity of its own, and waits; it gets
/// [`NewIdentity`] or [`Goodbye`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Held {
    /// The manager's clock, in milliseconds since 1970.
    pub clock_ms: i64,
    /// As in [`Welcome`].
    pub heartbeat_ms: u32,
}

impl Held {
    /// The code of [`Hello::last_failure`] by which an agent that was held says so when it comes again: it is held again,
    /// whoever comes first after a manager was away.
    pub const CODE: &str = "identity-held";
}

/// A held agent is an endpoint of its own from now on. What it has of the other one's tasks is not its own.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NewIdentity {
    /// Who it is.
    pub endpoint: EndpointId,
    /// Its certificate (DER), for the key that it asked for.
    pub certificate: Vec<u8>,
}

/// The agent's key was copied: it makes a new one as soon as no task runs, and asks for its certificate ([`Renew`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct RenewNow;

/// How a task ended. Variants are only ever added at the end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// A scan went through; its detections have been reported before this.
    Scanned(Coverage),
    /// It could not be done.
    Failed(Failure),
    /// It was called off; a scan says what it had looked at by then.
    Cancelled(Option<Coverage>),
    /// It was not begun in time.
    Expired,
    /// A cleanup or restore went through every item; what came of each has been reported before this.
    Treated(Tally),
    /// A cleanup or restore was called off; what had been done by then stays done, and is in the items.
    TreatedUntilCancelled(Tally),
    /// A cleanup or restore ran out of time, in the same way.
    TreatedUntilDeadline(Tally),
    /// A scan that was asked what it would cost says so; it has looked at nothing.
    Quoted(Quote),
    /// A scan ran out of time; what it had looked at by then.
    ScannedUntilDeadline(Coverage),
}

/// How far a task is; sent at most once a second, never stored before it is sent, lost without harm.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Progress {
    /// Which.
    pub task: TaskId,
    /// Files looked at.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// Detections so far.
    pub detections: u64,
    /// Skips so far.
    pub skipped: u64,
}

/// An order. The agent answers with reports.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Assign {
    /// Names the order; the same id is never carried out twice.
    pub task: TaskId,
    /// For whom. An agent refuses a task that names another endpoint.
    pub endpoint: EndpointId,
    /// What to do.
    pub spec: TaskSpec,
    /// How long the task may still wait to be begun, in milliseconds from now.
    pub expires_in_ms: u64,
    /// How long it may run once begun, in milliseconds.
    pub deadline_ms: u64,
    /// Who ordered it.
    pub issuer: String,
    /// Why, in the issuer's words.
    pub reason: String,
}

/// Calls a task off.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Cancel {
    /// Which.
    pub task: TaskId,
}

/// Every report up to and including this number is in the manager's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ReportStored {
    /// The highest number stored without a gap.
    pub through: u64,
}

/// What the agent tells unasked, in order. Sent again after each reconnect until [`NoticesStored`] covers it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Notices {
    /// The number of the first in the agent's stream of notices; the first ever is 1. A number that was
    /// left out was dropped, and a notice `notices-lost` counts it.
    pub first: u64,
    /// The notices, at most [`Notices::MAX`].
    pub notices: Vec<Notice>,
}

impl Notices {
    /// Most in one message.
    pub const MAX: usize = 16;
}

/// Every notice up to and including this number is in the manager's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct NoticesStored {
    /// The highest number stored.
    pub through: u64,
}

/// Why the manager ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Goodbye {
    /// The reason.
    pub failure: Failure,
    /// How long to wait before the next attempt, in milliseconds; 0 leaves it to the agent.
    pub retry_after_ms: u32,
}

/// A new agent asks to be let in (`tm-enroll/1` only).
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct EnrollRequest {
    /// From the enrollment token.
    pub secret: [u8; 32],
    /// PKCS #10 request (DER) for a key made on the endpoint. Names in it are ignored.
    pub csr: Vec<u8>,
    /// The endpoint's host name, a label.
    pub host: String,
    /// The program's version.
    pub agent_version: String,
}

impl std::fmt::Debug for EnrollRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnrollRequest").field("host", &self.host).finish_non_exhaustive()
    }
}

/// The answer to [`EnrollRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum EnrollReply {
    /// Let in.
    Enrolled {
        /// Who the agent is from now on.
        endpoint: EndpointId,
        /// Its certificate (DER).
        certificate: Vec<u8>,
        /// The CA certificate (DER); the agent checks it against the token's digest.
        ca: Vec<u8>,
        /// Every address of the fleet's managers.
        addresses: Vec<Address>,
    },
    /// Not let in.
    Refused(Failure),
}
