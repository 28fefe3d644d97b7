//! Server-sent events, as used by streams of chat completions.

use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

/// A part of an event.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    /// Text of the answer.
    Text(String),
    /// Why it ended: `stop` or `length`.
    Ended(String),
    /// Token counts of prompt, cache and answer.
    Usage(usize, usize, usize),
    /// The server's own error.
    Error(String),
}

/// The events of a body, up to `[DONE]`.
pub(super) struct Events<R>(BufReader<R>);

impl<R: Read> Events<R> {
    pub(super) fn new(body: R) -> Self {
        Self(BufReader::new(body))
    }

    /// The parts of the next event; `None` after the last.
    ///
    /// # Errors
    /// A connection that ends early, or an event that is not JSON.
    pub(super) fn next(&mut self) -> std::io::Result<Option<Vec<Piece>>> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.0.read_line(&mut line)? == 0 {
                let message = "the server closed the connection in the middle of an answer";
                return Err(std::io::Error::other(message));
            }
            let Some(data) = line.strip_prefix("data:") else {
                continue;
            };
            let data = data.trim();
            if data == "[DONE]" {
                return Ok(None);
            }
            let event: Value = serde_json::from_str(data).map_err(std::io::Error::other)?;
            return Ok(Some(pieces(&event)));
        }
    }
}

fn pieces(event: &Value) -> Vec<Piece> {
    let mut pieces = Vec::new();
    if let Some(message) = error(event) {
        pieces.push(Piece::Error(message));
    }
    let choice = &event["choices"][0];
    if let Some(text) = choice["delta"]["content"]
        .as_str()
        .filter(|text| !text.is_empty())
    {
        pieces.push(Piece::Text(text.to_owned()));
    }
    if let Some(usage) = event["usage"].as_object() {
        let number = |value: Option<&Value>| value.and_then(Value::as_u64).unwrap_or(0) as usize;
        let cached = usage
            .get("prompt_tokens_details")
            .and_then(|details| details.get("cached_tokens"));
        pieces.push(Piece::Usage(
            number(usage.get("prompt_tokens")),
            number(cached),
            number(usage.get("completion_tokens")),
        ));
    }
    if let Some(reason) = choice["finish_reason"].as_str() {
        pieces.push(Piece::Ended(reason.to_owned()));
    }
    pieces
}

/// The message of an API error.
pub(super) fn error(body: &Value) -> Option<String> {
    let error = body.get("error")?;
    let message = error.as_str().or_else(|| error["message"].as_str());
    Some(
        message
            .unwrap_or("the server says that something failed, but not what")
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::{Events, Piece};

    #[test]
    fn a_stream_comes_apart_into_its_pieces() {
        let body = concat!(
            ": keep-alive\n\n",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1,",
            "\"prompt_tokens_details\":{\"cached_tokens\":3}}}\n\n",
            "data: [DONE]\n\n",
        );
        let mut events = Events::new(body.as_bytes());
        let mut all = Vec::new();
        while let Some(pieces) = events.next().unwrap() {
            all.extend(pieces);
        }
        let expected = [
            Piece::Text("Hi".to_owned()),
            Piece::Ended("stop".to_owned()),
            Piece::Usage(5, 3, 1),
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn a_stream_that_breaks_off_is_an_error() {
        let mut events = Events::new("data: {\"error\":{\"message\":\"no\"}}\n".as_bytes());
        assert_eq!(
            events.next().unwrap(),
            Some(vec![Piece::Error("no".to_owned())])
        );
        assert!(events.next().is_err());
    }
}
