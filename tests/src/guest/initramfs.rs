//! Makes the guest's initramfs on the spot: busybox, the drivers, and the tools that make and check a file system.
//!
//! All of it lies under `/blkmark`, so that it can lie on top of another initramfs without touching what that holds.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::archive::Archive;
use super::boot::Image;
use crate::tools;

/// Tools that come with their shared libraries: what they are on the host, in the guest, and the arguments that go
/// before all others. The guest's names are none of busybox's, whose shell would take its own.
const LINKED_TOOLS: &[(&str, &str, &str)] = &[("mke2fs", "mkfs.ext4", "-t ext4"), ("e2fsck", "e2fsck", "")];

/// The initramfs for `image`, the one it names (if any) beneath.
pub fn build(image: &Image) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.folder("dev");
    archive.device("dev/console", 5, 1);
    archive.file("blkmark/init", include_bytes!("init.sh"));
    archive.file("blkmark/bin/busybox", &busybox()?);

    let mut order = String::new();
    for module in &image.modules {
        let name = file_name(module)?;
        archive.file(&format!("blkmark/modules/{name}"), &read(module)?);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("blkmark/modules.order", order.as_bytes());

    let mut packed: Vec<PathBuf> = Vec::new();
    for (tool, name, first) in LINKED_TOOLS {
        let binary = tools::find(tool)?;
        let (loader, libraries) = linked(&binary)?;
        archive.file(&format!("blkmark/lib/{tool}"), &read(&binary)?);
        // Started through the loader, so that no library has to lie in the guest's own folders.
        let start = format!(
            "#!/blkmark/bin/busybox sh\nexec /blkmark/lib/{} --library-path /blkmark/lib /blkmark/lib/{tool} {first} \"$@\"\n",
            file_name(&loader)?
        );
        archive.file(&format!("blkmark/sbin/{name}"), start.as_bytes());
        for library in libraries.into_iter().chain([loader]) {
            if !packed.contains(&library) {
                archive.file(&format!("blkmark/lib/{}", file_name(&library)?), &read(&library)?);
                packed.push(library);
            }
        }
    }

    let mut bytes = match &image.initrd {
        Some(initrd) => read(initrd)?,
        None => Vec::new(),
    };
    // The kernel finds the next archive at a multiple of four.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(&archive.finish());
    Ok(bytes)
}

/// busybox has to be linked statically: it runs before there is anything else.
fn busybox() -> Result<Vec<u8>> {
    let path = tools::find("busybox")?;
    let answer = tools::answer(tools::command("ldd")?.arg(&path))?;
    if answer.code == 0 && answer.text.contains("=>") {
        bail!("{} is not static: install the package busybox-static", path.display());
    }
    read(&path)
}

/// The loader and the shared libraries of a program, as `ldd` finds them.
fn linked(program: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let text = tools::run(tools::command("ldd")?.arg(program))?;
    let mut loader = None;
    let mut libraries = Vec::new();
    for line in text.lines() {
        if let Some((_, found)) = line.split_once("=>") {
            let path = found.split_whitespace().next().unwrap_or_default();
            if !path.starts_with('/') {
                bail!("{} lacks a library: {line}", program.display());
            }
            libraries.push(PathBuf::from(path));
        } else if let Some(path) = line.split_whitespace().next().filter(|path| path.starts_with('/')) {
            loader = Some(PathBuf::from(path));
        }
    }
    let loader = loader.with_context(|| format!("no loader in what ldd says of {}", program.display()))?;
    Ok((loader, libraries))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}
