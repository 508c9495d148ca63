//! The promise: an older image behind an NBD server that lies, stalls or dies ends the job with an error that says so; the bitmap
//! is as before, and no job is left.

mod control_common;
mod nbd_peer;

use control_common::*;
use nbd_peer::*;
use serde_json::json;
use std::io;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const SET_META_CONTEXT: u32 = 10;
const META_CONTEXT: u32 = 4;
const READ: u16 = 0;
const BLOCK_STATUS: u16 = 7;
const DONE: u16 = 1;
const DATA: u16 = 1;
const HOLE: u16 = 2;
const EXTENTS: u16 = 5;
const DISK: u64 = 4 * MIB;

type Script = Box<dyn FnOnce(&mut Peer) -> io::Result<()> + Send>;

/// Serves one connection after the other, each by its script, and answers whether they went as written.
fn serve(lab: &Lab, scripts: Vec<Script>) -> JoinHandle<io::Result<()>> {
    let listener = UnixListener::bind(lab.path("sock")).unwrap();
    std::thread::spawn(move || {
        for script in scripts {
            let mut peer = Peer(listener.accept()?.0);
            peer.0.set_read_timeout(Some(GIVE_UP))?;
            script(&mut peer)?;
        }
        Ok(())
    })
}

/// Whom `blockdev-add` asks for the size.
fn looked_at(peer: &mut Peer) -> io::Result<()> {
    peer.until_go(ACK)?;
    peer.about(DISK, FLAGS)?;
    peer.reply(GO, ACK, &[])?;
    peer.stall()
}

/// The handshake of a reader, who also asks for `base:allocation`.
fn until_go(peer: &mut Peer, size: u64, name: &[u8]) -> io::Result<()> {
    peer.greet()?;
    assert_eq!(peer.option()?.0, STRUCTURED);
    peer.reply(STRUCTURED, ACK, &[])?;
    assert_eq!(peer.option()?.0, SET_META_CONTEXT);
    peer.reply(SET_META_CONTEXT, META_CONTEXT, &[&[0, 0, 0, 9][..], name].concat())?;
    peer.reply(SET_META_CONTEXT, ACK, &[])?;
    assert_eq!(peer.option()?.0, GO);
    peer.about(size, FLAGS)?;
    peer.reply(GO, ACK, &[])
}

fn lab() -> Lab {
    let lab = Lab::new(1);
    lab.disks[0].dirty(0..64, 1);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    lab.disks[0].dirty([1], 2);
    lab
}

fn add_node(lab: &Lab) {
    let server = json!({ "type": "unix", "path": lab.path("sock") });
    lab.ok("blockdev-add", json!({ "driver": "nbd", "node-name": "old", "read-only": true, "server": server }));
}

fn arguments() -> serde_json::Value {
    json!({ "job-id": "j", "node": "d0", "name": "b", "pattern": "diff", "mode": "overwrite", "image-node": "old" })
}

/// The error of a job whose server answers requests by `answer`, after the handshake.
fn failure(answer: impl Fn(&mut Peer, u16, u64, u64, u32) -> io::Result<()> + Send + 'static) -> String {
    let lab = lab();
    let before = lab.disks[0].bitmaps();
    let script = move |peer: &mut Peer| {
        until_go(peer, DISK, b"base:allocation")?;
        // A client that hangs up on a liar ends this in the middle.
        while let Ok((_, kind, cookie, offset, len)) = peer.request() {
            if kind == 2 || answer(peer, kind, cookie, offset, len).is_err() {
                break;
            }
        }
        Ok(())
    };
    let server = serve(&lab, vec![Box::new(looked_at), Box::new(script)]);
    add_node(&lab);
    lab.ok("block-dirty-bitmap-populate", arguments());
    let error = lab.event("BLOCK_JOB_COMPLETED")["error"].as_str().expect("it fails").to_owned();
    lab.state("j", "null");
    assert_eq!(lab.disks[0].bitmaps(), before);
    assert_eq!(lab.jobs(), json!([]));
    lab.ok("blockdev-del", json!({ "node-name": "old" }));
    server.join().unwrap().unwrap();
    error
}

fn all_data(peer: &mut Peer, cookie: u64, len: u32) -> io::Result<()> {
    peer.chunk(DONE, EXTENTS, cookie, 12, &[&[0, 0, 0, 9][..], &len.to_be_bytes(), &[0; 4]].concat())
}

#[test]
fn answers_that_make_no_sense_end_the_job_and_not_more() {
    let reads = |answer: fn(&mut Peer, u64, u64, u32) -> io::Result<()>| {
        failure(move |peer, kind, cookie, offset, len| match kind {
            BLOCK_STATUS => all_data(peer, cookie, len),
            READ => answer(peer, cookie, offset, len),
            _ => panic!("request {kind}"),
        })
    };
    let fault = |text: &str| format!("is over: the server is at fault: {text}");
    for (error, want) in [
        (
            reads(|peer, cookie, offset, _| {
                peer.chunk(DONE, DATA, cookie, 12, &[&offset.to_be_bytes()[..], &[0; 4]].concat())
            }),
            "a reply that is not whole",
        ),
        (reads(|peer, cookie, _, _| peer.chunk(DONE, 0, cookie, 0, &[])), "a reply that is not whole"),
        (
            reads(|peer, cookie, offset, len| {
                peer.chunk(DONE, HOLE, cookie, 12, &[&(offset + 1).to_be_bytes()[..], &len.to_be_bytes()].concat())
            }),
            "bytes that were not asked for, or that had come",
        ),
        (
            reads(|peer, cookie, offset, _| {
                peer.chunk(DONE, HOLE, cookie, 12, &[&offset.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat())
            }),
            "bytes that were not asked for, or that had come",
        ),
        (
            reads(|peer, cookie, offset, len| {
                let hole = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
                peer.chunk(0, HOLE, cookie, 12, &hole)?;
                peer.chunk(DONE, HOLE, cookie, 12, &hole)
            }),
            "bytes that were not asked for, or that had come",
        ),
        (reads(|peer, cookie, _, _| peer.chunk(DONE, DATA, cookie, 7, &[0; 7])), "a chunk with the wrong length"),
        (reads(|peer, cookie, _, _| peer.simple(cookie, 0)), "a reply without its chunks"),
        (reads(|peer, cookie, _, len| all_data(peer, cookie, len)), "a reply that fits no request"),
        (reads(|peer, cookie, _, _| peer.chunk(DONE, 0, cookie + 99, 0, &[])), "a reply to no request"),
    ] {
        assert!(error.ends_with(&fault(want)), "{error}, not {want}");
        assert!(error.starts_with("could not read the older image at 0x"), "{error}");
    }
    let gone = reads(|_, _, _, _| Err(io::ErrorKind::Other.into()));
    // Which it is depends on whether requests had come that the server never read, and on whether one was being sent.
    let ends = ["the server closed the connection", "Connection reset by peer", "Broken pipe"]
        .map(|end| format!("is over: {end}"));
    assert!(ends.iter().any(|end| gone.ends_with(end.as_str())), "{gone}");
    let refused = reads(|peer, cookie, _, _| peer.simple(cookie, 5));
    assert!(refused.ends_with(": Input/output error"), "{refused}");
}

#[test]
fn lies_about_zeroes_are_noticed_where_they_can_be() {
    for payload in [
        vec![0, 0, 0, 9],
        [&[0, 0, 0, 9][..], &[0; 8]].concat(),
        [&[0, 0, 0, 8][..], &[0, 1, 0, 0], &[0; 4]].concat(),
        vec![0; 13],
    ] {
        let error = failure(move |peer, kind, cookie, _, _| {
            assert_eq!(kind, BLOCK_STATUS);
            peer.chunk(DONE, EXTENTS, cookie, payload.len() as u32, &payload)
        });
        assert!(error.contains("the server is at fault: "), "{error}");
    }
}

#[test]
fn a_server_of_another_size_or_context_is_refused_with_nothing_begun() {
    for (size, name, want) in [
        (MIB, &b"base:allocation"[..], format!("'d0' has {DISK} bytes, 'old' has {MIB}")),
        (DISK, b"base:lies", "NBD server at fault: a metadata context that was not asked for".to_owned()),
    ] {
        let lab = lab();
        let before = lab.disks[0].bitmaps();
        let script = move |peer: &mut Peer| {
            // A liar is hung up on.
            let _ = until_go(peer, size, name).and_then(|()| peer.stall());
            Ok(())
        };
        let server = serve(&lab, vec![Box::new(looked_at), Box::new(script)]);
        add_node(&lab);
        let error = lab.err("block-dirty-bitmap-populate", arguments());
        assert!(error.ends_with(&want), "{error}");
        assert_eq!((lab.disks[0].bitmaps(), lab.jobs()), (before, json!([])));
        lab.ok("blockdev-del", json!({ "node-name": "old" }));
        drop(server);
    }
}

#[test]
fn a_job_whose_server_hangs_ends_when_it_is_told_to() {
    let lab = lab();
    let before = lab.disks[0].bitmaps();
    let script = |peer: &mut Peer| {
        until_go(peer, DISK, b"base:allocation")?;
        peer.stall()
    };
    let server = serve(&lab, vec![Box::new(looked_at), Box::new(script)]);
    add_node(&lab);
    lab.ok("block-dirty-bitmap-populate", arguments());
    lab.ok("job-cancel", json!({ "id": "j" }));
    lab.event("BLOCK_JOB_CANCELLED");
    lab.state("j", "null");
    assert_eq!((lab.disks[0].bitmaps(), lab.jobs()), (before, json!([])));
    lab.ok("blockdev-del", json!({ "node-name": "old" }));
    server.join().unwrap().unwrap();
}
