//! Colour maps: cividis for magnitudes, blue to orange for signed values, neutral at zero.
//!
//! Both work with any kind of colour blindness: lightness alone gives the order of magnitudes.

use eframe::egui::Color32;

/// A kind of colour map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// From 0 to 1: small to large.
    Magnitude,
    /// From -1 to 1: negative is blue, positive orange.
    Signed {
        /// Whether zero is dark; otherwise it is light.
        dark: bool,
    },
}

/// Cividis (Nunez, Anderton and Renslow 2018), at tenths.
const CIVIDIS: [[u8; 3]; 11] = [
    [0, 34, 78],
    [0, 48, 111],
    [53, 69, 108],
    [76, 85, 108],
    [101, 104, 112],
    [124, 123, 120],
    [150, 143, 119],
    [176, 164, 112],
    [204, 187, 98],
    [230, 209, 77],
    [254, 232, 56],
];

/// Negative, halfway, zero, halfway, positive.
const ON_DARK: [[u8; 3]; 5] = [
    [110, 200, 255],
    [30, 100, 160],
    [26, 26, 30],
    [165, 85, 10],
    [255, 178, 70],
];
const ON_LIGHT: [[u8; 3]; 5] = [
    [0, 70, 130],
    [90, 160, 210],
    [247, 247, 247],
    [240, 165, 80],
    [150, 62, 0],
];

impl Map {
    /// The colour of a value; values outside the range have the colour of its end, NaN is grey.
    #[must_use]
    pub fn colour(self, x: f32) -> Color32 {
        if x.is_nan() {
            return Color32::GRAY;
        }
        match self {
            Self::Magnitude => between(&CIVIDIS, x.clamp(0.0, 1.0)),
            Self::Signed { dark } => {
                let anchors = if dark { &ON_DARK } else { &ON_LIGHT };
                between(anchors, (x.clamp(-1.0, 1.0) + 1.0) / 2.0)
            }
        }
    }
}

fn between(anchors: &[[u8; 3]], x: f32) -> Color32 {
    let at = x * (anchors.len() - 1) as f32;
    let low = (at as usize).min(anchors.len() - 2);
    let part = at - low as f32;
    let mix = |channel: usize| {
        let [from, to] = [low, low + 1].map(|i| f32::from(anchors[i][channel]));
        (from + (to - from) * part).round() as u8
    };
    Color32::from_rgb(mix(0), mix(1), mix(2))
}

/// Black or white, whichever has more contrast with a colour.
#[must_use]
pub fn text_on(colour: Color32) -> Color32 {
    // The luminance at which the contrast with black equals that with white, 4.58 each.
    if lightness(colour) > 0.179 {
        Color32::BLACK
    } else {
        Color32::WHITE
    }
}

/// Relative luminance (WCAG 2), 0 to 1.
#[must_use]
pub fn lightness(colour: Color32) -> f32 {
    let linear = |value: u8| {
        let x = f32::from(value) / 255.0;
        if x <= 0.040_45 {
            x / 12.92
        } else {
            ((x + 0.055) / 1.055).powf(2.4)
        }
    };
    0.2126 * linear(colour.r()) + 0.7152 * linear(colour.g()) + 0.0722 * linear(colour.b())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lightness_gives_the_order() {
        let rising = |map: Map, from: f32, to: f32| {
            let at = |i: usize| lightness(map.colour(from + (to - from) * i as f32 / 50.0));
            (0..50).all(|i| at(i) <= at(i + 1) + 1e-4)
        };
        assert!(rising(Map::Magnitude, 0.0, 1.0));
        for end in [-1.0, 1.0] {
            assert!(rising(Map::Signed { dark: true }, 0.0, end));
            assert!(rising(Map::Signed { dark: false }, end, 0.0));
        }
    }

    /// What a dichromat sees (Vienot, Brettel and Mollon 1999), in linear light, gamma 2.2.
    fn seen(colour: Color32, protan: bool) -> [f32; 3] {
        let [r, g, b] =
            [colour.r(), colour.g(), colour.b()].map(|x| (f32::from(x) / 255.0).powf(2.2));
        let (mix, blue) = if protan {
            (0.112_38 * r + 0.887_62 * g, [0.004_01, -0.004_01])
        } else {
            (0.292_75 * r + 0.707_25 * g, [-0.022_34, 0.022_34])
        };
        [mix, mix, blue[0] * r + blue[1] * g + b]
    }

    #[test]
    fn signs_differ_with_any_colour_blindness() {
        for dark in [true, false] {
            for size in [0.3, 0.6, 1.0] {
                for protan in [true, false] {
                    let map = Map::Signed { dark };
                    let [minus, plus] = [-size, size]
                        .map(|x| seen(map.colour(x), protan).map(|x| x.max(0.0).powf(1.0 / 2.2)));
                    let apart: f32 = minus
                        .iter()
                        .zip(plus)
                        .map(|(a, b)| (a - b).powi(2))
                        .sum::<f32>()
                        .sqrt();
                    assert!(
                        apart > 0.12,
                        "{size} on dark {dark}, protan {protan}: {apart}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_beyond_the_ends_have_the_ends_colour() {
        let map = Map::Signed { dark: true };
        assert_eq!(map.colour(9.0), map.colour(1.0));
        assert_eq!(map.colour(f32::NEG_INFINITY), map.colour(-1.0));
        assert_eq!(Map::Magnitude.colour(f32::NAN), Color32::GRAY);
    }

    #[test]
    fn text_can_be_read_on_every_colour() {
        for i in 0..=100 {
            let x = i as f32 / 100.0;
            for colour in [
                Map::Magnitude.colour(x),
                Map::Signed { dark: true }.colour(2.0 * x - 1.0),
            ] {
                let (a, b) = (lightness(colour), lightness(text_on(colour)));
                let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
                assert!(contrast >= 4.5, "{contrast} at {x}");
            }
        }
    }
}
