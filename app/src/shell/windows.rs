//! The windows over the panels: model and device, sampling, files, help.

use std::path::{Path, PathBuf};

use eframe::egui::{self, DragValue, Grid, RichText, ScrollArea, Slider, TextEdit, Ui};

use super::action::{Action, Pick, Window};
use super::keys::Shortcut;
use crate::facts::{Fit, ModelFacts, bytes};
use crate::problem::Problem;
use crate::session::Estimate;
use crate::settings::{BackendName, ModelChoice, SamplingChoice, Settings};
use crate::theme::Colours;
use crate::views;

/// What is known of a model's folder before it is loaded.
#[derive(Default)]
pub(super) struct Inspected {
    /// The folder and the context of the last request.
    pub(super) asked: Option<(PathBuf, usize)>,
    /// Its result.
    pub(super) result: Option<Result<Estimate, Problem>>,
}

/// A window with a close button, at most as large as the screen.
pub(super) fn window(
    ui: &Ui,
    which: Window,
    title: &str,
    open: &mut Vec<Window>,
    contents: impl FnOnce(&mut Ui),
) {
    if !open.contains(&which) {
        return;
    }
    let mut stays = true;
    let room = ui.ctx().content_rect().size();
    // All keys should be visible at once.
    let height = match which {
        Window::Help => (room.y - 140.0).max(60.0),
        _ => 420.0_f32.min(room.y),
    };
    egui::Window::new(title)
        .open(&mut stays)
        .collapsible(false)
        .default_width(560.0_f32.min(room.x - 20.0))
        .default_height(height)
        .max_height((room.y - 80.0).max(60.0))
        .vscroll(true)
        .default_pos([(room.x / 2.0 - 290.0).max(10.0), 60.0_f32.min(room.y / 4.0)])
        .show(ui.ctx(), contents);
    if !stays {
        open.retain(|other| *other != which);
    }
}

/// The window for model and device, with the estimate of memory.
pub(super) fn model(
    ui: &mut Ui,
    colours: &Colours,
    choice: &mut ModelChoice,
    folder: &mut String,
    loaded: Option<&ModelFacts>,
    inspected: &Inspected,
    busy: bool,
    actions: &mut Vec<Action>,
) {
    if let Some(facts) = loaded {
        let device = &facts.device;
        ui.label(format!(
            "Running: {} on {} ({}), {} tokens of context",
            facts.name, device.name, device.backend, facts.context
        ));
        ui.separator();
    }
    ui.label("The model: a folder with config.json, tokenizer files and safetensors weights, or a GGUF file. Empty is the demo model.");
    ui.horizontal(|ui| {
        let width = (ui.available_width() - 90.0).max(60.0);
        let field = ui.add(
            TextEdit::singleline(folder)
                .desired_width(width)
                .hint_text("the demo model"),
        );
        field
            .widget_info(|| egui::WidgetInfo::labeled(egui::Role::TextInput, true, "Model folder"));
        if ui.button("Browse…").clicked() {
            actions.push(Action::Pick(Pick::Folder));
        }
    });
    let text = folder.trim();
    choice.folder = (!text.is_empty()).then(|| PathBuf::from(text));
    ui.horizontal(|ui| {
        let label = ui.label("Context to make room for");
        ui.add(
            DragValue::new(&mut choice.context)
                .range(64..=16_777_216)
                .speed(256.0)
                .suffix(" tokens"),
        )
        .labelled_by(label.id);
    });
    ui.add_space(4.0);
    match &inspected.result {
        None => {
            ui.horizontal(|ui| {
                ui.spinner();
                ui.label("Looking at the folder and the devices");
            });
        }
        Some(Err(problem)) => {
            ui.label(RichText::new(&problem.sentence).color(colours.error));
        }
        Some(Ok(estimate)) => devices(ui, colours, choice, estimate),
    }
    ui.add_space(6.0);
    ui.horizontal(|ui| {
        let can = !busy && !matches!(inspected.result, Some(Err(_)));
        if ui.add_enabled(can, egui::Button::new("Load")).clicked() {
            actions.push(Action::Load);
        }
        if busy {
            ui.spinner();
            ui.label("Loading");
        }
    });
}

fn devices(ui: &mut Ui, colours: &Colours, choice: &mut ModelChoice, estimate: &Estimate) {
    ui.label(format!(
        "{} parameters, {} of them active for a token; contexts of up to {} tokens",
        count(estimate.parameters),
        count(estimate.active),
        estimate.longest
    ));
    ui.add_space(4.0);
    Grid::new("devices")
        .striped(true)
        .spacing([10.0, 4.0])
        .show(ui, |ui| {
            for head in [
                "Device",
                "Weights",
                "States",
                "Latents",
                "Scratch",
                "Sum",
                "Will it fit?",
            ] {
                ui.label(RichText::new(head).strong());
            }
            ui.end_row();
            let auto = choice.backend == BackendName::Auto;
            if ui
                .radio(auto, "auto")
                .on_hover_text("A GPU if there is one, else the CPU")
                .clicked()
            {
                (choice.backend, choice.device) = (BackendName::Auto, None);
            }
            for _ in 0..6 {
                ui.label("");
            }
            ui.end_row();
            for (device, memory) in &estimate.devices {
                let backend = BackendName::of(device.backend);
                let chosen =
                    choice.backend == backend && choice.device.unwrap_or(0) == device.index;
                let name = format!("{} {}", device.backend, device.index);
                if ui.radio(chosen, name).on_hover_text(&device.name).clicked() {
                    (choice.backend, choice.device) = (backend, Some(device.index));
                }
                for part in [
                    memory.weights,
                    memory.states,
                    memory.latents,
                    memory.activations,
                    memory.total(),
                ] {
                    ui.label(bytes(part));
                }
                let there = device.memory_bytes.map(bytes).unwrap_or_default();
                let (text, colour) = match Fit::of(memory, device) {
                    Fit::Fits => (format!("fits in {there}"), None),
                    Fit::Tight => (format!("tight in {there}"), Some(colours.accent)),
                    Fit::TooLarge => (format!("too large for {there}"), Some(colours.error)),
                    Fit::Unknown => ("the device does not say".to_owned(), Some(colours.faint)),
                };
                let text = RichText::new(text);
                ui.label(colour.into_iter().fold(text, RichText::color))
                    .on_hover_text(&device.name);
                ui.end_row();
            }
        });
}

/// A count for display.
fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        0..1_000_000 => format!("{:.0} k", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", value / 1e6),
        _ => format!("{:.1} B", value / 1e9),
    }
}

/// The window for sampling and the system prompt.
pub(super) fn sampling(
    ui: &mut Ui,
    settings: &mut Settings,
    system: Option<&mut String>,
    remote: bool,
) {
    let choice = &mut settings.sampling;
    Grid::new("sampling").num_columns(2).spacing([14.0, 6.0]).show(ui, |ui| {
        let mut row = |name: &str, hover: &str, add: &mut dyn FnMut(&mut Ui) -> egui::Response| {
            let label = ui.label(name).on_hover_text(hover);
            add(ui).labelled_by(label.id);
            ui.end_row();
        };
        row("Temperature", "Divides the logits; 0 always takes the likeliest token", &mut |ui| {
            ui.add(Slider::new(&mut choice.temperature, 0.0..=2.0))
        });
        row("Top-k", "Draws from the k likeliest tokens only; 0 is all", &mut |ui| {
            ui.add(Slider::new(&mut choice.top_k, 0..=200))
        });
        row("Top-p", "Draws from the likeliest tokens that together reach this probability; 1 is all", &mut |ui| {
            ui.add(Slider::new(&mut choice.top_p, 0.01..=1.0))
        });
        row("Min-p", "Draws only from tokens that are at least this part as likely as the likeliest; 0 is all", &mut |ui| {
            ui.add(Slider::new(&mut choice.min_p, 0.0..=1.0))
        });
        row("Repetition penalty", "Above 1, tokens that were there already become less likely", &mut |ui| {
            ui.add(Slider::new(&mut choice.repetition_penalty, 0.5..=2.0))
        });
        row("Presence penalty", "Taken off the logit of each token that the answer has", &mut |ui| {
            ui.add(Slider::new(&mut choice.presence_penalty, -2.0..=2.0))
        });
        row("Frequency penalty", "Taken off for each time that the answer has it", &mut |ui| {
            ui.add(Slider::new(&mut choice.frequency_penalty, -2.0..=2.0))
        });
        row("Longest answer", "Tokens", &mut |ui| {
            ui.add(DragValue::new(&mut choice.max_tokens).range(1..=1_000_000).speed(16.0))
        });
        let label = ui.label("Seed").on_hover_text("One seed and one prompt give the same answer");
        ui.horizontal(|ui| {
            let mut fixed = choice.seed.is_some();
            ui.checkbox(&mut fixed, "fixed");
            let mut seed = choice.seed.unwrap_or_default();
            ui.add_enabled(fixed, DragValue::new(&mut seed)).labelled_by(label.id);
            choice.seed = fixed.then_some(seed);
        });
        ui.end_row();
    });
    if ui.button("As at first").clicked() {
        *choice = SamplingChoice::default();
    }
    ui.separator();
    ui.label("System prompt of new chats");
    let field = ui.add(
        TextEdit::multiline(&mut settings.system)
            .desired_rows(3)
            .desired_width(f32::INFINITY),
    );
    field.widget_info(|| egui::WidgetInfo::labeled(egui::Role::TextInput, true, "System prompt"));
    match system {
        Some(system) => {
            if *system != settings.system && ui.button("Use it in this chat too").clicked() {
                system.clone_from(&settings.system);
            }
        }
        None => {
            ui.weak("This chat has begun: its own system prompt stays as it was.");
        }
    }
    if remote {
        return;
    }
    ui.separator();
    ui.checkbox(&mut settings.trace, "Feed the views (trace every token)")
        .on_hover_text(
            "Without it answers come at the model's full speed, and the views stand still",
        );
    ui.horizontal(|ui| {
        let label = ui.label("Tokens of a prompt to trace, from its end");
        ui.add_enabled(
            settings.trace,
            DragValue::new(&mut settings.traced_prompt).range(0..=4096),
        )
        .labelled_by(label.id)
        .on_hover_text(
            "Traced tokens run one by one, which takes longer than reading a prompt in segments",
        );
    });
}

/// The window for saving and opening.
pub(super) fn files(
    ui: &mut Ui,
    path: &mut String,
    saved: &[PathBuf],
    can_save: bool,
    actions: &mut Vec<Action>,
) {
    ui.label("A chat is saved with the model's memory of it, so that a long one reopens at once.");
    ui.horizontal(|ui| {
        let width = (ui.available_width() - 90.0).max(60.0);
        let field = ui.add(TextEdit::singleline(path).desired_width(width));
        field.widget_info(|| egui::WidgetInfo::labeled(egui::Role::TextInput, true, "File"));
        if ui.button("Browse…").clicked() {
            actions.push(Action::Pick(if can_save { Pick::Save } else { Pick::Open }));
        }
    });
    let file = Path::new(path.trim()).to_owned();
    let named = !path.trim().is_empty();
    ui.horizontal(|ui| {
        let hover = "Only a chat with an answer can be saved, and only while none is being written";
        let save = ui.add_enabled(named && can_save, egui::Button::new("Save this chat"));
        if save.on_disabled_hover_text(hover).clicked() {
            actions.push(Action::Save(file.clone()));
        }
        if ui
            .add_enabled(named, egui::Button::new("Open that file"))
            .clicked()
        {
            actions.push(Action::Open(file.clone()));
        }
        if ui.button("Open another…").clicked() {
            actions.push(Action::Pick(Pick::Open));
        }
    });
    if saved.is_empty() {
        return;
    }
    ui.separator();
    ui.label(RichText::new("Saved chats").strong());
    ScrollArea::vertical().max_height(240.0).show(ui, |ui| {
        for file in saved {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            if ui
                .button(name)
                .on_hover_text(file.display().to_string())
                .clicked()
            {
                actions.push(Action::Open(file.clone()));
            }
        }
    });
}

/// The window for keys and explanations of the views.
pub(super) fn help(ui: &mut Ui, keys: &[Shortcut], remote: bool) {
    ui.label(RichText::new("Keys").strong());
    ui.columns(2, |columns| {
        let half = (keys.len() + 2).div_ceil(2);
        let mut rows = vec![
            ("Enter".to_owned(), "Send".to_owned()),
            ("Shift+Enter".to_owned(), "New line".to_owned()),
            (
                "Escape".to_owned(),
                "Stop the answer, or loading".to_owned(),
            ),
        ];
        rows.extend(keys.iter().map(|key| {
            let text = columns[0].ctx().format_shortcut(&key.keys);
            (text, key.words.clone())
        }));
        for (column, rows) in rows.chunks(half.max(1)).take(2).enumerate() {
            let ui = &mut columns[column];
            Grid::new(column)
                .num_columns(2)
                .spacing([10.0, 3.0])
                .show(ui, |ui| {
                    for (key, words) in rows {
                        ui.label(RichText::new(key).monospace());
                        ui.label(words);
                        ui.end_row();
                    }
                });
        }
    });
    if remote {
        return;
    }
    ui.separator();
    ui.label(RichText::new("Views").strong());
    for view in views::all() {
        let help = view.help();
        ui.collapsing(view.name(), |ui| help_ui(ui, &help));
    }
}

/// A view's explanation.
pub(super) fn help_ui(ui: &mut Ui, help: &views::Help) {
    ui.label(help.shows);
    ui.label(RichText::new(help.formula).monospace());
    ui.label(RichText::new(help.look_for).italics());
}
