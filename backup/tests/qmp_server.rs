//! Nothing that one client of the control socket does, or fails to do, harms another, an emitter of events, or the
//! end of the daemon.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blkmark_backup::qmp::server::MAX_CLIENTS;
use blkmark_backup::qmp::{Client, ClientError, Commands, Event, Events, QmpError, Server};
use serde_json::{Map, Value, json};

/// Long enough that only a hang reaches it.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Commands for these tests; `block` ends when the test lets it.
struct Toys {
    entered: SyncSender<()>,
    release: Mutex<Receiver<()>>,
}

impl Commands for Toys {
    fn execute(&self, name: &str, arguments: Map<String, Value>) -> Option<Result<Value, QmpError>> {
        match name {
            "echo" => Some(Ok(Value::Object(arguments))),
            "big" => Some(Ok(json!("x".repeat(1 << 20)))),
            "panic" => panic!("this command panics on purpose"),
            "block" => {
                self.entered.send(()).unwrap();
                self.release.lock().unwrap().recv_timeout(GIVE_UP).unwrap();
                Some(Ok(json!("released")))
            }
            _ => None,
        }
    }
}

struct Lab {
    path: PathBuf,
    server: Server,
    events: Events,
    entered: Receiver<()>,
    release: SyncSender<()>,
    _directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let (enter, entered) = sync_channel(16);
        let (release, released) = sync_channel(16);
        let events = Events::new();
        let commands = Arc::new(Toys { entered: enter, release: Mutex::new(released) });
        let server = Server::bind(&path).unwrap().start(commands, events.clone()).unwrap();
        Lab { path, server, events, entered, release, _directory: directory }
    }

    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    /// A connection that has read the greeting and nothing else.
    fn raw(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(GIVE_UP)).unwrap();
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut String::new()).unwrap();
        reader
    }

    fn is_well(&self) {
        assert_eq!(self.client().execute("echo", json!({ "a": 1 })).unwrap(), json!({ "a": 1 }));
    }

    /// As [`Lab::is_well`], once the server has seen that clients left, which it does as soon as its threads run.
    fn is_well_soon(&self) {
        let give_up = Instant::now() + GIVE_UP;
        while Client::connect(&self.path).is_err() {
            assert!(Instant::now() < give_up, "places are not given away again");
            std::thread::yield_now();
        }
        self.is_well();
    }
}

fn send(reader: &BufReader<UnixStream>, bytes: impl AsRef<[u8]>) {
    reader.get_ref().write_all(bytes.as_ref()).unwrap();
}

fn line(reader: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

#[test]
fn several_clients_are_served_at_once() {
    let lab = Lab::new();
    let mut blocked = lab.raw();
    send(&blocked, "{'execute':'qmp_capabilities'}{'execute':'block','id':1}{'execute':'echo','id':2}");
    lab.entered.recv_timeout(GIVE_UP).unwrap();
    lab.is_well();
    lab.release.send(()).unwrap();
    assert_eq!(line(&mut blocked), "{\"return\": {}}\r\n");
    assert_eq!(line(&mut blocked), "{\"return\": \"released\", \"id\": 1}\r\n");
    assert_eq!(line(&mut blocked), "{\"return\": {}, \"id\": 2}\r\n");
}

#[test]
fn events_reach_every_negotiated_client_in_order_and_nobody_before_negotiation() {
    let lab = Lab::new();
    let (mut one, mut two) = (lab.client(), lab.client());
    let mut early = lab.raw();
    for number in 0..100 {
        lab.events.emit("TICK", json!({ "n": number }));
    }
    for client in [&mut one, &mut two] {
        for number in 0..100 {
            let event = client.wait_event(GIVE_UP, |_| true).unwrap().unwrap();
            assert_eq!(event, Event { name: "TICK".into(), data: json!({ "n": number }) });
        }
    }
    send(&early, "{'execute':'qmp_capabilities'}");
    assert_eq!(line(&mut early), "{\"return\": {}}\r\n");
    lab.events.emit("LATER", json!({}));
    let event: Value = serde_json::from_str(&line(&mut early)).unwrap();
    assert_eq!(event["event"], "LATER");
    assert!(event["timestamp"]["seconds"].is_u64() && event["timestamp"]["microseconds"].is_u64());
}

#[test]
fn a_client_that_reads_no_events_is_disconnected_and_holds_nobody_up() {
    let lab = Lab::new();
    let mut idle = lab.raw();
    send(&idle, "{'execute':'qmp_capabilities'}");
    line(&mut idle);
    let mut reader = lab.client();
    for number in 0..20_000 {
        lab.events.emit("TICK", json!({ "n": number, "filler": "x".repeat(100) }));
        let event = reader.wait_event(GIVE_UP, |_| true).unwrap().unwrap();
        assert_eq!(event.data["n"], number);
    }
    // What the socket had taken may still be read; then the connection ends.
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).unwrap();
    assert!(rest.split(|&byte| byte == b'\n').count() < 20_000);
    lab.is_well();
}

#[test]
fn pipelined_requests_are_answered_in_order_however_many() {
    let lab = Lab::new();
    let mut reader = lab.raw();
    let writer = reader.get_ref().try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut all = "{'execute':'qmp_capabilities','id':-1}".to_owned();
            (0..20_000).for_each(|id| all += &format!("{{'execute':'echo','id':{id}}}"));
            (&writer).write_all(all.as_bytes()).unwrap();
        });
        for id in -1..20_000 {
            assert_eq!(line(&mut reader), format!("{{\"return\": {{}}, \"id\": {id}}}\r\n"));
        }
    });
}

#[test]
fn a_client_that_reads_no_replies_stalls_itself_alone() {
    let lab = Lab::new();
    let stalled = lab.raw();
    send(&stalled, "{'execute':'qmp_capabilities'}".to_owned() + &"{'execute':'big'}".repeat(50));
    lab.is_well();
    lab.server.stop();
}

#[test]
fn requests_sent_before_a_half_close_are_answered() {
    let lab = Lab::new();
    let mut reader = lab.raw();
    send(&reader, "{'execute':'qmp_capabilities'}{'execute':'big'}{'execute':'echo','id':'last'}");
    reader.get_ref().shutdown(Shutdown::Write).unwrap();
    let mut all = String::new();
    reader.read_to_string(&mut all).unwrap();
    assert!(all.ends_with("{\"return\": {}, \"id\": \"last\"}\r\n"));
}

#[test]
fn a_client_that_dies_in_the_middle_of_a_command_harms_nobody() {
    let lab = Lab::new();
    let dying = lab.raw();
    send(&dying, "{'execute':'qmp_capabilities'}{'execute':'block'}{'execute':'echo'}{'exec");
    lab.entered.recv_timeout(GIVE_UP).unwrap();
    drop(dying);
    lab.release.send(()).unwrap();
    lab.events.emit("TICK", Value::Null);
    lab.is_well();
}

#[test]
fn a_command_that_panics_fails_alone() {
    let lab = Lab::new();
    let mut client = lab.client();
    match client.execute("panic", Value::Null) {
        Err(ClientError::Refused(error)) => assert!(error.desc.contains("defect"), "{error}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.execute("echo", Value::Null).unwrap(), json!({}));
}

#[test]
fn megabytes_of_garbage_end_in_errors_and_the_client_can_go_on() {
    let lab = Lab::new();
    let mut reader = lab.raw();
    let writer = reader.get_ref().try_clone().unwrap();
    // A fixed sequence that looks random: every byte value, brackets and quotes included.
    let mut state = 1u32;
    let mut garbage: Vec<u8> = Vec::from("{'execute':'qmp_capabilities'}");
    garbage.extend((0..3 << 20).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    }));
    garbage.extend("\"".bytes().chain(std::iter::repeat_n(b'a', 3 << 20)));
    garbage.extend(b"\xff{'execute':'echo','id':'survived'}");
    std::thread::scope(|scope| {
        scope.spawn(move || (&writer).write_all(&garbage).unwrap());
        loop {
            let reply = line(&mut reader);
            if reply == "{\"return\": {}, \"id\": \"survived\"}\r\n" {
                break;
            }
            let reply: Value = serde_json::from_str(&reply).unwrap();
            assert!(reply.get("return") == Some(&json!({})) || reply["error"]["class"] == "GenericError", "{reply}");
        }
    });
    lab.is_well();
}

#[test]
fn a_thousand_connects_leave_nothing_behind() {
    let lab = Lab::new();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for number in 0..1000 {
        let mut reader = lab.raw();
        if number % 2 == 0 {
            send(&reader, "{'execute':'qmp_capabilities'");
        } else {
            reader.get_ref().shutdown(Shutdown::Both).unwrap();
            let _ = reader.read_to_end(&mut Vec::new());
        }
    }
    lab.is_well_soon();
    lab.server.stop();
    // Other tests of this binary run beside this one, so only an excess of the order of the connects counts.
    assert!(threads() < 700, "{} threads", threads());
    assert!(descriptors() < 700, "{} descriptors", descriptors());
}

#[test]
fn one_client_too_many_is_told_so_and_a_place_that_gets_free_is_given_away() {
    let lab = Lab::new();
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| lab.client()).collect();
    match Client::connect(&lab.path) {
        Err(ClientError::Refused(error)) => assert!(error.desc.contains("Too many clients"), "{error}"),
        other => panic!("{:?}", other.map(|_| ())),
    }
    for client in &mut clients {
        client.execute("echo", Value::Null).unwrap();
    }
    drop(clients);
    lab.is_well_soon();
}

#[test]
fn stopping_ends_running_commands_first_and_sends_their_replies() {
    let lab = Lab::new();
    let mut reader = lab.raw();
    send(&reader, "{'execute':'qmp_capabilities'}{'execute':'block','id':1}{'execute':'echo','id':'not any more'}");
    lab.entered.recv_timeout(GIVE_UP).unwrap();
    let mut idle = lab.raw();
    std::thread::scope(|scope| {
        scope.spawn(|| lab.server.stop());
        // The idle client is hung up on as soon as the server stops; only then is the command let go.
        idle.read_to_end(&mut Vec::new()).unwrap();
        lab.release.send(()).unwrap();
    });
    let mut all = String::new();
    reader.read_to_string(&mut all).unwrap();
    assert_eq!(all, "{\"return\": {}}\r\n{\"return\": \"released\", \"id\": 1}\r\n");
    assert!(!lab.path.exists());
    assert!(matches!(Client::connect(&lab.path), Err(ClientError::Connect { .. })));
}

#[test]
fn a_stopped_socket_can_be_bound_again() {
    let lab = Lab::new();
    assert!(Server::bind(&lab.path).is_err());
    lab.server.stop();
    let again = Server::bind(&lab.path).unwrap();
    drop(again);
    assert!(!lab.path.exists());
}
