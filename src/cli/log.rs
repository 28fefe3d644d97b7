//! The log on stderr. A separate thread writes it, so that a stderr that is full, closed or not read blocks no other thread.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait to be written; past them lines are lost.
const WAITING: usize = 1024;

/// How long the program's end waits for the last lines.
const PATIENCE: Duration = Duration::from_secs(1);

/// What goes to the thread.
enum Entry {
    Line(Vec<u8>),
    /// A flush: the message is sent back once everything before it has been written.
    End(SyncSender<()>),
}

/// A log that has been started.
pub(super) struct Log(Option<SyncSender<Entry>>);

impl Log {
    /// Warnings and more, with times, written by a thread: for a server. `KIMI_LINEAR_LOG` chooses otherwise.
    #[cfg(feature = "server")]
    pub(super) fn of_a_server(format: super::serve::LogFormat) -> Self {
        use super::serve::LogFormat;
        let (sender, entries) = sync_channel(WAITING);
        let thread = std::thread::Builder::new().name("log".to_owned());
        if thread.spawn(move || write(&entries)).is_err() {
            return Self::of_a_command();
        }
        let log = tracing_subscriber::fmt()
            .with_writer(Lines(sender.clone()))
            .with_ansi(has_colours())
            .with_target(false)
            .log_internal_errors(false)
            .with_env_filter(chosen("info"));
        match format {
            LogFormat::Text => log.init(),
            LogFormat::Json => log.json().flatten_event(true).init(),
        }
        Self(Some(sender))
    }

    /// Warnings alone. `KIMI_LINEAR_LOG` chooses otherwise.
    pub(super) fn of_a_command() -> Self {
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_ansi(has_colours())
            .with_target(false)
            // What cannot be written is lost: telling of it on the same stderr would panic.
            .log_internal_errors(false)
            .with_env_filter(chosen("warn"))
            .without_time()
            .init();
        Self(None)
    }

    /// Waits until what was logged is written, for a while.
    pub(super) fn finish(self) {
        let Some(sender) = self.0 else { return };
        let (told, written) = sync_channel(1);
        if sender.try_send(Entry::End(told)).is_ok() {
            let _ = written.recv_timeout(PATIENCE);
        }
    }
}

fn chosen(default: &str) -> EnvFilter {
    EnvFilter::try_from_env("KIMI_LINEAR_LOG").unwrap_or_else(|_| EnvFilter::new(default))
}

fn has_colours() -> bool {
    std::io::stderr().is_terminal() && console::colors_enabled_stderr()
}

/// Writes what comes. What cannot be written is lost.
fn write(entries: &Receiver<Entry>) {
    for entry in entries {
        match entry {
            Entry::Line(line) => _ = std::io::stderr().write_all(&line),
            Entry::End(told) => _ = told.try_send(()),
        }
    }
}

/// Takes lines for the thread.
#[derive(Clone)]
struct Lines(SyncSender<Entry>);

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        // If it is full, stderr is not being read, and the line is dropped.
        let _ = self.0.try_send(Entry::Line(line.to_vec()));
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
