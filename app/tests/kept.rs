//! Chats that are kept: over restarts, under another model, with the model's state; deleted, renamed, searched; and disks
//! that refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Played, act, ask, facts, harness, played, start, tiny, until, wake};
use eframe::App as _;
use eframe::egui::Key;
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::engine::{FinishReason, Usage};
use kimi_linear_app::history::TokenText;
use kimi_linear_app::kept::Keeper;
use kimi_linear_app::session::{ChatId, ChatUpdate, Command, Update, local};
use kimi_linear_app::settings::{BackendName, Settings};
use kimi_linear_app::shell::App;
use kimi_linear_app::shell::action::Action;

const QUESTION: &str = "Remember the number 7, please.";

fn settings(model: PathBuf) -> Settings {
    let mut settings = Settings::default();
    settings.model.folder = Some(model);
    settings.model.backend = BackendName::Cpu;
    settings.model.context = 2048;
    settings.sampling.max_tokens = 30;
    settings
}

/// The app with a model on the CPU, once it is loaded; its chats are kept in this folder.
fn open(folder: &Path, settings: Settings) -> Harness<'static, App> {
    let open = Box::new(|_, _| Ok(Box::new(CpuBackend::new()) as _));
    let mut start = start(local::start_with(wake(), open).unwrap(), settings);
    start.keeper = Some(Keeper::start(folder.to_owned(), wake()).unwrap());
    let mut harness = harness(start, 1280.0, 800.0);
    until(&mut harness, "the model", |app| app.ready().is_ok());
    harness
}

/// The same, with a session that the test plays.
fn play(folder: &Path) -> (Harness<'static, App>, Played) {
    let (session, played) = played(false);
    let mut start = start(session, Settings::default());
    start.keeper = Some(Keeper::start(folder.to_owned(), wake()).unwrap());
    let mut harness = harness(start, 1280.0, 800.0);
    assert!(matches!(played.command(), Command::Load(_)));
    played.tell(Update::Loaded(Box::new(facts())));
    harness.run_steps(3);
    (harness, played)
}

fn close(mut harness: Harness<'_, App>) {
    harness.state_mut().on_exit();
}

fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path());
    files
        .filter(|path| path.extension().is_some_and(|have| have == end))
        .collect()
}

/// Asks and answers in the current chat of a played session.
fn turn(harness: &mut Harness<'_, App>, played: &Played, question: &str, answer: &str) {
    act(harness, Action::Ask(question.to_owned()));
    let Command::Ask(ask) = played.command() else {
        panic!("a question was sent")
    };
    let (at, text) = (Instant::now(), answer.to_owned());
    let word = |text: &str| TokenText {
        text: text.to_owned(),
        ..TokenText::default()
    };
    let tokens = vec![word("a"), word("b")];
    let token = word(answer);
    for update in [
        ChatUpdate::Prompt { tokens, at },
        ChatUpdate::Token { token, text, at },
        ChatUpdate::Finished {
            reason: FinishReason::Stop,
            text: String::new(),
            usage: Usage::default(),
        },
    ] {
        played.tell(Update::Chat(ask.chat, update));
    }
    harness.run_steps(3);
}

#[test]
fn a_chat_is_there_at_the_next_start_and_its_views_are_filled() {
    let folder = tempfile::tempdir().unwrap();
    let mut harness = open(folder.path(), settings(tiny()));
    ask(&mut harness, QUESTION);
    let saved = harness.state().chat().conversation.clone();
    let last = saved.ids().len() - 2;
    // After a reload the tokens run again.
    act(&mut harness, Action::Load);
    until(&mut harness, "the frames after a reload", |app| {
        app.ready().is_ok() && app.settled() && app.chat().history.frame(last).is_some()
    });
    close(harness);

    let mut harness = open(folder.path(), settings(tiny()));
    until(&mut harness, "the chat with its frames", |app| {
        app.chat().conversation == saved
            && app.settled()
            && app.chat().history.frame(last).is_some()
    });
    let chat = harness.state().chat();
    assert_eq!(chat.turns[0].question, QUESTION);
    assert_eq!(chat.history.tokens().len(), saved.ids().len());
    assert_eq!(chat.measures.context_used, saved.ids().len());
    assert!(
        files(folder.path(), "klchat").is_empty(),
        "no state unless it is wanted"
    );
    close(harness);

    // Another model: the chat says why the views are empty, and goes on.
    let other = tiny().with_file_name("tiny-128");
    let mut harness = open(folder.path(), settings(other));
    until(&mut harness, "the chat", |app| !app.chat().is_empty());
    harness.run_steps(30);
    harness.get_by_label_contains("The views are empty, because tiny-a wrote this chat");
    assert!(harness.state().chat().history.tokens().is_empty());
    ask(&mut harness, "Which one?");
    let chat = harness.state().chat();
    assert_eq!(chat.conversation.turns(), 2);
    assert_eq!(chat.turns[0].model.as_deref(), Some("tiny-a"));
    assert_eq!(chat.turns[1].model.as_deref(), Some("tiny-128"));
    assert!(!chat.history.tokens().is_empty());
}

#[test]
fn a_kept_state_is_not_computed_again() {
    for keep_state in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings(tiny());
        settings.keep_state = keep_state;
        // Nothing else fills the cache.
        settings.trace = false;
        let mut harness = open(folder.path(), settings.clone());
        ask(&mut harness, QUESTION);
        let tokens = harness.state().chat().conversation.ids().len();
        until(&mut harness, "the state", |_| {
            !keep_state || files(folder.path(), "klchat").len() == 1
        });
        close(harness);
        let mut harness = open(folder.path(), settings);
        until(&mut harness, "the chat", |app| {
            !app.chat().is_empty() && app.settled()
        });
        ask(&mut harness, "Which one?");
        let cached = harness.state().chat().measures.answers[0].cached_tokens;
        assert_eq!(cached, if keep_state { tokens - 1 } else { 0 });
    }
}

#[test]
fn a_chat_is_deleted_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let (mut harness, played) = play(folder.path());
    turn(&mut harness, &played, "the first one", "apple");
    act(&mut harness, Action::NewChat);
    turn(&mut harness, &played, "another one", "pear");
    until(&mut harness, "both files", |_| {
        files(folder.path(), "json").len() == 2
    });
    harness.get_by_label("Delete the first one").click();
    harness.run_steps(3);
    let label = "the first one";
    assert!(harness.query_by_label(label).is_none());
    until(&mut harness, "one file", |_| {
        files(folder.path(), "json").len() == 1
    });
    harness.get_by_label("Undo").click();
    harness.run_steps(3);
    until(&mut harness, "both files", |_| {
        files(folder.path(), "json").len() == 2
    });
    let chat = harness.state().chat();
    assert_eq!(
        (chat.title.as_str(), chat.turns[0].answer.as_str()),
        (label, "apple")
    );
    assert!(harness.query_by_label("Undo").is_none());
}

#[test]
fn chats_are_renamed_and_searched() {
    let folder = tempfile::tempdir().unwrap();
    let (mut harness, played) = play(folder.path());
    turn(&mut harness, &played, "the first one", "apple");
    act(&mut harness, Action::NewChat);
    turn(&mut harness, &played, "another one", "pear");
    harness.key_press(Key::F2);
    harness.run_steps(3);
    let title = harness.get_by_label("Title of the chat");
    title.focus();
    title.type_text(" of fruit");
    harness.run_steps(2);
    harness.key_press(Key::Enter);
    harness.run_steps(3);
    assert_eq!(harness.state().chat().title, "another one of fruit");
    // Escape leaves the title as it is.
    harness.key_press(Key::F2);
    harness.run_steps(3);
    harness.get_by_label("Title of the chat").type_text("!");
    harness.run_steps(2);
    harness.key_press(Key::Escape);
    harness.run_steps(3);
    assert_eq!(harness.state().chat().title, "another one of fruit");

    let search = harness.get_by_label("Search the chats");
    search.focus();
    search.type_text("APPLE");
    harness.run_steps(3);
    harness.get_by_label("the first one");
    assert!(harness.query_by_label("another one of fruit").is_none());
    harness.get_by_label("Search the chats").type_text("?");
    harness.run_steps(3);
    harness.get_by_label("No chat has this text");
    close(harness);
    let (mut harness, _played) = play(folder.path());
    until(&mut harness, "the chats", |app| !app.chat().is_empty());
    harness.get_by_label("another one of fruit");
}

/// Draws until a text is there, or gone.
fn shows(harness: &mut Harness<'_, App>, text: &str, there: bool) {
    let began = Instant::now();
    while harness.query_by_label_contains(text).is_some() != there {
        assert!(began.elapsed().as_secs() < 60, "{text}: {there}");
        std::thread::sleep(Duration::from_millis(5));
        harness.step();
    }
}

#[test]
fn a_damaged_file_and_a_disk_that_refuses_are_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("bad.json"), "no JSON").unwrap();
    let (mut harness, _played) = play(folder.path());
    let sentence = "A chat cannot be read, and the file stays as it is";
    shows(&mut harness, sentence, true);
    harness.get_by_label("Dismiss").click();
    shows(&mut harness, sentence, false);
    assert!(folder.path().join("bad.json").exists());

    // A file where the folder should be: nothing can be read or written.
    let place = folder.path().join("history");
    std::fs::write(&place, "").unwrap();
    let (mut harness, played) = play(&place);
    shows(&mut harness, "history: ", true);
    turn(&mut harness, &played, "a question", "an answer");
    let sentence = "A chat could not be written to ";
    shows(&mut harness, sentence, true);
    assert_eq!(harness.state().chat().turns[0].answer, "an answer");
    std::fs::remove_file(&place).unwrap();
    harness.get_by_label("Try again").click();
    shows(&mut harness, sentence, false);
    let began = Instant::now();
    while files(&place, "json").len() != 1 {
        assert!(began.elapsed().as_secs() < 60, "the file does not come");
        harness.step();
    }
}

#[test]
fn an_answer_that_the_end_cuts_off_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (mut harness, played) = play(folder.path());
    act(&mut harness, Action::Ask("a long story".to_owned()));
    assert!(matches!(played.command(), Command::Ask(_)));
    let at = Instant::now();
    let token = TokenText::default();
    let text = "Once upon".to_owned();
    let tokens = vec![TokenText::default()];
    for update in [
        ChatUpdate::Prompt { tokens, at },
        ChatUpdate::Token { token, text, at },
    ] {
        played.tell(Update::Chat(ChatId(1), update));
    }
    harness.run_steps(3);
    close(harness);
    let (mut harness, _played) = play(folder.path());
    until(&mut harness, "the chat", |app| !app.chat().is_empty());
    let turn = &harness.state().chat().turns[0];
    assert_eq!(turn.answer, "Once upon");
    assert!(turn.footer.as_ref().unwrap().contains("stopped"));
}
