//! `kimi-linear tokenize`: the ids of a text or a chat. Reads no weights, only the tokenizer's files.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use kimi_linear::tokenizer::Chat;
use serde::Serialize;

use super::options::{ModelOptions, read_text};

/// Options of `tokenize`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    input: Input,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Text to tokenize; names of control tokens in it are encoded as ordinary text.
    #[arg(value_name = "TEXT")]
    argument: Option<String>,
    /// Text to tokenize, as an option: the same as TEXT, but it may begin with a hyphen.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// Text file to tokenize; `-` is stdin.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// JSON file with a chat: `{"messages": [..], "tools": [..], "add_generation_prompt": true}` or the list of messages alone.
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    ids: Vec<u32>,
    pieces: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rendered: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let tokenizer = arguments.model.whole_tokenizer()?;
    let (ids, rendered) = if let Some(file) = &arguments.input.messages {
        let chat = Chat::from_json(&read_text(file)?)?;
        let encoded = tokenizer.encode_chat(&arguments.model.template()?, &chat)?;
        (encoded.ids, Some(encoded.rendered))
    } else {
        let input = &arguments.input;
        let text = match (input.argument.as_ref().or(input.text.as_ref()), &input.file) {
            (Some(text), _) => text.clone(),
            (None, Some(file)) => read_text(file)?,
            (None, None) => String::new(),
        };
        (tokenizer.encode_ordinary(&text)?, None)
    };
    let piece = |id: &u32| {
        tokenizer
            .piece(*id)
            .map_or_else(String::new, |piece| piece.text().into_owned())
    };
    let report = Report {
        pieces: ids.iter().map(piece).collect(),
        ids,
        rendered,
    };
    if arguments.json {
        return super::print_json(&report);
    }
    let mut stdout = std::io::stdout().lock();
    for id in &report.ids {
        let bytes = tokenizer.piece(*id).map_or(&[][..], |piece| piece.bytes);
        writeln!(stdout, "{id:>7}  {}", shown(bytes))?;
    }
    Ok(())
}

/// A token's bytes as quoted text, in which bytes of incomplete characters are written as `\\xE6`.
fn shown(bytes: &[u8]) -> String {
    let mut text = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        text.extend(chunk.valid().escape_debug());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02X}")));
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_characters_are_shown_as_bytes() {
        assert_eq!(shown("a \"b\"\n".as_bytes()), r#""a \"b\"\n""#);
        assert_eq!(shown("日".as_bytes()), "\"日\"");
        assert_eq!(shown(&[b'x', 0xE6, 0x97]), r#""x\xE6\x97""#);
    }
}
