//! Timings of answers, by the session's clock, for the status line and the throughput view.

/// The timings of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnswerMeasure {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that were cached.
    pub cached_tokens: usize,
    /// Milliseconds from the request to the first token, once it has come.
    pub first_token: Option<f64>,
    /// Milliseconds from each token to the next.
    pub intervals: Vec<f32>,
    /// Whether its tokens were traced.
    pub traced: bool,
    /// Whether it has ended.
    pub finished: bool,
}

impl AnswerMeasure {
    /// Tokens a second over the last `window` intervals.
    #[must_use]
    pub fn rate(&self, window: usize) -> Option<f64> {
        let last = &self.intervals[self.intervals.len().saturating_sub(window)..];
        let milliseconds: f64 = last.iter().map(|interval| f64::from(*interval)).sum();
        (milliseconds > 0.0).then(|| last.len() as f64 * 1000.0 / milliseconds)
    }
}

/// The answers of this run; the last one may be in progress.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measures {
    /// Oldest first.
    pub answers: Vec<AnswerMeasure>,
    /// Tokens of the conversation so far.
    pub context_used: usize,
}

/// Frame times of the interface's thread.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FrameTimes {
    /// Number of frames.
    pub count: usize,
    /// Milliseconds of the longest frame.
    pub longest: f64,
    /// Milliseconds of all frames.
    pub sum: f64,
}

impl FrameTimes {
    /// Adds a frame.
    pub fn take(&mut self, milliseconds: f64) {
        self.count += 1;
        self.sum += milliseconds;
        self.longest = self.longest.max(milliseconds);
    }
}

impl std::fmt::Display for FrameTimes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mean = self.sum / self.count.max(1) as f64;
        let Self { count, longest, .. } = self;
        write!(
            f,
            "{count} frames, mean {mean:.1} ms, longest {longest:.1} ms"
        )
    }
}
