//! The live table: a line for each request when it has ended, and in a terminal a last line with the cluster's state, which is written
//! anew. Without a terminal the state is a line of its own every few seconds.

use std::time::{Duration, Instant};

use console::Term;

use super::parts::Site;
use super::run::Record;
use super::status::ClusterState;

/// Time between two lines with the state where there is no terminal.
const SELDOM: Duration = Duration::from_secs(10);

/// The table of one load.
#[derive(Debug)]
pub struct Table {
    term: Term,
    total: usize,
    /// Nominal rate of the link, for its share.
    link: Option<u64>,
    /// The last line, if it is the state.
    state: Option<String>,
    told: Option<Instant>,
}

impl Table {
    /// A table of this number of requests, on stdout.
    #[must_use]
    pub fn new(total: usize, link: Option<u64>) -> Self {
        Self {
            term: Term::stdout(),
            total,
            link,
            state: None,
            told: None,
        }
    }

    /// Writes a line above the state, such as a heading.
    pub fn line(&mut self, text: &str) {
        // A terminal that is gone must not end the run.
        if self.state.take().is_some() {
            let _ = self.term.clear_line();
        }
        let _ = self.term.write_line(text);
    }

    /// Writes the names of the columns.
    pub fn heading(&mut self) {
        self.line(&format!(
            "{:>5} {:>8} {:>8}  {:<7} {:>8} {:>8} {:>7} {:>12}",
            "no.", "prompt", "cached", "prefill", "TTFT, s", "done, s", "answer", "link total"
        ));
    }

    /// Writes the line of a request that has ended.
    pub fn request(&mut self, record: &Record) {
        let site = match record.site {
            Some(Site::Local) => "local",
            Some(Site::Prfaas) => "prfaas",
            None => "-",
        };
        let line = match &record.error {
            Some(error) => format!(
                "{:>5} {:>8} {:>8}  {site:<7} failed: {error}",
                record.number, record.tokens, "-"
            ),
            None => format!(
                "{:>5} {:>8} {:>8}  {site:<7} {:>8.3} {:>8.3} {:>7} {:>12}",
                record.number,
                record.tokens,
                record.cached,
                record.ttft,
                record.done,
                record.answer,
                bytes(record.link_bytes)
            ),
        };
        let state = self.state.clone();
        self.line(&line);
        if let Some(state) = state {
            self.write_state(state);
        }
    }

    /// Shows the cluster's state, with the number of requests that have ended and the bytes of caches over the link.
    pub fn state(&mut self, state: &ClusterState, ended: usize, link_bytes: u64) {
        let threshold = match (state.threshold.tokens, &state.threshold.setting) {
            (None, _) => "none".to_owned(),
            (Some(tokens), setting) if setting == "auto" => format!("{tokens} (auto)"),
            (Some(tokens), _) => tokens.to_string(),
        };
        let used = state.link.as_ref().map_or(0.0, |link| link.used);
        let link = match self.link {
            Some(bits) => format!("{:.0} % of {} Mbit/s", 100.0 * used, bits as f64 / 1e6),
            None => "not shaped".to_owned(),
        };
        let split = state.split;
        // A narrow terminal shows the beginning.
        let text = format!(
            "{ended}/{} ended, {} running | threshold {threshold} | link {link}, {} | prefill {} decode {} prfaas {}",
            self.total,
            state.requests.running,
            bytes(link_bytes),
            split.prefill,
            split.decode,
            split.prfaas
        );
        if self.term.is_term() {
            self.write_state(text);
        } else if self.told.is_none_or(|told| told.elapsed() > SELDOM) {
            self.told = Some(Instant::now());
            self.line(&format!("      {text}"));
        }
    }

    /// Removes the state's line.
    pub fn finish(&mut self) {
        if self.state.take().is_some() {
            let _ = self.term.clear_line();
        }
    }

    fn write_state(&mut self, text: String) {
        let width = usize::from(self.term.size().1).saturating_sub(1);
        let shown: String = text.chars().take(width).collect();
        let _ = self.term.clear_line();
        let _ = self.term.write_str(&shown);
        self.state = Some(text);
    }
}

/// A number of bytes with a unit.
#[must_use]
pub fn bytes(count: u64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let count = count as f64;
    match units.iter().find(|(unit, _)| count >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", count / unit),
        None => format!("{count} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_unit() {
        let shown = [0, 999, 1500, 2_500_000, 7_000_000_000].map(bytes);
        assert_eq!(shown, ["0 B", "999 B", "1.5 kB", "2.5 MB", "7.0 GB"]);
    }
}
