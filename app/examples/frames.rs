//! What the interface's own thread takes for a frame, on good days and bad ones: the longest of each kind.
//!
//!     cargo run --release --locked -p kimi-linear-app --example frames
//!
//! The app runs as in a window of 1280 x 800 with all panels side by side; a session that this program plays tells it what a
//! model of published size would (`assets/shapes/48b.json`: 20 KDA layers of 32 heads of 128 x 128). A frame
//! is everything up to the triangles that a GPU is given: updates, layout, accessibility, tessellation. The GPU's part is not in
//! it, and neither is a model that takes the CPU's cores meanwhile: the script's step `frames` has both.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::time::Instant;

use common::{Played, harness, played, start};
use eframe::egui;
use egui_kittest::Harness;
use kimi_linear::backend::Device;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{FinishReason, Usage};
use kimi_linear::model::{
    AttentionTrace, ExpertTrace, KdaHeadTrace, KdaTrace, OperationTime, StateTrace, TraceChoice,
    TraceFrame, TraceHead,
};
use kimi_linear_app::facts::{ModelFacts, memory};
use kimi_linear_app::history::TokenText;
use kimi_linear_app::measure::FrameTimes;
use kimi_linear_app::problem::{Problem, WayOut};
use kimi_linear_app::session::{ChatId, ChatUpdate, Command, Update};
use kimi_linear_app::settings::Settings;
use kimi_linear_app::shell::App;
use kimi_linear_app::shell::action::{Action, Step};

const LONG: usize = 100_000;

struct Window {
    harness: Harness<'static, App>,
    played: Played,
    times: FrameTimes,
}

impl Window {
    /// Draws one frame, and takes its time.
    fn draw(&mut self) {
        let began = Instant::now();
        self.harness.step();
        let shapes = self.harness.output().shapes.clone();
        let density = self.harness.ctx.pixels_per_point();
        let triangles = self.harness.ctx.tessellate(shapes, density);
        self.times.take(began.elapsed().as_secs_f64() * 1000.0);
        drop(triangles);
    }

    fn tell(&mut self, update: Update) {
        self.played.tell(update);
        self.draw();
    }

    fn chat(&self, update: ChatUpdate) {
        self.played.tell(Update::Chat(ChatId(1), update));
    }

    fn act(&mut self, action: Action) {
        let ctx: egui::Context = self.harness.ctx.clone();
        self.harness.state_mut().act(&ctx, action);
        self.draw();
    }

    fn idle(&mut self) {
        while self.played.commands.try_recv().is_ok() {}
        (0..3).for_each(|_| self.draw());
    }

    /// Prints what the frames since the last report took.
    fn report(&mut self, what: &str) {
        println!("| {what} | {} |", std::mem::take(&mut self.times));
    }
}

fn facts() -> ModelFacts {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/shapes");
    let config = ModelConfig::from_file(&folder.join("48b.json")).unwrap();
    let device = Device {
        backend: "wgpu",
        index: 0,
        name: "a device".to_owned(),
        memory_bytes: Some(141 << 30),
        precision: Dtype::F32,
        cache: Dtype::F32,
    };
    let context = 2 * LONG;
    ModelFacts {
        name: "Kimi-Linear-48B-A3B".to_owned(),
        memory: memory(&config, &device, context, None),
        config,
        device,
        context,
    }
}

/// A frame as large as those of a published model; its numbers are of no matter.
fn frame(config: &ModelConfig, choice: &TraceChoice, position: usize) -> TraceFrame {
    let (heads, width) = (config.kda_num_heads, config.kda_head_dim);
    let number = |i: usize| ((i * 7919 + position * 104_729) % 1000) as f32 / 1000.0;
    let row = |len: usize| (0..len).map(|i| number(i) - 0.5).collect::<Vec<f32>>();
    let head = |i: usize| KdaHeadTrace {
        state: 1.0 + number(i),
        write: number(i),
        error: 0.1 + number(i),
        decay: 0.9,
        beta: number(i),
        gate: 0.5,
    };
    let layer = |layer| KdaTrace {
        layer,
        heads: (0..heads).map(head).collect(),
        gates: (0..heads * width).map(|i| -0.001 - number(i)).collect(),
        // The session keeps the vectors of all heads.
        qkv: Vec::new(),
    };
    let experts = |layer| ExpertTrace {
        layer,
        experts: (0..8)
            .map(|i| ((i * 31 + position + layer) % config.num_experts) as u32)
            .collect(),
        weights: row(8),
    };
    let TraceHead {
        layer: kda,
        head: kda_head,
    } = choice.kda.unwrap();
    let TraceHead {
        layer: mla,
        head: mla_head,
    } = choice.mla.unwrap();
    let names = [
        "linear",
        "experts",
        "kda_recurrence",
        "mla_decode",
        "rms_norm",
        "route",
    ];
    TraceFrame {
        position,
        token: position as u32 % 1000,
        next: None,
        likely: Vec::new(),
        kda: config.kda_layers().map(layer).collect(),
        experts: (1..config.layers.len()).map(experts).collect(),
        state: Some(StateTrace {
            layer: kda,
            head: kda_head,
            state: row(width * width),
            width,
            decay: vec![0.95; width],
            query: row(width),
            key: row(width),
            value: row(width),
            beta: 0.5,
            gate: row(width),
            undone: false,
        }),
        attention: Some(AttentionTrace {
            layer: mla,
            head: mla_head,
            weights: vec![1.0 / (position + 1) as f32; position + 1],
        }),
        operations: names
            .map(|operation| OperationTime {
                operation,
                milliseconds: 0.1,
            })
            .to_vec(),
    }
}

fn token(at: usize, answer: bool) -> TokenText {
    let words = [
        " the", " red", " box", " holds", " 7", ".\n", " and", " now",
    ];
    TokenText {
        id: at as u32 % 1000,
        text: words[at % words.len()].to_owned(),
        answer,
        logprob: answer.then_some(-0.5),
        ..TokenText::default()
    }
}

/// A token of the answer with its frame.
fn say(window: &Window, config: &ModelConfig, choice: &TraceChoice, at: usize) {
    let told = token(at, true);
    let text = told.text.clone();
    window.chat(ChatUpdate::Frame(Box::new(frame(config, choice, at - 1))));
    window.chat(ChatUpdate::Token {
        token: told,
        text,
        at: Instant::now(),
    });
}

fn finish(window: &mut Window) {
    window.chat(ChatUpdate::Finished {
        reason: FinishReason::Stop,
        text: String::new(),
        usage: Usage::default(),
    });
    window.draw();
}

fn main() {
    let (session, played) = played(false);
    let mut window = Window {
        harness: harness(start(session, Settings::default()), 1280.0, 800.0),
        played,
        times: FrameTimes::default(),
    };
    println!("| what | frames of the interface's thread |\n|---|---|");
    window.report("start");
    window.act(Action::Spread);
    for part in 0..200 {
        let (done, total) = (part << 29, 200 << 29);
        window.tell(Update::Loading { done, total });
    }
    let facts = facts();
    let (config, choice) = (facts.config.clone(), facts.first_choice());
    window.tell(Update::Loaded(Box::new(facts)));
    window.idle();
    window.report("loading");

    window.act(Action::Ask("What does the red box hold? ".repeat(600)));
    let prompt = 4096;
    let tokens = (0..prompt).map(|at| token(at, false)).collect();
    window.chat(ChatUpdate::Prompt {
        tokens,
        at: Instant::now(),
    });
    for done in (0..=prompt - 256).step_by(256) {
        window.chat(ChatUpdate::Prefill { done, cached: 0 });
        window.draw();
    }
    for at in prompt - 256..prompt {
        window.chat(ChatUpdate::Frame(Box::new(frame(&config, &choice, at))));
        window.draw();
    }
    window.report("reading a prompt of 4,096 tokens, the last 256 traced");
    for at in prompt..prompt + 500 {
        say(&window, &config, &choice, at);
        window.draw();
    }
    window.report("generating, a token a frame");
    for at in prompt + 500..prompt + 1000 {
        say(&window, &config, &choice, at);
        if at % 8 == 0 {
            window.draw();
        }
    }
    finish(&mut window);
    window.report("generating, eight tokens a frame");
    for step in [Step::Back, Step::First, Step::On, Step::Last] {
        (0..10).for_each(|_| window.act(Action::Token(step)));
    }
    for _ in 0..10 {
        window.act(Action::Head(Step::On));
        window.act(Action::Layer(Step::On));
    }
    window.idle();
    window.report("another token, head or layer");

    window.act(Action::Ask("And now?".to_owned()));
    let tokens = (0..LONG).map(|at| token(at, at % 4096 > 2048)).collect();
    window.chat(ChatUpdate::Prompt {
        tokens,
        at: Instant::now(),
    });
    window.draw();
    window.report("100,000 tokens arrive");
    for at in LONG..LONG + 400 {
        say(&window, &config, &choice, at);
        window.draw();
    }
    window.report("generating after 100,000 tokens");
    window.act(Action::Token(Step::First));
    for step in [Step::On, Step::Back, Step::Last] {
        (0..10).for_each(|_| window.act(Action::Token(step)));
    }
    window.report("another token of 100,000");
    for size in [
        [0.0, 0.0],
        [1.0, 1.0],
        [300.0, 20.0],
        [700.0, 400.0],
        [2560.0, 1600.0],
        [1280.0, 800.0],
    ] {
        window.harness.set_size(size.into());
        (0..3).for_each(|_| window.draw());
    }
    window.report("a window of other sizes, of none among them");
    let lost = Problem::new("The device was lost.", WayOut::LoadAgain);
    window.chat(ChatUpdate::Failed(lost));
    window.idle();
    window.report("a device that is lost");
    window.act(Action::Theme);
    window.act(Action::Arrange);
    window.idle();
    window.report("another appearance, another arrangement");
    while let Ok(command) = window.played.commands.try_recv() {
        drop::<Command>(command);
    }
}
