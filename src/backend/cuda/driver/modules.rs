//! The kernels' modules and functions, all loaded when the device is opened.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::result::DriverError;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, sys};
use cudarc::nvrtc::Ptx;

use super::compile::{self, compile};
use super::loader::{Loader, Origin};
use super::{cuda_version, driver_call, unavailable};
use crate::backend::Result;
use crate::backend::cuda::kernels;
use crate::error::BackendError;

/// Bytes of shared memory that a block may have without an attribute, including its static shared memory.
const UNASKED: u32 = 48 << 10;

struct Function {
    function: CudaFunction,
    /// The most dynamic shared memory requested so far, in bytes.
    shared: u32,
}

/// Every kernel of the program.
pub(super) struct Functions(HashMap<&'static str, Function>);

impl Functions {
    /// Loads all kernels for a device of this compute capability, whose driver supports CUDA `driver`.
    ///
    /// # Errors
    /// No compiled kernel and no NVRTC, or code that the driver refuses.
    pub(super) fn load(
        context: &Arc<CudaContext>,
        capability: (i32, i32),
        driver: i32,
    ) -> Result<Self> {
        let mut all = Self(HashMap::new());
        let loader = Loader::new(capability, driver);
        let mut take = |file, code| taken(context, file, code, driver);
        let loaded = loader.load(&mut take, &compile)?;
        let compiled = |(_, _, origin): &&(_, _, Origin)| *origin == Origin::Compiled;
        tracing::info!(
            kernels = loaded.len(),
            compiled = loaded.iter().filter(compiled).count(),
            "CUDA kernels are loaded"
        );
        for (file, module, _) in loaded {
            for entry in kernels::entries(file) {
                all.add(entry, &module)?;
            }
        }
        Ok(all)
    }

    fn add(&mut self, entry: &'static str, module: &Arc<CudaModule>) -> Result<()> {
        let function = driver_call(entry, module.load_function(entry))?;
        // By default the driver loads a function when it is first launched; it is loaded now, so that this does not happen
        // during a request or while a stream is captured.
        // SAFETY: the function keeps its module, and cudarc has made its context current.
        driver_call(
            entry,
            unsafe { sys::cuFuncLoad(function.cu_function()) }.result(),
        )?;
        let own = driver_call("shared memory", function.shared_size_bytes())?;
        let shared = UNASKED.saturating_sub(u32::try_from(own).unwrap_or(0));
        self.0.insert(entry, Function { function, shared });
        Ok(())
    }

    /// An entry point, with this number of bytes of dynamic shared memory allowed.
    pub(super) fn get(&mut self, entry: &'static str, shared: u32) -> Result<&CudaFunction> {
        let function = self.0.get_mut(entry).ok_or_else(|| unknown(entry))?;
        if shared > function.shared {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared).unwrap_or(i32::MAX);
            let set = function.function.set_attribute(attribute, bytes);
            driver_call("shared memory", set)?;
            function.shared = shared;
        }
        Ok(&function.function)
    }
}

/// Code in the form that the driver requires.
fn taken(
    context: &Arc<CudaContext>,
    file: &str,
    mut code: Vec<u8>,
    driver: i32,
) -> Result<Arc<CudaModule>> {
    // PTX ends with a zero; a binary contains its length.
    if code.last() != Some(&0) {
        code.push(0);
    }
    let loaded = context.load_module(Ptx::from_binary(code));
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

/// Advice if the driver is older than the compiler.
fn what_to_do(driver: i32) -> String {
    let own = compile::version().map_or_else(
        || "none is found".to_owned(),
        |found| format!("{found} is found"),
    );
    let knows = cuda_version(driver);
    format!(
        "This driver supports CUDA {knows}; the kernels that come with the program are of CUDA 13.0 and need driver 580 or newer. \
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
