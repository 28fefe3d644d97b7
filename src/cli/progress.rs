//! Progress bars on stderr, if it is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that disappears when it is finished.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar for bytes.
    pub(crate) fn bytes(what: &'static str, total: u64) -> Self {
        Self::new(
            what,
            total,
            "{msg:>9} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {eta}",
        )
    }

    /// A bar for bytes from elsewhere, with their rate.
    pub(crate) fn transfer(what: &'static str, total: u64) -> Self {
        Self::new(
            what,
            total,
            "{msg:>9} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        )
    }

    /// A bar for tokens.
    pub(crate) fn tokens(what: &'static str, total: usize) -> Self {
        Self::new(
            what,
            total as u64,
            "{msg:>9} {wide_bar} {human_pos}/{human_len} tokens {per_sec} {eta}",
        )
    }

    /// A bar for questions or requests.
    pub(crate) fn count(what: &'static str, total: usize) -> Self {
        Self::new(
            what,
            total as u64,
            "{msg:>9} {wide_bar} {human_pos}/{human_len} {eta}",
        )
    }

    fn new(what: &'static str, total: u64, template: &str) -> Self {
        // indicatif draws on stderr, and only if it is a terminal.
        let bar = ProgressBar::new(total).with_message(what);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Advances by one.
    #[cfg(feature = "server")]
    pub(crate) fn add_one(&self) {
        self.0.inc(1);
    }

    pub(crate) fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    /// Prints something while the bar is hidden.
    pub(crate) fn beside<T>(&self, print: impl FnOnce() -> T) -> T {
        self.0.suspend(print)
    }

    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}
