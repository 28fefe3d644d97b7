//! The shell by its accessibility tree, with a session that the test plays: what is shown, and what is asked of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod memory;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Played, drop_on, facts, harness, played, start};
use eframe::egui::{Event, Key, Modifiers, Theme};
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable;
use kimi_linear::backend::Device;
use kimi_linear::engine::{FinishReason, Usage};
use kimi_linear_app::facts::memory;
use kimi_linear_app::history::TokenText;
use kimi_linear_app::problem::{Problem, WayOut};
use kimi_linear_app::session::{ChatId, ChatUpdate, Command, Estimate, Update};
use kimi_linear_app::settings::Settings;
use kimi_linear_app::shell::App;
use kimi_linear_app::theme;

fn app(width: f32, height: f32) -> (Harness<'static, App>, Played) {
    let (session, played) = played(false);
    let harness = harness(start(session, Settings::default()), width, height);
    assert!(
        matches!(played.command(), Command::Load(_)),
        "the demo model loads by itself"
    );
    (harness, played)
}

fn loaded() -> (Harness<'static, App>, Played) {
    let (mut harness, played) = app(1280.0, 800.0);
    played.tell(Update::Loaded(Box::new(facts())));
    harness.run_steps(3);
    (harness, played)
}

fn token(id: u32, text: &str) -> TokenText {
    TokenText {
        id,
        text: text.to_owned(),
        ..TokenText::default()
    }
}

fn chat(update: ChatUpdate) -> Update {
    Update::Chat(ChatId(1), update)
}

fn prompt(played: &Played, words: &[&str], at: Instant) {
    let tokens = words
        .iter()
        .enumerate()
        .map(|(id, text)| token(id as u32, text));
    played.tell(chat(ChatUpdate::Prompt {
        tokens: tokens.collect(),
        at,
    }));
}

fn say(played: &Played, text: &str, at: Instant) {
    played.tell(chat(ChatUpdate::Token {
        token: token(9, text),
        text: text.to_owned(),
        at,
    }));
}

fn finish(played: &Played, reason: FinishReason) {
    played.tell(chat(ChatUpdate::Finished {
        reason,
        text: String::new(),
        usage: Usage::default(),
    }));
}

fn type_and_send(harness: &mut Harness<'static, App>, text: &str) {
    harness.get_by_label("Message").focus();
    harness.step();
    harness.get_by_label("Message").type_text(text);
    harness.step();
    harness.key_press(Key::Enter);
    harness.run_steps(3);
}

/// Enter as the keyboard sends it, whatever is held at the end of the frame.
fn enter(modifiers: Modifiers) -> Event {
    Event::Key {
        key: Key::Enter,
        physical_key: None,
        pressed: true,
        repeat: false,
        modifiers,
    }
}

#[test]
fn shift_and_enter_make_a_new_line_however_short_they_are() {
    let (mut harness, played) = loaded();
    harness.get_by_label("Message").focus();
    harness.step();
    // All of it in one frame, in which Shift is released again.
    harness.event(Event::Text("one".to_owned()));
    harness.event(enter(Modifiers::SHIFT));
    harness.event(Event::Text("two".to_owned()));
    harness.event(enter(Modifiers::NONE));
    harness.event(Event::Text("the next".to_owned()));
    harness.run_steps(4);
    let Command::Ask(ask) = played.command() else {
        panic!("a question was sent")
    };
    assert_eq!(ask.question, "one\ntwo");
    assert_eq!(harness.state().chat().draft, "the next");
}

#[test]
fn escape_closes_windows_before_it_stops_the_answer() {
    let (mut harness, played) = loaded();
    type_and_send(&mut harness, "hello");
    assert!(matches!(played.command(), Command::Ask(_)));
    harness.key_press(Key::F1);
    harness.key_press_modifiers(Modifiers::COMMAND, Key::G);
    harness.run_steps(3);
    for label in ["Save as preset", "Answer the last question again"] {
        harness.get_by_label(label);
        harness.key_press(Key::Escape);
        harness.run_steps(3);
        assert!(harness.query_by_label(label).is_none(), "{label}");
        assert!(played.commands.try_recv().is_err(), "nothing is stopped");
    }
    harness.key_press(Key::Escape);
    harness.run_steps(3);
    assert!(matches!(played.command(), Command::Stop(_)));
}

#[test]
fn presets_and_the_system_prompt_are_in_sight() {
    let (mut harness, played) = loaded();
    harness.get_by_label("Preset: Greedy").click();
    harness.run_steps(3);
    harness.get_by_label("Creative").click();
    harness.run_steps(3);
    harness.get_by_label("System prompt: none").click();
    harness.run_steps(3);
    let system = harness.get_by_label("System prompt");
    system.focus();
    system.type_text("Answer in one word.");
    harness.run_steps(3);
    harness.key_press(Key::Escape);
    harness.run_steps(3);
    type_and_send(&mut harness, "hello");
    let Command::Ask(ask) = played.command() else {
        panic!("a question was sent")
    };
    assert_eq!(ask.sampling.temperature, 1.0);
    assert_eq!(
        ask.conversation.messages()[0]["content"],
        "Answer in one word."
    );
    harness.get_by_label("System prompt: Answer in one word.");
}

#[test]
fn what_is_dropped_is_opened() {
    let (mut harness, played) = loaded();
    let chat = PathBuf::from("/no/such/folder/a.klchat");
    drop_on(&mut harness, chat.clone());
    assert!(matches!(played.command(), Command::Open { path, .. } if path == chat));
    drop_on(&mut harness, "/no/such/folder/a.txt".into());
    harness.get_by_label_contains("a.txt is no model folder");
    drop_on(&mut harness, common::tiny());
    let Command::Estimate { folder, .. } = played.command() else {
        panic!("the model is looked at before it is loaded")
    };
    assert_eq!(folder, common::tiny());
    harness.get_by_label("Load").click();
    harness.run_steps(3);
    let Command::Load(load) = played.command() else {
        panic!("it is loaded")
    };
    assert_eq!(load.folder, common::tiny());
    // It is refused: the model before it goes on.
    let problem = Problem::new("It has no tokenizer.", WayOut::ChooseModel);
    played.tell(Update::LoadRefused(problem));
    harness.run_steps(3);
    harness.get_by_label("It has no tokenizer.");
    harness.get_by_label("Model: the demo model on cpu");
    // Without any model, the demo model is a way out.
    let failed = Problem::new("It is damaged.", WayOut::ChooseModel);
    drop_on(&mut harness, common::tiny());
    harness.get_by_label("Load").click();
    harness.run_steps(3);
    played.tell(Update::LoadFailed(failed));
    harness.run_steps(3);
    harness.get_by_label("Back to the demo model").click();
    harness.run_steps(3);
    let last = std::iter::from_fn(|| played.commands.try_recv().ok()).last();
    assert!(matches!(last, Some(Command::Load(load)) if load.name == "the demo model"));
}

#[test]
fn a_still_window_draws_only_what_is_new() {
    let (mut harness, played) = loaded();
    theme::keep_still(&harness.ctx);
    let rests = |harness: &mut Harness<'static, App>, when: &str| {
        harness.run_steps(6);
        let causes = harness.ctx.repaint_causes();
        assert!(!harness.ctx.has_requested_repaint(), "{when}: {causes:#?}");
    };
    rests(&mut harness, "at first");
    type_and_send(&mut harness, "The red box holds 7.");
    rests(&mut harness, "waiting");
    prompt(&played, &["The", " red", " box"], Instant::now());
    rests(&mut harness, "reading");
    say(&played, "Yes", Instant::now());
    rests(&mut harness, "answering");
}

#[test]
fn a_narrow_window_has_its_tools_in_a_menu() {
    let (mut harness, _played) = app(390.0, 844.0);
    harness.run_steps(3);
    for name in ["Chats", "More"] {
        let place = harness.get_by_label(name).rect();
        assert!(
            place.left() >= 0.0 && place.right() <= 390.0,
            "{name}: {place:?}"
        );
    }
    assert!(harness.query_by_label("Sampling").is_none());
    harness.get_by_label("More").click();
    harness.run_steps(3);
    for name in ["Files", "Sampling", "Views", "Log", "Help"] {
        let place = harness.get_by_label(name).rect();
        assert!(place.right() <= 390.0, "{name}: {place:?}");
    }
    harness.get_by_label("Sampling").click();
    harness.run_steps(3);
    assert!(harness.get_all_by_label("Temperature").next().is_some());
}

#[test]
fn loading_is_shown_and_typing_is_possible_meanwhile() {
    let (mut harness, played) = app(1280.0, 800.0);
    played.tell(Update::Loading {
        done: 512 << 10,
        total: 1 << 20,
    });
    harness.run_steps(3);
    harness.get_by_label_contains("Loading the demo model: 512.0 KiB of 1.0 MiB");
    harness.key_press(Key::Escape);
    harness.run_steps(2);
    assert!(matches!(played.command(), Command::StopLoading));
    type_and_send(&mut harness, "early");
    assert!(
        played.commands.try_recv().is_err(),
        "nothing is asked of a model that is not there"
    );
    assert_eq!(
        harness.state().chat().draft,
        "early",
        "what was typed stays"
    );
    let (done, total) = (12, 48);
    played.tell(Update::Preparing { done, total });
    harness.run_steps(3);
    harness.get_by_label_contains("Preparing the GPU: 25 %");
    played.tell(Update::Loaded(Box::new(facts())));
    harness.run_steps(3);
    assert!(
        harness
            .query_by_label_contains("Preparing the GPU")
            .is_none()
    );
    harness.get_by_label("Model: the demo model on cpu");
}

#[test]
fn an_answer_streams_and_its_numbers_are_those_of_its_tokens() {
    let (mut harness, played) = loaded();
    type_and_send(&mut harness, "What is it?");
    let Command::Ask(ask) = played.command() else {
        panic!("a question was sent")
    };
    assert_eq!(
        (ask.question.as_str(), ask.conversation.turns()),
        ("What is it?", 0)
    );
    assert!(
        ask.trace.is_some(),
        "the views are fed unless someone turns them off"
    );
    let at = Instant::now();
    prompt(&played, &["What", " is", " it", "?"], at);
    played.tell(chat(ChatUpdate::Prefill { done: 2, cached: 0 }));
    harness.run_steps(3);
    harness.get_by_label_contains("Reading 2 of 4 tokens");
    for (i, text) in ["It ", "is ", "**three**."].into_iter().enumerate() {
        say(
            &played,
            text,
            at + Duration::from_millis(40 + 20 * i as u64),
        );
    }
    harness.run_steps(3);
    assert!(
        harness
            .query_all_by_label_contains("three")
            .next()
            .is_some()
    );
    harness.get_by_label_contains("first token 40 ms");
    harness.get_by_label_contains("50.0 tokens/s");
    harness.get_by_label_contains("context 7 of 8\u{202f}192");
    finish(&played, FinishReason::Stop);
    harness.run_steps(3);
    harness.get_by_label("3 tokens · 50.0 tokens/s · first after 40 ms");
    let chat = harness.state().chat();
    assert_eq!(chat.conversation.ids(), [0, 1, 2, 3, 9, 9, 9]);
    assert_eq!(chat.turns[0].answer, "It is **three**.");
}

#[test]
fn stop_regenerate_and_edit_go_where_they_say() {
    let (mut harness, played) = loaded();
    let at = Instant::now();
    for question in ["first", "second"] {
        type_and_send(&mut harness, question);
        assert!(matches!(played.command(), Command::Ask(_)));
        prompt(&played, &["a", "b"], at);
        say(&played, question, at);
        if question == "first" {
            finish(&played, FinishReason::Stop);
        }
        harness.run_steps(3);
    }
    harness.get_by_label("Stop").click();
    harness.run_steps(3);
    assert!(matches!(played.command(), Command::Stop(ChatId(1))));
    finish(&played, FinishReason::Cancelled);
    harness.run_steps(3);
    harness.get_by_label_contains("stopped");

    harness.get_by_label("Regenerate").click();
    harness.run_steps(3);
    let Command::Ask(ask) = played.command() else {
        panic!("it is asked again")
    };
    assert_eq!(
        (ask.question.as_str(), ask.conversation.turns()),
        ("second", 1)
    );
    prompt(&played, &["a", "b"], at);
    finish(&played, FinishReason::Stop);
    harness.run_steps(3);

    harness.get_all_by_label("Edit").next().unwrap().click();
    harness.run_steps(3);
    assert_eq!(harness.state().chat().draft, "first");
    harness.get_by_label_contains("Editing question 1");
    harness.get_by_label("Send").click();
    harness.run_steps(3);
    let Command::Ask(ask) = played.command() else {
        panic!("the edited question is sent")
    };
    assert_eq!(ask.conversation.turns(), 0, "sending it goes back to there");
    assert_eq!(harness.state().chat().turns.len(), 1);
}

#[test]
fn an_example_says_what_to_look_at() {
    let (mut harness, played) = loaded();
    harness.get_by_label("Recall, overwritten").click();
    harness.run_steps(3);
    let Command::Ask(ask) = played.command() else {
        panic!("the example is asked")
    };
    assert!(ask.question.contains("Now the red box holds 3"));
    harness.get_by_label("What to look at: ");
}

#[test]
fn chats_are_several() {
    let (mut harness, played) = loaded();
    type_and_send(&mut harness, "in the first");
    let _ = played.command();
    harness.get_by_label("New").click();
    harness.run_steps(3);
    assert!(harness.state().chat().is_empty());
    // The first one goes on meanwhile.
    prompt(&played, &["a"], Instant::now());
    say(&played, "still here", Instant::now());
    finish(&played, FinishReason::Stop);
    harness.run_steps(3);
    assert!(harness.query_by_label("still here").is_none());
    harness.get_by_label("in the first").click();
    harness.run_steps(3);
    harness.get_by_label("still here");
}

#[test]
fn what_went_wrong_is_a_sentence_with_a_way_out() {
    let (mut harness, played) = app(1280.0, 800.0);
    let sentence = "There is no config.json in that folder.";
    played.tell(Update::LoadFailed(Problem::new(
        sentence,
        WayOut::ChooseModel,
    )));
    harness.run_steps(3);
    harness.get_by_label(sentence);
    harness.get_by_label("Choose a model").click();
    harness.run_steps(3);
    harness.get_by_label("Model folder");
    assert!(matches!(played.command(), Command::Estimate { .. }));

    played.tell(Update::Loaded(Box::new(facts())));
    harness.run_steps(3);
    harness.key_press_modifiers(Modifiers::COMMAND, Key::M);
    harness.run_steps(3);
    type_and_send(&mut harness, "anything");
    assert!(matches!(played.command(), Command::Ask(_)));
    let lost = Problem::new("The device was lost.", WayOut::LoadAgain);
    played.tell(chat(ChatUpdate::Failed(lost)));
    harness.run_steps(3);
    harness.get_by_label("The device was lost.");
    harness.get_by_label("Load the model again").click();
    harness.run_steps(3);
    assert!(matches!(played.command(), Command::Load(_)));
}

#[test]
fn whether_a_model_fits_is_said_before_it_is_loaded() {
    let (mut harness, played) = loaded();
    harness.key_press_modifiers(Modifiers::COMMAND, Key::M);
    harness.run_steps(3);
    let Command::Estimate { folder, context } = played.command() else {
        panic!("the folder is looked at")
    };
    let facts = facts();
    let small = Device {
        name: "a small one".to_owned(),
        memory_bytes: Some(1 << 20),
        index: 1,
        ..facts.device.clone()
    };
    let estimate = |device: &Device| (device.clone(), memory(&facts.config, device, context, None));
    let result = Ok(Estimate {
        parameters: facts.config.parameters(),
        active: facts.config.active_parameters(),
        longest: 8192,
        devices: vec![estimate(&facts.device), estimate(&small)],
    });
    played.tell(Update::Estimate { folder, result });
    harness.run_steps(3);
    harness.get_by_label("fits in 8.0 GiB");
    harness.get_by_label("too large for 1.0 MiB");
}

#[test]
fn keys_do_what_the_help_says() {
    let (mut harness, played) = loaded();
    harness.key_press(Key::F1);
    harness.run_steps(3);
    harness.get_by_label("Answer the last question again");
    harness.key_press(Key::F1);
    harness.run_steps(3);
    assert!(
        harness
            .query_by_label("Answer the last question again")
            .is_none()
    );
    harness.key_press_modifiers(Modifiers::COMMAND, Key::L);
    harness.run_steps(3);
    harness.get_by_label("Clear");
    let before = harness.state().selection().kda.unwrap();
    harness.key_press_modifiers(Modifiers::ALT, Key::ArrowDown);
    harness.key_press_modifiers(Modifiers::ALT, Key::PageDown);
    harness.run_steps(3);
    let after = harness.state().selection().kda.unwrap();
    assert!(after.layer > before.layer && after.head == before.head + 1);
    type_and_send(&mut harness, "hello");
    assert!(matches!(played.command(), Command::Ask(_)));
    harness.key_press(Key::Escape);
    harness.run_steps(3);
    assert!(matches!(played.command(), Command::Stop(_)));
}

#[test]
fn a_window_of_no_size_is_no_matter() {
    let (mut harness, played) = loaded();
    type_and_send(&mut harness, "hello");
    prompt(&played, &["a", "b"], Instant::now());
    say(&played, "# an answer\n\n```\ncode\n```\n", Instant::now());
    for size in [
        [0.0, 0.0],
        [1.0, 1.0],
        [30.0, 900.0],
        [2000.0, 20.0],
        [200.0, 120.0],
        [60.0, 60.0],
    ] {
        harness.set_size(size.into());
        harness.run_steps(2);
    }
    harness.set_size([1280.0, 800.0].into());
    harness.run_steps(3);
    assert_eq!(harness.state().chat().turns[0].markdown.blocks(), 1);
    harness.get_by_label("an answer");
}

#[test]
fn of_a_hundred_thousand_tokens_only_what_is_in_sight_is_laid_out() {
    let (mut harness, played) = loaded();
    let at = Instant::now();
    let mut tokens = Vec::new();
    for turn in 0..50_u32 {
        type_and_send(&mut harness, &format!("question {turn}"));
        tokens.extend((0..1000).map(|_| token(7, " word")));
        played.tell(chat(ChatUpdate::Prompt {
            tokens: tokens.clone(),
            at,
        }));
        for i in 0..1000 {
            tokens.push(token(8, " word"));
            let text = if i % 50 == 0 { "\n\n" } else { " word" };
            say(&played, text, at);
        }
        finish(&played, FinishReason::Stop);
        while harness.state().chat().busy() {
            harness.step();
        }
    }
    harness.run_steps(6);
    assert!(harness.state().chat().conversation.ids().len() >= 100_000);
    let shapes = harness.output().shapes.len();
    assert!(shapes < 6000, "{shapes} shapes for one screen");
}

#[test]
fn a_server_is_chatted_with_without_views() {
    let (session, played) = played(true);
    let mut harness = harness(start(session, Settings::default()), 1000.0, 600.0);
    harness.run_steps(3);
    played.tell(Update::Connected {
        model: "kimi".to_owned(),
        context: Some(1000),
    });
    harness.run_steps(3);
    harness.get_by_label("kimi on a server");
    assert!(harness.query_by_label("Views").is_none());
    type_and_send(&mut harness, "hello");
    let Command::Ask(ask) = played.command() else {
        panic!("a question was sent")
    };
    assert!(ask.trace.is_none());
    let at = Instant::now();
    played.tell(chat(ChatUpdate::Prompt {
        tokens: Vec::new(),
        at,
    }));
    say(&played, "good day", at);
    played.tell(chat(ChatUpdate::Finished {
        reason: FinishReason::Stop,
        text: String::new(),
        usage: Usage {
            prompt_tokens: 5,
            cached_tokens: 0,
            generated_tokens: 2,
        },
    }));
    harness.run_steps(3);
    harness.get_by_label_contains("good day");
    harness.get_by_label_contains("context 7 of 1\u{202f}000");
}

#[test]
fn a_chat_looks_as_it_did() {
    let (mut harness, played) = loaded();
    harness.set_size([760.0, 460.0].into());
    type_and_send(&mut harness, "What does the red box hold?");
    let at = Instant::now();
    prompt(&played, &["What", "?"], at);
    let answer =
        "The red box holds **3**:\n\n1. it held 7,\n2. then `3`.\n\n```\nS <- S + b k e\n```\n";
    say(&played, answer, at + Duration::from_millis(40));
    say(&played, " ", at + Duration::from_millis(60));
    finish(&played, FinishReason::Stop);
    // Nothing that blinks.
    harness.key_press(Key::Tab);
    for (theme, picture) in [(Theme::Dark, "chat"), (Theme::Light, "chat_light")] {
        harness.ctx.set_theme(theme);
        harness.run_steps(30);
        harness.snapshot(picture);
    }
}
