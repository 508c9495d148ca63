//! What a restored image holds: file systems are checked and read on the host without mounting them, so that no test
//! needs privileges or can hurt the machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::lab::Lab;
use crate::tools;

/// A clean file system: `e2fsck -fn` finds nothing to say. For disks whose guest unmounted them.
pub fn assert_clean(image: &Path) -> Result<()> {
    let answer = tools::answer(tools::command("e2fsck")?.arg("-fn").arg(image))?;
    if answer.code != 0 {
        bail!("e2fsck -fn {} ended with {}:\n{}", image.display(), answer.code, answer.text);
    }
    Ok(())
}

/// A crash-consistent file system: after the journal is replayed, nothing is left to mend. The image is changed by
/// the replay, as a mount would.
pub fn assert_crash_consistent(image: &Path) -> Result<()> {
    let replay = tools::answer(tools::command("e2fsck")?.args(["-y", "-E", "journal_only"]).arg(image))?;
    if replay.code & !1 != 0 {
        bail!("journal replay on {} ended with {}:\n{}", image.display(), replay.code, replay.text);
    }
    assert_clean(image)
}

/// Everything in the root folder of the file system, copied out into `name` in the lab.
pub fn extract(lab: &Lab, image: &Path, name: &str) -> Result<PathBuf> {
    let folder = lab.path(name);
    fs::create_dir(&folder)?;
    let order = format!("rdump / {}", folder.display());
    let text = tools::run(tools::command("debugfs")?.arg("-R").arg(order).arg(image))?;
    if text.lines().any(|line| line.contains("rdump:") || line.contains("while ")) {
        bail!("debugfs could not read {}:\n{text}", image.display());
    }
    Ok(folder)
}
