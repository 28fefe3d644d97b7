//! The tokens of the conversation that is shown, and the trace frames of those that were traced.

use kimi_linear::model::TraceFrame;

/// One token of the sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenText {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Whether it is the model's own.
    pub answer: bool,
    /// Its natural log-probability, where it is known.
    pub logprob: Option<f32>,
}

/// A statistic of every KDA head's whole state at one token, taken when an answer has ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadRanks {
    /// Tokens that the states have seen.
    pub position: usize,
    /// `(layer, effective rank of each head)`: `(sum s^2)^2 / sum s^4` over the state's singular values s.
    pub layers: Vec<(usize, Vec<f32>)>,
}

/// What the views read.
#[derive(Clone, Debug, Default)]
pub struct History {
    tokens: Vec<TokenText>,
    frames: Vec<TraceFrame>,
    ranks: Option<HeadRanks>,
}

impl History {
    /// Takes the tokens of a prompt: what they share with the sequence so far stays, with its frames; the rest goes.
    pub fn set_tokens(&mut self, tokens: Vec<TokenText>) {
        self.tokens = tokens;
    }

    /// Takes the next token of the answer.
    pub fn push_token(&mut self, token: TokenText) {
        self.tokens.push(token);
    }

    /// Takes a frame: in place of the one of its position, if there is one. Its `next` is the log-probability of the
    /// token after it, where that is the prompt's.
    pub fn push_frame(&mut self, frame: TraceFrame) {
        self.frames.push(frame);
    }

    /// Takes the statistic of the whole states.
    pub fn set_ranks(&mut self, ranks: HeadRanks) {
        self.ranks = Some(ranks);
    }

    /// The sequence.
    #[must_use]
    pub fn tokens(&self) -> &[TokenText] {
        &self.tokens
    }
}
