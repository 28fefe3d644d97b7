//! A bounded number of drawn requests, schemas, templates, chats and answers: no panic, no 5xx, and the server goes on. `make fuzz`
//! tries more of each.
//!
//! A case that fails is shrunk, and the seed of it is added to a file in `tests/proptest-regressions`; every later run tries the seeds
//! in there first.

mod answers;
pub mod requests;
mod schemas;
mod templates;
mod values;

use std::sync::{Arc, LazyLock};

use kimi_linear::tokenizer::Tokenizer;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

use super::harness::{Running, Setup, model_dir};
use crate::seeds;

/// How often a property is tried, and where the seeds of failures are kept.
struct Kept(Config);

impl Kept {
    /// `file` is the source of the property.
    fn here(file: &'static str, cases: u32, seed: u64) -> Self {
        Self(Config {
            source_file: Some(file),
            ..seeds::config(cases, seed)
        })
    }

    fn cases(&self) -> u32 {
        self.0.cases
    }
}

/// Tries a property of a server, which must be empty and still answer at the end.
fn served<S: Strategy>(
    setup: Setup,
    kept: Kept,
    strategy: S,
    property: impl AsyncFn(&Running, S::Value) -> Result<(), TestCaseError>,
) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let server = runtime.block_on(setup.start());
    let tried =
        TestRunner::new(kept.0).run(&strategy, |case| runtime.block_on(property(&server, case)));
    if let Err(failure) = tried {
        panic!("{failure}");
    }
    runtime.block_on(async {
        server.chat("Still there?", json!({})).await;
        server.assert_empty().await;
    });
}

/// The tokenizer of the demo model.
fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> =
        LazyLock::new(|| Arc::new(Tokenizer::from_dir(&model_dir()).unwrap()));
    &TOKENIZER
}
