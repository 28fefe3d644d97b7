//! Parsing of input lines into commands and text, and the completion of commands.

use rustyline::completion::Completer;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::Validator;
use rustyline::{Context, Helper, Result};

/// The commands, as `/help` lists them.
pub(super) const HELP: &str = "\
/help              show this
/regen             answer the last question again with another seed
/undo              remove the last question and its answer
/reset             start over with the same system prompt
/system [TEXT]     start over with this system prompt; without TEXT: with none
/set [NAME VALUE]  change a sampling parameter; without NAME: show them all
/model             show the model and the device
/save [NAME|FILE]  save the conversation and the model's state
/load [NAME|FILE]  continue a saved conversation; without NAME: list them
/quit              quit; so do exit, quit and Ctrl-D
Ctrl-C stops an answer; the part already written is kept.
Lines typed during an answer are sent when it ends.";

const COMMANDS: [&str; 11] = [
    "/exit", "/help", "/load", "/model", "/quit", "/regen", "/reset", "/save", "/set", "/system",
    "/undo",
];

/// A parsed line of input.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    Say(String),
    Help,
    Regenerate,
    Undo,
    Reset,
    System(String),
    Set(String),
    Model,
    Save(String),
    Load(String),
    Quit,
    Unknown(String),
}

impl Line {
    /// Parses a line that has been trimmed.
    pub(super) fn parse(line: &str) -> Self {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim().to_owned();
        match command {
            "/help" | "/?" => Self::Help,
            "help" if rest.is_empty() => Self::Help,
            "/regen" => Self::Regenerate,
            "/undo" => Self::Undo,
            "/reset" => Self::Reset,
            "/system" => Self::System(rest),
            "/set" => Self::Set(rest),
            "/model" => Self::Model,
            "/save" => Self::Save(rest),
            "/load" => Self::Load(rest),
            "/quit" | "/exit" | "/bye" => Self::Quit,
            "quit" | "exit" if rest.is_empty() => Self::Quit,
            _ if is_command(command) => Self::Unknown(command.to_owned()),
            _ => Self::Say(line.to_owned()),
        }
    }
}

/// Whether a word is meant as a command: a slash and letters. A path is not.
fn is_command(word: &str) -> bool {
    word.strip_prefix('/')
        .is_some_and(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase()))
}

/// Completes commands with Tab.
pub(super) struct Commands;

impl Completer for Commands {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> Result<(usize, Vec<String>)> {
        let written = &line[..at];
        let fitting = COMMANDS
            .iter()
            .filter(|command| written.starts_with('/') && command.starts_with(written));
        Ok((0, fitting.map(|command| (*command).to_owned()).collect()))
    }
}

impl Hinter for Commands {
    type Hint = String;
}

impl Highlighter for Commands {}
impl Validator for Commands {}
impl Helper for Commands {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_text() {
        for (line, parsed) in [
            ("/save", Line::Save(String::new())),
            ("/save my chat", Line::Save("my chat".to_owned())),
            ("/system  Be brief. ", Line::System("Be brief.".to_owned())),
            ("exit", Line::Quit),
            ("exit the room", Line::Say("exit the room".to_owned())),
            ("help", Line::Help),
            ("/usr/bin?", Line::Say("/usr/bin?".to_owned())),
            ("/nonsense", Line::Unknown("/nonsense".to_owned())),
            ("/", Line::Say("/".to_owned())),
        ] {
            assert_eq!(Line::parse(line), parsed, "{line}");
        }
    }

    #[test]
    fn every_command_is_in_the_help() {
        for command in COMMANDS {
            assert!(
                !matches!(Line::parse(command), Line::Unknown(_)),
                "{command}"
            );
            assert!(HELP.contains(command) || command == "/exit", "{command}");
        }
    }
}
