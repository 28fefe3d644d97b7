//! The conformance list on the browser's GPU, for the page with `?conformance`.

// wasm-bindgen calls its use of JSPI experimental.
#![allow(deprecated)]

use kimi_linear::backend::wgpu::{Options, WgpuBackend};
use kimi_linear::conformance::{self, Verdict};
use wasm_bindgen::prelude::wasm_bindgen;

thread_local! {
    static GPU: std::cell::RefCell<Option<WgpuBackend>> = const { std::cell::RefCell::new(None) };
}

/// The names of all cases.
#[wasm_bindgen]
#[must_use]
pub fn cases() -> Vec<String> {
    let cases = conformance::cases().into_iter();
    cases.map(|case| case.name).collect()
}

/// Opens the browser's GPU for [`conformance`].
///
/// # Errors
/// Why there is none.
#[wasm_bindgen]
pub async fn open() -> Result<(), String> {
    let opened = WgpuBackend::open(Options::default()).await;
    let gpu = opened.map_err(|error| error.to_string())?;
    GPU.set(Some(gpu));
    Ok(())
}

/// Runs a case: its verdict and its largest error, in words. A case waits for the GPU many times, and is suspended then.
#[wasm_bindgen(jspi)]
#[must_use]
pub fn conformance(name: &str) -> String {
    let case = conformance::cases()
        .into_iter()
        .find(|case| case.name == name);
    let (Some(case), Some(mut gpu)) = (case, GPU.take()) else {
        return "failed: no such case, or no GPU".to_owned();
    };
    let outcome = conformance::run(&case, &mut gpu, conformance::Options::default());
    GPU.set(Some(gpu));
    let verdict = match outcome.verdict {
        Verdict::Passed => "passed",
        Verdict::Failed => "failed",
        Verdict::Skipped => "skipped",
        Verdict::Lost => "lost",
    };
    format!(
        "{verdict}: error {:.2e}, bound {:.0e}, {}",
        outcome.error, outcome.bound, outcome.detail
    )
}
