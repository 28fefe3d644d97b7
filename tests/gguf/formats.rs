//! Every type: loaded values are those of the `gguf` package; plain types give the results of the published checkpoint.

use kimi_linear::checkpoint::{Fingerprint, Format};
use kimi_linear::config::ModelConfig;
use serde_json::json;

use super::backends::cpu;
use super::common::{Fixture, close};
use super::logits::logits;
use super::{FIXTURE, Written, published, same_bits, widened};

/// A file in a plain dtype equals the published checkpoint, except for the rounding error of a logarithm of an exponential.
fn plain(kind: &str) {
    let written = Written::new(json!({ "type": kind }));
    let (config, checkpoint) = written.open();
    let (published_config, published) = published();
    assert_eq!(
        ModelConfig {
            dtype: None,
            eos_token_ids: config.eos_token_ids.clone(),
            ..published_config.clone()
        },
        config
    );
    assert_eq!(checkpoint.len(), published.len());
    for tensor in published.tensors().map(Result::unwrap) {
        let loaded = checkpoint.tensor(&tensor.name).unwrap();
        assert_eq!(loaded.shape, tensor.shape, "{}", tensor.name);
        if tensor.name.ends_with("A_log") {
            for (a, b) in widened(&loaded).iter().zip(widened(&tensor)) {
                assert!((a - b).abs() < 1e-6, "{}: {a} instead of {b}", tensor.name);
            }
            continue;
        }
        same_bits(&tensor.name, &widened(&loaded), &widened(&tensor));
        let matrix = tensor.name.ends_with("_proj.weight") || tensor.name.contains("experts");
        if matrix && kind == "BF16" {
            assert_eq!(loaded.format, Format::BF16, "{}", tensor.name);
            assert_eq!(loaded.bytes, tensor.bytes, "{}", tensor.name);
        }
    }
    let found = logits(&config, &checkpoint, cpu());
    let expected = Fixture::open(&format!("{FIXTURE}/expected.safetensors"));
    let expected_here = logits(&published_config, &published, cpu());
    close(kind, &found, &expected_here, 1e-6);
    close(kind, &found, &expected.f32("prompt.37.logits"), 1e-5);
    assert_ne!(
        Fingerprint::stored(&checkpoint).unwrap(),
        Fingerprint::stored(&published).unwrap(),
        "norms are kept in F32 here"
    );
}

#[test]
fn f32_files_are_the_published_checkpoint() {
    plain("F32");
}

#[test]
fn bf16_files_are_the_published_checkpoint() {
    plain("BF16");
}

/// Each tensor of a quantised file, widened, has the bits of the package's `dequantize`.
fn quantised(kind: &str) {
    let written = Written::new(json!({ "type": kind }));
    let (_, checkpoint) = written.open();
    let mut blocks = 0;
    for tensor in checkpoint.tensors().map(Result::unwrap) {
        let expected = written.expected(&tensor.name);
        if tensor.name.ends_with("A_log") {
            close(&tensor.name, &widened(&tensor), &expected, 1e-6);
        } else {
            same_bits(&tensor.name, &widened(&tensor), &expected);
        }
        blocks += usize::from(matches!(tensor.format, Format::Block(_)));
        if tensor.name.ends_with("kv_b_proj.weight") {
            let fits = [Format::F16, Format::F32].contains(&tensor.format);
            assert!(fits, "{kind}: {}", tensor.format);
        }
    }
    assert_eq!(
        blocks,
        2 + 9 + 3 + 3 + 3 + 9,
        "{kind}: every matrix but router and kv_b"
    );
}

each_type!(quantised);

/// The cache's key of a model: the same file twice is the same model, another type of one tensor is another model.
#[test]
fn fingerprints_tell_files_apart() {
    let of = |types| {
        let written = Written::new(json!({ "type": "Q8_0", "types": types }));
        Fingerprint::stored(&written.open().1).unwrap()
    };
    let first = of(json!({}));
    assert_eq!(first, of(json!({})));
    assert_ne!(first, of(json!({ "output.weight": "Q5_0" })));
}

/// Only `A_log` and `kv_b_proj` are copied from the mapping.
#[test]
fn tensors_are_slices_of_the_mapped_file() {
    let written = Written::new(json!({ "type": "Q4_K" }));
    let (_, checkpoint) = written.open();
    let size = std::fs::metadata(written.file()).unwrap().len();
    let copied: u64 = checkpoint
        .tensors()
        .map(Result::unwrap)
        .filter(|tensor| tensor.name.ends_with("A_log") || tensor.name.contains("kv_b_proj"))
        .map(|tensor| tensor.bytes.len() as u64)
        .sum();
    assert!(checkpoint.total_bytes() - copied < size);
    let mut ranges: Vec<(usize, usize)> = checkpoint
        .tensors()
        .map(Result::unwrap)
        .filter(|tensor| tensor.name.contains("experts.0.") || tensor.name.contains("experts.2."))
        .map(|tensor| (tensor.bytes.as_ptr() as usize, tensor.bytes.len()))
        .collect();
    ranges.sort_unstable();
    let (first, last) = (ranges[0], ranges[ranges.len() - 1]);
    assert!(((last.0 + last.1 - first.0) as u64) < size, "one mapping");
    assert_eq!(checkpoint.files().collect::<Vec<_>>(), [written.file()]);
}
