//! What an engine does when the caches of its sequences are gone: they wait again, and are computed again from their tokens.
//!
//! A sequence keeps its tokens and its sampler, so its answer does not change. Its prompt is cut where it was cut before, and the
//! tokens of its answer run in the form of single tokens, as when they were drawn. What was reported of it is not reported again.

use std::sync::Arc;

use super::core::Engine;
use super::request::RequestId;
use super::sequence::Sequence;
use crate::error::{EngineError, Error, Scope};

impl Engine {
    /// Gives up all states and latents: those of sequences, which are computed again, those of cached prefixes, and those of exports,
    /// which fail. Imports have their prompts computed here.
    pub fn recompute_all(&mut self) {
        self.submitted = None;
        self.step_cache.clear();
        let error = Arc::new(Error::from(EngineError::CachesDiscarded));
        let exported: Vec<RequestId> = self.exports.ids().collect();
        for id in exported {
            self.fail(id, &error);
        }
        self.cache.clear();
        let mut held: Vec<Sequence> = self.running.drain(..).collect();
        held.append(&mut self.incoming);
        for mut sequence in held {
            sequence.recompute();
            self.enqueue(sequence);
        }
        for sequence in &mut self.waiting {
            // What was copied to host memory is not lost. A sequence that could not be copied has its slot and blocks.
            if sequence.allocation.is_some() || sequence.prefix.is_on_device() {
                sequence.recompute();
            }
        }
    }

    /// The device's error after which an engine that keeps its requests does nothing
    /// ([`EngineOptions::keep_on_device_error`](super::EngineOptions::keep_on_device_error)).
    #[must_use]
    pub fn device_error(&self) -> Option<Arc<Error>> {
        self.device_error.clone()
    }

    /// Goes on after a device's error, as the device can be used again, or others in its place.
    pub fn resume(&mut self) {
        self.device_error = None;
    }

    /// An error that does not concern single requests: they fail, or are kept if the device failed and they are to be.
    pub(super) fn failed(&mut self, error: Error) -> Arc<Error> {
        let lost = error.scope() == Scope::Device;
        self.lost |= lost;
        let error = Arc::new(error);
        if lost && self.options.keep_on_device_error {
            self.recompute_all();
            self.device_error = Some(Arc::clone(&error));
        } else {
            self.fail_all(&error);
        }
        error
    }

    /// The contents of the device cannot be trusted any more, and nobody wants them.
    fn fail_all(&mut self, error: &Arc<Error>) {
        self.submitted = None;
        self.step_cache.clear();
        let mut ids: Vec<RequestId> = self.sequences().map(|sequence| sequence.id).collect();
        ids.extend(self.exports.ids());
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            self.fail(id, error);
        }
        self.cache.clear();
    }
}

impl Sequence {
    /// Frees all that was computed of it.
    fn recompute(&mut self) {
        self.cut_at(self.cached);
        self.reported = self.reported.max(self.position);
        self.release();
        self.position = 0;
        self.import = None;
    }
}
