//! The windows over the panels: model and device, sampling, files, help.

use std::path::PathBuf;

use eframe::egui::{self, DragValue, Grid, RichText, Slider, TextEdit, Ui};

use super::action::{Action, Window};
use super::keys::Shortcut;
use super::{App, Running, files};
use crate::facts::{Fit, ModelFacts, bytes};
use crate::problem::Problem;
use crate::session::Estimate;
use crate::settings::{BackendName, ModelChoice, Preset, SamplingChoice, Settings};
use crate::theme::{self, Colours};
use crate::views;

/// The page on delta-rule memories.
pub(super) const DELTA_RULE: &str = include_str!("../../../docs/delta-rule-memory.md");

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
    // Everything in a window should be visible at once, where the screen has room for it.
    let height = match which {
        Window::Help | Window::DeltaRule => (room.y - 140.0).max(60.0),
        Window::Sampling => 480.0_f32.min(room.y),
        Window::Model | Window::Files => 340.0_f32.min(room.y),
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
    recent: &[PathBuf],
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
    folder_ui(ui, recent, folder, choice, actions);
    ui.horizontal(|ui| {
        let label = ui.label("Context").on_hover_text(
            "Memory is reserved for a conversation of this length; at most the model's own maximum",
        );
        let longest = match &inspected.result {
            Some(Ok(estimate)) => estimate.longest,
            _ => 16_777_216,
        };
        let mut context = choice.context.min(longest);
        let field = DragValue::new(&mut context)
            .range(64.min(longest)..=longest)
            .speed(256.0)
            .suffix(" tokens");
        // The choice stays as it is for models with longer contexts.
        if ui.add(field).labelled_by(label.id).changed() {
            choice.context = context;
        }
    });
    ui.add_space(4.0);
    match &inspected.result {
        None => {
            ui.horizontal(|ui| {
                theme::busy(ui, None);
                ui.label("Reading the files and asking for devices");
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
            theme::busy(ui, None);
            ui.label("Loading");
        }
    });
}

/// What can be written in the field for the model.
const MODEL: &str = if cfg!(target_arch = "wasm32") {
    "The address of a GGUF file, or of a folder with config.json, tokenizer files and safetensors weights; or choose them on this computer: they are read where they are, and not sent anywhere. Empty is the demo model."
} else {
    "A folder with config.json, tokenizer files and safetensors weights, or a GGUF file. Empty is the demo model. You can also drop it on the window."
};

/// The field for the model's folder or file, and other ways to fill it.
fn folder_ui(
    ui: &mut Ui,
    recent: &[PathBuf],
    folder: &mut String,
    choice: &mut ModelChoice,
    actions: &mut Vec<Action>,
) {
    use super::action::Pick;
    ui.label(MODEL);
    let field = ui.add(
        TextEdit::singleline(folder)
            .desired_width(f32::INFINITY)
            .hint_text("the demo model"),
    );
    field.widget_info(|| egui::WidgetInfo::labeled(egui::Role::TextInput, true, "Model folder"));
    ui.horizontal_wrapped(|ui| {
        if ui.button("Choose a folder…").clicked() {
            actions.push(Action::Pick(Pick::Folder));
        }
        if ui.button("Choose a GGUF…").clicked() {
            actions.push(Action::Pick(Pick::Gguf));
        }
        ui.menu_button("Recent", |ui| {
            if ui.button("The demo model").clicked() {
                folder.clear();
                ui.close();
            }
            for path in recent {
                let name = path.file_name().unwrap_or(path.as_os_str());
                let button = ui.button(name.to_string_lossy());
                if button.on_hover_text(path.display().to_string()).clicked() {
                    *folder = path.display().to_string();
                    ui.close();
                }
            }
        });
    });
    // Half an address is not to be asked for.
    if cfg!(target_arch = "wasm32") && field.has_focus() {
        return;
    }
    let text = folder.trim();
    choice.folder = (!text.is_empty()).then(|| PathBuf::from(text));
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
            for (head, hover) in HEADS {
                let label = ui.label(RichText::new(head).strong());
                if !hover.is_empty() {
                    label.on_hover_text(hover);
                }
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
                let name = short(
                    &device.name,
                    &format!("{} {}", device.backend, device.index),
                );
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

/// A device's name, cut to the width of a column, with its number in the backend.
fn short(name: &str, number: &str) -> String {
    const MOST: usize = 22;
    let cut: String = name.chars().take(MOST).collect();
    let more = if cut.len() < name.len() { "…" } else { "" };
    format!("{}{more} ({number})", cut.trim_end())
}

/// The columns of the table of devices.
const HEADS: [(&str, &str); 7] = [
    ("Device", ""),
    ("Weights", "The model's parameters, as they are stored"),
    (
        "States",
        "The KDA layers' memory of a conversation: of fixed size, however long it is; some for each of several chats",
    ),
    (
        "Latents",
        "The attention layers' memory of a conversation: it grows with each token",
    ),
    ("Scratch", "Room for the numbers of one step"),
    ("Sum", ""),
    ("Will it fit?", "Compared with the device's memory"),
];

/// A count for display.
fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        0..1_000_000 => format!("{:.0} k", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", value / 1e6),
        _ => format!("{:.1} B", value / 1e9),
    }
}

/// The presets: choosing one, saving the present parameters as one, deleting one.
fn presets(ui: &mut Ui, settings: &mut Settings) {
    let id = egui::Id::unique("preset name");
    ui.horizontal_wrapped(|ui| {
        preset_menu(ui, settings);
        let mut name = ui.data_mut(|data| data.get_temp::<String>(id).unwrap_or_default());
        let field = ui.add(
            TextEdit::singleline(&mut name)
                .desired_width(120.0)
                .hint_text("a new name"),
        );
        field.widget_info(|| {
            egui::WidgetInfo::labeled(egui::Role::TextInput, true, "Name of the preset")
        });
        let save = egui::Button::new("Save as preset");
        let hover = "Saves these parameters and the system prompt under this name";
        let named = !name.trim().is_empty();
        if ui.add_enabled(named, save).on_hover_text(hover).clicked() {
            let preset = Preset {
                name: name.trim().to_owned(),
                sampling: settings.sampling.clone(),
                system: Some(settings.system.clone()),
            };
            settings.presets.retain(|other| other.name != preset.name);
            settings.presets.push(preset);
            name.clear();
        }
        let own = settings.preset();
        let own = own.filter(|own| settings.presets.iter().any(|preset| preset.name == *own));
        if let Some(own) = own
            && ui
                .button("Delete")
                .on_hover_text("Deletes this preset")
                .clicked()
        {
            settings.presets.retain(|preset| preset.name != own);
        }
        ui.data_mut(|data| data.insert_temp(id, name));
    });
}

/// The menu of presets; it shows the name of the one that is set.
pub(super) fn preset_menu(ui: &mut Ui, settings: &mut Settings) {
    let name = settings.preset().unwrap_or_else(|| "custom".to_owned());
    ui.menu_button(format!("Preset: {name}"), |ui| {
        let all = Preset::built_in().into_iter();
        for preset in all.chain(settings.presets.clone()) {
            if ui.button(&preset.name).clicked() {
                settings.apply(&preset);
                ui.close();
            }
        }
    });
}

/// The window for sampling and the system prompt.
pub(super) fn sampling(ui: &mut Ui, settings: &mut Settings, begun: bool, remote: bool) {
    presets(ui, settings);
    ui.separator();
    let choice = &mut settings.sampling;
    Grid::new("sampling").num_columns(2).spacing([14.0, 6.0]).show(ui, |ui| {
        let mut row = |name: &str, hover: &str, add: &mut dyn FnMut(&mut Ui) -> egui::Response| {
            let label = ui.label(name).on_hover_text(hover);
            add(ui).labelled_by(label.id);
            ui.end_row();
        };
        row("Temperature", "0 is greedy: always the likeliest token. Higher is more varied", &mut |ui| {
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
        row("Max tokens", "Maximum length of an answer", &mut |ui| {
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
    if ui.button("Reset").clicked() {
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
    if begun {
        ui.weak("This chat has begun: it keeps its system prompt.");
    }
    if remote {
        return;
    }
    ui.separator();
    ui.checkbox(&mut settings.trace, "Record every token for the views")
        .on_hover_text("Without it answers come at full speed, and the views stand still");
    ui.horizontal(|ui| {
        let label = ui.label("Prompt tokens to record, from its end");
        ui.add_enabled(
            settings.trace,
            DragValue::new(&mut settings.traced_prompt).range(0..=4096),
        )
        .labelled_by(label.id)
        .on_hover_text(
            "Recorded tokens run one by one, which takes longer than reading a prompt in segments",
        );
    });
}

/// The window for keys and explanations of the views.
pub(super) fn help(ui: &mut Ui, keys: &[Shortcut], remote: bool, actions: &mut Vec<Action>) {
    let page = ui.button("What is a delta-rule memory?");
    if page
        .on_hover_text("A page of plain words, with a glossary")
        .clicked()
    {
        actions.push(Action::Toggle(Window::DeltaRule));
    }
    ui.separator();
    ui.label(RichText::new("Keys").strong());
    ui.columns(2, |columns| {
        let half = (keys.len() + 2).div_ceil(2);
        let mut rows = vec![
            ("Enter".to_owned(), "Send".to_owned()),
            ("Shift+Enter".to_owned(), "New line".to_owned()),
            (
                "Escape".to_owned(),
                "Close a window; stop the answer, or loading".to_owned(),
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

impl App {
    /// Draws the open windows.
    pub(super) fn windows(&mut self, ui: &mut Ui, colours: &Colours, actions: &mut Vec<Action>) {
        let mut open = std::mem::take(&mut self.windows);
        let busy = matches!(self.running, Running::Loading { .. });
        let facts = match &self.running {
            Running::Model(facts) => Some(&**facts),
            _ => None,
        };
        let (settings, folder, inspected) = (&mut self.settings, &mut self.folder, &self.inspected);
        let recent = &settings.recent;
        window(ui, Window::Model, "Model and device", &mut open, |ui| {
            model(
                ui,
                colours,
                &mut settings.model,
                recent,
                folder,
                facts,
                inspected,
                busy,
                actions,
            );
        });
        let remote = self.session.remote();
        let at = self
            .chats
            .iter()
            .position(|chat| chat.id == self.current)
            .unwrap_or_default();
        let chat = &self.chats[at];
        let settings = &mut self.settings;
        window(ui, Window::Sampling, "Sampling", &mut open, |ui| {
            sampling(ui, settings, !chat.is_empty(), remote);
        });
        let can_save = !chat.busy() && chat.conversation.turns() > 0;
        let (file, saved) = (&mut self.file, &self.saved);
        let (keeper, state) = (self.list.keeper.as_ref(), &mut self.settings.keep_state);
        window(ui, Window::Files, "Save and open", &mut open, |ui| {
            files::files(ui, file, saved, can_save, actions);
            if let Some(keeper) = keeper {
                files::kept(ui, keeper, state, remote);
            }
        });
        let keys = &self.keys;
        window(ui, Window::Help, "Help", &mut open, |ui| {
            help(ui, keys, remote, actions);
        });
        let (page, cache) = (&mut self.page, &mut self.markdown);
        let title = "What is a delta-rule memory?";
        window(ui, Window::DeltaRule, title, &mut open, |ui| {
            page.ui(ui, cache);
        });
        self.windows = open;
        // In a page it may take a server's answer, which is not asked for at every step of a value that is being dragged.
        let dragged = cfg!(target_arch = "wasm32") && ui.input(|input| input.pointer.any_down());
        if self.windows.contains(&Window::Model) && !dragged {
            self.inspect();
        }
    }
}
