//! The promise: what is exported over NBD is what clients of others get: names, sizes, bytes, holes and dirty bits, by whatever way
//! they ask, alone or many at once.

mod nbd_common;

use blkmark_backup::nbd::{ExportError, NbdServer, Removal, ServerSettings};
use nbd_common::*;
use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_client_learns_what_there_is() {
    let lab = Lab::new();
    let list = json(&run("nbdinfo", &["--json", "--list", &lab.uri("")]));
    let exports = list["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2);
    let disk = exports.iter().find(|export| export["export-name"] == "disk").unwrap();
    assert_eq!(disk["description"], "a guest's disk");
    assert_eq!(disk["export-size"], SIZE);
    assert_eq!((&disk["is_read_only"], &disk["can_multi_conn"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_eq!(disk["contexts"], serde_json::json!(["base:allocation", "qemu:dirty-bitmap:b"]));
    assert_eq!((&disk["block_size_minimum"], &disk["block_size_preferred"]), (&1.into(), &4096.into()));
    let memory = json(&run("nbdinfo", &["--json", &lab.uri("memory")]));
    assert_eq!(memory["exports"][0]["is_read_only"], false);
    assert_eq!(memory["exports"][0]["can_zero"], true);
    let said = fail("nbdinfo", &[&lab.uri("other")]);
    assert!(said.contains("No such file or directory for export: other"), "{said}");
    assert!(fail("qemu-img", &["info", &lab.uri("other")]).contains("Requested export not available"));
}

#[test]
fn clients_copy_every_byte() {
    let lab = Lab::new();
    let out = lab.path("out.raw");
    for arguments in [
        &["--connections=1", "--requests=1"][..],
        &["--connections=4", "--requests=64"],
        &["--synchronous"],
        &["--request-size=33554432"],
        &["--request-size=4096", "--requests=128"],
        &["--allocated"],
    ] {
        run("nbdcopy", &[arguments, &[&lab.uri("disk"), &out]].concat());
        assert_same(&std::fs::read(&out).unwrap(), &lab.bytes());
    }
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", &lab.uri("disk"), &out]);
    assert_same(&std::fs::read(&out).unwrap(), &lab.bytes());
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &lab.uri("disk"), &lab.path("disk.raw")]);
    // Any offset and length, also where the disk wants whole sectors.
    let io =
        ["read -P 0 100 7", "read 511 1026", "read 65535 262147", &format!("read {} 1", SIZE - 1)].map(str::to_owned);
    let commands: Vec<&str> = io.iter().flat_map(|command| ["-c", command]).collect();
    run("qemu-io", &[&["-r", "-f", "raw"], &commands[..], &[&lab.uri("disk")]].concat());
}

#[test]
fn clients_see_holes_and_dirty_bits() {
    let lab = Lab::new();
    let extents = |uri: &str, context: &str| -> Vec<(u64, u64, u64)> {
        let map = json(&run("nbdinfo", &["--json", &format!("--map={context}"), uri]));
        let field = |extent: &Value, name: &str| extent[name].as_u64().unwrap();
        map.as_array().unwrap().iter().map(|e| (field(e, "offset"), field(e, "length"), field(e, "type"))).collect()
    };
    let disk = lab.uri("disk");
    assert_eq!(extents(&disk, "base:allocation"), lab.allocation());
    assert_eq!(extents(&disk, "qemu:dirty-bitmap:b"), lab.dirty());
    // With 64-bit headers, which nbdinfo may not speak, and QEMU does.
    let options = |more: &str| format!("driver=nbd,server.type=unix,server.path={},export=disk{more}", lab.socket());
    let map = |more: &str| json(&run("qemu-img", &["map", "--output=json", "--image-opts", &options(more)]));
    let field = |extent: &Value, name: &str| (extent["start"].as_u64().unwrap(), extent[name].as_bool().unwrap());
    let holes: Vec<_> = map("").as_array().unwrap().iter().map(|e| field(e, "data")).collect();
    assert_eq!(holes, lab.allocation().iter().map(|e| (e.0, e.2 == 0)).collect::<Vec<_>>());
    // QEMU shows dirty ranges as holes.
    let dirty: Vec<_> =
        map(",x-dirty-bitmap=qemu:dirty-bitmap:b").as_array().unwrap().iter().map(|e| field(e, "data")).collect();
    assert_eq!(dirty, lab.dirty().iter().map(|e| (e.0, e.2 == 0)).collect::<Vec<_>>());
    assert!(fail("nbdinfo", &["--map=qemu:dirty-bitmap:nope", &disk]).contains("nope"));
}

#[test]
fn clients_write_zero_trim_and_flush() {
    let lab = Lab::new();
    let (uri, disk) = (lab.uri("memory"), lab.path("disk.raw"));
    run("nbdcopy", &["--flush", &disk, &uri]);
    assert_same(&lab.memory.contents(), &lab.bytes());
    assert!(lab.memory.flushes() > 0);
    run("nbdcopy", &["--request-size=33554432", "--target-is-zero", &disk, &uri]);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-m", "8", "-W", &disk, &uri]);
    assert_same(&lab.memory.contents(), &lab.bytes());
    let script = [
        "write -P 5 4095 3",
        "write -f -P 6 1M 5M",
        "write -z 2M 70000",
        "discard 3M 1M",
        "flush",
        "read -P 6 4M 2M",
        "read -P 0 2M 70000",
    ];
    let commands: Vec<&str> = script.iter().flat_map(|command| ["-c", command]).collect();
    run("qemu-io", &[&["-f", "raw"], &commands[..], &[&uri]].concat());
    let contents = lab.memory.contents();
    assert_eq!(contents[4095..4098], [5; 3]);
    assert_eq!(contents[2 << 20..(2 << 20) + 70000], [0; 70000]);
    // A disk that is only read stays as it is.
    assert!(fail("qemu-io", &["-f", "raw", "-c", "write 0 512", &lab.uri("disk")]).contains("Permission denied"));
    let before = lab.bytes();
    assert!(!fail("nbdcopy", &[&disk, &lab.uri("disk")]).is_empty());
    assert_same(&lab.bytes(), &before);
}

#[test]
fn errors_of_an_export_reach_the_client_and_its_other_requests_go_on() {
    let lab = Lab::new();
    lab.memory.fail_at(Some(1 << 20));
    let uri = lab.uri("memory");
    let commands =
        ["-c", "read 0 512", "-c", "read 1M 512", "-c", "read 512k 1M", "-c", "write 1M 512", "-c", "read 0 512"];
    let (_, out) = output("qemu-io", &[&["-f", "raw"], &commands[..], &[&uri]].concat());
    assert_eq!(out.matches("Input/output error").count(), 3, "{out}");
    assert_eq!(out.matches("read 512/512 bytes at offset 0").count(), 2, "{out}");
}

#[test]
fn qemu_nbd_and_tcp_lead_to_the_same_bytes() {
    let lab = Lab::new();
    let tcp = NbdServer::bind(&local(), ServerSettings::default()).unwrap();
    tcp.add("disk", Arc::clone(&lab.disk), "").unwrap();
    let uri = format!("nbd://127.0.0.1:{}/disk", tcp.bound().unwrap().port());
    let out = lab.path("out.raw");
    run("nbdcopy", &["--connections=4", &uri, &out]);
    assert_same(&std::fs::read(&out).unwrap(), &lab.bytes());
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &lab.path("disk.raw")]);
    // qemu-nbd as a client of one server and the server of another.
    let socket = lab.path("relay");
    let relay = Process::start("qemu-nbd", &["-t", "-r", "-f", "raw", "-k", &socket, &lab.uri("disk")], &socket);
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &format!("nbd+unix:///?socket={socket}"), &lab.path("disk.raw")],
    );
    drop(relay);
    tcp.stop();
    assert!(!fail("nbdinfo", &["--size", &uri]).is_empty());
}

#[test]
fn an_export_goes_safely_or_at_once_and_nobody_uses_it_then() {
    let lab = Lab::new();
    let socket = lab.path("relay");
    let relay = Process::start("qemu-nbd", &["-t", "-r", "-f", "raw", "-k", &socket, &lab.uri("disk")], &socket);
    lab.wait(|| lab.server.clients("disk") == Some(1));
    assert_eq!(lab.server.remove("disk", Removal::Safe), Err(ExportError::InUse));
    assert_eq!(lab.server.remove("memory", Removal::Safe), Ok(()));
    assert_eq!(lab.server.remove("memory", Removal::Safe), Err(ExportError::NotFound));
    assert_eq!(lab.server.add("disk", Arc::clone(&lab.disk), ""), Err(ExportError::Exists));
    assert_eq!(lab.server.add(&"x".repeat(4097), Arc::clone(&lab.disk), ""), Err(ExportError::TooLong));
    assert_eq!(lab.server.remove("disk", Removal::Hard), Ok(()));
    // The lab's handle is the only one left.
    assert_eq!(Arc::strong_count(&lab.disk), 1);
    drop(relay);
    lab.server.add("disk", Arc::clone(&lab.disk), "").unwrap();
    run("nbdinfo", &["--size", &lab.uri("disk")]);
    lab.server.stop();
    assert_eq!(Arc::strong_count(&lab.disk), 1);
    assert!(!std::path::Path::new(&lab.socket()).exists());
}

#[test]
fn more_clients_than_allowed_wait_for_their_turn() {
    let lab = Lab::with(ServerSettings { max_connections: 2, ..ServerSettings::default() });
    let idle: Vec<_> = (0..2).map(|_| UnixStream::connect(lab.socket()).unwrap()).collect();
    std::thread::scope(|scope| {
        let third = scope.spawn(|| run("nbdinfo", &["--size", &lab.uri("disk")]));
        // Both places are taken by clients that say nothing; one of them goes.
        drop(idle.into_iter().next());
        assert_eq!(third.join().unwrap().trim(), SIZE.to_string());
    });
}

#[test]
fn clients_prove_themselves_with_certificates() {
    let lab = Lab::new();
    let tls = Tls::new(&lab.path("tls"));
    let settings = ServerSettings { tls: Some(tls.credentials()), ..ServerSettings::default() };
    let server = NbdServer::bind(&local(), settings).unwrap();
    server.add("disk", Arc::clone(&lab.disk), "").unwrap();
    server.add("memory", lab.memory.clone(), "").unwrap();
    let port = server.bound().unwrap().port();
    let uri = |dir: &str, export: &str| format!("nbds://127.0.0.1:{port}/{export}?tls-certificates={dir}");
    let out = lab.path("out.raw");
    run("nbdcopy", &["--connections=4", &uri(&tls.client, "disk"), &out]);
    assert_same(&std::fs::read(&out).unwrap(), &lab.bytes());
    run("nbdcopy", &[&out, &uri(&tls.client, "memory")]);
    assert_same(&lab.memory.contents(), &lab.bytes());
    assert_eq!(json(&run("nbdinfo", &["--json", &uri(&tls.client, "disk")]))["TLS"], true);
    let credentials = format!("tls-creds-x509,id=tls,dir={},endpoint=client", tls.client);
    let options =
        format!("driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=disk,tls-creds=tls");
    let plain = format!("driver=raw,file.driver=file,file.filename={}", lab.path("disk.raw"));
    run("qemu-img", &["compare", "--object", &credentials, "--image-opts", &options, &plain]);
    // Without a certificate, with another's, and in clear.
    assert!(!fail("nbdinfo", &[&uri(&tls.stranger, "disk")]).is_empty());
    assert!(fail("nbdinfo", &[&format!("nbd://127.0.0.1:{port}/disk")]).contains("TLS"));
    assert!(fail("qemu-img", &["info", &format!("nbd://127.0.0.1:{port}/disk")]).contains("TLS"));
    // In clear nothing is told, not even what there is.
    assert!(!fail("nbdinfo", &["--list", &format!("nbd://127.0.0.1:{port}")]).contains("memory"));
}
