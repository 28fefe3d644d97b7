//! The output processor: text, stop strings and tool calls from the engine's events.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use kimi_linear::engine::{Event, FinishReason, Output, OutputProcessor, Usage};
use kimi_linear::error::{EngineError, Error, TokenizerError};
use kimi_linear::tokenizer::{Marker, Tokenizer, ToolCallEvent};

fn tokenizer() -> Arc<Tokenizer> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tokenizer");
    Arc::new(Tokenizer::from_dir(&dir).unwrap())
}

fn stops(tokenizer: &Arc<Tokenizer>, stops: &[&str]) -> OutputProcessor {
    let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
    OutputProcessor::new(tokenizer)
        .stop_strings(&stops)
        .unwrap()
}

fn token(sample: usize, id: u32) -> Event {
    Event::Token {
        sample,
        id,
        logprobs: None,
    }
}

/// The end of an answer of this number of tokens because the context is full.
fn end(sample: usize, generated_tokens: usize) -> Event {
    Event::Finished {
        sample,
        reason: FinishReason::Length,
        stop_token: None,
        usage: Usage {
            prompt_tokens: 7,
            cached_tokens: 0,
            generated_tokens,
        },
    }
}

/// The token of exactly these bytes.
fn of_bytes(tokenizer: &Tokenizer, bytes: &[u8]) -> u32 {
    let is = |id: &u32| tokenizer.piece(*id).unwrap().bytes == bytes;
    (0..tokenizer.ordinary_tokens() as u32).find(is).unwrap()
}

/// The events that a client receives of one answer.
#[derive(Debug, Default, PartialEq)]
struct Told {
    deltas: Vec<ToolCallEvent>,
    /// Number of tokens in events.
    tokens: usize,
    /// Number of tokens after which the answer was to end.
    broke: Option<usize>,
    end: Option<(FinishReason, usize)>,
}

impl Told {
    /// The text of an answer without tool calls.
    fn text(&self) -> String {
        let text = |delta: &ToolCallEvent| match delta {
            ToolCallEvent::Text(text) => text.clone(),
            other => panic!("{other:?}"),
        };
        self.deltas.iter().map(text).collect()
    }
}

/// Every token, including those after the answer was to end, and the end.
fn tell(mut processor: OutputProcessor, ids: &[u32]) -> Told {
    let mut told = Told::default();
    let events = ids.iter().map(|id| token(0, *id));
    for (i, event) in events.chain([end(0, ids.len())]).enumerate() {
        let mut client = |output: Output| {
            told.deltas.extend(output.deltas);
            match output.event {
                Event::Token { .. } => told.tokens += 1,
                Event::Finished { reason, usage, .. } => {
                    told.end = Some((reason, usage.generated_tokens));
                }
                other => panic!("{other:?}"),
            }
        };
        if processor.process(event, &mut client) == ControlFlow::Break(()) {
            told.broke.get_or_insert(i + 1);
        }
    }
    told
}

fn text(text: &str) -> ToolCallEvent {
    ToolCallEvent::Text(text.to_owned())
}

#[test]
fn a_stop_string_may_lie_across_any_tokens() {
    let tokenizer = tokenizer();
    let said = "The quick brown fox jumps over the lazy dog, é and 🙂.";
    let ids = tokenizer.encode_ordinary(said).unwrap();
    let places: Vec<usize> = said.char_indices().map(|(at, _)| at).collect();
    let (mut inside, mut across) = (0, 0);
    for (i, &from) in places.iter().enumerate() {
        for &to in &places[i + 1..] {
            let stop = &said[from..to];
            let at = said.find(stop).unwrap();
            let told = tell(stops(&tokenizer, &["never", stop]), &ids);
            assert_eq!(told.text(), said[..at], "{stop:?}");
            // It ends with the token that completes the stop string, and the text after that is left out.
            let through = |count: &usize| {
                let bytes = tokenizer.decode_bytes(&ids[..*count]).unwrap();
                bytes.len() >= at + stop.len()
            };
            let last = (0..=ids.len()).find(through).unwrap();
            assert_eq!((told.broke, told.tokens), (Some(last), last), "{stop:?}");
            assert_eq!(told.end, Some((FinishReason::Stop, last)), "{stop:?}");
            let before = tokenizer.decode_bytes(&ids[..last - 1]).unwrap().len();
            *(if before <= at {
                &mut inside
            } else {
                &mut across
            }) += 1;
        }
    }
    assert!(inside > 10 && across > 100, "{inside} {across}");
    let told = tell(stops(&tokenizer, &["never", "🙂!"]), &ids);
    assert_eq!((told.text().as_str(), told.broke), (said, None));
    assert_eq!(told.end, Some((FinishReason::Length, ids.len())));
}

#[test]
fn text_comes_in_whole_characters() {
    let tokenizer = tokenizer();
    let bytes: Vec<u32> = "a🙂é"
        .bytes()
        .map(|byte| of_bytes(&tokenizer, &[byte]))
        .collect();
    let mut processor = OutputProcessor::new(&tokenizer);
    let mut pieces = Vec::new();
    for id in &bytes {
        let _ = processor.process(token(0, *id), &mut |output| pieces.push(output.text()));
    }
    assert_eq!(pieces, ["a", "", "", "", "🙂", "", "é"]);
    assert_eq!(tell(stops(&tokenizer, &["é"]), &bytes).text(), "a🙂");
    let control = tokenizer.special_id("<|im_middle|>").unwrap();
    // An incomplete character before a control token or the end becomes no character.
    let cut = [&bytes[..3], &[control], &bytes[..3]].concat();
    let told = tell(OutputProcessor::new(&tokenizer), &cut);
    // At the answer's end the rest of the character is missing.
    assert_eq!(told.text(), "a\u{fffd}<|im_middle|>a");
    // Half a character in the token that completes a stop string is after the stop string.
    let half = of_bytes(&tokenizer, b" \xd0");
    let told = tell(stops(&tokenizer, &[" "]), &[bytes[0], half, bytes[0]]);
    assert_eq!((told.text().as_str(), told.tokens), ("a", 2));
}

#[test]
fn control_tokens_are_told_from_text_that_spells_them() {
    let tokenizer = tokenizer();
    let spelt = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|im_end|>";
    let ids = tokenizer.encode_ordinary(spelt).unwrap();
    let processor = OutputProcessor::new(&tokenizer)
        .skip_special_tokens(true)
        .tool_calls(true);
    assert_eq!(tell(processor, &ids).text(), spelt);
    let control = tokenizer.special_id("<|im_middle|>").unwrap();
    let mixed = [&ids[..], &[control], &ids].concat();
    let shown = [spelt, "<|im_middle|>", spelt].concat();
    let processor = OutputProcessor::new(&tokenizer);
    assert_eq!(tell(processor.clone(), &mixed).text(), shown);
    let hidden = processor.skip_special_tokens(true);
    assert_eq!(tell(hidden, &mixed).text(), spelt.repeat(2));
    // No stop string is found in a control token's name, nor across it, whether it is shown or hidden.
    for skip in [false, true] {
        for stop in ["<|im_middle|>", "middle", "|><|tool", "|><|im_middle"] {
            let processor = stops(&tokenizer, &[stop]).skip_special_tokens(skip);
            let ids = [
                tokenizer.encode_ordinary("<|im_end|>").unwrap(),
                vec![control],
            ]
            .concat();
            let ids = [ids, tokenizer.encode_ordinary("<|tool").unwrap()].concat();
            let name = if skip { "" } else { "<|im_middle|>" };
            let told = tell(processor, &ids);
            assert_eq!(told.text(), format!("<|im_end|>{name}<|tool"), "{stop}");
            assert_eq!(told.broke, None);
        }
    }
}

/// An answer that calls `f` with these arguments.
fn call(tokenizer: &Tokenizer, arguments: &str) -> Vec<u32> {
    let control = |marker: Marker| vec![tokenizer.special_id(marker.name()).unwrap()];
    let text = |text| tokenizer.encode_ordinary(text).unwrap();
    [
        text("Well. "),
        control(Marker::SectionBegin),
        control(Marker::CallBegin),
        text("functions.f:0"),
        control(Marker::ArgumentBegin),
        text(arguments),
        control(Marker::CallEnd),
        control(Marker::SectionEnd),
    ]
    .concat()
}

/// The arguments in events, and whether the call was complete.
fn called(told: &Told) -> (String, bool) {
    let (mut arguments, mut ended) = (String::new(), None);
    for delta in &told.deltas {
        match delta {
            ToolCallEvent::ArgumentsDelta { text, .. } => arguments.push_str(text),
            ToolCallEvent::CallEnd { complete, .. } => ended = Some(*complete),
            _ => {}
        }
    }
    (arguments, ended.unwrap())
}

#[test]
fn a_stop_string_may_lie_in_a_tool_call() {
    let tokenizer = tokenizer();
    let arguments = "{\"a\": \"one two three\"}";
    let ids = call(&tokenizer, arguments);
    let calls = |processor: OutputProcessor| processor.skip_special_tokens(true).tool_calls(true);
    let told = tell(calls(OutputProcessor::new(&tokenizer)), &ids);
    assert_eq!(called(&told), (arguments.to_owned(), true));
    let told = tell(calls(stops(&tokenizer, &["two"])), &ids);
    assert_eq!(called(&told), ("{\"a\": \"one ".to_owned(), false));
    assert_eq!(told.end.unwrap().0, FinishReason::Stop);
    assert!(told.tokens < ids.len() && told.broke == Some(told.tokens));
    // Cut in the call's id: what was received names no function, and is not emitted as a call.
    let told = tell(calls(stops(&tokenizer, &["ions"])), &ids);
    let is_text = |delta: &ToolCallEvent| matches!(delta, ToolCallEvent::Text(_));
    assert!(told.deltas.iter().all(is_text), "{:?}", told.deltas);
}

#[test]
fn special_tokens_are_shown_where_that_is_asked() {
    let tokenizer = tokenizer();
    let middle = tokenizer.special_id("<|im_middle|>").unwrap();
    let ids = [call(&tokenizer, "{}"), vec![middle]].concat();
    let all = tokenizer.decode(&ids).unwrap();
    let processor = OutputProcessor::new(&tokenizer);
    // Without tool calls their markers are ordinary control tokens.
    assert_eq!(tell(processor.clone(), &ids).text(), all);
    let hidden = tell(processor.clone().skip_special_tokens(true), &ids);
    assert_eq!(hidden.text(), "Well. functions.f:0{}");
    // With tool calls, their markers are never text.
    for (skip, last) in [(false, Some("<|im_middle|>")), (true, None)] {
        let processor = processor.clone().tool_calls(true).skip_special_tokens(skip);
        let told = tell(processor, &ids);
        assert_eq!(called(&told), ("{}".to_owned(), true));
        let texts = told
            .deltas
            .iter()
            .filter(|delta| matches!(delta, ToolCallEvent::Text(_)));
        let texts: String = texts
            .map(|delta| match delta {
                ToolCallEvent::Text(text) => text.as_str(),
                _ => "",
            })
            .collect();
        assert_eq!(texts, format!("Well. {}", last.unwrap_or_default()));
        assert_eq!(
            told.deltas.last() == last.map(text).as_ref(),
            last.is_some()
        );
    }
}

#[test]
fn answers_to_one_request_are_apart() {
    let tokenizer = tokenizer();
    let mut processor = stops(&tokenizer, &["bc"]);
    let ids: Vec<u32> = ["a", "b", "c"]
        .map(|letter| tokenizer.encode_ordinary(letter).unwrap()[0])
        .into();
    let mut texts = [String::new(), String::new()];
    let mut send = |event: Event| {
        let mut ends = None;
        let flow = processor.process(event, &mut |output: Output| match output.event {
            Event::Token { sample, .. } => texts[sample].push_str(&output.text()),
            Event::Finished { sample, reason, .. } => {
                texts[sample].push_str(&output.text());
                ends = Some(reason);
            }
            _ => panic!("{output:?}"),
        });
        (flow.is_break(), ends)
    };
    // `c` comes after `b` of the other answer, then after its own `b`.
    for (sample, id, breaks) in [
        (1, ids[0], false),
        (0, ids[1], false),
        (1, ids[2], false),
        (0, ids[0], false),
        (0, ids[1], false),
        (0, ids[2], true),
        (1, ids[1], false),
    ] {
        assert_eq!(send(token(sample, id)), (breaks, None));
    }
    assert_eq!(send(end(0, 4)).1, Some(FinishReason::Stop));
    assert_eq!(send(end(1, 3)).1, Some(FinishReason::Length));
    assert_eq!(texts, ["ba", "acb"]);
}

#[test]
fn a_token_that_is_none_fails_the_request() {
    let tokenizer = tokenizer();
    let mut processor = OutputProcessor::new(&tokenizer);
    let mut told = Vec::new();
    let mut client = |output: Output| told.push(output.event);
    let flow = processor.process(token(1, 99_999), &mut client);
    assert_eq!(flow, ControlFlow::Break(()));
    // The others end at their next token, which is not emitted.
    let flow = processor.process(token(0, 5), &mut client);
    assert_eq!(flow, ControlFlow::Break(()));
    let _ = processor.process(end(1, 1), &mut client);
    let [Event::Failed(error)] = told.as_slice() else {
        panic!("{told:?}")
    };
    assert!(matches!(
        &**error,
        Error::Tokenizer(TokenizerError::UnknownId { id: 99_999, .. })
    ));
}

#[test]
fn an_empty_stop_string_is_refused() {
    let processor = OutputProcessor::new(&tokenizer());
    let error = processor.stop_strings(&["x".to_owned(), String::new()]);
    let error = error.unwrap_err();
    assert_eq!(error, EngineError::EmptyStop);
    assert!(error.to_string().starts_with("a stop string is empty"));
}
