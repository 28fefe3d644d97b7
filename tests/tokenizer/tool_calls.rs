//! Tool calls in a stream from the model: complete, malformed and cut off.

use std::path::Path;

use kimi_linear::tokenizer::{Marker, TokenText, Tokenizer, ToolCallEvent, ToolCallParser};

fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tokenizer");
    Tokenizer::from_dir(&dir).unwrap()
}

const SECTION: u32 = 3851;
const SECTION_END: u32 = 3852;
const CALL: u32 = 3853;
const ARGUMENT: u32 = 3854;
const CALL_END: u32 = 3855;

/// The ids of an answer: text, encoded as text, and control tokens by id.
enum Said<'a> {
    Text(&'a str),
    Token(u32),
}
use Said::{Text, Token};

fn said(tokenizer: &Tokenizer, answer: &[Said<'_>]) -> Vec<u32> {
    let ids = |part: &Said<'_>| match part {
        Text(text) => tokenizer.encode_ordinary(text).unwrap(),
        Token(id) => vec![*id],
    };
    answer.iter().flat_map(ids).collect()
}

/// The events of these ids, neighbouring texts joined.
fn parse(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<ToolCallEvent> {
    let (mut parser, mut decoder) = (ToolCallParser::default(), tokenizer.stream());
    let mut events = Vec::new();
    for &id in ids {
        events.extend(parser.push(&decoder.push(id).unwrap()));
    }
    events.extend(parser.finish(&decoder.finish()));
    joined(events)
}

fn joined(events: Vec<ToolCallEvent>) -> Vec<ToolCallEvent> {
    use ToolCallEvent::{ArgumentsDelta, Text};
    let mut out: Vec<ToolCallEvent> = Vec::new();
    for event in events {
        match (out.last_mut(), event) {
            (Some(Text(before)), Text(text)) => before.push_str(&text),
            (
                Some(ArgumentsDelta {
                    text: before,
                    index: a,
                }),
                ArgumentsDelta { text, index: b },
            ) if *a == b => before.push_str(&text),
            (_, event) => out.push(event),
        }
    }
    out
}

/// Text, or a control token after it.
fn token(text: &str, marker: Option<Marker>) -> TokenText {
    TokenText {
        text: text.to_owned(),
        special: marker.map(|marker| marker.name().to_owned()),
    }
}

fn text(text: &str) -> ToolCallEvent {
    ToolCallEvent::Text(text.to_owned())
}

fn call(index: usize, id: &str, name: &str, arguments: &str, complete: bool) -> Vec<ToolCallEvent> {
    let mut events = vec![ToolCallEvent::CallBegin {
        index,
        id: id.to_owned(),
        name: name.to_owned(),
    }];
    if !arguments.is_empty() {
        events.push(ToolCallEvent::ArgumentsDelta {
            index,
            text: arguments.to_owned(),
        });
    }
    events.push(ToolCallEvent::CallEnd { index, complete });
    events
}

#[test]
fn calls_as_the_model_writes_them() {
    let tokenizer = tokenizer();
    let arguments = format!(
        "{{\"q\": \"ü🙂 <|tool_call_end|>\", \"long\": \"{}\"}}",
        "x".repeat(10_000)
    );
    let ids = said(
        &tokenizer,
        &[
            Text("Let me see 🙂 <|tool_call_begin|>.\n"),
            Token(SECTION),
            Text("\n"),
            Token(CALL),
            Text(" functions.web.search:3\n"),
            Token(ARGUMENT),
            Text(&arguments),
            Token(CALL_END),
            Text(" \n"),
            Token(CALL),
            Text("functions.g:4"),
            Token(ARGUMENT),
            Token(CALL_END),
            Token(SECTION_END),
            Text(" done"),
        ],
    );
    let expected = [
        vec![text("Let me see 🙂 <|tool_call_begin|>.\n")],
        call(0, "functions.web.search:3", "web.search", &arguments, true),
        call(1, "functions.g:4", "g", "{}", true),
        vec![text(" done")],
    ];
    assert_eq!(parse(&tokenizer, &ids), expected.concat());
}

#[test]
fn arguments_stream_as_they_come() {
    let mut parser = ToolCallParser::default();
    assert_eq!(parser.push(&token("", Some(Marker::SectionBegin))), []);
    assert_eq!(parser.push(&token("", Some(Marker::CallBegin))), []);
    assert_eq!(parser.push(&token("functions.f:0", None)), []);
    let begin = ToolCallEvent::CallBegin {
        index: 0,
        id: "functions.f:0".to_owned(),
        name: "f".to_owned(),
    };
    assert_eq!(
        parser.push(&token("", Some(Marker::ArgumentBegin))),
        [begin]
    );
    let delta = |text: &str| ToolCallEvent::ArgumentsDelta {
        index: 0,
        text: text.to_owned(),
    };
    assert_eq!(parser.push(&token("{", None)), [delta("{")]);
    assert_eq!(parser.push(&token("", None)), []);
    // Half a character before a control token: the decoder emits it together with the token.
    let end = ToolCallEvent::CallEnd {
        index: 0,
        complete: true,
    };
    assert_eq!(
        parser.push(&token("\u{fffd}", Some(Marker::CallEnd))),
        [delta("\u{fffd}"), end]
    );
    assert_eq!(parser.finish("\u{fffd}"), [text("\u{fffd}")]);
}

#[test]
fn malformed_and_truncated_calls() {
    let tokenizer = tokenizer();
    let begin = [Token(SECTION), Token(CALL)];
    let cases: Vec<(Vec<Said<'_>>, Vec<ToolCallEvent>)> = vec![
        (
            vec![
                Text("get_weather"),
                Token(ARGUMENT),
                Text("{"),
                Token(CALL_END),
            ],
            call(0, "get_weather", "get_weather", "{", true),
        ),
        (
            vec![Text("functions.f:0"), Token(ARGUMENT), Text("{\"x\": 1")],
            call(0, "functions.f:0", "f", "{\"x\": 1", false),
        ),
        (
            vec![Text("functions.f:0"), Token(CALL_END)],
            call(0, "functions.f:0", "f", "{}", true),
        ),
        (
            vec![Text("functions.f:0"), Token(ARGUMENT), Token(CALL_END)],
            call(0, "functions.f:0", "f", "{}", true),
        ),
        (
            vec![Text("f:0"), Token(ARGUMENT), Text(" \n"), Token(CALL_END)],
            call(0, "f:0", "f", "{}", true),
        ),
        (
            vec![
                Text("f:0"),
                Token(ARGUMENT),
                Text(" "),
                Text("{"),
                Token(CALL_END),
            ],
            call(0, "f:0", "f", " {", true),
        ),
        (
            vec![Text("functions.f:0"), Token(ARGUMENT)],
            vec![
                ToolCallEvent::CallBegin {
                    index: 0,
                    id: "functions.f:0".to_owned(),
                    name: "f".to_owned(),
                },
                ToolCallEvent::CallEnd {
                    index: 0,
                    complete: false,
                },
            ],
        ),
        // A header that was cut is not the name of a function.
        (vec![Text("functions.f")], vec![]),
        (
            vec![Text("fun"), Token(SECTION_END), Text("t")],
            vec![text("t")],
        ),
        (vec![Text("  ")], vec![]),
        // A call needs a name.
        (
            vec![Token(ARGUMENT), Text("{}"), Token(CALL_END)],
            vec![text("{}")],
        ),
        (
            vec![
                Text("functions.:0"),
                Token(ARGUMENT),
                Text("{}"),
                Token(CALL_END),
            ],
            vec![text("{}")],
        ),
        // Each call has its own id.
        (
            vec![
                Text("functions.f:0"),
                Token(ARGUMENT),
                Text("1"),
                Token(CALL_END),
                Token(CALL),
                Text("functions.f:0"),
                Token(ARGUMENT),
                Text("2"),
                Token(CALL_END),
            ],
            [
                call(0, "functions.f:0", "f", "1", true),
                call(1, "functions.f:1", "f", "2", true),
            ]
            .concat(),
        ),
        (
            vec![
                Text("a:0"),
                Token(ARGUMENT),
                Text("1"),
                Token(CALL),
                Text("b:1"),
                Token(ARGUMENT),
                Text("2"),
                Token(SECTION_END),
                Text("t"),
            ],
            [
                call(0, "a:0", "a", "1", false),
                call(1, "b:1", "b", "2", false),
                vec![text("t")],
            ]
            .concat(),
        ),
        (
            vec![
                Text("a:0"),
                Token(ARGUMENT),
                Text("1"),
                Token(ARGUMENT),
                Text("2"),
                Token(CALL_END),
            ],
            call(0, "a:0", "a", "12", true),
        ),
        (
            vec![
                Text("a:0"),
                Token(ARGUMENT),
                Text("1"),
                Token(CALL_END),
                Text(" so "),
                Token(SECTION_END),
            ],
            [call(0, "a:0", "a", "1", true), vec![text(" so")]].concat(),
        ),
    ];
    for (rest, expected) in cases {
        let ids = [said(&tokenizer, &begin), said(&tokenizer, &rest)].concat();
        assert_eq!(parse(&tokenizer, &ids), expected);
    }
    // Control tokens in positions without a meaning.
    let stray = said(
        &tokenizer,
        &[
            Text("a"),
            Token(CALL_END),
            Token(ARGUMENT),
            Token(SECTION_END),
            Text("b"),
        ],
    );
    assert_eq!(parse(&tokenizer, &stray), [text("ab")]);
}

#[test]
fn an_answer_cut_at_every_token() {
    let tokenizer = tokenizer();
    let ids = said(
        &tokenizer,
        &[
            Text("Hm é "),
            Token(SECTION),
            Token(CALL),
            Text("functions.a.b:0"),
            Token(ARGUMENT),
            Text("{\"ü\": \"🙂\"}"),
            Token(CALL_END),
            Token(CALL),
            Text("functions.c:1"),
            Token(ARGUMENT),
            Text("{}"),
            Token(CALL_END),
            Token(SECTION_END),
        ],
    );
    for cut in 0..ids.len() {
        // The output before the cut is a prefix of the whole output, and every call that begins ends.
        let events = parse(&tokenizer, &ids[..cut]);
        let (mut open, mut said, mut complete_calls) = (None, String::new(), 0);
        for event in &events {
            match event {
                ToolCallEvent::CallBegin { index, .. } => assert_eq!(open.replace(*index), None),
                ToolCallEvent::CallEnd { index, complete } => {
                    assert_eq!(open.take(), Some(*index));
                    complete_calls += usize::from(*complete);
                }
                ToolCallEvent::ArgumentsDelta { index, text } => {
                    assert_eq!(open, Some(*index));
                    said.push_str(text);
                }
                ToolCallEvent::Text(text) => said.push_str(text),
            }
        }
        assert_eq!(open, None);
        assert_eq!(
            complete_calls,
            ids[..cut].iter().filter(|&&id| id == CALL_END).count()
        );
        assert!(
            "Hm é {\"ü\": \"🙂\"}{}".starts_with(said.trim_end_matches('\u{fffd}')),
            "{said}"
        );
    }
}

#[test]
fn text_cut_at_every_character() {
    // The same answer for any pieces of its text.
    let answer = [
        (None, "say "),
        (Some(Marker::SectionBegin), ""),
        (None, " \n"),
        (Some(Marker::CallBegin), ""),
        (None, " functions.a.b:0 "),
        (Some(Marker::ArgumentBegin), ""),
        (None, " {\"a\": 1} "),
        (Some(Marker::CallEnd), ""),
        (None, " \n x "),
        (Some(Marker::SectionEnd), ""),
        (None, "bye"),
    ];
    let run = |cut: usize| {
        let mut parser = ToolCallParser::default();
        let (mut events, mut seen) = (Vec::new(), 0);
        for (marker, text) in answer {
            if (seen..seen + text.len()).contains(&cut) {
                let (a, b) = text.split_at(cut - seen);
                events.extend(parser.push(&token(a, marker)));
                events.extend(parser.push(&token(b, marker)));
            } else {
                events.extend(parser.push(&token(text, marker)));
            }
            seen += text.len();
        }
        events.extend(parser.finish(""));
        joined(events)
    };
    let expected = [
        vec![text("say ")],
        call(0, "functions.a.b:0", "a.b", " {\"a\": 1} ", true),
        vec![text(" \n xbye")],
    ]
    .concat();
    for cut in 0..answer.iter().map(|(_, text)| text.len()).sum() {
        assert_eq!(run(cut), expected, "cut at {cut}");
    }
}
