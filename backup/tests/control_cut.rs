//! The promise: a transaction is one instant for all disks. A client that writes n to one disk, waits, and then writes n to
//! the next can never find images of which the second is ahead of the first, or the first by more than one.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

/// A counter on a disk: the same number in the first bytes of eight clusters, written one after another.
const COPIES: u64 = 8;

fn count(disk: &Disk, n: u64) {
    for copy in 0..COPIES {
        disk.write_bytes(copy * CLUSTER, &n.to_le_bytes());
    }
}

fn counted(image: &str) -> Vec<u64> {
    let bytes = std::fs::read(image).unwrap();
    let copy = |at: u64| u64::from_le_bytes(bytes[(at * CLUSTER) as usize..][..8].try_into().unwrap());
    (0..COPIES).map(copy).collect()
}

#[test]
fn two_disks_are_cut_at_one_instant() {
    let lab = Lab::new(2);
    let (a, b) = (&lab.disks[0], &lab.disks[1]);
    let over = Over::default();
    const ROUNDS: u64 = 40;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut n = 0_u64;
            while !over.yet() {
                n += 1;
                count(a, n);
                count(b, n);
            }
            n
        });
        let at_last = over.at_last();
        for i in 0..ROUNDS {
            let image = |disk: &str| lab.path(&format!("{disk}-{i}.raw"));
            let backup = |disk: &str| {
                json!({ "type": "drive-backup", "data": {
                    "job-id": disk, "device": disk, "target": image(disk), "format": "raw", "sync": "full",
                } })
            };
            lab.ok(
                "transaction",
                json!({
                    "actions": [backup("d0"), backup("d1")], "properties": { "completion-mode": "grouped" },
                }),
            );
            for _ in 0..2 {
                assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
            }
            lab.state("d0", "null");
            // In the order in which they were written, each number stands at or one behind the one before it.
            let written: Vec<u64> = [image("d0"), image("d1")].iter().flat_map(|image| counted(image)).collect();
            let (first, last) = (written[0], written[written.len() - 1]);
            assert!(written.is_sorted_by(|before, after| before >= after), "{written:?}");
            assert!(last + 1 >= first, "{written:?}");
            for disk in ["d0", "d1"] {
                std::fs::remove_file(image(disk)).unwrap();
            }
        }
        drop(at_last);
        assert!(writer.join().unwrap() > ROUNDS, "the guest wrote all the time");
    });
}
