//! The proofs can fail: every kind of wrong image is found, and named to the block.

use super::*;
use crate::demo::model::{Table, fill};
use crate::demo::workload::Step;

const BLOCKS: u64 = 600;

/// A directory with an image that is right.
struct Lab {
    directory: tempfile::TempDir,
    table: Table,
}

impl Lab {
    fn new() -> Self {
        let table = Table::new(BLOCKS, |block| block < 300);
        for (stamp, first, blocks, zeroes) in
            [(2, 10, 20, false), (3, 20, 5, true), (4, 590, 10, false), (5, 22, 1, false)]
        {
            table.issue(first..first + blocks, stamp, zeroes);
            table.acknowledge(first..first + blocks, stamp);
        }
        let lab = Lab { directory: tempfile::tempdir().unwrap(), table };
        let mut bytes = vec![0; BLOCKS as usize * BLOCK];
        lab.table.issued().read_at(&mut bytes, 0);
        std::fs::write(lab.path(), bytes).unwrap();
        lab
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("image")
    }

    fn with<T>(&self, judge: impl FnOnce(&Restored<'_>) -> Result<T, DemoError>) -> Result<T, Disproof> {
        let path = self.path();
        let image = Restored { name: "image", path: &path, go_on: &|| Ok(()) };
        judge(&image).map_err(|error| match error {
            DemoError::Disproved(disproof) => disproof,
            other => panic!("{other}"),
        })
    }

    fn equal(&self, expected: &Snapshot) -> Result<String, Disproof> {
        self.with(|image| equal(image, expected))
    }

    fn between(&self, around: &Around) -> Result<Narrowed, Disproof> {
        self.with(|image| between(image, around))
    }

    fn around(&self) -> Around {
        let (acknowledged_before, issued_after) = (self.table.acknowledged(), self.table.issued());
        Around { acknowledged_before, issued_after, recorded: Vec::new() }
    }

    fn put(&self, block: u64, content: Content) {
        let mut bytes = [0; BLOCK];
        fill(block, content, &mut bytes);
        self.put_bytes(block * BLOCK as u64, &bytes);
    }

    fn put_bytes(&self, offset: u64, bytes: &[u8]) {
        File::options().write(true).open(self.path()).unwrap().write_all_at(bytes, offset).unwrap();
    }

    fn flip(&self, offset: u64) {
        let mut byte = [0];
        File::open(self.path()).unwrap().read_exact_at(&mut byte, offset).unwrap();
        self.put_bytes(offset, &[byte[0] ^ 1]);
    }
}

fn block_of(disproof: Result<impl std::fmt::Debug, Disproof>) -> u64 {
    match disproof {
        Err(Disproof::Block { block, .. }) => block,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_right_image_is_proved_by_the_checksum_that_everybody_computes() {
    let lab = Lab::new();
    let expected = hex(&Sha256::digest(std::fs::read(lab.path()).unwrap()));
    assert_eq!(lab.equal(&lab.table.issued()), Ok(expected));
    assert_eq!(lab.between(&lab.around()), Ok(Narrowed { open_blocks: 0, held: (0, 0), span: None }));
}

#[test]
fn one_flipped_bit_is_found_wherever_it_is() {
    let end = BLOCKS * BLOCK as u64;
    for offset in [0, 5000, 10 * BLOCK as u64 + 7, 23 * BLOCK as u64, 400 * BLOCK as u64 + 4095, end - 1] {
        let lab = Lab::new();
        lab.flip(offset);
        let block = offset / BLOCK as u64;
        assert_eq!(block_of(lab.equal(&lab.table.issued())), block);
        assert_eq!(block_of(lab.between(&lab.around())), block);
        lab.flip(offset);
        assert!(lab.equal(&lab.table.issued()).is_ok());
    }
}

#[test]
fn what_was_expected_and_what_was_found_is_told() {
    let lab = Lab::new();
    lab.put(12, Content::Data(1));
    let text = lab.equal(&lab.table.issued()).unwrap_err().to_string();
    let expected = "image: block 12 (byte 49152) holds the whole data of stamp 1, expected the whole data of stamp 2";
    assert_eq!(text, expected);
    let text = lab.between(&lab.around()).unwrap_err().to_string();
    assert!(text.ends_with("holds the whole data of stamp 1, expected the whole data of stamp 2"), "{text}");
    lab.put(12, Content::Zeroes);
    assert!(lab.equal(&lab.table.issued()).unwrap_err().to_string().contains("holds zeroes"));
    let mut other = [0; BLOCK];
    fill(13, Content::Data(2), &mut other);
    lab.put_bytes(12 * BLOCK as u64, &other);
    assert!(lab.equal(&lab.table.issued()).unwrap_err().to_string().contains("holds data of block 13, stamp 2"));
    lab.put_bytes(12 * BLOCK as u64, &[0xab; BLOCK]);
    assert!(lab.equal(&lab.table.issued()).unwrap_err().to_string().contains("strange bytes that begin with abab"));
}

#[test]
fn an_image_of_another_size_is_no_image_of_the_disk() {
    let lab = Lab::new();
    File::options().write(true).open(lab.path()).unwrap().set_len(BLOCKS * BLOCK as u64 + 512).unwrap();
    assert!(matches!(lab.equal(&lab.table.issued()), Err(Disproof::Size { .. })));
    assert!(matches!(lab.between(&lab.around()), Err(Disproof::Size { .. })));
}

#[test]
fn beside_live_writes_a_block_may_be_of_any_stamp_from_acknowledged_to_issued() {
    let lab = Lab::new();
    let acknowledged_before = lab.table.acknowledged();
    // Block 12 was of stamp 2 when the order was given; until the answer it is written, zeroed and written.
    for (stamp, zeroes) in [(6, false), (7, true), (8, false)] {
        lab.table.issue(12..13, stamp, zeroes);
    }
    let around = Around { acknowledged_before, issued_after: lab.table.issued(), recorded: Vec::new() };
    for right in [Content::Data(2), Content::Data(6), Content::Zeroes, Content::Data(8)] {
        lab.put(12, right);
        assert_eq!(lab.between(&around).map(|narrowed| narrowed.open_blocks), Ok(1), "{right:?}");
    }
    for wrong in [Content::Data(1), Content::Data(9)] {
        lab.put(12, wrong);
        assert_eq!(block_of(lab.between(&around)), 12, "{wrong:?}");
    }
    lab.put(12, Content::Data(8));
    lab.put(10, Content::Zeroes);
    assert_eq!(block_of(lab.between(&around)), 10, "nobody zeroed it");
    lab.put(10, Content::Data(2));
    lab.put(21, Content::Data(2));
    assert_eq!(block_of(lab.between(&around)), 21, "it was zeroed before the order");
}

#[test]
fn blocks_that_are_each_right_but_of_two_instants_are_found_out() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let request = |first, stamp, issued, acknowledged| Recorded {
        step: Step { kind: Kind::Write, first, blocks: 1 },
        stamp,
        issued: at(issued),
        acknowledged: at(acknowledged),
    };
    let lab = Lab::new();
    let acknowledged_before = lab.table.acknowledged();
    lab.table.issue(100..101, 6, false);
    lab.table.issue(200..201, 7, false);
    let issued_after = lab.table.issued();
    // First block 100 was written, then block 200.
    let recorded = vec![request(100, 6, 10, 20), request(200, 7, 30, 40)];
    let around = Around { acknowledged_before, issued_after, recorded };

    lab.put(100, Content::Data(6));
    let narrowed = lab.between(&around).unwrap();
    assert_eq!((narrowed.held, narrowed.span), ((1, 1), Some(Duration::from_millis(30))));
    lab.put(200, Content::Data(7));
    assert_eq!(lab.between(&around).unwrap().held, (2, 0));
    lab.put(100, Content::Data(1));
    let gap = Duration::from_millis(10);
    let expected = Disproof::NotOneInstant { image: "image".into(), in_block: 200, out_block: 100, gap };
    assert_eq!(lab.between(&around), Err(expected));
}
