//! What happens when guest memory shrinks under our hands: a front end that cuts its file short makes every touch behind the
//! new end a SIGBUS, which would end the process and with it every disk.
//!
//! Regions whose files are not sealed against that are watched. The signal's handler puts a page of zeroes where the touch
//! was, and notes on the connection that its memory is lost; the queue thread, which goes on with that page, sees the
//! note and ends the connection. A SIGBUS anywhere else is what it always was: the end.
//!
//! Invariant: a mapping that can fault is in the table for as long as anybody can touch it. An entry is taken out only once
//! its mapping is gone, when the next one comes in.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};

use vm_memory::MmapRegion;

/// How many unsealed regions may be mapped at a time, over all connections.
const SLOTS: usize = 2048;

const PAGE: usize = 4096;

/// What the handler can look at: it may take no lock. Free while `end` is 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicPtr<AtomicBool>,
}

/// What keeps a slot's pointers good.
struct Entry {
    map: Weak<MmapRegion>,
    _lost: Arc<AtomicBool>,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), lost: AtomicPtr::new(std::ptr::null_mut()) }
}; SLOTS];

static BOOKS: Mutex<Vec<Option<Entry>>> = Mutex::new(Vec::new());

/// Watches `map` until it is unmapped; `lost` is set when some of it turns out to be gone.
///
/// # Errors
/// If there are too many such regions, or the handler cannot be installed.
pub(super) fn watch(map: &Arc<MmapRegion>, lost: &Arc<AtomicBool>) -> io::Result<()> {
    install()?;
    let mut books = BOOKS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    books.resize_with(SLOTS, || None);
    for (entry, slot) in books.iter_mut().zip(&TABLE) {
        if entry.as_ref().is_some_and(|entry| entry.map.strong_count() == 0) {
            slot.end.store(0, Ordering::SeqCst);
            *entry = None;
        }
    }
    let free = books.iter().position(Option::is_none);
    let free = free.ok_or_else(|| io::Error::other("too many regions of unsealed guest memory"))?;
    let slot = &TABLE[free];
    let start = map.as_ptr().addr();
    slot.start.store(start, Ordering::SeqCst);
    slot.lost.store(Arc::as_ptr(lost).cast_mut(), Ordering::SeqCst);
    slot.end.store(start + map.size(), Ordering::SeqCst);
    books[free] = Some(Entry { map: Arc::downgrade(map), _lost: Arc::clone(lost) });
    Ok(())
}

fn install() -> io::Result<()> {
    static INSTALLED: Once = Once::new();
    static REFUSED: AtomicBool = AtomicBool::new(false);
    INSTALLED.call_once(|| {
        // SAFETY: `on_sigbus` does only what a signal handler may: atomic loads and stores, and the system calls mmap and
        // sigaction. The structure is plain numbers, for which zero is a value.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
        };
        REFUSED.store(result != 0, Ordering::SeqCst);
    });
    if REFUSED.load(Ordering::SeqCst) {
        return Err(io::Error::other("the handler of SIGBUS could not be installed"));
    }
    Ok(())
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands in a valid siginfo, and a SIGBUS has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    for slot in &TABLE {
        let (start, end) = (slot.start.load(Ordering::SeqCst), slot.end.load(Ordering::SeqCst));
        if !(start..end).contains(&address) {
            continue;
        }
        let page = address - address % PAGE;
        // Of huge pages there is no small piece to replace.
        if zeroes(page, PAGE) || zeroes(start, end - start) {
            // SAFETY: whoever touches the region keeps its mapping, and so the entry and the flag.
            unsafe { (*slot.lost.load(Ordering::SeqCst)).store(true, Ordering::SeqCst) };
            return;
        }
    }
    // Not ours: the same touch comes again, and ends the process as it should.
    // SAFETY: as in `install`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

/// Puts zeroes where guest memory was. Its data is gone already; what is kept is the process.
fn zeroes(start: usize, len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let at = std::ptr::without_provenance_mut(start);
    // SAFETY: the range lies in a mapping of guest memory, to which nobody has references, only raw pointers.
    let result = unsafe { libc::mmap(at, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    result != libc::MAP_FAILED
}
