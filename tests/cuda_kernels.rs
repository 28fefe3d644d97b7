//! Every CUDA kernel compiles without a GPU: with NVRTC to PTX, as at run time, then with ptxas to machine code (cubin) for
//! sm_90a. The resources of each are in `docs/kernels.md`, no kernel may spill registers, and each waits first.
//!
//! `make install-cuda-compiler` downloads NVRTC and ptxas; `KIMI_BLESS=1` writes the table again. PTX, cubins and ptxas's
//! output are kept in `target/cuda/kernels`, with the names that the program looks for, which depend on the source; a file
//! whose source has not changed is not compiled again. `make kernels` runs this test.
#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use kimi_linear::backend::cuda::driver::compile::{architecture, name, ptx};
use kimi_linear::backend::cuda::kernels::{KERNELS, entries};
use rayon::prelude::*;

/// The H200's.
const CAPABILITY: (i32, i32) = (9, 0);
/// The part of a register file of 64 Ki for each thread if a block of 256 runs alone.
const MOST_REGISTERS: u32 = 255;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn tools() -> PathBuf {
    let tools = root().join("target/cuda/nvidia/cu13");
    assert!(
        tools.join("bin/ptxas").exists(),
        "NVRTC and ptxas are not there: make install-cuda-compiler"
    );
    tools
}

/// The resources of one entry point.
#[derive(Debug, PartialEq)]
struct Entry {
    file: &'static str,
    name: String,
    registers: u32,
    shared: u32,
    stack: u32,
    spilled: u32,
}

/// The number before `unit` in a line of ptxas, 0 if there is none.
fn number(line: &str, unit: &str) -> u32 {
    let before = line.split(unit).next().filter(|before| *before != line);
    let digits = before.and_then(|before| before.split_whitespace().last());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Compiles and assembles a file, unless that has been done; returns what ptxas printed.
fn assemble(file: &str, text: &str, code: &Path) -> String {
    let (cubin, printed) = (code.with_extension("cubin"), code.with_extension("ptxas"));
    if cubin.exists()
        && let Ok(text) = std::fs::read_to_string(&printed)
    {
        return text;
    }
    let compiled = ptx(file, text, CAPABILITY).unwrap_or_else(|error| panic!("{error}"));
    std::fs::write(code, compiled).unwrap();
    let output = Command::new(tools().join("bin/ptxas"))
        .arg(format!("-arch=sm_{}", architecture(CAPABILITY)))
        .args(["-v", "-o"])
        .args([&cubin, code])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{file}: {text}");
    std::fs::write(&printed, &text).unwrap();
    text
}

/// The resources that ptxas printed for a file.
fn resources(file: &'static str, printed: &str) -> Vec<Entry> {
    let mut found: Vec<Entry> = Vec::new();
    for line in printed.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            found.push(Entry {
                file,
                name: rest.split('\'').next().unwrap().to_owned(),
                registers: 0,
                shared: 0,
                stack: 0,
                spilled: 0,
            });
        } else if let Some(entry) = found.last_mut() {
            entry.stack += number(line, " bytes stack frame");
            entry.spilled +=
                number(line, " bytes spill stores") + number(line, " bytes spill loads");
            entry.registers += number(line, " registers");
            entry.shared += number(line, " bytes smem");
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    let mut named: Vec<&str> = found.iter().map(|entry| entry.name.as_str()).collect();
    named.dedup();
    let mut known = entries(file);
    known.sort_unstable();
    assert_eq!(
        named, known,
        "{file}: what the compiler finds, and what the program loads"
    );
    found
}

/// Checks that every entry point waits for the kernels before it (`grid_dependency_synchronize`) ahead of any access to memory
/// but its parameters: it may start before they have ended.
fn waits_first(file: &str, ptx: &str) {
    for entry in ptx.split(".entry ").skip(1) {
        let name = entry.split('(').next().unwrap();
        let before = entry.split("griddepcontrol.wait").next().unwrap();
        assert!(before.len() < entry.len(), "{file}: {name} never waits");
        let accesses = [
            "ld.", "st.", "ldu.", "atom.", "red.", "cp.", "prefetch", "call",
        ];
        for line in before.lines() {
            // Without its predicate.
            let mut words = line.split_whitespace();
            let instruction = words.find(|word| !word.starts_with('@')).unwrap_or("");
            let is_access = accesses.iter().any(|start| instruction.starts_with(start));
            assert!(
                !is_access || instruction.starts_with("ld.param."),
                "{file}: {name} does this before it waits: {line}"
            );
        }
    }
}

fn compiled() -> Vec<Entry> {
    let folder = root().join("target/cuda/kernels");
    std::fs::create_dir_all(&folder).unwrap();
    let names: Vec<String> = KERNELS
        .iter()
        .map(|(_, text)| name(text, CAPABILITY))
        .collect();
    // Results of other sources are removed.
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or("");
        if !names.iter().any(|name| name == stem) {
            std::fs::remove_file(&path).unwrap();
        }
    }
    let files: Vec<_> = KERNELS.iter().zip(&names).collect();
    let resources = files.into_par_iter().map(|((file, text), name)| {
        let code = folder.join(name).with_extension("ptx");
        let found = resources(file, &assemble(file, text, &code));
        waits_first(file, &std::fs::read_to_string(&code).unwrap());
        found
    });
    resources.flatten_iter().collect()
}

fn table(entries: &[Entry]) -> String {
    let mut text = "# The CUDA kernels on sm_90a\n\n\
        Generated by `KIMI_BLESS=1 cargo test --release --test cuda_kernels` from what NVRTC and ptxas 13.0.88 say, without a GPU. Shared\n\
        memory is what a kernel declares; what a launch adds is in `src/backend/cuda`. No kernel spills a register or keeps a stack.\n\n\
        | kernel | file | registers | shared memory, bytes |\n|---|---|---:|---:|\n"
        .to_owned();
    for entry in entries {
        writeln!(
            text,
            "| `{}` | `kernels/{}` | {} | {} |",
            entry.name, entry.file, entry.registers, entry.shared
        )
        .unwrap();
    }
    text
}

/// The libraries' folder must be known before a process starts, so a second process does the work.
#[test]
fn every_kernel_compiles_for_hopper_and_spills_nothing() {
    if std::env::var_os("KIMI_KERNELS_WORKER").is_some() {
        return check();
    }
    let libraries = tools().join("lib");
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::iter::once(libraries).chain(std::env::split_paths(&before));
    let status = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "every_kernel_compiles_for_hopper_and_spills_nothing",
            "--nocapture",
        ])
        .env("LD_LIBRARY_PATH", std::env::join_paths(paths).unwrap())
        .env("KIMI_KERNELS_WORKER", "1")
        .status()
        .unwrap();
    assert!(status.success());
}

fn check() {
    let all = compiled();
    for entry in &all {
        assert_eq!((entry.stack, entry.spilled), (0, 0), "{entry:?}");
        assert!((1..=MOST_REGISTERS).contains(&entry.registers), "{entry:?}");
    }
    let path = root().join("docs/kernels.md");
    let generated = table(&all);
    if std::env::var_os("KIMI_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "docs/kernels.md is out of date: run this test with KIMI_BLESS=1\n{generated}"
    );
}

#[test]
fn every_file_of_kernels_is_in_the_program() {
    for entry in std::fs::read_dir(root().join("kernels")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            !name.ends_with(".cu") || KERNELS.iter().any(|(known, _)| *known == name),
            "{name} is not in KERNELS"
        );
    }
}
