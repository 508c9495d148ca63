//! Both ends of NBD against a peer whose every byte is chosen by the fuzzer, over a real socket.
//!
//! Promises: each connection ends when its peer has said everything; what an export is asked for lies inside it; what a client
//! believes of an export makes sense, and its requests get an answer or an error.

use super::address::{Stream, Timed};
use super::client::{Client, ClientSettings, Request};
use super::export::{Export, Extent};
use super::link::Link;
use super::negotiate::{Catalogue, Entry, negotiate};
use super::protocol::{command, command_flag};
use super::transmission::Transmission;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// What fits into a socket's buffer, so that the peer's words lie there before we read the first.
const MOST: usize = 64 << 10;

/// More than is moved at once, and no round number.
const SIZE: usize = (300 << 10) + 13;

/// Nobody waits that long.
const PATIENCE: Duration = Duration::from_secs(60);

struct Memory {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
}

impl Memory {
    fn inside(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= SIZE as u64), "{offset}+{len} is outside");
        offset as usize..(offset + len) as usize
    }

    fn change(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        assert!(!self.read_only, "a change of what is read-only");
        let range = self.inside(offset, len);
        change(&mut self.bytes.lock().unwrap()[range]);
        Ok(())
    }
}

impl Export for Memory {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.copy_from_slice(&self.bytes.lock().unwrap()[self.inside(offset, buf.len() as u64)]);
        Ok(())
    }

    fn is_hole(&self, offset: u64, len: u64) -> bool {
        self.inside(offset, len).start >= SIZE / 2
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, buf.len() as u64, |bytes| bytes.copy_from_slice(buf))
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.change(offset, len, |bytes| bytes.fill(0))
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, |_| ())
    }

    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".into(), "qemu:dirty-bitmap:b".into()]
    }

    /// Context 0 has one extent, context 1 has many short ones.
    fn block_status(&self, context: usize, offset: u64, len: u64, most: usize) -> io::Result<Vec<Extent>> {
        self.inside(offset, len);
        assert!(len > 0 && most > 0);
        match context {
            0 => Ok(vec![Extent { len, flags: 3 }]),
            1 => {
                let extent = |n: u64| Extent { len: (len - 16 * n).min(16), flags: n as u32 % 2 };
                Ok((0..len.div_ceil(16).min(most as u64)).map(extent).collect())
            }
            _ => panic!("there is no context {context}"),
        }
    }
}

impl Catalogue for [Arc<Memory>; 2] {
    fn list(&self) -> Vec<(String, String)> {
        vec![("r".into(), "read-only".into()), ("w".into(), String::new())]
    }

    fn look(&self, name: &str) -> Option<Entry> {
        let number = ["r", "w"].iter().position(|known| *known == name)?;
        Some(Entry { export: Arc::clone(&self[number]) as _, description: self.list().remove(number).1 })
    }

    fn enter(&self, name: &str) -> Option<Entry> {
        self.look(name)
    }
}

/// Our end of a connection whose other end has said `data` and nothing more; that end.
fn spoken(data: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(data).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    (ours, theirs)
}

/// The server: `data` is all that a client says, the handshake included.
pub fn nbd_server(data: &[u8]) {
    let (ours, mut theirs) = spoken(&data[..data.len().min(MOST)]);
    let hears = std::thread::spawn(move || io::copy(&mut theirs, &mut io::sink()));
    let memory = |read_only| Arc::new(Memory { bytes: Mutex::new(vec![1; SIZE]), read_only });
    let catalogue = [memory(true), memory(false)];
    let stream = Arc::new(Stream::Unix(ours));
    let deadline = Instant::now() + PATIENCE;
    if let Ok(Some(mut agreed)) = negotiate(Timed::new(&stream, deadline), &catalogue, None) {
        stream.set_timeouts(None, Some(PATIENCE)).unwrap();
        let link = Link::new(Arc::clone(&stream), agreed.tls.take());
        let (seat, over) = mpsc::sync_channel::<()>(0);
        Transmission::run(link, agreed, seat);
        // Its threads are over when their seat is gone.
        let ended = over.recv_timeout(PATIENCE);
        assert_eq!(ended, Err(mpsc::RecvTimeoutError::Disconnected), "the connection does not end");
    }
    stream.shutdown();
    let _ = hears.join().unwrap();
}

/// The client: `data` is all that a server says, whatever it is asked. A connection to read where its length is odd.
pub fn nbd_client(data: &[u8]) {
    let (ours, _theirs) = spoken(&data[..data.len().min(MOST)]);
    let settings = ClientSettings { handshake: PATIENCE, request: PATIENCE, ..ClientSettings::default() };
    let (stream, reads) = (Stream::Unix(ours), data.len() % 2 == 1);
    let deadline = Instant::now() + PATIENCE;
    let Ok(client) = Client::over(stream, "w", "nbd://fuzz/w".into(), reads, settings, deadline) else { return };
    let export = *client.export();
    assert!(export.min_block.is_power_of_two() && export.preferred_block.is_power_of_two(), "{export:?}");
    assert!(export.size.is_multiple_of(export.min_block.into()), "{export:?}");
    assert!(export.max_payload > 0 && export.max_payload.is_multiple_of(export.min_block), "{export:?}");
    let began = Instant::now();
    // An answer or an error: both are fine, waiting for the limit is not.
    if reads {
        read(&client, export.min_block)
    } else {
        write(&client)
    }
    drop(client);
    assert!(began.elapsed() < PATIENCE, "a request was not ended by the end of the connection");
}

fn write(client: &Client) {
    let requests = [
        (command::WRITE, command_flag::FUA, 512),
        (command::WRITE_ZEROES, 0, 4096),
        (command::FLUSH, 0, 0),
        (command::WRITE, 0, 1),
    ];
    for (kind, flags, len) in requests {
        let payload = if kind == command::WRITE { vec![7; len as usize] } else { Vec::new() };
        let _ = client.request(Request { kind, flags, offset: 0, len }, &payload);
    }
}

fn read(client: &Client, block: u32) {
    for blocks in [1, 2] {
        let len = block.min(4096) * blocks;
        if let Ok(bytes) = client.read(0, vec![7; len as usize]) {
            assert_eq!(bytes.len(), len as usize, "a read that is not whole");
        }
        if let Ok(Some(extents)) = client.allocation(0, len) {
            assert!(!extents.is_empty() && extents.iter().all(|(len, _)| *len > 0), "{extents:?}");
        }
    }
}
