//! Log-probabilities in the formats of chat and of plain completions.

use serde_json::{Map, Value, json};

use crate::engine::TokenLogprobs;
use crate::tokenizer::{Tokenizer, Utf8Stream};

/// JSON has no minus infinity; OpenAI sends this value for it.
const LEAST: f32 = -9999.0;

fn number(logprob: f32) -> Value {
    json!(logprob.max(LEAST))
}

fn text(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer
        .piece(id)
        .map_or_else(String::new, |piece| piece.text().into_owned())
}

fn entry(tokenizer: &Tokenizer, id: u32, logprob: f32) -> Map<String, Value> {
    let bytes = tokenizer.piece(id).map(|piece| piece.bytes.to_vec());
    let mut entry = Map::new();
    entry.insert("token".to_owned(), Value::from(text(tokenizer, id)));
    entry.insert("logprob".to_owned(), number(logprob));
    entry.insert("bytes".to_owned(), json!(bytes));
    entry
}

/// One token of a chat's answer, with at most `most` of the likeliest.
pub(super) fn chat(tokenizer: &Tokenizer, id: u32, logprobs: &TokenLogprobs, most: usize) -> Value {
    let mut token = entry(tokenizer, id, logprobs.logprob);
    let top = logprobs.top.iter().take(most);
    let top = top.map(|(id, logprob)| Value::Object(entry(tokenizer, *id, *logprob)));
    token.insert("top_logprobs".to_owned(), top.collect());
    Value::Object(token)
}

/// A prompt's tokens as vLLM tells them: null for the first, then for each its own log-probability and those of at most `most` of
/// the likeliest, by id. The rank of a token that is not among the likeliest is not known: it is null.
pub(super) fn prompt(
    tokenizer: &Tokenizer,
    ids: &[u32],
    scores: &[TokenLogprobs],
    most: usize,
) -> Value {
    let entry = |id: u32, logprob: f32, rank: Option<usize>| {
        let decoded = text(tokenizer, id);
        json!({ "logprob": number(logprob), "rank": rank, "decoded_token": decoded })
    };
    let each = ids.iter().skip(1).zip(scores).map(|(id, score)| {
        let top = || score.top.iter().take(most).enumerate();
        let mut all = Map::new();
        let rank = top().find(|(_, (other, _))| other == id);
        let rank = rank.map(|(index, _)| index + 1);
        all.insert(id.to_string(), entry(*id, score.logprob, rank));
        for (index, (other, logprob)) in top() {
            all.entry(other.to_string())
                .or_insert_with(|| entry(*other, *logprob, Some(index + 1)));
        }
        Value::Object(all)
    });
    std::iter::once(Value::Null).chain(each).collect()
}

/// The four lists of a plain completion.
#[derive(Clone, Debug, Default)]
pub(super) struct Lists {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Number of characters so far.
    offset: usize,
    /// The beginning of a character whose other bytes come with the next tokens.
    utf8: Utf8Stream,
}

impl Lists {
    /// Takes a token, with at most `most` of the likeliest, and the bytes of it that are shown. The first one of a prompt has no logprobs.
    pub(super) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        most: usize,
        shown: &[u8],
    ) {
        let text = text(tokenizer, id);
        self.tokens.push(Value::from(text.as_str()));
        self.logprobs
            .push(logprobs.map_or(Value::Null, |logprobs| number(logprobs.logprob)));
        let top = |logprobs: &TokenLogprobs| {
            let mut map = Map::new();
            for (id, logprob) in logprobs.top.iter().take(most) {
                // Different tokens may have one text, such as parts of characters: the likelier one counts.
                map.entry(self::text(tokenizer, *id))
                    .or_insert_with(|| number(*logprob));
            }
            // OpenAI's list has the chosen token beside the likeliest.
            map.entry(text.as_str())
                .or_insert_with(|| number(logprobs.logprob));
            Value::Object(map)
        };
        self.top.push(logprobs.map_or(Value::Null, top));
        self.offsets.push(self.offset);
        self.offset += self.utf8.push(shown).chars().count();
    }

    /// Returns and clears what was added since the last call.
    pub(super) fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.logprobs),
            "top_logprobs": std::mem::take(&mut self.top),
            "text_offset": std::mem::take(&mut self.offsets),
        })
    }
}
