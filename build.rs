//! Lists the files of `shaders/` and `kernels/`, whose texts travel in the program: a new file is part of the build by being there.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The files of `folder` with this ending, by name in ascending order.
fn files(folder: &Path, ending: &str) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == ending) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn main() -> std::io::Result<()> {
    let variable = |name| PathBuf::from(std::env::var_os(name).unwrap_or_default());
    let (root, out) = (variable("CARGO_MANIFEST_DIR"), variable("OUT_DIR"));
    // What the list is called, the folder, the ending of its files.
    let lists = [
        ("shaders", "shaders", "wgsl"),
        ("shared_shaders", "shaders/shared", "wgsl"),
        ("kernels", "kernels", "cu"),
        ("kernel_headers", "kernels/shared", "h"),
    ];
    for (list, folder, ending) in lists {
        println!("cargo::rerun-if-changed={folder}");
        let mut text = String::from("&[\n");
        for file in files(&root.join(folder), ending)? {
            let name = file.file_name().unwrap_or_default().display().to_string();
            writeln!(text, "    ({name:?}, include_str!({file:?})),")
                .map_err(std::io::Error::other)?;
        }
        text.push_str("]\n");
        std::fs::write(out.join(list).with_extension("rs"), text)?;
    }
    Ok(())
}
