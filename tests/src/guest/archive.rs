//! Writes a `newc` cpio archive, the format of a Linux initramfs (kernel: Documentation/driver-api/early-userspace).
//!
//! Written here so that no archiver is needed, and device nodes need no privileges. Knows nothing of what it packs.

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
    folders: Vec<String>,
}

const FOLDER: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// A regular, executable file; its folders are made as needed. `path` has no leading slash.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.folders_of(path);
        self.entry(path, EXECUTABLE, content, (0, 0));
    }

    /// An empty folder.
    pub fn folder(&mut self, path: &str) {
        self.folders_of(&format!("{path}/"));
    }

    /// A character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.folders_of(path);
        self.entry(path, CHARACTER_DEVICE, &[], (major, minor));
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        // Whole blocks, so that archives can be concatenated.
        self.pad(512);
        self.bytes
    }

    fn folders_of(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            let folder = &path[..end];
            if !self.folders.iter().any(|known| known == folder) {
                self.folders.push(folder.to_owned());
                self.entry(folder, FOLDER, &[], (0, 0));
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.next_inode += 1;
        let links = 1;
        let fields = [
            self.next_inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            content.len() as u32,
            0, // device of the archive
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // check sum, unused in this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let length = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(length, 0);
    }
}
