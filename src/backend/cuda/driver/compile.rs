//! NVRTC: from a kernel's source to PTX, without a GPU or its driver.

use std::ffi::CString;

use cudarc::nvrtc;
use xxhash_rust::xxh3::xxh3_128;

use super::unavailable;
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

/// What the compiler calls devices of this compute capability, after `compute_` or `sm_`.
#[must_use]
pub fn architecture((major, minor): (i32, i32)) -> String {
    // Hopper's own instructions need the `a`; PTX for others is what later ones take too.
    let own = if (major, minor) == (9, 0) { "a" } else { "" };
    format!("{major}{minor}{own}")
}

/// The name of what comes of a source with these options, for a driver where it is of one.
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

/// PTX of a file of [`kernels::KERNELS`] for devices of this compute capability, and the name, without its ending, under
/// which a folder of compiled kernels has it. Needs NVRTC, but neither a GPU nor its driver.
///
/// # Errors
/// No NVRTC, or a file that does not compile, with what the compiler says.
pub fn ptx(file: &str, text: &str, capability: (i32, i32)) -> Result<(String, Vec<u8>)> {
    let (source, options) = (kernels::written_out(text), options(capability));
    let code = compile(file, &source, &options)?;
    Ok((key(&source, &options, None), code))
}

/// Whether NVRTC is found.
pub(super) fn present() -> bool {
    // SAFETY: it only tries to open a library.
    unsafe { nvrtc::sys::is_culib_present() }
}

/// NVRTC's version, such as `13.0`, where it is found.
pub(super) fn version() -> Option<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and the call writes two integers.
    let asked = present()
        && unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) }
            .result()
            .is_ok();
    asked.then(|| format!("{major}.{minor}"))
}

/// Compiles to PTX.
pub(super) fn compile(file: &str, source: &str, options: &[String]) -> Result<Vec<u8>> {
    if !present() {
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
