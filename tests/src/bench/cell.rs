//! The cells of the benchmark's matrix.

use anyhow::{Result, bail};

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Reads from the beginning to the end, again and again.
    SeqRead,
    /// Writes from the beginning to the end, again and again.
    SeqWrite,
}

impl Pattern {
    /// Whether the places are random.
    pub fn random(self) -> bool {
        matches!(self, Pattern::RandRead | Pattern::RandWrite)
    }

    /// Whether the disk is written.
    pub fn writes(self) -> bool {
        matches!(self, Pattern::RandWrite | Pattern::SeqWrite)
    }

    fn name(self) -> &'static str {
        match self {
            Pattern::RandRead => "randread",
            Pattern::RandWrite => "randwrite",
            Pattern::SeqRead => "seqread",
            Pattern::SeqWrite => "seqwrite",
        }
    }
}

/// One load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// What the guest does.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block: usize,
    /// Requests in flight in each queue.
    pub depth: usize,
    /// Virtqueues, a guest thread each.
    pub queues: usize,
}

impl Cell {
    /// Its name on the command line and in reports, as `randread-4k-qd32-q1`.
    pub fn name(&self) -> String {
        let block =
            if self.block >= 1 << 20 { format!("{}m", self.block >> 20) } else { format!("{}k", self.block >> 10) };
        format!("{}-{block}-qd{}-q{}", self.pattern.name(), self.depth, self.queues)
    }
}

/// The whole matrix.
pub fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    for queues in [1, 2] {
        for depth in [1, 32, 128] {
            for pattern in [Pattern::RandRead, Pattern::RandWrite] {
                cells.push(Cell { pattern, block: 4 << 10, depth, queues });
            }
        }
    }
    for (block, depth) in [(64 << 10, 16), (1 << 20, 8)] {
        for pattern in [Pattern::SeqRead, Pattern::SeqWrite] {
            cells.push(Cell { pattern, block, depth, queues: 1 });
        }
    }
    cells
}

const QUICK: [&str; 5] = [
    "randread-4k-qd1-q1",
    "randread-4k-qd32-q1",
    "randwrite-4k-qd32-q1",
    "randwrite-4k-qd128-q2",
    "seqwrite-1m-qd8-q1",
];

/// The cells to run: all or the quick ones, of those whose name contains one of `wanted` (any, if it is empty).
pub fn select(quick: bool, wanted: &[String]) -> Result<Vec<Cell>> {
    let chosen: Vec<Cell> = all()
        .into_iter()
        .filter(|cell| !quick || QUICK.contains(&cell.name().as_str()))
        .filter(|cell| wanted.is_empty() || wanted.iter().any(|part| cell.name().contains(part.as_str())))
        .collect();
    if let Some(part) = wanted.iter().find(|part| !chosen.iter().any(|cell| cell.name().contains(part.as_str()))) {
        let names: Vec<String> = all().iter().map(Cell::name).collect();
        let hint = if quick { " (--quick runs only some)" } else { "" };
        bail!("--only {part} selects no cell{hint}; there are {}", names.join(", "));
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_cells_are_cells() {
        let names: Vec<String> = all().iter().map(Cell::name).collect();
        assert!(QUICK.iter().all(|quick| names.iter().any(|name| name == quick)), "{names:?}");
        assert_eq!(select(true, &[]).unwrap().len(), QUICK.len());
        assert_eq!(select(false, &[]).unwrap().len(), 16);
    }

    #[test]
    fn a_filter_that_selects_nothing_is_an_error() {
        assert!(select(false, &["qd32".into()]).unwrap().len() == 4);
        let error = select(false, &["qd32".into(), "qd33".into()]).unwrap_err().to_string();
        assert!(error.starts_with("--only qd33 selects no cell"), "{error}");
    }
}
