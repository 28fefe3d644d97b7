//! Formulas of answers: TeX, set in lines of Unicode text.
//!
//! Fractions, roots, sums and indices take several lines where they need them. What cannot be set, or has characters that no
//! font has, is shown as TeX.

use eframe::egui::{Label, RichText, TextStyle, TextWrapMode, Ui};
use mdwright_latex::render_unicode_math;

/// A formula as lines of text of one width, for a font of fixed width.
#[must_use]
pub fn set(tex: &str) -> Vec<String> {
    match render_unicode_math(tex.trim()) {
        Ok(set) => set.lines().to_vec(),
        Err(error) => {
            tracing::debug!("a formula is shown as TeX: {error}");
            plain(tex)
        }
    }
}

fn plain(tex: &str) -> Vec<String> {
    tex.trim().lines().map(str::to_owned).collect()
}

/// Draws a formula, within a line of text or on lines of its own.
pub(crate) fn ui(ui: &mut Ui, tex: &str, inline: bool) {
    let (colour, font) = (
        ui.visuals().strong_text_color(),
        TextStyle::Monospace.resolve(ui.style()),
    );
    let mut lines = set(tex);
    if !ui.fonts_mut(|fonts| lines.iter().all(|line| fonts.has_glyphs(&font, line))) {
        // Laying the lines out asks for the system's fonts, which may come later.
        for line in lines.drain(..) {
            let _ = ui.painter().layout_no_wrap(line, font.clone(), colour);
        }
        lines = plain(tex);
    }
    let label = |line: &str| {
        let text = RichText::new(line).monospace().color(colour);
        Label::new(text).wrap_mode(TextWrapMode::Extend)
    };
    match lines.as_slice() {
        [line] if inline => {
            ui.add(label(line));
        }
        lines => {
            // Lines touch, as the strokes of roots and brackets do.
            ui.vertical(|ui| {
                ui.spacing_mut().item_spacing.y = 0.0;
                for line in lines {
                    ui.add(label(line));
                }
            });
            if !inline {
                ui.end_row();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::set;

    #[test]
    fn formulas_are_set_in_unicode() {
        assert_eq!(set("E = mc^2"), ["E = mc²"]);
        assert_eq!(set(r"\alpha \le \beta_i"), ["α ≤ βᵢ"]);
        let fraction = set(r"\frac{a}{b}");
        assert_eq!(fraction.len(), 3, "{fraction:?}");
    }

    #[test]
    fn what_cannot_be_set_is_shown_as_it_is() {
        assert_eq!(set(r"\frac{a}{"), [r"\frac{a}{"]);
    }
}
