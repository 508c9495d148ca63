//! Heat over a medium that fails when it is told to.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Instant;

/// Takes everything, until its syncs fail.
#[derive(Default)]
struct Breaks(AtomicBool);

impl Medium for Breaks {
    fn name(&self) -> String {
        "breaks".to_owned()
    }

    fn is_there(&self) -> bool {
        true
    }

    fn make(&self) -> io::Result<()> {
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn read(&self, _: &str, _: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn allocate(&self, _: &str, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, _: &str, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self, _: &str) -> io::Result<()> {
        if self.0.load(SeqCst) { Err(rustix::io::Errno::IO.into()) } else { Ok(()) }
    }

    fn sync_dir(&self) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn put_aside(&self) -> io::Result<String> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_elsewhere(&self, _: &str, _: &str, _: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::NotFound.into())
    }
}

#[test]
fn after_a_cooling_that_failed_no_write_goes_before_the_bitmaps_are_given_up() {
    let breaks = Arc::new(Breaks::default());
    let medium: Arc<dyn Medium> = Arc::clone(&breaks) as _;
    let heat = Heat::new(4 * EXTENT);
    heat.begin(&medium, Uuid::new_v4(), 1, 4 * EXTENT).unwrap();
    let write = ByteRange::new(0, 4096);
    heat.ensure(std::iter::once(write)).unwrap();
    assert!(heat.admits(write));
    heat.forget(&mut Vec::new());

    breaks.0.store(true, SeqCst);
    let idle = heat.idle();
    assert!(idle.contains(&0));
    heat.cool(&idle).unwrap_err();
    // The file may say cold now, and who asks may not be told otherwise, even if it could be written to again.
    breaks.0.store(false, SeqCst);
    let went = Arc::new(AtomicU32::new(0));
    let goes = Arc::clone(&went);
    heat.hold(
        write,
        Instant::now(),
        Box::new(move |_| {
            goes.fetch_add(1, SeqCst);
        }),
    );
    assert!(matches!(heat.serve(false), Served::Failed(_)));
    assert!(!heat.admits(write) && went.load(SeqCst) == 0);
    heat.ensure(std::iter::once(write)).unwrap_err();
    heat.give_up();
    assert!(heat.admits(write) && went.load(SeqCst) == 1);
}
