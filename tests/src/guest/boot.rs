//! What boots, and the QEMU command line that boots it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::lab::Disk;
use crate::tools;

/// Kernel, modules and what else the environment names.
#[derive(Debug)]
pub struct Image {
    /// The kernel to boot.
    pub kernel: PathBuf,
    /// Modules to load, in order; none for a kernel that has its drivers built in.
    pub modules: Vec<PathBuf>,
    /// An initramfs to lie beneath the harness's own.
    pub initrd: Option<PathBuf>,
    /// A raw image whose userland runs the shell lines.
    pub rootfs: Option<PathBuf>,
}

/// What the guest needs of its kernel.
const DRIVERS: &[&str] = &["virtio_pci", "virtio_blk", "ext4"];

impl Image {
    /// Kernel and images from the environment, Debian's cloud kernel where it names none.
    pub fn from_environment() -> Result<Image> {
        let named = |key: &str| -> Result<Option<PathBuf>> {
            let Some(value) = std::env::var_os(key).filter(|value| !value.is_empty()) else {
                return Ok(None);
            };
            let path = PathBuf::from(value);
            if !path.exists() {
                bail!("{key} names {}, which does not exist", path.display());
            }
            Ok(Some(path))
        };
        let (kernel, default_modules) = match named("BLKMARK_GUEST_KERNEL")? {
            Some(kernel) => (kernel, None),
            None => cloud_kernel().map(|(kernel, modules)| (kernel, Some(modules)))?,
        };
        let modules = match named("BLKMARK_GUEST_MODULES")?.or(default_modules) {
            Some(folder) => drivers(&folder)?,
            None => Vec::new(),
        };
        Ok(Image { kernel, modules, initrd: named("BLKMARK_GUEST_INITRD")?, rootfs: named("BLKMARK_GUEST_ROOTFS")? })
    }
}

/// The newest Debian cloud kernel that has its modules beside it.
fn cloud_kernel() -> Result<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/boot").into_iter().flatten() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(version) = name.strip_prefix("vmlinuz-")
            && version.contains("-cloud-")
        {
            let modules = Path::new("/lib/modules").join(version);
            if modules.is_dir() {
                found.push((Path::new("/boot").join(&name), modules));
            }
        }
    }
    found.sort();
    found.pop().context(
        "no Debian cloud kernel in /boot: install the package linux-image-cloud-amd64 (scripts/setup does), \
         or name a kernel in BLKMARK_GUEST_KERNEL",
    )
}

/// The module files behind [`DRIVERS`], in the order they have to be loaded.
fn drivers(folder: &Path) -> Result<Vec<PathBuf>> {
    // modprobe takes a root and a version, not a folder.
    let version = folder.file_name().context("BLKMARK_GUEST_MODULES names no folder")?;
    let root = match folder.strip_prefix("/lib/modules") {
        Ok(_) => PathBuf::from("/"),
        Err(_) => match folder.ancestors().nth(3) {
            Some(root) if folder.parent().is_some_and(|up| up.ends_with("lib/modules")) => root.to_owned(),
            _ => bail!("BLKMARK_GUEST_MODULES has to be some lib/modules/VERSION, not {}", folder.display()),
        },
    };
    let mut files = Vec::new();
    for driver in DRIVERS {
        let text = tools::run(
            tools::command("modprobe")?.arg("-d").arg(&root).arg("-S").arg(version).args(["--show-depends", driver]),
        )?;
        for line in text.lines() {
            let Some(file) = line.strip_prefix("insmod ") else {
                continue; // built in
            };
            let file = PathBuf::from(file.trim());
            if file.extension().is_none_or(|end| end != "ko") {
                bail!("{} is compressed: the guest cannot load it", file.display());
            }
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// QEMU with these disks; `orders` is the socket that the guest's second serial port is connected to.
pub fn qemu(image: &Image, disks: &[Disk], initrd: &Path, console: &Path, orders: &Path) -> Result<Command> {
    let mut command = tools::command("qemu-system-x86_64")?;
    let mut kernel_line = "console=ttyS0 quiet panic=-1 rdinit=/blkmark/init".to_owned();
    if image.rootfs.is_some() {
        kernel_line.push_str(&format!(" blkmark.root=/dev/vd{}", letter(disks.len())?));
    }
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "256"])
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
        .args(["-machine", "q35,memory-backend=mem"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &kernel_line])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-chardev")
        .arg(format!("socket,id=orders,path={}", orders.display()))
        .args(["-serial", "chardev:orders"]);
    for (index, disk) in disks.iter().enumerate() {
        letter(index)?;
        command
            .arg("-chardev")
            .arg(format!("socket,id=disk{index},path={},reconnect-ms=1000", disk.socket.display()))
            .arg("-device")
            .arg(format!("vhost-user-blk-pci,chardev=disk{index},num-queues={},addr={:#x}", disk.queues, index + 4));
    }
    if let Some(rootfs) = &image.rootfs {
        command
            .arg("-drive")
            .arg(format!("if=none,id=root,format=raw,snapshot=on,file={}", rootfs.display()))
            .args(["-device", "virtio-blk-pci,drive=root,addr=0x1c"]);
    }
    command.stdin(Stdio::null());
    Ok(command)
}

/// The letter in the name of the guest's disk.
fn letter(index: usize) -> Result<char> {
    match u8::try_from(index) {
        Ok(index @ 0..16) => Ok(char::from(b'a' + index)),
        _ => bail!("a guest takes at most 16 disks"),
    }
}
