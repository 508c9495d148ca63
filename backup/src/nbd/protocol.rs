//! Numbers of the wire, as the protocol document has them, and what both sides think of them.
//!
//! Everything travels in network byte order. Names are the document's, without `NBD_`.

use std::io;

/// First words of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Before each option, and the server's second words where it can negotiate.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The second words of a server that cannot.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before each chunk of a reply with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string, in bytes.
pub const STRING_MAX: usize = 4096;
/// Longest payload of a request, and of a chunk, that everybody takes.
pub const PAYLOAD_MAX: u32 = 32 << 20;
/// Largest minimum block size that may be announced.
pub const MIN_BLOCK_MAX: u32 = 64 << 10;

/// Handshake flags; those of the client have the same bits.
pub mod handshake_flag {
    /// Options may fail.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No padding after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options.
pub mod option {
    /// Takes an export, and cannot fail but by closing the connection.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the session.
    pub const ABORT: u32 = 2;
    /// Asks for the names of all exports.
    pub const LIST: u32 = 3;
    /// Asks for TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks about an export.
    pub const INFO: u32 = 6;
    /// Takes an export.
    pub const GO: u32 = 7;
    /// Asks for replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Asks for headers with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A piece of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in all errors.
    pub const ERROR: u32 = 1 << 31;
    /// An unknown option.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Forbidden here.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// Makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// The client has to ask for block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    /// More than the server takes.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// Extended headers are in force.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// Kinds of information on an export.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// Its description.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum and preferred block size, longest payload.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `FUA` works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `DF` works.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `CACHE` works.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `FAST_ZERO` works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Requests.
pub mod command {
    /// Reads.
    pub const READ: u16 = 0;
    /// Writes.
    pub const WRITE: u16 = 1;
    /// Ends the session.
    pub const DISC: u16 = 2;
    /// Makes what was written durable.
    pub const FLUSH: u16 = 3;
    /// Lets contents go.
    pub const TRIM: u16 = 4;
    /// Announces reads.
    pub const CACHE: u16 = 5;
    /// Writes zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Asks for metadata.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod command_flag {
    /// Durable before it is answered.
    pub const FUA: u16 = 1;
    /// Zeroes that take space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroes only if that is quicker than writing them.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of replies.
pub mod chunk {
    /// The flag of the last one.
    pub const DONE: u16 = 1;
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// Bytes of the export.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes of the export.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents, with 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in all errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at a place.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Extents of `base:allocation`.
pub mod allocation {
    /// Takes no space.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Linux errno values that have the same number on the wire; everything else is `EINVAL` there.
const SHARED_ERRORS: &[i32] = &[
    libc::EPERM,
    libc::EIO,
    libc::ENOMEM,
    libc::EINVAL,
    libc::ENOSPC,
    libc::EOVERFLOW,
    libc::ENOTSUP,
    libc::ESHUTDOWN,
];

/// What an error on the wire says: an errno.
pub fn errno_of(error: u32) -> i32 {
    SHARED_ERRORS.iter().copied().find(|errno| errno.cast_unsigned() == error).unwrap_or(libc::EINVAL)
}

/// How an error is put on the wire.
pub fn error_of(error: &io::Error) -> u32 {
    let errno = match error.raw_os_error() {
        Some(libc::EROFS | libc::EACCES) => libc::EPERM,
        Some(libc::EDQUOT | libc::EFBIG) => libc::ENOSPC,
        Some(errno) if SHARED_ERRORS.contains(&errno) => errno,
        Some(_) => libc::EIO,
        None => match error.kind() {
            io::ErrorKind::InvalidInput => libc::EINVAL,
            io::ErrorKind::Unsupported => libc::ENOTSUP,
            io::ErrorKind::PermissionDenied => libc::EPERM,
            _ => libc::EIO,
        },
    };
    errno.cast_unsigned()
}

/// A text of the other side's, fit to be shown: one line, printable, short.
pub fn shown(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_their_meaning_over_the_wire() {
        assert_eq!(errno_of(28), libc::ENOSPC);
        assert_eq!(errno_of(1), libc::EPERM);
        assert_eq!(errno_of(0xdead_beef), libc::EINVAL);
        assert_eq!(error_of(&io::Error::from_raw_os_error(libc::ENOSPC)), 28);
        assert_eq!(error_of(&io::Error::from_raw_os_error(libc::EROFS)), 1);
        assert_eq!(error_of(&io::Error::from_raw_os_error(libc::ESTALE)), 5);
        assert_eq!(error_of(&io::Error::other("x")), 5);
    }

    #[test]
    fn texts_of_the_other_side_are_one_short_line() {
        assert_eq!(shown(b"a\n\x1b[31mb\xff"), "a[31mb\u{fffd}");
        assert_eq!(shown(&[b'x'; 4096]).len(), 200);
    }
}
