//! NVRTC: compiles a kernel's source to PTX, without a GPU or its driver.

use cudarc::nvrtc::{self, CompileError, CompileOptions};
use xxhash_rust::xxh3::xxh3_128;

use super::{Library, unavailable};
use crate::backend::Result;
use crate::backend::cuda::kernels;
use crate::error::BackendError;

/// NVRTC's options for a device of this compute capability.
pub(super) fn options((major, minor): (i32, i32)) -> Vec<String> {
    vec![
        format!(
            "--gpu-architecture=compute_{}",
            architecture((major, minor))
        ),
        "--std=c++17".to_owned(),
        "--extra-device-vectorization".to_owned(),
    ]
}

/// NVRTC's name for devices of this compute capability, after `compute_` or `sm_`.
#[must_use]
pub fn architecture((major, minor): (i32, i32)) -> String {
    // Hopper's own instructions require the `a`; PTX for other architectures also runs on later ones.
    let own = if (major, minor) == (9, 0) { "a" } else { "" };
    format!("{major}{minor}{own}")
}

/// The file name of a source compiled with these options; for a driver if it depends on its version.
pub(super) fn key(source: &str, options: &[String], driver: Option<i32>) -> String {
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

/// The name, without the ending, of a file of [`kernels::KERNELS`] in a folder of kernels compiled for devices of this compute
/// capability. It depends on the text and on NVRTC's options.
#[must_use]
pub fn name(text: &str, capability: (i32, i32)) -> String {
    key(&kernels::written_out(text), &options(capability), None)
}

/// PTX of a file of [`kernels::KERNELS`] for devices of this compute capability. Requires NVRTC, but neither a GPU nor its
/// driver.
///
/// # Errors
/// No NVRTC, or a file that does not compile, with the compiler's message.
pub fn ptx(file: &str, text: &str, capability: (i32, i32)) -> Result<Vec<u8>> {
    compile(file, &kernels::written_out(text), &options(capability))
}

/// NVRTC's version, such as `13.0`; `None` if it is not found.
pub(super) fn version() -> Option<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is present, and the call writes two integers.
    let asked = Library::Nvrtc.present()
        && unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) }
            .result()
            .is_ok();
    asked.then(|| format!("{major}.{minor}"))
}

/// Compiles to PTX.
pub(super) fn compile(file: &str, source: &str, options: &[String]) -> Result<Vec<u8>> {
    if !Library::Nvrtc.present() {
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
    if source.contains('\0') {
        return Err(refused("its text has a zero in it".to_owned()));
    }
    let options = CompileOptions {
        options: options.to_vec(),
        name: Some(file.to_owned()),
        ..CompileOptions::default()
    };
    let made = nvrtc::compile_ptx_with_opts(source, options).map_err(|error| match error {
        CompileError::CompileError { nvrtc, log, .. } => {
            refused(format!("{nvrtc}: {}", log.to_string_lossy()))
        }
        error => refused(error.to_string()),
    })?;
    let code = made.as_bytes().unwrap_or_default();
    // The size includes the terminating zero, which is not part of a file.
    let end = code.iter().rposition(|byte| *byte != 0);
    Ok(code[..end.map_or(0, |last| last + 1)].to_vec())
}
