//! Launches of kernels, which may start before the kernel in front of them has ended (programmatic dependent launch).

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, sys};

use super::driver_call;
use crate::backend::Result;
use crate::backend::cuda::machine::{Command, Launch};

/// Whether kernels may start early: yes, unless `KIMI_LINEAR_PDL` is `0`.
pub(super) fn early_launches_wanted() -> bool {
    std::env::var_os("KIMI_LINEAR_PDL").is_none_or(|value| value != "0")
}

/// Each command, and whether it is a kernel that may start early.
///
/// A kernel of ours waits for the kernels before it with its first statement, and so does the one in front of it. A product's
/// kernel and a copy do not wait: a kernel after one of them starts when it has ended.
pub(super) fn with_early(commands: &[Command]) -> impl Iterator<Item = (&Command, bool)> {
    let is_launch = |command: &Command| matches!(command, Command::Launch(_));
    let before = std::iter::once(false).chain(commands.iter().map(is_launch));
    let both = commands.iter().zip(before);
    both.map(move |(command, after_launch)| (command, after_launch && is_launch(command)))
}

/// Enqueues a kernel. `parameters` is its struct of parameters. With `early` its blocks may start before the kernel in front of
/// it has ended.
///
/// # Safety
/// The parameters are the struct that the kernel takes, and what they point to is not freed before the kernel has ended. With
/// `early`, this kernel and the one in front of it begin with `griddepcontrol.wait`.
///
/// # Errors
/// A launch that the driver refuses.
pub(super) unsafe fn launch(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    launch: &Launch,
    parameters: &mut [u64],
    early: bool,
) -> Result<()> {
    driver_call("its context", stream.context().bind_to_thread())?;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        },
    };
    let [x, y, z] = launch.grid();
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads(),
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared(),
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: early.into(),
    };
    // A kernel has one parameter, the struct.
    let mut pointers: [*mut c_void; 1] = [parameters.as_mut_ptr().cast()];
    // SAFETY: the configuration, its attribute and the parameters live until the call returns, and it copies them. The rest is
    // the caller's promise.
    let launched = unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function.cu_function(),
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    driver_call(launch.kernel(), launched.result())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::machine::{Buffer, Memory, Place};
    use crate::backend::cuda::params::Fill;
    use crate::backend::cuda::step::Kernel;

    struct Nowhere;

    impl Memory for Nowhere {}

    #[test]
    fn only_a_kernel_behind_a_kernel_starts_early() {
        let buffer = Arc::new(Buffer::of(Box::new(Nowhere), 64));
        let kernel = || {
            let params = Fill {
                output: &buffer,
                format: 0,
                count: 16,
                seed: 0,
                mean: 0.0,
                scale: 0.0,
            };
            Command::Launch(Kernel::new("fill", 256, &params).over([1, 1, 1]))
        };
        let copy = || {
            let place = |start| Place::new(&buffer, start, 16).unwrap();
            Command::Copy {
                from: place(0),
                to: place(16),
            }
        };
        let commands = [
            kernel(),
            kernel(),
            copy(),
            copy(),
            kernel(),
            kernel(),
            kernel(),
        ];
        let early: Vec<bool> = with_early(&commands).map(|(_, early)| early).collect();
        assert_eq!(early, [false, true, false, false, false, true, true]);
        assert_eq!(with_early(&[]).count(), 0);
    }
}
