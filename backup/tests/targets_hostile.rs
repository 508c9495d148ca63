//! Images that somebody has tampered with end in an error or in wrong bytes of their own, never in a panic, a hang, a
//! huge allocation or a touch of another file.

mod targets_common;

use blkmark_backup::source::Source;
use blkmark_backup::target::{self, Format, Policy, image::Image};
use targets_common::*;

/// How many spoilt images to try; more for a longer look.
fn rounds() -> u64 {
    std::env::var("BLKMARK_HOSTILE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Small clusters put all the tables close together: mutations hit what matters.
fn victim(path: &std::path::Path) -> Vec<u8> {
    ok("qemu-img", &["create", "-f", "qcow2", "-o", "cluster_size=512", s(path), "256k"]);
    for command in ["write -P 1 0 20k", "write -z 30k 9k", "write -c -P 2 64k 4k", "write -P 3 200k 1k"] {
        ok("qemu-io", &["-f", "qcow2", "-c", command, s(path)]);
    }
    std::fs::read(path).unwrap()
}

#[test]
fn spoilt_images_never_bring_the_process_down() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    let good = victim(&path);
    let policy = Policy { roots: vec![dir.path().to_owned()], ..Policy::default() };
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut opened, mut refused) = (0, 0);
    for round in 0..rounds() {
        let mut bad = good.clone();
        for _ in 0..=random.below(6) {
            // The header is hit as often as all the rest.
            let len = if random.below(2) == 0 { 128 } else { bad.len() };
            let at = random.below(len);
            bad[at] = match random.below(4) {
                0 => 0,
                1 => 0xff,
                2 => bad[at] ^ (1 << random.below(8)),
                _ => random.next() as u8,
            };
        }
        if random.below(8) == 0 {
            bad.truncate(random.below(bad.len()));
        }
        std::fs::write(&path, &bad).unwrap();
        let outcome = std::panic::catch_unwind(|| {
            let mut fine = false;
            if let Ok(image) = Image::open(&path, Format::Qcow2, &policy) {
                fine = true;
                let mut buf = vec![0; 64 << 10];
                for at in (0..image.size().min(1 << 20)).step_by(buf.len()) {
                    let len = (image.size() - at).min(buf.len() as u64) as usize;
                    let _ = image.read_at(&mut buf[..len], at);
                    let _ = image.block_status(at, len as u64).map(|(_, n)| assert!(n > 0));
                }
            }
            if let Ok(target) = target::open(&path, Format::Qcow2, &policy) {
                for (offset, len) in [(0, 5000), (40 << 10, 512), (64 << 10, 4096), (199 << 10, 3000)] {
                    let _ = target.write_at(&vec![7; len], offset);
                    let _ = target.write_zeroes_at(offset + 512, 1024);
                }
                let _ = target.flush();
                let _ = target.conclude();
            }
            fine
        });
        match outcome {
            Ok(true) => opened += 1,
            Ok(false) => refused += 1,
            Err(_) => {
                let kept = std::env::temp_dir().join("blkmark-hostile.qcow2");
                std::fs::write(&kept, &bad).unwrap();
                panic!("round {round} panicked; the image is kept as {}", kept.display());
            }
        }
    }
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: no test at all");
}
