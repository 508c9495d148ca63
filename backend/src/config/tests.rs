//! What an operator may write, and what he is told when he may not.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

const LEAST: &str = "id=drive0,path=disk.raw,socket=s";

fn with(more: &str) -> Result<DiskOptions, ConfigError> {
    DiskOptions::parse(&format!("{LEAST},{more}"))
}

fn error(text: &str) -> String {
    DiskOptions::parse(text).unwrap_err().to_string()
}

#[test]
fn a_disk_needs_an_id_a_path_and_a_socket() {
    let disk = DiskOptions::parse(LEAST).unwrap();
    let expected = DiskOptions::new("drive0", "disk.raw", SocketSpec::Path("s".into()));
    assert_eq!(disk, expected);
    assert_eq!((disk.queues, disk.queue_size), (1, 1024));
    assert_eq!((disk.read_only, disk.direct), (false, None));
    assert_eq!(disk.bitmaps, Bitmaps::Beside);
    for key in ["id", "path", "socket"] {
        let text: Vec<_> = LEAST.split(',').filter(|p| !p.starts_with(key)).collect();
        let told = error(&text.join(","));
        let begin = format!("missing key '{key}'; known keys: id, ");
        assert!(told.starts_with(&begin), "{told}");
    }
}

#[test]
fn every_key_is_taken() {
    let disk = with(
        "readonly=on,direct=off,queues=4,queue-size=128,serial=S-1,\
         bitmaps=/b,scratch=/tmp,scratch-size=10G,cpus=1-2,poll=20",
    )
    .unwrap();
    assert_eq!(
        disk,
        DiskOptions {
            read_only: true,
            direct: Some(false),
            queues: 4,
            queue_size: 128,
            serial: Some("S-1".into()),
            bitmaps: Bitmaps::At("/b".into()),
            scratch: Some("/tmp".into()),
            scratch_size: Some(10 << 30),
            cpus: vec![1, 2],
            poll: std::time::Duration::from_micros(20),
            ..DiskOptions::parse(LEAST).unwrap()
        }
    );
    assert_eq!(with("bitmaps=off").unwrap().bitmaps, Bitmaps::Off);
}

/// A disk that keeps nothing can be asked for by its own name alone, never by a path that happens to look like it.
#[test]
fn a_null_disk_is_no_path() {
    let disk = DiskOptions::parse("id=a,null=1G,socket=/s").unwrap();
    assert_eq!((disk.null, disk.bitmaps), (Some(1 << 30), Bitmaps::Off));
    for path in ["null", "null:1G", "null-co://"] {
        assert_eq!(DiskOptions::parse(&format!("id=a,path={path},socket=/s")).unwrap().null, None);
    }
    assert_eq!(DiskOptions::parse("id=a,path=/x,null=1G,socket=/s"), Err(ConfigError::OneMedium));
    assert_eq!(
        DiskOptions::parse("id=a,socket=/s").unwrap_err().to_string().split(';').next(),
        Some("missing key 'path'")
    );
}

#[test]
fn doubled_commas_are_commas_and_values_may_hold_equal_signs() {
    let disk = DiskOptions::parse("id=a,path=/x,,y,,,socket=/s=t,serial=,,").unwrap();
    assert_eq!(disk.path, Path::new("/x,y,"));
    assert_eq!(disk.socket, SocketSpec::Path("/s=t".into()));
    assert_eq!(disk.serial.as_deref(), Some(","));
}

#[test]
fn a_misspelt_key_is_named_with_the_one_it_looks_like() {
    for (slip, meant) in [
        ("qeues", "queues"),
        ("read-only", "readonly"),
        ("queue_size", "queue-size"),
        ("Serial", "serial"),
        ("scratchsize", "scratch-size"),
        ("bitmap", "bitmaps"),
    ] {
        let told = error(&format!("{LEAST},{slip}=1"));
        let begin = format!("unknown key '{slip}' (did you mean '{meant}'?); known keys: id, ");
        assert!(told.starts_with(&begin), "{told}");
    }
    let told = error(&format!("{LEAST},colour=red"));
    assert!(told.starts_with("unknown key 'colour'; known keys: "), "{told}");
}

#[test]
fn what_is_not_key_and_value_once_is_refused() {
    let told = |more: &str| with(more).unwrap_err().to_string();
    assert_eq!(told("readonly"), "'readonly' is not of the form key=value");
    assert_eq!(told("=on"), "'=on' is not of the form key=value");
    assert_eq!(told(""), "'' is not of the form key=value");
    assert_eq!(told("id=b"), "key 'id' is given twice");
}

#[test]
fn a_bad_value_is_named_with_what_was_expected() {
    for bad in [
        "readonly=yes",
        "readonly=",
        "direct=1",
        "queues=0",
        "queues=65",
        "queues=two",
        "queues=-1",
        "queue-size=100",
        "queue-size=0",
        "queue-size=65536",
        "serial=123456789012345678901",
        "bitmaps=",
        "scratch=",
        "scratch-size=0",
        "scratch-size=lots",
    ] {
        let (key, value) = bad.split_once('=').unwrap();
        let told = with(bad).unwrap_err().to_string();
        let begin = format!("invalid value '{value}' for '{key}': expected ");
        assert!(told.starts_with(&begin), "{told}");
    }
    assert!(error("id=0,path=p,socket=s").starts_with("invalid value '0' for 'id'"));
    assert!(error("id=a,path=,socket=s").starts_with("invalid value '' for 'path'"));
}

const FILE: &str = r#"
control = "/run/c.sock"
runtime-dir = "/run/b"
log-format = "json"
allow-path = ["/a", "/b"]
[[disk]]
id = "one"
path = "/one,1.raw"
socket = "/run/one.sock"
readonly = true
queues = 4
scratch-size = "1G"
[[disk]]
id = "two"
path = "/two.raw"
socket = "/run/two.sock"
direct = "off"
bitmaps = false
scratch-size = 1048576
"#;

#[test]
fn a_file_says_what_the_command_line_can_say() {
    let file = ServeOptions::from_toml(FILE).unwrap();
    file.check().unwrap();
    assert_eq!(file.control.as_deref(), Some(Path::new("/run/c.sock")));
    assert_eq!(file.runtime_dir.as_deref(), Some(Path::new("/run/b")));
    assert_eq!(file.log_format, Some(LogFormat::Json));
    assert_eq!(file.allow_paths, [PathBuf::from("/a"), PathBuf::from("/b")]);
    let disks = [
        "id=one,path=/one,,1.raw,socket=/run/one.sock,readonly=on,queues=4,scratch-size=1G",
        "id=two,path=/two.raw,socket=/run/two.sock,direct=off,bitmaps=off,scratch-size=1M",
    ];
    assert_eq!(file.disks, disks.map(|d| DiskOptions::parse(d).unwrap()));
    let one_path = ServeOptions::from_toml("allow-path = '/a'").unwrap();
    assert_eq!(one_path.allow_paths, [PathBuf::from("/a")]);
}

#[test]
fn the_sandbox_is_on_unless_a_part_or_all_of_it_is_turned_off() {
    let wish = |text: &str| ServeOptions::from_toml(text).unwrap().sandbox.unwrap_or_default();
    let parts = |text| (wish(text).seccomp(), wish(text).landlock());
    assert_eq!(parts(""), (true, true));
    assert_eq!(parts("sandbox = true"), (true, true));
    assert_eq!(parts("sandbox = 'off'"), (false, false));
    assert_eq!(parts("sandbox = 'seccomp'"), (true, false));
    assert_eq!(parts("sandbox = 'landlock'"), (false, true));
    let line = ServeOptions { sandbox: Some(SandboxWish::Off), ..ServeOptions::default() };
    let file = ServeOptions::from_toml("sandbox = 'seccomp'").unwrap();
    assert_eq!(file.clone().overlaid_with(ServeOptions::default()).sandbox, Some(SandboxWish::Seccomp));
    assert_eq!(file.overlaid_with(line).sandbox, Some(SandboxWish::Off));
    let told = ServeOptions::from_toml("sandbox = 'of'").unwrap_err().to_string();
    assert!(told.contains("expected on, off, seccomp or landlock"), "{told}");
}

#[test]
fn the_command_line_wins_over_the_file_and_adds_disks() {
    let file = ServeOptions::from_toml(FILE).unwrap();
    let line = ServeOptions {
        disks: vec![DiskOptions::parse("id=three,path=p,socket=s").unwrap()],
        control: Some("/other".into()),
        ..ServeOptions::default()
    };
    let both = file.overlaid_with(line);
    both.check().unwrap();
    let ids: Vec<_> = both.disks.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["one", "two", "three"]);
    assert_eq!(both.control.as_deref(), Some(Path::new("/other")));
    assert_eq!(both.log_format, Some(LogFormat::Json));
    assert_eq!(both.allow_paths.len(), 2);
}

#[test]
fn a_wrong_file_says_where() {
    let told = |text: &str| {
        let told = ServeOptions::from_toml(text).unwrap_err().to_string();
        assert!(!told.contains('\n'), "one line: {told}");
        told
    };
    let syntax = told("control = ");
    assert!(syntax.starts_with("not a valid TOML file: TOML parse error at line 1"), "{syntax}");
    assert!(told("contrl = '/c'").contains("'contrl' (did you mean 'control'?)"));
    assert!(told("control = 7").contains("'control': expected a path"));
    assert!(told("log-format = 'xml'").contains("expected text or json"));
    assert!(told("allow-path = [1]").contains("'allow-path'"));
    assert!(told("disk = 'x'").contains("[[disk]] tables"));
    assert!(told("disk = ['x']").contains("disk 1 (no id): "));
    let second = |line| told(&FILE.replace("bitmaps = false", line));
    assert!(second("bitmap = false").starts_with("disk 2 (two): unknown key 'bitmap'"));
    assert!(second("bitmaps = []").starts_with("disk 2 (two): invalid value 'array' for 'bitmaps'"));
    assert!(second("readonly = 1").contains("expected on or off"));
}

#[test]
fn ids_and_sockets_are_used_once() {
    let of = |texts: &[&str]| ServeOptions {
        disks: texts.iter().map(|t| DiskOptions::parse(t).unwrap()).collect(),
        control: Some("/c".into()),
        ..ServeOptions::default()
    };
    let told = |texts: &[&str]| of(texts).check().unwrap_err().to_string();
    let (a, b) = ("id=a,path=p,socket=s", "id=b,path=p,socket=t");
    assert_eq!(told(&[a, "id=a,path=q,socket=t"]), "disk id 'a' is given twice");
    assert_eq!(told(&[a, "id=b,path=q,socket=s"]), "socket s is given twice");
    assert_eq!(told(&["id=a,path=p,socket=/c"]), "socket /c is given twice");
    assert!(told(&[]).starts_with("no disk to serve"));
    of(&[a, b]).check().unwrap();
}

#[test]
fn the_convention_of_qemu_is_understood() {
    let disk = from_convention("/d.raw", Some("/s"), None, true).unwrap();
    assert_eq!((disk.id.as_str(), disk.read_only), ("drive0", true));
    assert_eq!(disk.socket, SocketSpec::Path("/s".into()));
    let disk = from_convention("/d.raw", None, Some(3), false).unwrap();
    assert_eq!((disk.socket, disk.read_only), (SocketSpec::Fd(3), false));
    let refused = |path, fd| from_convention("/d", path, fd, false).unwrap_err();
    assert_eq!(refused(None, None), ConfigError::OneSocket);
    assert_eq!(refused(Some("/s"), Some(3)), ConfigError::OneSocket);
    assert!(matches!(refused(None, Some(-1)), ConfigError::BadValue { .. }));
    assert!(from_convention("", Some("/s"), None, false).is_err());
}

#[test]
fn capabilities_and_descriptor_are_what_management_layers_read() {
    let capabilities: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
    assert_eq!(capabilities, serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]}));
    let descriptor: serde_json::Value = serde_json::from_str(BACKEND_DESCRIPTOR).unwrap();
    assert_eq!(descriptor["type"], "block");
    for key in ["description", "binary"] {
        assert!(descriptor[key].is_string(), "{key}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in ".*", toml in ".*") {
        let _ = DiskOptions::parse(&text);
        let _ = ServeOptions::from_toml(&toml);
    }

    #[test]
    fn any_path_can_be_written(path in "[ -~äß]+") {
        let text = format!("id=a,socket=s,path={}", path.replace(',', ",,"));
        prop_assert_eq!(DiskOptions::parse(&text).unwrap().path, PathBuf::from(path));
    }
}
