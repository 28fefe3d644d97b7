//! Windows of any size, conversations of any length, and parts that are missing.

use eframe::egui::Theme;
use kimi_linear_app::history::{History, TokenText};
use kimi_linear_app::selection::Selection;
use kimi_linear_app::views::all;

use crate::panels::says;
use crate::scenes::{STORY, Scene, story, story_frames, story_tokens, window};

fn names() -> Vec<&'static str> {
    all().iter().map(|view| view.name()).collect()
}

#[test]
fn every_view_has_its_help() {
    for view in all() {
        let help = view.help();
        for text in [help.shows, help.formula, help.look_for] {
            assert!(text.len() > 20, "{}", view.name());
        }
    }
    assert_eq!(names().len(), 8);
}

#[test]
fn windows_of_any_size() {
    for name in names() {
        let mut harness = window(story(name, None), [300.0, 200.0], Theme::Dark);
        for size in [
            [1.0, 1.0],
            [10.0, 400.0],
            [400.0, 10.0],
            [70.0, 50.0],
            [120.0, 900.0],
            [1600.0, 90.0],
        ] {
            harness.set_size(size.into());
            harness.run_ok();
        }
    }
}

#[test]
fn nothing_is_there_yet() {
    for name in names() {
        let mut scene = story(name, None);
        scene.history = History::default();
        let mut harness = window(scene, [400.0, 300.0], Theme::Dark);
        harness.run_ok();
        assert!(
            says(&harness, "et. ") || says(&harness, "tokens a second"),
            "{name} says what it waits for"
        );
        let scene = harness.state_mut();
        (scene.facts, scene.selection) = (None, Selection::default());
        scene.measures.answers.clear();
        harness.run_ok();
        let scene = harness.state_mut();
        scene.history.set_tokens(story_tokens());
        harness.run_ok();
    }
}

#[test]
fn tokens_without_a_frame_and_heads_that_were_not_traced() {
    for name in names() {
        let mut scene = story(name, Some(3));
        scene.history = History::default();
        scene.history.set_tokens(story_tokens());
        // Only from the tenth token on.
        story_frames()
            .into_iter()
            .skip(10)
            .for_each(|frame| scene.history.push_frame(frame));
        let mut harness = window(scene, [500.0, 500.0], Theme::Dark);
        harness.run_ok();
        if name != "Throughput and memory" {
            assert!(says(&harness, "not traced"), "{name}");
        }
        // The first that was traced: what was before it is not known.
        harness.state_mut().selection.token = Some(10);
        harness.run_ok();
        if name == "State" {
            assert!(says(&harness, "The token before was not traced"));
        }
        let kda = &mut harness.state_mut().selection.kda;
        kda.as_mut().unwrap().head = 0;
        harness.run_ok();
        // Beyond the end.
        harness.state_mut().selection.token = Some(10_000);
        harness.run_ok();
    }
}

#[test]
fn a_hundred_thousand_tokens_cost_what_is_seen_of_them() {
    let most = 100_000;
    let frames = story_frames();
    for name in names() {
        let mut scene: Scene = story(name, None);
        let texts = story_tokens();
        let token = |i: usize| TokenText {
            text: texts[i % STORY.len()].text.clone(),
            ..texts[i % STORY.len()].clone()
        };
        scene.history = History::default();
        scene.history.set_tokens((0..most).map(token).collect());
        for position in most - 2000..most {
            let mut frame = frames[position % STORY.len()].clone();
            frame.position = position;
            scene.history.push_frame(frame);
        }
        let mut harness = window(scene, [500.0, 400.0], Theme::Dark);
        harness.run_ok();
        harness.state_mut().selection.token = Some(most / 2);
        harness.run_ok();
        if name == "Tokens" {
            let tiles =
                egui_kittest::kittest::Queryable::query_all_by_label_contains(&harness, "token ")
                    .count();
            assert!((50..1000).contains(&tiles), "{tiles} tiles");
            assert!(
                says(&harness, "token 50000 "),
                "the selected token is in sight"
            );
        }
    }
}
