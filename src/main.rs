//! The `kimi-linear` program: one command, a subcommand for each thing to do.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    name_a_runtime_folder();
    cli::run()
}

/// Mesa's Vulkan layer looks for a Wayland socket, and libwayland prints an error of its own where the variable that says
/// in which folder names none, as in containers and over ssh. With a folder that has no socket it is silent.
#[cfg(target_os = "linux")]
#[expect(
    unsafe_code,
    reason = "no other thread has been started that could read the environment"
)]
fn name_a_runtime_folder() {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map(std::path::PathBuf::from);
    if !folder.is_some_and(|folder| folder.is_absolute()) {
        // SAFETY: this is the first thing that the program does, in its only thread.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
}
