//! An NBD server as a script: what one connection hears and says is written out.

#![allow(dead_code, missing_docs, reason = "each test binary uses its part of it")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const ACK: u32 = 1;
pub const INFO: u32 = 3;
pub const UNSUP: u32 = 0x8000_0001;
pub const STRUCTURED: u32 = 8;
pub const GO: u32 = 7;
/// Has flags, flush, FUA, write zeroes.
pub const FLAGS: u16 = 1 | 4 | 8 | 64;
pub const SIZE: u64 = 1 << 20;

/// One connection of a server, from its side.
pub struct Peer(pub UnixStream);

impl Peer {
    pub fn say(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.0.write_all(&parts.concat())
    }

    pub fn hear<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub fn greet(&mut self) -> io::Result<()> {
        self.say(&[b"NBDMAGIC", &OPTION_MAGIC.to_be_bytes(), &3_u16.to_be_bytes()])?;
        assert_eq!(self.hear()?, 3_u32.to_be_bytes());
        Ok(())
    }

    pub fn option(&mut self) -> io::Result<(u32, Vec<u8>)> {
        assert_eq!(self.hear()?, OPTION_MAGIC.to_be_bytes());
        let option = u32::from_be_bytes(self.hear()?);
        let mut data = vec![0; u32::from_be_bytes(self.hear()?) as usize];
        self.0.read_exact(&mut data)?;
        Ok((option, data))
    }

    pub fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u32).to_be_bytes();
        self.say(&[&REPLY_MAGIC.to_be_bytes(), &option.to_be_bytes(), &kind.to_be_bytes(), &length, data])
    }

    /// Up to the question for the export.
    pub fn until_go(&mut self, structured: u32) -> io::Result<()> {
        self.greet()?;
        assert_eq!(self.option()?.0, STRUCTURED);
        self.reply(STRUCTURED, structured, &[])?;
        assert_eq!(self.option()?.0, GO);
        Ok(())
    }

    pub fn about(&mut self, size: u64, flags: u16) -> io::Result<()> {
        self.reply(GO, INFO, &[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())
    }

    /// Through the whole handshake.
    pub fn serve(&mut self) -> io::Result<()> {
        self.until_go(ACK)?;
        self.about(SIZE, FLAGS)?;
        self.reply(GO, ACK, &[])
    }

    /// A request's flags, kind, cookie, offset and length.
    pub fn request(&mut self) -> io::Result<(u16, u16, u64, u64, u32)> {
        assert_eq!(self.hear()?, 0x2560_9513_u32.to_be_bytes());
        let flags = u16::from_be_bytes(self.hear()?);
        let kind = u16::from_be_bytes(self.hear()?);
        let cookie = u64::from_be_bytes(self.hear()?);
        let offset = u64::from_be_bytes(self.hear()?);
        let len = u32::from_be_bytes(self.hear()?);
        if kind == 1 {
            let mut data = vec![0; len as usize];
            self.0.read_exact(&mut data)?;
        }
        Ok((flags, kind, cookie, offset, len))
    }

    pub fn simple(&mut self, cookie: u64, error: u32) -> io::Result<()> {
        self.say(&[&0x6744_6698_u32.to_be_bytes(), &error.to_be_bytes(), &cookie.to_be_bytes()])
    }

    pub fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        let head = [&0x668e_33ef_u32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
        self.say(&[&head, &cookie.to_be_bytes(), &length.to_be_bytes(), payload])
    }

    /// Says nothing, until the client is gone.
    pub fn stall(&mut self) -> io::Result<()> {
        io::copy(&mut self.0, &mut io::sink()).map(drop)
    }
}
