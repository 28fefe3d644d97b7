//! Recorded steps, one for each size of step that comes up: sizes are rounded up to powers of two, and only so many
//! recordings are kept.

use crate::backend::{Batch, Capacity, Step};
use crate::error::BackendError;
use crate::model::{Model, Recording, TraceChoice, TracedStep};

struct Recorded {
    capacity: Capacity,
    recording: Recording,
    step: Box<dyn Step>,
    used: u64,
}

/// The recordings of one model.
pub(super) struct Recordings {
    most: usize,
    steps: Vec<Recorded>,
    clock: u64,
    /// The one for traced tokens.
    traced: Option<(TraceChoice, Recording, TracedStep)>,
}

impl Recordings {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            steps: Vec::new(),
            clock: 0,
            traced: None,
        }
    }

    /// A step that holds `batch`.
    pub(super) fn step(
        &mut self,
        model: &mut Model,
        batch: &Batch,
        recording: Recording,
    ) -> Result<&mut dyn Step, BackendError> {
        let most = model.limits().step;
        let tokens = batch.tokens.len().next_power_of_two().min(most.tokens);
        let capacity = Capacity {
            tokens,
            pieces: batch.pieces.len().next_power_of_two().min(most.pieces),
            outputs: batch.outputs.len().next_power_of_two().min(most.outputs),
            blocks: most.blocks,
            checkpoints: most.checkpoints,
        };
        // Read-backs are rounded up too, so that requests do not each need a recording.
        let recording = Recording {
            candidates: recording.candidates.next_power_of_two(),
            ..recording
        };
        self.clock += 1;
        let found = self
            .steps
            .iter()
            .position(|step| step.capacity == capacity && step.recording == recording);
        let place = match found {
            Some(place) => place,
            None => {
                if self.steps.len() >= self.most {
                    let oldest = (0..self.steps.len()).min_by_key(|place| self.steps[*place].used);
                    self.steps.swap_remove(oldest.unwrap_or(0));
                }
                let step = model.record(capacity, recording)?;
                self.steps.push(Recorded {
                    capacity,
                    recording,
                    step,
                    used: 0,
                });
                self.steps.len() - 1
            }
        };
        let recorded = &mut self.steps[place];
        recorded.used = self.clock;
        Ok(&mut *recorded.step)
    }

    /// The step for one traced token.
    pub(super) fn traced(
        &mut self,
        model: &mut Model,
        choice: TraceChoice,
        recording: Recording,
    ) -> Result<&mut TracedStep, BackendError> {
        let found = self
            .traced
            .take()
            .filter(|traced| (traced.0, traced.1) == (choice, recording));
        let traced = match found {
            Some(traced) => traced,
            None => (choice, recording, model.record_traced(choice, recording)?),
        };
        Ok(&mut self.traced.insert(traced).2)
    }

    /// Lets all of them go.
    pub(super) fn clear(&mut self) {
        self.traced = None;
        self.steps.clear();
    }
}
