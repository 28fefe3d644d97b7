//! The keys that move the selection: left and right through tokens, up and down through layers, brackets through heads.

use eframe::egui::{Context, Key, Modifiers};
use kimi_linear::config::ModelConfig;
use kimi_linear::model::TraceHead;

use super::ViewContext;

/// A key with what it does, for a list of keys.
pub const KEYS: &[(&str, &str)] = &[
    ("Left, Right", "the token before, the token after"),
    ("Shift Left, Shift Right", "ten tokens back, ten on"),
    ("Home, End", "the first token, and following the newest"),
    ("Up, Down", "the KDA layer above, below"),
    ("[ and ]", "the KDA head before, after"),
    ("Shift Up, Shift Down", "the MLA layer above, below"),
    ("{ and }", "the MLA head before, after"),
];

/// Moves the selection by the keys that were pressed; to be called once a frame, before views are drawn. While text is
/// being typed or another widget has the keyboard, keys are its own.
pub fn navigate(egui: &Context, context: &mut ViewContext<'_>) {
    if egui.memory(|memory| memory.focused().is_some()) {
        return;
    }
    let pressed = |modifiers: Modifiers, key: Key| {
        egui.input_mut(|input| input.count_and_consume_key(modifiers, key)) as isize
    };
    // Those with a modifier first: a key without one matches them too.
    let shift = Modifiers::SHIFT;
    let mla = pressed(shift, Key::ArrowDown) - pressed(shift, Key::ArrowUp);
    let far = pressed(shift, Key::ArrowRight) - pressed(shift, Key::ArrowLeft);
    let mla_head = pressed(Modifiers::NONE, Key::CloseCurlyBracket)
        + pressed(shift, Key::CloseBracket)
        - pressed(Modifiers::NONE, Key::OpenCurlyBracket)
        - pressed(shift, Key::OpenBracket);
    let none = Modifiers::NONE;
    let tokens = pressed(none, Key::ArrowRight) - pressed(none, Key::ArrowLeft) + 10 * far;
    let kda = pressed(none, Key::ArrowDown) - pressed(none, Key::ArrowUp);
    let kda_head = pressed(none, Key::CloseBracket) - pressed(none, Key::OpenBracket);
    let last = context.history.tokens().len().checked_sub(1);
    if let (Some(last), Some(shown)) = (last, context.history.shown(context.selection.token)) {
        if tokens != 0 {
            context.selection.token = Some(shown.saturating_add_signed(tokens).min(last));
        }
        if pressed(none, Key::Home) > 0 {
            context.selection.token = Some(0);
        }
    }
    if pressed(none, Key::End) > 0 {
        context.selection.token = None;
    }
    let Some(model) = context.model else {
        return;
    };
    let (kda_layers, mla_layers) = layers(&model.config);
    let heads = (model.config.kda_num_heads, model.config.num_attention_heads);
    moved(
        &mut context.selection.kda,
        &kda_layers,
        heads.0,
        kda,
        kda_head,
    );
    moved(
        &mut context.selection.mla,
        &mla_layers,
        heads.1,
        mla,
        mla_head,
    );
}

/// The KDA and the MLA layers.
#[must_use]
fn layers(config: &ModelConfig) -> (Vec<usize>, Vec<usize>) {
    (config.kda_layers().collect(), config.mla_layers().collect())
}

fn moved(
    selected: &mut Option<TraceHead>,
    layers: &[usize],
    heads: usize,
    layer_steps: isize,
    head_steps: isize,
) {
    if let Some(chosen) = selected
        .as_mut()
        .filter(|_| (layer_steps, head_steps) != (0, 0))
    {
        let at = layers
            .iter()
            .position(|layer| *layer == chosen.layer)
            .unwrap_or(0);
        let at = at
            .saturating_add_signed(layer_steps)
            .min(layers.len().saturating_sub(1));
        chosen.layer = layers.get(at).copied().unwrap_or(chosen.layer);
        chosen.head = chosen
            .head
            .saturating_add_signed(head_steps)
            .min(heads.saturating_sub(1));
    }
}
