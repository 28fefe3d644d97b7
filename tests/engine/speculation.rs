//! Speculation: answers, log-probabilities and ends have the bits of an engine that takes a token per step, and steps are fewer.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcome, Outcomes, answer, collect, drawn, engine_on, finish, limits, request,
    tokens,
};
use crate::group::{group, offloaded};
use crate::wrapped::{Part, Wrap, Wrapped};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Batch, Op, Result, StepOutput};
use kimi_linear::engine::{
    Engine, EngineHandle, EngineOptions, Event, FinishReason, OutputProcessor, PromptLookup,
    Request, RequestId, Sampling, Speculated,
};
use kimi_linear::llm::LlmFiles;
use kimi_linear::model::TraceChoice;
use kimi_linear::tokenizer::{Chat, Tokenizer};
use pollster::block_on;

/// The tests' options with speculation.
pub fn speculating(options: EngineOptions) -> EngineOptions {
    EngineOptions {
        prompt_lookup: Some(PromptLookup::new(4, 1, 3).unwrap()),
        ..options
    }
}

/// Counts steps, and damages the rows after the first of a step with several.
#[derive(Clone, Default)]
struct Counting {
    steps: Arc<AtomicUsize>,
    is_asynchronous: bool,
    damages: bool,
}

impl Counting {
    fn over(&self, backend: Box<dyn Backend>) -> Box<dyn Backend> {
        Box::new(Wrapped::new(backend, self.clone()))
    }

    fn steps(&self) -> usize {
        self.steps.load(Ordering::Relaxed)
    }
}

impl Wrap for Counting {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        Ok(vec![Part::plain(op.clone())])
    }

    fn batch(&self, _batch: &mut Batch) -> Result<()> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn output(&self, output: &mut StepOutput) {
        if self.damages {
            for choice in output.choices.iter_mut().skip(2) {
                choice.finite = false;
            }
        }
    }

    fn is_asynchronous(&self) -> bool {
        self.is_asynchronous
    }
}

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

/// Biases by which an answer has three different tokens, so that it often repeats itself.
pub fn few(seed: u64) -> Vec<(u32, f64)> {
    (0..3).map(|i| (20 + 5 * i + seed as u32, 100.0)).collect()
}

/// A greedy request whose answer often repeats itself.
fn repeating(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        sampling: Sampling {
            logit_bias: few(3),
            ..Sampling::GREEDY
        },
        ..request(prompt, max_tokens)
    }
}

/// A prompt that says the same twice, and begins to say it again.
fn repeated(seed: u64, length: usize) -> Vec<u32> {
    let once = tokens(seed, length);
    [&once[..], &once, &once[..length / 2 + 1]].concat()
}

/// Answers of all kinds: greedy, drawn, biased, penalised, several to one prompt, and some that a stop token ends.
fn requests() -> Vec<Request> {
    let mut alone = engine_on(cpu(), "tiny-a", limits(1, 4, 32), OPTIONS);
    [5, 11, 14, 23, 1, 18, 9, 12]
        .into_iter()
        .enumerate()
        .map(|(i, length)| {
            let sampling = match i % 4 {
                0 | 1 => Sampling {
                    logit_bias: few(i as u64),
                    ..Sampling::GREEDY
                },
                2 => Sampling {
                    logit_bias: few(i as u64),
                    ..drawn(i as u64)
                },
                _ => Sampling {
                    frequency_penalty: 0.2,
                    ..Sampling::GREEDY
                },
            };
            let whole = Request {
                sampling,
                ..request(repeated(i as u64 + 1, length), 1 + 7 * i)
            };
            let answer = answer(&mut alone, whole.clone()).tokens;
            let stop_ids = match i % 2 {
                1 => vec![answer[answer.len() / 2]],
                _ => Vec::new(),
            };
            let samples = if i == 4 { 3 } else { 1 };
            Request {
                stop_ids,
                samples,
                ..whole
            }
        })
        .collect()
}

fn nothing_left(engine: &mut Engine) {
    engine.clear_cache();
    let left = engine.occupancy();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
    assert_eq!(engine.held(), (0, 0));
}

/// The outcomes of all requests at once; then the tokens of one more that continues each answer, and whether it was a hit.
fn run(
    backend: Box<dyn Backend>,
    options: EngineOptions,
) -> (Outcomes, Vec<(Vec<u32>, bool)>, Speculated) {
    let mut engine = engine_on(backend, "tiny-a", limits(4, 16, 60), options);
    let mut outcomes = Outcomes::new();
    let requests = requests();
    for (i, request) in requests.iter().enumerate() {
        engine.submit(RequestId(i as u64), request.clone()).unwrap();
    }
    finish(&mut engine, &mut outcomes);
    let speculated = engine.speculated();
    let mut later = Vec::new();
    for (i, first) in requests.iter().enumerate() {
        let said = outcomes[&(RequestId(i as u64), 0)].tokens.clone();
        let prompt = [first.prompt.clone(), said, tokens(50 + i as u64, 4)].concat();
        let outcome = answer(&mut engine, request(prompt, 5));
        later.push((outcome.tokens, outcome.usage.cached_tokens > 0));
    }
    nothing_left(&mut engine);
    (outcomes, later, speculated)
}

fn same_answers(open: impl Fn() -> Box<dyn Backend>) {
    let plain = run(open(), OPTIONS);
    assert_eq!(plain.2, Speculated::default());
    for is_asynchronous in [false, true] {
        let counting = Counting {
            is_asynchronous,
            ..Counting::default()
        };
        let found = run(counting.over(open()), speculating(OPTIONS));
        assert_eq!((&found.0, &found.1), (&plain.0, &plain.1));
        let Speculated {
            drafts,
            draft_tokens,
            accepted_tokens,
        } = found.2;
        println!("{drafts} proposals, {accepted_tokens} of {draft_tokens} tokens accepted");
        assert!(drafts > 30 && accepted_tokens > 20, "{:?}", found.2);
        assert!(accepted_tokens < draft_tokens, "{:?}", found.2);
    }
    assert!(plain.1.iter().all(|(_, hit)| *hit), "{:?}", plain.1);
}

#[test]
fn answers_have_the_bits_of_those_without() {
    same_answers(cpu);
}

#[test]
fn answers_of_ranks_have_the_bits_of_those_without() {
    for of in [[1, 2, 2], [2, 1, 1], [2, 2, 1]] {
        same_answers(|| group("tiny-a", of, cpu));
    }
}

/// Sampled, speculated, swapped: all with the bits of one device.
#[test]
fn answers_with_experts_on_the_host_have_the_bits_of_those_without() {
    let whole = run(cpu(), OPTIONS);
    for count in [1, 4] {
        let both = || offloaded("tiny-a", count, cpu(), cpu());
        same_answers(both);
        let found = run(both(), OPTIONS);
        assert_eq!((&found.0, &found.1), (&whole.0, &whole.1), "{count}");
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn tokens_on_wgpu_are_those_without() {
    use kimi_linear::backend::wgpu;
    let said = |options| {
        let backend = wgpu::WgpuBackend::with_options(wgpu::Options::default());
        let backend = backend.unwrap_or_else(|error| {
            panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
        });
        let (outcomes, later, speculated) = run(Box::new(backend), options);
        let tokens = outcomes.into_values().map(|one| (one.tokens, one.reason));
        (tokens.collect::<Vec<_>>(), later, speculated)
    };
    let (plain, found) = (said(OPTIONS), said(speculating(OPTIONS)));
    assert_eq!((&found.0, &found.1), (&plain.0, &plain.1));
    assert!(found.2.accepted_tokens > 20, "{:?}", found.2);
}

/// The outcome of one request alone, with and without speculation, and how much was proposed.
fn both(request: &Request, of: (usize, usize, usize)) -> (Outcome, Outcome, Speculated) {
    let (sequences, slots, blocks) = of;
    let run = |options| {
        let limits = limits(sequences, slots, blocks);
        let mut engine = engine_on(cpu(), "tiny-a", limits, options);
        let outcome = answer(&mut engine, request.clone());
        let speculated = engine.speculated();
        nothing_left(&mut engine);
        (outcome, speculated)
    };
    let ((plain, _), (found, speculated)) = (run(OPTIONS), run(speculating(OPTIONS)));
    (plain, found, speculated)
}

#[test]
fn an_answer_ends_at_max_tokens_and_with_the_context() {
    for most in 1..26 {
        let (plain, found, _) = both(&repeating(repeated(3, 8), most), (1, 4, 8));
        assert_eq!(plain, found, "{most} tokens");
        assert_eq!(found.usage.generated_tokens, most);
    }
    // Proposals end where the blocks do.
    for length in 4..12 {
        let (plain, found, speculated) = both(&repeating(repeated(3, length), 1000), (1, 4, 3));
        assert_eq!(plain, found, "a prompt of {length} twice");
        assert!(speculated.accepted_tokens > 0, "{speculated:?}");
    }
}

#[test]
fn requests_whose_draws_depend_on_tokens_before_do_not_speculate() {
    let greedy = repeating(repeated(3, 8), 20);
    let penalised = Request {
        sampling: Sampling {
            repetition_penalty: 1.2,
            ..greedy.sampling.clone()
        },
        ..greedy.clone()
    };
    let traced = Request {
        trace: Some(TraceChoice::default()),
        ..greedy.clone()
    };
    for request in [penalised, traced] {
        let (plain, found, speculated) = both(&request, (1, 4, 8));
        assert_eq!(plain, found);
        assert_eq!(speculated, Speculated::default());
    }
    // Neither does one for which there is no second slot.
    let (plain, found, speculated) = both(&greedy, (1, 1, 8));
    assert_eq!(plain, found);
    assert_eq!(speculated, Speculated::default());
}

/// What ends an answer may come from outside, at any token of a run that was verified.
#[test]
fn an_answer_that_is_stopped_or_cancelled_has_the_tokens_that_came() {
    type End = fn(&mut Engine);
    let ends: [(End, FinishReason); 2] = [
        (|engine| engine.stop(RequestId(1), 0), FinishReason::Stop),
        (
            |engine| engine.cancel(RequestId(1)),
            FinishReason::Cancelled,
        ),
    ];
    let (prompt, mut cached) = (repeated(3, BLOCK), Vec::new());
    for (end, reason) in ends {
        for most in 1..20 {
            let mut engine = engine_on(cpu(), "tiny-a", limits(1, 6, 20), speculating(OPTIONS));
            let mut outcomes = Outcomes::new();
            let id = RequestId(1);
            engine.submit(id, repeating(prompt.clone(), 100)).unwrap();
            let said =
                |outcomes: &Outcomes| outcomes.get(&(id, 0)).map_or(0, |one| one.tokens.len());
            while said(&outcomes) < most {
                block_on(engine.step());
                collect(&mut engine, &mut outcomes);
                assert!(said(&outcomes) <= most, "several tokens at once");
            }
            end(&mut engine);
            finish(&mut engine, &mut outcomes);
            let outcome = &outcomes[&(id, 0)];
            assert_eq!(outcome.reason, Some(reason));
            assert_eq!(outcome.usage.generated_tokens, most);
            // The state before the run, or after it, is cached: a later prompt continues from there.
            let whole = [prompt.clone(), outcome.tokens.clone()].concat();
            let next = answer(&mut engine, request([whole.clone(), vec![9]].concat(), 6));
            let mut cold = engine_on(cpu(), "tiny-a", limits(1, 6, 20), OPTIONS);
            let expected = answer(&mut cold, request([whole.clone(), vec![9]].concat(), 6));
            assert_eq!(next.tokens, expected.tokens);
            cached.push(whole.len() - next.usage.cached_tokens);
            nothing_left(&mut engine);
        }
    }
    assert!(
        cached.iter().all(|behind| (1..=9).contains(behind)),
        "{cached:?}"
    );
    assert!(cached.iter().any(|behind| *behind > 1), "{cached:?}");
}

#[test]
fn a_stop_string_inside_a_run_ends_the_text_and_the_count() {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tokenizer");
    let tokenizer = Arc::new(Tokenizer::from_dir(&tokenizer).unwrap());
    let prompt = repeated(3, 8);
    let mut alone = engine_on(cpu(), "tiny-a", limits(1, 4, 20), OPTIONS);
    let whole = answer(&mut alone, repeating(prompt.clone(), 30)).tokens;
    let text: String = whole
        .iter()
        .map(|id| tokenizer.decode(&[*id]).unwrap())
        .collect();
    let mut ends = 0;
    for at in text.char_indices().map(|(at, _)| at).take(40) {
        let Some(stop) = text.get(at..at + 2) else {
            continue;
        };
        let said = |options| {
            let engine = engine_on(cpu(), "tiny-a", limits(1, 4, 20), options);
            let engine = EngineHandle::start(engine).unwrap();
            let (send, receive) = mpsc::channel();
            let processor = OutputProcessor::new(&tokenizer);
            let processor = processor.stop_strings(&[stop.to_owned()]).unwrap();
            let sink = processor.sink(move |output| {
                let end = match &output.event {
                    Event::Finished { reason, usage, .. } => Some((*reason, *usage)),
                    _ => None,
                };
                let _ = send.send((output.text(), end));
            });
            engine.submit(repeating(prompt.clone(), 30), sink);
            let (mut text, mut end) = (String::new(), None);
            for (more, ended) in receive {
                text += &more;
                end = end.or(ended);
            }
            (text, end)
        };
        let (plain, found) = (said(OPTIONS), said(speculating(OPTIONS)));
        assert_eq!(plain, found, "{stop:?}");
        ends += usize::from(
            found
                .1
                .is_some_and(|(reason, _)| reason == FinishReason::Stop),
        );
    }
    assert!(ends >= 5, "{ends}");
}

/// A row that is not finite verifies nothing, and does not end a request whose own rows are finite.
#[test]
fn damage_after_a_token_that_was_not_drawn_is_not_reported() {
    let damaged = Counting {
        damages: true,
        ..Counting::default()
    };
    let request = repeating(repeated(3, 8), 30);
    let mut plain = engine_on(cpu(), "tiny-a", limits(1, 4, 20), OPTIONS);
    let backend = damaged.over(cpu());
    let mut engine = engine_on(backend, "tiny-a", limits(1, 4, 20), speculating(OPTIONS));
    let expected = answer(&mut plain, request.clone());
    assert_eq!(answer(&mut engine, request), expected);
    let speculated = engine.speculated();
    assert!(
        speculated.accepted_tokens <= speculated.drafts,
        "{speculated:?}"
    );
}

/// The demo model copies lists, which are in its prompt.
#[test]
fn a_list_is_copied_in_fewer_steps() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let files = LlmFiles::open(&folder).unwrap();
    let chat = Chat::user("Copy: letter, ball, pear, lamp, bottle, fork, knife, shoe.");
    let prompt = files
        .tokenizer
        .encode_chat(files.template().unwrap(), &chat)
        .unwrap()
        .ids;
    let request = Request {
        stop_ids: files.stop_ids(),
        ..Request::new(prompt, 64)
    };
    let run = |options| {
        let counting = Counting::default();
        let backend = counting.over(cpu());
        let name = folder.to_str().unwrap();
        let mut engine = engine_on(backend, name, limits(1, 4, 20), options);
        let outcome = answer(&mut engine, request.clone());
        (outcome, counting.steps(), engine.speculated())
    };
    let (plain, steps, _) = run(OPTIONS);
    let (found, fewer, speculated) = run(speculating(OPTIONS));
    assert_eq!(plain, found);
    let text = files.tokenizer.decode(&found.tokens).unwrap();
    println!("{text:?}: {steps} steps, {fewer} with {speculated:?}");
    assert!(text.contains("bottle, fork, knife"), "{text}");
    assert!(fewer * 2 < steps, "{fewer} steps of {steps}");
}

/// Sinks are given one token after the other.
#[test]
fn every_token_is_an_event_between_two_steps() {
    let engine = engine_on(cpu(), "tiny-a", limits(1, 4, 20), speculating(OPTIONS));
    let engine = EngineHandle::start(engine).unwrap();
    let (send, receive) = mpsc::channel();
    let mut came = 0;
    let sink = Box::new(move |event| {
        if let Event::Token { .. } = event {
            came += 1;
            if came == 11 {
                return ControlFlow::Break(());
            }
        }
        if let Event::Finished { usage, .. } = event {
            let _ = send.send((came, usage.generated_tokens));
        }
        ControlFlow::Continue(())
    });
    engine.submit(repeating(repeated(3, 8), 100), sink);
    assert_eq!(receive.recv().unwrap(), (11, 11));
    let status = engine.status().unwrap();
    assert!(status.speculated.accepted_tokens > 0, "{status:?}");
}
