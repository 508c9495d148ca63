//! Options as somebody may mistype them: the argument of `--disk`, and the TOML file.
//!
//! Promises: what is taken satisfies the limits that its parts have alone; every refusal is one line; what both ways of
//! writing a disk can say, they say alike.

use super::{DiskOptions, ServeOptions, SocketSpec};

/// The first byte chooses: a `--disk` argument or a file.
pub fn config(data: &[u8]) {
    let Some((first, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    if first & 1 == 0 { disk(text) } else { file(text) }
}

fn disk(text: &str) {
    let disk = match DiskOptions::parse(text) {
        Ok(disk) => disk,
        Err(error) => return one_line(&error.to_string(), text),
    };
    sane(&disk);
    let mut file = String::from("[[disk]]\n");
    for (key, value) in super::pairs::parse(text).expect("it was parsed before") {
        let value = toml::Value::String(value);
        file.push_str(&format!("{key} = {value}\n"));
    }
    let same = ServeOptions::from_toml(&file).unwrap_or_else(|error| panic!("{file}{error}"));
    assert_eq!(same.disks, [disk]);
}

fn file(text: &str) {
    match ServeOptions::from_toml(text) {
        Ok(options) => {
            options.disks.iter().for_each(sane);
            let both = options.clone().overlaid_with(ServeOptions::default());
            assert_eq!(both, options);
            if let Err(error) = options.check() {
                one_line(&error.to_string(), text);
            }
        }
        Err(error) => one_line(&error.to_string(), text),
    }
}

fn sane(disk: &DiskOptions) {
    assert!(disk.id.starts_with(|c: char| c.is_ascii_alphabetic()), "{disk:?}");
    assert!((1..=64).contains(&disk.queues) && disk.queue_size.is_power_of_two(), "{disk:?}");
    assert!(disk.serial.as_ref().is_none_or(|serial| serial.len() <= 20), "{disk:?}");
    assert!(disk.scratch_size.is_none_or(|size| size > 0), "{disk:?}");
    let socket = match &disk.socket {
        SocketSpec::Path(path) => path,
        SocketSpec::Fd(fd) => panic!("descriptor {fd} out of a text"),
    };
    assert!(!disk.path.as_os_str().is_empty() && !socket.as_os_str().is_empty(), "{disk:?}");
}

/// Unless what was mistyped has several itself.
fn one_line(message: &str, text: &str) {
    assert!(!message.is_empty() && (!message.contains('\n') || text.contains(['\n', '\\'])), "{message:?}");
}
