//! The promise: QMP clients written by others work unchanged.
//!
//! QEMU's own Python package `qemu.qmp` 0.0.6, as a library and as `qmp-shell`, adds a bitmap, takes a backup, waits for
//! its events and queries. The same is told to `qemu-storage-daemon`, so that the scripts are right about QMP.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::{images, tools};
use serde_json::Value;

#[test]
fn qemu_qmp_works_with_blkmark() -> Result<()> {
    the_python_client_works(Kind::Blkmark)
}

#[test]
fn qemu_qmp_works_with_qemu_storage_daemon() -> Result<()> {
    the_python_client_works(Kind::Qsd)
}

#[test]
fn qmp_shell_works_with_blkmark() -> Result<()> {
    qmp_shell_works(Kind::Blkmark)
}

#[test]
fn qmp_shell_works_with_qemu_storage_daemon() -> Result<()> {
    qmp_shell_works(Kind::Qsd)
}

fn the_python_client_works(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", 4 * MIB)?;
    let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let script = lab.write("client.py", include_str!("clients_qmp/client.py"))?;
    let target = lab.path("full.qcow2");
    let said = tools::run(tools::python("python")?.arg(script).arg(daemon.control()).arg(&target))?;
    ensure!(said.trim_end().ends_with("all is well"), "the script said:\n{said}");
    images::assert_sound(&target)?;
    images::assert_equal(&target, &disk.path)?;
    daemon.stop()?;
    Ok(())
}

fn qmp_shell_works(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", 4 * MIB)?;
    let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let target = lab.path("full.qcow2");
    let orders = format!(
        "\
block-dirty-bitmap-add node=drive0 name=b0 granularity=65536 persistent=false
transaction(
block-dirty-bitmap-clear node=drive0 name=b0
block-dirty-bitmap-disable node=drive0 name=b0
)
drive-backup job-id=j0 device=drive0 target={} sync=full format=qcow2 auto-dismiss=false
query-named-block-nodes
block-dirty-bitmap-add node=drive0 name=b0
",
        target.display()
    );
    let file = lab.write("orders", orders)?;
    // The shell keeps a history in the home folder.
    let output = tools::python("qmp-shell")?
        .arg("-v")
        .arg(daemon.control())
        .env("HOME", lab.folder())
        .stdin(Stdio::from(std::fs::File::open(file)?))
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let trouble = || format!("qmp-shell said:\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", trouble());
    let answers: Vec<Value> = said
        .lines()
        .filter_map(|line| serde_json::from_str(line.trim_start_matches("(QEMU) ").trim_start_matches("TRANS> ")).ok())
        .filter(|value: &Value| value.get("return").is_some() || value.get("error").is_some())
        .collect();
    ensure!(answers.len() == 5, "{} answers\n{}", answers.len(), trouble());
    for answer in &answers[..3] {
        ensure!(answer["return"] == serde_json::json!({}), "{answer}\n{}", trouble());
    }
    let bitmap = &answers[3]["return"]
        .as_array()
        .and_then(|nodes| nodes.iter().find(|node| node["node-name"] == "drive0"))
        .with_context(trouble)?["dirty-bitmaps"][0];
    ensure!(bitmap["name"] == "b0" && bitmap["recording"] == false && bitmap["count"] == 0, "{bitmap}");
    ensure!(answers[4]["error"]["desc"] == "Bitmap already exists: b0", "{}", answers[4]);

    // The job was not dismissed: it is still to be seen, by another client, and concluded at some time.
    let mut qmp = daemon.qmp()?;
    loop {
        let jobs = qmp.run("query-jobs", serde_json::json!({}))?;
        ensure!(jobs[0]["id"] == "j0", "{jobs}");
        if jobs[0]["status"] == "concluded" {
            break;
        }
        std::thread::yield_now();
    }
    qmp.run("job-dismiss", serde_json::json!({"id": "j0"}))?;
    daemon.stop()?;
    images::assert_equal(&target, &disk.path)?;
    Ok(())
}
