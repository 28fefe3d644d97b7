//! Requests of other frontends than this program's: Dynamo's own parameters become an engine's request.
//!
//! Dynamo's preprocessor has made token ids of the text, and stop strings are its affair. What the engine does not have is refused by
//! name, as it would change the answer. When such a request migrates, the tokens that were generated so far count as its prompt.

use std::hash::{BuildHasher, RandomState};

use dynamo_backend_common::{
    GuidedDecodingOptions, PreprocessedRequest, SamplingOptions, StopConditions,
};
use kimi_linear::engine::{GrammarSource, Request, Sampling};
use kimi_linear::error::EngineError;
use kimi_linear::server::SamplingDefaults;
use serde_json::Value;

/// What of the model such requests depend on.
pub(super) struct ModelDefaults<'a> {
    pub(super) sampling: &'a SamplingDefaults,
    /// Tokens that end an answer.
    pub(super) stop_ids: &'a [u32],
}

fn refused<T>(what: &str) -> Result<T, EngineError> {
    let reason = format!("{what} is not supported");
    Err(EngineError::Refused { reason })
}

/// The request without its grammar, which [`grammar`] gives.
///
/// # Errors
/// A parameter that the engine does not have.
pub(super) fn request(
    request: &PreprocessedRequest,
    model: &ModelDefaults<'_>,
) -> Result<Request, EngineError> {
    check(request)?;
    let stop_ids = stop_ids(request, model.stop_ids);
    let prompt = request.token_ids.as_ref().clone();
    // A later prompt of the same chat differs from this one after the end of a turn at the earliest.
    let ends = prompt.iter().zip(1..);
    let ends = ends.filter(|(id, _)| model.stop_ids.contains(id));
    let turn_ends = ends.map(|(_, end)| end).collect();
    let max_tokens = request.stop_conditions.max_tokens;
    let max_tokens = max_tokens.map_or(usize::MAX, |tokens| tokens as usize);
    let most = model.sampling.max_new_tokens.unwrap_or(usize::MAX);
    let routing = request.routing.as_ref();
    let logprobs = request.output_options.logprobs;
    Ok(Request {
        stop_ids,
        sampling: sampling(&request.sampling_options, model.sampling),
        logprobs: logprobs.map(|count| count as usize),
        turn_ends,
        // A prompt with a cache salt shares its prefixes with no other.
        reuse: routing.is_none_or(|routing| routing.cache_namespace.is_none()),
        ..Request::new(prompt, max_tokens.min(most))
    })
}

fn check(request: &PreprocessedRequest) -> Result<(), EngineError> {
    let SamplingOptions {
        n,
        best_of,
        use_beam_search,
        ..
    } = &request.sampling_options;
    let StopConditions {
        min_tokens,
        max_thinking_tokens,
        ..
    } = &request.stop_conditions;
    let routing = request.routing.as_ref();
    let cases = [
        ("prompt_embeds", request.prompt_embeds.is_some()),
        ("multi_modal_data", request.multi_modal_data.is_some()),
        ("n above 1", n.unwrap_or(1) > 1),
        ("best_of above 1", best_of.unwrap_or(1) > 1),
        ("use_beam_search", use_beam_search.unwrap_or(false)),
        ("min_tokens", min_tokens.unwrap_or(0) > 0),
        ("max_thinking_tokens", max_thinking_tokens.is_some()),
        (
            "prompt_logprobs",
            request.output_options.prompt_logprobs.is_some(),
        ),
        (
            "a LoRA adapter",
            routing.is_some_and(|routing| routing.lora_name.is_some()),
        ),
    ];
    match cases.into_iter().find(|(_, given)| *given) {
        Some((what, _)) => refused(what),
        None => Ok(()),
    }
}

/// Tokens that end the answer.
fn stop_ids(request: &PreprocessedRequest, model: &[u32]) -> Vec<u32> {
    let conditions = &request.stop_conditions;
    let lists = [
        &conditions.stop_token_ids,
        &conditions.stop_token_ids_visible,
        &conditions.stop_token_ids_hidden,
    ];
    let mut ids: Vec<u32> = lists.into_iter().flatten().flatten().copied().collect();
    if !conditions.ignore_eos.unwrap_or(false) {
        ids.extend(request.eos_token_ids.iter().chain(model));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn sampling(options: &SamplingOptions, defaults: &SamplingDefaults) -> Sampling {
    let wide = |value: Option<f32>| value.map(f64::from);
    // -1 means all tokens, as 0 does.
    let top_k = options
        .top_k
        .map(|top_k| usize::try_from(top_k).unwrap_or(0));
    // A new hasher has random keys: this is a number that no other request has.
    let random = || RandomState::new().hash_one(0);
    Sampling {
        temperature: wide(options.temperature)
            .or(defaults.temperature)
            .unwrap_or(1.0),
        top_k: top_k.or(defaults.top_k).unwrap_or(0),
        top_p: wide(options.top_p).or(defaults.top_p).unwrap_or(1.0),
        min_p: wide(options.min_p).or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: wide(options.repetition_penalty)
            .or(defaults.repetition_penalty)
            .unwrap_or(1.0),
        presence_penalty: wide(options.presence_penalty).unwrap_or(0.0),
        frequency_penalty: wide(options.frequency_penalty).unwrap_or(0.0),
        logit_bias: Vec::new(),
        seed: options.seed.map_or_else(random, i64::cast_unsigned),
    }
}

/// The grammar that the request asks for.
///
/// # Errors
/// A form that cannot be written as a grammar.
pub(super) fn grammar(
    request: &PreprocessedRequest,
    model: &ModelDefaults<'_>,
) -> Result<Option<GrammarSource>, EngineError> {
    let Some(guided) = &request.sampling_options.guided_decoding else {
        return Ok(None);
    };
    Ok(lark(guided)?.map(|lark| GrammarSource {
        lark,
        stop_ids: model.stop_ids.to_vec(),
    }))
}

fn lark(guided: &GuidedDecodingOptions) -> Result<Option<String>, EngineError> {
    if guided.structural_tag.is_some() {
        return refused("guided_decoding.structural_tag of another frontend");
    }
    if guided.whitespace_pattern.is_some() {
        return refused("guided_decoding.whitespace_pattern");
    }
    if let Some(schema) = &guided.json {
        return json(schema).map(Some);
    }
    if let Some(regex) = &guided.regex {
        return Ok(Some(format!("start: {}\n", delimited(regex))));
    }
    if let Some(choice) = guided.choice.as_ref().filter(|choice| !choice.is_empty()) {
        let texts = choice
            .iter()
            .map(|text| Value::from(text.as_str()).to_string());
        let texts: Vec<String> = texts.collect();
        let texts = texts.join(" | ");
        return Ok(Some(format!("start: CHOICE\nCHOICE: {texts}\n")));
    }
    let Some(grammar) = &guided.grammar else {
        return Ok(None);
    };
    // Lark's rules have colons, those of GBNF and EBNF `::=`.
    match grammar.contains("::=") {
        true => refused("guided_decoding.grammar in another language than llguidance's Lark"),
        false => Ok(Some(grammar.clone())),
    }
}

fn json(schema: &Value) -> Result<String, EngineError> {
    let parsed = match schema {
        Value::String(text) => {
            serde_json::from_str(text).map_err(|error| EngineError::Refused {
                reason: format!("guided_decoding.json: {error}"),
            })?
        }
        other => other.clone(),
    };
    Ok(format!("start: %json {parsed}\n"))
}

/// A regular expression between slashes, as Lark writes it.
fn delimited(regex: &str) -> String {
    let (mut out, mut escaped) = (String::from("/"), false);
    for c in regex.chars() {
        match c {
            '/' if !escaped => out.push_str("\\/"),
            '\n' => out.push_str(if escaped { "n" } else { "\\n" }),
            other => out.push(other),
        }
        escaped = c == '\\' && !escaped;
    }
    out.push('/');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use dynamo_backend_common::OutputOptions;

    static DEFAULTS: SamplingDefaults = SamplingDefaults {
        temperature: Some(0.5),
        top_p: None,
        top_k: None,
        min_p: None,
        repetition_penalty: None,
        max_new_tokens: Some(20),
        eos_token_ids: Vec::new(),
    };

    fn model() -> ModelDefaults<'static> {
        ModelDefaults {
            sampling: &DEFAULTS,
            stop_ids: &[7],
        }
    }

    fn foreign() -> PreprocessedRequest {
        PreprocessedRequest::builder()
            .model("m".to_owned())
            .token_ids(vec![1, 7, 2])
            .stop_conditions(StopConditions {
                max_tokens: Some(100),
                stop_token_ids: Some(vec![5]),
                stop_token_ids_hidden: Some(vec![7, 9]),
                ..StopConditions::default()
            })
            .sampling_options(SamplingOptions {
                top_k: Some(-1),
                seed: Some(-1),
                ..SamplingOptions::default()
            })
            .output_options(OutputOptions {
                logprobs: Some(3),
                ..OutputOptions::default()
            })
            .build()
            .unwrap()
    }

    #[test]
    fn dynamos_parameters_become_the_engines() {
        let found = request(&foreign(), &model()).unwrap();
        assert_eq!(found.prompt, [1, 7, 2]);
        assert_eq!(found.stop_ids, [5, 7, 9]);
        assert_eq!((found.max_tokens, found.logprobs), (20, Some(3)));
        assert_eq!(found.turn_ends, [2]);
        assert_eq!(found.sampling.temperature, 0.5);
        assert_eq!((found.sampling.top_k, found.sampling.seed), (0, u64::MAX));
        assert!(found.reuse);
        let mut ignoring = foreign();
        ignoring.stop_conditions.ignore_eos = Some(true);
        ignoring.stop_conditions.stop_token_ids_hidden = None;
        assert_eq!(request(&ignoring, &model()).unwrap().stop_ids, [5]);
    }

    #[test]
    fn requests_without_a_seed_differ() {
        let mut unseeded = foreign();
        unseeded.sampling_options.seed = None;
        let seed = || request(&unseeded, &model()).unwrap().sampling.seed;
        assert_ne!(seed(), seed());
    }

    #[test]
    fn what_the_engine_does_not_have_is_refused_by_name() {
        let mut several = foreign();
        several.sampling_options.n = Some(2);
        let mut shortest = foreign();
        shortest.stop_conditions.min_tokens = Some(1);
        let mut scored = foreign();
        scored.output_options.prompt_logprobs = Some(0);
        for (request, name) in [
            (several, "n above 1"),
            (shortest, "min_tokens"),
            (scored, "prompt_logprobs"),
        ] {
            let error = super::request(&request, &model()).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn forms_of_answers_become_grammars() {
        let lark = |guided: GuidedDecodingOptions| {
            let mut request = foreign();
            request.sampling_options.guided_decoding = Some(guided);
            grammar(&request, &model()).map(|source| source.unwrap().lark)
        };
        let json = GuidedDecodingOptions {
            json: Some(Value::from(r#"{"type": "object"}"#)),
            ..GuidedDecodingOptions::default()
        };
        assert_eq!(lark(json).unwrap(), "start: %json {\"type\":\"object\"}\n");
        let regex = GuidedDecodingOptions {
            regex: Some("a/b".to_owned()),
            ..GuidedDecodingOptions::default()
        };
        assert_eq!(lark(regex).unwrap(), "start: /a\\/b/\n");
        let choice = GuidedDecodingOptions {
            choice: Some(vec!["a".to_owned(), "\"".to_owned()]),
            ..GuidedDecodingOptions::default()
        };
        let found = lark(choice).unwrap();
        assert_eq!(found, "start: CHOICE\nCHOICE: \"a\" | \"\\\"\"\n");
        let gbnf = GuidedDecodingOptions {
            grammar: Some("root ::= \"a\"".to_owned()),
            ..GuidedDecodingOptions::default()
        };
        assert!(lark(gbnf).is_err());
        assert_eq!(grammar(&foreign(), &model()).unwrap(), None);
    }
}
