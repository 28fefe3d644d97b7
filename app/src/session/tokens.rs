//! Token ids as the interface shows them: with their text, and whether they are the template's.

use kimi_linear::engine::{Event, Output};
use kimi_linear::model::TraceFrame;
use kimi_linear::tokenizer::{Conversation, Tokenizer};
use web_time::Instant;

use super::ChatUpdate;
use crate::history::TokenText;
use crate::problem::Problem;

/// Tokens with their text; `known` has log-probabilities and the positions of answers.
pub(super) fn tiles(tokenizer: &Tokenizer, ids: &[u32], known: &Conversation) -> Vec<TokenText> {
    let mut tokens: Vec<TokenText> = ids.iter().map(|id| token(tokenizer, *id)).collect();
    for (start, end) in known.answers() {
        let answer = tokens.iter_mut().take(*end).skip(*start);
        answer.for_each(|token| token.answer = true);
    }
    mark_roles(&mut tokens);
    tokens
}

/// Names of roles that a chat template writes between two special tokens.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// Marks the names of roles as the template's.
fn mark_roles(tokens: &mut [TokenText]) {
    let special = |at: &usize| tokens[*at].template;
    let special: Vec<usize> = (0..tokens.len()).filter(special).collect();
    for pair in special.windows(2) {
        let between = &mut tokens[pair[0] + 1..pair[1]];
        let text: String = between.iter().map(|token| token.text.as_str()).collect();
        if ROLES.contains(&text.as_str()) {
            between.iter_mut().for_each(|token| token.template = true);
        }
    }
}

fn token(tokenizer: &Tokenizer, id: u32) -> TokenText {
    let text = tokenizer
        .piece(id)
        .map(|segment| segment.text().into_owned());
    let special = tokenizer
        .piece(id)
        .is_some_and(|piece| piece.name.is_some());
    TokenText {
        id,
        text: text.unwrap_or_default(),
        template: special,
        ..TokenText::default()
    }
}

/// The update for the interface from an output.
pub(super) fn update(output: Output, tokenizer: &Tokenizer) -> Option<ChatUpdate> {
    let text = output.text();
    Some(match output.event {
        Event::Queued { ahead } => ChatUpdate::Queued { ahead },
        Event::Prefill { done, cached } => ChatUpdate::Prefill { done, cached },
        Event::Scored(_) => return None,
        // Only sent for requests whose caches are transferred.
        Event::Reserved { .. } | Event::HandOff(_) => return None,
        Event::Trace { frame, .. } => ChatUpdate::Frame(frame),
        Event::Token { id, logprobs, .. } => ChatUpdate::Token {
            token: TokenText {
                answer: true,
                logprob: logprobs.as_ref().map(|logprobs| logprobs.logprob),
                likely: logprobs.map_or_else(Vec::new, |logprobs| named(&logprobs.top, tokenizer)),
                ..token(tokenizer, id)
            },
            text,
            at: Instant::now(),
        },
        Event::Finished { reason, usage, .. } => ChatUpdate::Finished {
            reason,
            text,
            usage,
        },
        Event::Failed(error) => {
            tracing::error!("{error}");
            ChatUpdate::Failed(Problem::of_answer(&error))
        }
    })
}

/// The likeliest tokens after a frame's own.
pub(super) fn likely(frame: &TraceFrame, tokenizer: &Tokenizer) -> Option<ChatUpdate> {
    (!frame.likely.is_empty()).then(|| ChatUpdate::Likely {
        position: frame.position + 1,
        tokens: named(&frame.likely, tokenizer),
    })
}

/// Tokens with their text.
fn named(likely: &[(u32, f32)], tokenizer: &Tokenizer) -> Vec<(String, f32)> {
    let likely = likely.iter();
    likely
        .map(|(id, logprob)| (token(tokenizer, *id).text, *logprob))
        .collect()
}
