//! The way back: what the device tells its front end without being asked, over the channel that the front end brings with
//! SET_BACKEND_REQ_FD.
//!
//! The session finds the channel, the device sends. `vhost` takes the message and has no sender for the one notice that a
//! block device has, CONFIG_CHANGE, nor does it give the descriptor away: so the session looks at messages before `vhost` reads
//! them, which on a Unix socket gives a descriptor of one's own. Invariant: nobody ever waits for a front end here.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a message's header: request, flags and size, each 32 bits in the host's order.
const HEADER: usize = 12;

/// Front end's request: here is the channel.
const SET_BACKEND_REQ_FD: u32 = 21;

/// Back end's request: read the configuration space again.
const CONFIG_CHANGE: u32 = 2;

/// Version 1 of the protocol, and no wish for a reply.
const FLAGS: u32 = 1;

/// A device's way to tell its front end something, if that has brought a channel.
#[derive(Debug, Default)]
pub struct Notices(Mutex<Option<OwnedFd>>);

impl Notices {
    fn channel(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The front end's channel, or `None` when it is gone.
    pub(super) fn set(&self, channel: Option<OwnedFd>) {
        *self.channel() = channel;
    }

    /// Tells the front end to read the configuration space again, and through it the guest. Without a channel, or if the
    /// front end leaves it full, it sees the new one whenever it looks next. Answers whether it was told.
    pub fn config_changed(&self) -> bool {
        let channel = self.channel();
        let Some(channel) = &*channel else { return false };
        let mut message = [0; HEADER];
        for (part, value) in message.chunks_exact_mut(4).zip([CONFIG_CHANGE, FLAGS, 0]) {
            part.copy_from_slice(&value.to_ne_bytes());
        }
        match rustix::net::send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(HEADER) => true,
            Ok(_) => {
                tracing::warn!("the front end's channel took a part of a notice");
                false
            }
            Err(error) => {
                tracing::warn!("cannot tell the front end of a new size: {error}");
                false
            }
        }
    }
}

/// Waits for the next message and leaves it unread; if it brings a channel, answers a descriptor of it. Errors are left to
/// who reads the message.
pub(super) fn next_channel(connection: impl AsFd) -> Option<OwnedFd> {
    let mut header = [0u8; HEADER];
    let read = rustix::net::recv(&connection, &mut header[..], RecvFlags::PEEK).ok()?.0;
    let request = u32::from_ne_bytes(header[..4].try_into().ok()?);
    if read < HEADER || request != SET_BACKEND_REQ_FD {
        return None;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(&connection, &mut [IoSliceMut::new(&mut header)], &mut ancillary, flags).ok()?;
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
    use std::io::{IoSlice, Read};
    use std::os::unix::net::UnixStream;

    fn header(request: u32) -> Vec<u8> {
        [request, 1, 8].into_iter().flat_map(u32::to_ne_bytes).collect()
    }

    #[test]
    fn a_channel_is_found_and_the_message_stays() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (mut front_end, channel) = UnixStream::pair().unwrap();
        let descriptors = [channel.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let message = header(SET_BACKEND_REQ_FD);
        rustix::net::sendmsg(&theirs, &[IoSlice::new(&message)], &mut ancillary, SendFlags::empty()).unwrap();
        drop(channel);

        let notices = Notices::default();
        assert!(!notices.config_changed(), "there is nobody yet");
        notices.set(next_channel(&ours));
        assert!(notices.config_changed());
        let mut told = [0; HEADER];
        front_end.read_exact(&mut told).unwrap();
        assert_eq!(told[..4], CONFIG_CHANGE.to_ne_bytes());
        let mut unread = [0; HEADER];
        ours.read_exact(&mut unread).unwrap();
        assert_eq!(unread[..], message[..]);
    }

    #[test]
    fn other_messages_the_end_and_a_full_channel_bring_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::write(&theirs, &header(1)).unwrap();
        assert!(next_channel(&ours).is_none());
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::write(&theirs, &header(SET_BACKEND_REQ_FD)).unwrap();
        assert!(next_channel(&ours).is_none(), "a channel without a descriptor");
        drop(theirs);
        let (channel, _front_end) = UnixStream::pair().unwrap();
        let notices = Notices::default();
        notices.set(Some(channel.into()));
        while notices.config_changed() {}
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(next_channel(&ours).is_none());
    }
}
