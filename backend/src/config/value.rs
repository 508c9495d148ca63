//! Single values: switches, numbers, sizes, names.

use std::path::PathBuf;
use std::time::Duration;

use super::error::ConfigError;

/// Queues a disk may have: a thread each.
const MAX_QUEUES: u16 = 64;
/// The largest ring that virtio knows.
const MAX_QUEUE_SIZE: u16 = 32768;
/// What the system's affinity masks have room for.
const MAX_CPUS: usize = 1024;
const MAX_POLL_MICROS: u64 = 1000;

fn bad(key: &str, value: &str, expected: &'static str) -> ConfigError {
    ConfigError::BadValue { key: key.to_owned(), value: value.to_owned(), expected }
}

/// `on` or `off`.
///
/// # Errors
/// [`ConfigError::BadValue`] for anything else.
pub fn parse_switch(key: &str, value: &str) -> Result<bool, ConfigError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(bad(key, value, "on or off")),
    }
}

/// A size in bytes, with K, M, G or T for powers of 1024.
///
/// # Errors
/// [`ConfigError::BadValue`] for anything else, for zero, and for more than 2^63-1.
pub fn parse_size(key: &str, value: &str) -> Result<u64, ConfigError> {
    let (digits, shift) = match value.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&value[..at], 10),
        Some((at, 'm' | 'M')) => (&value[..at], 20),
        Some((at, 'g' | 'G')) => (&value[..at], 30),
        Some((at, 't' | 'T')) => (&value[..at], 40),
        _ => (value, 0),
    };
    number(digits)
        .and_then(|n: u64| n.checked_mul(1 << shift))
        .filter(|n| (1..=i64::MAX as u64).contains(n))
        .ok_or_else(|| bad(key, value, "a size in bytes above zero, such as 512M or 10G"))
}

/// Decimal digits alone: no sign, no space.
fn number<T: std::str::FromStr>(digits: &str) -> Option<T> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

pub(super) fn queues(key: &str, value: &str) -> Result<u16, ConfigError> {
    number(value).filter(|n| (1..=MAX_QUEUES).contains(n)).ok_or_else(|| bad(key, value, "a number from 1 to 64"))
}

pub(super) fn queue_size(key: &str, value: &str) -> Result<u16, ConfigError> {
    number(value)
        .filter(|n: &u16| n.is_power_of_two() && *n <= MAX_QUEUE_SIZE)
        .ok_or_else(|| bad(key, value, "a power of two from 1 to 32768"))
}

/// Processors, as `2`, `0-3` or `0-1+6`; a comma would end the option.
pub(super) fn cpus(key: &str, value: &str) -> Result<Vec<usize>, ConfigError> {
    let part = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = number(first)?..=number(last)?;
        (!range.is_empty() && *range.end() < MAX_CPUS).then_some(range)
    };
    let parts: Option<Vec<_>> = value.split('+').map(part).collect();
    let parts = parts.ok_or_else(|| bad(key, value, "processors, such as 2, 0-3 or 0-1+6"))?;
    Ok(parts.into_iter().flatten().collect())
}

/// Microseconds.
pub(super) fn poll(key: &str, value: &str) -> Result<Duration, ConfigError> {
    let micros = number(value).filter(|n| *n <= MAX_POLL_MICROS);
    micros.map(Duration::from_micros).ok_or_else(|| bad(key, value, "microseconds from 0 to 1000"))
}

pub(super) fn path(key: &str, value: &str) -> Result<PathBuf, ConfigError> {
    if value.is_empty() || value.contains('\0') {
        return Err(bad(key, value, "a path"));
    }
    Ok(PathBuf::from(value))
}

/// An id as QEMU takes it.
pub(super) fn id(key: &str, value: &str) -> Result<String, ConfigError> {
    let mut chars = value.chars();
    let well_formed = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if !well_formed {
        let expected = "a letter, then letters, digits, '-', '.' and '_'";
        return Err(bad(key, value, expected));
    }
    Ok(value.to_owned())
}

/// What a guest reads as the disk's serial number.
pub(super) fn serial(key: &str, value: &str) -> Result<String, ConfigError> {
    let fits = value.len() <= crate::device::request::ID_BYTES;
    if !fits || value.chars().any(char::is_control) {
        return Err(bad(key, value, "at most 20 bytes of text"));
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes_and_limits() {
        let size = |v| parse_size("s", v).ok();
        assert_eq!(size("1"), Some(1));
        assert_eq!(size("4k"), Some(4096));
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("10G"), Some(10 << 30));
        assert_eq!(size("2T"), Some(2 << 40));
        let wrong = "0|0G|G|-1|+1|1.5G|1 G|10GB|9223372036854775808|16777216T|é||";
        for text in wrong.split('|') {
            assert_eq!(size(text), None, "{text}");
        }
    }

    #[test]
    fn processors_are_numbers_and_ranges() {
        let cpus = |v| super::cpus("cpus", v).ok();
        assert_eq!(cpus("2"), Some(vec![2]));
        assert_eq!(cpus("0-3"), Some(vec![0, 1, 2, 3]));
        assert_eq!(cpus("6+0-1+6"), Some(vec![6, 0, 1, 6]));
        for wrong in ["", "+", "0-", "-1", "3-2", "0,1", "1024", "0-1024", "a", "0--1", "1+"] {
            assert_eq!(cpus(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn polling_is_bounded() {
        assert_eq!(poll("poll", "50").ok(), Some(Duration::from_micros(50)));
        assert_eq!(poll("poll", "0").ok(), Some(Duration::ZERO));
        assert!(["", "1001", "-1", "1ms"].iter().all(|wrong| poll("poll", wrong).is_err()));
    }

    #[test]
    fn ids_are_those_of_qemu() {
        for good in ["a", "drive0", "a-b.c_D9"] {
            assert!(id("id", good).is_ok(), "{good}");
        }
        for wrong in ["", "0a", "-a", "a b", "a/b", "ä", "a,b"] {
            assert!(id("id", wrong).is_err(), "{wrong}");
        }
    }
}
