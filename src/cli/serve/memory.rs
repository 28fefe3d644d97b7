//! Memory that the C library's allocator keeps: as little as possible of it, for a process that runs for weeks.
//!
//! glibc gives each of many threads an arena of its own, up to eight for each core, and what is freed at the end of an arena stays
//! there: a server whose live memory peaked at 70 MB held 296 MB after four rounds of attacks (docs/testing.md). Other allocators, and other C libraries, are
//! left as they are.
//!
//! There is `unsafe` code here: calls of glibc.

/// Has all threads share one arena, unless `MALLOC_ARENA_MAX` says otherwise. To be called before there are other threads. Small
/// blocks are cached by thread all the same.
pub(super) fn share_arena() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        #[expect(unsafe_code, reason = "the call has no safe wrapper")]
        // SAFETY: the call takes two integers and may be made at any time.
        let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        if set == 0 {
            tracing::debug!("the number of malloc's arenas could not be set");
        }
    }
}

/// Gives pages without live memory back to the system.
pub(super) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "the call has no safe wrapper")]
        // SAFETY: the call takes an integer, locks what it changes, and may be made at any time in any thread.
        let _ = unsafe { libc::malloc_trim(0) };
    }
}
