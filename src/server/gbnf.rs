//! Converts grammars in llama.cpp's GBNF, of which vLLM's EBNF is a subset (`root ::= ...`), to llguidance's Lark.
//!
//! A grammar without recursion becomes one regular expression. In others each character becomes a lexeme of its own: longer
//! lexemes would be matched greedily, and GBNF has none.

use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

/// The rule that an answer follows.
const ROOT: &str = "root";

/// Maximum depth of parentheses.
const DEEPEST: usize = 100;

/// A part of a rule.
#[derive(Clone, Debug, PartialEq)]
enum Expr {
    Alternatives(Vec<Expr>),
    Sequence(Vec<Expr>),
    /// A text.
    Literal(String),
    /// One character of a class, as a regular expression.
    Class(String),
    Rule(usize),
    /// At least, and at most, so many times.
    Repeat(Box<Expr>, u32, Option<u32>),
}

/// Whether a source is GBNF or EBNF, and not Lark.
pub(super) fn is_gbnf(source: &str) -> bool {
    source.contains("::=")
}

/// The same grammar in Lark.
///
/// # Errors
/// What is wrong with the source, with the line.
pub(super) fn to_lark(source: &str) -> Result<String, String> {
    let tokens = tokens(source)?;
    let rules = Parser::new(&tokens).grammar()?;
    // The root is the first rule of the table.
    let regular = (0..rules.len()).all(|rule| !reaches(&rules, rule, rule))
        && !is_nullable(&rules, &rules[0]);
    let mut lark = format!("start: {}\n", name(0, regular));
    for (i, rule) in rules.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = writeln!(lark, "{}: {}", name(i, regular), text(rule, regular));
    }
    Ok(lark)
}

/// The name of a rule in Lark: terminals are in capitals.
fn name(rule: usize, regular: bool) -> String {
    match regular {
        true => format!("R{rule}"),
        false => format!("r{rule}"),
    }
}

fn text(expr: &Expr, regular: bool) -> String {
    match expr {
        Expr::Alternatives(parts) => {
            let parts: Vec<_> = parts.iter().map(|part| text(part, regular)).collect();
            format!("({})", parts.join(" | "))
        }
        Expr::Sequence(parts) if parts.is_empty() => "\"\"".to_owned(),
        Expr::Sequence(parts) => {
            let parts: Vec<_> = parts.iter().map(|part| text(part, regular)).collect();
            format!("({})", parts.join(" "))
        }
        Expr::Literal(literal) if regular || literal.is_empty() => quoted(literal),
        Expr::Literal(literal) => {
            let each: Vec<_> = literal.chars().map(|c| quoted(&c.to_string())).collect();
            format!("({})", each.join(" "))
        }
        Expr::Class(class) => format!("/{class}/"),
        Expr::Rule(rule) => name(*rule, regular),
        Expr::Repeat(part, from, to) => {
            let part = text(part, regular);
            match (from, to) {
                (0, None) => format!("{part}*"),
                (1, None) => format!("{part}+"),
                (0, Some(1)) => format!("{part}?"),
                (from, None) => format!("{part}{{{from},}}"),
                (from, Some(to)) => format!("{part}{{{from},{to}}}"),
            }
        }
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The rules that an expression names.
fn named(expr: &Expr, found: &mut Vec<usize>) {
    match expr {
        Expr::Alternatives(parts) | Expr::Sequence(parts) => {
            parts.iter().for_each(|part| named(part, found));
        }
        Expr::Repeat(part, ..) => named(part, found),
        Expr::Rule(rule) => found.push(*rule),
        Expr::Literal(_) | Expr::Class(_) => {}
    }
}

/// Whether a rule leads to another in one step or more.
fn reaches(rules: &[Expr], from: usize, to: usize) -> bool {
    let (mut seen, mut next) = (vec![false; rules.len()], Vec::new());
    named(&rules[from], &mut next);
    while let Some(rule) = next.pop() {
        if rule == to {
            return true;
        }
        if !std::mem::replace(&mut seen[rule], true) {
            named(&rules[rule], &mut next);
        }
    }
    false
}

/// Whether an expression of rules without recursion matches the empty text.
fn is_nullable(rules: &[Expr], expr: &Expr) -> bool {
    match expr {
        Expr::Alternatives(parts) => parts.iter().any(|part| is_nullable(rules, part)),
        Expr::Sequence(parts) => parts.iter().all(|part| is_nullable(rules, part)),
        Expr::Literal(text) => text.is_empty(),
        Expr::Class(_) => false,
        Expr::Rule(rule) => is_nullable(rules, &rules[*rule]),
        Expr::Repeat(part, from, _) => *from == 0 || is_nullable(rules, part),
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    Defines,
    Literal(String),
    Class(String),
    Bar,
    Open,
    Close,
    /// `*`, `+`, `?` and `{m,n}`.
    Repeat(u32, Option<u32>),
}

/// The tokens of a source, each with its line.
fn tokens(source: &str) -> Result<Vec<(usize, Token)>, String> {
    let mut chars = source.chars().peekable();
    let (mut line, mut all) = (1, Vec::new());
    while let Some(c) = chars.next() {
        let token = match c {
            '\n' => {
                line += 1;
                continue;
            }
            c if c.is_whitespace() => continue,
            '#' => {
                while chars.next_if(|c| *c != '\n').is_some() {}
                continue;
            }
            '|' => Token::Bar,
            '(' => Token::Open,
            ')' => Token::Close,
            '*' => Token::Repeat(0, None),
            '+' => Token::Repeat(1, None),
            '?' => Token::Repeat(0, Some(1)),
            '.' => Token::Class("[\\x{0}-\\x{10FFFF}]".to_owned()),
            ':' if chars.next() == Some(':') && chars.next() == Some('=') => Token::Defines,
            '"' => literal(&mut chars).map(Token::Literal).map_err(at(line))?,
            '[' => class(&mut chars).map(Token::Class).map_err(at(line))?,
            '{' => repeat(&mut chars).map_err(at(line))?,
            c if is_name(c) => {
                let mut name = String::from(c);
                while let Some(c) = chars.next_if(|c| is_name(*c)) {
                    name.push(c);
                }
                Token::Name(name)
            }
            other => return Err(format!("line {line}: `{other}` is not part of GBNF")),
        };
        all.push((line, token));
    }
    Ok(all)
}

fn at(line: usize) -> impl Fn(String) -> String {
    move |reason| format!("line {line}: {reason}")
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// A text up to its closing quotation mark.
fn literal(chars: &mut Peekable<Chars<'_>>) -> Result<String, String> {
    let mut text = String::new();
    loop {
        match chars.next() {
            Some('"') => return Ok(text),
            Some('\\') => text.push(escaped(chars)?),
            Some('\n') | None => return Err("a text without its closing `\"`".to_owned()),
            Some(c) => text.push(c),
        }
    }
}

/// A class of characters up to its closing bracket, as a regular expression.
fn class(chars: &mut Peekable<Chars<'_>>) -> Result<String, String> {
    let mut regex = String::from("[");
    if chars.next_if_eq(&'^').is_some() {
        regex.push('^');
    }
    let unclosed = || "a class of characters without its closing `]`".to_owned();
    let mut members = 0;
    loop {
        let from = match chars.next().ok_or_else(unclosed)? {
            ']' if members == 0 => return Err("a class without characters".to_owned()),
            ']' => {
                regex.push(']');
                return Ok(regex);
            }
            '\\' => escaped(chars)?,
            c => c,
        };
        members += 1;
        let _ = write!(regex, "\\x{{{:X}}}", u32::from(from));
        if chars.next_if_eq(&'-').is_none() {
            continue;
        }
        let to = match chars.next().ok_or_else(unclosed)? {
            // A dash at the end is itself.
            ']' => {
                regex.push_str("\\x{2D}]");
                return Ok(regex);
            }
            '\\' => escaped(chars)?,
            c => c,
        };
        if to < from {
            return Err(format!("the range {from}-{to} is empty"));
        }
        let _ = write!(regex, "-\\x{{{:X}}}", u32::from(to));
    }
}

/// The character after a backslash.
fn escaped(chars: &mut Peekable<Chars<'_>>) -> Result<char, String> {
    let c = chars.next().ok_or("a backslash at the end")?;
    let digits = match c {
        'n' => return Ok('\n'),
        'r' => return Ok('\r'),
        't' => return Ok('\t'),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        '\\' | '"' | '\'' | '[' | ']' | '-' | '^' | '/' => return Ok(c),
        other => return Err(format!("`\\{other}` is not an escape of GBNF")),
    };
    let mut code = 0;
    for _ in 0..digits {
        let digit = chars.next().and_then(|c| c.to_digit(16));
        let digit = digit.ok_or_else(|| format!("`\\{c}` is followed by {digits} digits"))?;
        code = code * 16 + digit;
    }
    char::from_u32(code).ok_or_else(|| format!("`\\{c}{code:X}` is not a character"))
}

/// `m}`, `m,}`, `,n}` or `m,n}`.
fn repeat(chars: &mut Peekable<Chars<'_>>) -> Result<Token, String> {
    let mut text = String::new();
    loop {
        match chars.next() {
            Some('}') => break,
            Some(c) if c.is_ascii_digit() || c == ',' => text.push(c),
            Some(c) if c.is_whitespace() => {}
            _ => return Err("a repetition is written `{m}`, `{m,}` or `{m,n}`".to_owned()),
        }
    }
    let wrong = || format!("`{{{text}}}` is not a repetition such as `{{1,3}}`");
    let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
    let (from, to) = match text.split_once(',') {
        None => (number(&text)?, Some(number(&text)?)),
        Some(("", to)) => (0, Some(number(to)?)),
        Some((from, "")) => (number(from)?, None),
        Some((from, to)) => (number(from)?, Some(number(to)?)),
    };
    match to.is_some_and(|to| to < from) {
        true => Err(wrong()),
        false => Ok(Token::Repeat(from, to)),
    }
}

struct Parser<'a> {
    tokens: &'a [(usize, Token)],
    next: usize,
    /// The numbers of rules by name; the root's is 0.
    numbers: HashMap<String, usize>,
    /// The rules, once they are defined, and the line where each is named first.
    rules: Vec<(Option<Expr>, usize)>,
}

impl<'a> Parser<'a> {
    fn new(tokens: &'a [(usize, Token)]) -> Self {
        let mut parser = Self {
            tokens,
            next: 0,
            numbers: HashMap::new(),
            rules: Vec::new(),
        };
        parser.number(ROOT, 1);
        parser
    }

    /// All rules, the root first.
    fn grammar(mut self) -> Result<Vec<Expr>, String> {
        while let Some((line, token)) = self.tokens.get(self.next) {
            let (Token::Name(name), true) = (token, self.defines(self.next)) else {
                return Err(format!("line {line}: a rule is written `name ::= ...`"));
            };
            self.next += 2;
            let number = self.number(name, *line);
            if self.rules[number].0.is_some() {
                return Err(format!("line {line}: the rule `{name}` is defined twice"));
            }
            let expr = self.alternatives(0)?;
            if let Some((line, Token::Close)) = self.tokens.get(self.next) {
                return Err(format!("line {line}: there is no `(` for this `)`"));
            }
            self.rules[number].0 = Some(expr);
        }
        let numbers = self.numbers;
        let define = |(number, (expr, line)): (usize, (Option<Expr>, usize))| {
            expr.ok_or_else(|| {
                let name = numbers.iter().find(|(_, own)| **own == number);
                let name = name.map_or("", |(name, _)| name.as_str());
                format!("line {line}: the rule `{name}` is not defined")
            })
        };
        self.rules.into_iter().enumerate().map(define).collect()
    }

    /// The number of a rule.
    fn number(&mut self, name: &str, line: usize) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.rules.len();
        self.rules.push((None, line));
        self.numbers.insert(name.to_owned(), number);
        number
    }

    /// Whether a rule's definition begins at a token.
    fn defines(&self, at: usize) -> bool {
        let token = |at: usize| self.tokens.get(at).map(|(_, token)| token);
        matches!(token(at), Some(Token::Name(_))) && token(at + 1) == Some(&Token::Defines)
    }

    fn alternatives(&mut self, depth: usize) -> Result<Expr, String> {
        let mut all = vec![self.sequence(depth)?];
        while let Some((_, Token::Bar)) = self.tokens.get(self.next) {
            self.next += 1;
            all.push(self.sequence(depth)?);
        }
        Ok(match all.len() {
            1 => all.remove(0),
            _ => Expr::Alternatives(all),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, String> {
        let mut parts = Vec::new();
        while let Some((line, token)) = self.tokens.get(self.next) {
            let part = match token {
                Token::Bar | Token::Close => break,
                Token::Name(_) if self.defines(self.next) => break,
                Token::Name(name) => Expr::Rule(self.number(name, *line)),
                Token::Literal(text) => Expr::Literal(text.clone()),
                Token::Class(regex) => Expr::Class(regex.clone()),
                Token::Defines => return Err(format!("line {line}: `::=` follows a name")),
                Token::Repeat(..) => {
                    return Err(format!(
                        "line {line}: a repetition follows what is repeated"
                    ));
                }
                Token::Open if depth == DEEPEST => {
                    return Err(format!(
                        "line {line}: more than {DEEPEST} parentheses are open"
                    ));
                }
                Token::Open => {
                    self.next += 1;
                    let inner = self.alternatives(depth + 1)?;
                    let Some((_, Token::Close)) = self.tokens.get(self.next) else {
                        return Err(format!("line {line}: there is no `)` for this `(`"));
                    };
                    inner
                }
            };
            self.next += 1;
            parts.push(self.repeated(part));
        }
        Ok(match parts.len() {
            1 => parts.remove(0),
            _ => Expr::Sequence(parts),
        })
    }

    /// A part with the repetitions that follow it.
    fn repeated(&mut self, mut part: Expr) -> Expr {
        while let Some((_, Token::Repeat(from, to))) = self.tokens.get(self.next) {
            self.next += 1;
            part = Expr::Repeat(Box::new(part), *from, *to);
        }
        part
    }
}

#[cfg(test)]
mod tests {
    use super::super::grammar::takes;
    use super::*;

    #[test]
    fn a_grammar_without_recursion_is_one_expression() {
        let source = "# a comment\nroot ::= \"a\\n\" (word | [^x-z\\]]){2,} . # the rest\nword ::=\n  \"b\"? | \n  \"c\"";
        let lark = "start: R0\nR0: (\"a\\n\" (R1 | /[^\\x{78}-\\x{7A}\\x{5D}]/){2,} /[\\x{0}-\\x{10FFFF}]/)\nR1: (\"b\"? | \"c\")\n";
        assert_eq!(to_lark(source).unwrap(), lark);
    }

    #[test]
    fn recursion_makes_each_character_a_lexeme() {
        let source = "item ::= \"ab\" | \"(\" root \")\"\nroot ::= item* [0-9-]";
        let lark = "start: r0\nr0: (r1* /[\\x{30}-\\x{39}\\x{2D}]/)\nr1: ((\"a\" \"b\") | ((\"(\") r0 (\")\")))\n";
        assert_eq!(to_lark(source).unwrap(), lark);
        // An empty answer is no regular expression's match in llguidance.
        assert_eq!(
            to_lark("root ::= \"a\"*").unwrap(),
            "start: r0\nr0: (\"a\")*\n"
        );
    }

    #[test]
    fn escapes_are_characters() {
        let source = r#"root ::= "\x41\u00e9\U0001F600\"\\" [\-\^\t]"#;
        let lark = "start: R0\nR0: (\"Aé😀\\\"\\\\\" /[\\x{2D}\\x{5E}\\x{9}]/)\n";
        assert_eq!(to_lark(source).unwrap(), lark);
    }

    #[test]
    fn llguidance_takes_the_same_texts() {
        let json = r#"root ::= value
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws ::= [ \t\n]{0,8}"#;
        for (source, good, bad) in [
            // Longest matches would make "ab" a lexeme and refuse what ends with it.
            (
                "root ::= \"a\" \"b\" | \"ab\" \"c\" | \"(\" root \")\"",
                &["ab", "abc", "((ab))"][..],
                &["a", "(ab", "abcc"][..],
            ),
            (
                "root ::= \"a\" \"b\" | \"ab\" \"c\"",
                &["ab", "abc"],
                &["abcc", "b"],
            ),
            (
                "root ::= list?\nlist ::= [a-c] list | \"é\"",
                &["", "abcé"],
                &["abc", "d"],
            ),
            (
                json,
                &[r#"{"a": [1, -2.5e3, "x\n"], "b": {}}"#, "[]"],
                &[r#"{"a" 1}"#, "[1,]"],
            ),
        ] {
            let lark = to_lark(source).unwrap();
            for text in good {
                assert!(takes(&lark, text), "{text}: {lark}");
            }
            for text in bad {
                assert!(!takes(&lark, text), "{text}: {lark}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (source, part) in [
            ("start ::= \"a\"", "line 1: the rule `root` is not defined"),
            (
                "root ::=\n  other",
                "line 2: the rule `other` is not defined",
            ),
            ("root ::= \"a", "line 1: a text without"),
            ("root ::= [a", "line 1: a class of characters without"),
            ("root ::= []", "a class without characters"),
            ("root ::= [z-a]", "the range z-a is empty"),
            ("root ::= \"\\q\"", "`\\q` is not an escape"),
            ("root ::= \"\\ud800\"", "is not a character"),
            ("root ::= \"a\"{3,1}", "`{3,1}` is not a repetition"),
            ("root ::= \"a\"{x}", "a repetition is written"),
            ("root ::= * \"a\"", "a repetition follows"),
            ("root ::= (\"a\"", "there is no `)`"),
            ("root ::= \"a\")", "there is no `(`"),
            (
                "root ::= \"a\"\nroot ::= \"b\"",
                "line 2: the rule `root` is defined twice",
            ),
            ("\"a\" ::= \"b\"", "a rule is written"),
            ("root ::= <think>", "`<` is not part of GBNF"),
        ] {
            let error = to_lark(source).unwrap_err();
            assert!(error.contains(part), "{source}: {error}");
        }
        let deep = format!("root ::= {}\"a\"{}", "(".repeat(1000), ")".repeat(1000));
        assert!(to_lark(&deep).unwrap_err().contains("100 parentheses"));
    }
}
