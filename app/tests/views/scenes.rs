//! What the tests show: a story whose facts are known, and a view in a window over it.

use std::path::PathBuf;

use eframe::egui::{self, Theme};
use egui_kittest::Harness;
use kimi_linear::backend::Device;
use kimi_linear::config::{Dtype, MemoryRequest, ModelConfig};
use kimi_linear::model::{
    AttentionTrace, ExpertTrace, KdaHeadTrace, KdaTrace, OperationTime, StateTrace, TraceFrame,
    TraceHead,
};
use kimi_linear_app::facts::ModelFacts;
use kimi_linear_app::history::{HeadRanks, History, TokenText};
use kimi_linear_app::measure::{AnswerMeasure, Measures};
use kimi_linear_app::selection::Selection;
use kimi_linear_app::theme::Colours;
use kimi_linear_app::views::{View, ViewContext, Wish, all};

/// What a window shows.
pub struct Scene {
    pub history: History,
    pub facts: Option<ModelFacts>,
    pub measures: Measures,
    pub selection: Selection,
    pub view: Box<dyn View>,
    pub wishes: Vec<Wish>,
}

impl Scene {
    pub fn draw(&mut self, ui: &mut egui::Ui) {
        let colours = Colours::new(ui.visuals().dark_mode);
        let mut context = ViewContext {
            model: self.facts.as_ref(),
            history: &self.history,
            measures: &self.measures,
            selection: &mut self.selection,
            colours: &colours,
            wishes: &mut self.wishes,
        };
        self.view.ui(ui, &mut context);
    }
}

pub fn view(name: &str) -> Box<dyn View> {
    all().into_iter().find(|view| view.name() == name).unwrap()
}

/// A window of this size over a scene.
pub fn window(scene: Scene, size: [f32; 2], theme: Theme) -> Harness<'static, Scene> {
    Harness::builder()
        .with_size(size)
        .with_theme(theme)
        .build_ui_state(
            |ui, scene: &mut Scene| {
                egui::CentralPanel::default().show(ui, |ui| scene.draw(ui));
            },
            scene,
        )
}

pub fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/tiny-a")
}

/// A model of this shape on the CPU.
pub fn facts() -> ModelFacts {
    let config = ModelConfig::from_file(&tiny().join("config.json")).unwrap();
    let memory = config.memory(&MemoryRequest {
        context: 8192,
        sequences: 1,
        spare_slots: 3,
        weights: config.weight_bytes(Dtype::Bf16),
        cache: Dtype::F32,
        conv_states: Dtype::F32,
        block_tokens: 64,
        step_tokens: 513,
    });
    ModelFacts {
        name: "tiny-a".to_owned(),
        config,
        device: Device {
            backend: "cpu",
            index: 0,
            name: "processor".to_owned(),
            memory_bytes: None,
            precision: Dtype::F32,
            cache: Dtype::F32,
        },
        context: 8192,
        memory,
    }
}

pub const HEAD: TraceHead = TraceHead { layer: 2, head: 1 };
pub const MLA: TraceHead = TraceHead { layer: 3, head: 0 };

/// The story: what a box holds, and what it holds later. The answer is the last two tokens.
pub const STORY: [&str; 24] = [
    "<|user|>",
    "The",
    " red",
    " box",
    " holds",
    " 7",
    ".",
    " Now",
    " the",
    " red",
    " box",
    " holds",
    " 3",
    ".",
    "\n",
    "What",
    " does",
    " the",
    " red",
    " box",
    " hold",
    "?",
    " It holds",
    " 3",
];

/// Places where the box's contents are written, and where they are asked for.
pub const WRITES: [usize; 2] = [5, 12];
pub const ASKS: usize = 22;

/// Numbers between -1 and 1, from a seed.
fn numbers(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    };
    (0..8).for_each(|_| {
        next();
    });
    (0..count).map(|_| next()).collect()
}

fn unit(mut x: Vec<f64>) -> Vec<f64> {
    let length = x.iter().map(|x| x * x).sum::<f64>().sqrt();
    x.iter_mut().for_each(|x| *x /= length);
    x
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

/// The frames of the story, as a model that writes the box's contents under one key would give them.
pub fn story_frames() -> Vec<TraceFrame> {
    let (layers, heads, k) = ([0, 1, 2, 4], 2, 32);
    let mut states = vec![vec![0.0_f64; k * k]; layers.len() * heads];
    let mut frames = Vec::new();
    for (position, _) in STORY.iter().enumerate() {
        let mut frame = TraceFrame {
            position,
            token: 300 + position as u32,
            next: (position + 1 < ASKS)
                .then(|| -(0.2 + 3.0 * numbers(position as u64 + 900, 1)[0].abs()) as f32),
            ..TraceFrame::default()
        };
        for (l, layer) in layers.into_iter().enumerate() {
            let mut kda = KdaTrace {
                layer,
                heads: Vec::new(),
                gates: Vec::new(),
                qkv: Vec::new(),
            };
            for head in 0..heads {
                let seed = (position * 64 + l * 8 + head) as u64;
                let writes = WRITES.contains(&position);
                let boxed = writes || position == ASKS;
                let key_seed = if writes { 7 } else { seed + 10_000 };
                let key = unit(numbers(key_seed, k));
                let query_seed = if boxed { 7 } else { seed + 20_000 };
                let query: Vec<f64> = unit(numbers(query_seed, k))
                    .iter()
                    .map(|x| x / (k as f64).sqrt())
                    .collect();
                let value = numbers(seed + 30_000, k);
                let beta = if writes {
                    0.96
                } else {
                    0.15 + 0.15 * numbers(seed, 1)[0].abs()
                };
                // Half-lives from a token to a thousand, shorter in the first layers.
                let gates: Vec<f64> = (0..k)
                    .map(|d| {
                        let life = 10.0_f64.powf(0.2 * l as f64 + 3.0 * d as f64 / k as f64);
                        -std::f64::consts::LN_2 / life
                            * (1.0 + 0.3 * numbers(seed + d as u64, 1)[0])
                    })
                    .collect();
                let state = &mut states[l * heads + head];
                for (row, gate) in state.chunks_exact_mut(k).zip(&gates) {
                    row.iter_mut().for_each(|s| *s *= gate.exp());
                }
                let error: Vec<f64> = (0..k)
                    .map(|e| value[e] - (0..k).map(|d| key[d] * state[d * k + e]).sum::<f64>())
                    .collect();
                for d in 0..k {
                    for e in 0..k {
                        state[d * k + e] += beta * key[d] * error[e];
                    }
                }
                let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                kda.heads.push(KdaHeadTrace {
                    state: length(state) as f32,
                    write: (beta * length(&error)) as f32,
                    error: length(&error) as f32,
                    decay: (gates.iter().map(|gate| gate.exp()).sum::<f64>() / k as f64) as f32,
                    beta: beta as f32,
                    gate: 0.5,
                });
                if (layer, head) == (HEAD.layer, HEAD.head) {
                    let gate = numbers(seed + 40_000, k);
                    frame.state = Some(StateTrace {
                        layer,
                        head,
                        state: narrow(state),
                        width: k,
                        decay: gates.iter().map(|gate| gate.exp() as f32).collect(),
                        query: narrow(&query),
                        key: narrow(&key),
                        value: narrow(&value),
                        beta: beta as f32,
                        gate: gate.iter().map(|x| (0.5 + 0.5 * x) as f32).collect(),
                        undone: false,
                    });
                }
                kda.gates.extend(narrow(&gates));
            }
            frame.kda.push(kda);
        }
        for layer in 1..5 {
            let draw = numbers((position * 8 + layer) as u64, 2);
            let first = ((draw[0].abs() * draw[0].abs()) * 8.0) as u32 % 8;
            let second = (first + 1 + (draw[1].abs() * 7.0) as u32 % 7) % 8;
            frame.experts.push(ExpertTrace {
                layer,
                experts: vec![first, second],
                weights: vec![1.6, 0.846],
            });
        }
        let score = |at: usize| {
            let both = position == ASKS && WRITES.contains(&at);
            (if both { 4.0 } else { 0.0 } + numbers((position * 99 + at) as u64, 1)[0]).exp()
        };
        let scores: Vec<f64> = (0..=position).map(score).collect();
        let sum: f64 = scores.iter().sum();
        frame.attention = Some(AttentionTrace {
            layer: MLA.layer,
            head: MLA.head,
            weights: scores.iter().map(|score| (score / sum) as f32).collect(),
        });
        let times = [
            ("linear", 0.41),
            ("experts", 0.22),
            ("kda_recurrence", 0.11),
            ("trace_kda", 0.03),
            ("mla_attention", 0.05),
            ("select", 0.09),
            ("rms_norm", 0.012),
            ("short_conv", 0.02),
            ("route", 0.018),
            ("gated_norm", 0.01),
            ("embed", 0.001),
            ("add", 0.004),
        ];
        frame.operations = times
            .map(|(operation, milliseconds)| OperationTime {
                operation,
                milliseconds,
            })
            .to_vec();
        frames.push(frame);
    }
    frames
}

pub fn story_tokens() -> Vec<TokenText> {
    let token = |(i, text): (usize, &&str)| TokenText {
        id: 300 + i as u32,
        text: (*text).to_owned(),
        answer: i >= ASKS,
        logprob: (i >= ASKS).then_some(-0.3),
        template: i == 0,
        ..TokenText::default()
    };
    STORY.iter().enumerate().map(token).collect()
}

pub fn measures() -> Measures {
    let intervals =
        (0..60_u16).map(|i| 14.0 + 3.0 * (f32::from(i) * 0.7).sin() + f32::from(i) * 0.02);
    Measures {
        answers: vec![AnswerMeasure {
            prompt_tokens: ASKS,
            cached_tokens: 0,
            first_token: Some(231.4),
            intervals: intervals.collect(),
            traced: true,
            finished: true,
        }],
        context_used: STORY.len(),
    }
}

/// The story under one view, with a token selected.
pub fn story(name: &str, token: Option<usize>) -> Scene {
    let mut history = History::default();
    history.set_tokens(story_tokens());
    story_frames()
        .into_iter()
        .for_each(|frame| history.push_frame(frame));
    let rank = |layer: usize| (layer, vec![2.0 + layer as f32, 4.5 - layer as f32 / 2.0]);
    history.set_ranks(HeadRanks {
        position: STORY.len(),
        layers: [0, 1, 2, 4].map(rank).to_vec(),
    });
    Scene {
        history,
        facts: Some(facts()),
        measures: measures(),
        selection: Selection {
            token,
            kda: Some(HEAD),
            mla: Some(MLA),
        },
        view: view(name),
        wishes: Vec::new(),
    }
}
