//! Markdown text that is drawn in blocks, so that only the visible part of a long text is laid out.

use std::borrow::Cow;

use eframe::egui::{Rect, Ui, vec2};
use egui_commonmark::{CommonMarkCache, CommonMarkViewer};

use crate::math;

/// Length in bytes after which a block ends at the next empty line.
const SOFT: usize = 2_000;
/// Length in bytes after which a block ends at the next line end; a code fence is closed and opened again.
const HARD: usize = 8_000;
/// Maximum length of a block in bytes.
const MOST: usize = 16_000;

/// A text, which may still grow.
#[derive(Clone, Debug, Default)]
pub struct Markdown {
    blocks: Vec<Block>,
    /// The line that opened the code fence of the last block; empty outside of a fence.
    fence: Option<String>,
    /// Number of bytes of the last block that have been searched for lines.
    seen: usize,
    width: f32,
}

#[derive(Clone, Debug, Default)]
struct Block {
    text: String,
    /// Its height at the last drawing, at the text's width.
    height: Option<f32>,
}

impl Markdown {
    /// A complete text.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut markdown = Self::default();
        for piece in text.split_inclusive('\n') {
            markdown.push(piece);
        }
        markdown
    }

    /// Appends text.
    pub fn push(&mut self, text: &str) {
        if self.blocks.is_empty() {
            self.blocks.push(Block::default());
        }
        if let Some(block) = self.blocks.last_mut() {
            block.text.push_str(text);
            block.height = None;
        }
        self.close();
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Closes the last block if it is long enough.
    fn close(&mut self) {
        let Some(block) = self.blocks.last_mut() else {
            return;
        };
        while let Some(end) = block.text[self.seen..].find('\n') {
            let line = &block.text[self.seen..self.seen + end];
            let empty = line.trim().is_empty();
            let marker = line.trim_start();
            if marker.starts_with("```") || marker.starts_with("~~~") {
                self.fence = if self.fence.is_some() {
                    None
                } else {
                    Some(line.to_owned())
                };
            }
            self.seen += end + 1;
            let long = self.seen >= SOFT && empty && self.fence.is_none();
            if long || self.seen >= HARD {
                let rest = block.text.split_off(self.seen);
                self.next(rest);
                return;
            }
        }
        if block.text.len() > MOST {
            self.next(String::new());
        }
    }

    fn next(&mut self, rest: String) {
        let mut begun = String::new();
        if let (Some(fence), Some(block)) = (&self.fence, self.blocks.last_mut()) {
            begun = format!("{fence}\n");
            let closing = if fence.trim_start().starts_with('~') {
                "~~~"
            } else {
                "```"
            };
            block.text.push_str(closing);
        }
        self.seen = begun.len();
        self.blocks.push(Block {
            text: begun + &rest,
            height: None,
        });
        self.close();
    }

    /// Draws the visible part.
    pub fn ui(&mut self, ui: &mut Ui, cache: &mut CommonMarkCache) {
        let width = ui.available_width();
        if (self.width - width).abs() > 0.5 {
            self.width = width;
            self.blocks.iter_mut().for_each(|block| block.height = None);
        }
        for (at, block) in self.blocks.iter_mut().enumerate() {
            if let Some(height) = block.height {
                let rect = Rect::from_min_size(ui.cursor().min, vec2(width, height));
                if !ui.is_rect_visible(rect) {
                    ui.allocate_space(vec2(width, height));
                    continue;
                }
            }
            let drawn = ui.push_id(at, |ui| {
                CommonMarkViewer::new()
                    .render_math_fn(Some(&math::ui))
                    .show(ui, cache, &bold_heads(&block.text));
            });
            block.height = Some(drawn.response.rect.height());
        }
    }
}

/// The text with the heads of tables in bold, which egui_commonmark draws like other rows.
fn bold_heads(text: &str) -> Cow<'_, str> {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut fenced = false;
    let mut heads = Vec::new();
    for (at, pair) in lines.windows(2).enumerate() {
        let line = pair[0].trim_start();
        fenced ^= line.starts_with("```") || line.starts_with("~~~");
        if !fenced && pair[0].contains('|') && is_delimiter(pair[1]) {
            heads.push(at);
        }
    }
    if heads.is_empty() {
        return Cow::Borrowed(text);
    }
    let line = |(at, line): (usize, &&str)| {
        if heads.contains(&at) {
            bold_cells(line)
        } else {
            (*line).to_owned()
        }
    };
    Cow::Owned(lines.iter().enumerate().map(line).collect())
}

/// Whether a line is what stands between a table's head and its rows: `|---|:-:|`.
fn is_delimiter(line: &str) -> bool {
    let line = line.trim();
    line.contains('|') && line.contains('-') && line.chars().all(|c| "|:- ".contains(c))
}

/// A row with its cells in bold; cells that have emphasis, code or escapes of their own stay as they are.
fn bold_cells(line: &str) -> String {
    if line.contains('\\') {
        return line.to_owned();
    }
    let (row, end) = line.split_at(line.trim_end().len());
    let cells = row.split('|').map(|cell| {
        let word = cell.trim();
        if word.is_empty() || word.contains(['*', '`', '_']) {
            cell.to_owned()
        } else {
            cell.replace(word, &format!("**{word}**"))
        }
    });
    cells.collect::<Vec<_>>().join("|") + end
}

#[cfg(test)]
mod tests {
    use super::{Markdown, bold_heads};

    #[test]
    fn heads_of_tables_are_bold() {
        let table = "a | b\n\n| name | `x` |\n|---|:-:|\n| 1 | 2 |\n";
        let bold = "a | b\n\n| **name** | `x` |\n|---|:-:|\n| 1 | 2 |\n";
        assert_eq!(bold_heads(table), bold);
        for text in ["```\n| a | b |\n|---|---|\n```\n", "a | b\n", "| a | b |\n"] {
            assert_eq!(bold_heads(text), text);
        }
    }

    fn texts(markdown: &Markdown) -> Vec<&str> {
        markdown
            .blocks
            .iter()
            .map(|block| block.text.as_str())
            .collect()
    }

    #[test]
    fn a_long_text_is_cut_between_paragraphs_and_loses_nothing() {
        let text = "A paragraph of some length, as they are.\n\n".repeat(1000);
        for step in [1, 7, 1000, text.len()] {
            let mut markdown = Markdown::default();
            for piece in text.as_bytes().chunks(step) {
                markdown.push(std::str::from_utf8(piece).unwrap());
            }
            assert_eq!(texts(&markdown).concat(), text);
            assert!(markdown.blocks() > 10, "{}", markdown.blocks());
            assert!(texts(&markdown).iter().all(|block| block.len() < 16_100));
        }
    }

    #[test]
    fn code_stays_code_where_it_is_cut() {
        let text = format!("```rust\n{}```\n\nafter\n", "let x = 1;\n".repeat(2000));
        let markdown = Markdown::new(&text);
        assert!(markdown.blocks() >= 2);
        for block in texts(&markdown) {
            assert_eq!(block.matches("```").count() % 2, 0, "{block}");
        }
    }

    #[test]
    fn a_text_without_a_line_end_is_cut_too() {
        let mut markdown = Markdown::default();
        for _ in 0..40_000 {
            markdown.push("x");
        }
        assert!(markdown.blocks() >= 2);
        assert_eq!(texts(&markdown).concat().len(), 40_000);
    }
}
