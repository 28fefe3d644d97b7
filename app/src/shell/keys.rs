//! Keyboard shortcuts: one table for the help window and for input.

use eframe::egui::{self, Event, Key, KeyboardShortcut, Modifiers, Ui};

use super::action::{Action, Step, Window};
use super::{App, Running};
use crate::views;

/// A shortcut.
pub struct Shortcut {
    /// The keys.
    pub keys: KeyboardShortcut,
    /// Its description.
    pub words: String,
    /// The action.
    pub action: Action,
}

const COMMAND: Modifiers = Modifiers::COMMAND;
const ALT: Modifiers = Modifiers::ALT;

/// All shortcuts except Enter and Shift+Enter, which the text field handles, and Escape, which closes or stops something.
/// With a server there are no views, and no model to load.
#[must_use]
pub fn shortcuts(remote: bool) -> Vec<Shortcut> {
    let mut all = table();
    let digits = [
        Key::Num1,
        Key::Num2,
        Key::Num3,
        Key::Num4,
        Key::Num5,
        Key::Num6,
        Key::Num7,
        Key::Num8,
    ];
    for (key, view) in digits.into_iter().zip(views::all()) {
        all.push(Shortcut {
            keys: KeyboardShortcut::new(COMMAND, key),
            words: format!("View: {}", view.name()),
            action: Action::View(view.name().to_owned()),
        });
    }
    all.retain(|shortcut| !remote || !shortcut.action.is_local());
    // A tab is closed by its browser.
    all.retain(|shortcut| cfg!(not(target_arch = "wasm32")) || shortcut.action != Action::Quit);
    all
}

/// All shortcuts but those of the single views.
#[rustfmt::skip]
fn table() -> Vec<Shortcut> {
    const NONE: Modifiers = Modifiers::NONE;
    let table = [
        (COMMAND, Key::N, "New chat", Action::NewChat),
        (COMMAND, Key::J, "Next chat", Action::NextChat),
        (NONE, Key::F2, "Rename this chat", Action::EditThisTitle),
        (COMMAND, Key::Q, "Quit", Action::Quit),
        (COMMAND, Key::R, "Answer the last question again", Action::Regenerate),
        (COMMAND, Key::E, "Edit the last question", Action::Edit(usize::MAX)),
        (COMMAND, Key::S, "Save or open a chat", Action::Toggle(Window::Files)),
        (COMMAND, Key::M, "Model and device", Action::Toggle(Window::Model)),
        (COMMAND, Key::G, "Sampling and system prompt", Action::Toggle(Window::Sampling)),
        (COMMAND, Key::B, "Show or hide the list of chats", Action::Sidebar),
        (COMMAND, Key::L, "Show or hide the log", Action::Log),
        (COMMAND, Key::D, "Dark or light", Action::Theme),
        (COMMAND, Key::T, "Trace this chat's last tokens again", Action::Trace),
        (NONE, Key::F1, "This help", Action::Toggle(Window::Help)),
        (ALT, Key::ArrowLeft, "Token before", Action::Token(Step::Back)),
        (ALT, Key::ArrowRight, "Token after", Action::Token(Step::On)),
        (ALT, Key::Home, "First token", Action::Token(Step::First)),
        (ALT, Key::End, "Follow the newest token", Action::Token(Step::Last)),
        (ALT, Key::ArrowUp, "KDA layer before", Action::Layer(Step::Back)),
        (ALT, Key::ArrowDown, "KDA layer after", Action::Layer(Step::On)),
        (ALT, Key::PageUp, "Head before", Action::Head(Step::Back)),
        (ALT, Key::PageDown, "Head after", Action::Head(Step::On)),
        (COMMAND, Key::Num9, "All panels side by side", Action::Spread),
        (COMMAND, Key::Num0, "Reset layout", Action::Arrange),
    ];
    let shortcut = |(modifiers, key, words, action): (Modifiers, Key, &str, Action)| Shortcut {
        keys: KeyboardShortcut::new(modifiers, key),
        words: words.to_owned(),
        action,
    };
    table.into_iter().map(shortcut).collect()
}

/// The actions of the pressed keys; `escape` is what Escape closes or stops at the moment.
pub fn pressed(ui: &Ui, table: &[Shortcut], escape: Option<Action>, actions: &mut Vec<Action>) {
    ui.input_mut(|input| {
        for shortcut in table {
            if input.consume_shortcut(&shortcut.keys) {
                actions.push(shortcut.action.clone());
            }
        }
        if let Some(stop) = escape
            && input.consume_key(Modifiers::NONE, Key::Escape)
        {
            actions.push(stop);
        }
    });
}

/// Whether Enter was pressed without Shift. The modifiers are those of the key itself: Shift may have been released within
/// the same frame. What was typed after Enter belongs to the next message, and comes again in the next frame.
pub(super) fn enter(ctx: &egui::Context, focused: bool) -> bool {
    let id = egui::Id::unique("typed after Enter");
    let later: Option<Vec<Event>> = ctx.data_mut(|data| data.remove_temp(id));
    if !focused {
        return false;
    }
    let rest = ctx.input_mut(|input| {
        input.events.splice(0..0, later.unwrap_or_default());
        let at = input.events.iter().position(sends)?;
        let mut after = input.events.split_off(at);
        after.remove(0);
        let typed =
            |event: &Event| matches!(event, Event::Text(_) | Event::Paste(_) | Event::Key { .. });
        let (rest, others): (Vec<Event>, Vec<Event>) = after.into_iter().partition(typed);
        input.events.extend(others);
        Some(rest)
    });
    let Some(rest) = rest else { return false };
    if !rest.is_empty() {
        ctx.data_mut(|data| data.insert_temp(id, rest));
        ctx.request_repaint();
    }
    true
}

/// Whether an event is Enter without modifiers.
fn sends(event: &Event) -> bool {
    matches!(
        event,
        Event::Key {
            key: Key::Enter,
            pressed: true,
            modifiers,
            ..
        } if modifiers.is_none()
    )
}

impl App {
    /// What Escape closes or stops; menus close by themselves.
    pub(super) fn escape(&self, ctx: &egui::Context) -> Option<Action> {
        if egui::Popup::is_any_open(ctx) {
            return None;
        }
        if self.list.renaming.is_some() {
            return Some(Action::LeaveTitle);
        }
        if let Some(window) = self.windows.last() {
            return Some(Action::Toggle(*window));
        }
        let chat = self.chat();
        if chat.busy() {
            return Some(Action::Stop);
        }
        if matches!(self.running, Running::Loading { .. }) {
            return Some(Action::StopLoading);
        }
        chat.editing.map(|_| Action::CancelEdit)
    }
}
