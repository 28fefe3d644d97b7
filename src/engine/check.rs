//! What is checked of a request before any of it is stored.

use super::core::Engine;
use super::request::{PromptScores, Request, RequestId};
use crate::error::EngineError;

impl Engine {
    /// Checks a request before any of it is stored.
    pub(super) fn check(&self, id: RequestId, request: &Request) -> Result<(), EngineError> {
        request.check(self.model.config())?;
        let context = self.context();
        if request.prompt.len() > context {
            return Err(EngineError::PromptTooLong {
                tokens: request.prompt.len(),
                context,
            });
        }
        if let Some(choice) = &request.trace {
            self.model.check_choice(choice)?;
        }
        self.check_undo(&request.prompt, &request.undo)?;
        if request.scores != PromptScores::None
            && self.model.limits().step.outputs < self.options.cut
        {
            let (expected, found) = (self.options.cut, self.model.limits().step.outputs);
            return Err(EngineError::NoRoomToScore { expected, found });
        }
        let ids = self.sequences().map(|sequence| sequence.id);
        if ids.chain(self.exports.ids()).any(|other| other == id) {
            return Err(EngineError::DuplicateRequest { id: id.0 });
        }
        self.check_room(&[request.samples])
    }

    /// Checks that requests for so many answers each can be taken together: the last of them has to begin where there is
    /// room.
    pub(super) fn check_room(&self, samples: &[usize]) -> Result<(), EngineError> {
        let segments = self.model.limits().step.segments;
        let most = segments.saturating_add(self.options.queue);
        let answers: usize = samples.iter().sum();
        let before = answers - samples.last().copied().unwrap_or_default();
        if before >= most {
            return Err(EngineError::BatchTooLarge { answers, most });
        }
        if self.answers() + before >= most {
            let waiting = self.waiting.len();
            return Err(EngineError::QueueFull { waiting });
        }
        Ok(())
    }
}
