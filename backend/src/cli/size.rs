//! Sizes as people write and read them: `64K`, `1.46 GiB`.

/// Reads a number of bytes with an optional unit: K, M, G or T (powers of 1024), also written KiB and so on.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || "expected a number of bytes, or a number with K, M, G or T".to_owned();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" | "B" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// As [`parse`], for what QMP takes as a signed integer.
pub(super) fn parse_signed(text: &str) -> Result<u64, String> {
    let size = parse(text)?;
    if i64::try_from(size).is_ok() { Ok(size) } else { Err("too large".into()) }
}

/// Writes a size to three digits, or exactly where it is a whole number of its unit.
pub(crate) fn human(bytes: u64) -> String {
    let (shift, unit) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => (10, "KiB"),
        0x10_0000..0x4000_0000 => (20, "MiB"),
        0x4000_0000..0x100_0000_0000 => (30, "GiB"),
        _ => (40, "TiB"),
    };
    if bytes.trailing_zeros() >= shift {
        return format!("{} {unit}", bytes >> shift);
    }
    let value = bytes as f64 / (1u64 << shift) as f64;
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        for (text, size) in [("0", 0), ("512", 512), ("512B", 512), ("64K", 65536), ("64k", 65536), ("1MiB", 1 << 20)] {
            assert_eq!(parse(text), Ok(size), "{text}");
        }
        for wrong in ["", "K", "-1", "1.5G", "64X", "64KB", "iB", "1iB", "99999999999T", "18446744073709551616"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse_signed("9223372036854775808").is_err());
    }

    #[test]
    fn sizes_are_shown_short() {
        let shown = [(0, "0 B"), (1023, "1023 B"), (65536, "64 KiB"), (1 << 30, "1 GiB"), (1500 << 20, "1.46 GiB")];
        for (size, text) in shown {
            assert_eq!(human(size), text);
        }
    }
}
