//! The conformance list on a replica: on its own device, and with all of its layers on another one, so that what a case writes is on
//! one device and what its program reads on the other. (Operations of a case have weights of one layer and pools of others, which
//! only whole models keep together: layers on several devices are tested in `tests/model/replicas`.)

use kimi_linear::backend::{Caches, LayerHome, Replicas};
use kimi_linear::config::ModelConfig;
use kimi_linear::conformance::{Options, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Make;

/// Cases that depend on the device that a test's calls go to, with reasons.
const APART: [(&str, &str); 7] = [
    ("mla_prefill/only the single", UNWRITTEN),
    ("mla_prefill/only the several", UNWRITTEN),
    ("mla_decode/only the single", UNWRITTEN),
    ("mla_decode/only the several", UNWRITTEN),
    ("pools/states of another number of slots", COUNTED),
    ("pools/latents of another number of blocks", COUNTED),
    ("pools/released weights", COUNTED),
];
const UNWRITTEN: &str = "rows that an operation leaves alone are not brought to its device";
const COUNTED: &str = "memory is that of the replica's own device";

pub(crate) fn trials(make: Make) -> Vec<Trial> {
    [("at home", 1), ("on the other device", 0)]
        .map(|(name, device)| Trial::test(format!("replica/{name}"), move || agrees(make, device)))
        .into()
}

/// Whether the second of two replicas passes the list with its layers on this device.
fn agrees(make: Make, device: usize) -> Result<(), Failed> {
    let config = ModelConfig::published()?;
    let mut failed = Vec::new();
    for case in cases() {
        let replicas = Replicas::new(vec![make(), make()], &config)?;
        let mut backend = replicas.backend(1);
        for layer in 0..config.layers.len() {
            backend.place(layer, &LayerHome::whole(device), Caches::Keep)?;
        }
        let outcome = run(&case, &mut *backend, Options::default());
        let fails = outcome.verdict != Verdict::Passed || outcome.error > outcome.bound;
        let apart = APART
            .iter()
            .filter(|(name, _)| device == 0 && *name == case.name);
        if let Some((name, reason)) = apart.into_iter().next() {
            println!("apart: {name}: {reason}");
            if !fails {
                failed.push(format!(
                    "{name} passes: take it out of those that are apart"
                ));
            }
        } else if fails {
            let (error, detail) = (outcome.error, outcome.detail);
            failed.push(format!("{}: {error:.1e}, {detail}", case.name));
        }
        // What it made is gone with it.
        drop(backend);
        for memory in [0, 1].map(|device| replicas.memory(device)) {
            if memory.weights + memory.states + memory.latents > 0 {
                failed.push(format!("{}: {memory:?} is left", case.name));
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(failed.join("\n").into()),
    }
}
