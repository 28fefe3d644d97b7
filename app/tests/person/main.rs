//! The app as a person uses it, in a real window: the first start, an example, the tour, a write undone, a question, copy
//! and paste with another program, the end, and the next start with the chat still there. Pictures are kept in
//! `target/app-person/`.
//!
//! Where to click is known from the same app with the same model in a test harness of the same size ([`Twin`]).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
#[allow(clippy::module_inception)]
mod person;

use egui_kittest::Harness;
use egui_kittest::kittest::Queryable;
use kimi_linear_app::session::local;
use kimi_linear_app::settings::{BackendName, Settings};
use kimi_linear_app::shell::App;
use person::{Person, out};

/// The app's window at its first start.
const SIZE: [f32; 2] = [1200.0, 720.0];

const OPTIONS: [&str; 4] = ["--demo", "--backend", "cpu", "--context=4096"];

/// The same app without a window.
struct Twin(Harness<'static, App>);

impl Twin {
    fn new() -> Self {
        let mut settings = Settings::default();
        settings.model.backend = BackendName::Cpu;
        settings.model.context = 4096;
        let session = local::start(common::wake()).unwrap();
        let mut harness = common::harness(common::start(session, settings), SIZE[0], SIZE[1]);
        common::until(&mut harness, "the model", |app| app.ready().is_ok());
        Self(harness)
    }

    /// Clicks a button here; returns its middle, in points.
    fn clicks(&mut self, label: &str) -> (f32, f32) {
        self.0.run_steps(4);
        let button = self.0.get_by_label(label);
        let middle = button.rect().center();
        button.click();
        self.0.run_steps(4);
        (middle.x, middle.y)
    }

    /// A place in the message's field, which is left of Send.
    fn message(&self) -> (f32, f32) {
        let send = self.0.get_by_label("Send").rect();
        (send.left() - 60.0, send.center().y)
    }

    fn shows(&self, label: &str) -> bool {
        self.0.query_by_label(label).is_some()
    }

    fn waits(&mut self, what: &str, holds: impl Fn(&App) -> bool) {
        common::until(&mut self.0, what, holds);
    }
}

#[test]
fn a_person_chats_copies_closes_and_comes_back() {
    let mut twin = Twin::new();
    let mut person = Person::new(1280, 800);
    person.starts(&OPTIONS);
    person.looks(&out().join("first.png"));

    // An example.
    person.clicks(twin.clicks("Recall, overwritten"));
    let (_, answer) = person.answered(1);
    assert!(answer.contains('3'), "{answer}");
    twin.waits("the answer", |app| !app.chat().busy() && app.settled());
    person.looks(&out().join("example.png"));

    // The tour, up to the token that reads the old value and writes the new one; its write is undone.
    for button in ["Tour", "Next", "Next"] {
        person.clicks(twin.clicks(button));
        person.looks(&out().join("tour.png"));
    }
    person.clicks(twin.clicks("Undo this write (3)"));
    person.logs("answered with a write undone");
    twin.waits("the other answer", |app| {
        let undone = app.chat().history.undone();
        undone.is_some_and(|undone| undone.answers.is_some())
    });
    assert!(twin.shows("The red box holds 7."));
    person.looks(&out().join("undone.png"));

    // A question of one's own.
    person.clicks(twin.message());
    person.looks(&out().join("message.png"));
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
