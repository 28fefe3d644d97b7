//! Python for tests.
#![allow(unreachable_pub, missing_docs)]

use std::path::PathBuf;

/// The interpreter with the packages that tests need, installed by the Makefile.
pub fn interpreter() -> PathBuf {
    let named = std::env::var_os("KIMI_LINEAR_TEST_PYTHON").map(PathBuf::from);
    let python = named.unwrap_or_else(|| {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python")
    });
    assert!(
        python.exists(),
        "{}: not there; `make target/python/made` makes it, or KIMI_LINEAR_TEST_PYTHON names a Python with `openai`, `anthropic`, `numpy`, `safetensors`, `gguf`, `huggingface_hub`, `jinja2` and `matplotlib`",
        python.display()
    );
    python
}
