//! The promise: an NBD client that lies about lengths, stalls, vanishes or sends garbage ends its own connection and nothing else.
//!
//! The clients here are scripts; after each of them a client of another's is served as if nothing had been.

mod nbd_common;

use blkmark_backup::nbd::ServerSettings;
use nbd_common::*;
use proptest::prelude::*;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_CONTEXTS: u32 = 9;
const SET_CONTEXTS: u32 = 10;
const EXTENDED: u32 = 11;
const ACK: u32 = 1;
const INVALID: u32 = 0x8000_0003;
const EINVAL: u32 = 22;

/// A connection, from the client's side.
struct Client(UnixStream);

impl Client {
    fn connect(lab: &Lab) -> Self {
        let stream = UnixStream::connect(lab.socket()).unwrap();
        stream.set_read_timeout(Some(GIVE_UP)).unwrap();
        stream.set_write_timeout(Some(GIVE_UP)).unwrap();
        Self(stream)
    }

    fn say(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.0.write_all(&parts.concat())
    }

    fn hear(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).expect("the server says this much");
        bytes
    }

    fn word(&mut self) -> u32 {
        u32::from_be_bytes(self.hear(4).try_into().unwrap())
    }

    /// Up to the first option.
    fn greet(lab: &Lab, flags: u32) -> Self {
        let mut client = Self::connect(lab);
        assert_eq!(client.hear(18)[..8], *b"NBDMAGIC");
        client.say(&[&flags.to_be_bytes()]).unwrap();
        client
    }

    fn ask(&mut self, option: u32, data: &[u8]) {
        let length = (data.len() as u32).to_be_bytes();
        self.say(&[&OPTION_MAGIC.to_be_bytes(), &option.to_be_bytes(), &length, data]).unwrap();
    }

    /// All replies to an option: what kind the last one is, and how many there were.
    fn replies(&mut self, option: u32) -> (u32, usize) {
        for n in 1.. {
            assert_eq!(self.hear(8), 0x0003_e889_0455_65a9_u64.to_be_bytes());
            assert_eq!(self.word(), option);
            let (kind, length) = (self.word(), self.word());
            self.hear(length as usize);
            if kind == ACK || kind >= 1 << 31 {
                return (kind, n);
            }
        }
        unreachable!()
    }

    fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        self.ask(option, data);
        self.replies(option).0
    }

    /// With `export` in use, under the headers that `headers` asks for.
    fn enter(lab: &Lab, headers: Option<u32>, export: &str) -> Self {
        let mut client = Self::greet(lab, 3);
        if let Some(headers) = headers {
            assert_eq!(client.option(headers, &[]), ACK);
        }
        assert_eq!(client.option(GO, &named(export, &[0, 0])), ACK);
        client
    }

    fn request(&mut self, flags: u16, kind: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<()> {
        let (magic, cookie) = (0x2560_9513_u32.to_be_bytes(), 7_u64.to_be_bytes());
        let head = [&magic[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie].concat();
        self.say(&[&head, &offset.to_be_bytes(), &len.to_be_bytes(), payload])
    }

    /// The error of a simple reply.
    fn error(&mut self) -> u32 {
        assert_eq!(self.word(), 0x6744_6698);
        let error = self.word();
        assert_eq!(self.hear(8), 7_u64.to_be_bytes());
        error
    }

    /// The server hangs up, whatever it says before.
    fn ends(mut self) {
        match self.0.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }
}

fn named(export: &str, rest: &[u8]) -> Vec<u8> {
    [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), rest].concat()
}

/// Others are served as ever.
#[track_caller]
fn unharmed(lab: &Lab) {
    let mut client = Client::enter(lab, None, "disk");
    client.request(0, 0, 1 << 20, 512, &[]).unwrap();
    assert_eq!(client.error(), 0);
    assert_eq!(client.hear(512), lab.bytes()[1 << 20..][..512]);
}

#[test]
fn garbage_in_the_handshake_ends_that_handshake() {
    let lab = Lab::new();
    let magic = OPTION_MAGIC.to_be_bytes();
    let option = |number: u32, length: u32| [&magic[..], &number.to_be_bytes(), &length.to_be_bytes()].concat();
    let words: &[Vec<u8>] = &[
        vec![0xff; 16],
        option(GO, u32::MAX),
        option(1, 5000).into_iter().chain(vec![b'x'; 70_000]).collect(),
        option(1, 4).into_iter().chain(*b"nope").collect(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
    ];
    for word in words {
        let mut client = Client::greet(&lab, 3);
        // The server may hang up in the middle of it.
        let _ = client.say(&[word]);
        client.ends();
        unharmed(&lab);
    }
    // Flags that nobody knows.
    Client::greet(&lab, 4).ends();
    unharmed(&lab);
}

#[test]
fn an_option_that_makes_no_sense_is_refused_and_the_next_one_heard() {
    let lab = Lab::new();
    let mut client = Client::greet(&lab, 3);
    let long = vec![0; 100_000];
    let lies: &[(u32, &[u8], u32)] = &[
        (99, b"x", 0x8000_0001),
        (LIST, b"x", INVALID),
        (STRUCTURED, b"x", INVALID),
        (5, b"", 0x8000_0002),
        (SET_CONTEXTS, &named("disk", &[0, 0, 0, 0]), INVALID),
        (GO, &long, 0x8000_0009),
        (GO, b"", INVALID),
        (GO, &[0xff; 4], INVALID),
        (INFO, &[0, 0, 0, 4, b'd', b'i', b's', b'k'], INVALID),
        (INFO, &named("disk", &[0, 2, 0, 3]), INVALID),
        (INFO, &named("disk", &[0, 0, 0]), INVALID),
        (INFO, &[0, 0, 0, 1, 0xff, 0, 0], INVALID),
        (INFO, &named(&"x".repeat(5000), &[0, 0]), INVALID),
        (INFO, &named("nope", &[0, 0]), 0x8000_0006),
        (STRUCTURED, b"", ACK),
        (SET_CONTEXTS, &named("disk", &[0xff; 4]), INVALID),
        (SET_CONTEXTS, &named("disk", &[0, 0, 0, 1, 0, 0, 0, 9, b'x']), INVALID),
        (SET_CONTEXTS, &named("nope", &[0, 0, 0, 0]), 0x8000_0006),
        (EXTENDED, b"", ACK),
        (STRUCTURED, b"", 0x8000_000a),
        (INFO, &named("disk", &[0, 0]), ACK),
    ];
    for (n, (option, data, reply)) in lies.iter().enumerate() {
        assert_eq!(client.option(*option, data), *reply, "case {n}");
    }
    // Contexts by all, by a part, by name; twice the same is once.
    for (queries, count) in [
        (&[][..], 3),
        (&["base:"], 2),
        (&["qemu:"], 2),
        (&["qemu:dirty-bitmap:"], 2),
        (&["x:"], 1),
        (&["base:allocation", "base:allocation"], 2),
        (&["base"], 1),
    ] {
        let list: Vec<u8> = queries.iter().flat_map(|query| named(query, &[])).collect();
        client.ask(LIST_CONTEXTS, &named("disk", &[&(queries.len() as u32).to_be_bytes()[..], &list].concat()));
        assert_eq!(client.replies(LIST_CONTEXTS), (ACK, count), "{queries:?}");
    }
    // Extended headers do not go with the option that cannot fail.
    client.ask(1, b"disk");
    client.ends();
    unharmed(&lab);
}

#[test]
fn clients_of_the_first_newstyle_are_served() {
    let lab = Lab::new();
    for flags in [0, 1, 3] {
        let mut client = Client::greet(&lab, flags);
        client.ask(1, b"disk");
        assert_eq!(client.hear(8), SIZE.to_be_bytes());
        client.hear(2);
        if flags & 2 == 0 {
            assert_eq!(client.hear(124), [0; 124]);
        }
        client.request(0, 0, 0, 512, &[]).unwrap();
        assert_eq!(client.error(), 0);
    }
}

#[test]
fn a_handshake_that_stalls_or_drips_is_ended() {
    let settings = ServerSettings { handshake: Duration::from_millis(300), ..ServerSettings::default() };
    let lab = Lab::with(settings);
    Client::connect(&lab).ends();
    Client::greet(&lab, 3).ends();
    let mut client = Client::greet(&lab, 3);
    // A byte now and then is not enough: the limit is for all of it.
    while client.say(&[&[0x49]]).is_ok() {
        std::thread::park_timeout(Duration::from_millis(50));
    }
    client.ends();
    unharmed(&lab);
}

#[test]
fn a_lying_request_is_refused_or_ends_its_connection() {
    let lab = Lab::new();
    let past = SIZE - 256;
    let mut client = Client::enter(&lab, None, "memory");
    type Lie = (u16, u16, u64, u32, &'static [u8], u32);
    let lies: &[Lie] = &[
        (0, 0, past, 512, &[], EINVAL),
        (0, 0, u64::MAX, 512, &[], EINVAL),
        (0, 0, 0, 33 << 20, &[], 75),
        (0, 1, past, 512, &[1; 512], 28),
        (0, 1, u64::MAX - 100, 512, &[1; 512], 28),
        (0, 6, 0, u32::MAX, &[], 28),
        (0, 4, past, 512, &[], EINVAL),
        (0, 7, 0, 512, &[], EINVAL),
        (0, 9, 0, 512, &[], EINVAL),
        (0, 0xffff, 0, 0, &[], EINVAL),
        (0x8000, 0, 0, 512, &[], EINVAL),
        (0x8000, 1, 0, 512, &[1; 512], EINVAL),
        (16, 6, 0, 512, &[], EINVAL),
        (0, 1, 0, 0, &[], 0),
        (1, 3, 0, 0, &[], 0),
        (0, 5, 0, 512, &[], 0),
    ];
    for (n, (flags, kind, offset, len, payload, error)) in lies.iter().enumerate() {
        client.request(*flags, *kind, *offset, *len, payload).unwrap();
        assert_eq!(client.error(), *error, "case {n}");
    }
    // A payload of four gigabytes.
    client.request(0, 1, 0, u32::MAX, &[]).unwrap();
    client.ends();
    let mut client = Client::enter(&lab, Some(STRUCTURED), "memory");
    client.say(&[&[0xee; 28]]).unwrap();
    client.ends();
    // Gone in the middle of a header, and of a payload.
    Client::enter(&lab, None, "memory").say(&[&[0x25, 0x60]]).unwrap();
    Client::enter(&lab, None, "memory").request(0, 1, 0, 4096, &[9; 100]).unwrap();
    unharmed(&lab);
    assert!(lab.memory.contents().iter().all(|byte| *byte == 0xaa));
    // Contexts of one export are not those of another.
    let mut client = Client::greet(&lab, 3);
    assert_eq!(client.option(STRUCTURED, &[]), ACK);
    let query = [&[0, 0, 0, 1][..], &named("base:allocation", &[])].concat();
    assert_eq!(client.option(SET_CONTEXTS, &named("disk", &query)), ACK);
    assert_eq!(client.option(GO, &named("memory", &[0, 0])), ACK);
    client.request(0, 7, 0, 512, &[]).unwrap();
    assert_eq!(client.word(), 0x668e_33ef);
    assert_eq!(client.hear(4), [0, 1, 0x80, 1]);
}

#[test]
fn a_client_that_does_not_read_keeps_only_itself_waiting() {
    let lab = Lab::new();
    let mut greedy: Vec<_> = (0..4).map(|_| Client::enter(&lab, Some(STRUCTURED), "disk")).collect();
    for client in &mut greedy {
        // All of them, or as many as the server takes while nobody listens.
        client.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        for _ in 0..10_000 {
            if client.request(0, 0, 1 << 20, 32 << 20, &[]).is_err() {
                break;
            }
        }
    }
    unharmed(&lab);
    run("nbdcopy", &[&lab.uri("disk"), &lab.path("out.raw")]);
    assert_same(&std::fs::read(lab.path("out.raw")).unwrap(), &lab.bytes());
    // They do not hold up the end either.
    lab.server.stop();
}

#[test]
fn many_requests_of_a_connection_are_all_answered() {
    let lab = Lab::new();
    let mut client = Client::enter(&lab, None, "memory");
    let mut sender = Client(client.0.try_clone().unwrap());
    let mut answered: Vec<u64> = std::thread::scope(|scope| {
        scope.spawn(move || {
            for n in 0..1000_u64 {
                let (magic, offset) = (0x2560_9513_u32.to_be_bytes(), (n * 512).to_be_bytes());
                let len = 512_u32.to_be_bytes();
                sender.say(&[&magic, &[0, 0, 0, 1], &n.to_be_bytes(), &offset, &len, &[3; 512]]).unwrap();
            }
        });
        let answer = |_| {
            assert_eq!((client.word(), client.word()), (0x6744_6698, 0));
            u64::from_be_bytes(client.hear(8).try_into().unwrap())
        };
        (0..1000).map(answer).collect()
    });
    answered.sort_unstable();
    assert_eq!(answered, (0..1000).collect::<Vec<_>>());
    assert!(lab.memory.contents()[..512_000].iter().all(|byte| *byte == 3));
    // What was asked before goodbye is answered, and then the server hangs up.
    client.request(0, 0, 0, 4096, &[]).unwrap();
    client.request(0, 2, 0, 0, &[]).unwrap();
    assert_eq!(client.error(), 0);
    client.hear(4096);
    client.ends();
}

/// One server for all cases: it has to outlive them.
static LAB: LazyLock<Lab> = LazyLock::new(Lab::new);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_words_are_survived(
        when in 0..5,
        words in proptest::collection::vec(any::<u8>(), 0..300),
        option in 0..12_u32,
        length in prop_oneof![0..64_u32, any::<u32>()],
    ) {
        let lab = &*LAB;
        let mut client = match when {
            0 => Client::connect(lab),
            1 | 2 => Client::greet(lab, 3),
            3 => Client::enter(lab, Some(EXTENDED), "memory"),
            _ => Client::enter(lab, Some(STRUCTURED), "disk"),
        };
        let head = match when {
            2 => [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes()].concat(),
            3 => [&0x21e4_1c71_u32.to_be_bytes()[..], &[0, 0, 0, option as u8]].concat(),
            4 => [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, option as u8]].concat(),
            _ => Vec::new(),
        };
        let _ = client.say(&[&head, &words]);
        let _ = client.0.shutdown(std::net::Shutdown::Write);
        client.ends();
        unharmed(lab);
    }
}
