//! The scheduler's options. The paper gives no values; each option's help gives the reason for its default.

use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear_plan::scheduler::Options;

use super::parse;

/// Triggers and intervals of the scheduler.
#[derive(Args)]
#[command(next_help_heading = "Scheduler")]
pub(super) struct SchedulerOptions {
    /// Number of recent requests that a threshold search uses. 2,048 give the offloaded share within 1.1 percentage points and span
    /// minutes of traffic.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    window: usize,
    /// Number of requests to observe before the planned threshold may change. 256 give the offloaded share within 3 percentage points.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    settle: usize,
    /// Time between threshold searches in normal operation; traffic changes over minutes.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse::time)]
    search_every: Duration,
    /// Minimum time between searches after a trigger; a decision takes seconds to show in the counters.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse::time)]
    search_soonest: Duration,
    /// Time in which a backlog should be worked off. If it is shorter the threshold oscillates, if longer queues persist.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse::time)]
    horizon: Duration,
    /// Keep the threshold if the best one is better by no more than this fraction, which is the noise of the window.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.02, value_parser = parse::part)]
    deadband: f64,
    /// Link utilisation that triggers a search; above it queues grow steeply.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.8, value_parser = parse::part)]
    use_trigger: f64,
    /// Queued work at the link or at a node that triggers a search: about one long prefill.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse::time)]
    drain_trigger: Duration,
    /// Fraction of retransmitted bytes that triggers a search; TCP's rate has collapsed by then, before a queue shows it.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.01, value_parser = parse::part)]
    loss_trigger: f64,
    /// Link utilisation above which cached prefixes are no longer copied between clusters, so that offloaded prompts get the bandwidth.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.7, value_parser = parse::part)]
    scarce_above: f64,
    /// Link utilisation below which copying starts again; lower than --scarce-above, so that it does not flap.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.5, value_parser = parse::part)]
    ample_below: f64,
    /// Fraction by which the estimate of a slow link's bandwidth grows per second without a backlog. With 0.02 a drop by 80 % is forgotten
    /// after a minute and a half.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.02, value_parser = parse::part)]
    probe: f64,
    /// Time between reviews of the split between prefill and decode; a conversion costs a node for a minute, so reviews are rarer than
    /// searches.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse::time)]
    replan_every: Duration,
    /// Minimum predicted gain in throughput for a conversion; a smaller one does not pay for that minute.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.05, value_parser = parse::part)]
    convert_gain: f64,
    /// Number of consecutive reviews that must predict this gain, since one burst is not a trend.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    convert_agree: u32,
    /// Minimum time between two conversions, so that the first shows its effect before the next.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse::time)]
    convert_pause: Duration,
    /// Minimum load for a conversion, as a fraction of the present throughput; an idle cluster needs none.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.5, value_parser = parse::part)]
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
