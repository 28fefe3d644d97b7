//! The app as a person uses it, in a real window: the first start, an example, a question, copy and paste with another
//! program, the end, and the next start with the chat still there. Pictures are kept in `target/app-person/`.
//!
//! To add steps, go on where [`a_person_chats_copies_closes_and_comes_back`] has the state that they need. Where something
//! is to be clicked is asked of the same app in a test harness of the same size ([`place`]).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
#[allow(clippy::module_inception)]
mod person;

use egui_kittest::kittest::Queryable;
use kimi_linear_app::session::Update;
use kimi_linear_app::settings::Settings;
use person::{Person, out};

/// The app's window at its first start.
const SIZE: [f32; 2] = [1200.0, 720.0];

const OPTIONS: [&str; 4] = ["--demo", "--backend", "cpu", "--context=4096"];

/// The middle of a button at the first start, once the model is loaded.
fn place(label: &str) -> (f32, f32) {
    let (session, played) = common::played(false);
    let start = common::start(session, Settings::default());
    let mut harness = common::harness(start, SIZE[0], SIZE[1]);
    played.tell(Update::Loaded(Box::new(common::facts())));
    harness.run_steps(4);
    let middle = harness.get_by_label(label).rect().center();
    (middle.x, middle.y)
}

#[test]
fn a_person_chats_copies_closes_and_comes_back() {
    let mut person = Person::new(1280, 800);
    person.starts(&OPTIONS);
    person.looks(&out().join("first.png"));

    // An example.
    person.clicks(place("Recall, overwritten"));
    let (_, answer) = person.answered(1);
    assert!(answer.contains('3'), "{answer}");
    person.looks(&out().join("example.png"));

    // A question of one's own.
    person.types("The green box holds 5. What does the green box hold?");
    person.presses(&["Return"]);
    let (question, answer) = person.answered(2);
    assert_eq!(
        question,
        "The green box holds 5. What does the green box hold?"
    );
    assert!(answer.contains('5'), "{answer}");

    // Copied here, pasted elsewhere; copied elsewhere, pasted here.
    person.types("copied in the app");
    person.presses(&["ctrl+a", "ctrl+c"]);
    person.pastes_elsewhere("copied in the app");
    person.copies_elsewhere("The black box holds 8. What does the black box hold?");
    person.presses(&["ctrl+a", "ctrl+v", "Return"]);
    let (question, answer) = person.answered(3);
    assert_eq!(
        question,
        "The black box holds 8. What does the black box hold?"
    );
    assert!(answer.contains('8'), "{answer}");

    // Shift is released at once, in the frame in which it was pressed.
    person.types("The white box holds 4.");
    person.presses(&["shift+Return"]);
    person.types("What does the white box hold?");
    person.presses(&["Return"]);
    let (question, _) = person.answered(4);
    assert_eq!(
        question,
        "The white box holds 4.\nWhat does the white box hold?"
    );

    // Escape closes a window.
    person.presses(&["F1"]);
    person.looks(&out().join("help.png"));
    person.presses(&["Escape"]);
    person.looks(&out().join("closed.png"));

    // What was begun is there at the next start, too.
    person.types("What does the black box hold?");
    person.presses(&["ctrl+q"]);
    person.is_done();
    person.starts(&OPTIONS);
    person.looks(&out().join("again.png"));
    person.presses(&["Return"]);
    let (question, answer) = person.answered(5);
    assert_eq!(question, "What does the black box hold?");
    assert!(answer.contains('8'), "{answer}");
    assert_eq!(person.chats().len(), 1, "it is the same chat");
    person.presses(&["ctrl+q"]);
    person.is_done();
}
