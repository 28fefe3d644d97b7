//! Log-probabilities as chats and as plain completions tell them.

use serde_json::{Map, Value, json};

use crate::engine::TokenLogprobs;
use crate::tokenizer::{Tokenizer, Utf8Stream};

/// JSON has no minus infinity; this is what OpenAI puts for it.
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

/// One token of a chat's answer.
pub(super) fn chat(tokenizer: &Tokenizer, id: u32, logprobs: &TokenLogprobs) -> Value {
    let mut token = entry(tokenizer, id, logprobs.logprob);
    let top = logprobs.top.iter();
    let top = top.map(|(id, logprob)| Value::Object(entry(tokenizer, *id, *logprob)));
    token.insert("top_logprobs".to_owned(), top.collect());
    Value::Object(token)
}

/// The four lists of a plain completion.
#[derive(Clone, Debug, Default)]
pub(super) struct Lists {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters so far.
    offset: usize,
    /// The beginning of a character whose other bytes come with the next tokens.
    utf8: Utf8Stream,
}

impl Lists {
    /// Takes a token and the bytes of it that are shown. The first one of a prompt has no logprobs.
    pub(super) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        shown: &[u8],
    ) {
        let text = text(tokenizer, id);
        self.tokens.push(Value::from(text.as_str()));
        self.logprobs
            .push(logprobs.map_or(Value::Null, |logprobs| number(logprobs.logprob)));
        let top = |logprobs: &TokenLogprobs| {
            let mut map = Map::new();
            for (id, logprob) in &logprobs.top {
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

    /// What was taken since the last time.
    pub(super) fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.logprobs),
            "top_logprobs": std::mem::take(&mut self.top),
            "text_offset": std::mem::take(&mut self.offsets),
        })
    }
}
