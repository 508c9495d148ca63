//! The promise: the script and the commands of docs/external-backup.md do what the page says, while the guests write: pulls of two
//! disks are of one instant, an incremental pull makes the full one before it that of the new instant, and one that fails or
//! dies loses nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{Daemon, blkmark_binary};
use blkmark_tests::lab::{Disk, Lab};
use blkmark_tests::numbers::{Progress, SIZE, same_instant, write_numbers};
use blkmark_tests::process::GIVE_UP;
use blkmark_tests::qmp::Qmp;
use blkmark_tests::{images, tools};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../docs/external-backup.md");

/// The lines of the blocks of one kind.
fn block(kind: &str) -> Vec<&'static str> {
    let (mut inside, mut lines) = (false, Vec::new());
    for line in PAGE.lines() {
        match line.strip_prefix("```") {
            Some(found) => inside = found == kind,
            None if inside => lines.push(line),
            None => {}
        }
    }
    lines
}

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(Guest::connect(&disk.socket, Options::default())?.into_disk()?)
}

/// Two disks that are written to, and the story meanwhile.
fn beside_writes(story: impl FnOnce(&Lab, &Daemon, &mut Qmp, &Progress) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    let disks = [lab.disk("a", SIZE)?, lab.disk("b", SIZE)?];
    let daemon = Daemon::blkmark(&lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    let mut attached = [attach(&disks[0])?, attach(&disks[1])?];
    let progress = Progress::default();
    let write = |stop: &Stop| write_numbers(&mut attached, &progress, stop);
    beside(vec![Box::new(write)], || story(&lab, &daemon, &mut qmp, &progress))?;
    drop(attached);
    daemon.stop()?;
    Ok(())
}

/// The script with its arguments; tools that stand in `instead` come before those of the machine.
fn script(lab: &Lab, daemon: &Daemon, instead: Option<&Path>) -> Result<Command> {
    let file = lab.write("pull.py", block("python").join("\n"))?;
    let mut command = tools::python("python")?;
    let pulled = lab.path("pulled");
    fs::create_dir_all(&pulled)?;
    command.arg(file).arg(daemon.control()).arg(pulled).args(["a", "b"]).stdin(Stdio::null());
    if let Some(instead) = instead {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = [instead.to_owned()].into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders)?);
    }
    Ok(command)
}

fn nodes(qmp: &mut Qmp) -> Result<Vec<String>> {
    let nodes = qmp.run("query-named-block-nodes", json!({}))?;
    let names = nodes.as_array().into_iter().flatten().filter_map(|node| node["node-name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

#[test]
fn the_script_pulls_two_busy_disks_as_of_one_instant() -> Result<()> {
    ensure!(block("python").len() < 100, "the script has grown to {} lines", block("python").len());
    beside_writes(|lab, daemon, qmp, progress| {
        let mut last = 0;
        for round in 0..4 {
            progress.await_writes(100)?;
            let acked_before = progress.acked();
            if round == 2 {
                breaks_off(lab, daemon, qmp)?;
            }
            tools::run(&mut script(lab, daemon, None)?)?;
            let [a, b] = ["a.raw", "b.raw"].map(|image| fs::read(lab.path("pulled").join(image)));
            let (a, b) = same_instant(&a?, &b?).with_context(|| format!("pull {round}"))?;
            ensure!(b >= acked_before && a > last, "pull {round} is of {a} and {b}, not of after {acked_before}");
            last = a;
            ensure!(nodes(qmp)? == ["a", "b"], "{:?}", nodes(qmp)?);
            let bitmap = qmp.bitmap("a", "pull")?;
            ensure!(bitmap["frozen"] == false && bitmap["recording"] == true, "{bitmap}");
        }
        Ok(())
    })
}

/// A pull whose copy fails, and one that is killed in the middle: what they had frozen is for the next.
fn breaks_off(lab: &Lab, daemon: &Daemon, qmp: &mut Qmp) -> Result<()> {
    let folder = lab.path("instead");
    fs::create_dir(&folder)?;
    let tool = folder.join("qemu-img");
    let instead = |text: &str| {
        fs::write(&tool, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755))
    };
    instead("exit 1")?;
    let failed = tools::answer(&mut script(lab, daemon, Some(&folder))?)?;
    ensure!(failed.code == 1 && failed.text.contains("qemu-img"), "{}", failed.text);
    ensure!(nodes(qmp)? == ["a", "b"], "a failed pull left points: {:?}", nodes(qmp)?);
    ensure!(qmp.bitmap("a", "pull")?["frozen"] == false);
    ensure!(qmp.run("query-block-exports", json!({}))? == json!([]));

    let marker = lab.path("marker");
    instead(&format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600", marker.display()))?;
    let mut killed = script(lab, daemon, Some(&folder))?.spawn()?;
    let deadline = Instant::now() + GIVE_UP;
    while !marker.exists() && Instant::now() < deadline && killed.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(10));
    }
    killed.kill()?;
    killed.wait()?;
    let child: i32 = fs::read_to_string(&marker)?.trim().parse()?;
    Command::new("kill").arg(child.to_string()).status()?;
    let bitmap = qmp.bitmap("a", "pull")?;
    ensure!(bitmap["frozen-by"] == "client" && nodes(qmp)?.contains(&"a-pull".to_owned()), "{bitmap}");
    Ok(())
}

#[test]
fn the_commands_of_the_page_work_as_printed() -> Result<()> {
    beside_writes(|lab, daemon, qmp, progress| {
        let binary = blkmark_binary()?;
        let folder = binary.parent().context("a folder")?.to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([folder].into_iter().chain(std::env::split_paths(&path)))?;
        let lines = block("console");
        ensure!(lines.len() > 20, "the commands are not recognised");
        let mut frozen = 0;
        for line in lines {
            let command = line.strip_prefix("$ ").with_context(|| format!("{line:?} is no command"))?;
            progress.await_writes(20)?;
            if command.starts_with("blkmark bitmap abdicate") {
                frozen = qmp.bitmap("b", "daily")?["count"].as_u64().unwrap_or(0);
            }
            let mut shell = Command::new("sh");
            shell.arg("-c").arg(command).current_dir(lab.folder()).env("PATH", &path);
            let said = tools::run(shell.env("BLKMARK_CONTROL", daemon.control()))?;
            ensure!(said.is_empty(), "{command} printed:\n{said}");
        }
        let [a, b] = ["a-full.raw", "b-full.raw"].map(|image| fs::read(lab.path(image)));
        let (first, _) = same_instant(&a?, &b?)?;
        let layer = lab.path("a-monday.qcow2");
        images::assert_sound(&layer)?;
        let monday = blkmark_tests::numbers::last_number(&fs::read(images::restore(&layer)?)?)?;
        ensure!(monday > first, "the layer is of {monday}, the first pull of {first}");
        // What the map, the ranges and the layer say is one and the same.
        let shown: Value = serde_json::from_slice(&fs::read(lab.path("a-changes.json"))?)?;
        let regions: Vec<(u64, u64)> = pairs(&shown["dirty-regions"], "start", "count");
        let map = fs::read_to_string(lab.path("a-changes.map"))?;
        let mapped: Vec<(u64, u64)> = map
            .lines()
            .map(|line| line.split_whitespace().take(3).map(str::parse).collect::<Result<Vec<u64>, _>>())
            .filter_map(|line| line.ok().filter(|line| line[2] == 1).map(|line| (line[0], line[1])))
            .collect();
        ensure!(!regions.is_empty() && regions == mapped, "{regions:?} are not {mapped:?}");
        let b = qmp.bitmap("b", "daily")?;
        ensure!(frozen > 0 && b["frozen"] == false && b["count"].as_u64() >= Some(frozen), "{b}");
        let changes: Value = serde_json::from_slice(&fs::read(lab.path("a-tuesday.json"))?)?;
        ensure!(!pairs(&changes["dirty-regions"], "start", "count").is_empty(), "{changes}");
        ensure!(qmp.run("query-checkpoints", json!({}))? == json!([]));
        Ok(())
    })
}

fn pairs(list: &Value, first: &str, second: &str) -> Vec<(u64, u64)> {
    let pairs = list.as_array().into_iter().flatten();
    pairs.filter_map(|pair| Some((pair[first].as_u64()?, pair[second].as_u64()?))).collect()
}
