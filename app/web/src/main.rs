//! Makes the page of the app in a browser: `kimi-linear-web WASM FOLDER` writes `index.html`, the WebAssembly and its
//! JavaScript.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use wasm_bindgen_cli_support::Bindgen;

const PAGE: &str = include_str!("../index.html");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [wasm, folder] = arguments.as_slice() else {
        bail!("usage: kimi-linear-web WASM FOLDER");
    };
    let folder = Path::new(folder);
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Bindgen::new()
        .input_path(wasm)
        .web(true)?
        .typescript(false)
        .remove_name_section(true)
        .remove_producers_section(true)
        .out_name("kimi_linear")
        .generate(folder)?;
    optimise(&folder.join("kimi_linear_bg.wasm"))?;
    std::fs::write(folder.join("index.html"), PAGE)?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let (name, bytes) = (entry.file_name(), entry.metadata()?.len());
        writeln!(std::io::stdout(), "{bytes:>9}  {}", name.to_string_lossy())?;
    }
    Ok(())
}

/// Makes the WebAssembly smaller with Binaryen's `wasm-opt`, where that is installed and knows the instructions in it:
/// old versions do not know the exceptions that the suspension of WebAssembly uses.
fn optimise(wasm: &Path) -> Result<()> {
    let optimised = wasm.with_extension("optimised");
    let run = Command::new("wasm-opt")
        .args(["-O2", "--all-features"])
        .arg(wasm)
        .arg("-o")
        .arg(&optimised)
        .status();
    match run {
        Ok(status) if status.success() => Ok(std::fs::rename(&optimised, wasm)?),
        Ok(status) => {
            writeln!(std::io::stderr(), "wasm-opt: {status}; the WebAssembly stays as it is")?;
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).context("wasm-opt cannot be run"),
    }
}
