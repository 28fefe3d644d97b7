//! `kimi-linear chat` in a pseudo-terminal: each turn processes only new tokens.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::common::reference;
use portable_pty::{Child, CommandBuilder, PtyPair, PtySize, native_pty_system};

const PATIENCE: Duration = Duration::from_secs(60);

/// A chat in a pseudo-terminal.
struct Chat {
    _pair: PtyPair,
    /// The user's data folder.
    data: tempfile::TempDir,
    child: Box<dyn Child + Send + Sync>,
    writer: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    /// Output that was not yet compared.
    shown: String,
}

/// The numbers in the line under an answer.
#[derive(Debug, PartialEq)]
struct Summary {
    read: usize,
    prompt: usize,
    written: usize,
    line: String,
}

impl Chat {
    fn start(options: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), options)
    }

    /// Starts it with a data folder of earlier conversations.
    fn start_in(data: tempfile::TempDir, options: &[&str]) -> Self {
        let size = PtySize {
            rows: 24,
            cols: 100,
            pixel_width: 0,
            pixel_height: 0,
        };
        let pair = native_pty_system().openpty(size).unwrap();
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_kimi-linear"));
        command.args(["chat", "--backend", "cpu", "--model"]);
        command.arg(reference("tiny-a"));
        command.args(options);
        command.env("TERM", "xterm-256color");
        command.env("XDG_DATA_HOME", data.path());
        let child = pair.slave.spawn_command(command).unwrap();
        let mut reader = pair.master.try_clone_reader().unwrap();
        let writer = pair.master.take_writer().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut chat = Self {
            _pair: pair,
            data,
            child,
            writer,
            output,
            shown: String::new(),
        };
        chat.until("lists the commands");
        chat
    }

    /// Waits until `text` is shown; returns the output before it, without escapes.
    fn until(&mut self, text: &str) -> String {
        let start = Instant::now();
        loop {
            let plain = console::strip_ansi_codes(&self.shown).into_owned();
            if let Some(at) = plain.find(text) {
                self.shown = plain[at + text.len()..].to_owned();
                return plain[..at].to_owned();
            }
            let left = PATIENCE.saturating_sub(start.elapsed());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("waiting for {text:?}: {error}; shown: {plain:?}"),
            }
        }
    }

    fn type_line(&mut self, line: &str) {
        self.writer.write_all(line.as_bytes()).unwrap();
        self.writer.write_all(b"\r").unwrap();
    }

    /// The summary under the next answer.
    fn summary(&mut self) -> Summary {
        let before = self.until(" tokens read, ");
        let rest = self.until("]\r\n");
        let numbers = before.rsplit_once('[').unwrap().1.to_owned();
        let (read, prompt) = numbers.split_once(" of ").unwrap();
        let written = rest.split(' ').next().unwrap();
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{text:?}"));
        Summary {
            read: number(read),
            prompt: number(prompt),
            written: number(written),
            line: rest,
        }
    }

    fn ask(&mut self, question: &str) -> Summary {
        self.type_line(question);
        self.summary()
    }

    fn leave(mut self) -> tempfile::TempDir {
        self.type_line("/quit");
        assert!(self.child.wait().unwrap().success());
        self.data
    }
}

/// Asserts that a turn processed only the tokens since the last one: the template's text after an answer, the question, and
/// an answer's last token if it was sampled but has not run.
#[track_caller]
fn only_what_is_new(last: &Summary, now: &Summary, new: usize) {
    assert_eq!(
        now.prompt,
        last.prompt + last.written + new,
        "{last:?}, then {now:?}"
    );
    let unread = usize::from(last.line.contains("cut at its limit"));
    assert_eq!(now.read, new + unread, "{last:?}, then {now:?}");
}

#[test]
fn twenty_turns_read_only_what_is_new() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.kl");
    let mut chat = Chat::start(&["--system", "You are brief.", "--max-tokens", "9"]);
    let mut last = chat.ask("hello 00");
    assert_eq!(
        last.read, last.prompt,
        "the first turn reads all of its prompt"
    );
    let mut new = None;
    for turn in 1..20 {
        let now = chat.ask(&format!("hello {turn:02}"));
        let new = *new.get_or_insert(now.prompt - last.prompt - last.written);
        only_what_is_new(&last, &now, new);
        last = now;
    }
    let new = new.unwrap();
    assert!(last.prompt > 15 * new, "{last:?}");
    // Saved, reset, and loaded by another process.
    chat.type_line(&format!("/save {}", file.display()));
    chat.until("saved ");
    chat.type_line("/reset");
    chat.until("a new conversation");
    let fresh = chat.ask("hello 00");
    assert!(fresh.prompt < last.prompt);
    chat.leave();
    let mut chat = Chat::start(&["--max-tokens", "9"]);
    chat.type_line(&format!("/load {}", file.display()));
    chat.until("loaded 20 turns");
    let now = chat.ask("hello 20");
    only_what_is_new(&last, &now, new);
    // A snapshot that is damaged is refused, and the conversation stays.
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    chat.type_line(&format!("/load {}", file.display()));
    chat.until("is damaged: its checksum should be");
    let next = chat.ask("hello 21");
    only_what_is_new(&now, &next, new);
    chat.leave();
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let mut chat = Chat::start(&["--max-tokens", "7000", "--seed", "1", "--temperature", "1"]);
    chat.type_line("hello");
    chat.until("tokens/s");
    chat.writer.write_all(b"\x03").unwrap();
    let stopped = chat.summary();
    assert!(stopped.line.ends_with("; stopped"), "{stopped:?}");
    assert!(stopped.written > 1);
    // Ctrl-C at the prompt stops nothing.
    chat.until("> ");
    chat.writer.write_all(b"\x03").unwrap();
    chat.until("Ctrl-D or /quit leaves");
    chat.type_line("/help");
    chat.until("/save [NAME|FILE]");
    chat.type_line("/nonsense");
    chat.until("there is no /nonsense");
    // What was written until then decides how long the next answer is: it may end at once.
    chat.type_line("/set max_tokens 20");
    let next = chat.ask("hello again");
    assert!(
        next.read < stopped.prompt + 30,
        "what was written before is not read again: {next:?}"
    );
    chat.leave();
}

#[test]
fn what_is_typed_while_an_answer_comes_is_asked_next() {
    let mut chat = Chat::start(&["--max-tokens", "40"]);
    chat.writer
        .write_all(b"hello 00\rhello 01\rhello 02\r")
        .unwrap();
    let first = chat.summary();
    let second = chat.summary();
    let third = chat.summary();
    assert!(first.prompt < second.prompt && second.prompt < third.prompt);
    // Typed during an answer, before its end is shown.
    chat.type_line("hello 03");
    chat.until("tokens/s");
    chat.type_line("hello 04");
    let fourth = chat.summary();
    let fifth = chat.summary();
    assert!(third.prompt < fourth.prompt && fourth.prompt < fifth.prompt);
    chat.leave();
}

#[test]
fn a_conversation_is_changed_saved_under_a_name_and_found_again() {
    let mut chat = Chat::start(&["--max-tokens", "9"]);
    let first = chat.ask("hello 00");
    let second = chat.ask("hello 01");
    chat.type_line("/undo");
    chat.until("taken back: hello 01");
    let again = chat.ask("hello 01");
    assert_eq!(
        (again.prompt, again.written),
        (second.prompt, second.written)
    );
    chat.type_line("/regen");
    let again = chat.summary();
    assert_eq!(
        (again.prompt, again.written),
        (second.prompt, second.written)
    );
    chat.type_line("/set max_tokens 2");
    chat.until("set\r\n");
    chat.type_line("/set");
    chat.until("max_tokens          2");
    chat.type_line("/set warmth 3");
    chat.until("there is no parameter `warmth`");
    let short = chat.ask("hello 02");
    assert_eq!(short.written, 2);
    chat.type_line("/save");
    chat.until("a name is needed");
    chat.type_line("/save boxes");
    chat.until("saved ");
    chat.type_line("/reset");
    chat.until("a new conversation");
    assert_eq!(chat.ask("hello 00").prompt, first.prompt);
    // Another conversation's file is not overwritten.
    chat.type_line("/save boxes");
    chat.until("is there already");
    let mut chat = Chat::start_in(chat.leave(), &["--max-tokens", "9"]);
    chat.type_line("/load");
    chat.until("boxes");
    chat.type_line("/load boxes");
    chat.until("> hello 00");
    chat.until("> hello 02");
    chat.until("loaded 3 turns");
    let next = chat.ask("hello 03");
    assert!(next.prompt > short.prompt);
    chat.type_line("/save");
    chat.until("saved ");
    // The line history contains both conversations: the third line back is the question.
    chat.writer.write_all(b"\x1b[A\x1b[A\x1b[A\x1b[A").unwrap();
    chat.until("/load");
    chat.writer.write_all(b"\x15").unwrap();
    chat.leave();
}
