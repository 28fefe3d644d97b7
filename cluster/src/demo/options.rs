//! The command line of the demo.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use kimi_linear::llm::LlmFiles;
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::trace::Trace;

use super::error::{DemoError, Result};
use super::parts::{Discovery, Role, Threshold};
use super::prompts;

/// Two clusters of Kimi Linear on this machine, joined by a shaped link: long prompts are prefilled in the PrfaaS cluster, short ones
/// and all answers in the local one. Starts every process, sends a load, shows where each request went, stops everything and leaves a
/// report.
#[derive(Clone, Debug, Parser)]
#[command(name = "kimi-linear-cluster-demo", version)]
pub struct Options {
    /// The model: a folder in the published format, or a GGUF. Default: the demo model, which is part of the program.
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    /// Number of PrfaaS prefill workers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub prfaas: usize,
    /// Number of local prefill workers.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub prefill: usize,
    /// Number of decode workers.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub decode: usize,
    /// Sequences that a worker runs at a time.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub max_num_seqs: usize,
    /// Maximum tokens of prompt and answer. Default: the model's, at most 8192.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(64..))]
    pub max_model_len: Option<usize>,
    /// Threads that compute in each worker.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub threads: usize,
    /// Run all processes at loopback addresses, without network namespaces and without a shaped link. Needs no root.
    #[arg(long)]
    pub no_namespaces: bool,
    /// Rate of the link in each direction in bit/s, such as 100M or 1G; none for as fast as the machine copies.
    #[arg(long, value_name = "RATE|none", default_value = "100M", value_parser = parse_rate)]
    pub link: Rate,
    /// Delay of the link in each direction, such as 5ms. The kernel must have netem.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub delay: Option<Duration>,
    /// Discovery by etcd, which is started and stopped, in place of a folder.
    #[arg(long)]
    pub etcd: bool,
    /// Offload prompts of more than this many uncached tokens: a number, none, or auto for what the scheduler decides.
    #[arg(long, value_name = "N|none|auto", default_value = "auto", value_parser = parse_threshold)]
    pub threshold: Threshold,
    /// Run the load twice: first with nothing offloaded.
    #[arg(long)]
    pub compare: bool,
    /// Arrivals, lengths and shared prefixes: a trace in Mooncake's, Azure's or BurstGPT's format. Default: a built-in synthetic one.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Number of requests.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub requests: usize,
    /// Mean arrivals per second; their pattern is the trace's.
    #[arg(long, value_name = "R", default_value_t = 2.0, value_parser = parse_positive)]
    pub rate: f64,
    /// Tokens of a prompt for each token of the trace's. Default: as many as let the longest prompt fit, at most 1.
    #[arg(long, value_name = "S", value_parser = parse_positive)]
    pub prompt_scale: Option<f64>,
    /// Most tokens of an answer; the trace's lengths are scaled like its prompts.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub max_tokens: usize,
    /// Profile of a PrfaaS worker, from `kimi-linear bench --profile`. Default: measured before the load.
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Profile of a local worker. Default: that of --profile, or what was measured.
    #[arg(long, value_name = "FILE", requires = "profile")]
    pub local_profile: Option<PathBuf>,
    /// Measure no profile: the report then has no prediction, and the frontend its own default.
    #[arg(long, conflicts_with = "profile")]
    pub no_profile: bool,
    /// Seed of prompts and of the built-in trace.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Folder for the report, the processes' logs and what they need while they run.
    #[arg(long, value_name = "DIR", default_value = "cluster-demo")]
    pub out: PathBuf,
}

/// The rate of a link in bits per second; `None` for a link that is not shaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub Option<u64>);

/// What the options name, opened and checked.
pub struct Inputs {
    /// The model's path.
    pub model: PathBuf,
    /// The opened model.
    pub files: LlmFiles,
    /// Maximum tokens of prompt and answer.
    pub context: usize,
    /// The requests to make a load of.
    pub trace: Trace,
    /// The profiles of PrfaaS and local workers, if they were given.
    pub profiles: Option<(Profile, Profile)>,
}

impl Options {
    /// The link's rate; `None` if it is not shaped.
    #[must_use]
    pub fn link_bits_per_second(&self) -> Option<u64> {
        match self.no_namespaces {
            true => None,
            false => self.link.0,
        }
    }

    /// Number of workers of each role.
    #[must_use]
    pub fn workers(&self) -> BTreeMap<Role, usize> {
        [
            (Role::Prefill, self.prefill),
            (Role::Decode, self.decode),
            (Role::Prfaas, self.prfaas),
        ]
        .into()
    }

    /// How workers are found.
    #[must_use]
    pub fn discovery(&self) -> Discovery {
        match self.etcd {
            true => Discovery::Etcd,
            false => Discovery::File,
        }
    }

    /// Opens and checks the model, the trace and the profiles.
    ///
    /// # Errors
    /// One that cannot be read; options that contradict each other.
    pub fn inputs(&self) -> Result<Inputs> {
        if self.no_namespaces && self.delay.is_some() {
            return Err(DemoError::Option {
                option: "--delay",
                what: "without namespaces there is no link to delay".into(),
            });
        }
        if self.prfaas == 0 && self.threshold != Threshold::Never {
            return Err(DemoError::Option {
                option: "--prfaas",
                what:
                    "without a PrfaaS worker nothing can be offloaded: use --threshold none with it"
                        .into(),
            });
        }
        let model = match &self.model {
            Some(model) => model.clone(),
            None => demo_model()?,
        };
        let files = LlmFiles::open(&model).map_err(|source| DemoError::Model {
            path: model.clone(),
            source: Box::new(source),
        })?;
        let longest = files.config.model_max_length;
        let context = self.max_model_len.unwrap_or(longest.min(8192));
        if context > longest {
            return Err(DemoError::Option {
                option: "--max-model-len",
                what: format!("the model was made for {longest} tokens"),
            });
        }
        let trace = match &self.trace {
            Some(path) => Trace::read(path)?,
            None => prompts::synthetic(self.requests, self.rate, context, self.seed)?,
        };
        let open = |path: &PathBuf| Profile::open(&path.to_string_lossy());
        let profiles = match (&self.profile, &self.local_profile) {
            (Some(prfaas), local) => {
                let prfaas = open(prfaas)?;
                let local = local.as_ref().map_or(Ok(prfaas.clone()), open)?;
                Some((prfaas, local))
            }
            (None, _) => None,
        };
        Ok(Inputs {
            model,
            files,
            context,
            trace,
            profiles,
        })
    }
}

fn demo_model() -> Result<PathBuf> {
    kimi_linear::demo::folder().map_err(|error| DemoError::Option {
        option: "--model",
        what: format!("the demo model cannot be unpacked: {error}"),
    })
}

fn parse_rate(text: &str) -> std::result::Result<Rate, String> {
    if text == "none" {
        return Ok(Rate(None));
    }
    let units = [('K', 1e3), ('M', 1e6), ('G', 1e9)];
    let unit = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(*unit)?, *factor)));
    let bits = unit.and_then(|(digits, factor)| Some(digits.parse::<f64>().ok()? * factor));
    // Below, a bucket of a few packets would hold for seconds; above, `tc` has no finer timer.
    let bits = bits.filter(|bits| (1e5..=1e11).contains(bits));
    bits.map(|bits| Rate(Some(bits as u64))).ok_or_else(|| {
        "expected a rate in bit/s from 100K to 100G, such as 100M, or none".to_owned()
    })
}

fn parse_time(text: &str) -> std::result::Result<Duration, String> {
    let wrong = || "expected a time such as 5ms or 0.1s".to_owned();
    let (digits, factor) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1e-3),
        (None, Some(digits)) => (digits, 1.0),
        (None, None) => return Err(wrong()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| wrong())?;
    let seconds = number * factor;
    if !(0.0..=10.0).contains(&seconds) {
        return Err("expected a time of at most 10s".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn parse_threshold(text: &str) -> std::result::Result<Threshold, String> {
    match text {
        "auto" => Ok(Threshold::Auto),
        "none" => Ok(Threshold::Never),
        number => number
            .parse()
            .map(Threshold::Fixed)
            .map_err(|_| "expected a number of tokens, none or auto".to_owned()),
    }
}

fn parse_positive(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse::<f64>().ok();
    let number = number.filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "expected a number above 0".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> std::result::Result<Options, clap::Error> {
        Options::try_parse_from([&["demo"], arguments].concat())
    }

    #[test]
    fn options_are_read() {
        let options = parse(&[
            "--link",
            "1G",
            "--delay",
            "5ms",
            "--threshold",
            "400",
            "--etcd",
        ])
        .unwrap();
        assert_eq!(options.link_bits_per_second(), Some(1_000_000_000));
        assert_eq!(options.delay, Some(Duration::from_millis(5)));
        assert_eq!(options.threshold, Threshold::Fixed(400));
        assert_eq!(options.discovery(), Discovery::Etcd);
        let options = parse(&["--no-namespaces", "--threshold", "none"]).unwrap();
        assert_eq!(options.link_bits_per_second(), None);
        assert_eq!(options.threshold, Threshold::Never);
        for wrong in [
            &["--link", "fast"],
            &["--link", "10"],
            &["--rate", "0"],
            &["--delay", "20s"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn contradictions_and_unreadable_inputs_are_refused() {
        let message = |arguments: &[&str]| {
            let inputs = parse(arguments).unwrap().inputs();
            inputs.err().expect("an error").to_string()
        };
        assert!(message(&["--no-namespaces", "--delay", "1ms"]).starts_with("--delay"));
        assert!(message(&["--prfaas", "0"]).starts_with("--prfaas"));
        assert!(message(&["--model", "/nowhere"]).contains("/nowhere"));
        assert!(message(&["--trace", "/nowhere"]).contains("/nowhere"));
        assert!(message(&["--profile", "/nowhere.json"]).contains("/nowhere.json"));
        let long = message(&["--max-model-len", "100000"]);
        assert!(long.contains("made for 8192"), "{long}");
        let inputs = parse(&[]).unwrap().inputs().unwrap();
        assert_eq!((inputs.context, inputs.trace.requests().len()), (8192, 60));
    }
}
