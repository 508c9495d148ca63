//! The promise: an NBD server that was started with TLS credentials is for clients that have a certificate of theirs.

mod control_common;
mod nbd_common;

use control_common::{Lab, MIB, assert_same};
use nbd_common::{Tls, fail, run};
use serde_json::json;

#[test]
fn a_server_with_credentials_is_for_clients_with_certificates() {
    let lab = Lab::new(1);
    lab.disks[0].write(MIB, MIB, 7);
    let tls = Tls::new(&lab.path("tls"));
    let object = |id: &str, dir: &str| json!({ "qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": "server", "verify-peer": true });
    let missing = lab.err("object-add", object("t", &lab.path("nowhere")));
    assert!(missing.starts_with("Cannot load 'server-cert.pem' from the TLS credentials: "), "{missing}");
    // What a client has is no server's.
    lab.err("object-add", object("t", &tls.client));
    let mut client = object("t", &tls.client);
    client["endpoint"] = json!("client");
    assert_eq!(lab.err("object-add", client), "Only credentials with \"endpoint\": \"server\" are supported");
    lab.ok("object-add", object("t", &tls.server));
    assert_eq!(
        lab.err("object-add", object("t", &tls.server)),
        "attempt to add duplicate property 't' to object (type 'container')"
    );
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let start = |credentials: &str| {
        let data = json!({ "host": "127.0.0.1", "port": port });
        json!({ "addr": { "type": "inet", "data": data }, "tls-creds": credentials })
    };
    assert_eq!(lab.err("nbd-server-start", start("u")), "No TLS credentials with id 'u'");
    lab.ok("nbd-server-start", start("t"));
    // The server has what it needs.
    lab.ok("object-del", json!({ "id": "t" }));
    assert_eq!(lab.err("object-del", json!({ "id": "t" })), "object 't' not found");
    lab.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "d0" }));
    let uri = |dir: &str| format!("nbds://127.0.0.1:{port}/d0?tls-certificates={dir}");
    let out = lab.path("out.raw");
    run("nbdcopy", &["--connections=4", &uri(&tls.client), &out]);
    assert_same(&std::fs::read(&out).unwrap(), &lab.disks[0].image());
    // With another's certificate, and in clear.
    fail("nbdinfo", &[&uri(&tls.stranger)]);
    let clear = fail("nbdinfo", &[&format!("nbd://127.0.0.1:{port}/d0")]);
    assert!(clear.contains("TLS"), "{clear}");
    lab.ok("nbd-server-stop", json!({}));
    assert_eq!(lab.err("nbd-server-start", start("t")), "No TLS credentials with id 't'");
}
