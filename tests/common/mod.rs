//! Functions that several integration tests share: reading reference results, and errors between tensors.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

pub mod caches;
pub mod hashed;
pub mod tokenizer;

use std::path::PathBuf;

use safetensors::SafeTensors;

/// A file or folder of `tests/reference`; the weights of `tiny-256` and `tiny-8` are generated in it.
pub fn reference(name: &str) -> PathBuf {
    let stored = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name);
    if ["tiny-256", "tiny-8"].contains(&name) {
        return hashed::folder(&stored);
    }
    stored
}

/// The tensors of one safetensors file, widened.
pub struct Fixture(Vec<u8>);

impl Fixture {
    pub fn open(name: &str) -> Self {
        Self(std::fs::read(reference(name)).expect("a reference file"))
    }

    fn view<R>(&self, name: &str, f: impl FnOnce(safetensors::tensor::TensorView<'_>) -> R) -> R {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        f(tensors
            .tensor(name)
            .unwrap_or_else(|_| panic!("no tensor {name}")))
    }

    pub fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.names().into_iter().map(str::to_owned).collect()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.view(name, |view| view.shape().to_vec())
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.view(name, |view| {
            assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
            view.data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect()
        })
    }

    pub fn i32(&self, name: &str) -> Vec<i32> {
        self.view(name, |view| {
            assert_eq!(view.dtype(), safetensors::Dtype::I32, "{name}");
            view.data()
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes(b.try_into().unwrap()))
                .collect()
        })
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.i32(name)
            .into_iter()
            .map(|id| id.try_into().unwrap())
            .collect()
    }
}

/// `||x - reference|| / ||reference||`; infinite if a number is not finite or lengths differ.
pub fn error(x: &[f32], reference: &[f32]) -> f64 {
    if x.len() != reference.len() || x.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(
        &mut x
            .iter()
            .zip(reference)
            .map(|(a, b)| f64::from(*a) - f64::from(*b)),
    );
    let size = norm(&mut reference.iter().map(|x| f64::from(*x)));
    if size == 0.0 {
        difference
    } else {
        difference / size
    }
}

/// Asserts that `x` is within `bound` of `reference`.
#[track_caller]
pub fn close(what: &str, x: &[f32], reference: &[f32], bound: f64) {
    let error = error(x, reference);
    assert!(
        error <= bound,
        "{what}: error {error:.3e} exceeds {bound:.1e}"
    );
}
