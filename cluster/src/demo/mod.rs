//! `kimi-linear-cluster-demo`: two clusters on this machine, from the first process to the report.
//!
//! - [`processes`]: a frontend and workers as processes, started, killed, restarted and stopped ([`parts`]: what a cluster consists of;
//!   `commands`: their command lines); [`namespaces`]: two network namespaces and a shaped link; [`status`]: the frontend's view.
//! - [`prompts`]: a load from a trace; [`load`]: clients; [`run`]: one load on one cluster, with the [`table`].
//! - [`measure`] and [`predict`]: profiles, and what a plan makes of them; [`report`].
//!
//! The tests of `cluster/` use [`processes`] and [`load`] too.

mod commands;
mod error;
pub mod load;
pub mod measure;
pub mod namespaces;
pub mod options;
pub mod parts;
pub mod predict;
pub mod processes;
pub mod prompts;
pub mod report;
pub mod run;
pub mod status;
pub mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kimi_linear_plan::profile::Profile;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub use self::error::{DemoError, Result};
use self::measure::Measured;
use self::namespaces::{Namespaces, Shape};
use self::options::{Inputs, Options};
use self::predict::Planned;
use self::processes::{Cluster, ClusterOptions, Network, Programs, Threshold};
use self::prompts::{Load, Scaling};
use self::report::{Report, Run, Setting, Summary};
use self::table::Table;

/// Runs the demo. Whatever happens, no process and no namespace is left.
///
/// # Errors
/// Options or a machine that cannot run it, found before anything starts; a process that ends; Ctrl-C.
pub async fn run(options: Options) -> Result<PathBuf> {
    // From here on a signal is remembered, so that it cannot end this process between two steps.
    let interrupts = Interrupts::new()?;
    let demo = Demo::new(options)?;
    tokio::select! {
        report = demo.run() => report,
        () = interrupts.next() => Err(DemoError::Interrupted),
    }
}

/// Ctrl-C, SIGTERM, or the end of the terminal.
struct Interrupts([Signal; 3]);

impl Interrupts {
    fn new() -> Result<Self> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ];
        let [one, two, three] = kinds.map(signal);
        let wrong = || DemoError::file("handle", "signals");
        Ok(Self([
            one.map_err(wrong())?,
            two.map_err(wrong())?,
            three.map_err(wrong())?,
        ]))
    }

    async fn next(mut self) {
        let all = self.0.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures::future::select_all(all).await;
    }
}

/// Everything that was opened and checked.
struct Demo {
    options: Options,
    inputs: Inputs,
    load: Load,
    cluster: ClusterOptions,
}

impl Demo {
    /// Checks the options and this machine, and creates the namespaces.
    fn new(options: Options) -> Result<Self> {
        let inputs = options.inputs()?;
        let scaling = Scaling {
            requests: options.requests,
            rate: options.rate,
            prompts: options.prompt_scale,
            answers: options.max_tokens,
            context: inputs.context,
            seed: options.seed,
        };
        let load = prompts::load(&inputs.trace, &inputs.files.tokenizer, &scaling)?;
        let programs = Programs::beside_this()?;
        let out = &options.out;
        std::fs::create_dir_all(out).map_err(DemoError::file("create", out))?;
        let folder = std::path::absolute(out).map_err(DemoError::file("read", out))?;
        let network = match options.no_namespaces {
            true => Network::loopback(),
            false => Network::Namespaces(Namespaces::create(&Shape {
                bits_per_second: options.link_bits_per_second(),
                delay: options.delay,
            })?),
        };
        let cluster = ClusterOptions {
            network: Arc::new(network),
            discovery: options.discovery(),
            workers: options.workers(),
            link_bits_per_second: options.link_bits_per_second(),
            context: Some(inputs.context),
            sequences: Some(options.max_num_seqs),
            threads: Some(options.threads),
            ..ClusterOptions::new(programs, &inputs.model, folder)
        };
        cluster.check()?;
        Ok(Self {
            options,
            inputs,
            load,
            cluster,
        })
    }

    /// Measures, runs the load once or twice, and writes the report; its path.
    async fn run(&self) -> Result<PathBuf> {
        let mut table = Table::new(
            self.load.requests.len(),
            self.options.link_bits_per_second(),
        );
        let measured = self.measured(&mut table).await?;
        let profiles = match (&measured, &self.inputs.profiles) {
            (Some(measured), _) => Some((measured.profile.clone(), measured.profile.clone())),
            (None, given) => given.clone(),
        };
        let ways = match self.options.compare {
            true => vec![
                ("without offload", Threshold::Never),
                ("PrfaaS", self.options.threshold),
            ],
            false if self.options.threshold == Threshold::Never => {
                vec![("without offload", Threshold::Never)]
            }
            false => vec![("PrfaaS", self.options.threshold)],
        };
        let mut runs = Vec::new();
        for (name, threshold) in ways {
            runs.push(
                self.one(name, threshold, profiles.as_ref(), &mut table)
                    .await?,
            );
        }
        let report = Report {
            setting: self.setting(),
            measured,
            runs,
        };
        report.write(&self.cluster.folder)?;
        Ok(self.cluster.folder.join("report.md"))
    }

    /// Measures a profile, unless one was given or none is wanted.
    async fn measured(&self, table: &mut Table) -> Result<Option<Measured>> {
        if self.options.no_profile || self.inputs.profiles.is_some() {
            return Ok(None);
        }
        let longest = self.load.requests.iter().map(|one| one.ids.len()).max();
        let longest = longest.unwrap_or_default();
        table.line(&format!(
            "measuring prefills of up to {longest} tokens, and a decode step"
        ));
        let options = ClusterOptions {
            threshold: Threshold::Never,
            ..self.cluster.clone()
        };
        let mut cluster = Cluster::start(options).await?;
        let tokenizer = &self.inputs.files.tokenizer;
        let work = measure::measure(&cluster, tokenizer, longest, self.options.seed);
        let measured = work.await;
        // A process that has ended says more than the request that it failed.
        cluster.check()?;
        let measured = measured?;
        cluster.shutdown().await;
        Ok(Some(measured))
    }

    /// Starts a cluster, runs the load on it and stops it.
    async fn one(
        &self,
        name: &'static str,
        threshold: Threshold,
        profiles: Option<&(Profile, Profile)>,
        table: &mut Table,
    ) -> Result<Run> {
        table.line(&format!("starting the cluster: {name}"));
        let options = ClusterOptions {
            threshold,
            frontend_arguments: self.planned_by(profiles)?,
            ..self.cluster.clone()
        };
        let mut cluster = Cluster::start(options).await?;
        table.line(&format!("the API: {}/v1", cluster.frontend_url()));
        table.heading();
        let outcome = run::run(&mut cluster, &self.load, table).await?;
        cluster.shutdown().await;
        let planned = profiles
            .map(|profiles| self.planned(profiles))
            .transpose()?;
        let prediction = planned.map(|planned| planned.predict(&self.load.trace, threshold));
        Ok(Run {
            name,
            summary: Summary::of(&outcome),
            prediction: prediction.transpose()?,
            outcome,
        })
    }

    /// What the frontend's scheduler starts from: the profiles, and the load's lengths.
    fn planned_by(&self, profiles: Option<&(Profile, Profile)>) -> Result<Vec<String>> {
        let options = predict::scheduler_options();
        let mut flags = vec![
            ("--window", options.window.to_string()),
            ("--settle", options.settle.to_string()),
            (
                "--search-every",
                format!("{}s", options.search_every.as_secs()),
            ),
        ];
        if let Some((prfaas, local)) = profiles {
            let folder = &self.cluster.folder;
            let lengths = folder.join("lengths.csv");
            predict::write_lengths(&self.load.trace, &lengths)?;
            let [first, second] = [("prfaas", prfaas), ("local", local)].map(|(name, profile)| {
                write_json(&folder.join(format!("{name}-profile.json")), profile)
            });
            flags.push(("--profile", first?));
            flags.push(("--local-profile", second?));
            flags.push(("--requests", shown(&lengths)));
        }
        let words = flags
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value]);
        Ok(words.collect())
    }

    fn planned(&self, (prfaas, local): &(Profile, Profile)) -> Result<Planned> {
        Planned::new(
            &self.cluster.workers,
            prfaas.clone(),
            local.clone(),
            self.options.link_bits_per_second(),
            self.options.delay.unwrap_or(Duration::ZERO),
        )
    }

    fn setting(&self) -> Setting {
        let (options, trace) = (&self.options, &self.load.trace);
        let new = trace.uncached().map_or(0.0, |lengths| lengths.mean());
        Setting {
            command: std::env::args().collect::<Vec<_>>().join(" "),
            model: match &options.model {
                Some(path) => shown(path),
                None => "the demo model".into(),
            },
            parameters: self.inputs.files.config.parameters(),
            workers: [options.prfaas, options.prefill, options.decode],
            threads: options.threads,
            cores: std::thread::available_parallelism().map_or(0, Into::into),
            link_bits_per_second: options.link_bits_per_second(),
            delay_ms: options.delay.unwrap_or_default().as_secs_f64() * 1000.0,
            discovery: if options.etcd { "etcd" } else { "file" },
            requests: self.load.requests.len(),
            rate: options.rate,
            prompt_tokens: [trace.prompt_tokens(), new],
            answer_tokens: trace.output_tokens(),
            prompt_scale: self.load.scale,
            cut: self.load.cut,
        }
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Writes a profile to a file; its path.
fn write_json(path: &Path, profile: &Profile) -> Result<String> {
    let text = serde_json::to_string_pretty(profile).map_err(std::io::Error::other);
    let written = text.and_then(|text| std::fs::write(path, text));
    written.map_err(DemoError::file("write", path))?;
    Ok(shown(path))
}
