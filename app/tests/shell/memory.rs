//! The head that is followed, and a write that is undone.

use std::time::Instant;

use egui_kittest::Harness;
use kimi_linear::engine::{FinishReason, UndoWrite};
use kimi_linear::model::TraceHead;
use kimi_linear_app::demo;
use kimi_linear_app::history::{HeadScores, Undone};
use kimi_linear_app::session::{ChatUpdate, Command};
use kimi_linear_app::shell::App;
use kimi_linear_app::shell::action::{Action, Step};
use kimi_linear_app::views::Wish;

use super::{chat, finish, loaded, prompt, say, type_and_send};

#[test]
fn the_head_that_shows_most_is_selected_until_the_user_chooses_one() {
    let (mut harness, played) = loaded();
    let kda = |harness: &Harness<'_, App>| harness.state().selection().kda;
    assert_eq!(kda(&harness), Some(demo::HEAD), "the demo model's head");
    let at = Instant::now();
    type_and_send(&mut harness, "one");
    prompt(&played, &["a", "b"], at);
    say(&played, "c", at);
    finish(&played, FinishReason::Stop);
    let best = TraceHead { layer: 4, head: 1 };
    let scores = || HeadScores {
        layers: vec![(0, vec![0.1, 0.0]), (4, vec![0.0, 0.7])],
    };
    played.tell(chat(ChatUpdate::Scores(scores())));
    harness.run_steps(3);
    assert_eq!(kda(&harness), Some(best));
    let ctx = harness.ctx.clone();
    harness.state_mut().act(&ctx, Action::Head(Step::Back));
    played.tell(chat(ChatUpdate::Scores(scores())));
    harness.run_steps(3);
    assert_eq!(kda(&harness), Some(TraceHead { head: 0, ..best }));
    harness.state_mut().act(&ctx, Action::Wish(Wish::Follow));
    harness.run_steps(3);
    assert_eq!(kda(&harness), Some(best));
}

#[test]
fn a_write_is_undone_in_the_last_question() {
    let (mut harness, played) = loaded();
    let at = Instant::now();
    for question in ["one", "two"] {
        type_and_send(&mut harness, question);
        let words: &[&str] = if question == "one" {
            &["a", "b"]
        } else {
            &["a", "b", "x", "d", "e"]
        };
        prompt(&played, words, at);
        say(&played, "x", at);
        finish(&played, FinishReason::Stop);
        harness.run_steps(3);
    }
    while played.commands.try_recv().is_ok() {}
    let ctx = harness.ctx.clone();
    let undo = |token| Action::Wish(Wish::Undo(UndoWrite { token, head: None }));
    // A token of the answer was not read before it.
    harness.state_mut().act(&ctx, undo(5));
    assert!(played.commands.try_recv().is_err());
    harness.state_mut().act(&ctx, undo(3));
    let Command::Undo { prompt, write, .. } = played.command() else {
        panic!("an answer without the write is asked for")
    };
    assert_eq!((prompt.len(), write.token), (5, 3));
    assert!(
        harness
            .state()
            .chat()
            .history
            .undone()
            .unwrap()
            .answers
            .is_none()
    );
    let answers = Some(Ok(["with".to_owned(), "without".to_owned()]));
    played.tell(chat(ChatUpdate::Undone(Undone { write, answers })));
    harness.run_steps(3);
    let undone = harness.state().chat().history.undone().unwrap();
    assert_eq!(
        undone.answers,
        Some(Ok(["with".to_owned(), "without".to_owned()]))
    );
}
