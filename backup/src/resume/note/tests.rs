//! A note that is read is the one that was written, or there is none.

use super::super::search::{Search, Sought};
use super::super::slip::Written;
use super::*;
use crate::job::Older;

fn notes() -> Vec<Note> {
    let job = Member {
        id: "job \u{e9}".to_owned(),
        settings: Settings {
            speed: u64::MAX,
            auto_dismiss: false,
            on_target_error: OnError::Enospc,
            ..Settings::default()
        },
        paused: true,
        hold: Some(Hold { bitmap: "b\"\n".to_owned(), freeze: Uuid::new_v4(), mode: BitmapMode::Always }),
        of_bitmap: true,
        point: None,
        destination: Destination::Path {
            path: PathBuf::from(std::ffi::OsString::from_vec(b"/a/\xff\xfe".to_vec())),
            format: Some("qcow2".to_owned()),
            existing: true,
        },
        target: Some(FileId { device: 1, inode: u64::MAX }),
        follows: false,
        compress: true,
        group: Some((Uuid::new_v4(), 3)),
        error: None,
    };
    let kept = Member {
        destination: Destination::Node { name: "n".to_owned(), options: vec![serde_json::json!({"driver": "raw"})] },
        hold: None,
        target: None,
        group: None,
        error: Some("No space left on device".to_owned()),
        ..job.clone()
    };
    let reader = Member { point: Some(Uuid::new_v4()), ..kept.clone() };
    let options = PointOptions { keep: true, on_error: cbw::OnError::BreakGuestWrite, timeout: None, outlive: true };
    let roles = [
        Role::Job(Box::new(job)),
        Role::Job(Box::new(kept)),
        Role::Point { name: "p".to_owned() },
        Role::Job(Box::new(reader)),
    ];
    let note = |role| Note {
        boot: Uuid::new_v4(),
        disk: FileId { device: 3, inode: 4 },
        run: Some(Uuid::new_v4()),
        cluster: Granularity::DEFAULT,
        options,
        role,
    };
    let mut notes: Vec<Note> = roles.into_iter().map(note).collect();
    notes[2].options.timeout = Some(Duration::from_millis(1500));
    notes[2].run = None;
    notes
}

fn slips() -> Vec<Written> {
    let file = Some(FileId { device: 5, inode: 6 });
    let differing = [
        Older::Path {
            path: PathBuf::from(std::ffi::OsString::from_vec(b"/b/\xfe".to_vec())),
            format: "raw".to_owned(),
            file,
        },
        Older::Node { name: "n".to_owned(), options: vec![serde_json::json!({"driver": "nbd"})], file: None },
        Older::Point(Uuid::new_v4()),
    ];
    let search = |(sought, mask)| Search {
        disk: FileId { device: 3, inode: 4 },
        run: Some(Uuid::new_v4()),
        settings: Settings { speed: 1, auto_finalize: false, on_source_error: OnError::Stop, ..Settings::default() },
        paused: true,
        bitmap: "b\"\n".to_owned(),
        freeze: Uuid::new_v4(),
        sought,
        mask,
        group: Some((Uuid::new_v4(), 2)),
    };
    let sought = [Sought::All, Sought::Allocated].into_iter().chain(differing.into_iter().map(Sought::Differing));
    let masks = [Mask::Overwrite, Mask::Union, Mask::Difference].into_iter().cycle();
    let searches = sought.zip(masks).map(|what| (Kind::Populate, Some(search(what))));
    let written = |((kind, search), commits)| {
        let notice = Notice { commits, ..Notice::of_job(Uuid::new_v4(), "job".to_owned(), kind) };
        Written { notice, search }
    };
    let jobs = Kind::ALL.into_iter().map(|kind| (kind, None)).chain(searches);
    jobs.flat_map(|job| [(job.clone(), false), (job, true)]).map(written).collect()
}

#[test]
fn so_it_is_of_a_slip() {
    for slip in slips() {
        assert_eq!(Written::decode(&slip.encode()), Some(slip));
    }
}

#[test]
fn what_is_read_is_what_was_written() {
    for note in notes() {
        assert_eq!(Note::decode(&note.encode()), Some(note.clone()));
        assert_eq!(Notice::decode(&note.notice().encode()), Some(note.notice()));
    }
}

#[test]
fn a_flipped_byte_or_a_missing_end_leaves_nothing() {
    type Reads = fn(&[u8]) -> bool;
    let note = |bytes: &[u8]| Note::decode(bytes).is_some();
    let notice = |bytes: &[u8]| Notice::decode(bytes).is_some();
    let slip = |bytes: &[u8]| Written::decode(bytes).is_some();
    let slips = slips().into_iter().map(|written| (written.encode(), slip as Reads));
    let notes = notes();
    let notes = notes.iter().flat_map(|of| [(of.encode(), note as Reads), (of.notice().encode(), notice as Reads)]);
    for (bytes, reads) in notes.chain(slips) {
        assert!(reads(&bytes));
        for len in 0..bytes.len() {
            assert!(!reads(&bytes[..len]), "{len} bytes");
        }
        for at in 0..bytes.len() {
            for mask in [0x01, 0x20, 0xff] {
                let mut flipped = bytes.clone();
                flipped[at] ^= mask;
                assert!(!reads(&flipped), "byte {at}");
            }
        }
    }
}
