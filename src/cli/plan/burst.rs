//! `kimi-linear plan replay --burst`: replicas that drop duplicated parameters to free memory for caches.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use kimi_linear_plan::burst::cost::Costs;
use kimi_linear_plan::burst::instance::{Form, Instance};
use kimi_linear_plan::burst::{self, Failure, Options, Policy, Setup};
use kimi_linear_plan::lengths::LogNormal;
use kimi_linear_plan::report;
use kimi_linear_plan::trace::Trace;
use serde_json::json;

use super::super::options::parse_tokens_u32;
use super::parse;

/// Options of `plan replay --burst`.
#[derive(Args)]
#[command(next_help_heading = "Bursts")]
pub(super) struct BurstOptions {
    /// Simulate replicas of one model that drop duplicated parameters during load bursts (KunServe, arXiv 2412.18169), beside other
    /// policies for full memory. Options of clusters, link and scheduler have no effect, and prefixes are not cached.
    #[arg(long)]
    burst: bool,
    /// Instance type: qwen2.5-14b-a800 or qwen2.5-72b-h800 (the paper's), kimi-linear-48b-h200, or a JSON file with the same fields.
    #[arg(long, value_name = "INSTANCE", default_value = "qwen2.5-14b-a800")]
    instance: String,
    /// Number of instances; the paper has eight of the 14B model and four of the 72B model.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..=256))]
    instances: u32,
    /// Which parameters the instances of a group drop. Default: the first kind that the instance type lists.
    #[arg(long, value_enum, value_name = "KIND")]
    drop: Option<FormName>,
    /// Policies for full memory to compare, separated by commas. Default: all of them.
    #[arg(long, value_enum, value_name = "POLICY", value_delimiter = ',', hide_default_value = true, default_values_t = PolicyName::value_variants().to_vec())]
    policies: Vec<PolicyName>,
    /// Scale the arrival rate so that the mean cache demand, if memory had no limit, is this fraction of the cache memory; the paper has
    /// under 0.6.
    #[arg(long, value_name = "FRACTION", conflicts_with = "rate", value_parser = parse::part)]
    demand: Option<f64>,
    /// Draw prompt lengths from lognormal:MU,SIGMA,LOW,HIGH instead of the trace, with the trace's arrival times.
    #[arg(long, value_name = "LENGTHS", value_parser = parse::lognormal)]
    prompts: Option<LogNormal>,
    /// Draw answer lengths from lognormal:MU,SIGMA,LOW,HIGH instead of the trace.
    #[arg(long, value_name = "LENGTHS", value_parser = parse::lognormal)]
    answers: Option<LogNormal>,
    /// Maximum prompt tokens per step. 1,024 of the 14B model take an A800 about 221 ms, the paper's figure for a prefill step.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_tokens_u32)]
    step_tokens: u32,
    /// Time between checks of the cache demand; the default is the paper's.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = parse::time)]
    poll: Duration,
    /// Number of consecutive checks that must find too much demand; a single one may fall between the end of a request and the admission of
    /// the next.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    agree: u32,
    /// Count all queued requests as demand, as the paper does. By default they count only if the first of them does not fit in memory,
    /// since more memory does not help requests that wait for computation.
    #[arg(long)]
    count_all: bool,
    /// Time that dropping takes; the default is the paper's, with CUDA's virtual memory.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = parse::time)]
    drop_time: Duration,
    /// Maximum number of instances in a group. Each further one frees less memory and adds a pipeline stage to every token.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    group: u32,
    /// Restore parameters when caches use less than this fraction of the cache memory before the drop; the default is the paper's.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.5, value_parser = parse::part)]
    restore_below: f64,
    /// Never restore dropped parameters.
    #[arg(long)]
    no_restore: bool,
    /// Split micro-batches by token count instead of by predicted cost.
    #[arg(long)]
    equal_tokens: bool,
    /// Send caches that move between instances all at once before the activations, instead of in chunks behind them.
    #[arg(long)]
    uncoordinated: bool,
    /// GiB of host memory per instance for swapped caches. The default is more than a GPU has, so that the transfer is the limit.
    #[arg(long, value_name = "GIB", default_value_t = 128)]
    host_memory: u64,
    /// Let instance N, counted from 0, fail for good at TIME, such as 10m=3. Can be repeated.
    #[arg(long, value_name = "TIME=N", value_parser = parse::failure)]
    fail: Vec<Failure>,
}

/// Which parameters are dropped.
#[derive(Clone, Copy, ValueEnum)]
enum FormName {
    /// Layers: the instances of a group form a pipeline.
    Layers,
    /// Experts: the instances of a group exchange tokens.
    Experts,
}

/// A policy for full memory.
#[derive(Clone, Copy, ValueEnum)]
enum PolicyName {
    /// Preempt the last request and prefill it again later (vLLM).
    Recompute,
    /// Preempt the last request and move its cache to host memory.
    Swap,
    /// Move caches to the instance with the most free memory (after Llumnix).
    Migrate,
    /// Run pipelines of two instances all the time.
    Pipeline,
    /// Drop duplicated parameters and restore them later (KunServe).
    Drop,
}

impl From<PolicyName> for Policy {
    fn from(name: PolicyName) -> Self {
        match name {
            PolicyName::Recompute => Self::Recompute,
            PolicyName::Swap => Self::Swap,
            PolicyName::Migrate => Self::Migrate,
            PolicyName::Pipeline => Self::Pipeline,
            PolicyName::Drop => Self::Drop,
        }
    }
}

/// Where a replay's results go.
pub(super) struct Output<'a> {
    /// The trace's name.
    pub(super) name: &'a str,
    pub(super) svg: Option<&'a Path>,
    pub(super) json: bool,
}

impl BurstOptions {
    /// Whether --burst was given.
    pub(super) fn asked(&self) -> bool {
        self.burst
    }

    fn options(&self) -> Options {
        Options {
            budget_tokens: self.step_tokens,
            poll: self.poll,
            agree: self.agree,
            for_memory: !self.count_all,
            drop_time: self.drop_time,
            most_members: self.group,
            restore_below: self.restore_below,
            restore: !self.no_restore,
            look_ahead: !self.equal_tokens,
            coordinated: !self.uncoordinated,
            host_bytes: self.host_memory.saturating_mul(1 << 30),
        }
    }

    /// Replays the trace that `make` makes at a number of times its rate.
    pub(super) fn run(
        &self,
        make: &dyn Fn(f64) -> Result<Trace>,
        seed: u64,
        output: &Output<'_>,
    ) -> Result<()> {
        let instance = Instance::open(&self.instance)?;
        let form = match self.drop {
            Some(FormName::Layers) => Form::Layers,
            Some(FormName::Experts) => Form::Experts,
            None => instance.form(),
        };
        let setup = Setup {
            instance,
            instances: self.instances,
            form,
            policy: Policy::Drop,
            options: self.options(),
            failures: self.fail.clone(),
        };
        let lengths = |drawn: &Option<LogNormal>| drawn.map(|drawn| drawn.lengths()).transpose();
        let (prompts, answers) = (lengths(&self.prompts)?, lengths(&self.answers)?);
        let redrawn = |times: f64| {
            let trace = make(times).map_err(|error| kimi_linear_plan::Error::Spec {
                text: output.name.into(),
                expected: error.to_string(),
            })?;
            Ok(trace.redrawn(prompts.as_ref(), answers.as_ref(), seed))
        };
        let trace = match self.demand {
            Some(part) => burst::scale_to_demand(&redrawn, &setup, part)?,
            None => redrawn(1.0)?,
        };
        let policies: Vec<Policy> = self.policies.iter().map(|name| (*name).into()).collect();
        let outcomes = burst::compare(&trace, &setup, &policies)?;
        if let Some(file) = output.svg {
            super::write(file, &report::burst_svg(&outcomes)?)?;
        }
        self.print(&setup, &trace, &outcomes, output)
    }

    fn print(
        &self,
        setup: &Setup,
        trace: &Trace,
        outcomes: &[burst::outcome::Outcome],
        output: &Output<'_>,
    ) -> Result<()> {
        let costs = Costs::of(&setup.instance)?;
        let (count, rate) = (trace.requests().len(), trace.rate());
        let (prompt, answer) = (trace.prompt_tokens(), trace.output_tokens());
        let bytes = setup.instance.cache_bytes() * u64::from(setup.instances);
        if output.json {
            return super::super::print_json(&json!({
                "trace": {
                    "name": output.name,
                    "requests": count,
                    "requests_per_second": rate,
                    "prompt_tokens": prompt,
                    "output_tokens": answer,
                },
                "instance": setup.instance,
                "instances": setup.instances,
                "drop": setup.form,
                "costs": costs,
                "cache_bytes": bytes,
                "policies": outcomes,
            }));
        }
        let what = format!(
            "{}: {count} requests at {rate:.2} a second; prompts of {prompt:.0} tokens, answers of {answer:.0}; {} instances, which \
             drop {}.",
            output.name,
            setup.instances,
            setup.form.name()
        );
        let text = report::burst_text(&what, &setup.instance, &costs, bytes, outcomes);
        std::io::stdout().write_all(text.as_bytes())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        burst: BurstOptions,
        #[arg(long)]
        rate: Option<f64>,
    }

    #[test]
    fn the_commands_defaults_are_the_policys() {
        let cli = Cli::parse_from(["plan"]);
        assert_eq!(cli.burst.options(), Options::default());
        let policies: Vec<Policy> = cli
            .burst
            .policies
            .iter()
            .map(|name| (*name).into())
            .collect();
        assert_eq!(policies, Policy::ALL);
        assert!(!cli.burst.asked() && cli.rate.is_none());
    }
}
