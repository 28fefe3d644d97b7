//! The views: each a panel that can be placed anywhere, all showing one selection.
//!
//! A view draws what is in its context and changes nothing but the selection and its own settings.

use eframe::egui;

use crate::facts::ModelFacts;
use crate::history::History;
use crate::measure::Measures;
use crate::selection::Selection;
use crate::theme::Colours;

/// What a view says of itself, behind its question mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Help {
    /// What it shows.
    pub shows: &'static str,
    /// The formula behind its numbers.
    pub formula: &'static str,
    /// What to look for.
    pub look_for: &'static str,
}

/// What views draw from.
pub struct ViewContext<'a> {
    /// The model, once one is loaded.
    pub model: Option<&'a ModelFacts>,
    /// Tokens and frames of the conversation that is shown.
    pub history: &'a History,
    /// What answers took.
    pub measures: &'a Measures,
    /// What is selected.
    pub selection: &'a mut Selection,
    /// The colours of the appearance.
    pub colours: &'a Colours,
}

/// A panel.
pub trait View {
    /// Its name, on its tab: it is also how a saved arrangement finds it again.
    fn name(&self) -> &'static str;

    /// What it shows, and how to read it.
    fn help(&self) -> Help;

    /// Draws it into whatever room it has, which may be none.
    fn ui(&mut self, ui: &mut egui::Ui, context: &mut ViewContext<'_>);
}

/// All views, in the order of their tabs.
#[must_use]
pub fn all() -> Vec<Box<dyn View>> {
    Vec::new()
}
