//! Formatting of numbers and names in views.

use crate::history::TokenText;

/// Three significant digits below a thousand, whole numbers above: `0.0123`, `4.56`, `789`, `12 345`, `1.2e-6`.
#[must_use]
pub fn short(x: f64) -> String {
    let size = x.abs();
    if x == 0.0 {
        "0".to_owned()
    } else if !x.is_finite() {
        if x.is_nan() {
            "no number".to_owned()
        } else if x > 0.0 {
            "∞".to_owned()
        } else {
            "-∞".to_owned()
        }
    } else if !(1e-3..1e9).contains(&size) {
        format!("{x:.1e}")
    } else if size >= 999.5 {
        let sign = if x < 0.0 { "-" } else { "" };
        format!("{sign}{}", count(size.round() as u64))
    } else {
        let digits = (2 - size.log10().floor() as i32).max(0);
        format!("{x:.*}", digits as usize)
    }
}

/// An integer with separated thousands: `1 234 567`.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A token's text on a tile, with invisible characters made visible.
#[must_use]
pub fn visible(text: &str) -> String {
    if text.is_empty() {
        return "·".to_owned();
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => shown.push_str("\\n"),
            '\t' => shown.push_str("\\t"),
            c if c.is_control() => shown.push('·'),
            c => shown.push(c),
        }
    }
    shown
}

/// A token in a sentence: its position and its text.
#[must_use]
pub fn token(tokens: &[TokenText], position: usize) -> String {
    match tokens.get(position) {
        Some(token) => format!("token {position} “{}”", visible(&token.text)),
        None => format!("token {position}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.012_34, "0.0123"),
            (-4.561, "-4.56"),
            (45.61, "45.6"),
            (789.4, "789"),
            (999.7, "1\u{202f}000"),
            (-12_345.0, "-12\u{202f}345"),
            (1.23e-6, "1.2e-6"),
            (-5.0e9, "-5.0e9"),
            (f64::INFINITY, "∞"),
            (f64::NAN, "no number"),
        ];
        for (x, text) in cases {
            assert_eq!(short(x), text);
        }
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(
            (visible(""), visible("a\n")),
            ("·".to_owned(), "a\\n".to_owned())
        );
    }
}
