//! `blkmark serve`: the command line and the configuration file, made one checked configuration.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use super::failure::Failure;
use crate::config::{ConfigError, DiskOptions, LogFormat, SandboxWish, ServeOptions, from_convention};

/// `blkmark serve`, as it was written.
#[derive(Debug, Args)]
#[command(after_help = "One line on standard output says that everything is served; SIGTERM or SIGINT ends it after \
    every accepted request is finished.\nExit status: 0 ended so; 1 it could not start or go on; 2 wrong usage.")]
pub struct ServeArgs {
    /// The disks to serve.
    #[arg(
        long = "disk",
        value_name = "OPTIONS",
        value_parser = DiskOptions::parse,
        help = "A disk to serve (repeatable): \
            id=NAME,path=FILE,socket=SOCKET[,readonly=on|off][,direct=on|off][,queues=N][,queue-size=N][,serial=TEXT]\
            [,bitmaps=PATH|off][,scratch=DIR][,scratch-size=SIZE][,cpus=LIST][,poll=MICROSECONDS]; \
            null=SIZE instead of path=FILE is for benchmarks: a disk that keeps nothing"
    )]
    pub disks: Vec<DiskOptions>,

    /// Read disks and settings from a TOML file; what the command line says wins
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Where live bitmaps and other short-lived state lie
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// A directory that paths from the control socket must lie beneath (repeatable)
    /// [default: anywhere that the daemon's user may go]
    #[arg(long = "allow-path", value_name = "DIR")]
    pub allow_paths: Vec<PathBuf>,

    /// What the daemon gives up once it serves: on (everything it does not need), only its seccomp or its landlock part,
    /// or off (nothing) [default: on]
    #[arg(long, value_name = "PARTS", value_parser = SandboxWish::parse)]
    pub sandbox: Option<SandboxWish>,

    /// How to write the log: text or json [default: text]
    #[arg(long, value_name = "FORMAT", value_parser = LogFormat::parse)]
    pub log_format: Option<LogFormat>,

    /// QEMU's convention: the file or block device to serve
    #[arg(long, value_name = "FILE", conflicts_with_all = ["disks", "config"])]
    pub blk_file: Option<String>,

    /// QEMU's convention: the vhost-user socket to listen on
    #[arg(long, value_name = "SOCKET", requires = "blk_file", conflicts_with = "fd")]
    pub socket_path: Option<String>,

    /// QEMU's convention: the descriptor of a listening vhost-user socket
    #[arg(long, value_name = "N", requires = "blk_file")]
    pub fd: Option<i32>,

    /// QEMU's convention: let the guest only read
    #[arg(long, requires = "blk_file")]
    pub read_only: bool,
}

impl ServeArgs {
    /// The configuration of the daemon. `control` is the path of `--control`, if one was given.
    ///
    /// # Errors
    /// [`Failure::Failed`] if the file cannot be read, [`Failure::Usage`] for everything wrong in it or on the command
    /// line: one line each.
    pub fn options(&self, control: Option<PathBuf>) -> Result<ServeOptions, Failure> {
        let mut command_line = ServeOptions {
            disks: self.disks.clone(),
            control,
            runtime_dir: self.runtime_dir.clone(),
            log_format: self.log_format,
            allow_paths: self.allow_paths.clone(),
            sandbox: self.sandbox,
        };
        if let Some(file) = &self.blk_file {
            let disk = from_convention(file, self.socket_path.as_deref(), self.fd, self.read_only);
            command_line.disks.push(disk.map_err(usage)?);
        }
        let options = match &self.config {
            None => command_line,
            Some(path) => {
                let named = |error: &dyn std::fmt::Display| format!("'{}': {error}", path.display());
                let text = fs::read_to_string(path).map_err(|error| Failure::Failed(named(&error)))?;
                let file = ServeOptions::from_toml(&text).map_err(|error| Failure::Usage(named(&error)))?;
                file.overlaid_with(command_line)
            }
        };
        options.check().map_err(usage)?;
        Ok(options)
    }
}

fn usage(error: ConfigError) -> Failure {
    Failure::Usage(error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::{Cli, Command};
    use super::*;
    use crate::config::SocketSpec;

    fn options(words: &str) -> Result<ServeOptions, Failure> {
        let cli = Cli::try_parse_from(format!("blkmark serve {words}").split(' '))
            .map_err(|error| Failure::Usage(error.to_string()))?;
        match cli.command {
            Some(Command::Serve(args)) => args.options(cli.control),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn qemus_convention_needs_no_command() {
        for words in ["--blk-file f --socket-path s", "--socket-path=s --blk-file=f", "--fd 3 --blk-file f --read-only"]
        {
            let words = format!("blkmark {words}");
            let cli = Cli::from_words(words.split(' ').map(Into::into)).unwrap();
            assert!(
                matches!(cli.command, Some(Command::Serve(args)) if args.blk_file.as_deref() == Some("f")),
                "{words}"
            );
        }
        assert!(Cli::from_words(["blkmark".into(), "--disk".into(), "id=a".into()]).is_err());
    }

    #[test]
    fn qemus_convention_for_back_ends_is_understood() {
        let served = options("--blk-file f --socket-path s --read-only").unwrap();
        assert!(served.disks[0].read_only);
        assert_eq!(options("--blk-file f --fd 3").unwrap().disks[0].socket, SocketSpec::Fd(3));
        for words in
            ["--socket-path s", "--blk-file f", "--blk-file f --socket-path s --fd 3", "--blk-file f --disk id=a"]
        {
            assert!(matches!(options(words), Err(Failure::Usage(_))), "{words}");
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_adds_to_its_disks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blkmark.toml");
        let text = "control = '/a'\nruntime-dir = '/r'\n[[disk]]\nid = 'one'\npath = 'p'\nsocket = '/s1'\n";
        fs::write(&path, text).unwrap();
        let file = path.display();
        let served = options(&format!("--config {file} --control /b --disk id=two,path=q,socket=/s2")).unwrap();
        assert_eq!(served.control, Some("/b".into()));
        assert_eq!(served.runtime_dir, Some("/r".into()));
        let ids: Vec<_> = served.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["one", "two"]);
        let twice = options(&format!("--config {file} --disk id=one,path=q,socket=/s2"));
        assert!(matches!(twice, Err(Failure::Usage(_))));
        let missing = options(&format!("--config {file}.missing"));
        assert!(matches!(missing, Err(Failure::Failed(_))));
    }

    #[test]
    fn a_wrong_option_of_a_disk_is_named() {
        for (words, part) in [
            ("--disk id=a,path=p,socket=s,reedonly=on", "readonly"),
            ("--disk id=a,path=p", "socket"),
            ("--control /c", "no disk"),
        ] {
            match options(words) {
                Err(Failure::Usage(text)) => assert!(text.contains(part), "{text}"),
                other => panic!("{words}: {other:?}"),
            }
        }
    }
}
