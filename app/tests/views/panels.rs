//! Each panel by its accessibility tree and by its picture.

use eframe::egui::accesskit::Toggled;
use eframe::egui::{Role, Theme};
use egui_kittest::kittest::{NodeT, Queryable};
use egui_kittest::{Harness, SnapshotResults};
use kimi_linear::engine::UndoWrite;
use kimi_linear::model::TraceHead;
use kimi_linear_app::history::Undone;
use kimi_linear_app::views::Wish;

use crate::scenes::{ASKS, HEAD, STORY, Scene, WRITES, story, window};

fn dark(name: &str, token: Option<usize>, size: [f32; 2]) -> Harness<'static, Scene> {
    let mut harness = window(story(name, token), size, Theme::Dark);
    harness.run_ok();
    harness
}

/// Whether any node's label contains the text.
pub fn says(harness: &Harness<'_, Scene>, text: &str) -> bool {
    harness.query_all_by_label_contains(text).next().is_some()
}

#[test]
fn tokens() {
    let mut harness = dark("Tokens", Some(WRITES[1]), [560.0, 260.0]);
    for (i, text) in STORY.iter().enumerate().skip(1) {
        let text = text.replace('\n', "\\n");
        assert!(
            says(&harness, &format!("token {i} “{text}” how much it wrote")),
            "tile {i}"
        );
    }
    harness.snapshot("tokens");
    harness.get_by_label_contains("token 5 “ 7”").click();
    harness.run_ok();
    assert_eq!(harness.state().selection.token, Some(5));
    harness.get_by_label("follow newest").click();
    harness.run_ok();
    assert_eq!(harness.state().selection.token, None);
}

#[test]
fn layers_and_heads() {
    let mut harness = dark("Layers and heads", Some(WRITES[1]), [420.0, 300.0]);
    assert!(says(&harness, "selected is layer 2, head 1, state norm"));
    harness.snapshot("heads");
    harness
        .get_by_label_contains("layer 4, head 0, state norm")
        .click();
    harness
        .get_by_label_contains("layer 3, attention head 1")
        .click();
    harness.run_ok();
    let selection = harness.state().selection;
    assert_eq!(selection.kda, Some(TraceHead { layer: 4, head: 0 }));
    assert_eq!(selection.mla, Some(TraceHead { layer: 3, head: 1 }));
    for (statistic, label) in [
        ("relative change", "layer 0, head 0, relative change"),
        (
            "half-life in tokens",
            "layer 0, head 0, half-life in tokens",
        ),
        ("effective rank", "layer 4, head 0, effective rank 6.00"),
    ] {
        harness.get_by_role(Role::ComboBox).click();
        harness.run_ok();
        harness.get_by_label(statistic).click();
        harness.run_ok();
        assert!(says(&harness, label), "{statistic}");
    }
}

#[test]
fn state() {
    let mut harness = dark("State", Some(WRITES[1]), [620.0, 560.0]);
    for label in [
        "S after the token",
        "change at this token",
        "decay a by row",
        "output gate by column",
        "write strength b 0.96",
    ] {
        assert!(says(&harness, label), "{label}");
    }
    harness.snapshot("state");
    harness.get_by_label_contains("4 write").click();
    harness.run_ok();
    assert!(says(&harness, "b k × e, what is written"));
    harness.snapshot("state_write");
    harness.get_by_label("lock scale").click();
    harness.get_by_label("whole token").click();
    harness.run_ok();
    assert!(says(&harness, "change at this token"));
}

#[test]
fn slow_motion_goes_through_all_lines_and_on() {
    let mut harness = dark("State", Some(STORY.len() - 2), [620.0, 560.0]);
    harness.get_by_label_contains("slow motion").click();
    let mut seen = Vec::new();
    for _ in 0..100 {
        harness.step();
        let lines = ["1 decay", "2 read", "3 error", "4 write", "5 output"];
        let chosen = lines.into_iter().find(|line| {
            let node = harness.get_by_label_contains(line);
            node.accesskit_node().toggled() == Some(Toggled::True)
        });
        if let Some(line) = chosen
            && seen.last() != Some(&line)
        {
            seen.push(line);
        }
    }
    assert!(
        seen.starts_with(&[
            "1 decay", "2 read", "3 error", "4 write", "5 output", "1 decay"
        ]),
        "{seen:?}"
    );
    assert_eq!(harness.state().selection.token, Some(STORY.len() - 1));
}

/// Headlines are whole: a number that is cut is another number.
#[test]
fn headlines_are_whole_at_any_width() {
    for width in [300.0, 430.0, 520.0, 620.0, 900.0] {
        let mut harness = dark("State", Some(WRITES[1]), [width, 900.0]);
        for line in [
            "whole token",
            "1 decay",
            "2 read",
            "3 error",
            "4 write",
            "5 output",
        ] {
            harness.get_by_label_contains(line).click();
            harness.run_ok();
            let captions: Vec<_> = harness.query_all_by_label_contains(", ±").collect();
            assert_eq!(captions.len(), 2, "{line} at {width}");
            for caption in captions {
                let rect = caption.rect();
                assert!(
                    rect.right() <= width && rect.left() >= 0.0,
                    "{line} at {width}: {rect}"
                );
            }
        }
    }
}

#[test]
fn what_it_remembers() {
    let mut harness = dark("What it remembers", Some(WRITES[1]), [1300.0, 200.0]);
    // Both writes are under one key: its row answers the first word, then the second.
    let label = |position| format!("“The red box holds” after token {position}: ");
    for (position, word) in [
        (WRITES[0], "7"),
        (WRITES[1] - 1, "7"),
        (WRITES[1], "3"),
        (ASKS, "3"),
    ] {
        let says = says(&harness, &format!("{}{word} (", label(position)));
        assert!(says, "{word} at {position}");
    }
    assert!(
        !says(&harness, &label(WRITES[0] - 1)),
        "nothing is known before the first write"
    );
    assert!(says(&harness, "token 12 “ 3”: was 7 ("));
    assert!(says(&harness, ", now 3 ("));
    harness.snapshot("remembers");
    harness.get_by_label("column of token 5 “ 7”").click();
    harness.run_ok();
    assert_eq!(harness.state().selection.token, Some(5));
}

#[test]
fn a_tour_and_an_undone_write() {
    let mut harness = dark("What it remembers", Some(WRITES[1]), [760.0, 260.0]);
    harness.get_by_label("Undo this write (3)").click();
    harness.run_ok();
    let wish = |head| {
        Wish::Undo(UndoWrite {
            token: WRITES[1],
            head,
        })
    };
    harness.get_by_label("in every head").click();
    harness.run_ok();
    harness.get_by_label("Undo this write (3)").click();
    harness.run_ok();
    assert_eq!(harness.state().wishes, [wish(Some(HEAD)), wish(None)]);
    let history = &mut harness.state_mut().history;
    history.set_undone(Undone {
        write: UndoWrite {
            token: WRITES[1],
            head: None,
        },
        answers: Some(Ok(["It holds 3".to_owned(), "It holds 7".to_owned()])),
    });
    harness.run_ok();
    assert!(says(&harness, "It holds 3") && says(&harness, "It holds 7"));
    assert!(says(
        &harness,
        "without that of token 12 “ 3” in every head"
    ));
    harness.state_mut().wishes.clear();
    harness.get_by_label("Tour").click();
    harness.run_ok();
    let mut positions = Vec::new();
    harness.snapshot("remembers_tour");
    while harness.query_by_label("Next").is_some() {
        positions.push(harness.state().selection.token.unwrap());
        harness.get_by_label("Next").click();
        harness.run_ok();
    }
    positions.push(harness.state().selection.token.unwrap());
    harness.get_by_label("End").click();
    harness.run_ok();
    assert_eq!(positions[..2], WRITES);
    assert_eq!(harness.state().wishes.len(), positions.len());
    harness.get_by_label("Tour");
}

#[test]
fn half_lives() {
    let mut harness = dark("Half-lives", Some(WRITES[1]), [520.0, 320.0]);
    assert!(says(
        &harness,
        "this head, half of the channels still hold half after"
    ));
    harness.snapshot("half_lives");
    harness.get_by_label("all KDA layers").click();
    harness.run_ok();
    assert!(says(
        &harness,
        "all KDA layers, half of the channels still hold half after"
    ));
}

#[test]
fn attention() {
    let mut harness = dark("What it attends to", Some(ASKS), [560.0, 380.0]);
    assert!(says(
        &harness,
        "KDA layer 2, head 1, implicit attention of token 22"
    ));
    assert!(says(&harness, "MLA layer 3, head 0, attention of token 22"));
    harness.snapshot("attention");
    // The KDA head's largest weight is that of the second write; the first was overwritten.
    harness.get_by_label_contains("12 “ 3” 0.09").click();
    harness.run_ok();
    assert_eq!(harness.state().selection.token, Some(12));
}

#[test]
fn experts() {
    let mut harness = dark("Experts", Some(WRITES[1]), [560.0, 240.0]);
    assert!(says(&harness, "experts chosen by token 12"));
    assert!(says(&harness, "layer 1, experts "));
    harness.snapshot("experts");
}

#[test]
fn throughput() {
    let mut harness = dark("Throughput and memory", None, [860.0, 460.0]);
    for label in [
        "tokens a second",
        "(traced)",
        "231 ms",
        "22 tokens, 0 cached",
        "linear 0.41",
        "all others",
        "KDA state",
    ] {
        assert!(says(&harness, label), "{label}");
    }
    harness.snapshot("throughput");
}

/// A picture on a light background.
fn light(name: &str, picture: &str, size: [f32; 2], density: f32) {
    let mut harness = window(story(name, Some(WRITES[1])), size, Theme::Light);
    harness.set_pixels_per_point(density);
    harness.run_ok();
    harness.snapshot(picture);
}

#[test]
fn tokens_in_light() {
    light("Tokens", "tokens_light", [360.0, 260.0], 1.0);
}

#[test]
fn a_narrow_state_in_light() {
    light("State", "state_light", [400.0, 820.0], 1.0);
}

#[test]
fn attention_in_light_and_high_density() {
    light("What it attends to", "attention_light", [840.0, 760.0], 2.0);
}

/// Screens of high density, in the dark: what is thin or small shows there.
#[test]
fn every_panel_in_high_density() {
    let mut results = SnapshotResults::new();
    for (name, picture, size) in [
        ("Tokens", "tokens_dense", [1120.0, 420.0]),
        ("Layers and heads", "heads_dense", [840.0, 600.0]),
        ("State", "state_dense", [1240.0, 1120.0]),
        ("Half-lives", "half_lives_dense", [1040.0, 640.0]),
        ("Experts", "experts_dense", [1120.0, 480.0]),
    ] {
        let mut harness = window(story(name, Some(WRITES[1])), size, Theme::Dark);
        harness.set_pixels_per_point(2.0);
        harness.run_ok();
        harness.snapshot(picture);
        results.extend_harness(&mut harness);
    }
}

#[test]
fn a_narrow_throughput_in_light() {
    light(
        "Throughput and memory",
        "throughput_light",
        [420.0, 760.0],
        1.0,
    );
}
