//! The promise: many clients at once, with jobs and guests beside them, neither stop each other nor leave anything behind.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

/// A small generator, so that a failing run can be told by its numbers.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

fn random_command(dice: &mut Dice) -> (&'static str, Value) {
    let node = format!("d{}", dice.below(2));
    let name = format!("b{}", dice.below(3));
    let job = format!("j{}", dice.below(4));
    let target = format!("t{}", dice.below(3));
    let bitmap = json!({ "node": node, "name": name });
    let sync = ["full", "none", "incremental", "bitmap"][dice.below(4) as usize];
    let mut backup = json!({ "job-id": job, "device": node, "target": target, "sync": sync });
    if sync == "incremental" || sync == "bitmap" {
        backup["bitmap"] = json!(name);
        if sync == "bitmap" {
            backup["bitmap-mode"] = json!(["always", "never", "on-success"][dice.below(3) as usize]);
        }
    }
    backup["auto-finalize"] = json!(dice.below(2) == 0);
    backup["auto-dismiss"] = json!(dice.below(2) == 0);
    backup["speed"] = json!([0, MIB][dice.below(2) as usize]);
    match dice.below(18) {
        0 => ("block-dirty-bitmap-add", bitmap),
        1 => ("block-dirty-bitmap-remove", bitmap),
        2 => ("block-dirty-bitmap-clear", bitmap),
        3 => ("block-dirty-bitmap-enable", bitmap),
        4 => ("block-dirty-bitmap-disable", bitmap),
        5 => (
            "block-dirty-bitmap-merge",
            json!({ "node": node, "target": name, "bitmaps": [{ "node": "d0", "name": "b0" }] }),
        ),
        6 | 7 => ("blockdev-backup", backup),
        8 | 9 => {
            let mut other = backup.clone();
            other["job-id"] = json!(format!("k{}", dice.below(3)));
            other["target"] = json!(format!("t{}", dice.below(3)));
            other["device"] = json!("d1");
            let actions = [backup, other].map(|data| json!({ "type": "blockdev-backup", "data": data }));
            let mode = ["grouped", "individual"][dice.below(2) as usize];
            ("transaction", json!({ "actions": actions, "properties": { "completion-mode": mode } }))
        }
        10 => ("job-cancel", json!({ "id": job })),
        11 => ("job-pause", json!({ "id": job })),
        12 => ("job-resume", json!({ "id": job })),
        13 => ("job-finalize", json!({ "id": job })),
        14 => ("job-dismiss", json!({ "id": job })),
        15 => ("query-block", json!({})),
        16 => ("query-block-jobs", json!({})),
        _ => ("block-job-set-speed", json!({ "device": job, "speed": 0 })),
    }
}

#[test]
fn a_crowd_of_clients_leaves_nothing_behind() {
    let lab = Lab::new(2);
    for i in 0..3 {
        lab.raw_target(&format!("t{i}"), 4 * MIB);
    }
    let over = Over::default();
    std::thread::scope(|scope| {
        for (i, disk) in lab.disks.iter().enumerate() {
            let over = &over;
            scope.spawn(move || {
                let mut dice = Dice(i as u64 + 100);
                while !over.yet() {
                    disk.write(dice.below(1000) * 4096, 4096, dice.below(256) as u8);
                }
            });
        }
        let at_last = over.at_last();
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let lab = &lab;
                scope.spawn(move || {
                    let mut dice = Dice(client);
                    let mut accepted = 0;
                    for _ in 0..2000 {
                        let (command, arguments) = random_command(&mut dice);
                        accepted += u32::from(lab.run(command, arguments).is_ok());
                    }
                    accepted
                })
            })
            .collect();
        let accepted: Vec<u32> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        assert!(accepted.iter().all(|accepted| *accepted > 50), "{accepted:?}");
        lab.control.shutdown();
        drop(at_last);
    });
    for job in lab.jobs().as_array().unwrap() {
        assert_eq!(job["status"], "concluded", "{job}");
    }
    for (i, disk) in lab.disks.iter().enumerate() {
        assert!(disk.bitmaps().iter().all(|(.., busy)| !busy));
        // No gate is left.
        disk.dirty(0..64, 1);
        // Whatever recorded sees it.
        for (name, .., recording, _) in disk.bitmaps() {
            assert!(!recording || disk.dirty_clusters(&name).len() == 64, "d{i} {name}");
        }
    }
    for i in 0..3 {
        lab.ok("blockdev-del", json!({ "node-name": format!("t{i}") }));
    }
}
