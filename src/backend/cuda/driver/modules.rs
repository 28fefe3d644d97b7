//! The kernels' modules and functions, all loaded when the device is opened.

use std::collections::HashMap;
use std::ffi::CString;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::compile::{self, compile};
use super::loader::{Loader, Origin};
use super::{cuda_version, driver_call, unavailable};
use crate::backend::Result;
use crate::backend::cuda::kernels;
use crate::error::BackendError;

/// Shared memory that a block has without asking, in bytes, what it declares included.
const UNASKED: u32 = 48 << 10;

struct Function {
    handle: sys::CUfunction,
    /// The most dynamic shared memory asked for, in bytes.
    shared: u32,
}

/// Every kernel of the program.
pub(super) struct Functions {
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
}

// SAFETY: modules and functions may be used from any thread with the context current; they live behind a lock.
unsafe impl Send for Functions {}

impl Drop for Functions {
    fn drop(&mut self) {
        for module in &self.modules {
            // SAFETY: loaded once, unloaded once.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

impl Functions {
    /// Loads all kernels for a device of this compute capability, whose driver knows CUDA `driver`. The context is current.
    ///
    /// # Errors
    /// No compiled kernel and no NVRTC, or code that the driver does not take.
    pub(super) fn load(capability: (i32, i32), driver: i32) -> Result<Self> {
        let mut all = Self {
            modules: Vec::new(),
            functions: HashMap::new(),
        };
        let loader = Loader::new(capability, driver);
        let loaded = loader.load(&mut |file, code| taken(file, code, driver), &compile)?;
        let compiled = |(_, _, origin): &&(_, _, Origin)| *origin == Origin::Compiled;
        tracing::info!(
            kernels = loaded.len(),
            compiled = loaded.iter().filter(compiled).count(),
            "CUDA kernels are loaded"
        );
        all.modules = loaded.iter().map(|(_, module, _)| *module).collect();
        for (file, module, _) in loaded {
            for entry in kernels::entries(file) {
                all.add(entry, module)?;
            }
        }
        Ok(all)
    }

    fn add(&mut self, entry: &'static str, module: sys::CUmodule) -> Result<()> {
        let name = CString::new(entry).map_err(|_| unknown(entry))?;
        // SAFETY: the module lives as long as `self`.
        let handle = driver_call(entry, unsafe { result::module::get_function(module, name) })?;
        // The driver loads a function when it is first launched, unless it is told to now: not within a request, and not
        // while a stream is captured.
        // SAFETY: the function is of a module that lives.
        driver_call(entry, unsafe { sys::cuFuncLoad(handle) }.result())?;
        // SAFETY: as above.
        let own = driver_call("shared memory", unsafe {
            result::function::get_function_attribute(
                handle,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            )
        })?;
        let shared = UNASKED.saturating_sub(u32::try_from(own).unwrap_or(0));
        self.functions.insert(entry, Function { handle, shared });
        Ok(())
    }

    /// An entry point, allowed so many bytes of dynamic shared memory.
    pub(super) fn get(&mut self, entry: &'static str, shared: u32) -> Result<sys::CUfunction> {
        let function = self
            .functions
            .get_mut(entry)
            .ok_or_else(|| unknown(entry))?;
        if shared > function.shared {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a module that lives.
            driver_call("shared memory", unsafe {
                result::function::set_function_attribute(
                    function.handle,
                    attribute,
                    i32::try_from(shared).unwrap_or(i32::MAX),
                )
            })?;
            function.shared = shared;
        }
        Ok(function.handle)
    }
}

/// Code as the driver takes it.
fn taken(file: &str, mut code: Vec<u8>, driver: i32) -> Result<sys::CUmodule> {
    // PTX ends in a zero; a binary says its own length.
    if code.last() != Some(&0) {
        code.push(0);
    }
    // SAFETY: the code is PTX that ends in a zero, or a binary that says its own length.
    let loaded = unsafe { result::module::load_data(code.as_ptr().cast()) };
    let older = matches!(
        loaded,
        Err(DriverError(
            sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
                | sys::CUresult::CUDA_ERROR_INVALID_IMAGE
        ))
    );
    driver_call(file, loaded).map_err(|error| {
        if older {
            unavailable(format!("{error}. {}", what_to_do(driver)))
        } else {
            error
        }
    })
}

/// What helps where the driver is older than the compiler.
fn what_to_do(driver: i32) -> String {
    let own = compile::version().map_or_else(
        || "none is found".to_owned(),
        |found| format!("{found} is found"),
    );
    let knows = cuda_version(driver);
    format!(
        "This driver knows CUDA {knows}; the kernels that come with the program are of CUDA 13.0 and need driver 580 or newer. \
         Install that, or NVRTC of CUDA {knows} or older ({own}) on LD_LIBRARY_PATH, which compiles them here"
    )
}

fn unknown(entry: &str) -> BackendError {
    BackendError::Driver {
        backend: "cuda",
        what: format!("kernel {entry}"),
        reason: "there is no such kernel".to_owned(),
    }
}
