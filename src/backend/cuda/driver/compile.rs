//! From a kernel's source to a function: kept on disk, else compiled by NVRTC to PTX, which the driver makes code of.
//!
//! The cache is a folder of files named by what they come from: a hash over source, options and driver. A folder given by
//! `KIMI_LINEAR_KERNELS` holds kernels compiled elsewhere, for machines without NVRTC; those are named by source and
//! options alone, since the driver is not known where they are made. A file that the driver refuses, such as PTX of a newer
//! compiler, is compiled anew, and only what the driver took is kept.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use cudarc::driver::result;
use cudarc::driver::sys;
use cudarc::nvrtc;
use xxhash_rust::xxh3::xxh3_128;

use super::{told, unavailable};
use crate::backend::Result;
use crate::backend::cuda::kernels;
use crate::error::BackendError;

/// Shared memory that a block has without asking, what it declares included.
const UNASKED: u32 = 48 << 10;

struct Function {
    handle: sys::CUfunction,
    /// The most dynamic shared memory asked for.
    shared: u32,
}

/// Modules and functions, loaded when they are first wanted.
pub(super) struct Functions {
    capability: (i32, i32),
    driver: i32,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
}

// SAFETY: modules and functions may be used from any thread with the context current; they live behind a lock.
unsafe impl Send for Functions {}

impl Drop for Functions {
    fn drop(&mut self) {
        for module in self.modules.values() {
            // SAFETY: loaded once, unloaded once.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

/// NVRTC's options for a device of this compute capability.
fn options((major, minor): (i32, i32)) -> Vec<String> {
    // Hopper's own instructions need the `a`; PTX for others is what later ones take too.
    let own = if (major, minor) == (9, 0) { "a" } else { "" };
    vec![
        format!("--gpu-architecture=compute_{major}{minor}{own}"),
        "--std=c++17".to_owned(),
        "--extra-device-vectorization".to_owned(),
    ]
}

/// The name of what comes of a source with these options.
fn key(source: &str, options: &[String], driver: Option<i32>) -> String {
    let mut text = source.to_owned();
    for option in options {
        text.push('\0');
        text.push_str(option);
    }
    if let Some(driver) = driver {
        text.push_str(&format!("\0driver {driver}"));
    }
    format!("{:032x}", xxh3_128(text.as_bytes()))
}

/// Where compiled kernels are kept: `KIMI_LINEAR_CACHE`, else the user's folder for caches.
fn cache() -> Option<PathBuf> {
    let named = std::env::var_os("KIMI_LINEAR_CACHE").filter(|folder| !folder.is_empty());
    let own = || dirs::cache_dir().map(|caches| caches.join("kimi-linear").join("cuda"));
    named.map(PathBuf::from).or_else(own)
}

impl Functions {
    pub(super) fn new(capability: (i32, i32), driver: i32) -> Self {
        Self {
            capability,
            driver,
            modules: HashMap::new(),
            functions: HashMap::new(),
        }
    }

    /// An entry point, allowed so much dynamic shared memory.
    pub(super) fn get(&mut self, entry: &'static str, shared: u32) -> Result<sys::CUfunction> {
        if !self.functions.contains_key(entry) {
            let handle = self.load(entry)?;
            // SAFETY: the function is of a module that lives.
            let own = told("shared memory", unsafe {
                result::function::get_function_attribute(
                    handle,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
            })?;
            let shared = UNASKED.saturating_sub(u32::try_from(own).unwrap_or(0));
            self.functions.insert(entry, Function { handle, shared });
        }
        let Some(function) = self.functions.get_mut(entry) else {
            return Err(unknown(entry));
        };
        if shared > function.shared {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a module that lives.
            told("shared memory", unsafe {
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

    fn load(&mut self, entry: &'static str) -> Result<sys::CUfunction> {
        let (file, source) = kernels::source_of(entry).ok_or_else(|| unknown(entry))?;
        let module = match self.modules.get(file) {
            Some(module) => *module,
            None => {
                let module = self.module(file, &source)?;
                self.modules.insert(file, module);
                module
            }
        };
        let name = CString::new(entry).map_err(|_| unknown(entry))?;
        // SAFETY: the module lives as long as `self`.
        told(entry, unsafe { result::module::get_function(module, name) })
    }

    /// The module of a file: packed, kept or compiled.
    fn module(&self, file: &str, source: &str) -> Result<sys::CUmodule> {
        let options = options(self.capability);
        let packed = std::env::var_os("KIMI_LINEAR_KERNELS")
            .map(|folder| Path::new(&folder).join(format!("{}.ptx", key(source, &options, None))));
        let kept = cache()
            .map(|cache| cache.join(format!("{}.ptx", key(source, &options, Some(self.driver)))));
        for path in packed.iter().chain(&kept) {
            let Ok(code) = std::fs::read(path) else {
                continue;
            };
            match taken(file, code) {
                Ok(module) => return Ok(module),
                Err(error) => {
                    tracing::warn!("{}: {error}; it is compiled anew", path.display());
                }
            }
        }
        let code = compile(file, source, &options)?;
        let module = taken(file, code.clone())?;
        if let Some(path) = kept {
            // A cache that cannot be written costs time, not answers. The file appears whole or not at all.
            let keep = || -> std::io::Result<()> {
                let cache = path.parent().unwrap_or(Path::new("."));
                std::fs::create_dir_all(cache)?;
                let file = tempfile::NamedTempFile::new_in(cache)?;
                std::fs::write(file.path(), &code)?;
                file.persist(&path).map_err(|error| error.error)?;
                Ok(())
            };
            if let Err(error) = keep() {
                tracing::debug!(%error, path = %path.display(), "a compiled kernel is not kept");
            }
        }
        Ok(module)
    }
}

/// Code as the driver takes it.
fn taken(file: &str, code: Vec<u8>) -> Result<sys::CUmodule> {
    let code = ended(code);
    // SAFETY: the code is PTX that ends in a zero, or a binary that says its own length.
    told(file, unsafe {
        result::module::load_data(code.as_ptr().cast())
    })
}

fn ended(mut code: Vec<u8>) -> Vec<u8> {
    if code.last() != Some(&0) {
        code.push(0);
    }
    code
}

fn unknown(entry: &str) -> BackendError {
    BackendError::Driver {
        backend: "cuda",
        what: format!("kernel {entry}"),
        reason: "there is no such kernel".to_owned(),
    }
}

/// PTX of a file of [`kernels::KERNELS`] for devices of this compute capability, and the name under which
/// `KIMI_LINEAR_KERNELS` finds it. Needs NVRTC, but neither a GPU nor its driver.
///
/// # Errors
/// No NVRTC, or a file that does not compile, with what the compiler says.
pub fn ptx(file: &str, text: &str, capability: (i32, i32)) -> Result<(String, Vec<u8>)> {
    let (source, options) = (kernels::written_out(text), options(capability));
    let code = compile(file, &source, &options)?;
    Ok((format!("{}.ptx", key(&source, &options, None)), code))
}

/// Compiles to PTX.
fn compile(file: &str, source: &str, options: &[String]) -> Result<Vec<u8>> {
    // SAFETY: it only tries to open a library.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(unavailable(
            "NVIDIA's compiler library NVRTC (libnvrtc) is not found: install the CUDA toolkit, or put the folder of \
             PyPI's nvidia-cuda-nvrtc on LD_LIBRARY_PATH",
        ));
    }
    let refused = |reason: String| BackendError::Driver {
        backend: "cuda",
        what: format!("kernels/{file}"),
        reason,
    };
    let text = CString::new(source).map_err(|error| refused(error.to_string()))?;
    let name = CString::new(file).map_err(|error| refused(error.to_string()))?;
    let program = nvrtc::result::create_program(&text, Some(&name))
        .map_err(|error| refused(error.to_string()))?;
    // SAFETY: the program is made above and destroyed below; source and name live until then.
    unsafe {
        let compiled = nvrtc::result::compile_program(program, options);
        let bytes = |chars: Vec<std::ffi::c_char>| -> Vec<u8> {
            chars.into_iter().map(|char| char as u8).collect()
        };
        let made = match compiled {
            Ok(()) => nvrtc::result::get_ptx(program)
                .map(bytes)
                .map(|mut code| {
                    // It counts the zero at its end, which is no part of a file.
                    code.truncate(
                        code.iter()
                            .rposition(|byte| *byte != 0)
                            .map_or(0, |last| last + 1),
                    );
                    code
                })
                .map_err(|error| refused(error.to_string())),
            Err(error) => {
                let log = nvrtc::result::get_program_log(program).map(bytes);
                let log = log.unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                Err(refused(format!("{error}: {}", log.trim_end_matches('\0'))))
            }
        };
        let _ = nvrtc::result::destroy_program(program);
        made
    }
}
