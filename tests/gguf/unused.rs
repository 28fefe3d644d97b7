//! Ids that a file marks as unused are never sampled, for any logits.

use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::engine::{
    Engine, EngineOptions, EngineSizes, Event, Request, RequestId, Sampling, TokenLogprobs,
};
use kimi_linear::model::Model;
use kimi_linear::tokenizer::Tokenizer;
use pollster::block_on;
use serde_json::json;

use super::program::object;
use super::{Written, backends, open};

/// Rows of the head whose logits are a large number and its negative: the greatest logit is one of them.
const PADDING: [u32; 2] = [508, 509];

/// A file in F32 with those rows. `unused` of its ids are unused, including the two.
fn written(unused: std::ops::Range<u32>) -> Written {
    let mut types = vec![1; 256];
    types.extend((256..512).map(|id| if unused.contains(&id) { 5 } else { 3 }));
    let keys = json!({ "tokenizer.ggml.token_type": types });
    let written = Written::new(json!({ "type": "F32", "keys": keys }));
    let head = written.expected("lm_head.weight");
    let mut file = std::fs::read(written.file()).unwrap();
    let bytes: Vec<u8> = head.iter().flat_map(|x| x.to_le_bytes()).collect();
    let found = file.windows(64).position(|window| window == &bytes[..64]);
    let row = head.len() / 512;
    for (id, factor) in PADDING.into_iter().zip([1e6, -1e6]) {
        let values = head[..row].iter().flat_map(|x| (x * factor).to_le_bytes());
        let at = found.unwrap() + id as usize * row * 4;
        file[at..at + row * 4].copy_from_slice(&values.collect::<Vec<u8>>());
    }
    std::fs::write(written.file(), file).unwrap();
    written
}

/// The tokens of an answer, with their log-probabilities and the two most likely ones.
fn answer(written: &Written, sampling: Sampling, suppress: bool) -> Vec<(u32, TokenLogprobs)> {
    let (config, checkpoint) = open(&written.file()).unwrap();
    let backend = backends::cpu();
    let limits = EngineSizes::one(32).limits(backend.device().cache);
    let model = Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap();
    let mut engine = Engine::new(model, EngineOptions::default());
    if suppress {
        let files = ModelFiles::open(&written.file()).unwrap();
        let mut tokenizer = Tokenizer::from_files(&files).unwrap();
        tokenizer.limit_ids(config.vocab_size).unwrap();
        engine = engine.suppress_tokens(tokenizer.unused_ids());
    }
    let request = Request {
        sampling,
        logprobs: Some(2),
        ..Request::new(vec![72, 105], 12)
    };
    engine.submit(RequestId(1), request).unwrap();
    while block_on(engine.step()) {}
    let events = engine.take_events();
    let tokens = events.filter_map(|(_, event)| match event {
        Event::Token { id, logprobs, .. } => Some((id, logprobs.unwrap())),
        _ => None,
    });
    tokens.collect()
}

#[test]
fn unused_ids_are_never_drawn() {
    let drawn = |top_k| Sampling {
        temperature: 2.0,
        top_k,
        ..Sampling::GREEDY
    };
    // A number for which the row's best candidates suffice, and one for which whole rows are read.
    for unused in [500..510, 300..510] {
        let written = written(unused.clone());
        for sampling in [Sampling::GREEDY, drawn(4), drawn(0)] {
            let free = answer(&written, sampling.clone(), false);
            assert!(free.iter().all(|(id, _)| PADDING.contains(id)), "{free:?}");
            let tokens = answer(&written, sampling, true);
            assert_eq!(tokens.len(), 12);
            for (id, logprobs) in tokens {
                assert!(!unused.contains(&id), "{id} of {unused:?}");
                // Of the whole row, in which padding has nearly all the probability.
                assert!(PADDING.contains(&logprobs.top[0].0));
                assert!(
                    logprobs.top[0].1 > -1e-3 && logprobs.logprob < -5.0,
                    "{logprobs:?}"
                );
            }
        }
    }
}

#[test]
fn programs_suppress_them() {
    let written = written(300..510);
    let generate = [
        "generate",
        "--prompt",
        "Hi",
        "--max-tokens",
        "6",
        "--ignore-eos",
    ];
    for more in [&[][..], &["--temperature", "1.5", "--top-k", "3"]] {
        let report = object(
            &written.file(),
            &[&generate[..], &["--backend", "cpu"], more].concat(),
        );
        let tokens = report["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), 6);
        for id in tokens {
            assert!(!(300..510).contains(&id.as_u64().unwrap()), "{tokens:?}");
        }
    }
}
