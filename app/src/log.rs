//! The log of the log panel: the last lines of `tracing` events.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use web_time::Instant;

/// What the log panel shows: messages of interest to users.
pub const PANEL: &str = "info,wgpu=warn,wgpu_core=warn,wgpu_hal=warn,naga=warn,zbus=warn";

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

    /// Collects the page's messages.
    #[cfg(target_arch = "wasm32")]
    pub fn follow(&self) {
        use tracing_subscriber::filter::Targets;
        use tracing_subscriber::layer::SubscriberExt;
        use tracing_subscriber::util::SubscriberInitExt;
        let shown: Targets = PANEL.parse().unwrap_or_default();
        let layer = self.clone().with_filter(shown);
        tracing_subscriber::registry().with(layer).init();
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
