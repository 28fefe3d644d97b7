//! The system's statistics of a TCP connection: the only file of this module with `unsafe`.

#![cfg_attr(target_os = "linux", allow(unsafe_code))]

/// A second handle of a socket, to query it.
pub(super) struct TcpInfo {
    #[cfg(target_os = "linux")]
    socket: std::os::fd::OwnedFd,
}

impl TcpInfo {
    /// A handle of this socket; `None` if the system gives none, or has no such statistics.
    #[cfg(target_os = "linux")]
    pub(super) fn of(socket: &tokio::net::TcpStream) -> Option<Self> {
        use std::os::fd::AsFd;
        let socket = socket.as_fd().try_clone_to_owned().ok()?;
        Some(Self { socket })
    }

    /// `None`: only Linux has `TCP_INFO`.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn of(_: &tokio::net::TcpStream) -> Option<Self> {
        None
    }

    /// Segments that were sent again since the connection was opened.
    #[cfg(target_os = "linux")]
    pub(super) fn retransmissions(&self) -> Option<u64> {
        use std::os::fd::AsRawFd;
        // SAFETY: `tcp_info` has only integer fields, for which all zeros are valid.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
        // SAFETY: the handle is owned and open, and `info` has `length` bytes for the system to write.
        let failed = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        (failed == 0).then(|| u64::from(info.tcpi_total_retrans))
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn retransmissions(&self) -> Option<u64> {
        None
    }
}
