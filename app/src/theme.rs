//! The app's own colours, for light and dark; the widgets' other colours are egui's.

use eframe::egui::{self, Color32};

/// The colours of one appearance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Colours {
    /// Whether the background is dark.
    pub dark: bool,
    /// New, selected or hovered items.
    pub accent: Color32,
    /// KDA, wherever both kinds of layers are shown.
    pub kda: Color32,
    /// MLA.
    pub mla: Color32,
    /// Full attention, for comparison.
    pub full: Color32,
    /// Secondary text.
    pub faint: Color32,
    /// Problems.
    pub error: Color32,
}

impl Colours {
    /// The colours for a dark or a light background: blue, orange, green and vermilion of Okabe and Ito, which are distinct
    /// with any kind of colour blindness.
    #[must_use]
    pub fn new(dark: bool) -> Self {
        let pick = |on_dark: (u8, u8, u8), on_light: (u8, u8, u8)| {
            let (r, g, b) = if dark { on_dark } else { on_light };
            Color32::from_rgb(r, g, b)
        };
        Self {
            dark,
            accent: pick((230, 159, 0), (176, 112, 0)),
            kda: pick((86, 180, 233), (0, 114, 178)),
            mla: pick((230, 159, 0), (176, 112, 0)),
            full: pick((204, 121, 167), (160, 70, 120)),
            faint: pick((150, 150, 155), (105, 105, 110)),
            error: pick((240, 110, 70), (190, 60, 0)),
        }
    }
}

/// The two signs of the copy button of code, from jslegers' emoji-icon-font (`icons-license.txt`); egui's own fonts have them
/// only with a megabyte of others.
const ICONS: &[u8] = include_bytes!("icons.ttf");

/// Turns off what moves by itself: where the CPU draws, each frame of a fade or a blink takes its time.
pub fn keep_still(ctx: &egui::Context) {
    ctx.all_styles_mut(|style| {
        style.animation_time = 0.0;
        style.scroll_animation = egui::style::ScrollAnimation::none();
        style.visuals.text_cursor.blink = false;
    });
}

/// A sign that work is in progress, in points; by default as high as a button. It turns, for which every frame is drawn, or with
/// [`keep_still`] stays as it is.
pub fn busy(ui: &mut egui::Ui, size: Option<f32>) {
    if ui.style().animation_time > 0.0 {
        let size = size.unwrap_or(ui.spacing().interact_size.y);
        ui.add(egui::Spinner::new().size(size));
    } else {
        ui.label("…");
    }
}

/// The style of the widgets: text with enough contrast for bright surroundings, fields with an outline, panels that differ
/// from the gaps between them.
pub fn apply(ctx: &egui::Context) {
    // Ubuntu has neither arrows nor the signs of steps; Hack, the font for code, has both.
    let mut fonts = egui::FontDefinitions::default();
    if let Some(family) = fonts.families.get_mut(&egui::FontFamily::Proportional) {
        family.push("Hack".to_owned());
    }
    let icons = egui::FontData::from_static(ICONS);
    fonts.font_data.insert("icons".to_owned(), icons.into());
    for family in fonts.families.values_mut() {
        family.push("icons".to_owned());
    }
    ctx.set_fonts(fonts);
    for theme in [egui::Theme::Dark, egui::Theme::Light] {
        ctx.style_mut_of(theme, |style| {
            if let Some(small) = style.text_styles.get_mut(&egui::TextStyle::Small) {
                small.size = 11.0;
            }
            // Scroll bars are in sight where there is more to see, not only under the pointer.
            style.spacing.scroll.dormant_handle_opacity = 0.6;
        });
    }
    ctx.style_mut_of(egui::Theme::Dark, |style| {
        let visuals = &mut style.visuals;
        visuals.panel_fill = Color32::from_gray(24);
        visuals.window_fill = Color32::from_gray(30);
        visuals.extreme_bg_color = Color32::from_gray(12);
        visuals.faint_bg_color = Color32::from_gray(36);
        visuals.widgets.noninteractive.fg_stroke.color = Color32::from_gray(212);
        visuals.widgets.inactive.fg_stroke.color = Color32::from_gray(225);
        visuals.widgets.noninteractive.bg_stroke.color = Color32::from_gray(62);
        visuals.widgets.inactive.bg_stroke = egui::Stroke::new(1.0, Color32::from_gray(72));
        visuals.weak_text_color = Some(Color32::from_gray(160));
    });
    ctx.style_mut_of(egui::Theme::Light, |style| {
        let visuals = &mut style.visuals;
        visuals.widgets.noninteractive.fg_stroke.color = Color32::from_gray(40);
        visuals.widgets.inactive.fg_stroke.color = Color32::from_gray(30);
        visuals.widgets.inactive.bg_stroke = egui::Stroke::new(1.0, Color32::from_gray(190));
        visuals.weak_text_color = Some(Color32::from_gray(100));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_button_has_its_signs() {
        let ctx = egui::Context::default();
        apply(&ctx);
        let mut known = false;
        let _ = ctx.run_ui(egui::RawInput::default(), |ui| {
            let font = egui::TextStyle::Button.resolve(ui.style());
            known = ui.fonts_mut(|fonts| fonts.has_glyphs(&font, "\u{1F5D0}\u{2714}"));
        });
        assert!(known);
    }
}
