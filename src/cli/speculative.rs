//! `--speculative-config`: vLLM's JSON for speculation, of which prompt lookup (`ngram`) is supported.

use clap::Args;
use kimi_linear::engine::PromptLookup;
use serde::Deserialize;

/// Speculation.
#[derive(Args, Clone, Copy)]
pub(crate) struct SpeculativeOptions {
    /// Speculation, as JSON with vLLM's keys: method (only ngram), num_speculative_tokens, prompt_lookup_max, prompt_lookup_min. What
    /// followed the last tokens where they came before, in the prompt or the answer, is proposed and verified in one step; answers
    /// stay the same. Default: no speculation.
    #[arg(long, value_name = "JSON", value_parser = parse)]
    speculative_config: Option<PromptLookup>,
}

impl SpeculativeOptions {
    /// How tokens are proposed; `None` for no speculation.
    pub(crate) fn lookup(self) -> Option<PromptLookup> {
        self.speculative_config
    }

    /// Maximum number of proposed tokens of a sequence.
    pub(crate) fn tokens(self) -> usize {
        self.lookup().map_or(0, |lookup| lookup.tokens())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    method: String,
    num_speculative_tokens: usize,
    prompt_lookup_max: Option<usize>,
    prompt_lookup_min: Option<usize>,
}

/// vLLM's length of what is looked up where neither limit is given.
const LENGTH: usize = 5;

fn parse(text: &str) -> Result<PromptLookup, String> {
    let config: Config = serde_json::from_str(text).map_err(|error| {
        format!(r#"an object such as {{"method": "ngram", "num_speculative_tokens": 5}} is expected: {error}"#)
    })?;
    if config.method != "ngram" {
        return Err(format!(
            "method should be `ngram`, but is `{}`: tokens are looked up in the prompt and the answer, without a second model",
            config.method
        ));
    }
    let (most, least) = (config.prompt_lookup_max, config.prompt_lookup_min);
    let longest = most.or(least).unwrap_or(LENGTH);
    let shortest = least.or(most).unwrap_or(LENGTH);
    let lookup = PromptLookup::new(config.num_speculative_tokens, shortest, longest);
    lookup.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_keys_and_defaults() {
        let lookup =
            |tokens, shortest, longest| PromptLookup::new(tokens, shortest, longest).unwrap();
        for (text, expected) in [
            (
                r#"{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}"#,
                lookup(5, 2, 4),
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 3}"#,
                lookup(3, 5, 5),
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}"#,
                lookup(3, 4, 4),
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}"#,
                lookup(3, 2, 2),
            ),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, part) in [
            ("ngram", "an object such as"),
            (r#"{"num_speculative_tokens": 5}"#, "method"),
            (r#"{"method": "ngram"}"#, "num_speculative_tokens"),
            (
                r#"{"method": "eagle", "num_speculative_tokens": 5}"#,
                "`eagle`",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 5, "model": "x"}"#,
                "`model`",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 0}"#,
                "from 1 to 64",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 1, "prompt_lookup_min": 2}"#,
                "prompt_lookup_max",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
