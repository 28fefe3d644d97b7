//! A matrix as a texture, which is updated only when it has changed, and the legend of its colours.

use eframe::egui::{
    self, Color32, ColorImage, Pos2, Rect, Response, Role, Sense, TextStyle, TextureHandle,
    TextureOptions, Ui, Vec2, WidgetInfo,
};

use super::colour_map::Map;

/// One texture.
#[derive(Default)]
pub(super) struct HeatMap {
    texture: Option<TextureHandle>,
    key: Option<Key>,
}

/// The inputs of a texture; the caller's `version` stands for the values.
#[derive(Clone, Copy, PartialEq)]
struct Key {
    version: u64,
    rows: usize,
    columns: usize,
    scale: (f32, f32),
    map: Map,
}

/// A matrix to show.
pub(super) struct Cells<'a> {
    /// Its description for screen readers.
    pub(super) label: &'a str,
    /// Differs whenever the values do.
    pub(super) version: u64,
    /// Number of columns; the number of rows follows.
    pub(super) columns: usize,
    /// The values, row by row.
    pub(super) values: &'a dyn Fn() -> Vec<f32>,
    /// Number of values.
    pub(super) count: usize,
    /// The values at the lower and the upper end of the colour map; for signed colours those of -1 and 1.
    pub(super) scale: (f32, f32),
    /// The colours.
    pub(super) map: Map,
}

/// The cell under the pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// Counted from the top.
    pub(super) row: usize,
    /// Counted from the left.
    pub(super) column: usize,
}

impl HeatMap {
    /// Draws the cells into `rect`; returns the cell under the pointer.
    pub(super) fn show(
        &mut self,
        ui: &Ui,
        rect: Rect,
        id: egui::Id,
        cells: &Cells<'_>,
    ) -> (Response, Option<Cell>) {
        let response = ui.interact(rect, id, Sense::click());
        response.widget_info(|| WidgetInfo::labeled(Role::Image, true, cells.label));
        let columns = cells.columns.max(1);
        let rows = cells.count / columns;
        if rows == 0 || !ui.is_rect_visible(rect) {
            return (response, None);
        }
        let key = Key {
            version: cells.version,
            rows,
            columns,
            scale: cells.scale,
            map: cells.map,
        };
        if self.key != Some(key) {
            self.key = Some(key);
            let (low, high) = cells.scale;
            let range = if high > low { high - low } else { 1.0 };
            let place = |x: f32| match cells.map {
                Map::Magnitude => (x - low) / range,
                Map::Signed { .. } => (x - low) / range * 2.0 - 1.0,
            };
            let values = (cells.values)();
            let pixels = values
                .iter()
                .take(rows * columns)
                .map(|x| cells.map.colour(place(*x)));
            let mut pixels: Vec<Color32> = pixels.collect();
            pixels.resize(rows * columns, Color32::GRAY);
            let image = ColorImage::new([columns, rows], pixels);
            match &mut self.texture {
                Some(texture) => texture.set(image, TextureOptions::NEAREST),
                None => {
                    let texture = ui
                        .ctx()
                        .load_texture("heat map", image, TextureOptions::NEAREST);
                    self.texture = Some(texture);
                }
            }
        }
        if let Some(texture) = &self.texture {
            let whole = Rect::from_min_max(Pos2::ZERO, Pos2::new(1.0, 1.0));
            ui.painter()
                .image(texture.id(), rect, whole, Color32::WHITE);
        }
        let cell = response
            .hover_pos()
            .filter(|at| rect.contains(*at))
            .map(|at| {
                let part = (at - rect.min) / rect.size();
                let place =
                    |part: f32, count: usize| ((part * count as f32) as usize).min(count - 1);
                Cell {
                    row: place(part.y, rows),
                    column: place(part.x, columns),
                }
            });
        (response, cell)
    }
}

/// The colour map with the values at its ends: one widget, so that a row of them wraps.
pub(super) fn legend(ui: &mut Ui, map: Map, low: &str, high: &str) {
    const BAR: f32 = 72.0;
    const GAP: f32 = 4.0;
    let colour = ui.visuals().text_color();
    let font = TextStyle::Body.resolve(ui.style());
    let [low, high] = [low, high].map(|text| {
        ui.painter()
            .layout_no_wrap(text.to_owned(), font.clone(), colour)
    });
    let size = Vec2::new(
        low.size().x + BAR + high.size().x + 2.0 * GAP,
        low.size().y.max(high.size().y),
    );
    let (rect, response) = ui.allocate_exact_size(size, Sense::hover());
    let says = format!("colours from {} to {}", low.text(), high.text());
    response.widget_info(|| WidgetInfo::labeled(Role::Label, true, &says));
    let left = rect.left() + low.size().x + GAP;
    let painter = ui.painter();
    painter.galley(rect.left_top(), low, colour);
    painter.galley(egui::pos2(left + BAR + GAP, rect.top()), high, colour);
    let steps = 36;
    let bar = rect.y_range().shrink((rect.height() - 10.0) / 2.0);
    for i in 0..steps {
        let part = |i: usize| left + BAR * i as f32 / steps as f32;
        let x = (i as f32 + 0.5) / steps as f32;
        let x = if map == Map::Magnitude {
            x
        } else {
            2.0 * x - 1.0
        };
        let segment = Rect::from_x_y_ranges(part(i)..=part(i + 1), bar);
        painter.rect_filled(segment, 0.0, map.colour(x));
    }
}
