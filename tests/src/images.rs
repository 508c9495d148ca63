//! Backup images, as `qemu-img` makes, checks, restores and compares them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tools::{command, run};

/// An empty qcow2 image on top of `base`, as an incremental's target.
pub fn create_on_top(base: &Path, base_format: &str, image: &Path) -> Result<()> {
    let args = ["create", "-q", "-f", "qcow2", "-F", base_format, "-b"];
    run(command("qemu-img")?.args(args).arg(base).arg(image))?;
    Ok(())
}

/// The image with everything beneath it as one raw file beside it.
pub fn restore(image: &Path) -> Result<PathBuf> {
    let raw = image.with_extension("restored");
    run(command("qemu-img")?.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw))?;
    Ok(raw)
}

/// Fails unless `qemu-img check` finds nothing.
pub fn assert_sound(image: &Path) -> Result<()> {
    run(command("qemu-img")?.args(["check", "-f", "qcow2"]).arg(image))?;
    Ok(())
}

/// Fails unless the qcow2 chain reads as the raw disk does.
pub fn assert_equal(image: &Path, disk: &Path) -> Result<()> {
    run(command("qemu-img")?.args(["compare", "-f", "qcow2", "-F", "raw"]).arg(image).arg(disk))
        .with_context(|| format!("{} is not what {} holds", image.display(), disk.display()))?;
    Ok(())
}
