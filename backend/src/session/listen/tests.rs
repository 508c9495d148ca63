//! Which sockets are taken, taken over, and left alone.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_socket_is_private_from_the_start_and_goes_with_its_listener() {
    let dir = dir();
    let path = dir.path().join("s");
    let endpoint = Endpoint::bind(&path).unwrap();
    let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    UnixStream::connect(&path).unwrap();
    drop(endpoint);
    assert!(!path.exists());
}

#[test]
fn a_directory_in_which_everybody_could_replace_the_socket_is_refused() {
    let dir = dir();
    let path = dir.path().join("s");
    let allow = |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
    allow(0o777);
    assert!(matches!(Endpoint::bind(&path), Err(ListenError::UnsafeDirectory(_))));
    assert!(!path.exists());
    allow(0o1777);
    Endpoint::bind(&path).unwrap();
}

#[test]
fn a_stale_socket_is_taken_over() {
    let dir = dir();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves the file behind, as a killed process does");
    let _endpoint = Endpoint::bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_live_socket_is_left_alone() {
    let dir = dir();
    let path = dir.path().join("s");
    let live = UnixListener::bind(&path).unwrap();
    let error = Endpoint::bind(&path).unwrap_err();
    assert!(matches!(error, ListenError::InUse(_)), "{error}");
    assert!(error.to_string().contains("is in use by a live process"));
    assert!(path.exists());
    drop(live);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let dir = dir();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let error = Endpoint::bind(&path).unwrap_err();
    assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"data");

    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
    let error = Endpoint::bind(&link).unwrap_err();
    assert!(matches!(error, ListenError::NotASocket(_)), "{error}");
}

#[test]
fn a_bad_path_is_named() {
    let dir = dir();
    let missing = dir.path().join("no/such/s");
    let error = Endpoint::bind(&missing).unwrap_err().to_string();
    assert!(error.contains("no/such/s") && error.contains("No such file"), "{error}");
    let long = dir.path().join("x".repeat(200));
    assert!(matches!(Endpoint::bind(&long), Err(ListenError::TooLong(_))));
}

#[test]
fn a_listener_does_not_remove_the_file_of_its_successor() {
    let dir = dir();
    let path = dir.path().join("s");
    let first = Endpoint::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let second = Endpoint::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
}

#[test]
fn listening_and_connected_descriptors_are_adopted_and_others_refused() {
    let dir = dir();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    assert!(matches!(Endpoint::adopt(listener.into()), Ok(Endpoint::Listening(_))));

    let (ours, _theirs) = UnixStream::pair().unwrap();
    let raw = ours.as_raw_fd();
    match Endpoint::adopt(ours.into()) {
        Ok(Endpoint::Connected(stream)) => assert_eq!(stream.as_raw_fd(), raw),
        other => panic!("{other:?}"),
    }

    let file = tempfile::tempfile().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (datagram, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
    for fd in [OwnedFd::from(file), tcp.into(), datagram.into()] {
        assert!(matches!(Endpoint::adopt(fd), Err(ListenError::NotAUnixSocket)));
    }
}
