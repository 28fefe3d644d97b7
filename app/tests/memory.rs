//! What the demo model's memory does, by its trace: facts that are written, kept, replaced and undone, the head that is found,
//! and what the examples say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::Path;

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::engine::{EngineOptions, EngineSizes, Event, Request, UndoWrite};
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};
use kimi_linear::model::{TraceChoice, TraceFrame, TraceHead};
use kimi_linear::tokenizer::Conversation;
use kimi_linear_app::formulas::sharpness::{HeadToken, sharpness};
use kimi_linear_app::history::{History, TokenText};
use kimi_linear_app::remembered::Remembered;
use kimi_linear_app::try_these::EXAMPLES;
use kimi_linear_app::views::tour::stops;

fn demo() -> Llm {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo");
    let options = LlmOptions {
        sizes: EngineSizes::one(512),
        cache: None,
        engine: EngineOptions::default(),
    };
    let backend = Box::new(CpuBackend::new());
    let files = LlmFiles::open(&folder).unwrap();
    files
        .load(backend, &options, &mut |_, _| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap()
}

struct Told {
    history: History,
    frames: Vec<TraceFrame>,
    answer: String,
}

/// Asks, with every token traced for a head.
fn ask(llm: &Llm, question: &str, head: TraceHead, undo: Vec<UndoWrite>) -> Told {
    let files = llm.files();
    let tokenizer = &files.tokenizer;
    let prompt = Conversation::new(None)
        .prompt(tokenizer, files.template().unwrap(), question)
        .unwrap();
    let text = |id: u32, answer: bool| {
        let piece = tokenizer.piece(id).unwrap();
        TokenText {
            id,
            text: piece.text().into_owned(),
            template: piece.name.is_some(),
            answer,
            ..TokenText::default()
        }
    };
    let mut history = History::default();
    history.set_tokens(prompt.iter().map(|id| text(*id, false)).collect());
    let request = Request {
        stop_ids: files.stop_ids(),
        trace: Some(TraceChoice {
            kda: Some(head),
            mla: None,
            vectors: true,
        }),
        trace_from: Some(0),
        undo,
        ..Request::new(prompt, 40)
    };
    let answer = llm.engine().answer(request);
    let (mut frames, mut ids) = (Vec::new(), Vec::new());
    while let Some(event) = answer.next() {
        match event {
            Event::Token { id, .. } => {
                ids.push(id);
                history.push_token(text(id, true));
            }
            Event::Trace { frame, .. } => {
                frames.push((*frame).clone());
                history.push_frame(*frame);
            }
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    Told {
        history,
        frames,
        answer: tokenizer.decode(&ids).unwrap(),
    }
}

/// The score of every head over a conversation, best first.
fn scores(told: &Told) -> Vec<(f64, usize, usize)> {
    let k = 32;
    let tokens = told.history.tokens();
    let answer = tokens.iter().position(|token| token.answer).unwrap();
    let mut all = Vec::new();
    for (number, layer) in told.frames[0].kda.iter().enumerate() {
        let heads = layer.heads.len();
        for head in 0..heads {
            let tokens: Vec<HeadToken<'_>> = told
                .frames
                .iter()
                .map(|frame| {
                    let layer = &frame.kda[number];
                    HeadToken {
                        id: frame.token,
                        gates: &layer.gates[head * k..][..k],
                        query: &layer.qkv[head * k..][..k],
                        key: &layer.qkv[(heads + head) * k..][..k],
                        value: &layer.qkv[(2 * heads + head) * k..][..k],
                        beta: layer.heads[head].beta,
                        write: layer.heads[head].write,
                        gate: layer.heads[head].gate,
                    }
                })
                .collect();
            all.push((sharpness(&tokens, answer), layer.layer, head));
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all
}

const HEAD: TraceHead = TraceHead { layer: 2, head: 0 };

fn table(told: &Told) -> Remembered {
    let mut table = Remembered::default();
    while !table.update(&told.history, HEAD) {}
    table
}

/// The position of the token with this text, counted from the first one.
#[track_caller]
fn find(told: &Told, text: &str, answer: bool, number: usize) -> usize {
    let tokens = told.history.tokens().iter().enumerate();
    let found = tokens.filter(|(_, token)| token.answer == answer && token.text.trim() == text);
    found.map(|(at, _)| at).nth(number).expect(text)
}

/// The row of the first write of a word.
#[track_caller]
fn row_of(table: &Remembered, word: &str) -> usize {
    let facts = table.facts().iter();
    facts
        .clone()
        .find(|fact| fact.word == word)
        .expect(word)
        .row
}

/// What a row answers after each token from one position to another, with the smallest cosine.
#[track_caller]
fn answers(
    told: &Told,
    table: &Remembered,
    row: usize,
    positions: impl Iterator<Item = usize>,
) -> Vec<String> {
    let mut words: Vec<String> = positions
        .filter_map(|at| {
            let answer = table.cell(&told.history, row, at)?;
            assert!(answer.cosine > 0.8, "row {row} at {at}: {answer:?}");
            Some(table.word(&answer).to_owned())
        })
        .collect();
    words.dedup();
    words
}

/// The answer with a write of the head undone.
fn without(llm: &Llm, question: &str, token: usize) -> String {
    let write = UndoWrite {
        token,
        head: Some(HEAD),
    };
    ask(llm, question, HEAD, vec![write]).answer
}

#[test]
fn a_fact_is_replaced_its_neighbour_stays_and_undone_it_comes_back() {
    let llm = demo();
    let example = &EXAMPLES[0];
    assert_eq!((example.kda, example.token), ([2, 0], "3"));
    let told = ask(&llm, example.prompt, HEAD, Vec::new());
    let table = table(&told);
    let [first, beside, change] = ["7", "2", "3"].map(|word| find(&told, word, false, 0));
    // The fact's row: the old word up to the write, the new one from it on, under one key.
    let row = row_of(&table, "7");
    assert_eq!(table.fact_at(change).unwrap().row, row);
    assert_eq!(table.rows()[row].words, "The red box holds");
    let end = told.frames.len();
    assert_eq!(answers(&told, &table, row, first..change), ["7"]);
    assert_eq!(answers(&told, &table, row, change..end), ["3"]);
    let was = table.was(&told.history, change).unwrap();
    let now = table.now(&told.history, change).unwrap();
    assert_eq!((table.word(&was), table.word(&now)), ("7", "3"));
    assert!(was.cosine > 0.95 && now.cosine > 0.95, "{was:?}, {now:?}");
    // The other box keeps its word through the change and to the question's end.
    let other = row_of(&table, "2");
    let asked = find(&told, "?", false, 0);
    assert_eq!(answers(&told, &table, other, beside..asked + 1), ["2"]);
    let line = table.sentence(&told.history, change);
    assert!(line.starts_with("was 7 (0.99), now 3 (1.00)"), "{line}");
    assert!(
        line.contains("“The blue box holds” still 2 (0.84)"),
        "{line}"
    );
    // The gate is shut while the question is read, and opens where the number is said.
    let said = find(&told, "3", true, 0);
    let gate = |at: usize| {
        told.history
            .head(at, HEAD)
            .unwrap()
            .gate
            .iter()
            .sum::<f32>()
            / 32.0
    };
    assert!((change + 1..=asked).all(|at| gate(at) < 0.1));
    assert!(gate(said - 1) > 0.9);
    let (read, _) = table.asked(&told.history, said - 1).unwrap();
    assert_eq!(table.word(&read), "3");
    // The tour stops at these places.
    let stops = stops(&table, &told.history, HEAD);
    let places: Vec<usize> = stops.iter().map(|stop| stop.position).collect();
    assert_eq!(places, [first, beside, change, said - 1, said]);
    assert_eq!(told.answer, "The red box holds 3.");
    assert_eq!(
        without(&llm, example.prompt, change),
        "The red box holds 7."
    );
    assert_eq!(
        without(&llm, example.prompt, beside),
        "The red box holds 3."
    );
}

#[test]
fn where_mary_goes_is_one_key() {
    let llm = demo();
    let example = &EXAMPLES[1];
    assert_eq!((example.kda, example.token), ([2, 0], "garden"));
    let told = ask(&llm, example.prompt, HEAD, Vec::new());
    let table = table(&told);
    let [kitchen, garden] = ["kitchen", "garden"].map(|word| find(&told, word, false, 0));
    let row = row_of(&table, "kitchen");
    assert_eq!(answers(&told, &table, row, kitchen..garden), ["kitchen"]);
    let end = told.frames.len();
    assert_eq!(answers(&told, &table, row, garden..end), ["garden"]);
    assert_eq!(told.answer, "Mary has the apple in the garden.");
    let undone = without(&llm, example.prompt, garden);
    assert_eq!(undone, "Mary has the apple in the kitchen.");
}

#[test]
fn a_push_writes_over_the_last_and_a_pop_goes_back() {
    let llm = demo();
    let example = &EXAMPLES[2];
    assert_eq!((example.kda, example.token), ([2, 0], "Pop"));
    let told = ask(&llm, example.prompt, HEAD, Vec::new());
    let table = table(&told);
    let words = ["apple", "pear", "cup"].map(|word| find(&told, word, false, 0));
    let pop = find(&told, "Pop", false, 0);
    let row = row_of(&table, "apple");
    assert_eq!(
        answers(&told, &table, row, words.into_iter().chain([pop])),
        ["apple", "pear", "cup", "pear"]
    );
    let left = table.cell(&told.history, row, pop).unwrap().part;
    assert!(left > 0.1 && left < 0.5, "a part of pear is left: {left}");
    assert_eq!(told.answer, "The top is pear.");
    assert_eq!(without(&llm, example.prompt, words[1]), "The top is apple.");
}

#[test]
fn the_reversed_list_is_read_word_by_word() {
    let llm = demo();
    let example = &EXAMPLES[3];
    assert_eq!(
        (example.kda, example.token, example.in_answer),
        ([2, 0], ":", true)
    );
    let told = ask(&llm, example.prompt, HEAD, Vec::new());
    let table = table(&told);
    assert_eq!(told.answer, "Backwards: cup, pear, lamp, key.");
    for word in ["cup", "pear", "lamp", "key"] {
        let said = find(&told, word, true, 0);
        let (read, gate) = table.asked(&told.history, said - 1).unwrap();
        assert_eq!(table.word(&read), word);
        assert!(gate > 0.9 && read.cosine > 0.8, "{word}: {read:?}, {gate}");
    }
}

/// The head at which the app starts is the one that its score finds, in the examples and in a question of one's own.
#[test]
fn the_score_finds_the_demo_s_head() {
    let llm = demo();
    let own = "The green box holds 5. The green box holds 9. What does the green box hold?";
    let questions = EXAMPLES.iter().map(|example| example.prompt);
    for question in questions.chain([own]) {
        let told = ask(&llm, question, HEAD, Vec::new());
        let all = scores(&told);
        let best = TraceHead {
            layer: all[0].1,
            head: all[0].2,
        };
        assert_eq!(best, HEAD, "{question}: {all:?}");
    }
    assert_eq!(HEAD, kimi_linear_app::demo::HEAD);
}
