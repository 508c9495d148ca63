//! The control socket answers as QEMU 10's does: the same bytes go to `qemu-storage-daemon` and to a server of ours
//! whose few commands read their arguments as QEMU's schema says, and the same bytes have to come back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use blkmark_backup::qmp::arguments::StringOrObject;
use blkmark_backup::qmp::{Arguments, Client, Commands, Events, QmpError, Server};
use serde_json::{Map, Value, json};

/// Commands that do nothing but read their arguments, in the order of QEMU's schema.
struct ReadOnly;

impl Commands for ReadOnly {
    fn execute(&self, name: &str, arguments: Map<String, Value>) -> Option<Result<Value, QmpError>> {
        let mut arguments = Arguments::new(arguments);
        let read: fn(&mut Arguments) -> Result<(), QmpError> = match name {
            "query-jobs" => |_| Ok(()),
            "block-dirty-bitmap-add" => bitmap_add,
            "block-dirty-bitmap-merge" => bitmap_merge,
            "blockdev-backup" => backup,
            "blockdev-add" => blockdev_add,
            "block_resize" => |arguments| {
                arguments.opt_string("device")?;
                arguments.opt_string("node-name")?;
                arguments.i64("size").map(drop)
            },
            "nbd-server-start" => nbd_server_start,
            "transaction" => transaction,
            _ => return None,
        };
        Some(read(&mut arguments).and_then(|()| arguments.finish()).map(|()| json!({})))
    }
}

fn bitmap_add(arguments: &mut Arguments) -> Result<(), QmpError> {
    arguments.string("node")?;
    arguments.string("name")?;
    arguments.opt_u32("granularity")?;
    arguments.opt_bool("persistent")?;
    arguments.opt_bool("disabled")?;
    Ok(())
}

fn bitmap_merge(arguments: &mut Arguments) -> Result<(), QmpError> {
    arguments.string("node")?;
    arguments.string("target")?;
    for source in arguments.list("bitmaps")? {
        if let StringOrObject::Object(mut source) = source.string_or_object("BlockDirtyBitmapOrStr")? {
            source.string("node")?;
            source.string("name")?;
            source.finish()?;
        }
    }
    Ok(())
}

fn backup(arguments: &mut Arguments) -> Result<(), QmpError> {
    arguments.opt_string("job-id")?;
    arguments.string("device")?;
    let words = ["top", "full", "none", "incremental", "bitmap"].map(|word| (word, ()));
    arguments.choice("sync", &words)?;
    arguments.opt_i64("speed")?;
    arguments.opt_string("bitmap")?;
    arguments.opt_choice("bitmap-mode", &[("on-success", ()), ("never", ()), ("always", ())])?;
    arguments.opt_bool("discard-source")?;
    if let Some(mut performance) = arguments.opt_object("x-perf")? {
        performance.opt_bool("use-copy-range")?;
        performance.opt_i64("max-workers")?;
        performance.opt_i64("max-chunk")?;
        performance.finish()?;
    }
    arguments.string("target").map(drop)
}

fn blockdev_add(arguments: &mut Arguments) -> Result<(), QmpError> {
    let driver = arguments.choice("driver", &[("raw", "raw"), ("file", "file"), ("null-co", "null-co")])?;
    arguments.opt_string("node-name")?;
    if let Some(mut cache) = arguments.opt_object("cache")? {
        cache.opt_bool("direct")?;
        cache.opt_bool("no-flush")?;
        cache.finish()?;
    }
    arguments.opt_bool("read-only")?;
    match driver {
        "raw" => {
            if let StringOrObject::Object(mut file) = arguments.string_or_object("file", "BlockdevRef")? {
                blockdev_add(&mut file)?;
                file.finish()?;
            }
            Ok(())
        }
        "file" => arguments.string("filename").map(drop),
        _ => Ok(()),
    }
}

fn nbd_server_start(arguments: &mut Arguments) -> Result<(), QmpError> {
    let mut address = arguments.object("addr")?;
    let kind = address.choice("type", &[("unix", "unix"), ("inet", "inet")])?;
    let mut data = address.object("data")?;
    if kind == "unix" {
        data.string("path")?;
    } else {
        data.string("host")?;
        data.string("port")?;
        data.opt_bool("numeric")?;
        data.opt_u16("to")?;
    }
    data.finish()?;
    address.finish()
}

fn transaction(arguments: &mut Arguments) -> Result<(), QmpError> {
    for action in arguments.list("actions")? {
        let mut action = action.object()?;
        let words = ["abort", "block-dirty-bitmap-add", "blockdev-backup"].map(|word| (word, word));
        let kind = action.choice("type", &words)?;
        let mut data = action.object("data")?;
        match kind {
            "block-dirty-bitmap-add" => bitmap_add(&mut data)?,
            "blockdev-backup" => backup(&mut data)?,
            _ => {}
        }
        data.finish()?;
        action.finish()?;
    }
    if let Some(mut properties) = arguments.opt_object("properties")? {
        properties.opt_choice("completion-mode", &[("individual", ()), ("grouped", ())])?;
        properties.finish()?;
    }
    Ok(())
}

/// A `qemu-storage-daemon`, told to quit when dropped.
struct Oracle {
    path: PathBuf,
}

impl Oracle {
    fn start(directory: &Path) -> Oracle {
        let path = directory.join("oracle.sock");
        // It returns once the socket is served.
        let started = Command::new("qemu-storage-daemon")
            .arg("--daemonize")
            .arg("--pidfile")
            .arg(directory.join("oracle.pid"))
            .args(["--blockdev", "driver=null-co,size=1048576,node-name=n0"])
            .args(["--chardev", &format!("socket,path={},server=on,wait=off,id=c", path.display())])
            .args(["--monitor", "chardev=c"])
            .status();
        let status = started.expect("qemu-storage-daemon can be run (Debian: qemu-utils)");
        assert!(status.success(), "qemu-storage-daemon does not start");
        Oracle { path }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let quit = Client::connect(&self.path).and_then(|mut client| client.execute("quit", Value::Null));
        if let Err(error) = quit {
            eprintln!("qemu-storage-daemon did not quit: {error}");
        }
    }
}

/// What comes back for `bytes`, as lines. 0xFF ends whatever `bytes` leave open, at the price of one error reply.
fn ask(path: &Path, negotiate: bool, bytes: &[u8]) -> Vec<String> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).split(b'\n');
    let mut line = || String::from_utf8(lines.next().expect("a reply").unwrap()).unwrap() + "\n";
    assert!(line().starts_with("{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}"));
    if negotiate {
        stream.write_all(b"{\"execute\": \"qmp_capabilities\"}").unwrap();
        assert_eq!(line(), "{\"return\": {}}\r\n");
    }
    let mut sent = bytes.to_vec();
    sent.extend(b"\xff\n{\"execute\": \"the-end\", \"id\": \"the end\"}\n");
    stream.write_all(&sent).unwrap();
    let mut replies = Vec::new();
    loop {
        replies.push(line());
        if replies.last().is_some_and(|reply| reply.starts_with("{\"id\": \"the end\"")) {
            return replies;
        }
    }
}

fn same_answers<'a>(negotiate: bool, script: impl IntoIterator<Item = &'a [u8]>) {
    let directory = tempfile::tempdir().unwrap();
    let oracle = Oracle::start(directory.path());
    let path = directory.path().join("ours.sock");
    let _server = Server::bind(&path).unwrap().start(Arc::new(ReadOnly), Events::new()).unwrap();
    let mut wrong = Vec::new();
    for bytes in script {
        let (theirs, ours) = (ask(&oracle.path, negotiate, bytes), ask(&path, negotiate, bytes));
        if ours != theirs {
            let sent = String::from_utf8_lossy(bytes);
            wrong.push(format!("sent   {sent}\nQEMU   {theirs:#?}\nblkmark {ours:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn before_negotiation_answers_are_those_of_qemu() {
    let script: &[&[u8]] = &[
        br#"{"execute":"query-version"}"#,
        br#"{"execute":"nope","id":1}"#,
        br#"{"execute":"qmp_capabilities","id":1}{"execute":"qmp_capabilities","id":2}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}{"execute":"nope"}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}{"execute":"nope"}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"enable":["x"],"y":1}}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"enable":[1]}}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"enable":1}}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"y":1}}"#,
        br#"{"exec-oob":"qmp_capabilities"}"#,
        br#"{"execute":"query-version","arguments":[]}"#,
        br#"{"foo":1}"#,
        b"[]",
        b"garbage\n",
    ];
    same_answers(false, script.iter().copied());
}

#[test]
fn malformed_json_is_answered_as_qemu_does_and_the_stream_goes_on() {
    let script: &[&[u8]] = &[
        b"1 ",
        b"true 1 null \"a\" [] {}",
        b"garbage {\"execute\":\"nope\",\"id\":1}",
        b"{garbage}{\"execute\":\"nope\",\"id\":1}",
        b"abc def ghi\n",
        br#"{"a":}"#,
        br#"{"a" 1}"#,
        br#"{"a"}"#,
        br#"{"a":1,}"#,
        br#"{"a":1,"a":}"#,
        br#"{"a":1,"a":2}"#,
        br#"{"a":{"b":1,"b":2}]"#,
        br#"{"a":1]"#,
        br#"{"a":1 "b":2}"#,
        br#"{"a":1}]{"b":[}"#,
        br#"{"execute"::1}"#,
        br#"{"execute":"nope",}"#,
        br#"{"execute":"nope"}}"#,
        br#"{"execute":"nope"}]{"execute":"nope"}"#,
        b"{,}",
        b"{1:2}",
        b"}",
        b"[1,]",
        b"[1 2]",
        b"[[[",
        br#"["a""b"]"#,
        b"[nul]",
        b"[nullx]",
        b"[null1]",
        b"[1a]",
        b"[1.5x]",
        b"[1e]",
        b"[1e+]",
        b"[1.]",
        b"[-a]",
        b"[00]",
        b"[0x10]",
        b"[.5]",
        b"[+5]",
        b"[1-2]",
        b"[TRUE]",
        b"[%s]",
        b"[%p,1]{\"execute\":\"nope\"}",
        b"1.}x \"q\"\n\"r\"",
        b"\"abc\";\"d\" {",
        b"\"ab\nxyz \"q\"\n1 ",
        b"tr\nue\n",
        b"tr\xffue\n",
        b"12\xff{\"execute\":\"nope\"}",
        b"\xff\xff{}",
        b"\xfe\xfd\n[]",
        b"\xef\xbb\xbf{\"execute\":\"nope\"}",
        b"\xc3\xa9\n",
        b"@@@ \"x\" {\"execute\":\"nope\"}",
        b"@ {}",
        b"@\t{}",
        b"@\x7f1\n1\n",
        b"@\x00\"b\"\n",
        b"@\x08\"b\"",
        b"@:\"b\"",
        b"@[\"b\"]",
        b"@,\"b\"",
        b"\x0b{}\x0c{}",
        b"{\"execute\":\"nope\",\"id\":1}\x00{\"execute\":\"nope\",\"id\":2}",
        b"{\"execute\":\"nope\",\"id\":1};{\"execute\":\"nope\",\"id\":2}",
        b"{\"execute\":\"nope\",\"id\":1}//c\n{\"execute\":\"nope\",\"id\":2}",
        b"{\"execute\":\"nope\"\x01,\"id\":[1]}\n{\"execute\":\"nope\",\"id\":2}",
        b"{\"execute\":\"no\xff{\"execute\":\"nope\",\"id\":1}",
        b"'abc\n\n{\"execute\":\"nope\",\"id\":1}",
        b"{\"execute\":\"nope\",\"id\":\"a\nb\"}",
        b"{\"execute\":\"nope\",\"id\":\"a\tb\"}",
        b"{\"execute\":\"nope\",\"id\":\"\xc3(\"}",
        b"{\"execute\":\"nope\",\"id\":\"\xed\xa0\x80\"}",
        br#"{"execute":"nope","id":01}"#,
        br#"{"execute":"nope","id":-}"#,
        br#"{"execute":"nope","id":"\x"}"#,
        br#"{"execute":"nope","id":"\u12g4"}"#,
        br#"{"execute":"nope","id":"\ud83d"}"#,
        br#"{"execute":"nope","id":"\ud83d\ud83d"}"#,
        br#"{"execute":"nope","id":"\ude00"}"#,
    ];
    same_answers(true, script.iter().copied());
}

#[test]
fn requests_and_their_ids_are_answered_as_qemu_does() {
    let script: &[&[u8]] = &[
        br#"{"execute":"nope","id":{"a":[1,2.5,null,true,"x"],"b":{}}}"#,
        br#"{"execute":"nope","id":null}{"execute":"nope","id":[]}{"execute":"nope","id":""}"#,
        br#"{"execute":"nope","id":18446744073709551615}{"execute":"nope","id":-9223372036854775808}"#,
        br#"{"execute":"nope","id":-0}"#,
        br#"{"execute":"nope","id":"\u00e9\ud83d\ude00\u0000\b\f\n\r\t\u0001\/\\\""}"#,
        b"{\"execute\":\"nope\",\"id\":\"\x7f\xc3\xa9\"}",
        br#"{"execute":"n\u00e9\"\n"}{"execute":"","id":1}"#,
        b"{'execute':'nope','id':'it\\'s \"so\"'}",
        b"\"it's\" 'say \"x\"' 'a\\\"b' ",
        br#"{"execute":1}"#,
        br#"{"execute":null,"id":1}"#,
        br#"{"execute":3,"arguments":3}"#,
        br#"{"execute":3,"x":3}"#,
        br#"{"x":1,"id":3}"#,
        br#"{"":1}"#,
        br#"{"id":4,"arguments":{}}"#,
        br#"{"id":7,"arguments":3}"#,
        br#"{"execute":"query-jobs","x":1}"#,
        br#"{"execute":"query-jobs","foo\nbar":1}"#,
        br#"{"execute":"query-jobs","arguments":[],"id":2}"#,
        br#"{"execute":"query-jobs","arguments":null}"#,
        br#"{"execute":"nope","arguments":3}"#,
        br#"{"execute":"query-jobs","exec-oob":"x"}"#,
        br#"{"exec-oob":"query-jobs"}"#,
        br#"{"execute":"qmp_capabilities","id":9}"#,
        br#"{"execute":"transaction","id":1,"arguments":{"actions":[]}}"#,
    ];
    same_answers(true, script.iter().copied());
}

#[test]
fn wrong_arguments_are_named_as_qemu_names_them() {
    let add = |arguments: Value| ("block-dirty-bitmap-add", arguments);
    let merge = |list: Value| ("block-dirty-bitmap-merge", json!({ "node": "n0", "target": "b", "bitmaps": list }));
    let backup = |name: &str, value: Value| {
        let mut arguments = json!({ "device": "n0", "target": "n1", "sync": "full" });
        arguments[name] = value;
        ("blockdev-backup", arguments)
    };
    let granularity = |value: Value| add(json!({ "node": "n0", "name": "b", "granularity": value }));
    let transaction = |actions: Value| ("transaction", json!({ "actions": actions }));
    let nbd = |address: Value| ("nbd-server-start", json!({ "addr": address }));
    let raw = |file: Value| ("blockdev-add", json!({ "driver": "raw", "file": file }));
    let huge: Value = serde_json::from_str("18446744073709551616").unwrap();
    let script = [
        ("query-jobs", json!({ "x": 1 })),
        ("query-jobs", json!({ "": 1 })),
        add(json!({})),
        add(json!({ "node": "n0" })),
        add(json!({ "name": "b" })),
        add(json!({ "bogus": 1 })),
        add(json!({ "node": 1, "name": 2 })),
        add(json!({ "node": null, "name": "b" })),
        add(json!({ "node": [], "name": "b" })),
        add(json!({ "node": "n0", "name": "b", "bogus": 1 })),
        add(json!({ "node": "n0", "name": "b", "persistent": 1 })),
        add(json!({ "node": "n0", "name": "b", "disabled": "true" })),
        granularity(json!("x")),
        granularity(json!(1u64 << 32)),
        granularity(json!(-1)),
        granularity(json!(1.5)),
        granularity(json!(65536.0)),
        granularity(json!(true)),
        granularity(json!(null)),
        granularity(huge.clone()),
        merge(json!(1)),
        merge(json!([1])),
        merge(json!(["a", null])),
        merge(json!(["a", { "node": "x" }])),
        merge(json!(["a", { "node": "x", "name": 1 }])),
        merge(json!(["a", { "node": "x", "name": "1", "z": 1 }])),
        ("block-dirty-bitmap-merge", json!({ "node": "n0", "target": "b" })),
        ("blockdev-backup", json!({})),
        ("blockdev-backup", json!({ "device": "n0", "target": "n1" })),
        ("blockdev-backup", json!({ "device": "n0", "sync": "full" })),
        backup("sync", json!("sideways")),
        backup("sync", json!("FULL")),
        backup("sync", json!("")),
        backup("sync", json!(1)),
        backup("job-id", json!(1)),
        backup("speed", json!("x")),
        backup("speed", json!(1u64 << 63)),
        backup("speed", json!(1.0)),
        backup("bitmap-mode", json!("zz")),
        backup("bitmap-mode", json!(null)),
        backup("discard-source", json!(3)),
        backup("x-perf", json!(1)),
        backup("x-perf", json!({ "max-workers": "a" })),
        backup("x-perf", json!({ "max-chunk": huge })),
        backup("x-perf", json!({ "bogus": "a" })),
        ("block_resize", json!({ "size": "x" })),
        ("block_resize", json!({ "node-name": "n0", "size": true })),
        ("transaction", json!({})),
        transaction(json!(1)),
        transaction(json!([1])),
        transaction(json!([{}])),
        transaction(json!([{ "type": 1 }])),
        transaction(json!([{ "type": "nope" }])),
        transaction(json!([{ "type": "abort" }])),
        transaction(json!([{ "type": "abort", "data": 1 }])),
        transaction(json!([{ "type": "abort", "data": { "x": 1 } }])),
        transaction(json!([{ "type": "abort", "data": {}, "x": 1 }])),
        transaction(json!([{ "type": "block-dirty-bitmap-add", "data": {} }])),
        transaction(json!([
            { "type": "abort", "data": {} },
            { "type": "block-dirty-bitmap-add", "data": { "node": "n0", "name": 3 } },
        ])),
        transaction(json!([{ "type": "blockdev-backup", "data": { "device": "n0", "target": "n1", "sync": "q" } }])),
        ("transaction", json!({ "actions": [], "properties": 1 })),
        ("transaction", json!({ "actions": [], "properties": { "completion-mode": "x" } })),
        ("transaction", json!({ "actions": [], "properties": { "x": "x" } })),
        ("transaction", json!({ "actions": [], "z": 1 })),
        ("nbd-server-start", json!({})),
        nbd(json!(1)),
        nbd(json!({})),
        nbd(json!({ "type": "x" })),
        nbd(json!({ "type": "unix" })),
        nbd(json!({ "type": "unix", "data": {} })),
        nbd(json!({ "type": "unix", "data": { "path": "x", "z": 1 } })),
        nbd(json!({ "type": "inet", "data": { "host": "x", "port": 1 } })),
        nbd(json!({ "type": "inet", "data": { "host": "x", "port": "1", "to": 70000 } })),
        nbd(json!({ "type": "inet", "data": { "host": "x", "port": "1", "to": "a" } })),
        raw(json!(1)),
        raw(json!(null)),
        raw(json!([])),
        raw(json!({})),
        raw(json!({ "driver": "zz" })),
        raw(json!({ "driver": "file" })),
        raw(json!({ "driver": "file", "filename": 3 })),
        raw(json!({ "driver": "file", "filename": "/nonexistent", "zz": 1 })),
        raw(json!({ "driver": "raw", "file": { "driver": "file", "filename": [] } })),
        raw(json!({ "driver": "raw", "file": 1 })),
        ("blockdev-add", json!({ "driver": "null-co", "cache": { "direct": 1 } })),
        ("blockdev-add", json!({ "driver": "null-co", "cache": { "dir": true } })),
    ];
    let script: Vec<_> = script
        .iter()
        .map(|(command, arguments)| json!({ "execute": command, "arguments": arguments }).to_string().into_bytes())
        .collect();
    same_answers(true, script.iter().map(Vec::as_slice));
}

#[test]
fn our_client_speaks_with_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let oracle = Oracle::start(directory.path());
    let mut client = Client::connect(&oracle.path).unwrap();
    let version = client.execute("query-version", Value::Null).unwrap();
    assert_eq!(version["qemu"]["major"], 10);
    let error = client.execute("job-cancel", json!({ "id": "x" })).unwrap_err();
    assert_eq!(error.to_string(), "Job not found");
    let create = json!({ "job-id": "j", "options": {
        "driver": "file", "filename": directory.path().join("image").to_str(), "size": 512 } });
    client.execute("blockdev-create", create).unwrap();
    let concluded = client.wait_event(Duration::from_secs(60), |event| event.data["status"] == "concluded").unwrap();
    assert_eq!(concluded.unwrap().name, "JOB_STATUS_CHANGE");
}
