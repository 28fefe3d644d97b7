//! The views: panels that can be placed anywhere, which all show one selection.
//!
//! A view draws the data of its context and changes only the selection and its own settings.

mod attention;
mod bars;
pub mod colour_map;
mod experts;
pub mod format;
mod half_lives;
mod heads;
mod heat_map;
mod matrix;
mod remembers;
mod state;
mod throughput;
mod tokens;
pub mod tour;

use eframe::egui;
use kimi_linear::engine::UndoWrite;

use crate::facts::ModelFacts;
use crate::history::History;
use crate::measure::Measures;
use crate::selection::Selection;
use crate::theme::Colours;

/// A view's explanation, behind its question mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Help {
    /// What it shows.
    pub shows: &'static str,
    /// The formula behind its numbers.
    pub formula: &'static str,
    /// What to look for.
    pub look_for: &'static str,
}

/// The data that views draw.
pub struct ViewContext<'a> {
    /// The model, once one is loaded.
    pub model: Option<&'a ModelFacts>,
    /// Tokens and frames of the conversation that is shown.
    pub history: &'a History,
    /// The timings of answers.
    pub measures: &'a Measures,
    /// The selection.
    pub selection: &'a mut Selection,
    /// The colours of the appearance.
    pub colours: &'a Colours,
    /// What a view wants of the app.
    pub wishes: &'a mut Vec<Wish>,
}

/// What a view cannot do itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Bring a view to the front.
    Show(&'static str),
    /// Select the head with the highest score after every answer.
    Follow,
    /// Answer the last question with a write undone, and without.
    Undo(UndoWrite),
}

/// A panel.
pub trait View {
    /// Its name, on its tab, which also identifies it in a saved layout.
    fn name(&self) -> &'static str;

    /// Its explanation.
    fn help(&self) -> Help;

    /// Draws it into the available area, which may be empty.
    fn ui(&mut self, ui: &mut egui::Ui, context: &mut ViewContext<'_>);
}

/// All views, in the order of their tabs.
#[must_use]
pub fn all() -> Vec<Box<dyn View>> {
    vec![
        Box::<remembers::Remembers>::default(),
        Box::<tokens::Tokens>::default(),
        Box::<state::State>::default(),
        Box::<heads::Heads>::default(),
        Box::<half_lives::HalfLives>::default(),
        Box::<attention::Attends>::default(),
        Box::<experts::Experts>::default(),
        Box::<throughput::Throughput>::default(),
    ]
}

/// Whether a panel is too small to show anything.
fn no_room(ui: &egui::Ui) -> bool {
    let room = ui.available_size();
    room.x < 60.0 || room.y < 40.0
}

/// A sentence in place of a picture that cannot be drawn.
fn placeholder(ui: &mut egui::Ui, text: &str) {
    ui.vertical_centered(|ui| {
        ui.add_space((ui.available_height() / 3.0).min(80.0));
        ui.weak(text);
    });
}
