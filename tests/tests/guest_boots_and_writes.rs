//! The promise: a Linux guest finds the disk, makes a file system on it, and what it has synced is in the file.
//!
//! The guest writes files of known content over two queues, discards what it deleted, and unmounts. On the host, the
//! raw file then holds a clean file system with exactly those files. The same story is told to `qemu-storage-daemon`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::ext4;
use blkmark_tests::guest::Guest;
use blkmark_tests::lab::{Lab, MIB};
use sha2::{Digest, Sha256};

const FILES: usize = 24;

#[test]
fn a_guest_of_blkmark_writes_what_it_says() -> Result<()> {
    a_guest_writes_what_it_says(Kind::Blkmark)
}

#[test]
fn a_guest_of_qemu_storage_daemon_writes_what_it_says() -> Result<()> {
    a_guest_writes_what_it_says(Kind::Qsd)
}

fn a_guest_writes_what_it_says(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", 128 * MIB)?.with_queues(2);
    let mut daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let mut guest = Guest::boot(&lab, std::slice::from_ref(&disk))?;

    let sectors = guest.run("cat /sys/block/vda/size")?;
    ensure!(sectors == (128 * MIB / 512).to_string(), "the guest sees {sectors} sectors");
    let queues = guest.run("ls /sys/block/vda/mq | wc -l")?;
    ensure!(queues == "2", "the guest sees {queues} queues");

    guest.run("mkfs.ext4 -q /dev/vda && mount -t ext4 -o discard /dev/vda /mnt")?;
    guest.run(&format!(
        "for i in $(seq {FILES}); do yes \"line of file $i\" | head -c $((i * 5000)) >/mnt/file$i || exit 1; done; sync"
    ))?;
    // The page cache is dropped, so these sums are of what came back from the disk.
    let sums = guest.run(&format!(
        "echo 3 >/proc/sys/vm/drop_caches; cd /mnt && for i in $(seq {FILES}); do sha256sum file$i || exit 1; done"
    ))?;
    let expected_sums: Vec<String> =
        (1..=FILES).map(|index| format!("{}  file{index}", sha256(&expected(index)))).collect();
    ensure!(sums.lines().eq(expected_sums.iter()), "the guest reads other than it wrote:\n{sums}");

    guest.run("yes ballast | head -c 40m >/mnt/ballast && sync")?;
    let full = fs::metadata(&disk.path)?.blocks();
    guest.run("rm /mnt/ballast && sync && fstrim -v /mnt")?;
    guest.assert_no_disk_errors()?;
    guest.poweroff()?;
    let trimmed = fs::metadata(&disk.path)?.blocks();
    ensure!(
        trimmed + 30 * MIB / 512 < full,
        "discarded space was not given back: {full} blocks before, {trimmed} after"
    );
    daemon.assert_running()?;
    daemon.stop()?;

    ext4::assert_clean(&disk.path)?;
    let files = ext4::extract(&lab, &disk.path, "files")?;
    for index in 1..=FILES {
        let found = fs::read(files.join(format!("file{index}")))?;
        ensure!(found == expected(index), "file{index} differs on the host: {} bytes", found.len());
    }
    Ok(())
}

fn expected(index: usize) -> Vec<u8> {
    format!("line of file {index}\n").bytes().cycle().take(index * 5000).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
