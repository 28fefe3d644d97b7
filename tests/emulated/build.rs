//! Compiles `kernels/*.cu` as C++ against `kernels/shared/host.h`.

use std::path::{Path, PathBuf};

fn files(folder: &Path, extension: &str) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn main() -> std::io::Result<()> {
    // Read at run time, because build output may have been moved with its folder.
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let (kernels, tried) = (here.join("../../kernels"), here.join("kernels"));
    for folder in [&kernels, &tried] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .include(&kernels)
        // A device rounds each operation as written, and lanes switch stacks.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        .flag("-fcf-protection=none")
        .flag("-U_FORTIFY_SOURCE")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-function")
        // Errors that a device reports as an illegal instruction; no runtime library.
        .flag("-fsanitize=alignment,bounds,integer-divide-by-zero")
        .flag("-fsanitize-undefined-trap-on-error")
        .flag("-xc++")
        // Kernels are found by the entries that they register.
        .link_lib_modifier("+whole-archive")
        .files(files(&kernels, "cu")?)
        .files(files(&tried, "cu")?)
        .file(kernels.join("shared/host.cpp"));
    build
        .try_compile("emulated_kernels")
        .map_err(std::io::Error::other)
}
