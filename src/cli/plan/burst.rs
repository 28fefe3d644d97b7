//! `kimi-linear plan replay --burst`: duplicated parameters make room for caches.

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

use super::parse;

/// Options of `plan replay --burst`.
#[derive(Args)]
#[command(next_help_heading = "Bursts")]
pub(super) struct BurstOptions {
    /// Replay on replicas of one model whose duplicated parameters are dropped in bursts (KunServe, arXiv 2412.18169), beside what others
    /// do when memory does not suffice. The options of clusters, link and scheduler say nothing here; prefixes are not cached.
    #[arg(long)]
    burst: bool,
    /// An instance: qwen2.5-14b-a800, qwen2.5-72b-h800 (the paper's), kimi-linear-48b-h200, or a file with the same fields.
    #[arg(long, value_name = "I", default_value = "qwen2.5-14b-a800")]
    instance: String,
    /// How many there are; the paper has eight of the 14B model, four of the 72B one.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..=256))]
    instances: u32,
    /// What is dropped: layers, so that a group is a pipeline, or experts, so that its members exchange tokens; by default what the
    /// instance has first.
    #[arg(long, value_enum, value_name = "WHAT")]
    drop: Option<FormName>,
    /// What is done when memory does not suffice; several, side by side.
    #[arg(long, value_enum, value_name = "POLICY", value_delimiter = ',', default_values_t = PolicyName::value_variants().to_vec())]
    policies: Vec<PolicyName>,
    /// Scale arrivals until requests need this part of the memory for caches in the mean, if memory had no limit; the paper has under 0.6.
    #[arg(long, value_name = "PART", conflicts_with = "rate", value_parser = parse::part)]
    demand: Option<f64>,
    /// Draw the prompts' lengths instead of the trace's: lognormal:MU,SIGMA,LOW,HIGH. Arrivals stay.
    #[arg(long, value_name = "D", value_parser = parse::lognormal)]
    prompts: Option<LogNormal>,
    /// The same for the answers'.
    #[arg(long, value_name = "D", value_parser = parse::lognormal)]
    answers: Option<LogNormal>,
    /// Prompt tokens of a step: 1,024 of a 14B model take an A800 about the 221 ms that the paper has for a prefill's step.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    step_tokens: u32,
    /// Time between looks at the demand, as in the paper.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = parse::time)]
    poll: Duration,
    /// Looks in a row that must see too much demand: a single one may fall between a request's end and the next one's admission.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    agree: u32,
    /// Count all queued requests as demand, as the paper does. By default they count where the first of them does not fit: memory does not
    /// help those that wait for computation.
    #[arg(long)]
    count_all: bool,
    /// Time that it takes to drop; the paper's with CUDA's virtual memory.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = parse::time)]
    drop_time: Duration,
    /// The most instances of a group: each more frees less beside what is there, and adds a stage to each token's way.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    group: u32,
    /// Restore where caches take less than this part of the memory for them before the drop, as in the paper.
    #[arg(long, value_name = "PART", default_value_t = 0.5, value_parser = parse::part)]
    restore_below: f64,
    /// Do not restore.
    #[arg(long)]
    no_restore: bool,
    /// Fill micro-batches by tokens, without looking ahead at their cost.
    #[arg(long)]
    equal_tokens: bool,
    /// Send caches that change hands in one go, before the activations.
    #[arg(long)]
    uncoordinated: bool,
    /// GiB of host memory for swapped caches, of an instance: more than a GPU has, so that the way there decides.
    #[arg(long, value_name = "GIB", default_value_t = 128)]
    host_memory: u64,
    /// Let an instance (from 0) fail at a time and not come back, such as 10m=3; may be given several times.
    #[arg(long, value_name = "TIME=N", value_parser = parse::failure)]
    fail: Vec<Failure>,
}

/// What is dropped.
#[derive(Clone, Copy, ValueEnum)]
enum FormName {
    /// Layers.
    Layers,
    /// Experts.
    Experts,
}

/// What is done.
#[derive(Clone, Copy, ValueEnum)]
enum PolicyName {
    /// The last request gives up its cache and is prefilled again (vLLM).
    Recompute,
    /// Its cache goes to host memory and comes back.
    Swap,
    /// Caches move to the instance with most room (after Llumnix).
    Migrate,
    /// Pipelines of two all the time.
    Pipeline,
    /// Duplicated parameters are dropped and restored (KunServe).
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

/// How a replay is put out.
pub(super) struct Output<'a> {
    /// The trace's name.
    pub(super) name: &'a str,
    pub(super) svg: Option<&'a Path>,
    pub(super) json: bool,
}

impl BurstOptions {
    /// Whether this replay is asked for.
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
