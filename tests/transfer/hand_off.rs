//! A prompt that is prefilled in one engine and answered in another: the answers have the bits of a single engine.

use std::sync::Arc;

use kimi_linear::cache::{LayerRecord, LayerTensor};
use kimi_linear::engine::{
    Answer, EngineHandle, Event, FinishReason, Grammar, Guide, HandOff, Request, Sampling,
};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::engine_harness::{BLOCK, Outcome, Outcomes, answers, drawn, request, take, tokens};
use crate::{LENGTH, cpu, further, near, on, outcome, prompt, seeds, sent};

/// Allows the tokens whose ids have a remainder that changes with each token.
#[derive(Debug)]
struct Remainders(usize);

struct Following {
    left: usize,
    taken: u32,
}

impl Grammar for Remainders {
    fn guide(&self) -> Box<dyn Guide> {
        let left = self.0;
        Box::new(Following { left, taken: 0 })
    }
}

impl Guide for Following {
    fn allowed(&mut self) -> Result<Vec<u32>, String> {
        let mut bits = vec![0; 8];
        for id in (0..256).filter(|id| id % 5 == self.taken % 5) {
            bits[id as usize / 32] |= 1 << (id % 32);
        }
        Ok(bits)
    }

    fn take(&mut self, token: u32) -> Result<bool, String> {
        if token % 5 != self.taken % 5 {
            return Err(format!("token {token} is no {}", self.taken % 5));
        }
        (self.left, self.taken) = (self.left - 1, self.taken + 1);
        Ok(self.left == 0)
    }
}

fn grammar(tokens: usize) -> Option<Arc<dyn Grammar>> {
    Some(Arc::new(Remainders(tokens)))
}

fn all(answer: &Answer) -> Vec<Outcome> {
    let mut outcomes = Outcomes::new();
    while let Some(event) = answer.next() {
        take([(answer.id(), event)], &mut outcomes);
    }
    outcomes.into_values().collect()
}

/// A hand-off after conversion to text and back.
fn through_text(hand_off: &HandOff) -> HandOff {
    serde_json::from_slice(&serde_json::to_vec(hand_off).unwrap()).unwrap()
}

/// The answers of `to` to a request whose prompt is prefilled in `from`.
fn handed(from: &EngineHandle, to: &EngineHandle, asked: &Request) -> Vec<Outcome> {
    let mut import = to.import(header_of(from, asked), asked.clone()).unwrap();
    let have = import.reserved().unwrap();
    let mut stream = from.export(asked.clone(), crate::unheard()).unwrap();
    stream.skip_latents(have);
    for record in stream.by_ref() {
        import.put(&record.unwrap()).unwrap();
    }
    let hand_off = through_text(stream.hand_off().unwrap());
    all(&import.finish(Some(hand_off)).unwrap())
}

fn header_of(handle: &EngineHandle, asked: &Request) -> kimi_linear::cache::CacheHeader {
    handle.cache_header(asked.prompt.clone()).unwrap()
}

#[track_caller]
fn same(what: &str, expected: &[Outcome], found: &[Outcome]) {
    let said = |all: &[Outcome]| {
        let said = all.iter().map(|it| {
            let (tokens, bits, reason) = it.said();
            (tokens.to_vec(), bits, reason)
        });
        said.collect::<Vec<_>>()
    };
    assert_eq!(said(expected), said(found), "{what}");
}

/// Requests of every kind, by name.
fn kinds() -> Vec<(&'static str, Request)> {
    let greedy = || request(prompt(), 9);
    let penalties = Sampling {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.6,
        logit_bias: vec![(3, 2.5), (17, -4.0)],
        ..drawn(5)
    };
    let first = answers(&mut on(cpu, "tiny-a"), greedy())[0].tokens.clone();
    let with = |change: &dyn Fn(&mut Request)| {
        let mut asked = greedy();
        change(&mut asked);
        asked
    };
    let top_k = Sampling {
        top_k: 7,
        min_p: 0.01,
        ..drawn(9)
    };
    vec![
        ("greedy", greedy()),
        ("sampled", with(&|it| it.sampling = drawn(3))),
        ("top-k", with(&|it| it.sampling = top_k.clone())),
        ("penalties", with(&|it| it.sampling = penalties.clone())),
        ("n", with(&|it| (it.samples, it.sampling) = (3, drawn(4)))),
        (
            "n and penalties",
            with(&|it| (it.samples, it.sampling) = (4, penalties.clone())),
        ),
        (
            "a grammar",
            with(&|it| (it.grammar, it.sampling) = (grammar(6), drawn(6))),
        ),
        (
            "a grammar of one token",
            with(&|it| (it.grammar, it.samples) = (grammar(1), 2)),
        ),
        ("one token", with(&|it| it.max_tokens = 1)),
        ("no token", with(&|it| it.max_tokens = 0)),
        (
            "a stop token first",
            with(&|it| it.stop_ids = vec![first[0]]),
        ),
        (
            "a stop token later",
            with(&|it| it.stop_ids = vec![first[4]]),
        ),
        ("no log-probabilities", with(&|it| it.logprobs = None)),
        ("no cached prefixes", with(&|it| it.reuse = false)),
        (
            "a prompt of one token",
            Request {
                prompt: vec![9],
                ..greedy()
            },
        ),
        (
            "a prompt of whole blocks",
            Request {
                prompt: tokens(8, 4 * BLOCK),
                sampling: drawn(2),
                samples: 2,
                ..greedy()
            },
        ),
    ]
}

#[test]
fn answers_are_those_of_one_engine() {
    for name in ["tiny-a", "tiny-128"] {
        for (kind, asked) in kinds() {
            let start = || EngineHandle::start(on(cpu, name)).unwrap();
            let expected = answers(&mut on(cpu, name), asked.clone());
            let found = handed(&start(), &start(), &asked);
            same(&format!("{name}, {kind}"), &expected, &found);
        }
    }
}

/// An answer whose first tokens came from an engine that was lost: penalties, random numbers and the grammar continue after
/// them. The tokens run as a prompt, in chunks, so that log-probabilities may differ by rounding.
#[test]
fn an_answer_goes_on_in_another_engine_after_any_of_its_tokens() {
    for (kind, asked) in kinds() {
        if asked.samples > 1 || asked.logprobs.is_none() {
            continue;
        }
        let whole = answers(&mut on(cpu, "tiny-a"), asked.clone()).remove(0);
        for cut in 1..whole.tokens.len() {
            let (first, rest) = (&whole.tokens[..cut], &whole.tokens[cut..]);
            let resumed = Request {
                prompt: [&asked.prompt, first].concat(),
                answered: cut,
                max_tokens: asked.max_tokens - cut,
                ..asked.clone()
            };
            let found = answers(&mut on(cpu, "tiny-a"), resumed).remove(0);
            let expected = Outcome {
                tokens: rest.to_vec(),
                logprobs: whole.logprobs[cut..].to_vec(),
                ..whole.clone()
            };
            near(&expected, &found);
            assert_eq!(found.reason, whole.reason, "{kind} after {cut}");
        }
    }
}

/// Tokens that the grammar does not allow are refused, and so are more than there are, and those of several answers.
#[test]
fn first_tokens_that_cannot_be_the_answers_are_refused() {
    let said = |change: &dyn Fn(&mut Request)| {
        let mut asked = request(prompt(), 9);
        change(&mut asked);
        let mut engine = on(cpu, "tiny-a");
        let id = kimi_linear::engine::RequestId(1);
        let error = engine.submit(id, asked).unwrap_err().to_string();
        assert!(engine.is_idle());
        error
    };
    let wrong = said(&|it| {
        it.prompt.push(1);
        (it.grammar, it.answered) = (grammar(6), 1);
    });
    assert!(wrong.contains("token 1 is no 0"), "{wrong}");
    let many = said(&|it| it.answered = it.prompt.len());
    assert!(many.contains("answered should be"), "{many}");
    let several = said(&|it| (it.samples, it.answered) = (2, 1));
    assert!(several.contains("answered should be"), "{several}");
}

/// The answers of one request are those of a request for each.
#[test]
fn answers_asked_for_one_by_one_are_those_of_one_request() {
    for (kind, asked) in kinds().into_iter().filter(|(_, it)| it.samples > 1) {
        let together = answers(&mut on(cpu, "tiny-a"), asked.clone());
        for (first_sample, expected) in together.iter().enumerate() {
            let alone = Request {
                samples: 1,
                first_sample,
                ..asked.clone()
            };
            let found = answers(&mut on(cpu, "tiny-a"), alone);
            same(kind, std::slice::from_ref(expected), &found);
        }
    }
}

/// The sender's own events: the first token of each answer, and an end that announces more tokens.
#[test]
fn the_sender_draws_one_token_of_each_answer() {
    let asked = Request {
        samples: 3,
        sampling: drawn(4),
        ..request(prompt(), 9)
    };
    let expected = answers(&mut on(cpu, "tiny-a"), asked.clone());
    let mut engine = on(cpu, "tiny-a");
    let mut stream = engine
        .export(kimi_linear::engine::RequestId(1), asked, 4096)
        .unwrap();
    let mut outcomes = Outcomes::new();
    crate::engine_harness::finish(&mut engine, &mut outcomes);
    let found: Vec<Outcome> = outcomes.into_values().collect();
    assert_eq!(found.len(), 3);
    assert!(stream.by_ref().all(|record| record.is_ok()));
    let hand_off = stream.hand_off().unwrap();
    for ((expected, found), first) in expected.iter().zip(&found).zip(&hand_off.first) {
        assert_eq!(found.tokens, expected.tokens[..1]);
        assert_eq!(found.logprobs, expected.logprobs[..1]);
        assert_eq!(found.reason, Some(FinishReason::Length));
        let first = first.as_ref().unwrap();
        assert_eq!(first.id, expected.tokens[0]);
        assert_eq!(first.logprobs, expected.logprobs[0]);
    }
}

/// A seed that the receiver does not have, and a `max_tokens` that the sender does not have: the sender's seed is used for
/// sampling, the receiver's own `max_tokens` for the end.
#[test]
fn the_sampling_that_was_used_goes_on() {
    let asked = Request {
        sampling: drawn(31),
        ..request(prompt(), 9)
    };
    let expected = answers(&mut on(cpu, "tiny-a"), asked.clone());
    let sender = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let short = Request {
        max_tokens: 1,
        ..asked.clone()
    };
    let (header, records, hand_off) = sent(&sender, short);
    let other = Request {
        sampling: drawn(99),
        ..asked
    };
    let receiver = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let mut import = receiver.import(header, other).unwrap();
    for record in &records {
        import.put(record).unwrap();
    }
    let found = all(&import.finish(Some(hand_off)).unwrap());
    same("another seed", &expected, &found);
}

/// Either side may have a cached prefix of whole blocks, so that the arithmetic is that of a cold run.
#[test]
fn prefixes_on_either_side_change_nothing() {
    let shared = 6 * BLOCK;
    let tail = |seed| [tokens(1, shared), tokens(seed, 40)].concat();
    let asked = |seed| Request {
        samples: 2,
        sampling: drawn(seed),
        ..request(tail(seed), 7)
    };
    let expected = |seed| answers(&mut on(cpu, "tiny-a"), asked(seed));
    for warm in [[true, false], [false, true], [true, true]] {
        let [from, to] = warm.map(|warm| {
            let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
            if warm {
                let _ = outcome(&handle.answer(request(tail(50), 1)));
            }
            handle
        });
        let mut import = to.import(header_of(&to, &asked(51)), asked(51)).unwrap();
        let have = import.reserved().unwrap();
        assert_eq!(have, if warm[1] { shared } else { 0 });
        let mut stream = from.export(asked(51), crate::unheard()).unwrap();
        stream.skip_latents(have);
        let records: Vec<LayerRecord> = stream.by_ref().map(|it| it.unwrap()).collect();
        let latents = |it: &&LayerRecord| it.tensor == LayerTensor::Latents;
        let first = records.iter().filter(latents).map(|it| it.positions.start);
        assert_eq!(first.min(), Some(have), "only what is missing came");
        for record in &records {
            import.put(record).unwrap();
        }
        let found = all(&import.finish(stream.hand_off().cloned()).unwrap());
        same(&format!("{warm:?}"), &expected(51), &found);
        // Again with what the first run left in the caches.
        same("again", &expected(52), &handed(&from, &to, &asked(52)));
        same("local", &expected(53), &all(&to.answer(asked(53))));
    }
}

/// Imported caches are found by later requests, like those that were prefilled here.
#[test]
fn imported_prompts_are_kept() {
    let expected = answers(&mut on(cpu, "tiny-a"), further());
    let [from, to] = [0, 1].map(|_| EngineHandle::start(on(cpu, "tiny-a")).unwrap());
    let _ = handed(&from, &to, &request(prompt(), 1));
    let found = all(&to.answer(further()));
    same("local", &expected, &found);
    assert_eq!(found[0].usage.cached_tokens, LENGTH);
    // An import does not need the latents of whole blocks any more.
    let asked = further();
    let mut import = to.import(header_of(&to, &asked), asked).unwrap();
    let whole = LENGTH / BLOCK * BLOCK;
    assert!(import.reserved().unwrap() >= whole);
}

/// A request that is cancelled at any moment leaves nothing on either side.
#[test]
fn cancellation_at_any_moment_gives_all_back() {
    let seed = seeds::printed(seeds::drawn());
    let mut rng = SmallRng::seed_from_u64(seed);
    let [from, to] = [0, 1].map(|_| EngineHandle::start(on(cpu, "tiny-a")).unwrap());
    let asked = Request {
        samples: 2,
        ..request(prompt(), 30)
    };
    let (header, mut records, hand_off) = sent(&from, asked.clone());
    records.shuffle(&mut rng);
    let mut complete = false;
    for round in 0..30 {
        let count = rng.random_range(0..=records.len());
        let cancelled = to.import(header.clone(), asked.clone()).unwrap();
        let mut import = to.import(header.clone(), asked.clone()).unwrap();
        drop(cancelled);
        for record in &records[..count] {
            import.put(record).unwrap();
        }
        if count == records.len() {
            complete = true;
            let answer = import.finish(Some(hand_off.clone())).unwrap();
            let _ = answer.next();
        } else if round % 2 == 0 {
            match import.finish(Some(hand_off.clone())) {
                Err(error) => assert!(error.to_string().contains("missing"), "{error}"),
                // What did not come was cached here by a round before.
                Ok(_) => {
                    let latents = |record: &LayerRecord| record.tensor == LayerTensor::Latents;
                    assert!(complete && records[count..].iter().all(latents));
                }
            }
        }
        // The sender's side: cancelled after some records.
        let mut stream = from.export(asked.clone(), crate::unheard()).unwrap();
        for _ in 0..rng.random_range(0..8) {
            let _ = stream.next();
        }
    }
    for handle in [from, to] {
        // Cancellations apply in the order of the commands, at the next step.
        let _ = outcome(&handle.answer(request(tokens(3, 5), 1)));
        handle.clear_cache().unwrap();
        let left = handle.occupancy().unwrap();
        let left = (left.slots, left.blocks, left.host_bytes);
        assert_eq!(left, (0, 0, 0));
    }
}

/// More imports than fit, and answers of the receiver's own that are preempted: all have the same results as alone.
#[test]
fn a_full_receiver_answers_all() {
    let [from, to] = [0, 1].map(|_| EngineHandle::start(on(cpu, "tiny-a")).unwrap());
    let asked = |seed: u64| Request {
        samples: 1 + seed as usize % 2,
        sampling: drawn(seed),
        reuse: false,
        ..request(tokens(seed, 100 + seed as usize * 7), 20)
    };
    let own = |seed: u64| Request {
        reuse: false,
        ..request(tokens(seed, 150), 40)
    };
    let running: Vec<Answer> = (20..24).map(|seed| to.answer(own(seed))).collect();
    let mut imports = Vec::new();
    for seed in 0..8 {
        let (header, records, hand_off) = sent(&from, asked(seed));
        let import = to.import(header, asked(seed)).unwrap();
        imports.push((seed, import, records, hand_off));
    }
    let threads: Vec<_> = imports
        .into_iter()
        .map(|(seed, mut import, records, hand_off)| {
            std::thread::spawn(move || {
                for record in &records {
                    import.put(record).unwrap();
                }
                (seed, all(&import.finish(Some(hand_off)).unwrap()))
            })
        })
        .collect();
    for thread in threads {
        let (seed, found) = thread.join().unwrap();
        let expected = answers(&mut on(cpu, "tiny-a"), asked(seed));
        same(&format!("import {seed}"), &expected, &found);
    }
    for (seed, answer) in (20..).zip(&running) {
        let expected = answers(&mut on(cpu, "tiny-a"), own(seed));
        same(&format!("answer {seed}"), &expected, &all(answer));
    }
    to.clear_cache().unwrap();
    let left = to.occupancy().unwrap();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

/// Caches that do not arrive: the prompt is prefilled here, with the same answer, at any stage of the import.
#[test]
fn what_does_not_come_is_computed_here() {
    let asked = request(prompt(), 9);
    let expected = answers(&mut on(cpu, "tiny-a"), asked.clone());
    let from = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let (header, records, _) = sent(&from, asked.clone());
    for count in [None, Some(0), Some(records.len() / 2), Some(records.len())] {
        let to = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
        let (sender, events) = std::sync::mpsc::channel();
        let sink = Box::new(move |event| {
            let _ = sender.send(event);
            std::ops::ControlFlow::Continue(())
        });
        let id = to.import_to(header.clone(), asked.clone(), sink);
        if let Some(count) = count {
            let reserved = events.iter().find_map(|event| match event {
                Event::Reserved { have } => Some(have),
                _ => None,
            });
            let have = reserved.unwrap();
            let mut writer = to.import_writer(id, header.clone(), have).unwrap();
            for record in &records[..count] {
                writer.put(record).unwrap();
            }
        }
        to.recompute_import(id).unwrap();
        let mut outcomes = Outcomes::new();
        take(events.iter().map(|event| (id, event)), &mut outcomes);
        let found: Vec<Outcome> = outcomes.into_values().collect();
        same(&format!("{count:?}"), &expected, &found);
        assert!(to.recompute_import(id).is_err(), "it is not waited for");
        to.clear_cache().unwrap();
        let left = to.occupancy().unwrap();
        assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
    }
}

#[test]
fn a_hand_off_that_does_not_fit_is_refused() {
    let from = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let to = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let (header, records, hand_off) = sent(&from, request(prompt(), 4));
    let refused = |asked: Request, hand_off: Option<HandOff>| {
        let mut import = to.import(header.clone(), asked).unwrap();
        for record in &records {
            import.put(record).unwrap();
        }
        import.finish(hand_off).err().unwrap().to_string()
    };
    let whole = || request(prompt(), 4);
    let two = Request {
        samples: 2,
        ..whole()
    };
    let error = refused(two, Some(hand_off.clone()));
    assert!(error.contains("number of answers of a hand-off"), "{error}");
    let error = refused(whole(), None);
    assert!(error.contains("came without first tokens"), "{error}");
    let error = refused(further(), Some(hand_off.clone()));
    assert!(error.contains("came with first tokens"), "{error}");
    let mut foreign = hand_off.clone();
    foreign.first[0].as_mut().unwrap().id = 1 << 20;
    let error = refused(whole(), Some(foreign));
    assert!(error.contains("id of a first token"), "{error}");
    // A token that the grammar forbids fails the request with an event, and nothing of it remains.
    let grammar = grammar(4);
    let mut forbidden = hand_off;
    forbidden.first[0].as_mut().unwrap().id = 1;
    let asked = Request { grammar, ..whole() };
    let mut import = to.import(header.clone(), asked).unwrap();
    for record in &records {
        import.put(record).unwrap();
    }
    let found = all(&import.finish(Some(forbidden)).unwrap());
    let error = found[0].error.as_deref().unwrap();
    assert!(error.contains("token 1 is no 0"), "{error}");
    let _ = outcome(&to.answer(request(tokens(3, 5), 1)));
    to.clear_cache().unwrap();
    let left = to.occupancy().unwrap();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

/// Between backends: the answers are those of the receiver's own prefill, except for the order of sums.
#[cfg(all(feature = "wgpu", feature = "cuda"))]
#[test]
fn a_prompt_read_on_one_backend_is_answered_on_another() {
    use crate::backends::{cuda, wgpu};

    let name = "tiny-128";
    let asked = request(prompt(), 8);
    let start = |open: crate::Open| EngineHandle::start(on(open, name)).unwrap();
    let one = |open: crate::Open| answers(&mut on(open, name), asked.clone()).remove(0);
    for (from, to) in [(wgpu as crate::Open, cpu as crate::Open), (cpu, wgpu)] {
        let found = handed(&start(from), &start(to), &asked);
        near(&one(to), &found[0]);
    }
    // Caches of a bf16 device have the same meaning on both f32 backends.
    let [to_cpu, to_wgpu] =
        [cpu as crate::Open, wgpu].map(|to| handed(&start(cuda), &start(to), &asked));
    near(&to_cpu[0], &to_wgpu[0]);
}
