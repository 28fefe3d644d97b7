//! GGUF files that the Python package `gguf` writes from a reference checkpoint, compared with that checkpoint.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../common/backends.rs"]
mod backends;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
#[path = "../common/emulated.rs"]
mod emulated;
#[path = "../common/python.rs"]
mod python;

/// A test for each type of blocks that the CPU reads: `check` with the type's name.
macro_rules! each_type {
    ($check:ident) => {
        each_type! { $check:
            q8_0 "Q8_0",
            q4_0 "Q4_0",
            q4_1 "Q4_1",
            q5_0 "Q5_0",
            q5_1 "Q5_1",
            mxfp4 "MXFP4",
            q2_k "Q2_K",
            q3_k "Q3_K",
            q4_k "Q4_K",
            q5_k "Q5_K",
            q6_k "Q6_K",
            iq4_nl "IQ4_NL",
            iq4_xs "IQ4_XS",
            iq3_s "IQ3_S",
            iq3_xxs "IQ3_XXS",
            iq2_s "IQ2_S",
            iq2_xs "IQ2_XS",
            iq2_xxs "IQ2_XXS",
        }
    };
    ($check:ident: $($name:ident $kind:literal),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                $check($kind);
            }
        )*
    };
}

mod formats;
mod importance;
mod logits;
mod metadata;
mod overrides;
mod program;
mod quantize;
mod split;
mod tokenizer;
mod traps;
mod unused;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::reference;
use kimi_linear::checkpoint::{Checkpoint, ModelFiles, TensorData};
use kimi_linear::config::ModelConfig;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The checkpoint from which all files are written.
const FIXTURE: &str = "tiny-256";

/// A GGUF in a folder of its own.
struct Written {
    dir: TempDir,
}

impl Written {
    /// Writes one from the fields that `write_gguf.py` describes.
    fn new(fields: Value) -> Self {
        Self::called("model.gguf", fields)
    }

    fn called(name: &str, mut fields: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let written = Self { dir };
        fields["source"] = json!(reference(FIXTURE));
        fields["out"] = json!(written.dir.path().join(name));
        for copy in ["expected", "noisy"] {
            let folder = written.dir.path().join(copy);
            std::fs::create_dir(&folder).unwrap();
            std::fs::copy(
                reference(FIXTURE).join("config.json"),
                folder.join("config.json"),
            )
            .unwrap();
            fields[copy] = json!(folder.join("model.safetensors"));
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gguf/write_gguf.py");
        let output = Command::new(python::interpreter())
            .arg(script)
            .arg(fields.to_string())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        written
    }

    /// A BF16 file with other keys.
    fn with_keys(keys: Value) -> Self {
        Self::new(json!({ "type": "BF16", "keys": keys }))
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    fn open(&self) -> (ModelConfig, Checkpoint) {
        open(&self.file()).unwrap()
    }

    /// The error with which it is refused.
    fn refusal(&self) -> String {
        match open(&self.file()) {
            Ok(_) => panic!("it opens"),
            Err(message) => message,
        }
    }

    /// A tensor's values, as widened by the package.
    fn expected(&self, name: &str) -> Vec<f32> {
        let file = std::fs::read(self.dir.path().join("expected/model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let four = tensor.data().chunks_exact(4);
        four.map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

fn open(path: &Path) -> Result<(ModelConfig, Checkpoint), String> {
    let files = ModelFiles::open(path).map_err(|error| error.to_string())?;
    let config = files.config().map_err(|error| error.to_string())?;
    let checkpoint = files
        .checkpoint(&config)
        .map_err(|error| error.to_string())?;
    Ok((config, checkpoint))
}

/// The checkpoint in safetensors.
fn published() -> (ModelConfig, Checkpoint) {
    open(&reference(FIXTURE)).unwrap()
}

fn widened(tensor: &TensorData) -> Vec<f32> {
    let mut values = vec![0.0; tensor.elements()];
    tensor.format.widen(&tensor.bytes, &mut values);
    values
}

/// Asserts that two lists hold the same bits.
#[track_caller]
fn same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            a.to_bits(),
            b.to_bits(),
            "{what}, element {i}: {a} instead of {b}"
        );
    }
}
