//! The log of the log panel: the last lines of `tracing` events.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Number of lines to keep.
const MOST_LINES: usize = 2000;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Milliseconds since the program began.
    pub milliseconds: u128,
    /// Its level.
    pub level: Level,
    /// Its target, message and fields.
    pub text: String,
}

/// The last lines; clones share them.
#[derive(Clone)]
pub struct Log {
    lines: Arc<Mutex<VecDeque<Line>>>,
    began: Instant,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            lines: Arc::default(),
            began: Instant::now(),
        }
    }
}

impl Log {
    /// The lines there are, oldest first.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }

    /// Removes all lines.
    pub fn clear(&self) {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn push(&self, level: Level, text: String) {
        let milliseconds = self.began.elapsed().as_millis();
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= MOST_LINES {
            lines.pop_front();
        }
        lines.push_back(Line {
            milliseconds,
            level,
            text,
        });
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut words = Words::default();
        event.record(&mut words);
        let target = event.metadata().target();
        self.push(
            *event.metadata().level(),
            format!("{target}: {}{}", words.message, words.fields),
        );
    }
}

#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing into a string cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}
