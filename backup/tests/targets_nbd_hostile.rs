//! The promise: an NBD server that lies, stalls or dies gives an error that says so, and never a hang, a panic or a false success.
//!
//! The servers here are scripts: what each connection hears and says is written out.

mod control_common;
mod nbd_peer;

use blkmark_backup::nbd::{Address, ClientSettings, NbdTarget};
use blkmark_backup::target::{Policy, Target};
use control_common::*;
use nbd_peer::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// A server with one connection, and what a client has to know of it.
struct Scene {
    address: Address,
    script: Option<JoinHandle<io::Result<()>>>,
    _dir: tempfile::TempDir,
}

impl Scene {
    fn new(script: impl FnOnce(&mut Peer) -> io::Result<()> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let script = std::thread::spawn(move || {
            let mut peer = Peer(listener.accept()?.0);
            peer.0.set_read_timeout(Some(GIVE_UP))?;
            script(&mut peer)
        });
        Self { address: Address::Unix(path), script: Some(script), _dir: dir }
    }

    fn open(&self) -> Result<NbdTarget, String> {
        self.open_within(GIVE_UP)
    }

    fn open_within(&self, request: Duration) -> Result<NbdTarget, String> {
        let settings = ClientSettings { open: Duration::ZERO, handshake: GIVE_UP, request };
        NbdTarget::open(&self.address, "x", settings, &Policy::default()).map_err(|error| error.to_string())
    }

    /// The script ran as written (a client that hangs up on a liar may leave it in the middle).
    fn over(mut self) {
        let _ = self.script.take().unwrap().join().expect("the script heard what it expects");
    }
}

fn refused(script: impl FnOnce(&mut Peer) -> io::Result<()> + Send + 'static) -> String {
    let scene = Scene::new(script);
    let error = scene.open().expect_err("this server is refused");
    scene.over();
    error
}

#[test]
fn a_server_that_makes_no_sense_is_refused() {
    let fault = |text: &str| format!("NBD server at fault: {text}");
    assert_eq!(refused(|p| p.say(&[b"HTTP/1.1 400 Bad Request\r\n\r\n"])), fault("the server does not speak NBD"));
    assert_eq!(
        refused(|p| p.say(&[b"NBDMAGIC", &0x0000_4202_8186_1253_u64.to_be_bytes()])),
        fault("the server speaks only the oldest form of NBD")
    );
    assert_eq!(refused(|_| Ok(())), "Failed to read data: the server closed the connection");
    let wrong_option = |p: &mut Peer| {
        p.greet()?;
        p.option()?;
        p.reply(GO, ACK, &[])
    };
    assert_eq!(refused(wrong_option), fault("the server replied to an option that was not asked"));
    let long = |p: &mut Peer| {
        p.greet()?;
        p.option()?;
        let (magic, kind) = (REPLY_MAGIC.to_be_bytes(), STRUCTURED.to_be_bytes());
        p.say(&[&magic, &kind, &ACK.to_be_bytes(), &u32::MAX.to_be_bytes()])
    };
    assert_eq!(refused(long), fault("a reply to an option is 4294967295 bytes long"));
    let nothing = |p: &mut Peer| {
        p.until_go(ACK)?;
        p.reply(GO, ACK, &[])
    };
    assert_eq!(refused(nothing), fault("the server does not tell the export's size"));
    let short = |p: &mut Peer| {
        p.until_go(ACK)?;
        p.reply(GO, INFO, &[0, 0, 1])
    };
    assert_eq!(refused(short), fault("information on the export has the wrong length"));
    for (size, sizes, text) in [
        (u64::MAX, [1, 4096, 1 << 20], "the export's size 18446744073709551615 makes no sense with blocks of 1"),
        (SIZE + 1, [512, 4096, 1 << 20], "the export's size 1048577 makes no sense with blocks of 512"),
        (SIZE, [0, 4096, 1 << 20], "block sizes 0 and 4096 make no sense"),
        (SIZE, [3, 4096, 1 << 20], "block sizes 3 and 4096 make no sense"),
        (SIZE, [1 << 17, 1 << 17, 1 << 20], "block sizes 131072 and 131072 make no sense"),
        (SIZE, [4096, 512, 1 << 20], "block sizes 4096 and 512 make no sense"),
        (SIZE, [4096, 4096, 0], "block sizes 4096 and 4096 make no sense"),
    ] {
        let script = move |p: &mut Peer| {
            p.until_go(UNSUP)?;
            p.about(size, FLAGS)?;
            let sizes: Vec<u8> = sizes.iter().flat_map(|size: &u32| size.to_be_bytes()).collect();
            p.reply(GO, INFO, &[&[0, 3][..], &sizes].concat())?;
            p.reply(GO, ACK, &[])
        };
        assert_eq!(refused(script), fault(text));
    }
    let flags = |p: &mut Peer| {
        p.until_go(ACK)?;
        p.about(SIZE, 0)?;
        p.reply(GO, ACK, &[])
    };
    assert_eq!(refused(flags), fault("the export's flags make no sense"));
}

#[test]
fn a_server_that_does_not_want_is_quoted() {
    for (kind, text) in [
        (0x8000_0002, "Denied by server: no \u{fffd}way"),
        (0x8000_0005, "Server requires TLS, which blkmark does not speak to targets"),
        (0x8000_0006, "Requested export not available"),
        (0x8000_0007, "Server is shutting down: no \u{fffd}way"),
        (0x8000_0063, "Server refused the export with error 0x80000063: no \u{fffd}way"),
    ] {
        let script = move |p: &mut Peer| {
            p.until_go(ACK)?;
            p.reply(GO, kind, b"no\n \xffway")
        };
        assert_eq!(refused(script), text);
    }
    let unsafe_flags = |p: &mut Peer| {
        p.until_go(ACK)?;
        p.about(SIZE, 1)?;
        p.reply(GO, ACK, &[])
    };
    assert_eq!(
        refused(unsafe_flags),
        "Export 'x' supports neither flush nor FUA: a backup in it could not be made durable"
    );
}

#[test]
fn a_server_of_the_first_newstyle_is_served() {
    for newstyle in [0_u16, 3] {
        let scene = Scene::new(move |p| {
            p.say(&[b"NBDMAGIC", &OPTION_MAGIC.to_be_bytes(), &newstyle.to_be_bytes()])?;
            assert_eq!(p.hear()?, u32::from(newstyle).to_be_bytes());
            if newstyle & 1 != 0 {
                for option in [STRUCTURED, GO] {
                    assert_eq!(p.option()?.0, option);
                    p.reply(option, UNSUP, &[])?;
                }
            }
            assert_eq!(p.option()?, (1, b"x".to_vec()));
            let padding: &[u8] = if newstyle & 2 == 0 { &[0; 124] } else { &[] };
            // It can FUA, and neither flush nor zero.
            p.say(&[&SIZE.to_be_bytes(), &9_u16.to_be_bytes(), padding])?;
            let (flags, kind, cookie, offset, len) = p.request()?;
            assert_eq!((flags, kind, offset, len), (1, 1, 512, 1024));
            p.simple(cookie, 0)?;
            assert_eq!(p.request()?.1, 2);
            Ok(())
        });
        let target = scene.open().unwrap();
        target.write_zeroes_at(512, 1024).unwrap();
        assert_eq!(target.write_at(&[1; 10], 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(target.write_at(&[1; 512], SIZE).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        target.conclude().unwrap();
        drop(target);
        scene.over();
    }
}

/// What a write meets with a server that goes on like this once the request is there.
fn write_error(script: impl FnOnce(&mut Peer, u64) -> io::Result<()> + Send + 'static) -> io::Error {
    let scene = Scene::new(move |p| {
        p.serve()?;
        let cookie = p.request()?.2;
        script(p, cookie)?;
        p.stall()
    });
    let target = scene.open().unwrap();
    let error = target.write_at(&[1; 4096], 0).expect_err("the write fails");
    if error.raw_os_error().is_none() {
        // The connection is over, for whatever comes.
        assert!(target.flush().is_err() && target.write_zeroes_at(0, 512).is_err());
    }
    drop(target);
    scene.over();
    error
}

#[test]
fn a_lying_reply_ends_the_connection_and_fails_the_request() {
    type Lie = fn(&mut Peer, u64) -> io::Result<()>;
    let cases: Vec<(Lie, &str)> = vec![
        (|p, cookie| p.simple(cookie + 1, 0), "a reply to no request"),
        (|p, _| p.say(&[b"NBDNBDNBDNBDNBDN"]), "a reply with the wrong magic"),
        (|p, cookie| p.chunk(1, 1, cookie, 12, &[0; 12]), "a reply that fits no request"),
        (|p, cookie| p.chunk(0, 0, cookie, 0, &[]), "a reply that fits no request"),
        (|p, cookie| p.chunk(1, 0, cookie, u32::MAX, &[]), "a reply that fits no request"),
        (|p, cookie| p.chunk(1, 0x8001, cookie, u32::MAX, &[]), "an error with the wrong length"),
        (|p, cookie| p.chunk(1, 0x8001, cookie, 5, &[0; 5]), "an error with the wrong length"),
        (|p, cookie| p.chunk(1, 0x8001, cookie, 7, &[0, 0, 0, 5, 0, 9, 0]), "an error with the wrong length"),
        (|p, _| p.0.shutdown(std::net::Shutdown::Both), "the server closed the connection"),
        (
            |p, cookie| {
                p.say(&[&0x6744_6698_u32.to_be_bytes(), &cookie.to_be_bytes()[..3]])
                    .and_then(|()| p.0.shutdown(std::net::Shutdown::Both))
            },
            "the server closed the connection",
        ),
    ];
    for (script, text) in cases {
        let error = write_error(script);
        assert_eq!((error.kind(), error.raw_os_error()), (io::ErrorKind::ConnectionAborted, None));
        assert!(error.to_string().contains(text), "{error}, not {text}");
    }
}

#[test]
fn an_error_of_the_server_keeps_its_number() {
    assert_eq!(write_error(|p, cookie| p.simple(cookie, 28)).raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(write_error(|p, cookie| p.simple(cookie, 4711)).raw_os_error(), Some(libc::EINVAL));
    let told = |p: &mut Peer, cookie: u64| {
        p.chunk(0, 0x8001, cookie, 9, &[0, 0, 0, 5, 0, 3, b'b', b'a', b'd'])?;
        p.chunk(1, 0, cookie, 0, &[])
    };
    assert_eq!(write_error(told).raw_os_error(), Some(libc::EIO));
    let at = |p: &mut Peer, cookie: u64| p.chunk(1, 0x8002, cookie, 14, &[0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(write_error(at).raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn a_request_ends_at_the_time_limit_or_when_it_is_interrupted() {
    for reads in [true, false] {
        let scene = Scene::new(move |p| {
            p.serve()?;
            if reads {
                p.stall()
            } else {
                p.hear::<1>().map(drop)?;
                std::thread::park_timeout(GIVE_UP / 2);
                Ok(())
            }
        });
        let target = Arc::new(scene.open_within(Duration::from_millis(300)).unwrap());
        let error = target.write_at(&vec![1; SIZE as usize], 0).unwrap_err();
        let text = if reads { "the server does not answer" } else { "the server" };
        assert!(error.to_string().contains(text), "{error}");
        drop(target);
        scene.script.as_ref().unwrap().thread().unpark();
        scene.over();
    }
    let (heard, hears) = std::sync::mpsc::channel();
    let scene = Scene::new(move |p| {
        p.serve()?;
        for _ in 0..3 {
            p.request()?;
        }
        heard.send(()).unwrap();
        p.stall()
    });
    let target = scene.open().unwrap();
    std::thread::scope(|scope| {
        let stuck: Vec<_> = (0..3).map(|_| scope.spawn(|| target.write_at(&[1; 512], 0))).collect();
        hears.recv_timeout(GIVE_UP).unwrap();
        target.interrupt();
        for write in stuck {
            assert!(write.join().unwrap().unwrap_err().to_string().contains("it was shut down"));
        }
    });
    drop(target);
    scene.over();
}

#[test]
fn a_handshake_that_stalls_ends_at_its_time_limit() {
    let scene = Scene::new(|p| {
        p.greet()?;
        // Byte by byte it never ends, but the limit is for all of it.
        while p.say(&[&[0x00]]).is_ok() {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        Ok(())
    });
    let settings = ClientSettings { handshake: Duration::from_millis(55), ..ClientSettings::default() };
    let error = NbdTarget::open(&scene.address, "x", settings, &Policy::default()).unwrap_err();
    assert_eq!(error.to_string(), "Failed to read data: the server does not answer");
    scene.over();
}

#[test]
fn requests_are_answered_in_any_order_and_zeroes_are_sent_if_they_cannot_be_made() {
    let scene = Scene::new(|p| {
        p.serve()?;
        let mut cookies = Vec::new();
        for _ in 0..4 {
            cookies.push(p.request()?.2);
        }
        for (n, cookie) in cookies.into_iter().enumerate().rev() {
            if n % 2 == 0 { p.simple(cookie, 0)? } else { p.chunk(1, 0, cookie, 0, &[])? }
        }
        let (_, kind, cookie, _, len) = p.request()?;
        assert_eq!((kind, len), (6, 8192));
        p.simple(cookie, libc::EOPNOTSUPP as u32)?;
        let (_, kind, cookie, _, len) = p.request()?;
        assert_eq!((kind, len), (1, 8192));
        p.simple(cookie, 0)?;
        let (_, kind, cookie, offset, len) = p.request()?;
        assert_eq!((kind, offset, len), (3, 0, 0));
        p.simple(cookie, 5)?;
        assert_eq!(p.request()?.1, 2);
        Ok(())
    });
    let target = scene.open().unwrap();
    std::thread::scope(|scope| {
        for n in 0..4 {
            let target = &target;
            scope.spawn(move || target.write_at(&[1; 512], n * 512).unwrap());
        }
    });
    target.write_zeroes_at(0, 8192).unwrap();
    // A failed flush is final, and is not tried again.
    assert_eq!(target.conclude().unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(target.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(target);
    scene.over();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_words_are_survived(when in 0..3, words in proptest::collection::vec(any::<u8>(), 0..200)) {
        let scene = Scene::new(move |p| {
            match when {
                0 => {}
                1 => p.until_go(ACK)?,
                _ => {
                    p.serve()?;
                    p.request()?;
                }
            }
            p.say(&[&words])
        });
        match scene.open() {
            Ok(target) => prop_assert!(target.write_at(&[1; 512], 0).is_err()),
            Err(error) => prop_assert!(!error.is_empty()),
        }
        scene.over();
    }
}

/// The client would wait for a reply longer than this test waits for anything.
#[test]
fn a_job_that_is_cancelled_ends_although_its_server_hangs() {
    assert!(ClientSettings::default().request > GIVE_UP);
    for end in ["cancel", "block-cancel", "group", "shutdown"] {
        let (tell, told) = std::sync::mpsc::channel();
        let scene = Scene::new(move |p| {
            p.serve()?;
            p.request()?;
            tell.send(()).unwrap();
            p.stall()
        });
        let Address::Unix(path) = &scene.address else { unreachable!() };
        let lab = Lab::sized(&[SIZE, SIZE]);
        lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
        lab.disks[0].dirty([1, 2], 5);
        let node =
            json!({ "driver": "nbd", "node-name": "t", "export": "x", "server": { "type": "unix", "path": path } });
        lab.ok("blockdev-add", node);
        lab.raw_target("u", SIZE);
        let job = |id: &str, device: &str, target: &str| json!({ "job-id": id, "device": device, "target": target, "sync": "full", "auto-finalize": false });
        let mut hangs = job("j", "d0", "t");
        hangs["sync"] = "incremental".into();
        hangs["bitmap"] = "b".into();
        let action = |data: Value| json!({ "type": "blockdev-backup", "data": data });
        let actions = json!([action(hangs), action(job("k", "d1", "u"))]);
        lab.ok("transaction", json!({ "actions": actions, "properties": { "completion-mode": "grouped" } }));
        told.recv_timeout(GIVE_UP).unwrap();
        match end {
            "cancel" => drop(lab.ok("job-cancel", json!({ "id": "j" }))),
            "block-cancel" => drop(lab.ok("block-job-cancel", json!({ "device": "j" }))),
            // Its sibling ends, and takes it along.
            "group" => drop(lab.ok("job-cancel", json!({ "id": "k" }))),
            _ => lab.control.shutdown(),
        }
        lab.state("j", "null");
        assert_eq!(lab.jobs(), json!([]));
        assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2]);
        lab.ok("blockdev-del", json!({ "node-name": "t" }));
        scene.over();
    }
}
