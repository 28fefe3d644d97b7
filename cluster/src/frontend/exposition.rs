//! Prometheus' text format, read and written.

use std::fmt::{Display, Write};

/// One sample: a name, labels and a value.
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(&'a str, &'a str)>,
    value: f64,
}

/// The samples of a text.
pub struct Samples<'a>(Vec<Sample<'a>>);

impl<'a> Samples<'a> {
    /// Reads a text; lines of another form are left out.
    #[must_use]
    pub fn parse(text: &'a str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    /// The sum over all samples of a name that have a label; `None` if there is none.
    #[must_use]
    pub fn sum(&self, name: &str, label: Option<(&str, &str)>) -> Option<f64> {
        let mut sum = None;
        for sample in &self.0 {
            let labelled = label.is_none_or(|label| sample.labels.contains(&label));
            if sample.name == name && labelled {
                *sum.get_or_insert(0.0) += sample.value;
            }
        }
        sum
    }
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let (name, labels, rest) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, rest) = labels(rest)?;
            (name, labels, rest)
        }
        None => {
            let (name, rest) = line.split_once(char::is_whitespace)?;
            (name, Vec::new(), rest)
        }
    };
    // A time may follow.
    let value = rest.split_whitespace().next()?.parse::<f64>().ok()?;
    Some(Sample {
        name: name.trim(),
        labels,
        value: value.is_finite().then_some(value)?,
    })
}

/// Labels up to the closing brace, and what follows it. Escapes in values stay as they are: none that is looked for has any.
fn labels(mut text: &str) -> Option<(Vec<(&str, &str)>, &str)> {
    let mut labels = Vec::new();
    loop {
        text = text.trim_start_matches([',', ' ']);
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut escaped = false;
        let end = rest.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        })?;
        labels.push((name.trim(), &rest[..end]));
        text = &rest[end + 1..];
    }
}

/// A text that is written.
#[derive(Default)]
pub struct Exposition(String);

/// What a number is.
#[derive(Clone, Copy)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

impl Exposition {
    /// Begins a metric.
    pub fn metric(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing to a string does not fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// Adds a sample to the metric that was begun last. Values of labels are names, without quotation marks.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    /// A metric with one sample.
    pub fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.metric(name, kind, help);
        self.sample(name, &[], value);
    }

    /// The text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut text = Exposition::default();
        text.metric("a_total", Kind::Counter, "Things.");
        text.sample("a_total", &[("site", "local"), ("x", "1")], 3u64);
        text.sample("a_total", &[("site", "prfaas")], 2.5);
        text.single("b", Kind::Gauge, "Others.", 7);
        let text = text.into_text();
        let samples = Samples::parse(&text);
        assert_eq!(samples.sum("a_total", None), Some(5.5));
        assert_eq!(samples.sum("a_total", Some(("site", "prfaas"))), Some(2.5));
        assert_eq!(samples.sum("a_total", Some(("site", "x"))), None);
        assert_eq!(samples.sum("b", None), Some(7.0));
        assert_eq!(samples.sum("c", None), None);
    }

    #[test]
    fn other_forms_are_left_out() {
        let text = "a 1 1700000000\na{x=\"}, \\\" y\",z=\"w\"} 2\na{x= 3\na NaN\na\n\na{} +4e0\n";
        let samples = Samples::parse(text);
        assert_eq!(samples.sum("a", None), Some(7.0));
        assert_eq!(samples.sum("a", Some(("z", "w"))), Some(2.0));
    }
}
