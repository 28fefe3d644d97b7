//! The scheduler's options. The paper gives no values; each of ours says why it is what it is.

use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear_plan::scheduler::Options;

use super::parse;

/// When the scheduler acts.
#[derive(Args)]
#[command(next_help_heading = "Scheduler")]
pub(super) struct SchedulerOptions {
    /// Recent requests that the threshold is searched over: 2,048 tell the offloaded share within 1.1 points and are minutes of traffic.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    window: usize,
    /// Requests to see before the planned threshold is touched: 256 tell the share within 3 points.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    settle: usize,
    /// Time between searches while nothing presses: traffic changes over minutes.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse::time)]
    search_every: Duration,
    /// The least time between searches while something does: a decision takes seconds to show in the counters.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse::time)]
    search_soonest: Duration,
    /// Time within which a backlog should be gone: shorter and the threshold swings, longer and queues stay.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse::time)]
    horizon: Duration,
    /// A threshold that is worse than the best by no more than this part is kept: the window's noise is as large.
    #[arg(long, value_name = "PART", default_value_t = 0.02, value_parser = parse::part)]
    deadband: f64,
    /// Search at once above this use of the link: beyond it queues grow steeply.
    #[arg(long, value_name = "PART", default_value_t = 0.8, value_parser = parse::part)]
    use_trigger: f64,
    /// Search at once where so much work waits at the link or before a node: about one long prefill.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse::time)]
    drain_trigger: Duration,
    /// Search at once where more than this part is sent again: TCP's rate has collapsed by then, and no queue shows it yet.
    #[arg(long, value_name = "PART", default_value_t = 0.01, value_parser = parse::part)]
    loss_trigger: f64,
    /// Stop copying prefixes above this use of the link: what is left is the threshold's ...
    #[arg(long, value_name = "PART", default_value_t = 0.7, value_parser = parse::part)]
    scarce_above: f64,
    /// ... and start again below this one, apart from the other so that it does not flap.
    #[arg(long, value_name = "PART", default_value_t = 0.5, value_parser = parse::part)]
    ample_below: f64,
    /// How much faster the link is thought each second without a backlog, after it was slow: 0.02 believes in it again after a
    /// minute and a half.
    #[arg(long, value_name = "PART", default_value_t = 0.02, value_parser = parse::part)]
    probe: f64,
    /// Time between looks at the split: a conversion takes a node away for a minute, so looks are rarer.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse::time)]
    replan_every: Duration,
    /// The gain in throughput that a conversion must promise: less would not pay for the minute.
    #[arg(long, value_name = "PART", default_value_t = 0.05, value_parser = parse::part)]
    convert_gain: f64,
    /// Looks in a row that must promise it: one burst is not a trend.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    convert_agree: u32,
    /// Time between two conversions: the first must show before the next.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse::time)]
    convert_pause: Duration,
    /// The part of the present throughput that must be asked for before a node is turned: an idle cluster needs none.
    #[arg(long, value_name = "PART", default_value_t = 0.5, value_parser = parse::part)]
    convert_busy: f64,
}

impl SchedulerOptions {
    pub(super) fn options(&self) -> Options {
        Options {
            window: self.window,
            settle: self.settle,
            search_every: self.search_every,
            search_soonest: self.search_soonest,
            horizon: self.horizon,
            deadband: self.deadband,
            use_trigger: self.use_trigger,
            drain_trigger: self.drain_trigger,
            loss_trigger: self.loss_trigger,
            scarce_above: self.scarce_above,
            ample_below: self.ample_below,
            probe: self.probe,
            replan_every: self.replan_every,
            convert_gain: self.convert_gain,
            convert_agree: self.convert_agree,
            convert_pause: self.convert_pause,
            convert_busy: self.convert_busy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        scheduler: SchedulerOptions,
    }

    #[test]
    fn the_commands_defaults_are_the_schedulers() {
        let cli = Cli::parse_from(["plan"]);
        assert_eq!(cli.scheduler.options(), Options::default());
    }
}
