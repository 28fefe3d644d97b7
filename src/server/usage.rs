//! Token counts of a request, as responses contain them.

use serde_json::{Value, json};

use crate::engine::Usage;

/// The tokens of all answers of a request; each prompt counts once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    /// Tokens of the prompts.
    pub(super) prompt: usize,
    /// Those of them that came from the cache.
    pub(super) cached: usize,
    /// Tokens generated.
    pub(super) generated: usize,
    /// Those of them that are reasoning.
    pub(super) reasoning: usize,
}

impl Total {
    /// Takes a prompt, before anything is generated.
    pub(super) fn prompt(&mut self, tokens: usize) {
        self.prompt += tokens;
    }

    /// Counts a generated token, if usage is sent with each chunk.
    pub(super) fn token(&mut self) {
        self.generated += 1;
    }

    /// Takes what the first answer to a prompt says of it.
    pub(super) fn cached(&mut self, usage: Usage) {
        self.cached += usage.cached_tokens;
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": { "cached_tokens": self.cached },
            "completion_tokens_details": { "reasoning_tokens": self.reasoning },
        })
    }
}
