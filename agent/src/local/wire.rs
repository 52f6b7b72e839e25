//! What `tm-agent scan` and the running agent say to each other, over a Unix `SOCK_SEQPACKET` socket.
//!
//! The client asks: one packet is one [`Ask`], of at most [`LONGEST_ASK`] bytes, with at most [`BATCH`] open files
//! beside it. The agent answers: an [`Answer`] goes in one or more packets of at most [`PACKET`] bytes, each after one
//! byte that says whether more follows. Names and paths never go either way, but for those of members within a file.
//!
//! **Invariant:** whatever a peer sends, no more than this is read, kept or allocated for it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bincode::{Decode, Encode, config};
use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use tm_protocol::{ids::Sha256, report::Failure, task::ScanLimits};
use tm_scanner::{item::Findings, sandbox::PartState};

/// The number of this form of the conversation. An agent that runs on while its program is replaced may speak another.
pub(super) const FORM: u32 = 1;
/// Most open files beside one [`Ask`].
pub(super) const BATCH: usize = 16;
/// Longest packet with an [`Ask`], in bytes.
pub(super) const LONGEST_ASK: usize = 512;
/// Longest packet with a part of an [`Answer`], in bytes.
const PACKET: usize = 32 << 10;
/// Longest [`Answer`], in bytes: the findings of one file, as long as a scan worker may make them, and some more.
const LONGEST_ANSWER: usize = 17 << 20;

/// What a client wants.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Ask {
    /// The first.
    Begin(Begin),
    /// These files, which are beside it in the same order. The numbers are the client's, each larger than the last.
    Files(Vec<u64>),
    /// It still lives, and has no file to hand over just now.
    Alive,
    /// No more files come.
    Finish,
}

/// How a scan is to be.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Begin {
    /// [`FORM`].
    pub(super) form: u32,
    /// How far to go with one file.
    pub(super) limits: ScanLimits,
    /// Scanning threads that it would like to have.
    pub(super) threads: u16,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Answer {
    /// Some of the patterns that files are looked at with, and what to call them.
    Patterns(Vec<(Sha256, String)>),
    /// That were all patterns; files may come.
    Ready {
        /// Patterns that the agent holds and does not use here: too many, or they do not load.
        left_out: u32,
        /// What is in force around the scan worker.
        sandbox: Vec<PartState>,
    },
    /// What came of files, by the client's numbers.
    Done {
        /// Each file once.
        files: Vec<(u64, Findings)>,
        /// CPU time of the scan so far, in milliseconds.
        cpu_ms: u64,
    },
    /// That was all.
    End {
        /// CPU time of the whole scan, in milliseconds.
        cpu_ms: u64,
        /// The name of a pattern that ended worker after worker, if that ended the scan.
        lethal: Option<String>,
    },
    /// The agent will not go on, and why. The last.
    Refused(Failure),
}

/// Bytes that are no part of this conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// Longer than anything that is said.
    #[error("a message is too long")]
    TooLong,
    /// It has no meaning.
    #[error("a message is malformed")]
    Malformed,
    /// More files than one message may bring.
    #[error("a message brings more than {BATCH} files")]
    Files,
}

/// What was received.
#[derive(Debug)]
pub(super) enum Received<M> {
    /// This.
    Message(M),
    /// Nothing, for as long as the socket's timeout says.
    Silence,
    /// The peer has closed it, or no longer is.
    Closed,
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

/// Sends one ask with the files beside it (at most [`BATCH`]). Blocks while the peer is busy, unless told otherwise by
/// `flags`.
pub(super) fn ask(
    socket: impl AsFd,
    ask: &Ask,
    files: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let body = bincode::encode_to_vec(ask, config::standard()).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::other("too many files in one message"));
        }
        match sendmsg(&socket, &[IoSlice::new(&body)], &mut control, flags | SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one ask and the files beside it. What is not used is closed.
pub(super) fn receive_ask(socket: impl AsFd) -> Result<Received<(Ask, Vec<OwnedFd>)>, ReceiveError> {
    let mut bytes = [0; LONGEST_ASK];
    let (length, flags, files) = match receive(socket, &mut bytes)? {
        Received::Message(received) => received,
        Received::Silence => return Ok(Received::Silence),
        Received::Closed => return Ok(Received::Closed),
    };
    if flags.contains(ReturnFlags::TRUNC) {
        return Err(Violation::TooLong.into());
    }
    if flags.contains(ReturnFlags::CTRUNC) || files.len() > BATCH {
        return Err(Violation::Files.into());
    }
    let body = bytes.get(..length).ok_or(Violation::TooLong)?;
    let limited = config::standard().with_limit::<{ 4 * LONGEST_ASK }>();
    match bincode::decode_from_slice(body, limited) {
        Ok((ask, used)) if used == length => Ok(Received::Message((ask, files))),
        Ok(_) | Err(_) => Err(Violation::Malformed.into()),
    }
}

/// Sends one answer. Blocks for as long as the socket's timeout says.
pub(super) fn answer(socket: impl AsFd, answer: &Answer, flags: SendFlags) -> io::Result<()> {
    let body = bincode::encode_to_vec(answer, config::standard()).map_err(io::Error::other)?;
    let mut parts = body.chunks(PACKET - 1).peekable();
    while let Some(part) = parts.next() {
        let more = [u8::from(parts.peek().is_some())];
        let packet = [IoSlice::new(&more), IoSlice::new(part)];
        loop {
            let mut control = SendAncillaryBuffer::default();
            match sendmsg(&socket, &packet, &mut control, flags | SendFlags::NOSIGNAL) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// The parts of an answer that have come so far.
#[derive(Debug, Default)]
pub(super) struct Parts(Vec<u8>);

impl Parts {
    /// Receives one answer. After a silence it goes on where it was.
    pub(super) fn receive(&mut self, socket: impl AsFd) -> Result<Received<Answer>, ReceiveError> {
        loop {
            let mut bytes = [0; PACKET];
            let length = match receive(&socket, &mut bytes)? {
                Received::Message((_, flags, _)) if flags.contains(ReturnFlags::TRUNC) => {
                    return Err(Violation::TooLong.into());
                }
                Received::Message((length, ..)) => length,
                Received::Silence => return Ok(Received::Silence),
                Received::Closed => return Ok(Received::Closed),
            };
            let Some((more, part)) = bytes.get(..length).and_then(<[u8]>::split_first) else {
                return Err(Violation::Malformed.into());
            };
            if self.0.len().saturating_add(part.len()) > LONGEST_ANSWER {
                return Err(Violation::TooLong.into());
            }
            self.0.extend_from_slice(part);
            if *more != 0 {
                continue;
            }
            let body = std::mem::take(&mut self.0);
            let limited = config::standard().with_limit::<{ 4 * LONGEST_ANSWER }>();
            return match bincode::decode_from_slice(&body, limited) {
                Ok((answer, used)) if used == body.len() => Ok(Received::Message(answer)),
                Ok(_) | Err(_) => Err(Violation::Malformed.into()),
            };
        }
    }
}

type Packet = (usize, ReturnFlags, Vec<OwnedFd>);

fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Received<Packet>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut was_reset = false;
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let packet =
            match recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(packet) => packet,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Received::Silence),
                // The peer went without having read all; what it said before comes after this error.
                Err(Errno::CONNRESET) if !was_reset => {
                    was_reset = true;
                    continue;
                }
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Received::Closed),
                Err(error) => return Err(error.into()),
            };
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        return Ok(match packet.bytes {
            0 => Received::Closed,
            length => Received::Message((length, packet.flags, files)),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, time::Duration};

    use proptest::prelude::*;
    use rustix::net::{
        AddressFamily, SocketFlags, SocketType, send, socketpair,
        sockopt::{Timeout, set_socket_timeout},
    };
    use tm_protocol::report::{PathBytes, SkipReason};
    use tm_scanner::item::Skip;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (one, two) = pair.unwrap();
        for socket in [&one, &two] {
            wait_at_most(socket, Duration::from_secs(60));
        }
        (one, two)
    }

    fn wait_at_most(socket: &OwnedFd, wait: Duration) {
        set_socket_timeout(socket, Timeout::Recv, Some(wait)).unwrap();
    }

    #[test]
    fn asks_come_with_their_files() {
        let (client, agent) = pair();
        let file = File::open("/dev/null").unwrap();
        let files = [file.as_fd(); BATCH];
        let ids: Vec<u64> = (0..16).map(|n| u64::MAX - n).collect();
        ask(&client, &Ask::Files(ids.clone()), &files, SendFlags::empty()).unwrap();
        ask(&client, &Ask::Finish, &[], SendFlags::empty()).unwrap();
        match receive_ask(&agent).unwrap() {
            Received::Message((got, files)) => assert_eq!((got, files.len()), (Ask::Files(ids), BATCH)),
            other @ (Received::Silence | Received::Closed) => panic!("{other:?}"),
        }
        assert!(
            matches!(receive_ask(&agent).unwrap(), Received::Message((Ask::Finish, files)) if files.is_empty())
        );
        wait_at_most(&agent, Duration::from_millis(50));
        assert!(matches!(receive_ask(&agent).unwrap(), Received::Silence));
        drop(client);
        assert!(matches!(receive_ask(&agent).unwrap(), Received::Closed));
    }

    #[test]
    fn long_answers_go_in_parts_and_outlive_a_silence() {
        let (agent, client) = pair();
        let skip = Skip { member: vec![PathBytes(vec![b'm'; 3 * PACKET])], reason: SkipReason::Limit };
        let findings = Findings { skips: vec![skip; 40], ..Findings::default() };
        let long = Answer::Done { files: vec![(7, findings)], cpu_ms: 3 };
        std::thread::scope(|scope| {
            scope.spawn(|| answer(&agent, &long, SendFlags::empty()).unwrap());
            let mut parts = Parts::default();
            match parts.receive(&client).unwrap() {
                Received::Message(got) => assert_eq!(got, long),
                other @ (Received::Silence | Received::Closed) => panic!("{other:?}"),
            }
            wait_at_most(&client, Duration::from_millis(50));
            assert!(matches!(parts.receive(&client).unwrap(), Received::Silence));
        });
        // The silence may fall between two parts.
        let mut parts = Parts::default();
        send(&agent, &[1, 3], SendFlags::empty()).unwrap();
        assert!(matches!(parts.receive(&client).unwrap(), Received::Silence));
        send(&agent, &[0, 5, 0], SendFlags::empty()).unwrap();
        assert!(matches!(
            parts.receive(&client).unwrap(),
            Received::Message(Answer::End { cpu_ms: 5, lethal: None })
        ));
        // What was said before the end is heard, also by one whose own words were not read any more.
        ask(&client, &Ask::Alive, &[], SendFlags::empty()).unwrap();
        answer(&agent, &Answer::End { cpu_ms: 1, lethal: None }, SendFlags::empty()).unwrap();
        drop(agent);
        let mut parts = Parts::default();
        assert!(matches!(parts.receive(&client).unwrap(), Received::Message(Answer::End { .. })));
        assert!(matches!(parts.receive(&client).unwrap(), Received::Closed));
    }

    #[test]
    fn too_much_is_a_violation() {
        let (client, agent) = pair();
        send(&client, &[0; LONGEST_ASK + 1], SendFlags::empty()).unwrap();
        let error = receive_ask(&agent).unwrap_err();
        assert!(matches!(error, ReceiveError::Violation(Violation::TooLong)), "{error:?}");

        let file = File::open("/dev/null").unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd(); BATCH + 1];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(&client, &[IoSlice::new(&[2])], &mut control, SendFlags::empty()).unwrap();
        let error = receive_ask(&agent).unwrap_err();
        assert!(matches!(error, ReceiveError::Violation(Violation::Files)), "{error:?}");

        // Parts without end.
        let (agent, client) = pair();
        std::thread::scope(|scope| {
            scope.spawn(|| while send(&agent, &[1; PACKET], SendFlags::NOSIGNAL).is_ok() {});
            let error = Parts::default().receive(&client).unwrap_err();
            assert!(matches!(error, ReceiveError::Violation(Violation::TooLong)), "{error:?}");
            drop(client);
        });
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_ask_or_a_violation(bytes in prop::collection::vec(any::<u8>(), 1..LONGEST_ASK)) {
            let (client, agent) = pair();
            send(&client, &bytes, SendFlags::empty()).unwrap();
            match receive_ask(&agent) {
                Ok(Received::Message((got, files))) => {
                    prop_assert!(files.is_empty());
                    let again = bincode::encode_to_vec(&got, config::standard()).unwrap();
                    prop_assert!(again.len() <= bytes.len());
                }
                Ok(other @ (Received::Silence | Received::Closed)) => prop_assert!(false, "{other:?}"),
                Err(ReceiveError::Violation(_)) => {}
                Err(error @ ReceiveError::Io(_)) => prop_assert!(false, "{error}"),
            }
        }
    }
}
