//! Models whose pools change their size in the middle of a sequence: the same bits, on every backend, on several devices and with
//! experts on the host; and weights that are freed.

use crate::backends::{self, BACKENDS};
use crate::group::{group, offloaded};
use crate::harness;
use kimi_linear::backend::{Backend, Block, DrawCapacity, Slot, StepOutput};
use kimi_linear::error::BackendError;
use kimi_linear::model::{Model, StepOptions};

const BLOCKS: usize = 4;
const PROMPT: [u32; 21] = [
    3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97, 16,
];

fn load(name: &str, backend: Box<dyn Backend>) -> Model {
    let cache = backend.device().cache;
    harness::load(name, backend, harness::limits(32, BLOCKS, cache))
}

/// The logits of the prompt and of some greedy tokens; before each pass but the first the pools get the next of these sizes.
fn run(model: &mut Model, sizes: &[(usize, usize)]) -> Vec<f32> {
    let options = StepOptions {
        candidates: 1,
        keep_rows: true,
        probe_hidden: false,
        draws: DrawCapacity::NONE,
    };
    let (mut logits, mut tokens, mut position) = (Vec::new(), PROMPT.to_vec(), 0);
    for pass in 0..6_usize {
        if let Some((slots, blocks)) = pass.checked_sub(1).and_then(|i| sizes.get(i)) {
            model.resize(*slots, *blocks).unwrap();
            let limits = *model.limits();
            assert_eq!((limits.slots, limits.blocks), (*slots, *blocks));
        }
        let mut step = model.step(model.limits().step, options).unwrap();
        let mut batch = harness::batch(&tokens, position, BLOCKS);
        // The first blocks, which every size has.
        let used = (position + tokens.len()).div_ceil(harness::BLOCK_TOKENS) as u32;
        batch.segments[0].blocks = (0..used).map(Block).collect();
        let output: StepOutput = step.submit(&batch).unwrap().wait().unwrap();
        position += tokens.len();
        logits.extend_from_slice(&output.logits);
        tokens = vec![output.choices.last().unwrap().candidates[0].0];
    }
    logits
}

const SIZES: [(usize, usize); 5] = [(5, 9), (2, 2), (7, 4), (3, 12), (2, 4)];

#[test]
fn a_sequence_goes_on_in_pools_of_other_sizes() {
    for (name, open) in BACKENDS {
        type Make<'a> = (&'a str, Box<dyn Fn() -> Box<dyn Backend> + 'a>);
        let makes: [Make<'_>; 4] = [
            ("one device", Box::new(open)),
            ("halves", Box::new(|| group("tiny-8", [2, 1, 1], open))),
            ("stages", Box::new(|| group("tiny-8", [1, 2, 2], open))),
            (
                "with a host",
                Box::new(|| offloaded("tiny-8", 1, open(), backends::cpu())),
            ),
        ];
        for (what, make) in makes {
            let expected = run(&mut load("tiny-8", make()), &[]);
            let mut model = load("tiny-8", make());
            let before = model.memory();
            let found = run(&mut model, &SIZES);
            assert!(found == expected, "{name}, {what}: other bits");
            // The last size is the first.
            let after = model.memory();
            assert_eq!(after.states, before.states, "{name}, {what}");
            assert_eq!(after.latents, before.latents, "{name}, {what}");
            assert_eq!(model.limits().slots, 2);
            assert!(before.weights > 0 && before.states > 0 && before.latents > 0);
        }
    }
}

/// A step of before is refused, also after a change of only one pool.
#[test]
fn steps_of_before_are_refused() {
    for (name, open) in BACKENDS {
        let mut model = load("tiny-a", open());
        let options = StepOptions {
            candidates: 1,
            keep_rows: false,
            probe_hidden: false,
            draws: DrawCapacity::NONE,
        };
        for (slots, blocks) in [(3, BLOCKS), (3, BLOCKS + 1)] {
            let mut step = model.step(model.limits().step, options).unwrap();
            let batch = harness::batch(&PROMPT, 0, BLOCKS);
            step.submit(&batch).unwrap().wait().unwrap();
            model.resize(slots, blocks).unwrap();
            let refused = step.submit(&batch).map(drop);
            let refused = matches!(refused, Err(BackendError::Shape { .. }));
            assert!(refused, "{name}: {slots} slots, {blocks} blocks");
        }
        let gone = model.states();
        model.resize(1, BLOCKS).unwrap();
        let read = model.backend().read_state(&gone, 0, Slot(0)).wait();
        assert!(read.is_err(), "{name}");
        let states = model.states();
        let read = model.backend().read_state(&states, 0, Slot(1)).wait();
        assert!(read.is_err(), "{name}: there is one slot");
    }
}
