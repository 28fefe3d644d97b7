//! What a chat template's source becomes before it is compiled.
//!
//! Jinja reads any line ending as `\n`. Transformers adds `{% generation %}`, which marks what the assistant says and prints
//! its content. `'..' % x` is Python's formatting, which minijinja has as the filter `format`. And where a template
//! compares texts with its own literals, the literals can be hidden as the texts are (`special.rs`).

use std::ops::Range;

/// A token of an expression or a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Word,
    Text,
    Sign,
}

#[derive(Clone, Debug)]
struct Token {
    kind: Kind,
    at: Range<usize>,
}

/// What stands between `{{` and `}}`, or `{%` and `%}`.
struct Block {
    is_statement: bool,
    tokens: Vec<Token>,
}

/// The source as minijinja reads it.
pub(super) fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut edits = Edits::default();
    for Block {
        is_statement,
        tokens,
    } in blocks(&source)
    {
        if is_statement && let [only] = &tokens[..] {
            match &source[only.at.clone()] {
                "generation" => edits.replace(only.at.clone(), "with"),
                "endgeneration" => edits.replace(only.at.clone(), "endwith"),
                _ => {}
            }
        }
        formatting(&source, &tokens, &mut edits);
    }
    edits.apply(&source)
}

/// The source with the literals hidden that texts are compared with: by `==`, `!=` and `in`, or by a variable that `set` gives
/// nothing else. What such a variable holds may be written too: a literal that `spells` a control token stays what it is there.
pub(super) fn hide_compared(
    source: &str,
    hide: &dyn Fn(&str) -> String,
    spells: &dyn Fn(&str) -> bool,
) -> String {
    let mut edits = Edits::default();
    for Block { tokens, .. } in blocks(source) {
        let word = |at: usize| tokens.get(at).map_or("", |token| &source[token.at.clone()]);
        let is_set = word(0) == "set" && word(2) == "=" && tokens.len() == 4;
        let is_loop = word(0) == "for";
        // Brackets that are open, and whether what is in them is compared.
        let mut compared = Vec::new();
        for (i, token) in tokens.iter().enumerate() {
            let before = i.checked_sub(1).map_or("", word);
            match word(i) {
                "[" | "(" => compared.push(before == "in" && !is_loop),
                "]" | ")" => _ = compared.pop(),
                _ => {}
            }
            let inner = token.at.start + 1..token.at.end.saturating_sub(1);
            if token.kind != Kind::Text || inner.is_empty() {
                continue;
            }
            let text = &source[inner.clone()];
            let beside = ["==", "!=", "in"].contains(&before) && !(is_loop && before == "in");
            let beside = beside || ["==", "!=", "in", "not"].contains(&word(i + 1));
            if beside || compared.last() == Some(&true) || (is_set && !spells(text)) {
                edits.replace(inner, &hide(text));
            }
        }
    }
    edits.apply(source)
}

/// `'..' % x` becomes `'..' |format(x)`.
fn formatting(source: &str, tokens: &[Token], edits: &mut Edits) {
    for (i, pair) in tokens.windows(2).enumerate() {
        let [text, sign] = pair else { continue };
        if text.kind != Kind::Text || &source[sign.at.clone()] != "%" {
            continue;
        }
        let Some(first) = tokens.get(i + 2) else {
            continue;
        };
        if &source[first.at.clone()] == "(" {
            edits.replace(sign.at.clone(), "|format");
        } else if let Some(last) = tokens.get(operand(source, tokens, i + 2)) {
            edits.replace(sign.at.clone(), "|format(");
            edits.replace(last.at.end..last.at.end, ")");
        }
    }
}

/// The last token of the operand that begins at `at`: a name or literal with its sign, attributes, items, calls and filters.
fn operand(source: &str, tokens: &[Token], mut at: usize) -> usize {
    let word = |at: usize| tokens.get(at).map_or("", |token| &source[token.at.clone()]);
    while ["-", "+"].contains(&word(at)) {
        at += 1;
    }
    if ["[", "{"].contains(&word(at)) {
        at = closing(source, tokens, at);
    }
    loop {
        match word(at + 1) {
            "." | "|" => at += 2,
            "[" | "(" => at = closing(source, tokens, at + 1),
            _ => return at,
        }
    }
}

/// The token that closes the bracket at `at`; the number of tokens if none does.
fn closing(source: &str, tokens: &[Token], at: usize) -> usize {
    let mut depth = 0_usize;
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match &source[token.at.clone()] {
            "[" | "(" | "{" => depth += 1,
            "]" | ")" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    tokens.len()
}

/// Replacements in a text.
#[derive(Default)]
struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    fn replace(&mut self, at: Range<usize>, with: &str) {
        self.0.push((at, with.to_owned()));
    }

    fn apply(mut self, source: &str) -> String {
        self.0.sort_by_key(|(at, _)| (at.start, at.end));
        let (mut out, mut done) = (String::with_capacity(source.len()), 0);
        for (at, with) in self.0 {
            out.push_str(&source[done..at.start]);
            out.push_str(&with);
            done = at.end;
        }
        out.push_str(&source[done..]);
        out
    }
}

/// The tokens of each expression and statement; comments and raw text have none.
fn blocks(source: &str) -> Vec<Block> {
    let (mut blocks, mut at, mut raw) = (Vec::new(), 0, false);
    while let Some(begin) = source[at..].find('{').map(|begin| at + begin) {
        let end = match source.as_bytes().get(begin + 1) {
            Some(b'{') if !raw => "}}",
            Some(b'%') => "%}",
            Some(b'#') if !raw => {
                let end = source[begin..].find("#}");
                at = end.map_or(source.len(), |end| begin + end + 2);
                continue;
            }
            _ => {
                at = begin + 1;
                continue;
            }
        };
        let (tokens, after) = tokens(source, begin + 2, end);
        let word = match &tokens[..] {
            [only] => &source[only.at.clone()],
            _ => "",
        };
        if raw && word != "endraw" {
            // What looks like a statement is text.
            at = begin + 2;
            continue;
        }
        raw = word == "raw";
        at = after;
        blocks.push(Block {
            is_statement: end == "%}",
            tokens,
        });
    }
    blocks
}

/// The tokens from `at` to `end`, and where the text goes on.
fn tokens(source: &str, mut at: usize, end: &str) -> (Vec<Token>, usize) {
    let (mut tokens, mut braces) = (Vec::new(), 0_usize);
    while let Some(c) = source[at..].chars().next() {
        if braces == 0 && source[at..].starts_with(end) {
            return (tokens, at + end.len());
        }
        let (kind, length) = match c {
            '\'' | '"' => (Kind::Text, literal(&source[at..], c)),
            c if c.is_alphanumeric() || c == '_' => {
                let rest = source[at..].find(|c: char| !c.is_alphanumeric() && c != '_');
                (Kind::Word, rest.unwrap_or(source.len() - at))
            }
            c => {
                let two = ["==", "!=", "<=", ">=", "//", "**"];
                let two = two.iter().any(|two| source[at..].starts_with(two));
                (Kind::Sign, if two { 2 } else { c.len_utf8() })
            }
        };
        match c {
            '{' => braces += 1,
            '}' => braces = braces.saturating_sub(1),
            _ => {}
        }
        // A sign beside the brackets controls white space.
        let controls =
            "-+".contains(c) && (tokens.is_empty() || source[at + length..].starts_with(end));
        if !c.is_whitespace() && !controls {
            let at = at..at + length;
            tokens.push(Token { kind, at });
        }
        at += length;
    }
    (tokens, source.len())
}

/// Bytes of the literal that a text begins with.
fn literal(text: &str, quote: char) -> usize {
    let (mut escaped, mut length) = (false, 1);
    for c in text.chars().skip(1) {
        length += c.len_utf8();
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return length,
            _ => {}
        }
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_minijinja_lacks_is_written_otherwise() {
        for (source, expected) in [
            ("a\r\nb\rc", "a\nb\nc"),
            (
                "{%- generation -%}x{%- endgeneration %}",
                "{%- with -%}x{%- endwith %}",
            ),
            ("{{ generation }}", "{{ generation }}"),
            ("{{ '%s' % x }}", "{{ '%s' |format( x) }}"),
            ("{{ '%s' % -3 }}", "{{ '%s' |format( -3) }}"),
            (
                "{{ '%s' % [1, {'a': 2}][0] ~ x }}",
                "{{ '%s' |format( [1, {'a': 2}][0]) ~ x }}",
            ),
            ("{{ '%s-%d' % (a, b) }}", "{{ '%s-%d' |format (a, b) }}"),
            (
                "{{ \"%s\" % m['a'].b(1)|upper ~ 'c' }}",
                "{{ \"%s\" |format( m['a'].b(1)|upper) ~ 'c' }}",
            ),
            ("{{ 7 % 2 }}{# '%s' % x #}", "{{ 7 % 2 }}{# '%s' % x #}"),
            (
                "{% raw %}{{ '%s' % x }}{% endraw %}",
                "{% raw %}{{ '%s' % x }}{% endraw %}",
            ),
            ("{% set x = '}}' % y %}", "{% set x = '}}' |format( y) %}"),
            ("{{ 'never ends", "{{ 'never ends"),
        ] {
            assert_eq!(prepare(source), expected, "{source}");
        }
    }

    #[test]
    fn literals_that_texts_are_compared_with_are_hidden() {
        let hide = |text: &str| text.replace('|', "!");
        for (source, expected) in [
            (
                "{% if x == '|' %}|{% endif %}",
                "{% if x == '!' %}|{% endif %}",
            ),
            ("{{ '|' ~ ('|' in x) }}", "{{ '|' ~ ('!' in x) }}"),
            ("{{ x in ['|a', '|b'] }}", "{{ x in ['!a', '!b'] }}"),
            ("{{ '|' not in x }}", "{{ '!' not in x }}"),
            ("{{ x.split('|') }}", "{{ x.split('|') }}"),
            ("{% set s = '|' %}", "{% set s = '!' %}"),
            ("{% set s = '<|im_end|>' %}", "{% set s = '<|im_end|>' %}"),
            ("{% set s = '|' ~ x %}", "{% set s = '|' ~ x %}"),
            ("{% for s in ['|'] %}", "{% for s in ['|'] %}"),
        ] {
            let spells = |text: &str| text.contains("im_end");
            assert_eq!(hide_compared(source, &hide, &spells), expected);
        }
    }
}
