//! Weights that are generated when a test needs them, equal to those of `tests/reference/hashed.py`.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kimi_linear::config::{Dtype, ModelConfig};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// A folder with the files of `stored` and the weights for its `config.json`.
pub fn folder(stored: &Path) -> PathBuf {
    static FOLDERS: Mutex<Vec<(PathBuf, TempDir)>> = Mutex::new(Vec::new());
    let mut folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, folder)) = folders.iter().find(|(from, _)| from == stored) {
        return folder.path().to_owned();
    }
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(stored).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    write(folder.path());
    let path = folder.path().to_owned();
    folders.push((stored.to_owned(), folder));
    path
}

fn write(folder: &Path) {
    let config = ModelConfig::from_file(&folder.join("config.json")).unwrap();
    let made = config.tensors().into_iter().map(|spec| {
        let shape = spec.also.first().unwrap_or(&spec.shape).clone();
        let values = values(&spec.name, shape.iter().product());
        let single = spec.name.ends_with("A_log") || spec.name.ends_with("dt_bias");
        let (dtype, kept) = if single {
            (safetensors::Dtype::F32, Dtype::F32)
        } else {
            (safetensors::Dtype::BF16, Dtype::Bf16)
        };
        (spec.name, dtype, shape, kept.narrow(&values))
    });
    let made: Vec<_> = made.collect();
    let views = made.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// The numbers of a tensor: all are exact in its dtype.
fn values(name: &str, count: usize) -> Vec<f32> {
    // FNV-1a.
    let seed = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let drawn = (0..count as u32).map(|i| {
        let mut x = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9));
        x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
        x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
        f32::from(((x ^ (x >> 16)) >> 24) as u8 as i8)
    });
    let drawn = drawn.enumerate().map(|(i, q)| value(name, i, q));
    drawn.collect()
}

/// From a random number of eight bits.
fn value(name: &str, i: usize, q: f32) -> f32 {
    let about_zero = |exponent: i32| (q + 0.5) / 128.0 * 2.0_f32.powi(exponent);
    if name.ends_with("A_log") {
        (q + 128.0) * 11.0 / 1024.0
    } else if name.ends_with("dt_bias") {
        match (i % 17, i % 23) {
            (_, 5) => -12.0,
            (0, _) => 3.0,
            _ => -7.0 + (q + 128.0) * 19.0 / 1024.0,
        }
    } else if name.contains("norm") {
        1.0 + (q / 4.0).floor() / 64.0
    } else if name.contains("embed_tokens") {
        about_zero(1)
    } else if name.contains("conv1d") {
        about_zero(0)
    } else if name.ends_with("kv_a_proj_with_mqa.weight") {
        about_zero(-11)
    } else if name.ends_with("k_proj.weight") || name.contains("layers.1.self_attn.q_proj") {
        about_zero(-10)
    } else {
        about_zero(-3)
    }
}
