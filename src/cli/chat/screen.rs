//! Shows a streamed answer on the terminal: the Markdown text unchanged, with headings, emphasis and code highlighted, and
//! tokens per second after the text.
//!
//! If stdout is not a terminal the text passes unchanged; with NO_COLOR, or on a terminal without escapes, none are written.

use std::io::{Result, Write};
use std::time::Instant;

use console::{Term, measure_text_width};

const PLAIN: &str = "\x1b[0m";
const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const CODE: &str = "\x1b[36m";

/// The Markdown styles that are open at a position of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Style {
    heading: bool,
    strong: bool,
    code: bool,
    fenced: bool,
}

impl Style {
    fn escape(self) -> &'static str {
        if self.fenced || self.code {
            CODE
        } else if self.heading || self.strong {
            BOLD
        } else {
            PLAIN
        }
    }
}

/// Adds escapes to Markdown, character by character; no character is taken away or held back.
#[derive(Debug, Default)]
struct Markdown {
    style: Style,
    /// The line so far.
    line: String,
}

impl Markdown {
    fn push(&mut self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            let before = self.style;
            let mut after = before;
            if c == '\n' {
                if self.line.trim_start().starts_with("```") {
                    after.fenced = !before.fenced;
                }
                (after.heading, after.code, after.strong) = (false, false, false);
                self.line.clear();
            } else if !before.fenced {
                match c {
                    '#' if self.line.is_empty() => after.heading = true,
                    '`' => after.code = !before.code,
                    '*' if !before.code && self.line.ends_with('*') => {
                        after.strong = !before.strong
                    }
                    _ => {}
                }
            }
            // A mark belongs to what it opens and to what it closes.
            let opens = after.escape() != before.escape() && after != Style::default() && c != '\n';
            if opens {
                out.push_str(after.escape());
            }
            out.push(c);
            if after.escape() != before.escape() && !opens {
                out.push_str(after.escape());
            }
            if c != '\n' {
                self.line.push(c);
            }
            self.style = after;
        }
        out
    }
}

/// Where an answer is shown.
pub(super) struct Screen {
    term: Term,
    terminal: bool,
    /// Whether escapes are written.
    styled: bool,
    markdown: Markdown,
    column: usize,
    first: Option<Instant>,
    tokens: usize,
}

impl Screen {
    pub(super) fn new() -> Self {
        let term = Term::stdout();
        let terminal = term.is_term();
        Self {
            term,
            terminal,
            styled: terminal && console::colors_enabled(),
            markdown: Markdown::default(),
            column: 0,
            first: None,
            tokens: 0,
        }
    }

    /// Shows the text of one further token.
    pub(super) fn token(&mut self, text: &str) -> Result<()> {
        self.first.get_or_insert_with(Instant::now);
        self.tokens += 1;
        self.text(text)
    }

    /// Shows further text, and the rate after it if the line is wide enough.
    pub(super) fn text(&mut self, text: &str) -> Result<()> {
        if !self.terminal {
            self.term.write_all(text.as_bytes())?;
            return self.term.flush();
        }
        // The model's text must not contain escape sequences that control the terminal.
        let harmless = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
        let text: String = text.chars().filter(harmless).collect();
        if !self.styled {
            self.term.write_all(text.as_bytes())?;
            return self.term.flush();
        }
        let width = usize::from(self.term.size().1).max(1);
        for (i, line) in text.split('\n').enumerate() {
            self.column = if i > 0 { 0 } else { self.column };
            self.column = (self.column + measure_text_width(line)) % width;
        }
        let mut out = format!("\x1b[K{}", self.markdown.push(&text));
        if let Some(rate) = self.rate() {
            let status = format!("  {rate:.1} tokens/s");
            if self.column + status.len() < width {
                out.push_str(&format!(
                    "\x1b7{DIM}{status}{PLAIN}\x1b8{}",
                    self.markdown.style.escape()
                ));
            }
        }
        self.term.write_all(out.as_bytes())?;
        self.term.flush()
    }

    /// Tokens a second since the first.
    pub(super) fn rate(&self) -> Option<f64> {
        let first = self.first.filter(|_| self.tokens > 1)?;
        Some((self.tokens - 1) as f64 / first.elapsed().as_secs_f64())
    }

    /// Ends the answer, with a line about it on stderr.
    pub(super) fn finish(&mut self, summary: &str) -> Result<()> {
        let end = if self.styled {
            format!("\x1b[K{PLAIN}\n")
        } else {
            "\n".to_owned()
        };
        self.term.write_all(end.as_bytes())?;
        self.term.flush()?;
        let notes = Term::stderr();
        if notes.is_term() && console::colors_enabled_stderr() {
            return notes.write_line(&format!("{DIM}{summary}{PLAIN}"));
        }
        notes.write_line(summary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn styled(text: &str) -> String {
        let mut markdown = Markdown::default();
        text.chars()
            .map(|c| markdown.push(&c.to_string()))
            .collect()
    }

    #[test]
    fn markdown_is_set_off_and_kept() {
        for text in [
            "# Title\nplain",
            "a `b` c",
            "a **b** c",
            "```rust\nlet x = 1;\n```\nafter",
            "*it*",
            "2 * 3 ** 4",
        ] {
            let shown = styled(text);
            assert_eq!(
                console::strip_ansi_codes(&shown),
                text,
                "every character is kept"
            );
            let mut whole = Markdown::default();
            assert_eq!(whole.push(text), shown, "however it is cut");
        }
        assert_eq!(styled("# T\nx"), "\x1b[1m# T\n\x1b[0mx");
        assert_eq!(styled("a `b` c"), "a \x1b[36m`b`\x1b[0m c");
        assert!(styled("```\n# no heading\n```\n").ends_with("```\n\x1b[0m"));
    }
}
