//! The composition of a token's output: the implicit attention of a KDA head beside the attention row of an MLA head.

use eframe::egui::{self, Align2, FontId, Rect, ScrollArea, Sense, Ui, Vec2};
use kimi_linear::model::{TraceFrame, TraceHead};

use super::bars::Bars;
use super::colour_map::Map;
use super::format::{short, token, visible};
use super::half_lives::capital;
use super::{Help, View, ViewContext, no_room, placeholder};
use crate::formulas::implicit::{Write, implicit_attention};
use crate::formulas::recurrence::norm;
use crate::history::{History, TokenText};

/// Number of tokens that are followed back; the part written before them is shown as one number.
const MOST: usize = 32_768;

/// The implicit attention of one token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Implicit {
    /// The position of the first weight.
    pub(super) first: usize,
    /// The weight of each token's value, from `first` to the token's own.
    pub(super) weights: Vec<f32>,
    /// The length of the part from before `first`, if the state there is known.
    pub(super) earlier: Option<f64>,
}

/// The implicit attention of the token at a position, over all earlier tokens that were traced with this head.
#[must_use]
pub(super) fn implicit(history: &History, position: usize, head: TraceHead) -> Option<Implicit> {
    let query = &history.head(position, head)?.query;
    let tokens = (0..=position).rev().take(MOST);
    let traced = tokens.map_while(|at| history.head(at, head));
    let (weights, rest) = implicit_attention(
        query,
        traced.map(|token| Write {
            decay: &token.decay,
            key: &token.key,
            beta: token.beta,
        }),
    );
    let first = position + 1 - weights.len();
    let width = history.head(first, head)?.width;
    let earlier = history.before(first, head).map(|state| {
        let mut sum = vec![0.0; width];
        for (row, r) in state.chunks_exact(width.max(1)).zip(&rest) {
            sum.iter_mut()
                .zip(row)
                .for_each(|(sum, s)| *sum += r * f64::from(*s));
        }
        norm(&sum)
    });
    Some(Implicit {
        first,
        weights: weights.iter().rev().map(|weight| *weight as f32).collect(),
        earlier,
    })
}

/// The view.
#[derive(Default)]
pub(super) struct Attends {
    key: Option<(u64, usize, Option<TraceHead>)>,
    implicit: Option<Implicit>,
}

impl View for Attends {
    fn name(&self) -> &'static str {
        "What it attends to"
    }

    fn help(&self) -> Help {
        Help {
            shows: "Which earlier tokens make up this token's output. Above, the selected KDA head: it keeps no tokens, but its \
                    recurrence amounts to a weight for each of them, what is left of that token's value for this query after all \
                    that was forgotten and overwritten since. It may be negative. Below, the selected MLA head, which keeps every \
                    token and attends by a softmax. Click a bar or a token to go there.",
            formula: "KDA   o = sum w v over earlier tokens, where going back from r = q\n\
                      \u{2003}\u{2003}w = b (k . r),   r ← a (r - w k)\n\
                      MLA   softmax of q . k over all earlier tokens",
            look_for: "Ask for something that was said twice. The KDA head's weight of the old value is near zero, since the new one \
                       was written over it under the same key. The MLA head still sees both, and has to choose.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        let history = context.history;
        let Some(position) = history.shown(context.selection.token) else {
            placeholder(
                ui,
                "No tokens yet. Attention appears with the first token that runs.",
            );
            return;
        };
        let name = token(history.tokens(), position);
        let Some(frame) = history.frame(position) else {
            placeholder(ui, &format!("{} was not traced.", capital(&name)));
            return;
        };
        let key = (history.revision(), position, context.selection.kda);
        if self.key != Some(key) {
            self.key = Some(key);
            self.implicit = context
                .selection
                .kda
                .and_then(|head| implicit(history, position, head));
        }
        let mut clicked = None;
        ScrollArea::vertical()
            .id_salt("attends")
            .auto_shrink(false)
            .show(ui, |ui| {
                let bar = ((ui.available_height() - 196.0) / 2.0).clamp(36.0, 160.0);
                self.implicit(ui, context, position, bar, &mut clicked);
                ui.add_space(6.0);
                row(ui, context, frame, position, bar, &mut clicked);
            });
        if clicked.is_some() {
            context.selection.token = clicked;
        }
    }
}

impl Attends {
    /// The implicit attention of the selected KDA head, with bars of the height `bar`.
    fn implicit(
        &self,
        ui: &mut Ui,
        context: &ViewContext<'_>,
        position: usize,
        bar: f32,
        clicked: &mut Option<usize>,
    ) {
        let tokens = context.history.tokens();
        let name = token(tokens, position);
        if let Some(TraceHead { layer, head }) = context.selection.kda {
            ui.label(format!(
                "KDA layer {layer}, head {head}, implicit attention of {name}"
            ));
        }
        let Some(implicit) = &self.implicit else {
            ui.weak(format!("{} was not traced with this head.", capital(&name)));
            return;
        };
        let (first, weights) = (implicit.first, &implicit.weights);
        let map = Map::Signed {
            dark: context.colours.dark,
        };
        let bars = Bars {
            label: "implicit attention",
            first,
            values: weights,
            tokens: position + 1,
            scale: weights.iter().fold(0.0, |most, x| x.abs().max(most)),
            signed: true,
            colours: [map.colour(0.85), map.colour(-0.85)],
            marked: Some(position),
            mark: context.colours.accent,
        };
        show(ui, &bars, bar, tokens, clicked);
        chips(ui, first, weights, tokens, clicked);
        if let Some(earlier) = implicit.earlier.filter(|_| first > 0) {
            ui.weak(format!(
                "what was written before token {first} adds a part of length {}",
                short(earlier)
            ));
        }
    }
}

/// The token's attention row of the selected MLA head, with bars of the height `bar`.
fn row(
    ui: &mut Ui,
    context: &ViewContext<'_>,
    frame: &TraceFrame,
    position: usize,
    bar: f32,
    clicked: &mut Option<usize>,
) {
    let tokens = context.history.tokens();
    let selected = context.selection.mla;
    if let Some(TraceHead { layer, head }) = selected {
        let name = token(tokens, position);
        ui.label(format!(
            "MLA layer {layer}, head {head}, attention of {name}"
        ));
    }
    let row = frame
        .attention
        .as_ref()
        .filter(|row| selected.is_some_and(|mla| (mla.layer, mla.head) == (row.layer, row.head)));
    let Some(row) = row else {
        ui.weak("This token's attention row is not held for this head.");
        return;
    };
    let bars = Bars {
        label: "attention",
        first: 0,
        values: &row.weights,
        tokens: position + 1,
        scale: row.weights.iter().fold(0.0, |most, x| x.max(most)),
        signed: false,
        colours: [context.colours.mla; 2],
        marked: None,
        mark: context.colours.accent,
    };
    show(ui, &bars, bar, tokens, clicked);
    chips(ui, 0, &row.weights, tokens, clicked);
}

fn show(
    ui: &mut Ui,
    bars: &Bars<'_>,
    height: f32,
    tokens: &[TokenText],
    clicked: &mut Option<usize>,
) {
    let size = Vec2::new(ui.available_width(), height + WORDS);
    let (whole, _): (Rect, _) = ui.allocate_exact_size(size, Sense::hover());
    let (rect, below) = whole.split_top_bottom_at_y(whole.bottom() - WORDS);
    let (response, at) = bars.show(ui, rect, ui.scope_id().with(bars.label));
    axis(ui, bars, rect);
    words(ui, bars, below, tokens);
    let Some(at) = at else {
        return;
    };
    if response.clicked() || response.dragged() {
        *clicked = Some(at);
    }
    let value = at
        .checked_sub(bars.first)
        .and_then(|at| bars.values.get(at));
    let value = value.map_or("not traced".to_owned(), |value| short(f64::from(*value)));
    response.on_hover_text_at_pointer(format!("{} {value}", token(tokens, at)));
}

/// Height of the words under the bars.
const WORDS: f32 = 15.0;

/// The values at the ends of the bars.
fn axis(ui: &Ui, bars: &Bars<'_>, rect: Rect) {
    let (font, colour) = (FontId::proportional(11.0), ui.visuals().weak_text_color());
    let full = short(f64::from(bars.scale));
    let painter = ui.painter();
    let at = rect.left_top() + Vec2::new(3.0, 1.0);
    painter.text(at, Align2::LEFT_TOP, &full, font.clone(), colour);
    if bars.signed {
        let at = rect.left_bottom() + Vec2::new(3.0, -1.0);
        painter.text(at, Align2::LEFT_BOTTOM, format!("-{full}"), font, colour);
    }
}

/// The tokens of the highest bars, under them as far as they do not overlap.
fn words(ui: &Ui, bars: &Bars<'_>, below: Rect, tokens: &[TokenText]) {
    let (font, colour) = (FontId::monospace(11.0), ui.visuals().text_color());
    let each = below.width() / bars.tokens.max(1) as f32;
    let mut taken: Vec<egui::Rangef> = Vec::new();
    for (at, value) in largest(bars.first, bars.values, 24) {
        let Some(token) = tokens.get(at) else {
            continue;
        };
        if value.abs() < 0.04 * bars.scale {
            break;
        }
        let text = visible(token.text.trim()).to_owned();
        let galley = ui.painter().layout_no_wrap(text, font.clone(), colour);
        let middle = below.left() + (at as f32 + 0.5) * each;
        let half = galley.size().x / 2.0;
        let middle = middle.clamp(
            below.left() + half,
            (below.right() - half).max(below.left() + half),
        );
        let range = egui::Rangef::new(middle - half - 2.0, middle + half + 2.0);
        if taken.iter().any(|other| other.intersects(range)) {
            continue;
        }
        taken.push(range);
        let at = egui::pos2(middle - half, below.top() + 1.0);
        ui.painter().galley(at, galley, colour);
    }
}

/// The positions with the largest weights, at most `most`, the largest first.
fn largest(first: usize, weights: &[f32], most: usize) -> Vec<(usize, f32)> {
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(most + 1);
    for (at, weight) in weights.iter().enumerate() {
        let size = weight.abs();
        if size > 1e-4 && (best.len() < most || size > best[best.len() - 1].1.abs()) {
            let place = best.partition_point(|(_, other)| other.abs() >= size);
            best.insert(place, (first + at, *weight));
            best.truncate(most);
        }
    }
    best
}

/// The tokens with the largest weights.
fn chips(
    ui: &mut Ui,
    first: usize,
    weights: &[f32],
    tokens: &[TokenText],
    clicked: &mut Option<usize>,
) {
    let best = largest(first, weights, 6);
    ui.horizontal_wrapped(|ui| {
        ui.weak("largest");
        for (at, weight) in best {
            let text = tokens
                .get(at)
                .map(|token| visible(&token.text))
                .unwrap_or_default();
            let text = format!("{at} “{text}” {}", short(f64::from(weight)));
            if ui.small_button(text).clicked() {
                *clicked = Some(at);
            }
        }
    });
}
