//! Compiled steps, one for each size in use: sizes are rounded up to powers of two, and a limited number of steps is kept.

use crate::backend::{Batch, Capacity, DrawCapacity, Step};
use crate::error::BackendError;
use crate::model::{Model, StepOptions, TraceChoice, TracedStep};

/// What the steps of a batch are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum StepForm {
    /// One step for the whole model.
    Whole,
    /// One step per layer.
    Layers,
    /// One step, in which all segments run in the form of single tokens.
    Stepwise,
}

struct CachedStep {
    capacity: Capacity,
    step_options: StepOptions,
    form: StepForm,
    steps: Vec<Box<dyn Step>>,
    used: u64,
}

/// The compiled steps of one model.
pub(super) struct StepCache {
    most: usize,
    steps: Vec<CachedStep>,
    clock: u64,
    /// The step for traced tokens.
    traced: Option<(TraceChoice, StepOptions, TracedStep)>,
}

impl StepCache {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            steps: Vec::new(),
            clock: 0,
            traced: None,
        }
    }

    /// Steps with capacity for `batch`, to be submitted one after the other.
    pub(super) fn steps(
        &mut self,
        model: &mut Model,
        batch: &Batch,
        step_options: StepOptions,
        form: StepForm,
    ) -> Result<&mut [Box<dyn Step>], BackendError> {
        let most = model.limits().step;
        let tokens = batch.tokens.len().next_power_of_two().min(most.tokens);
        let capacity = Capacity {
            tokens,
            segments: batch.segments.len().next_power_of_two().min(most.segments),
            outputs: batch.outputs.len().next_power_of_two().min(most.outputs),
            blocks: most.blocks,
            checkpoints: most.checkpoints,
        };
        let step_options = rounded(step_options, batch, capacity.segments);
        let draws = DrawCapacity::of(&batch.draws);
        self.clock += 1;
        let found = self.steps.iter().position(|step| {
            (step.capacity, step.form) == (capacity, form)
                && suits(&step.step_options, &step_options, &draws)
        });
        let index = match found {
            Some(index) => index,
            None => {
                if self.steps.len() >= self.most {
                    let oldest = (0..self.steps.len()).min_by_key(|index| self.steps[*index].used);
                    self.steps.swap_remove(oldest.unwrap_or(0));
                }
                let steps = match form {
                    StepForm::Whole => vec![model.step(capacity, step_options)?],
                    StepForm::Layers => model.layer_steps(capacity, step_options)?,
                    StepForm::Stepwise => vec![model.stepwise_step(capacity, step_options)?],
                };
                self.steps.push(CachedStep {
                    capacity,
                    step_options,
                    form,
                    steps,
                    used: 0,
                });
                self.steps.len() - 1
            }
        };
        let cached = &mut self.steps[index];
        cached.used = self.clock;
        Ok(&mut cached.steps)
    }

    /// The step for one traced token.
    pub(super) fn traced(
        &mut self,
        model: &mut Model,
        batch: &Batch,
        choice: TraceChoice,
        step_options: StepOptions,
    ) -> Result<&mut TracedStep, BackendError> {
        let step_options = rounded(step_options, batch, 1);
        let draws = DrawCapacity::of(&batch.draws);
        let found = self
            .traced
            .take()
            .filter(|traced| traced.0 == choice && suits(&traced.1, &step_options, &draws));
        let traced = match found {
            Some(traced) => traced,
            None => (
                choice,
                step_options,
                model.traced_step(choice, step_options)?,
            ),
        };
        Ok(&mut self.traced.insert(traced).2)
    }

    /// Drops all steps.
    pub(super) fn clear(&mut self) {
        self.traced = None;
        self.steps.clear();
    }
}

/// Minimum number of words for draws, if any has some: the allowed tokens of one draw, and a few thousand changes.
const LEAST_WORDS: usize = 1 << 14;

/// The options of the step for a batch: numbers of read-back rows and sizes of draws are rounded up, so that requests do not
/// each need a step of their own.
fn rounded(step_options: StepOptions, batch: &Batch, segments: usize) -> StepOptions {
    let up = |size: usize, least: usize| match size {
        0 => 0,
        _ => size.next_power_of_two().max(least),
    };
    let size = DrawCapacity::of(&batch.draws);
    StepOptions {
        candidates: step_options.candidates.next_power_of_two(),
        draws: DrawCapacity {
            draws: up(size.draws, segments),
            changed: up(size.changed, 1),
            words: up(size.words, LEAST_WORDS),
        },
        ..step_options
    }
}

/// Whether a step with these options does for a batch with draws of this size and the wanted options otherwise.
fn suits(found: &StepOptions, wanted: &StepOptions, draws: &DrawCapacity) -> bool {
    let wanted = StepOptions {
        draws: found.draws,
        ..*wanted
    };
    *found == wanted && found.draws.holds(draws)
}
