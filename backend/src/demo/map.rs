//! A picture of a disk's dirty clusters for the terminal: 64 columns, the whole disk from the top left to the bottom
//! right, darker where more is dirty. Pure: `story` brings the dirty ranges and prints the lines.

/// Characters of a line of the picture, without its label.
pub const COLUMNS: usize = 64;

/// Lines.
const ROWS: usize = 8;

/// Clean, then up to a quarter dirty, up to a half, up to three quarters, more.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];

/// What the shades mean.
pub const LEGEND: &str = "· clean   ░ up to 25 % dirty   ▒ 50 %   ▓ 75 %   █ more";

/// Draws the dirty ranges `(start, length)`, in bytes, of a disk of `size` bytes; they may come in any order, without
/// overlap. Each line begins with the address in MiB of its first cell.
pub fn render(dirty: impl IntoIterator<Item = (u64, u64)>, size: u64) -> Vec<String> {
    let cells = COLUMNS * ROWS;
    // Cell k begins at k / cells of the disk, exactly.
    let begin = |cell: usize| (u128::from(size) * cell as u128 / cells as u128) as u64;
    let mut bytes = vec![0u64; cells];
    for (start, len) in dirty {
        let end = (start + len).min(size);
        let mut cell = (u128::from(start) * cells as u128 / u128::from(size.max(1))) as usize;
        // Rounding may have put it one too early.
        while cell + 1 < cells && begin(cell + 1) <= start {
            cell += 1;
        }
        while cell < cells && begin(cell) < end {
            bytes[cell] += end.min(begin(cell + 1)) - start.max(begin(cell));
            cell += 1;
        }
    }
    let shade = |cell: usize| match (bytes[cell], begin(cell + 1) - begin(cell)) {
        (0, _) => SHADES[0],
        (dirty, room) => SHADES[(dirty * 4).div_ceil(room) as usize],
    };
    let row = |row: usize| {
        let first = row * COLUMNS;
        let line: String = (first..first + COLUMNS).map(shade).collect();
        format!("{:>7} MiB {line}", begin(first) >> 20)
    };
    (0..ROWS).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    /// One cell a MiB.
    const SIZE: u64 = (COLUMNS * ROWS) as u64 * MIB;

    fn drawn(dirty: &[(u64, u64)], size: u64) -> String {
        let lines = render(dirty.iter().copied(), size);
        assert_eq!(lines.len(), ROWS);
        lines
            .iter()
            .map(|line| {
                assert!(line.chars().count() < 80, "{line}");
                line.chars().skip(line.chars().count() - COLUMNS).collect::<String>()
            })
            .collect()
    }

    #[test]
    fn the_darker_the_dirtier() {
        let quarter = MIB / 4;
        let dirty = [1, quarter, quarter + 1, 2 * quarter, 3 * quarter, 3 * quarter + 1, MIB];
        let ranges: Vec<_> = dirty.iter().enumerate().map(|(cell, len)| (cell as u64 * MIB, *len)).collect();
        let picture = drawn(&ranges, SIZE);
        assert!(picture.starts_with("░░▒▒▓██·"), "{picture}");
        assert!(picture.chars().skip(8).all(|cell| cell == '·'));
    }

    #[test]
    fn a_range_is_drawn_in_every_cell_that_it_touches() {
        let picture = drawn(&[(63 * MIB - 1, 2 * MIB + 2), (SIZE - 1, 1)], SIZE);
        assert_eq!(picture.chars().collect::<Vec<_>>()[61..67], ['·', '░', '█', '█', '░', '·']);
        assert!(picture.ends_with("·░"));
    }

    #[test]
    fn whole_and_odd_disks_are_drawn_to_their_ends() {
        for size in [SIZE, 64 * MIB, 100 * MIB + 512, 512] {
            assert!(drawn(&[(0, size)], size).chars().all(|cell| cell == '█' || size < SIZE), "{size}");
            assert!(drawn(&[(0, size)], size).ends_with('█'), "{size}");
            assert!(drawn(&[], size).chars().all(|cell| cell == '·'));
        }
    }

    #[test]
    fn lines_are_labelled_with_their_address() {
        let lines = render([], SIZE);
        assert!(lines[0].starts_with("      0 MiB "), "{}", lines[0]);
        assert!(lines[7].starts_with("    448 MiB "), "{}", lines[7]);
    }
}
