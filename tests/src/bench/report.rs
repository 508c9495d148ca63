//! Medians, ratios, and how they are shown: tables for people, one JSON document for machines.
//!
//! The baseline is the first contender. A ratio is taken within its round, where noise hits both alike, and the
//! median of the ratios is shown, with the least and the greatest for IOPS.

use std::fmt::Write;

use serde_json::{Value, json};

use super::cell::Cell;
use super::load::Sample;
use super::options::Options;
use super::server::Contender;

/// All rounds of one contender.
pub struct Row {
    /// Who.
    pub contender: Contender,
    /// One a round.
    pub samples: Vec<Sample>,
}

/// All contenders in one cell.
pub struct CellReport {
    /// The disk.
    pub target: String,
    /// The load.
    pub cell: Cell,
    /// The contenders, the baseline first.
    pub rows: Vec<Row>,
}

/// A figure of a sample, with its name.
type Figure = (&'static str, fn(&Sample) -> f64);

const FIGURES: [Figure; 10] = [
    ("iops", |s| s.iops),
    ("mib_per_second", |s| s.bytes_per_second / f64::from(1 << 20)),
    ("p50_us", |s| s.latency.percentile(50.0).as_secs_f64() * 1e6),
    ("p99_us", |s| s.latency.percentile(99.0).as_secs_f64() * 1e6),
    ("p99.9_us", |s| s.latency.percentile(99.9).as_secs_f64() * 1e6),
    ("max_us", |s| s.latency.max().as_secs_f64() * 1e6),
    ("server_cpu_us", |s| s.server_us),
    ("guest_cpu_us", |s| s.guest_us),
    ("others_percent", |s| s.others_percent),
    ("server_mib", |s| s.server_bytes as f64 / f64::from(1 << 20)),
];
const IOPS: usize = 0;
const P50: usize = 2;
const P99: usize = 3;
const SERVER_CPU: usize = 6;
const OTHERS: usize = 8;
const MEMORY: usize = 9;

/// From this share of the processors on, others have a say in IOPS and latency.
const NOISY_PERCENT: f64 = 5.0;

impl Row {
    /// A row to fill.
    pub fn new(contender: Contender) -> Self {
        Row { contender, samples: Vec::new() }
    }

    fn median(&self, figure: usize) -> f64 {
        median(self.samples.iter().map(FIGURES[figure].1).collect())
    }

    /// The rounds' ratios to the baseline's.
    fn ratios(&self, baseline: &Row, figure: usize) -> Vec<f64> {
        let of = FIGURES[figure].1;
        self.samples.iter().zip(&baseline.samples).map(|(mine, base)| of(mine) / of(base)).collect()
    }

    fn ratio(&self, baseline: &Row, figure: usize) -> f64 {
        median(self.ratios(baseline, figure))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// Tables for people.
pub fn tables(reports: &[CellReport]) -> String {
    let mut out = String::new();
    for report in reports {
        let Some(baseline) = report.rows.first() else { continue };
        let _ = writeln!(out, "\n{} on {}", report.cell.name(), report.target);
        let _ = writeln!(
            out,
            "  {:<14} {:>7} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>6} {:>6}   {:>5} {:>13} {:>5} {:>5} {:>5}",
            "server",
            "bitmaps",
            "IOPS",
            "MiB/s",
            "p50 us",
            "p99 us",
            "p99.9",
            "max us",
            "CPU/IO",
            "guest",
            "memory",
            "others",
            "IOPS",
            "least..most",
            "p50",
            "p99",
            "CPU"
        );
        for row in &report.rows {
            let f: Vec<f64> = (0..FIGURES.len()).map(|figure| row.median(figure)).collect();
            let _ = write!(
                out,
                "  {:<14} {:>7} {:>9.0} {:>8.0} {:>8.1} {:>8.1} {:>8.1} {:>9.0} {:>8.2} {:>8.2} {:>6.1} {:>5.0}%",
                row.contender.program(),
                row.contender.bitmaps().to_string(),
                f[0],
                f[1],
                f[2],
                f[3],
                f[4],
                f[5],
                f[6],
                f[7],
                f[MEMORY],
                f[OTHERS]
            );
            let mut spread = row.ratios(baseline, IOPS);
            spread.sort_by(f64::total_cmp);
            let _ = writeln!(
                out,
                "   {:>5.2} {:>13} {:>5.2} {:>5.2} {:>5.2}",
                row.ratio(baseline, IOPS),
                match (spread.first(), spread.last()) {
                    (Some(least), Some(most)) => format!("{least:.2}..{most:.2}"),
                    _ => String::new(),
                },
                row.ratio(baseline, P50),
                row.ratio(baseline, P99),
                row.ratio(baseline, SERVER_CPU)
            );
        }
    }
    out.push_str(&summary(reports));
    let noisiest = reports.iter().flat_map(|report| &report.rows).map(|row| row.median(OTHERS)).fold(0.0, f64::max);
    if noisiest > NOISY_PERCENT {
        let _ = writeln!(
            out,
            "\nOther processes used up to {noisiest:.0} % of the processors: where they did, trust the CPU time an I/O, but \
             neither IOPS nor latency."
        );
    }
    out
}

/// One line a contender over all cells: geometric means of the ratios.
fn summary(reports: &[CellReport]) -> String {
    let mut out = String::new();
    let Some(first) = reports.first().filter(|_| reports.len() > 1) else { return out };
    let Some(baseline) = first.rows.first() else { return out };
    let _ = writeln!(
        out,
        "\nall {} cells, geometric mean of the ratios to {}: IOPS (worst cell), CPU time an I/O",
        reports.len(),
        baseline.contender
    );
    for (index, row) in first.rows.iter().enumerate().skip(1) {
        let of = |figure| -> Vec<(f64, String)> {
            reports
                .iter()
                .map(|report| (report.rows[index].ratio(&report.rows[0], figure), report.cell.name()))
                .collect()
        };
        let iops = of(IOPS);
        let mean = |ratios: &[(f64, String)]| {
            (ratios.iter().map(|(ratio, _)| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp()
        };
        if let Some((worst, cell)) = iops.iter().min_by(|a, b| a.0.total_cmp(&b.0)) {
            let _ = writeln!(
                out,
                "  {:<17} IOPS x{:.2} (x{worst:.2} in {cell}), CPU x{:.2}",
                row.contender.to_string(),
                mean(&iops),
                mean(&of(SERVER_CPU))
            );
        }
    }
    out
}

/// Everything, for machines.
pub fn json(options: &Options, reports: &[CellReport]) -> Value {
    let figures = |of: &dyn Fn(usize) -> f64| -> Value {
        FIGURES.iter().enumerate().map(|(i, (name, _))| ((*name).to_owned(), json!(of(i)))).collect()
    };
    let cells: Vec<Value> = reports
        .iter()
        .map(|report| {
            let rows: Vec<Value> = report
                .rows
                .iter()
                .map(|row| {
                    let base = &report.rows[0];
                    let rounds: Vec<Value> =
                        row.samples.iter().map(|sample| figures(&|figure| FIGURES[figure].1(sample))).collect();
                    json!({
                        "server": row.contender.program(),
                        "bitmaps": row.contender.bitmaps().count,
                        "persistent": row.contender.bitmaps().persistent,
                        "median": figures(&|figure| row.median(figure)),
                        "ratio": figures(&|figure| row.ratio(base, figure)),
                        "rounds": rounds,
                    })
                })
                .collect();
            json!({
                "target": report.target,
                "cell": report.cell.name(),
                "block": report.cell.block,
                "depth": report.cell.depth,
                "queues": report.cell.queues,
                "servers": rows,
            })
        })
        .collect();
    json!({
        "direct": options.direct(),
        "seconds": options.seconds(),
        "rounds": options.rounds(),
        "disks": options.disks(),
        "size": options.size,
        "processors": std::thread::available_parallelism().map(usize::from).unwrap_or(0),
        "cells": cells,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cell::Pattern;
    use crate::bench::server::Bitmaps;
    use blkmark::frontend::Histogram;

    fn sample(iops: f64, server_us: f64) -> Sample {
        let mut latency = Histogram::default();
        latency.record(std::time::Duration::from_micros(100));
        Sample {
            iops,
            bytes_per_second: iops * 4096.0,
            latency,
            server_us,
            guest_us: 1.0,
            others_percent: 0.0,
            server_bytes: 0,
        }
    }

    fn report() -> CellReport {
        let row = |bitmaps, samples| Row {
            contender: Contender::Blkmark { other: false, bitmaps: Bitmaps { count: bitmaps, persistent: true } },
            samples,
        };
        CellReport {
            target: "disk".into(),
            cell: Cell { pattern: Pattern::RandRead, block: 4096, depth: 1, queues: 1 },
            rows: vec![
                row(0, vec![sample(100.0, 2.0), sample(200.0, 2.0), sample(400.0, 2.0)]),
                // Twice the baseline in each round but one, though its median is the baseline's.
                row(1, vec![sample(200.0, 1.0), sample(400.0, 1.0), sample(100.0, 1.0)]),
            ],
        }
    }

    #[test]
    fn ratios_are_paired_by_round() {
        let report = report();
        assert_eq!(report.rows[1].median(IOPS), 200.0);
        assert_eq!(report.rows[1].ratio(&report.rows[0], IOPS), 2.0);
        assert_eq!(report.rows[1].ratio(&report.rows[0], SERVER_CPU), 0.5);
        assert_eq!(report.rows[0].ratio(&report.rows[0], P99), 1.0);
    }

    #[test]
    fn a_noisy_machine_is_told() {
        let mut report = report();
        for sample in &mut report.rows[1].samples {
            sample.others_percent = 37.4;
        }
        let text = tables(&[report]);
        assert!(text.contains("Other processes used up to 37 %"), "{text}");
    }

    #[test]
    fn medians_of_even_numbers_lie_between() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn tables_show_every_contender_and_the_spread() {
        let text = tables(&[report(), report()]);
        assert_eq!(text.matches("0.25..2.00").count(), 2, "{text}");
        assert!(!text.contains("Other processes"), "{text}");
        assert!(text.contains("blkmark/1         IOPS x2.00 (x2.00 in randread-4k-qd1-q1), CPU x0.50"), "{text}");
    }
}
