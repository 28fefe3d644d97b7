//! Formulas of answers: TeX, set in lines of Unicode text.
//!
//! Fractions and roots take several lines. What cannot be set, has characters that no font has, or is wider than the column
//! is shown as TeX, which wraps.

use eframe::egui::{Label, RichText, TextStyle, TextWrapMode, Ui};
use mdwright_latex::render_unicode_math;

/// A formula as lines of text of one width, for a font of fixed width; `None` if it cannot be set.
#[must_use]
pub fn set(tex: &str) -> Option<Vec<String>> {
    // Accents are drawn by combining characters, which the text renderer leaves out.
    let combining = |c: char| matches!(c, '\u{300}'..='\u{36F}' | '\u{20D0}'..='\u{20FF}');
    let set = match render_unicode_math(tex.trim()) {
        Ok(set) => set,
        Err(error) => {
            tracing::debug!("a formula is shown as TeX: {error}");
            return None;
        }
    };
    let lines = set.lines();
    let whole = lines.iter().all(|line| !line.contains(combining));
    whole.then(|| lines.to_vec())
}

/// Draws a formula, within a line of text or on lines of its own.
pub(crate) fn ui(ui: &mut Ui, tex: &str, inline: bool) {
    let (colour, font) = (
        ui.visuals().strong_text_color(),
        TextStyle::Monospace.resolve(ui.style()),
    );
    let width = ui.available_width();
    let drawn = |ui: &Ui, lines: &[String]| {
        // Laying lines out asks for the system's fonts, which may come later.
        let widths = lines.iter().map(|line| {
            let line = ui
                .painter()
                .layout_no_wrap(line.clone(), font.clone(), colour);
            line.size().x
        });
        let widest = widths.fold(0.0, f32::max);
        let known = ui.fonts_mut(|fonts| lines.iter().all(|line| fonts.has_glyphs(&font, line)));
        known && (widest <= width || inline)
    };
    let text = |line: &str| RichText::new(line).monospace().color(colour);
    match set(tex).filter(|lines| drawn(ui, lines)) {
        Some(lines) if inline && lines.len() == 1 => {
            ui.label(text(&lines[0]));
        }
        Some(lines) => {
            // Lines touch, as the strokes of roots and brackets do.
            ui.vertical(|ui| {
                ui.spacing_mut().item_spacing.y = 0.0;
                for line in &lines {
                    ui.add(Label::new(text(line)).wrap_mode(TextWrapMode::Extend));
                }
            });
        }
        None => {
            ui.label(text(tex.trim()));
        }
    }
    if !inline {
        ui.end_row();
    }
}

#[cfg(test)]
mod tests {
    use super::set;

    #[test]
    fn formulas_are_set_in_unicode() {
        let line = |tex: &str| set(tex).unwrap().concat().replace(' ', "");
        assert_eq!(line("E = mc^2"), "E=mc²");
        assert_eq!(line(r"\alpha \le \beta_i"), "α≤βᵢ");
        assert_eq!(set(r"\frac{a}{b}").unwrap().len(), 3);
    }

    #[test]
    fn what_cannot_be_set_is_left_as_it_is() {
        assert_eq!(set(r"\frac{a}{"), None);
        assert_eq!(set(r"\bar{x}"), None, "its bar would not be drawn");
    }
}
