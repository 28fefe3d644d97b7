//! The vectors of every head over a conversation's traced tokens, from which heads are scored when an answer has ended.
//!
//! They stay in the session: a frame for the interface comes without them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use kimi_linear::model::{KdaTrace, TraceFrame};

use super::ChatId;
use crate::formulas::sharpness::{HeadToken, sharpness};
use crate::history::HeadScores;

/// Maximum size in bytes of one conversation's vectors; beyond it the oldest tokens are dropped.
const MOST_BYTES: usize = 192 << 20;

/// The traced tokens of one conversation, consecutive.
#[derive(Clone, Default)]
struct Survey {
    first: usize,
    /// Each with its id.
    tokens: VecDeque<(u32, Vec<KdaTrace>)>,
}

/// The traced tokens of every chat.
#[derive(Clone, Default)]
pub(super) struct Surveys(Arc<Mutex<HashMap<ChatId, Survey>>>);

impl Surveys {
    fn with<T>(&self, chat: ChatId, work: impl FnOnce(&mut Survey) -> T) -> T {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        work(all.entry(chat).or_default())
    }

    /// Drops the tokens of a chat from a position on.
    pub(super) fn truncate(&self, chat: ChatId, position: usize) {
        self.with(chat, |survey| {
            survey
                .tokens
                .truncate(position.saturating_sub(survey.first));
        });
    }

    /// Drops all tokens: they belong to the model that made them.
    pub(super) fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Takes the vectors out of a frame.
    pub(super) fn take(&self, chat: ChatId, frame: &mut TraceFrame) {
        let layers = frame.kda.iter_mut().map(|layer| KdaTrace {
            layer: layer.layer,
            heads: layer.heads.clone(),
            gates: layer.gates.clone(),
            qkv: std::mem::take(&mut layer.qkv),
        });
        let layers: Vec<KdaTrace> = layers.collect();
        let (position, id) = (frame.position, frame.token);
        self.with(chat, |survey| survey.push(position, id, layers));
    }

    /// The score of every head over a chat's tokens, of which those from `answer` on are the last answer; `width` is K and V of
    /// a head.
    pub(super) fn scores(&self, chat: ChatId, answer: usize, width: usize) -> HeadScores {
        let survey = self.with(chat, |survey| survey.clone());
        survey.scores(answer, width)
    }
}

fn bytes(layers: &[KdaTrace]) -> usize {
    layers
        .iter()
        .map(|layer| 4 * (layer.qkv.len() + layer.gates.len()) + 24 * layer.heads.len())
        .sum()
}

impl Survey {
    fn push(&mut self, position: usize, id: u32, layers: Vec<KdaTrace>) {
        let next = self.first + self.tokens.len();
        if position != next {
            // Tokens that run again replace theirs and all after them; a gap begins anew.
            if (self.first..next).contains(&position) {
                self.tokens.truncate(position - self.first);
            } else {
                self.tokens.clear();
                self.first = position;
            }
        }
        let each = bytes(&layers).max(1);
        self.tokens.push_back((id, layers));
        while self.tokens.len() > (MOST_BYTES / each).max(1) {
            self.tokens.pop_front();
            self.first += 1;
        }
    }

    fn scores(&self, answer: usize, width: usize) -> HeadScores {
        let answer = answer.saturating_sub(self.first);
        let Some((_, newest)) = self.tokens.back() else {
            return HeadScores::default();
        };
        let layers = newest.iter().enumerate().map(|(at, layer)| {
            let heads = 0..layer.heads.len();
            let score = |head| {
                let tokens: Option<Vec<HeadToken>> = self
                    .tokens
                    .iter()
                    .map(|(id, token)| head_token(*id, token.get(at)?, head, width))
                    .collect();
                tokens.map_or(0.0, |tokens| sharpness(&tokens, answer) as f32)
            };
            (layer.layer, heads.map(score).collect())
        });
        HeadScores {
            layers: layers.collect(),
        }
    }
}

/// One head's part of a layer's vectors; `None` if they are of other sizes.
fn head_token(id: u32, layer: &KdaTrace, head: usize, width: usize) -> Option<HeadToken<'_>> {
    let heads = layer.heads.len();
    let keys = layer.qkv.len().checked_sub(heads * width)? / (2 * width.max(1));
    let key_head = head / (heads / keys.max(1)).max(1);
    let part = |first: usize| layer.qkv.get(first..first + width);
    let numbers = layer.heads.get(head)?;
    Some(HeadToken {
        id,
        gates: layer.gates.get(head * width..(head + 1) * width)?,
        query: part(key_head * width)?,
        key: part((keys + key_head) * width)?,
        value: part(2 * keys * width + head * width)?,
        beta: numbers.beta,
        write: numbers.write,
        gate: numbers.gate,
    })
}
