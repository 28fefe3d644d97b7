//! A value per token as bars along the sequence; if there are more tokens than pixels, a bar is the maximum of several.

use eframe::egui::{
    self, Color32, Mesh, Rect, Response, Role, Sense, Shape, Stroke, Ui, WidgetInfo, pos2,
};

/// Bars from the first token to the last.
pub(super) struct Bars<'a> {
    /// Their description for screen readers.
    pub(super) label: &'a str,
    /// The position of the first value.
    pub(super) first: usize,
    /// One value per token.
    pub(super) values: &'a [f32],
    /// Number of tokens over the whole width.
    pub(super) tokens: usize,
    /// The value of a full bar.
    pub(super) scale: f32,
    /// Whether bars also go down.
    pub(super) signed: bool,
    /// Colours of positive and negative values.
    pub(super) colours: [Color32; 2],
    /// A marked token.
    pub(super) marked: Option<usize>,
    /// The mark's colour.
    pub(super) mark: Color32,
}

impl Bars<'_> {
    /// Draws the bars into `rect`; returns the token under the pointer.
    pub(super) fn show(&self, ui: &Ui, rect: Rect, id: egui::Id) -> (Response, Option<usize>) {
        let response = ui.interact(rect, id, Sense::click_and_drag());
        response.widget_info(|| WidgetInfo::labeled(Role::Image, true, self.label));
        let painter = ui.painter_at(rect.expand(1.0));
        painter.rect_filled(rect, 2.0, ui.visuals().faint_bg_color);
        let tokens = self.tokens.max(1);
        let x = |position: usize| rect.left() + rect.width() * position as f32 / tokens as f32;
        let zero = if self.signed {
            rect.center().y
        } else {
            rect.bottom()
        };
        let height = if self.signed {
            rect.height() / 2.0
        } else {
            rect.height()
        };
        let each = (tokens as f32 / rect.width().max(1.0)).ceil().max(1.0) as usize;
        let mut mesh = Mesh::default();
        for (i, values) in self.values.chunks(each).enumerate() {
            let largest = values.iter().copied().filter(|x| x.is_finite());
            let value = largest.fold(
                0.0_f32,
                |most, x| if x.abs() > most.abs() { x } else { most },
            );
            if value == 0.0 || self.scale <= 0.0 {
                continue;
            }
            let from = self.first + i * each;
            let gap = if each == 1 && rect.width() / tokens as f32 > 4.0 {
                1.0
            } else {
                0.0
            };
            let top = zero - height * (value / self.scale).clamp(-1.0, 1.0);
            let bar = Rect::from_two_pos(
                pos2(x(from), zero),
                pos2((x(from + values.len()) - gap).max(x(from) + 1.0), top),
            );
            mesh.add_colored_rect(bar, self.colours[usize::from(value < 0.0)]);
        }
        painter.add(Shape::mesh(mesh));
        if self.signed {
            painter.hline(
                rect.x_range(),
                zero,
                Stroke::new(1.0, ui.visuals().weak_text_color()),
            );
        }
        if let Some(marked) = self.marked {
            let middle = (x(marked) + x(marked + 1)) / 2.0;
            painter.vline(middle, rect.y_range(), Stroke::new(1.0, self.mark));
        }
        let under = response.interact_pointer_pos().or(response.hover_pos());
        let token = under.filter(|at| rect.contains(*at)).map(|at| {
            let part = (at.x - rect.left()) / rect.width().max(1.0);
            ((part * tokens as f32) as usize).min(tokens - 1)
        });
        (response, token)
    }
}
