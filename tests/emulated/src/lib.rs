//! The kernels of `kernels/*.cu`, compiled by the host's C++ compiler against `kernels/shared/host.h`, and a launch like the
//! driver's. For tests: it checks logic, not speed.
//!
//! All unsafe code for running them is here.
#![allow(unsafe_code)]

mod product;

use std::ffi::{CString, c_char, c_void};
use std::ptr::NonNull;

pub use product::product;

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    u32,
    u32,
    *const c_void,
    u64,
    u64,
    *mut c_char,
    u64,
) -> i32;

unsafe extern "C" {
    fn emulated_allocate(bytes: u64) -> *mut c_void;
    fn emulated_free(memory: *mut c_void, bytes: u64);
    fn dlopen(file: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn emulated_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        parameters: *const c_void,
        bytes: u64,
        order: u64,
        message: *mut c_char,
        message_bytes: u64,
    ) -> i32;
}

/// Memory of kernels: poisoned with NaN, followed by a guard page.
#[derive(Debug)]
pub struct Allocation {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is owned memory like a boxed slice; kernels run within calls of the owner.
unsafe impl Send for Allocation {}

impl Allocation {
    /// `bytes` of memory, or `None` if there is not enough.
    #[must_use]
    pub fn new(bytes: usize) -> Option<Self> {
        // SAFETY: the function accepts any size and returns null or that much memory.
        let at = unsafe { emulated_allocate(bytes as u64) };
        NonNull::new(at.cast()).map(|at| Self { at, bytes })
    }

    /// Its address, for kernels.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `at` points to `bytes` initialised bytes that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: it was allocated by `emulated_allocate` with this size and is freed once.
        unsafe { emulated_free(self.at.as_ptr().cast(), self.bytes as u64) };
    }
}

/// The launch of the kernels in this program, or of those in the library `KIMI_EMULATED_KERNELS`, so that planting a bug in a
/// kernel compiles one file and not the program.
fn machine() -> Result<Launch, String> {
    static OTHER: std::sync::OnceLock<Result<Launch, String>> = std::sync::OnceLock::new();
    OTHER
        .get_or_init(|| {
            let Ok(path) = std::env::var("KIMI_EMULATED_KERNELS") else {
                return Ok(emulated_launch as Launch);
            };
            const NOW: i32 = 2;
            let file = CString::new(path.as_str()).map_err(|error| error.to_string())?;
            // SAFETY: the library is one of ours, and its function has this type.
            unsafe {
                let library = dlopen(file.as_ptr(), NOW);
                if library.is_null() {
                    return Err(format!("{path} is not a library"));
                }
                let launch = dlsym(library, c"emulated_launch".as_ptr());
                if launch.is_null() {
                    return Err(format!("{path} has no kernels"));
                }
                Ok(std::mem::transmute::<*mut c_void, Launch>(launch))
            }
        })
        .clone()
}

/// The order of threads between barriers, and of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// 0, 1, 2, ..
    Forward,
    /// The last first.
    Reverse,
    /// Shuffled.
    Seeded(u32),
}

/// Runs a kernel to its end. `parameters` is its struct: one of `repr(C)` with the same fields, or the words of one.
///
/// # Errors
/// Errors that the machine finds: no such kernel, parameters of another size, threads that wait forever, an access outside.
///
/// # Safety
/// `parameters` is aligned to 8 bytes, and its fields are those of the kernel's struct. Addresses among them must belong to
/// living [`Allocation`]s, which nothing else uses during the call. Accesses outside of them are found only if they reach a
/// guard page.
pub unsafe fn launch<P: ?Sized>(
    kernel: &str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    parameters: &P,
    order: Order,
) -> Result<(), String> {
    let name = CString::new(kernel).map_err(|error| error.to_string())?;
    let order = match order {
        Order::Forward => 0,
        Order::Reverse => 1,
        Order::Seeded(seed) => 2 + u64::from(seed),
    };
    let mut message = [0_u8; 512];
    let run = machine()?;
    // SAFETY: the parameters and the message buffer live through the call, which reads the struct of this size; the caller
    // guarantees its fields and the addresses.
    let failed = unsafe {
        run(
            name.as_ptr(),
            grid.as_ptr(),
            threads,
            shared_bytes,
            std::ptr::from_ref(parameters).cast(),
            size_of_val(parameters) as u64,
            order,
            message.as_mut_ptr().cast(),
            message.len() as u64,
        )
    };
    if failed == 0 {
        return Ok(());
    }
    let end = message.iter().position(|byte| *byte == 0).unwrap_or(0);
    Err(String::from_utf8_lossy(&message[..end]).into_owned())
}
