//! Python's methods on the strings of chat templates, and the filters that compare texts.
//!
//! Characters of a text may be hidden (`special.rs`), those of a template's own literals are not: texts are compared by what
//! they show, and what is cut out of a text stays hidden. What compares nothing is minijinja's.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::special::shown;

/// Calls a method of a value as Python would.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => text_method(&Text::new(text), name, args)?,
        (ValueKind::Seq, _) if name == "index" => Some(index(value, args)?),
        _ => None,
    };
    match found {
        Some(found) => Ok(found),
        None => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// The filter `replace`.
pub(super) fn replace(
    text: &Value,
    old: &Value,
    new: &Value,
    count: Option<i64>,
) -> Result<String, Error> {
    let text = Text::new(&text.to_string());
    Ok(text.replace(&Text::new(&old.to_string()), &new.to_string(), count))
}

/// The filter `trim`.
pub(super) fn trim(text: &Value, chars: Option<String>) -> String {
    Text::new(&text.to_string()).strip(chars.as_deref(), true, true)
}

/// The filter `title`: upper case after white space and brackets that open, as Jinja has it.
pub(super) fn title(text: &Value) -> String {
    let mut begins = true;
    let title = |c: char| {
        let upper = std::mem::replace(&mut begins, c.is_whitespace() || "-({[<".contains(shown(c)));
        match upper {
            true => c.to_uppercase().collect::<String>(),
            false => c.to_lowercase().collect(),
        }
    };
    text.to_string().chars().map(title).collect()
}

/// The filter `wordcount`.
pub(super) fn wordcount(text: &Value) -> usize {
    let text = text.to_string();
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty()).count()
}

/// Where in a list a value is.
fn index(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (what,): (&Value,) = from_args(args)?;
    let at = list.try_iter()?.position(|item| item == *what);
    at.map(Value::from)
        .ok_or_else(|| refused("index: the value is not in the list"))
}

fn refused(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// A method that compares texts, or that minijinja lacks; `None` for another.
fn text_method(text: &Text, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "split" | "rsplit" => {
            let (sep, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = sep.map_or_else(|| named.get::<Option<Value>>("sep"), |sep| Ok(Some(sep)))?;
            let most = most.map_or_else(|| named.get("maxsplit"), |most| Ok(Some(most)))?;
            named.assert_all_used()?;
            let sep = sep.filter(|sep| !sep.is_none() && !sep.is_undefined());
            let most = most.and_then(|most| usize::try_from(most).ok());
            let (most, right) = (most.unwrap_or(usize::MAX), name == "rsplit");
            let parts = match sep {
                None => text.words(most, right),
                Some(sep) => text.split(&one(&sep)?, most, right)?,
            };
            parts.into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (sep,): (Value,) = from_args(args)?;
            text.partition(&one(&sep)?, name == "rpartition")?
        }
        "startswith" | "endswith" => {
            let (what, from, to): (Value, Option<i64>, Option<i64>) = from_args(args)?;
            let text = text.slice(from, to);
            let fits = |what: &Text| match name {
                "startswith" => text.starts_with(what),
                _ => text.ends_with(what),
            };
            let any = match what.kind() {
                ValueKind::String => fits(&one(&what)?),
                _ => {
                    let each: Vec<Text> = what
                        .try_iter()?
                        .map(|it| one(&it))
                        .collect::<Result<_, _>>()?;
                    each.iter().any(fits)
                }
            };
            Value::from(any)
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, from, to): (Value, Option<i64>, Option<i64>) = from_args(args)?;
            let start = text.bound(from.unwrap_or(0));
            let (part, what) = (text.slice(from, to), one(&what)?);
            let at = match name.starts_with('r') {
                true => part.rfind(&what),
                false => part.find(&what, 0),
            };
            match at {
                Some(at) => Value::from(start + at),
                None if name.ends_with("index") => {
                    return Err(refused("index: the text is not in the string"));
                }
                None => Value::from(-1),
            }
        }
        "count" => {
            let (what,): (Value,) = from_args(args)?;
            Value::from(text.matches(&one(&what)?, usize::MAX).len())
        }
        "replace" => {
            let (old, new, count): (Value, Value, Option<i64>) = from_args(args)?;
            let (old, new) = (one(&old)?, one(&new)?);
            Value::from(text.replace(&old, &new.whole(), count))
        }
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<String>,) = from_args(args)?;
            Value::from(text.strip(chars.as_deref(), name != "rstrip", name != "lstrip"))
        }
        "removeprefix" | "removesuffix" => {
            let (what,): (Value,) = from_args(args)?;
            Value::from(text.without(&one(&what)?, name == "removeprefix"))
        }
        _ => return plain_method(text, name, args),
    }))
}

/// A method that compares nothing, and that minijinja lacks or has otherwise; `None` for another.
fn plain_method(text: &Text, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "splitlines" => {
            let (ends, named): (Option<bool>, Kwargs) = from_args(args)?;
            let ends = ends.map_or_else(|| named.get("keepends"), |ends| Ok(Some(ends)))?;
            named.assert_all_used()?;
            let lines = text.lines(ends.unwrap_or(false));
            lines.into_iter().map(Value::from).collect()
        }
        "isascii" => Value::from(text.0.iter().all(|c| shown(*c).is_ascii())),
        "swapcase" => Value::from(text.swap_case()),
        "casefold" => Value::from(text.whole().replace('ß', "ss").to_lowercase()),
        "title" => Value::from(text.title()),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            Value::from(text.zero_fill(width))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            Value::from(text.justify(width, fill.unwrap_or(' '), name))
        }
        _ => return Ok(None),
    }))
}

/// The text that a value is.
fn one(value: &Value) -> Result<Text, Error> {
    let wrong = || refused("a method of a string takes strings");
    value.as_str().map(Text::new).ok_or_else(wrong)
}

/// Lengths up to which a text may be filled: templates come with models of anyone's.
const WIDEST: usize = 1 << 16;

/// A text by its characters, some of which may be hidden.
struct Text(Vec<char>);

impl Text {
    fn new(text: &str) -> Self {
        Self(text.chars().collect())
    }

    fn whole(&self) -> String {
        self.0.iter().collect()
    }

    fn part(&self, from: usize, to: usize) -> String {
        self.0[from..to].iter().collect()
    }

    /// An index as Python reads it, from the end if it is negative.
    fn bound(&self, at: i64) -> usize {
        let length = self.0.len();
        let distance = usize::try_from(at.unsigned_abs()).unwrap_or(usize::MAX);
        match at < 0 {
            true => length.saturating_sub(distance),
            false => distance.min(length),
        }
    }

    fn slice(&self, from: Option<i64>, to: Option<i64>) -> Self {
        let from = self.bound(from.unwrap_or(0));
        let to = to.map_or(self.0.len(), |to| self.bound(to));
        Self(self.0[from..to.max(from)].to_vec())
    }

    /// Whether `what` is shown at `at`.
    fn is_at(&self, what: &Self, at: usize) -> bool {
        let here = self.0.get(at..at + what.0.len());
        here.is_some_and(|here| {
            here.iter()
                .zip(&what.0)
                .all(|(a, b)| shown(*a) == shown(*b))
        })
    }

    fn starts_with(&self, what: &Self) -> bool {
        self.is_at(what, 0)
    }

    fn ends_with(&self, what: &Self) -> bool {
        let at = self.0.len().checked_sub(what.0.len());
        at.is_some_and(|at| self.is_at(what, at))
    }

    fn find(&self, what: &Self, from: usize) -> Option<usize> {
        (from..=self.0.len().checked_sub(what.0.len())?).find(|at| self.is_at(what, *at))
    }

    fn rfind(&self, what: &Self) -> Option<usize> {
        self.rfind_before(what, self.0.len())
    }

    /// The last of those that end at `end` or before.
    fn rfind_before(&self, what: &Self, end: usize) -> Option<usize> {
        let last = end.checked_sub(what.0.len())?;
        (0..=last).rev().find(|at| self.is_at(what, *at))
    }

    /// Where `what` is, at most so many times and never across itself.
    fn matches(&self, what: &Self, most: usize) -> Vec<usize> {
        let (mut found, mut from) = (Vec::new(), 0);
        while found.len() < most
            && let Some(at) = self.find(what, from)
        {
            found.push(at);
            from = at + what.0.len().max(1);
        }
        found
    }

    /// The same, from the end.
    fn matches_from_end(&self, what: &Self, most: usize) -> Vec<usize> {
        let (mut found, mut end) = (Vec::new(), self.0.len());
        while found.len() < most
            && let Some(at) = self.rfind_before(what, end)
        {
            found.push(at);
            end = at;
        }
        found.reverse();
        found
    }

    fn split(&self, sep: &Self, most: usize, right: bool) -> Result<Vec<String>, Error> {
        if sep.0.is_empty() {
            return Err(refused("split: the separator is empty"));
        }
        let ends = match right && most < self.0.len() {
            true => self.matches_from_end(sep, most),
            false => self.matches(sep, most),
        };
        let (mut parts, mut from) = (Vec::with_capacity(ends.len() + 1), 0);
        for at in ends {
            parts.push(self.part(from, at));
            from = at + sep.0.len();
        }
        parts.push(self.part(from, self.0.len()));
        Ok(parts)
    }

    /// What is between white space.
    fn words(&self, most: usize, right: bool) -> Vec<String> {
        let mut chars = self.0.clone();
        if right {
            chars.reverse();
        }
        let (mut words, mut rest) = (Vec::new(), chars.as_slice());
        loop {
            let begin = rest.iter().position(|c| !c.is_whitespace());
            let Some(begin) = begin else { break };
            rest = &rest[begin..];
            if words.len() == most {
                // The rest is one, with the white space at its end.
                words.push(rest.to_vec());
                break;
            }
            let end = rest.iter().position(|c| c.is_whitespace());
            let (word, left) = rest.split_at(end.unwrap_or(rest.len()));
            words.push(word.to_vec());
            rest = left;
        }
        if right {
            words.reverse();
            words.iter_mut().for_each(|word| word.reverse());
        }
        words.iter().map(|word| word.iter().collect()).collect()
    }

    fn partition(&self, sep: &Self, right: bool) -> Result<Value, Error> {
        if sep.0.is_empty() {
            return Err(refused("partition: the separator is empty"));
        }
        let at = match right {
            true => self.rfind(sep),
            false => self.find(sep, 0),
        };
        let (empty, end) = (String::new, self.0.len());
        let parts = match at {
            Some(at) => {
                let after = at + sep.0.len();
                [
                    self.part(0, at),
                    self.part(at, after),
                    self.part(after, end),
                ]
            }
            None if right => [empty(), empty(), self.whole()],
            None => [self.whole(), empty(), empty()],
        };
        Ok(Value::from(Tuple::from(parts.map(Value::from))))
    }

    fn replace(&self, old: &Self, new: &str, count: Option<i64>) -> String {
        let most = count.and_then(|count| usize::try_from(count).ok());
        let mut out = String::new();
        let mut from = 0;
        for at in self.matches(old, most.unwrap_or(usize::MAX)) {
            out.extend(&self.0[from..at]);
            out.push_str(new);
            from = at + old.0.len();
        }
        out.extend(&self.0[from..]);
        out
    }

    fn strip(&self, chars: Option<&str>, left: bool, right: bool) -> String {
        let strip = |c: &char| match chars {
            None => c.is_whitespace(),
            Some(chars) => chars.chars().any(|one| shown(one) == shown(*c)),
        };
        let kept = |c: &char| !strip(c);
        let from = match left {
            true => self.0.iter().position(kept).unwrap_or(self.0.len()),
            false => 0,
        };
        let to = match right {
            true => self.0.iter().rposition(kept).map_or(from, |to| to + 1),
            false => self.0.len(),
        };
        self.part(from, to.max(from))
    }

    fn without(&self, what: &Self, prefix: bool) -> String {
        let end = self.0.len();
        match prefix {
            true if self.starts_with(what) => self.part(what.0.len(), end),
            false if self.ends_with(what) => self.part(0, end - what.0.len()),
            _ => self.whole(),
        }
    }

    fn lines(&self, ends: bool) -> Vec<String> {
        // `str.splitlines` of Python's documentation.
        let breaks = |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        let (mut lines, mut from, mut at) = (Vec::new(), 0, 0);
        while at < self.0.len() {
            let line = at;
            at += 1;
            if !breaks(self.0[line]) {
                continue;
            }
            if self.0[line] == '\r' && self.0.get(at) == Some(&'\n') {
                at += 1;
            }
            lines.push(self.part(from, if ends { at } else { line }));
            from = at;
        }
        if from < self.0.len() {
            lines.push(self.part(from, self.0.len()));
        }
        lines
    }

    fn swap_case(&self) -> String {
        let swap = |c: &char| match c.is_uppercase() {
            true => c.to_lowercase().collect::<String>(),
            false => c.to_uppercase().collect(),
        };
        self.0.iter().map(swap).collect()
    }

    /// Upper case after what is no letter, as Python has it.
    fn title(&self) -> String {
        let mut inside = false;
        let title = |c: &char| {
            let upper = !std::mem::replace(&mut inside, c.is_alphabetic());
            match upper {
                true => c.to_uppercase().collect::<String>(),
                false => c.to_lowercase().collect(),
            }
        };
        self.0.iter().map(title).collect()
    }

    fn zero_fill(&self, width: usize) -> String {
        let sign = self.0.first().is_some_and(|c| "+-".contains(*c));
        let (sign, digits) = self.0.split_at(usize::from(sign));
        let zeros = width.min(WIDEST).saturating_sub(self.0.len());
        let zeros = std::iter::repeat_n(&'0', zeros);
        sign.iter().chain(zeros).chain(digits).collect()
    }

    fn justify(&self, width: usize, fill: char, how: &str) -> String {
        let more = width.min(WIDEST).saturating_sub(self.0.len());
        let left = match how {
            "ljust" => 0,
            "rjust" => more,
            // As CPython rounds it.
            _ => more / 2 + (more & width & 1),
        };
        let fill = |count: usize| std::iter::repeat_n(fill, count);
        let text = self.0.iter().copied();
        fill(left).chain(text).chain(fill(more - left)).collect()
    }
}
