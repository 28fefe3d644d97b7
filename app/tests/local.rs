//! The app with a real model on the CPU: answers, memory in files, and bad days.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "common/failing.rs"]
mod failing;
#[path = "../../tests/common/wrapped.rs"]
mod wrapped;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{act, ask, drop_on, harness, start, tiny, until, wake};
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable;
use failing::{Failing, Gone};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::error::BackendError;
use kimi_linear_app::session::local::{self, Open};
use kimi_linear_app::settings::{BackendName, Settings};
use kimi_linear_app::shell::App;
use kimi_linear_app::shell::action::Action;

fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.model.folder = Some(tiny());
    settings.model.backend = BackendName::Cpu;
    settings.model.context = 2048;
    settings.sampling.max_tokens = 40;
    settings
}

/// Random weights that answer [`LONG`] with a thousand tokens: there is time to stop them.
fn talkative() -> Settings {
    let mut settings = settings();
    settings.model.folder = Some(tiny().with_file_name("tiny-128"));
    settings.sampling.max_tokens = 1900;
    settings
}

const LONG: &str = "The red box holds 7. Now the red box holds 3.";

fn app(open: Open, settings: Settings) -> Harness<'static, App> {
    let session = local::start_with(wake(), open).unwrap();
    harness(start(session, settings), 1280.0, 800.0)
}

fn processor() -> Open {
    Box::new(|_, _| Ok(Box::new(CpuBackend::new())))
}

fn ready() -> Harness<'static, App> {
    let mut harness = app(processor(), settings());
    until(&mut harness, "the model", |app| app.ready().is_ok());
    harness
}

#[test]
fn a_question_is_answered_and_every_token_has_its_frame() {
    let mut harness = ready();
    ask(
        &mut harness,
        "The red box holds 7. Now the red box holds 3.",
    );
    let chat = harness.state().chat();
    let answered = chat.conversation.ids().len();
    assert!(chat.turns[0].footer.is_some());
    assert_eq!(chat.history.tokens().len(), answered);
    // The last token of an answer has not been through the model.
    for position in 0..answered - 1 {
        let frame = chat.history.frame(position).expect("a frame");
        assert_eq!(
            (frame.position, frame.token),
            (position, chat.conversation.ids()[position])
        );
        assert!(frame.state.is_some() && frame.attention.is_some());
    }
    let first = chat.turns[0].answer.clone();
    act(&mut harness, Action::Regenerate);
    until(&mut harness, "the second answer", |app| !app.chat().busy());
    assert_eq!(
        harness.state().chat().turns[0].answer,
        first,
        "greedy answers are the same"
    );

    // Another head: the same tokens run again, and the frames are of that head.
    let mut selection = *harness.state().selection();
    let head = selection.kda.as_mut().unwrap();
    head.head = 1 - head.head;
    let wanted = selection.kda;
    harness.state_mut().select(selection);
    harness.step();
    until(&mut harness, "the frames of another head", |app| {
        let frame = app
            .chat()
            .history
            .frame(5)
            .and_then(|frame| frame.state.as_ref());
        app.settled()
            && frame.map(|state| (state.layer, state.head))
                == wanted.map(|head| (head.layer, head.head))
    });
    until(&mut harness, "ranks", |app| {
        app.chat().history.ranks().is_some()
    });
}

#[test]
fn an_answer_can_be_stopped_and_the_chat_goes_on() {
    let mut harness = app(processor(), talkative());
    until(&mut harness, "the model", |app| app.ready().is_ok());
    act(&mut harness, Action::Ask(LONG.to_owned()));
    until(&mut harness, "some tokens", |app| {
        app.chat()
            .measures
            .answers
            .last()
            .is_some_and(|answer| answer.intervals.len() > 3)
    });
    act(&mut harness, Action::Stop);
    until(&mut harness, "the end", |app| !app.chat().busy());
    let chat = harness.state().chat();
    assert!(chat.turns[0].footer.as_ref().unwrap().contains("stopped"));
    let stopped = chat.conversation.ids().len();
    assert!(stopped < 1000);
    act(&mut harness, Action::Ask("And now?".to_owned()));
    until(&mut harness, "a token", |app| {
        app.chat()
            .measures
            .answers
            .last()
            .is_some_and(|answer| answer.first_token.is_some())
    });
    let measure = harness
        .state()
        .chat()
        .measures
        .answers
        .last()
        .unwrap()
        .clone();
    assert!(
        measure.cached_tokens > 0,
        "what was read and written is not read again"
    );
    act(&mut harness, Action::Stop);
    until(&mut harness, "the end", |app| !app.chat().busy());
}

#[test]
fn a_chat_comes_back_from_a_file_with_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("deep/down/chat.klchat");
    let mut harness = ready();
    ask(&mut harness, "Remember the number 7, please.");
    act(&mut harness, Action::Save(file.clone()));
    until(&mut harness, "the file", |app| app.chat().file.is_some());
    let saved = harness.state().chat().conversation.clone();
    ask(&mut harness, "Which one?");
    let expected = harness.state().chat().turns[1].answer.clone();
    drop(harness);

    let mut harness = ready();
    act(&mut harness, Action::Open(file.clone()));
    until(&mut harness, "the chat", |app| {
        app.chat().conversation == saved
    });
    assert_eq!(
        harness.state().chat().turns[0].question,
        "Remember the number 7, please."
    );
    ask(&mut harness, "Which one?");
    let chat = harness.state().chat();
    assert_eq!(
        chat.turns[1].answer, expected,
        "it goes on as it would have"
    );
    let cached = chat.measures.answers.last().unwrap().cached_tokens;
    assert_eq!(cached, saved.ids().len() - 1, "nothing is read again");

    // A file that is damaged is refused in a sentence, and nothing is lost.
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    act(&mut harness, Action::Open(file));
    until(&mut harness, "the refusal", |app| app.problem().is_some());
    harness.get_by_label("Dismiss").click();
    harness.run_steps(3);
    assert!(harness.state().problem().is_none());
}

/// A chat that has been traced again has been through its last token, which the next question begins with: a memory of
/// that length is of no use to it.
#[test]
fn a_chat_that_was_traced_again_comes_back_whole() {
    let question = "Remember the number 7, please.";
    let mut harness = ready();
    ask(&mut harness, question);
    let prompt = {
        let chat = harness.state().chat();
        chat.conversation.answers()[0].0
    };
    drop(harness);
    // Answers of random weights end at their limit: the chat is 63, 64 and 65 tokens long, around a whole block.
    for length in 63..=65 {
        let folder = tempfile::tempdir().unwrap();
        let mut limited = settings();
        limited.sampling.max_tokens = length - prompt;
        let open = |limited: &Settings| {
            let mut harness = app(processor(), limited.clone());
            until(&mut harness, "the model", |app| app.ready().is_ok());
            harness
        };
        let mut harness = open(&limited);
        ask(&mut harness, question);
        assert_eq!(harness.state().chat().conversation.ids().len(), length);
        let mut opened = folder.path().join("first.klchat");
        act(&mut harness, Action::Save(opened.clone()));
        until(&mut harness, "the file", |app| app.chat().file.is_some());
        for again in ["second.klchat", "third.klchat"] {
            harness = open(&limited);
            act(&mut harness, Action::Open(opened));
            until(&mut harness, "the frames", |app| {
                app.chat().conversation.turns() == 1
                    && app.settled()
                    && app.chat().history.frame(length - 1).is_some()
            });
            opened = folder.path().join(again);
            act(&mut harness, Action::Save(opened.clone()));
            until(&mut harness, "the file", |app| {
                app.chat().file.as_ref() == Some(&opened) && opened.exists()
            });
        }
        harness = open(&limited);
        act(&mut harness, Action::Open(opened));
        until(&mut harness, "the frames", |app| {
            app.settled() && app.chat().history.frame(length - 1).is_some()
        });
        ask(&mut harness, "Which one?");
        let measure = harness.state().chat().measures.answers.last().cloned();
        assert_eq!(measure.unwrap().cached_tokens, length - 1, "of {length}");
    }
}

#[test]
fn loading_can_be_stopped() {
    // The device opens when the test lets it: what was asked meanwhile is there when the first weight is.
    let (gate, opened) = std::sync::mpsc::channel::<()>();
    let open: Open = Box::new(move |_, _| {
        opened.recv().unwrap();
        Ok(Box::new(CpuBackend::new()))
    });
    let mut harness = app(open, settings());
    harness.run_steps(2);
    harness.get_by_label("Cancel").click();
    harness.run_steps(2);
    gate.send(()).unwrap();
    until(&mut harness, "the end of it", |app| app.problem().is_some());
    let sentence = harness.state().problem().unwrap().sentence.clone();
    assert!(sentence.contains("tiny-a was stopped"), "{sentence}");
    assert!(harness.state().ready().is_err() && harness.query_by_label("Cancel").is_none());
    gate.send(()).unwrap();
    harness.get_by_label("Load the model again").click();
    harness.run_steps(2);
    until(&mut harness, "the model", |app| app.ready().is_ok());
    // Another one instead is as good as stopping.
    for _ in 0..2 {
        act(&mut harness, Action::Load);
    }
    gate.send(()).unwrap();
    gate.send(()).unwrap();
    until(&mut harness, "the second", |app| app.ready().is_ok());
    assert!(harness.state().problem().is_none());
}

#[test]
fn a_wrong_folder_and_a_full_device_are_told() {
    let mut wrong = settings();
    wrong.model.folder = Some("/no/such/folder".into());
    let mut harness = app(processor(), wrong);
    until(&mut harness, "the refusal", |app| app.problem().is_some());
    let sentence = harness.state().problem().unwrap().sentence.clone();
    assert!(
        sentence.contains("/no/such/folder/config.json"),
        "{sentence}"
    );
    harness.get_by_label("Choose a model");

    let full: Open = Box::new(|_, _| {
        Err(BackendError::OutOfMemory {
            what: "the weights".to_owned(),
            bytes: 98 << 30,
        })
    });
    let mut harness = app(full, settings());
    until(&mut harness, "the refusal", |app| app.problem().is_some());
    let sentence = harness.state().problem().unwrap().sentence.clone();
    assert!(
        sentence.contains("not enough memory for the weights"),
        "{sentence}"
    );
    harness.get_by_label("Choose a device");

    let none: Open = Box::new(|_, _| {
        Err(BackendError::Unavailable {
            backend: "wgpu",
            reason: "there is no GPU".to_owned(),
        })
    });
    let mut harness = app(none, settings());
    until(&mut harness, "the refusal", |app| app.problem().is_some());
    let sentence = harness.state().problem().unwrap().sentence.clone();
    assert!(
        sentence.contains("there is no GPU") && sentence.contains("cpu"),
        "{sentence}"
    );
}

#[test]
fn what_cannot_be_loaded_leaves_the_model_running() {
    let mut harness = ready();
    ask(&mut harness, "Remember the number 7, please.");
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(tiny().join("config.json"), bare.join("config.json")).unwrap();
    drop_on(&mut harness, bare);
    act(&mut harness, Action::Load);
    until(&mut harness, "the refusal", |app| app.problem().is_some());
    assert!(harness.state().ready().is_ok());
    assert_eq!(harness.state().model().unwrap().name, "tiny-a");
    harness.get_by_label("Model: tiny-a on cpu");
    ask(&mut harness, "Which one?");
    let chat = harness.state().chat();
    assert_eq!(chat.conversation.turns(), 2);
    let cached = chat.measures.answers.last().unwrap().cached_tokens;
    assert!(cached > 0, "nothing was unloaded");
}

#[test]
fn what_is_too_large_is_refused_before_it_is_loaded() {
    // A model that could hold a conversation of 2 G tokens, and room asked for all of it.
    const LONG: usize = 1 << 31;
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(tiny()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let config = folder.path().join("config.json");
    let mut text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    text["model_max_length"] = LONG.into();
    std::fs::write(&config, text.to_string()).unwrap();
    let mut settings = settings();
    settings.model.folder = Some(folder.path().to_owned());
    settings.model.context = LONG;
    let mut harness = app(processor(), settings);
    until(&mut harness, "the refusal", |app| app.problem().is_some());
    let sentence = harness.state().problem().unwrap().sentence.clone();
    assert!(
        sentence.contains(" needs ") && sentence.contains("which has"),
        "{sentence}"
    );
    harness.get_by_label("Choose a device");
    harness.get_by_label("Back to the demo model");
}

#[test]
fn a_device_that_goes_away_loses_nothing_that_was_said() {
    let gone: Gone = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&gone);
    let open: Open = Box::new(move |_, _| Ok(Box::new(Failing::new(&switch))));
    let mut harness = app(open, talkative());
    until(&mut harness, "the model", |app| app.ready().is_ok());
    act(&mut harness, Action::Ask(LONG.to_owned()));
    until(&mut harness, "some tokens", |app| {
        app.chat()
            .measures
            .answers
            .last()
            .is_some_and(|answer| answer.intervals.len() > 3)
    });
    gone.store(true, Ordering::SeqCst);
    until(&mut harness, "the loss", |app| !app.chat().busy());
    let turn = harness.state().chat().turns[0].clone();
    let problem = turn.problem.expect("a problem");
    assert!(
        problem
            .sentence
            .contains("device was lost: someone pulled the plug"),
        "{}",
        problem.sentence
    );
    assert!(
        !turn.answer.is_empty(),
        "what was written stays on the screen"
    );
    gone.store(false, Ordering::SeqCst);
    harness.get_by_label("Load the model again").click();
    harness.run_steps(2);
    until(&mut harness, "the model", |app| app.ready().is_ok());
    act(&mut harness, Action::Regenerate);
    until(&mut harness, "a token", |app| {
        app.chat()
            .measures
            .answers
            .last()
            .is_some_and(|answer| answer.first_token.is_some())
    });
    act(&mut harness, Action::Stop);
    until(&mut harness, "the end", |app| !app.chat().busy());
    assert!(harness.state().chat().turns[0].problem.is_none());
}
