//! The list itself, the tables generated from it, and the scripts that plant bugs in sources.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use kimi_linear::config::ModelConfig;
use kimi_linear::conformance::list::OPERATIONS;
use kimi_linear::conformance::{cases, floors, report};
use libtest_mimic::{Failed, Trial};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("list/names are unique and operations known", names),
        Trial::test("list/docs/operations.md is what the list generates", table),
        Trial::test("list/docs/performance/hopper.md has the floors", hopper),
        Trial::test("list/rows of mutations.py match their text", || {
            rows_match("mutations.py")
        }),
        Trial::test("list/rows of kernel_mutations.py match their text", || {
            rows_match("kernel_mutations.py")
        }),
    ]
}

fn names() -> Result<(), Failed> {
    let mut seen = HashSet::new();
    for case in cases() {
        if !OPERATIONS.iter().any(|(name, _)| *name == case.operation) {
            return Err(format!("{}: no such operation", case.name).into());
        }
        if !seen.insert(case.name.clone()) {
            return Err(format!("{}: twice in the list", case.name).into());
        }
    }
    for (operation, _) in OPERATIONS {
        if !cases().iter().any(|case| case.operation == operation) {
            return Err(format!("{operation}: no case").into());
        }
    }
    Ok(())
}

fn table() -> Result<(), Failed> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let generated = report::operations_markdown(&cases());
    if std::env::var_os("KIMI_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &generated).unwrap();
    }
    if std::fs::read_to_string(&path).unwrap_or_default() != generated {
        return Err("docs/operations.md is out of date: run this test with KIMI_BLESS=1".into());
    }
    Ok(())
}

/// The floors are in a part of the document between two marks; everything else is written by hand.
fn hopper() -> Result<(), Failed> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance/hopper.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let [open, close] = ["<!-- floors -->\n", "<!-- end of floors -->"];
    let (before, rest) = text.split_once(open).ok_or("no mark where floors begin")?;
    let (_, after) = rest.split_once(close).ok_or("no mark where floors end")?;
    let table = floors::markdown(&ModelConfig::published().unwrap());
    let generated = format!("{before}{open}{table}{close}{after}");
    if std::env::var_os("KIMI_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    if std::fs::read_to_string(&path).unwrap() != generated {
        return Err("the floors in docs/performance/hopper.md are out of date: run this test with KIMI_BLESS=1".into());
    }
    Ok(())
}

/// A row whose text has changed plants no bug: a change of the text must update the row.
fn rows_match(script: &str) -> Result<(), Failed> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let output = Command::new("python3")
        .args(["-B", script, "--check"])
        .current_dir(folder)
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
}
