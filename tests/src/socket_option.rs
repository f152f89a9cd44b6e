//! Options of sockets that libraries don't know, or don't take as apps give them.

use std::{ffi::c_int, io, os::fd::AsRawFd};

use nix::errno::Errno;

/// Sets an option, named by its level and number, to these bytes.
pub fn set_option(
    socket: &impl AsRawFd,
    (level, name): (c_int, c_int),
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the value is valid for reads of the length that is passed, and lives across the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    Ok(Errno::result(done).map(drop)?)
}
