//! The schedule: which event comes next and how, fixed by the seed and the event's number alone. What came of those before
//! it changes nothing, so that the same seed gives the same events, as far as the clock allows.

use std::time::Duration;

use crate::random::Random;

/// When a killed daemon is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// At once.
    AtOnce,
    /// After a pause.
    After(Duration),
    /// At once, and the new one is killed as soon as it is ready, so many times.
    Twice(u32),
    /// At once, and the new one is killed so long after it was started.
    DuringStart(Duration),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// kill -9 of the daemon.
    KillDaemon(Again),
    /// kill -9 of the daemon so long after a command was sent.
    KillInCommand(Duration),
    /// SIGTERM while a backup runs.
    Terminate,
    /// kill -9 of a guest; of the daemon too, before or after it.
    KillGuest {
        /// Which.
        disk: u8,
        /// Whether the daemon dies too.
        daemon: Option<bool>,
    },
    /// kill -9 of a command line that takes a backup, so long after it was started.
    KillBackupClient(Duration),
    /// kill -9 of a command line that changes bitmaps.
    KillBitmapClient(Duration),
    /// kill -9 of everything, and what is on tmpfs is gone.
    Reboot,
    /// The server of a mirror is killed while a backup goes there.
    TargetGone,
    /// The server of a mirror answers with errors for a while.
    TargetFails,
    /// A backup to where there is no room; kept and tried again elsewhere, or not.
    TargetFull {
        /// Whether it is tried again.
        retry: bool,
    },
    /// The file system of the stores runs full, and the daemon may be killed meanwhile.
    StoreFull {
        /// Whether it is.
        kill: bool,
    },
    /// A disk gets another size; smaller only while it has no guest.
    Resize(u8),
    /// Bitmaps are added, removed, cleared, ...
    Bitmaps,
    /// A job is paused, slowed down or cancelled.
    Job,
    /// A bitmap is compared with what it has to contain.
    LookAtBitmap(u8),
    /// A backup to a mirror.
    Mirror(u8),
}

/// An event, the pause before it, and random numbers for what it does.
#[derive(Debug)]
pub struct Step {
    /// How long nothing is done before.
    pub pause: Duration,
    /// What happens then.
    pub event: Event,
    /// For everything else about it.
    pub random: Random,
}

impl Step {
    /// The step of this number.
    pub fn draw(seed: u64, number: u64, disks: u8) -> Step {
        let mut random = numbers(seed, number);
        let (most, longest) = (random.below(9), 8 + random.below(9));
        let pause = Duration::from_millis(random.below(1 << most));
        let disk = random.below(disks.into()) as u8;
        let short = Duration::from_micros(random.below(1 << longest));
        let event = match random.below(100) {
            0..12 => Event::KillDaemon(Again::AtOnce),
            12..15 => Event::KillDaemon(Again::After(Duration::from_millis(random.below(400)))),
            15..18 => Event::KillDaemon(Again::Twice(1 + random.below(2) as u32)),
            18..22 => Event::KillDaemon(Again::DuringStart(short)),
            22..30 => Event::KillInCommand(short / 4),
            30..33 => Event::Terminate,
            33..38 => Event::KillGuest { disk, daemon: None },
            38..40 => Event::KillGuest { disk, daemon: Some(random.below(2) == 0) },
            40..44 => Event::KillBackupClient(short * 2),
            44..47 => Event::KillBitmapClient(short),
            47..51 => Event::Reboot,
            51..54 => Event::TargetGone,
            54..57 => Event::TargetFails,
            57..60 => Event::TargetFull { retry: random.below(2) == 0 },
            60..63 => Event::StoreFull { kill: random.below(2) == 0 },
            63..65 => Event::Resize(disk),
            65..80 => Event::Bitmaps,
            80..85 => Event::Job,
            85..93 => Event::LookAtBitmap(disk),
            _ => Event::Mirror(disk),
        };
        Step { pause, event, random }
    }
}

/// Random numbers of one purpose.
pub fn numbers(seed: u64, purpose: u64) -> Random {
    let mut state = seed.wrapping_add(purpose.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    Random((state ^ state >> 31) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_seed_fixes_the_schedule_and_every_event_comes() {
        let event = |seed, number| format!("{:?}", Step::draw(seed, number, 2));
        for number in 0..100 {
            assert_eq!(event(7, number), event(7, number));
        }
        assert!((0..100).any(|number| event(7, number) != event(8, number)));
        let kinds: HashSet<_> = (0..4000).map(|n| std::mem::discriminant(&Step::draw(1, n, 2).event)).collect();
        assert_eq!(kinds.len(), 16);
    }
}
